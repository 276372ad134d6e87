"""Fold what scales and shifts channels into the weight and bias of the layer before it.

1. BatchNormalization in its inference form behind a Conv, ConvTranspose, Gemm or MatMul (of a matrix result): row n of
   the weight is multiplied by gamma_n / sqrt(var_n + eps), and the bias becomes beta_n + (bias_n - mean_n) times that.
2. A constant Mul, Add, Sub or Div with one value, or one for each channel, behind a Conv or ConvTranspose, as exporters
   write a normalization that they took apart; behind the others only between the layer and a BatchNormalization.
3. Several of these in a row. A bias is made where there was none; behind a MatMul it is an Add.
4. A Mul, Add, Sub or Div with one value in front of convolutions that alone read its result; one that shifts, if they
   have no padding, whose zeros it would not shift.

Left alone: what is not the only reader of the layer's result, constants of another shape, and layers whose weight or
bias is computed. A record says why where a normalization is meant, BatchNormalization itself or a scale and a shift of
each channel in a row. A weight that others read too is untied first. The arithmetic is float64, rounded once to the
dtype of the weight.
"""

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.config import CompileConfig
from qcompiler.graph import constant_array, constant_scalar, walk
from qcompiler.layers import channel_view, is_constant, label, output_channels, store_constant
from qcompiler.lowering import add_constant, make_node
from qcompiler.passes.base import QuantPass, QuantPassResult, Stage, quantizes_activations
from qcompiler.records import SiteRecord
from qcompiler.sites import find_sites

__all__ = ["FoldBatchnorm"]

_CONVOLUTIONS = ("Conv", "ConvTranspose")
_LAYERS = (*_CONVOLUTIONS, "Gemm", "MatMul")
_ARITHMETIC = ("Mul", "Add", "Sub", "Div")
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


class FoldBatchnorm(QuantPass):
    """Folds normalizations and constant scales into the layers before them."""

    name = "fold_batchnorm"
    stage = Stage.CANONICALIZE
    after = ("canonicalize", "simplify_activations")

    @classmethod
    def applies(cls, config: CompileConfig) -> bool:
        """Where activations are quantized: a normalization in between would be one more float operator."""
        return quantizes_activations(config)

    def call(self, model: ir.Model) -> QuantPassResult:
        """Go through the layers, then through the normalizations that are left."""
        names = {site.node: site.name for site in find_sites(model)[0]}
        records: list[SiteRecord] = []
        refused: dict[ir.Node, str] = {}
        for node, _ in list(walk(model.graph)):
            if node.domain == "" and node.op_type in _LAYERS:
                folded = self._fold(node, refused)
                if folded:
                    reason = f"{', '.join(folded)} folded into its weight and bias"
                    records.append(SiteRecord(names.get(node, label(node)), "rewritten", reason=reason))
        # The last one of several first, which alone has convolutions for readers.
        for node, _ in reversed(list(walk(model.graph))):
            if node.graph is not None and (layers := _fold_forward(node)):
                reason = f"{node.op_type} in front of it folded into its weight and bias"
                records += [SiteRecord(names.get(layer, label(layer)), "rewritten", reason=reason) for layer in layers]
                refused.pop(node, None)
        for node, _ in walk(model.graph):
            if node.domain == "" and node.op_type == "BatchNormalization":
                refused.setdefault(
                    node, f"what it reads is not the result of {', '.join(_LAYERS[:-1])} or {_LAYERS[-1]}"
                )
            if node in refused:
                records.append(SiteRecord(label(node), "skipped", reason=f"not folded: {refused[node]}"))
        return QuantPassResult(model, any(record.action == "rewritten" for record in records), tuple(records))

    def _fold(self, node: ir.Node, refused: dict[ir.Node, str]) -> list[str]:
        """Fold what follows a layer; returns the operators, and adds to `refused` the normalizations that stay."""
        chain, steps = _followers(node, refused)
        if node.op_type not in _CONVOLUTIONS:
            while chain and chain[-1].op_type != "BatchNormalization":
                chain.pop()
        if not chain:
            return []
        weight, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
        scale, shift = np.ones(1), np.zeros(1)
        for step in steps[: len(chain)]:
            scale, shift = scale * step.scale, shift * step.scale + step.shift
        assert weight is not None
        scaled = constant_array(weight).astype(np.float64)
        view = channel_view(node, scaled)
        scale, shift = (np.broadcast_to(part, output_channels(node)) for part in (scale, shift))
        view *= scale.reshape(*view.shape[:2], 1, 1)
        if bias is not None:
            shift = constant_array(bias).astype(np.float64) * scale + shift
        with np.errstate(over="ignore"):
            arrays = [array.astype(constant_array(weight).dtype) for array in (scaled, shift)]
        if not all(np.isfinite(array.astype(np.float64)).all() for array in arrays):
            _refuse(chain[0], f"the weight or bias would exceed {arrays[0].dtype}", refused)
            return []
        folded = [follower.op_type for follower in chain]
        store_constant(node, 1, arrays[0])
        output = node.outputs[0]
        if arrays[1].any() and node.op_type == "MatMul":
            graph = chain[-1].graph
            assert graph is not None
            added = add_constant(graph, f"{weight.name}_bias", arrays[1])
            add = make_node(graph, "Add", [output, added], {}, chain[-1], self.name)
            graph.insert_after(chain[-1], add)
            output = add.outputs[0]
        elif arrays[1].any() or bias is not None:
            store_constant(node, 2, arrays[1])
        _bypass(node, chain, output)
        return folded


