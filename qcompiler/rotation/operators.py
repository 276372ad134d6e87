"""What operators do to an activation whose last axis is rotated."""

import onnx_ir as ir

from qcompiler.foldings.sizes import constant_ints, dims_of
from qcompiler.graph import constant_scalar

__all__ = ["is_square", "keeps_channels", "norm_inputs", "one_value", "reduces_channels", "shares_factor"]

_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
# What computes a factor of each token out of another.
_UNARY = {"Sqrt", "Reciprocal", "Cast", "Identity", "Abs", "Clip"}
_BINARY = {"Add", "Sub", "Mul", "Div", "Pow", "Max", "Min"}
_MEANS = ("ReduceMean", "ReduceSum")
_SQUARES = ("ReduceSumSquare", "ReduceL2")
# More operators than between a mean and what it is multiplied with in any model.
_LONGEST = 12
# Normalizations: whether they subtract the mean, and the inputs that hold gamma, beta, and a bias of the stream.
_NORMS: dict[str, tuple[bool, int, int | None, int | None]] = {
    "LayerNormalization": (True, 1, 2, None),
    "RMSNormalization": (False, 1, None, None),
    "SimplifiedLayerNormalization": (False, 1, None, None),
    "SkipLayerNormalization": (True, 2, 3, 4),
    "SkipSimplifiedLayerNormalization": (False, 2, None, 3),
}


def norm_inputs(node: ir.Node) -> tuple[bool, int, int | None, int | None] | None:
    """Of a normalization: whether it subtracts the mean, and which inputs are gamma, beta and bias, if there."""
    found = _NORMS.get(node.op_type) if node.domain in ("", "ai.onnx", "com.microsoft") else None
    if found is None:
        return None

    def present(index: int | None) -> int | None:
        return index if index is not None and index < len(node.inputs) and node.inputs[index] is not None else None

    return found[0], found[1], present(found[2]), present(found[3])


def one_value(value: ir.Value | None, other: ir.Value | None) -> bool:
    """Whether a value has one number for all channels of `other`: a constant, or one for each token."""
    return constant_scalar(value, other) is not None or _of_tokens(value, _LONGEST)


def shares_factor(node: ir.Node, index: int) -> bool:
    """Whether a Mul or Div multiplies input `index` with one number for each token, or one altogether."""
    if node.op_type == "Div" and index:
        return False
    return one_value(node.inputs[1 - index], node.inputs[index])


def keeps_channels(node: ir.Node, index: int) -> bool:
    """Whether the first result is input `index`, with other axes than the last perhaps moved, split or selected."""
    op, value = node.op_type, node.inputs[index]
    if op == "Concat":
        return not _is_last(node.attributes.get_int("axis", 0), value)
    if index or node.domain not in ("", "ai.onnx"):
        return False
    if op in ("Identity", "Dropout"):
        return True
    if op == "Cast":
        return ir.DataType(node.attributes["to"].as_int()) in _FLOATS
    if op == "Transpose":
        perm = node.attributes["perm"].as_ints() if "perm" in node.attributes else ()
        return bool(perm) and perm[-1] == len(perm) - 1
    if op == "Gather":
        return not _is_last(node.attributes.get_int("axis", 0), value)
    if op == "Slice":
        axes = constant_ints(node.inputs[3]) if len(node.inputs) > 3 else None
        return axes is not None and not any(_is_last(axis, value) for axis in axes)
    if op in ("Squeeze", "Unsqueeze"):
        axes = constant_ints(node.inputs[1]) if len(node.inputs) > 1 else None
        wider = value if op == "Squeeze" else node.outputs[0]
        return axes is not None and not any(_is_last(axis, wider) for axis in axes)
    return op == "Reshape" and _keeps_last(node)


def _keeps_last(node: ir.Node) -> bool:
    """Whether a Reshape leaves the last axis as it is."""
    before, after = dims_of(node.inputs[0]), dims_of(node.outputs[0])
    target = constant_ints(node.inputs[1])
    last = target[-1] if target and target[-1] > 0 else after[-1] if after else None
    return bool(before) and isinstance(last, int) and last > 1 and before[-1:] == [last]  # type: ignore[index]


def is_square(node: ir.Node, value: ir.Value) -> bool:
    """Whether the node squares a value, and nothing but sums over the channels reads the result."""
    squares = node.op_type == "Mul" and node.inputs[0] is node.inputs[1] is value
    squares |= node.op_type == "Pow" and node.inputs[0] is value and constant_scalar(node.inputs[1]) == 2
    result = node.outputs[0]
    readers = list(result.consumers())
    return bool(
        squares
        and node.domain in ("", "ai.onnx")
        and readers
        and not result.is_graph_output()
        and all(reader.op_type in _MEANS and reduces_channels(reader) for reader in readers)
    )


def reduces_channels(node: ir.Node) -> str:
    """What is left of the last axis, and no other: a "mean" of it, a "norm", or nothing that we know of."""
    if node.op_type not in (*_MEANS, *_SQUARES) or node.domain not in ("", "ai.onnx"):
        return ""
    axes = list(node.attributes["axes"].as_ints()) if "axes" in node.attributes else None
    if axes is None and len(node.inputs) > 1:
        axes = constant_ints(node.inputs[1])
    if axes is None or len(axes) != 1 or not _is_last(axes[0], node.inputs[0], unknown=False):
        return ""
    return "mean" if node.op_type in _MEANS else "norm"


def _of_tokens(value: ir.Value | None, steps: int) -> bool:
    """Whether a value has one number for each token: it is computed from sums over the channels."""
    node = value.producer() if value is not None else None
    if node is None or not steps or node.domain not in ("", "ai.onnx"):
        return False
    if reduces_channels(node):
        return node.attributes.get_int("keepdims", 1) == 1
    if node.op_type in _UNARY:
        return _of_tokens(node.inputs[0], steps - 1)
    if node.op_type not in _BINARY:
        return False
    found = [_of_tokens(operand, steps - 1) for operand in node.inputs]
    return any(found) and all(
        ok or constant_scalar(operand) is not None for ok, operand in zip(found, node.inputs, strict=True)
    )


def _is_last(axis: int, value: ir.Value | None, *, unknown: bool = True) -> bool:
    """Whether an axis is the last one; `unknown` where the rank is not known."""
    if axis < 0:
        return axis == -1
    dims = dims_of(value)
    return unknown if dims is None else axis == len(dims) - 1
