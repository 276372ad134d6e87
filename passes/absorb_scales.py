"""Let quantization do what stands next to it for nothing (see `absorbing`).

1. Scaling and shifting by single values in front of a QuantizeLinear goes into its scale and zero point, where the
   shift is a whole number of steps. What decodes the codes stays as it is.
2. Scaling by a single value behind a DequantizeLinear that nothing else reads goes into its scale.
3. A HardSigmoid of decoded codes whose result is encoded again becomes a Clip of the codes, 7 times faster than any
   float operator; a scale and zero point of its own decode it.

Left alone: everything that is not between float and 8-bit codes with constant scales, shifts between steps, and a
HardSigmoid that no code leaves zero at. The graph computes the same up to float rounding, but for 3, which saves one
rounding.
"""

import numpy as np
import onnx_ir as ir

from qcompiler.absorbing import hard_sigmoid, scalar_step
from qcompiler.config import CompileConfig
from qcompiler.graph import constant_array
from qcompiler.lowering import add_constant, make_node
from qcompiler.passes.base import QuantPass, QuantPassResult, Stage, quantizes_activations
from qcompiler.records import SiteRecord

__all__ = ["AbsorbScales"]

_CODES = (ir.DataType.UINT8, ir.DataType.INT8)
# Of a step: how far from a whole number of steps a shift may be.
_SLACK = 1 / 32


class AbsorbScales(QuantPass):
    """Moves scalars and hard sigmoids into scales and codes."""

    name = "absorb_scales"
    stage = Stage.QUANTIZE
    after = ("insert_qdq", "tune")  # what trains turns quantizers off and on, so what decodes has to fit what encodes

    @classmethod
    def applies(cls, config: CompileConfig) -> bool:
        """Where scales are constants."""
        return quantizes_activations(config, dynamic=False)

    def call(self, model: ir.Model) -> QuantPassResult:
        """Run the cases one after the other."""
        records = []
        for case, reason in (
            (self._encode, "goes into the scale of the codes made of it"),
            (self._decode, "goes into the scale of the decoder before it"),
            (self._clip, "is a Clip of codes now"),
        ):
            for node in list(model.graph):
                if node.graph is not None and (names := case(model.graph, node)):
                    records += [SiteRecord(name, "rewritten", reason=reason) for name in names]
        return QuantPassResult(model, bool(records), tuple(records))

    def _encode(self, graph: ir.Graph, node: ir.Node) -> list[str]:
        grid = _grid(node, "QuantizeLinear")
        if grid is None:
            return []
        scale, zero, dtype = grid
        names: list[str] = []
        limits = np.iinfo(dtype)
        value = node.inputs[0]
        while value is not None and (producer := value.producer()) is not None:
            step = scalar_step(producer)
            if step is None or len(value.uses()) != 1 or value.is_graph_output() or producer.graph is not graph:
                break
            steps = step[2] / scale
            moved = zero + round(steps)
            tiny = not float(np.finfo(np.float32).tiny) < scale / step[1] < float(np.finfo(np.float32).max)
            if tiny or abs(steps - round(steps)) > _SLACK or not limits.min <= moved <= limits.max:
                break
            value, scale, zero = step[0], scale / step[1], moved
            names.append(_name(producer))
            node.replace_input_with(0, value)
            graph.remove(producer, safe=True)
        if names:
            self._set(graph, node, scale, zero, dtype)
        return names

    def _decode(self, graph: ir.Graph, node: ir.Node) -> list[str]:
        grid = _grid(node, "DequantizeLinear")
        names: list[str] = []
        while grid is not None and len(uses := list(node.outputs[0].uses())) == 1:
            reader = uses[0].node
            step = scalar_step(reader)
            if step is None or step[2] or node.outputs[0].is_graph_output() or reader.graph is not graph:
                break
            scale, zero, dtype = grid
            scale *= step[1]
            if not float(np.finfo(np.float32).tiny) < scale < float(np.finfo(np.float32).max):
                break
            self._set(graph, node, scale, zero, dtype)
            names.append(_name(reader))
            _take_over(graph, reader, node.outputs[0])
            grid = _grid(node, "DequantizeLinear")
        return names

    def _clip(self, graph: ir.Graph, node: ir.Node) -> list[str]:
        if node.op_type != "HardSigmoid" or node.domain != "" or node.inputs[0] is None:
            return []
        decode, encode = node.inputs[0].producer(), _only_reader(node.outputs[0])
        source = _grid(decode, "DequantizeLinear")
        if decode is None or encode is None or source is None or _grid(encode, "QuantizeLinear") is None:
            return []
        scale, zero, dtype = source
        alpha, beta = hard_sigmoid(node)
        readers = [_grid(reader, "DequantizeLinear") is not None for reader in encode.outputs[0].consumers()]
        if alpha <= 0 or not all(readers) or encode.outputs[0].is_graph_output():
            return []
        limits = np.iinfo(dtype)
        steps = beta / alpha / scale
        low, high = zero - round(steps), min(zero + round((1 - beta) / alpha / scale), limits.max)
        if abs(steps - round(steps)) > _SLACK or not limits.min <= low < high:
            return []
        codes = decode.inputs[0]
        assert codes is not None
        if (low, high) != (limits.min, limits.max):
            bounds = [add_constant(graph, f"{_name(node)}_{end}", np.asarray(code, dtype))
                      for end, code in (("low", low), ("high", high))]  # fmt: skip
            clip = make_node(graph, "Clip", [codes, *bounds], {}, node, self.name)
            clip.outputs[0].type, clip.outputs[0].shape = codes.type, node.outputs[0].shape
            graph.insert_before(node, clip)
            codes = clip.outputs[0]
        for reader in list(encode.outputs[0].consumers()):
            reader.replace_input_with(0, codes)
            self._set(graph, reader, scale * alpha, low, dtype)
        name = _name(node)
        graph.remove([encode, node], safe=True)
        if not decode.outputs[0].uses():
            graph.remove(decode, safe=True)
        return [name]

    def _set(self, graph: ir.Graph, node: ir.Node, scale: float, zero: int, dtype: np.dtype[np.integer]) -> None:
        """Give a node a scale and zero point of its own, of rank 0."""
        name, old = _name(node), node.inputs[1]
        assert old is not None
        kind = constant_array(old).dtype
        node.replace_input_with(1, add_constant(graph, f"{name}_scale", np.asarray(scale, kind)))
        node.replace_input_with(2, add_constant(graph, f"{name}_zero_point", np.asarray(zero, dtype)))


