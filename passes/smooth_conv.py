"""Smooth the channels between convolutions, so that one scale for the whole tensor fits them all.

With one scale for a tensor, a channel that only reaches a hundredth of the largest value is left with two or three
codes. As in SmoothQuant (see `smoothquant`), channel i is divided by s_i in the weights of the layer before and
multiplied by it in those of the layer behind:

    s_i = a_i^alpha / w_i^(1 - alpha),   a_i = max|X_i| on the calibration data, w_i = max|W_i| of the weights behind

1. Conv -> [Relu | LeakyRelu | Identity] -> Conv, a result with a single reader. In front of a depthwise convolution
   alpha is 1: each of its channels has a scale of its own, and takes any factor without loss. Elsewhere `alpha` shares
   the burden with the weights behind.
2. A bound between the two, Clip(0, c), stays where it is: s_i is scaled so that no channel is divided by more than one,
   and the bound cuts channel i at s_i c. That is at least `margin` times what the channel reached on the calibration
   data, and exactly c where it reached that. Quantization with a scale for each channel would saturate alike.

Left alone, with a record that says why: layers with computed weights, results that others read too, whatever else
stands between two layers, and factors that are all one or with which a weight would exceed the range of its type.
"""

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompiler.collectors import ChannelRange
from qcompiler.errors import CalibrationError, NumericsError, SchemeError
from qcompiler.graph import Site, constant_array
from qcompiler.layers import channel_view, clip_bounds, is_constant, store_constant
from qcompiler.passes.base import QuantPass, QuantPassResult, Stage, explicit_activations, watch
from qcompiler.records import SiteRecord
from qcompiler.sites import find_sites

__all__ = ["SmoothConv", "bounded_factors"]

_HOMOGENEOUS = ("Relu", "LeakyRelu", "Identity")
# A channel is scaled down at most by this; the rest of a very quiet channel is not worth a loud weight.
_SMALLEST = 1e-3


@dataclass(frozen=True)
class Options:
    """Options of `smooth_conv`."""

    alpha: float = field(default=0.3, metadata={"help": "share of the difficulty that moves to dense weights, 0 to 1"})
    margin: float = field(default=8.0, metadata={"help": "room above what a bounded channel reached, at least 1"})

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if not (0 <= self.alpha <= 1 and 1 <= self.margin < np.inf):
            raise SchemeError(
                f"pass smooth_conv: alpha={self.alpha:g} is not between 0 and 1, "
                f"or margin={self.margin:g} is no number from 1"
            )


@dataclass(frozen=True, eq=False)
class _Pair:
    """Two convolutions, the value that the second reads and the bound that is on it."""

    first: Site
    second: Site
    value: ir.Value
    bound: float


def bounded_factors(
    reached: np.ndarray, weights: np.ndarray, alpha: float, bound: float = np.inf, margin: float = 1.0
) -> np.ndarray:
    """The factors s of a tensor's channels.

    Args:
        reached: Largest magnitude of each channel, ``[C]``.
        weights: Largest magnitude of the weights behind each channel, ``[C]``.
        alpha: Share of the activations.
        bound: c of the Clip(0, c) that the channels went through.
        margin: Room above `reached` under a bound.

    Returns:
        float64 ``[C]``, the largest one being 1; with a bound ``s c`` is at least ``min(c, margin * reached)``.
    """
    alive = (reached > 0) & (weights > 0)
    reached, weights = reached.astype(np.float64), weights.astype(np.float64)
    needed = np.minimum(bound, margin * reached)
    raw = np.ones(len(reached))
    raw[alive] = needed[alive] ** alpha / weights[alive] ** (1 - alpha)
    if np.isfinite(bound):
        # The least common factor that leaves every channel its room.
        raw *= (needed[alive] / raw[alive]).max(initial=0) / bound if alive.any() else 1.0
        floor = np.where(alive, needed / bound, 1.0)
        raw = np.maximum(np.minimum(raw, 1.0), floor)
    raw /= raw[alive].max(initial=0) if alive.any() else 1.0
    return np.where(alive, np.minimum(np.maximum(raw, _SMALLEST), 1.0), 1.0)