@dataclass(frozen=True)
class _Affine:
    """What a node does to each channel: ``scale * x + shift``, float64, of one value or one for each channel."""

    scale: np.ndarray
    shift: np.ndarray


def _followers(node: ir.Node, refused: dict[ir.Node, str]) -> tuple[list[ir.Node], list[_Affine]]:
    """The nodes behind a layer that can be folded into it, in order, and what each does."""
    chain: list[ir.Node] = []
    steps: list[_Affine] = []
    value, problem = node.outputs[0], _problem(node)
    while True:
        alone = len(value.uses()) == 1 and not value.is_graph_output()
        found = None
        for reader in value.consumers():
            if not _is_candidate(reader, value, node):
                continue
            # A layer whose weight is computed has no channels to compare with.
            step = problem or _affine(reader, value, node)
            if isinstance(step, _Affine) and not alone:
                step = "what it reads has other readers"
            elif isinstance(step, _Affine) and reader.graph is not node.graph:
                step = "it is in another graph than the layer"
            if isinstance(step, _Affine):
                found = (reader, step)
            else:
                _refuse(reader, step, refused)
        if found is None:
            return chain, steps
        chain.append(found[0])
        steps.append(found[1])
        value = found[0].outputs[0]


def _is_candidate(reader: ir.Node, value: ir.Value, layer: ir.Node) -> bool:
    """Whether a reader scales or shifts `value` by constants; silent about an Add or Mul behind a Gemm or MatMul."""
    if reader.domain != "":
        return False
    if reader.op_type == "BatchNormalization":
        return reader.inputs[0] is value
    if reader.op_type not in _ARITHMETIC:
        return False
    others = [other for other in reader.inputs if other is not value]
    constant = len(others) == 1 and is_constant(others[0])
    # Elsewhere it is the layer's own bias, or a scale that weight-only kernels do not mind.
    return constant and (layer.op_type in _CONVOLUTIONS or _normalization_behind(reader) is not None)


def _normalization_behind(node: ir.Node) -> ir.Node | None:
    """The BatchNormalization that a node is, or leads to with nothing but arithmetic in between."""
    while node.domain == "" and node.op_type in _ARITHMETIC and len(node.outputs[0].uses()) == 1:
        node = node.outputs[0].consumers()[0]
    return node if node.op_type == "BatchNormalization" and node.domain == "" else None


