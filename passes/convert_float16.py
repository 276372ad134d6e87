"""Make float16 of what stays float32: constants, and the values that nodes compute.

1. An operator computes in float16 where its definition allows that, as our own do. Scales of Q/DQ and MatMulNBits
   come along; with `float16` in the configuration they were rounded to float16 before their codes were chosen.
2. Kept in float32, behind Casts: operators in which float16 loses too much (powers, means, sums, logarithms, angles,
   integers that become floats) and elementwise operators that read nothing but what these compute; operators, or
   single inputs, that have no float16; and, but for cuda and tensorrt, operators between decoders and encoders of
   activations, which run on integers in float32 models only. Two such operators in a row have no Cast between them.
3. Inputs and outputs of the model stay float32 unless `io` is set; a float key-value cache of GroupQueryAttention is
   float16 in any case, since a Cast would copy all of it on every run.
4. Constants beyond 65504 become 65504, and the report names them; it also counts those that are subnormal in float16.

Left alone: other types than float32, and models with sequences of tensors.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompiler.config import CompileConfig
from qcompiler.float_types import halves, infer_dtypes
from qcompiler.graph import PASS_KEY, collect_names, constant_array, unique_name, walk
from qcompiler.numerics.half import HalfLoss, half_loss, to_half
from qcompiler.passes.base import QuantPass, QuantPassResult, Stage
from qcompiler.records import SiteRecord

__all__ = ["ConvertFloat16"]

_WIDE, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
# Operators whose results float16 holds badly: they overflow, cancel, or count past 2048.
_PRECISE = {
    "Cos", "CumSum", "Exp", "Log", "Pow", "Range", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSum",
    "ReduceLogSumExp", "ReduceMean", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Sin", "Sqrt",
}  # fmt: skip
# Operators that go on in float32 where all they read is that already.
_FOLLOW = {
    "Abs", "Add", "Clip", "Concat", "Div", "Expand", "Floor", "Max", "Min", "Mul", "Neg", "Reshape", "Slice", "Squeeze",
    "Sub", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip
# Past and present of the operator whose caches take its type.
_CACHES = ((3, 4), (1, 2))


@dataclass(frozen=True)
class Options:
    """Options of `convert_float16`."""

    io: bool = field(default=False, metadata={"help": "make the model's float inputs and outputs float16 too"})
    keep: str = field(default="", metadata={"help": "further operators to keep in float32, joined with +"})


class ConvertFloat16(QuantPass):
    """Converts a model and everything in it."""

    name = "convert_float16"
    stage = Stage.LOWER
    after = ("export_qdq", "fuse_custom", "fuse_gather", "fuse_matmul_nbits", "quantize_recurrent", "raise_opset")
    Options = Options

    @classmethod
    def applies(cls, config: CompileConfig) -> bool:
        """Where it is asked for."""
        return config.float16

    def call(self, model: ir.Model) -> QuantPassResult:
        """Find the types, convert all graphs, then the constants."""
        if any(isinstance(value.type, ir.SequenceType) for value in _values(model)):
            reason = "left in float32: the model computes sequences of tensors"
            return QuantPassResult(model, False, (SiteRecord("float16", "rewritten", reason=reason),))
        collect_names(model.graph)
        infer_dtypes(model)
        before = {value for value in _values(model) if value.dtype == _WIDE}
        keep = _PRECISE | {name for name in self.options.keep.split("+") if name}
        apart = set() if self.context.config.target in ("cuda", "tensorrt") else _on_integers(model)
        converter = _Converter(model, self.name, self.options.io, keep, before, apart)
        converter.convert()
        changed = any(value.dtype != _WIDE for value in before)
        return QuantPassResult(model, changed, converter.records() if changed else ())


def _values(model: ir.Model) -> Iterable[ir.Value]:
    for graph in model.graphs():
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield from node.outputs


class _Converter:
    """Converts the graphs of one model, outermost first."""

    def __init__(
        self,
        model: ir.Model,
        pass_name: str,
        io: bool,
        keep: set[str],
        before: set[ir.Value],
        apart: set[ir.Node],
    ) -> None:
        self.model, self.pass_name, self.io, self.keep = model, pass_name, io, keep
        self.before, self.apart = before, apart
        self.opset = model.graph.opset_imports.get("", 0)
        self.kept = 0
        self.losses: dict[str, HalfLoss] = {}
        self._wide: set[ir.Value] = set()  # computed values that stay float32
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._caches = _cache_values(model.graph)

    def convert(self) -> None:
        """Convert the model."""
        graph = self.model.graph
        for value in graph.inputs:
            if value.dtype == _WIDE and value.const_value is None:
                self._declare(value, wide=not self.io and value not in self._caches)
        self._body(graph)
        for index, value in enumerate(graph.outputs):
            if value.const_value is None and value in self.before:
                self._output(graph, index, wide=not self.io and value not in self._caches)

    def records(self) -> tuple[SiteRecord, ...]:
        """What was lost, in words."""
        found = [
            SiteRecord(name, "rewritten", reason=f"{loss.beyond} of {loss.size} values beyond 65504 became 65504 in "
                       f"float16, the largest of {loss.largest:.3g}")
            for name, loss in self.losses.items() if loss.beyond
        ]  # fmt: skip
        subnormal = sum(loss.subnormal for loss in self.losses.values())
        size = sum(loss.size for loss in self.losses.values())
        share = f"{subnormal} of them ({subnormal / max(size, 1):.2%})"
        text = f"{size} constants converted, {share} too small for full precision"
        if self.kept:
            text += f"; {self.kept} operators kept in float32"
        return (*found, SiteRecord("float16", "rewritten", reason=text))

    def _body(self, graph: ir.Graph) -> None:
        """Convert the nodes of a graph, and the bodies in them."""
        for node in list(graph):
            bodies = [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
            inputs, outputs = halves(node, self.opset)
            if self._precise(node):
                inputs, outputs = [False] * len(inputs), [False] * len(outputs)
                self.kept += 1
            elif node in self.apart or not _scale_fits(node):
                inputs, outputs = [False] * len(inputs), [False] * len(outputs)
            elif not any(output.dtype == _WIDE for output in node.outputs) and self._reads_wide(node):
                inputs = [False] * len(inputs)  # shapes and comparisons take what is there
            for index, (value, half) in enumerate(zip(list(node.inputs), inputs, strict=True)):
                if value is not None and value in self.before:
                    node.replace_input_with(index, self._as(value, _HALF if half else _WIDE))
            for body in bodies:
                for value in body.inputs:
                    if value.dtype == _WIDE:
                        self._declare(value, wide=False)
                self._body(body)
                for index, value in enumerate(body.outputs):
                    if value in self.before:
                        self._output(body, index, wide=False)
            self._retarget(node, outputs)
            for output, half in zip(node.outputs, outputs, strict=True):
                if output.dtype == _WIDE:
                    self._declare(output, wide=not half)

    def _reads_wide(self, node: ir.Node) -> bool:
        return any(value in self._wide for value in node.inputs if value is not None)

    def _precise(self, node: ir.Node) -> bool:
        """Whether the node computes in float32 although it need not."""
        if node.domain or not any(output.dtype == _WIDE for output in node.outputs):
            return False
        if node.op_type in self.keep:
            return True
        if node.op_type == "Cast":
            source = node.inputs[0]
            return source is not None and source not in self.before and source.dtype != ir.DataType.BOOL
        if node.op_type not in _FOLLOW:
            return False
        floats = [value for value in node.inputs if value is not None and value.dtype in (_WIDE, _HALF)]
        varying = [value for value in floats if value.const_value is None]
        constants = [value for value in floats if value.const_value is not None]
        # A constant like -3.4e38 would be infinite behind the Cast; in float16 it is limited.
        fits = all(not half_loss(constant_array(value)).beyond for value in constants)
        return bool(varying) and fits and all(value in self._wide and not value.is_graph_input() for value in varying)

    def _retarget(self, node: ir.Node, outputs: list[bool]) -> None:
        """Let the attributes of a node whose result becomes float16 say so."""
        if not outputs or not outputs[0] or node.outputs[0].dtype != _WIDE or node.domain:
            return
        for name in ("to", "dtype", "output_dtype"):
            attribute = node.attributes.get(name)
            if attribute is not None and attribute.value == int(_WIDE):
                node.attributes[name] = ir.AttrInt64(name, int(_HALF))
        value = node.attributes.get("value")
        if value is not None and value.type == ir.AttributeType.TENSOR and value.as_tensor().dtype == _WIDE:
            array = value.as_tensor().numpy()
            self.losses[node.name or node.op_type] = half_loss(array)
            node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(to_half(array)))
        elif node.op_type == "ConstantOfShape" and value is None:
            node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(np.zeros(1, np.float16)))

    def _declare(self, value: ir.Value, *, wide: bool) -> None:
        if wide:
            self._wide.add(value)
        else:
            value.type = ir.TensorType(_HALF)  # values may share the type that they had

    def _as(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """The value in float32 or float16."""
        if value.dtype == dtype:
            return value
        if (value, dtype) not in self._casts:
            constant = value.const_value is not None and dtype == _HALF
            self._casts[value, dtype] = self._constant(value) if constant else self._cast(value, dtype)
        return self._casts[value, dtype]

    def _constant(self, value: ir.Value) -> ir.Value:
        """A float16 twin of a constant; cleanup removes what nobody reads any more."""
        tensor, graph = value.const_value, value.graph
        assert tensor is not None and graph is not None
        self.losses[value.name or ""] = half_loss(constant_array(value))
        name = unique_name(graph, f"{value.name}_half")
        shape = ir.Shape(tensor.shape.numpy())
        lazy = ir.LazyTensor(lambda: ir.Tensor(to_half(tensor.numpy()), name=name), _HALF, shape, name=name)
        twin = ir.Value(name=name, shape=value.shape, type=ir.TensorType(_HALF), const_value=lazy)
        graph.register_initializer(twin)
        return twin

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """The result of a Cast directly behind what computes the value."""
        producer, graph = value.producer(), value.graph
        assert isinstance(graph, ir.Graph)
        name = unique_name(graph, f"{value.name}_{'half' if dtype == _HALF else 'float'}")
        output = ir.Value(name=name, shape=value.shape, type=ir.TensorType(dtype))
        node = ir.node("Cast", [value], {"to": int(dtype)}, outputs=[output], name=f"{name}_Cast")
        node.metadata_props[PASS_KEY] = self.pass_name
        if producer is not None:
            graph.insert_after(producer, node)
        else:
            graph.insert_before(graph[0], node)
        return output

    def _output(self, graph: ir.Graph, index: int, *, wide: bool) -> None:
        """Give an output its type; the name stays with it."""
        value, dtype = graph.outputs[index], _WIDE if wide else _HALF
        if value.dtype == dtype:
            return
        output, name = self._as(value, dtype), value.name
        graph.outputs[index] = output
        if graph is self.model.graph and not value.is_graph_input():
            value.name, output.name = unique_name(graph, f"{name}_inner"), name


def _cache_values(graph: ir.Graph) -> set[ir.Value]:
    """Inputs and outputs of the model that are the float cache of a GroupQueryAttention."""
    found: set[ir.Value] = set()
    for node in graph:
        if node.op_type == "GroupQueryAttention":
            past = [node.inputs[index] for index in _CACHES[0] if index < len(node.inputs)]
            present = [node.outputs[index] for index in _CACHES[1] if index < len(node.outputs)]
            found.update(value for value in (*past, *present) if value is not None and value.dtype == _WIDE)
    return found


def _scale_fits(node: ir.Node) -> bool:
    """Whether a node is none that has a constant scale which would lose precision in float16."""
    scale = node.inputs[1] if node.op_type in ("QuantizeLinear", "DequantizeLinear") else None
    if scale is None or scale.const_value is None or scale.dtype != _WIDE:
        return True
    loss = half_loss(constant_array(scale))
    return not loss.beyond and not loss.subnormal


def _on_integers(model: ir.Model) -> set[ir.Node]:
    """Encoders and decoders of activations, what reads decoded ones, and the decoders of its constants."""
    found: set[ir.Node] = set()
    for node, _ in walk(model.graph):
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear"):
            found.add(node)
        elif codes is not None and codes.const_value is None:
            found.add(node)
            for reader in node.outputs[0].consumers():
                sources = (value.producer() for value in reader.inputs if value is not None)
                found.update((reader, *(made for made in sources if made and made.op_type == "DequantizeLinear")))
    return found