class SmoothConv(QuantPass):
    """Smooths what convolutions hand to one another."""

    name = "smooth_conv"
    stage = Stage.TRANSFORM
    after = ("smoothquant", "equalize")
    paper = "Xiao et al. 2022, arXiv:2211.10438"
    needs_calibration = True
    Options = Options

    def call(self, model: ir.Model) -> QuantPassResult:
        """Measure the float model, then rescale it pair by pair."""
        sites = {site.node: site for site in find_sites(model)[0] if _is_static(site)}
        found = {site: _pair(site, sites) for site in sites.values()}
        pairs = [pair for pair in found.values() if isinstance(pair, _Pair)]
        if pairs and not len(self.context.batches):
            raise CalibrationError("smooth_conv needs calibration data; give --calibration PATH, or leave it out")
        ranges = {pair.value: ChannelRange(1) for pair in pairs}
        watch(self.context, self.name, model, {value: [collector] for value, collector in ranges.items()})
        records = []
        for site, pair in found.items():
            reason, s = (pair, None) if isinstance(pair, str) else self._smooth(pair, ranges[pair.value])
            if isinstance(pair, _Pair) and s is not None:
                metrics = {"smallest_factor": float(s.min())}
                records.append(SiteRecord(site.name, "scaled", "", f"smoothed for '{pair.second.name}'", metrics))
            else:
                records.append(SiteRecord(site.name, "skipped", reason=f"not smoothed: {reason}"))
        return QuantPassResult(model, any(record.action == "scaled" for record in records), tuple(records))

    def _smooth(self, pair: _Pair, known: ChannelRange) -> tuple[str, np.ndarray | None]:
        """Rescale the weights of both sides; returns why they are left alone, or the factors."""
        first, second = pair.first.node, pair.second.node
        behind = _array(second, 1).astype(np.float64)
        view = channel_view(second, behind)  # [groups, outputs, inputs, taps]
        depthwise = view.shape[2] == 1
        weights = np.abs(view).max((1, 3)).reshape(-1)
        if not np.isfinite(known.absmax).all() or not np.isfinite(weights).all():
            raise NumericsError(
                f"what '{pair.second.name}' reads, or its weight, holds values that are NaN or infinite; mend the "
                f"model or the calibration data, or leave the site float with --ignore '{pair.second.name}'"
            )
        alpha = 1.0 if depthwise else self.options.alpha
        s = bounded_factors(known.absmax, weights, alpha, pair.bound, self.options.margin)
        if (s == 1).all():
            return "its channels are even already", None
        view *= s.reshape(len(view), 1, -1, 1)
        scaled = {(second, 1): behind.astype(_array(second, 1).dtype)}
        for index in (1, 2):
            if index < len(first.inputs) and first.inputs[index] is not None:
                array = _array(first, index)
                shape = (-1,) + (1,) * (array.ndim - 1)
                with np.errstate(over="ignore"):
                    scaled[first, index] = (array.astype(np.float64) / s.reshape(shape)).astype(array.dtype)
        if not all(np.isfinite(array.astype(np.float64)).all() for array in scaled.values()):
            return "a weight or bias would exceed the range of its type", None
        for (node, index), array in scaled.items():
            store_constant(node, index, array)
        return "", s


def _is_static(site: Site) -> bool:
    activations = explicit_activations(site)
    if site.node.op_type != "Conv" or site.nested or activations is None:
        return False
    return not activations.dynamic and not activations.fp8  # floats have a scale of their own for every value


def _array(node: ir.Node, index: int) -> np.ndarray:
    value = node.inputs[index]
    assert value is not None
    return constant_array(value)


def _pair(site: Site, sites: dict[ir.Node, Site]) -> _Pair | str:
    """The convolution behind a site, or why there is none that could be scaled with it."""
    if len(site.node.inputs) > 2 and site.node.inputs[2] is not None and not is_constant(site.node.inputs[2]):
        return "its bias is computed"
    value, bound = site.node.outputs[0], np.inf
    while True:
        uses = list(value.uses())
        if value.is_graph_output() or len(uses) != 1:
            return "its result has other readers" if uses else "its result is an output of the model"
        reader, index = uses[0]
        if reader.graph is not site.node.graph or reader.domain != "" or index != 0:
            return f"its result is read by {reader.op_type}"
        if reader in sites:
            return _Pair(site, sites[reader], value, bound)
        bounds = clip_bounds(reader)
        if bounds is not None and bounds[0] == 0 and bounds[1] > 0:
            bound = min(bound, bounds[1])
        elif reader.op_type not in _HOMOGENEOUS:
            return f"its result is read by {reader.op_type}"
        value = reader.outputs[0]