def _refuse(node: ir.Node, reason: str, refused: dict[ir.Node, str]) -> None:
    """Note why a node is not folded, where that keeps a normalization; nobody misses any other scale or shift."""
    normalization = _normalization_behind(node)
    if normalization is not None:
        refused[normalization] = reason if normalization is node else f"'{label(node)}' in front of it is not: {reason}"
    elif _half_of_normalization(node):
        refused[node] = reason


def _half_of_normalization(node: ir.Node) -> bool:
    """Whether a node scales each channel and one next to it shifts each channel, or the other way round."""
    kinds = {"Mul": "scale", "Div": "scale", "Add": "shift", "Sub": "shift"}
    producers = [value.producer() for value in node.inputs if value is not None]
    around = [*(producer for producer in producers if producer is not None), *node.outputs[0].consumers()]
    own = kinds[node.op_type]
    return _by_channel(node) and any(kinds.get(other.op_type, own) != own and _by_channel(other) for other in around)


def _by_channel(node: ir.Node) -> bool:
    """Whether an arithmetic node reads a constant of several values, all along one axis."""
    shapes = [v.const_value.shape.numpy() for v in node.inputs if v is not None and v.const_value is not None]
    return len(shapes) == 1 and max(shapes[0], default=1) == math.prod(shapes[0]) > 1


def _problem(node: ir.Node) -> str:
    """Why nothing can be folded into a layer, or nothing."""
    weight = node.inputs[1]
    if not is_constant(weight):
        return f"the weight of '{label(node)}' is no constant"
    assert weight is not None and weight.const_value is not None
    if weight.const_value.dtype not in _FLOATS:
        return f"the weight of '{label(node)}' is {weight.const_value.dtype.name.lower()}"
    shape = weight.const_value.shape.numpy()
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and not is_constant(bias):
        return f"the bias of '{label(node)}' is no constant"
    if node.op_type == "MatMul" and (_rank(node.outputs[0]) or _rank(node.inputs[0])) != 2:
        return f"the result of '{label(node)}' is not known to be a matrix, whose columns are channels"
    if node.op_type in ("MatMul", "Gemm") and len(shape) != 2:
        return f"the weight of '{label(node)}' is no matrix"
    if node.op_type == "Gemm" and node.attributes.get_float("beta", 1.0) != 1.0:
        return f"'{label(node)}' has a beta other than 1"
    if node.op_type == "Gemm" and bias is not None:
        known = tuple(bias.const_value.shape.numpy()) if bias.const_value is not None else ()
        if math.prod(known) not in (1, output_channels(node)) or (known and math.prod(known) != known[-1]):
            return f"the bias of '{label(node)}' has one value for each row"
    return ""


def _rank(value: ir.Value | None) -> int:
    return value.shape.rank() if value is not None and value.shape is not None else 0


def _affine(reader: ir.Node, value: ir.Value, layer: ir.Node) -> _Affine | str:
    """What a reader does to each channel of a layer's result, or why that cannot be folded."""
    weight = layer.inputs[1]
    assert weight is not None and weight.const_value is not None
    rank = len(weight.const_value.shape.numpy())
    if reader.op_type == "BatchNormalization":
        return _normalization(reader, output_channels(layer))
    first = reader.inputs[0] is value
    other = reader.inputs[1 if first else 0]
    assert other is not None
    array = constant_array(other).astype(np.float64)
    shape = (1,) * (rank - array.ndim) + array.shape
    if len(shape) != rank or shape[1] not in (1, output_channels(layer)) or array.size != shape[1]:
        return f"its constant of shape {list(array.shape)} is not one value, or one for each channel"
    vector = array.reshape(-1)
    zero, one = np.zeros_like(vector), np.ones_like(vector)
    if reader.op_type == "Mul":
        return _Affine(vector, zero)
    if reader.op_type == "Add":
        return _Affine(one, vector)
    if reader.op_type == "Sub":
        return _Affine(one, -vector) if first else _Affine(-one, vector)
    if not first or not vector.all():
        return "it divides by the layer's result" if not first else "it divides by zero"
    return _Affine(1 / vector, zero)