def _grid(node: ir.Node | None, op_type: str) -> tuple[float, int, "np.dtype[np.integer]"] | None:
    """Scale, zero point and dtype of the codes of a node that makes or reads 8-bit codes of activations."""
    if node is None or node.op_type != op_type or node.domain != "" or len(node.inputs) != 3:
        return None
    value, scale, zero = node.inputs
    if value is None or value.const_value is not None:
        return None
    constants = [part.const_value if part is not None and part.is_initializer() else None for part in (scale, zero)]
    if any(constant is None or constant.size != 1 for constant in constants):
        return None
    assert constants[0] is not None and constants[1] is not None
    if constants[1].dtype not in _CODES or constants[0].dtype != ir.DataType.FLOAT:
        return None
    numbers = [constant.numpy() for constant in constants if constant is not None]
    return float(numbers[0].reshape(())), int(numbers[1].reshape(())), numbers[1].dtype


def _name(node: ir.Node) -> str:
    return node.name or node.outputs[0].name or node.op_type


def _only_reader(value: ir.Value) -> ir.Node | None:
    readers = value.consumers()
    return readers[0] if len(value.uses()) == 1 and not value.is_graph_output() else None


def _take_over(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Remove a node, whose result, with name, type and shape, becomes `value`."""
    result, name = node.outputs[0], node.outputs[0].name
    value.type, value.shape = result.type, result.shape
    result.replace_all_uses_with(value, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    value.name = name
