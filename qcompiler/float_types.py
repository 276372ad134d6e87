"""Which inputs and outputs of an operator may be float16, and the types of values that a model does not declare.

For standard operators the schema says so; for ONNX Runtime's own a table does, our own take any, and what is in none
of these stays float32.
"""

from functools import cache

import onnx
import onnx_ir as ir

from qcompiler.graph import walk
from qcompiler.kernels.schemas import DOMAIN

__all__ = ["halves", "infer_dtypes"]

_FLOAT, _HALF = "tensor(float)", "tensor(float16)"
# ONNX Runtime's operators with float16 kernels or signatures -> inputs that are float32 in any case. Measured on 1.31.
_RUNTIME: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(
        (
            "Attention", "BiasGelu", "FastGelu", "FusedMatMul", "GatherBlockQuantized", "Gelu", "MatMulNBits",
            "MultiHeadAttention", "QuickGelu", "RotaryEmbedding", "SimplifiedLayerNormalization",
            "SkipLayerNormalization", "SkipSimplifiedLayerNormalization",
        ),
        (),
    ),
    "GroupQueryAttention": (12, 13),  # scales of a quantized cache
    "QMoE": (15, 16, 17, 18),
}  # fmt: skip
# Their results that are float32 in any case: statistics of normalizations.
_STATISTICS = {"SimplifiedLayerNormalization": (1,), "SkipLayerNormalization": (1, 2),
               "SkipSimplifiedLayerNormalization": (1, 2)}  # fmt: skip
# Operators with bodies: their values are float16 on the way in and out.
_CONTROL = ("If", "Loop", "Scan")


def halves(node: ir.Node, opset: int) -> tuple[list[bool], list[bool]]:
    """For each input and each output of a node whether it may be float16; one that is no float means nothing."""
    if node.domain == "" and node.op_type in _CONTROL:
        return [True] * len(node.inputs), [True] * len(node.outputs)
    found = _schema(node.op_type, opset) if node.domain == "" else None
    if found is None:
        known = node.domain == DOMAIN or (node.op_type in _RUNTIME and node.domain in ("", "com.microsoft"))
        wide = _RUNTIME.get(node.op_type, ())
        statistics = _STATISTICS.get(node.op_type, ())
        return (
            [known and index not in wide for index in range(len(node.inputs))],
            [known and index not in statistics for index in range(len(node.outputs))],
        )
    inputs, outputs, allowed = found
    return (
        [_HALF in allowed.get(kind, (kind,)) for kind in _padded(inputs, len(node.inputs))],
        [_HALF in allowed.get(kind, (kind,)) for kind in _padded(outputs, len(node.outputs))],
    )


def _padded(kinds: tuple[str, ...], count: int) -> list[str]:
    """The kinds of `count` values, the last kind being that of all further ones."""
    return [kinds[min(index, len(kinds) - 1)] for index in range(count)] if kinds else []


_Kinds = tuple[tuple[str, ...], tuple[str, ...], dict[str, tuple[str, ...]]]


@cache
def _schema(op_type: str, opset: int) -> _Kinds | None:
    """Kinds of inputs and of outputs, and what types each kind may be; None for an operator that is not standard."""
    try:
        schema = onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        return None
    allowed = {c.type_param_str: tuple(c.allowed_type_strs) for c in schema.type_constraints}
    return tuple(i.type_str for i in schema.inputs), tuple(o.type_str for o in schema.outputs), allowed


def infer_dtypes(model: ir.Model) -> None:
    """Declare the element type of each value that has none and whose type follows from what its node reads."""
    opset = model.graph.opset_imports.get("", 0)
    for node, _ in walk(model.graph):
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                # Bodies come after their node; those of If have all they need.
                for inner, _ in walk(attribute.as_graph()):
                    _infer(inner, opset)
        _infer(node, opset)


def _infer(node: ir.Node, opset: int) -> None:
    if all(output.dtype is not None for output in node.outputs):
        return
    bodies = [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
    kinds = _schema(node.op_type, opset) if node.domain == "" else None
    for index, output in enumerate(node.outputs):
        if output.dtype is not None:
            continue
        if node.op_type in _CONTROL and bodies:
            found = bodies[0].outputs[index + (node.op_type == "Loop")].dtype
        else:
            found = _from_attributes(node) or _from_inputs(node, index, kinds)
        if found is not None:
            output.dtype = found


def _from_attributes(node: ir.Node) -> ir.DataType | None:
    for name in ("to", "dtype", "output_dtype"):
        attribute = node.attributes.get(name)
        if attribute is not None and attribute.type == ir.AttributeType.INT and attribute.as_int():
            return ir.DataType(attribute.as_int())
    value = node.attributes.get("value")
    if value is not None and value.type == ir.AttributeType.TENSOR:
        return value.as_tensor().dtype
    if node.op_type in ("ConstantOfShape", "EyeLike", "RandomNormal", "RandomUniform"):
        return ir.DataType.FLOAT
    return None


def _from_inputs(node: ir.Node, index: int, kinds: _Kinds | None) -> ir.DataType | None:
    if kinds is None:
        types = [value.dtype for value in node.inputs if value is not None]
        return next((t for t in types if t in (ir.DataType.FLOAT, ir.DataType.FLOAT16)), types[0] if types else None)
    wanted = _padded(kinds[1], len(node.outputs))[index]
    if wanted not in kinds[2]:
        return {_FLOAT: ir.DataType.FLOAT, "tensor(int64)": ir.DataType.INT64, "tensor(bool)": ir.DataType.BOOL,
                "tensor(uint8)": ir.DataType.UINT8, "tensor(int32)": ir.DataType.INT32}.get(wanted)  # fmt: skip
    for value, kind in zip(node.inputs, _padded(kinds[0], len(node.inputs)), strict=True):
        if kind == wanted and value is not None and value.dtype is not None:
            return value.dtype
    allowed = kinds[2][wanted]
    return (
        ir.DataType.BOOL
        if allowed == ("tensor(bool)",)
        else ir.DataType.INT64
        if allowed == ("tensor(int64)",)
        else None
    )