def _normalization(node: ir.Node, channels: int) -> _Affine | str:
    """What a BatchNormalization does, or why it is not in its inference form."""
    if node.attributes.get_int("training_mode", 0) or any(output.name for output in node.outputs[1:]):
        return "it is in its training form"
    if not node.attributes.get_int("spatial", 1):
        return "it has statistics for each position"
    parameters = node.inputs[1:5]
    if not all(is_constant(parameter) for parameter in parameters):
        return "its statistics are no constants"
    gamma, beta, mean, variance = (constant_array(p).astype(np.float64) for p in parameters if p is not None)
    spread = variance + node.attributes.get_float("epsilon", 1e-5)
    if gamma.shape != (channels,) or not (spread > 0).all():
        return "its variance is not positive" if gamma.shape == (channels,) else f"it has {gamma.size} channels"
    scale = gamma / np.sqrt(spread)
    return _Affine(scale, beta - mean * scale)


def _bypass(layer: ir.Node, chain: list[ir.Node], output: ir.Value) -> None:
    """Let the readers of a chain's last result read `output`, which takes its name, and remove the chain."""
    graph, result = layer.graph, chain[-1].outputs[0]
    assert graph is not None
    output.type, output.shape, name = result.type or output.type, result.shape or output.shape, result.name
    result.replace_all_uses_with(output, replace_graph_outputs=True)
    graph.remove(chain, safe=True)
    output.name = name


def _fold_forward(node: ir.Node) -> list[ir.Node]:
    """Fold a node that scales and shifts by one value into the convolutions that read it; returns these."""
    if node.domain != "" or node.op_type not in _ARITHMETIC or node.outputs[0].is_graph_output():
        return []
    first = constant_scalar(node.inputs[1], node.inputs[0]) is not None
    source, other = node.inputs if first else reversed(node.inputs)
    constant = constant_scalar(other, source)
    uses = list(node.outputs[0].uses())
    if source is None or source.const_value is not None or constant is None or not uses:
        return []
    if node.op_type == "Div" and (not first or not constant):
        return []
    scale = {"Mul": constant, "Div": 1 / constant if constant else 0.0}.get(node.op_type, 1.0)
    shift = {"Add": constant, "Sub": -constant}.get(node.op_type, 0.0)
    if node.op_type == "Sub" and not first:
        scale, shift = -1.0, constant
    if not all(use.idx == 0 and use.node.graph is node.graph and _takes(use.node, shift) for use in uses):
        return []
    for use in uses:
        layer = use.node
        weight, bias = layer.inputs[1], layer.inputs[2] if len(layer.inputs) > 2 else None
        assert weight is not None
        stored = constant_array(weight).astype(np.float64)
        total = shift * stored.reshape(len(stored), -1).sum(1)
        if bias is not None:
            total += constant_array(bias)
        dtype = constant_array(weight).dtype
        store_constant(layer, 1, (stored * scale).astype(dtype))
        if shift:
            store_constant(layer, 2, total.astype(dtype))
        layer.replace_input_with(0, source)
    assert node.graph is not None
    node.graph.remove(node, safe=True)
    return [use.node for use in uses]


def _takes(layer: ir.Node, shift: float) -> bool:
    """Whether what scales the input of a node by one value, and shifts it, can be folded into its weight and bias."""
    if layer.op_type != "Conv" or layer.domain != "" or _problem(layer):
        return False
    pads = layer.attributes.get("pads")
    padded = layer.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    return not shift or not (padded or (pads is not None and any(pads.as_ints())))
