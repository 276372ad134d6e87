"""Cross-layer equalization: scale channels between two layers so that both use their range of weights equally.

Nagel et al. 2019, arXiv:1906.04721, section 4.1: f(s x) = s f(x) for positive s, so dividing output channel i of a
layer (its row of weights and its bias) by s_i and multiplying input channel i of the next one by s_i changes nothing.
With the ranges r1_i = max |W1_i| and r2_i = max |W2_i|, eq. 11 takes s_i = sqrt(r1_i r2_i) / r2_i = sqrt(r1_i / r2_i).
A factor that all s_i share changes nothing for the quantizer; it is chosen so that their geometric mean is one, and
activations stay about as large as they were. It needs no data.

1. Conv, ConvTranspose and Gemm, behind one another or with Relu, LeakyRelu, PRelu, Identity or pooling in between;
   groups and depthwise layers included. Chains are scaled pair by pair, again and again, until no scale changes by more
   than a thousandth (20 rounds at most); the weights are written once.
2. A channel whose range is nothing (1e-5) beside the largest of its layer keeps its scale. No channel is scaled by more
   than `limit`, since biases are scaled like the weights before them.
3. A bound on activations, Clip(0, 6), would have to move with each channel: such a pair is refused. With `relu6=true`
   the Clip becomes a Relu, as in section 5.1 of the paper: an approximation, exact where no activation reaches it.

Left alone, with a record that says why: layers whose result has several readers or is an output, whose weight or bias
is computed, or behind which anything else stands. A weight that others read too is untied first.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompiler.graph import constant_array, walk
from qcompiler.layers import channel_view, clip_bounds, is_constant, label, output_channels, store_constant
from qcompiler.lowering import make_node, replace_nodes
from qcompiler.passes.base import QuantPass, QuantPassResult, Stage
from qcompiler.records import SiteRecord
from qcompiler.sites import find_sites

__all__ = ["Equalize", "equalized"]

_LAYERS = ("Conv", "ConvTranspose", "Gemm")
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
# Operators that commute with a positive scale of each channel of their first input.
_HOMOGENEOUS = (
    "Relu", "LeakyRelu", "PRelu", "Identity", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool",
)  # fmt: skip
_ROUNDS = 20
_SMALL = 1e-3
_NOTHING = 1e-5


@dataclass(frozen=True)
class Options:
    """Options of `equalize`."""

    limit: float = field(default=100.0, metadata={"help": "the most by which a channel is scaled, up or down"})
    relu6: bool = field(
        default=False, metadata={"help": "turn Clip(0, 6) between two layers into Relu, which is an approximation"}
    )


@dataclass(eq=False)
class _Pair:
    """Two layers, and the bounded Clips between them."""

    first: ir.Node
    second: ir.Node
    clips: list[ir.Node]


class Equalize(QuantPass):
    """Equalizes the ranges of layers that follow one another."""

    name = "equalize"
    stage = Stage.TRANSFORM
    paper = "Nagel et al. 2019, arXiv:1906.04721"
    Options = Options

    def call(self, model: ir.Model) -> QuantPassResult:
        """Find the pairs, scale them together, write the weights once."""
        names = {site.node: site.name for site in find_sites(model)[0]}
        nodes = [node for node, _ in walk(model.graph) if node.domain == "" and node.op_type in _LAYERS]
        found = {node: self._pair(node) for node in nodes}
        outcome: dict[ir.Node, tuple[str, dict[str, float]]] = {
            node: (pair, {}) for node, pair in found.items() if isinstance(pair, str)
        }
        pairs = [pair for pair in found.values() if isinstance(pair, _Pair)]
        arrays: dict[tuple[ir.Node, int], np.ndarray] = {}
        while pairs:
            scales, figures = _balance(pairs, self.options.limit)
            with np.errstate(over="ignore"):
                arrays = _scaled(pairs, scales)
            wrong = {node for (node, _), array in arrays.items() if not np.isfinite(array.astype(np.float64)).all()}
            outcome.update((pair.first, figure) for pair, figure in zip(pairs, figures, strict=True))
            fitting = [pair for pair in pairs if pair.first not in wrong and pair.second not in wrong]
            if len(fitting) == len(pairs):
                break
            for pair in set(pairs) - set(fitting):
                outcome[pair.first] = ("a weight or bias would exceed the range of its type", {})
            pairs, arrays = fitting, {}
        for (node, index), array in arrays.items():
            store_constant(node, index, array)
        clips = [clip for pair in pairs for clip in pair.clips]
        for clip in clips:
            self._unbound(clip)
        records = [_record(names.get(node, label(node)), found[node], *outcome[node]) for node in nodes]
        return QuantPassResult(model, bool(arrays or clips), tuple(records))

    def _pair(self, node: ir.Node) -> "_Pair | str":
        """The layer whose input a layer computes, or why there is none that could be scaled with it."""
        value = node.outputs[0]
        clips: list[ir.Node] = []
        while True:
            uses = value.uses()
            if value.is_graph_output():
                return "its result is an output of the model"
            if len(uses) != 1:
                return f"its result has {len(uses)} readers"
            reader, index = next(iter(uses))
            if reader.graph is not node.graph or reader.domain != "" or index != 0:
                return f"its result is read by {reader.op_type} in a way that does not commute with a scale"
            if reader.op_type in _LAYERS:
                return _problem(node) or _problem(reader) or _mismatch(node, reader) or _Pair(node, reader, clips)
            bounds = clip_bounds(reader)
            if bounds is not None and bounds[0] == 0 and bounds[1] > 0:
                if bounds[1] < np.inf and not self.options.relu6:
                    return f"Clip at {bounds[1]:g} does not commute with a scale; relu6=true approximates it by Relu"
                clips += [reader] if bounds[1] < np.inf else []
            elif reader.op_type not in _HOMOGENEOUS:
                return f"{reader.op_type} does not commute with a scale"
            value = reader.outputs[0]

    def _unbound(self, clip: ir.Node) -> None:
        """Turn a Clip into a Relu."""
        graph = clip.graph
        assert graph is not None
        relu = make_node(graph, "Relu", [clip.inputs[0]], {}, clip, self.name)
        replace_nodes(graph, [clip], [relu], relu.outputs[0])


def _record(name: str, found: "_Pair | str", reason: str, metrics: dict[str, float]) -> SiteRecord:
    if isinstance(found, str) or not metrics:
        return SiteRecord(name, "skipped", reason=f"not equalized: {reason}")
    clips = ", Clip turned into Relu" if found.clips else ""
    return SiteRecord(name, "scaled", reason=f"equalized with '{label(found.second)}'{clips}", metrics=metrics)


def equalized(matrices: Sequence[np.ndarray], links: Sequence[tuple[int, int]], limit: float) -> list[np.ndarray]:
    """Equalize layers that follow one another (eq. 11, section 4.1.2 for more than two).

    Args:
        matrices: The largest |weight| over the kernel, float64 ``[groups, outputs, inputs]`` for each layer; changed in
            place to those of the scaled weights.
        links: (layer, next layer), as indices; the outputs of the one are the inputs of the other.
        limit: The largest scale; its inverse is the smallest.

    Returns:
        For each link the scale of each channel, float64 ``[channels]``: the first layer's outputs are divided by it and
        the second layer's inputs multiplied. Exactly one where nothing is gained.
    """
    scales = [np.ones(matrices[first][:, :, 0].size) for first, _ in links]
    alive = [_alive(*_facing(matrices[first], matrices[second])) for first, second in links]
    for _ in range(_ROUNDS):
        change = 0.0
        for link, (first, second) in enumerate(links):
            r1, r2 = (side[alive[link]] for side in _facing(matrices[first], matrices[second]))
            wanted = 0.5 * np.log(r1 / r2) + np.log(scales[link][alive[link]])
            wanted -= wanted.mean() if wanted.size else 0
            wanted = np.minimum(np.maximum(wanted, -np.log(limit)), np.log(limit))
            step = np.ones_like(scales[link])
            step[alive[link]] = np.exp(wanted) / scales[link][alive[link]]
            change = max(change, float(np.abs(np.log(step)).max(initial=0)))
            scales[link] = scales[link] * step
            matrices[first] /= step.reshape(len(matrices[first]), -1, 1)
            matrices[second] *= step.reshape(len(matrices[second]), 1, -1)
        if change < _SMALL:
            break
    return scales


def _balance(pairs: list[_Pair], limit: float) -> tuple[list[np.ndarray], list[tuple[str, dict[str, float]]]]:
    """The scale of each pair, and for its record the reason where all are one, or figures."""
    layers = list(dict.fromkeys(node for pair in pairs for node in (pair.first, pair.second)))
    matrices = [_magnitudes(node) for node in layers]
    links = [(layers.index(pair.first), layers.index(pair.second)) for pair in pairs]
    facing = [_facing(matrices[first], matrices[second]) for first, second in links]
    scales = equalized(matrices, links, limit)
    figures: list[tuple[str, dict[str, float]]] = []
    for pair, scale, ranges, (first, second) in zip(pairs, scales, facing, links, strict=True):
        if np.abs(np.log(scale)).max() < 2 * _SMALL:
            scale[:] = 1
        if (scale == 1).all() and not pair.clips:
            figures.append(("its ranges are equal already", {}))
            continue
        largest = float(np.maximum(scale, 1 / scale).max())
        alive = _alive(*ranges)
        before, after = _spread(ranges, alive), _spread(_facing(matrices[first], matrices[second]), alive)
        figures.append(("", {"largest_scale": largest, "spread_before": before, "spread_after": after}))
    return scales, figures


def _facing(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The range of each channel between two layers, [channels], on both sides."""
    return first.max(2).reshape(-1), second.max(1).reshape(-1)


def _alive(r1: np.ndarray, r2: np.ndarray) -> np.ndarray:
    """Which channels have a range on both sides, bool [channels]."""
    return np.asarray((r1 > _NOTHING * r1.max()) & (r2 > _NOTHING * r2.max()))


def _spread(facing: tuple[np.ndarray, np.ndarray], alive: np.ndarray) -> float:
    """How many times larger the largest range of a channel is than the smallest, on the side where that is more."""
    sides = [side[alive] for side in facing]
    return max((float(side.max() / side.min()) for side in sides if side.size), default=1.0)


def _magnitudes(node: ir.Node) -> np.ndarray:
    """The largest |weight| over the kernel, float64 [groups, outputs, inputs]."""
    weight = node.inputs[1]
    assert weight is not None
    view = np.abs(channel_view(node, constant_array(weight)).astype(np.float64))
    return np.asarray(view.max(3))


def _scaled(pairs: list[_Pair], scales: list[np.ndarray]) -> dict[tuple[ir.Node, int], np.ndarray]:
    """The new weights and biases by node and number of input, in the dtypes that they are stored in."""
    outputs = {pair.first: scale for pair, scale in zip(pairs, scales, strict=True) if (scale != 1).any()}
    inputs = {pair.second: scale for pair, scale in zip(pairs, scales, strict=True) if (scale != 1).any()}
    arrays = {}
    for node in dict.fromkeys((*outputs, *inputs)):
        weight, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
        assert weight is not None
        stored = constant_array(weight)
        array = stored.astype(np.float64)
        view = channel_view(node, array)
        if node in inputs:
            view *= inputs[node].reshape(len(view), 1, -1, 1)
        if node in outputs:
            view /= outputs[node].reshape(len(view), -1, 1, 1)
        arrays[node, 1] = array.astype(stored.dtype)
        if node in outputs and bias is not None:
            stored = constant_array(bias)
            arrays[node, 2] = (stored.astype(np.float64) / outputs[node]).astype(stored.dtype)
    return arrays


def _problem(node: ir.Node) -> str:
    """Why a layer cannot be scaled, or nothing."""
    weight, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    if not is_constant(weight):
        return f"the weight of '{label(node)}' is no constant"
    assert weight is not None and weight.const_value is not None
    if weight.const_value.dtype not in _FLOATS:
        return f"the weight of '{label(node)}' is {weight.const_value.dtype.name.lower()}"
    if bias is not None and not is_constant(bias):
        return f"the bias of '{label(node)}' is no constant"
    if node.op_type == "Gemm" and node.attributes.get_int("transA", 0) == 1:
        return f"'{label(node)}' transposes its input"
    if node.op_type == "Gemm" and bias is not None:
        shape = constant_array(bias).shape
        if math.prod(shape) not in (1, output_channels(node)) or (shape and math.prod(shape) != shape[-1]):
            return f"the bias of '{label(node)}' has one value for each row"
    return ""


def _mismatch(first: ir.Node, second: ir.Node) -> str:
    """Why the channels of two layers are not the same, or nothing."""
    groups, _, inputs = _magnitudes(second).shape
    if output_channels(first) == groups * inputs:
        return ""
    return f"'{label(second)}' reads {groups * inputs} channels, not {output_channels(first)}"
