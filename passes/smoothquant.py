"""SmoothQuant: move the difficulty of quantizing loud channels from activations to weights.

Xiao et al. 2022, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
arXiv:2211.10438, eq. 3 and 4:

    Y = (X / s)(s W),   s_j = max|X_j|^alpha / max_n|W_nj|^(1 - alpha)

with the maximum of W over all readers of X. 1 / s is folded into what computes X (see `foldings`), so that nothing is
added to the graph.

Unlike there, max|X_j| counts as that of the median channel at least: what calibration found silent would otherwise be
amplified without limit when other data wake it up. On the Whisper encoder, one scale a tensor, that left a KL
divergence of 2.7 nats; it is 0.0007 so, and 0.0016 without SmoothQuant.

The default alpha is the one of the least KL divergence to the float model on SmolLM2-135M (2048
tokens to calibrate on, 1536 others to compare; weights and activations of all 210 linear layers rounded to 8 bits):

    (before the median was the least)
    alpha                       none    0.3     0.5     0.6     0.7     0.8     search
    a scale for each token      0.0454  0.0316  0.0138  0.0122  0.0115  0.0180  0.0105
    a scale for the tensor      0.661   0.626   0.170   0.076   0.044   0.051   0.081

The search lessens the squared error of each product in both rows (by 12 times in the second), which is not what counts
in the second; so it is not the default.

Shapes: X ``[T, K]``; W ``[N, K]``; s ``[K]``.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompiler.collectors import ChannelRange, RowSample
from qcompiler.errors import NumericsError, SchemeError
from qcompiler.foldings import Folding
from qcompiler.graph import Site, input_feature_axis, read_weight
from qcompiler.numerics.activation import activation_grid, fake_quantize
from qcompiler.numerics.affine import WeightSpec, dequantize, min_max_grid, quantize
from qcompiler.numerics.formats import float8_values
from qcompiler.observing import Collector
from qcompiler.passes.base import explicit_activations, site_scheme, site_spec, watch
from qcompiler.records import SiteRecord
from qcompiler.rescaling import RescalingPass
from qcompiler.scheme import Activations

__all__ = ["SmoothQuant", "smoothing_factors"]

logger = logging.getLogger(__name__)

_EPSILON = 1e-5
_STEPS = 20  # of alpha, in the search
_HELD_BYTES = 1 << 29  # of sampled rows at a time, where no limit is given
_WORTH = 0.5  # of the error that may be left where a multiplication is inserted


@dataclass(frozen=True)
class Options:
    """Options of `smoothquant`."""

    alpha: float = field(default=0.7, metadata={"help": "share of the difficulty that moves to the weights, 0 to 1"})
    search: bool = field(default=False, metadata={"help": "choose alpha for each activation by the error it leaves"})
    insert: str = field(
        default="worth",
        metadata={"help": "multiply where nothing absorbs the factors: never, always, or worth: it halves the error"},
    )
    caches: bool = field(default=False, metadata={"help": "let the values that a model caches between runs be scaled"})
    check: bool = field(default=True, metadata={"help": "smooth nothing whose products on sampled rows get worse"})
    rows: int = field(default=256, metadata={"help": "rows of an activation that products are compared on"})

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if not 0 <= self.alpha <= 1:
            raise SchemeError(f"pass smoothquant: alpha={self.alpha:g} is not between 0 and 1")
        if self.insert not in ("never", "worth", "always"):
            raise SchemeError(f"pass smoothquant: insert={self.insert} is unknown; choose never, worth or always")
        if self.rows < 1:
            raise SchemeError(f"pass smoothquant: rows={self.rows} leaves nothing to look at")


def smoothing_factors(activations: np.ndarray, weights: np.ndarray, alpha: float) -> np.ndarray:
    """The factors s, float64 ``[K]``; 1 where there are no weights, or no activations at all, to balance.

    Args:
        activations: Largest magnitude of each channel, ``[K]``; as that of the median channel at least.
        weights: Largest magnitude in each column of all weights, ``[K]``.
        alpha: 0 balances the weights alone, 1 the activations alone.
    """
    activations, weights = activations.astype(np.float64), weights.astype(np.float64)
    louder = np.maximum(activations, max(float(np.median(activations)), _EPSILON)) ** alpha / np.maximum(
        weights, _EPSILON
    ) ** (1 - alpha)
    return np.where((weights > 0) & activations.any(), np.maximum(louder, _EPSILON), 1.0)


class SmoothQuant(RescalingPass):
    """SmoothQuant by folding.

    1. Activations of sites whose scheme has the graph quantize activations are smoothed; where no scheme of the model
       does, those of all sites that have a scheme.
    2. Factors are folded into a normalization, a linear layer or another constant before the activation. Query heads
       that share a value head share their factors.
    3. Where folding would change what the model computes, a multiplication is put in front of the sites, if `insert`
       allows it and the error of the quantized products on a sample of rows at least halves; otherwise they are
       recorded as skipped with the reason.
    4. With `search`, alpha is what leaves the least error of the quantized products on a sample of rows; leaving the
       activation alone is among the choices. Without it, `check` leaves alone what the given alpha would make worse.
    """

    name = "smoothquant"
    after = ("rotate",)
    paper = "Xiao et al. 2022, arXiv:2211.10438"
    Options = Options
    done = "smoothed"

    def choose(self, sites: list[Site]) -> list[Site]:
        """Where there are some whose activations the graph quantizes, only these.

        Convolutions are left to `smooth_conv`: what they read are codes already, of the convolution before.
        """
        return [site for site in sites if explicit_activations(site) is not None] or sites

    @property
    def inserts(self) -> bool:
        """See `RescalingPass`."""
        return bool(self.options.insert != "never")

    def rescale(self, model: ir.Model, foldings: Sequence[Folding]) -> dict[Folding, SiteRecord]:
        """See `RescalingPass`; as many at a time as fit in memory."""
        records: dict[Folding, SiteRecord] = {}
        for group in self._groups(foldings):
            started = {folding: self._start(folding) for folding in group}
            # The model computes the same however many of its activations are rescaled already.
            watch(self.context, self.name, model, {each.value: found for each, (found, _) in started.items()})
            for folding in group:
                records[folding] = started.pop(folding)[1]()
        return records

    def _groups(self, foldings: Sequence[Folding]) -> Iterator[list[Folding]]:
        """Foldings whose sampled rows fit in memory together."""
        limit = self.context.config.max_memory
        room = limit // 4 if limit else _HELD_BYTES
        group: list[Folding] = []
        used = 0
        for folding in foldings:
            needed = 2 * 4 * self.options.rows * folding.channels if self._tries(folding) else 0
            if group and used + needed > room:
                yield group
                group, used = [], 0
            group.append(folding)
            used += needed
        if group:
            yield group

    def _start(self, folding: Folding) -> tuple[Sequence[Collector], Callable[[], SiteRecord]]:
        """What measures a folding's activation, and what rescales it then if that betters anything."""
        axis = input_feature_axis(folding.sites[0])
        rows = RowSample(self.options.rows, axis) if self._tries(folding) else None
        known = ChannelRange(axis)
        return [known] if rows is None else [known, rows], lambda: self._smooth(folding, known, rows)

    def _tries(self, folding: Folding) -> bool:
        """Whether products are compared on sampled rows."""
        return self.options.search or self.options.check or (not folding.legal and self.options.insert == "worth")

    def _smooth(self, folding: Folding, known: ChannelRange, rows: RowSample | None) -> SiteRecord:
        first, *others = folding.sites
        weights = [read_weight(site) for site in folding.sites]
        loudest, largest = known.absmax, np.max([np.abs(weight).max(0) for weight in weights], axis=0)
        if not np.isfinite(loudest).all() or not np.isfinite(largest).all():
            raise NumericsError(
                f"what '{first.name}' reads, or its weight, holds values that are NaN or infinite; mend the model or "
                f"the calibration data, or leave the site float with --ignore '{first.name}'"
            )
        remarks = [f"smoothed with {', '.join(site.name for site in others)}"] if others else []
        if rows is None:
            alpha, metrics = self.options.alpha, dict[str, float]()
            s = folding.tie(smoothing_factors(loudest, largest, alpha))
        else:
            alpha, s, metrics = self._searched(folding, weights, known, rows.values, largest)
        if alpha is None:
            remarks.append("no alpha lessens the error" if folding.legal else f"not smoothed: {folding.reason}")
        else:
            metrics["alpha"] = alpha
            s = folding.apply(s) if folding.legal else folding.insert(s, self.name)
        remarks += ["a Mul was inserted"] if not folding.legal and alpha is not None else []
        remarks += [f"the cache {name} is scaled" for name in folding.caches if alpha is not None]
        metrics["largest_factor"] = float(s.max())
        logger.debug("%s: alpha %s, largest factor %g", first.name, alpha, s.max())
        return SiteRecord(first.name, "skipped" if alpha is None else "scaled", "", "; ".join(remarks), metrics)

    def _searched(
        self,
        folding: Folding,
        weights: Sequence[np.ndarray],
        known: ChannelRange,
        rows: np.ndarray,
        largest: np.ndarray,
    ) -> tuple[float | None, np.ndarray, dict[str, float]]:
        """The alpha of the least error, None where that is no smoothing; its factors; relative errors of both."""
        trial = _Trial(rows, known)
        for site, weight in zip(folding.sites, weights, strict=True):
            scheme = site_scheme(site)
            if scheme is not None:
                trial.add(weight, site_spec(site, self.context.config), scheme.activations)
        best, factors = None, np.ones(folding.channels)
        plain = least = trial.error(factors, self.context.threads)
        bar = _WORTH * plain if not folding.legal and self.options.insert == "worth" else plain
        for alpha in [step / _STEPS for step in range(_STEPS + 1)] if self.options.search else [self.options.alpha]:
            tried = folding.tie(smoothing_factors(known.absmax, largest, alpha))
            error = trial.error(tried, self.context.threads)
            if error < min(least, bar):
                best, factors, least = alpha, tried, error
        return best, factors, {"relative_error_before": plain, "relative_error": least}


class _Trial:
    """Products of quantized activations and weights, compared with those of the float ones."""

    def __init__(self, rows: np.ndarray, known: ChannelRange) -> None:
        """Rows float32 ``[T, K]`` of an activation, and its range over all rows."""
        self._rows, self._range = rows, known
        self._products: list[tuple[np.ndarray, np.ndarray, WeightSpec, Activations | None]] = []
        self._energy = 0.0

    def add(self, weight: np.ndarray, spec: WeightSpec, activations: Activations | None) -> None:
        """A weight float32 ``[N, K]`` that is multiplied with the rows."""
        wanted = self._rows @ weight.T  # [T, N]
        self._energy += _energy(wanted)
        self._products.append((weight, wanted, spec, activations))

    def error(self, factors: np.ndarray, threads: int) -> float:
        """``sum ||Q(X / s) Q(s W)^T - X W^T||^2`` over all weights, relative to that of the products themselves."""
        error, s = 0.0, factors.astype(np.float32)
        for weight, wanted, spec, activations in self._products:
            scaled = weight * s
            grid = min_max_grid(scaled, spec, threads)
            codes = quantize(scaled, grid, spec, threads)
            numbers = float8_values(codes) if spec.fp8 else codes
            decoded = dequantize(numbers, grid.scale, grid.zero_point, spec.group_size)
            error += _energy(self._quantized(s, activations, threads) @ decoded.T - wanted)
        return error / self._energy if self._energy else 0.0

    def _quantized(self, s: np.ndarray, activations: Activations | None, threads: int) -> np.ndarray:
        """X / s as the scheme has it: float, or with one scale for the whole tensor, or with one for each token."""
        rows: np.ndarray = self._rows / s
        if activations is None:
            return rows
        if activations.granularity == "tensor":
            assert self._range.low is not None and self._range.high is not None
            spec = activations.spec()
            low, high = float((self._range.low / s).min()), float((self._range.high / s).max())
            scale, zero_point = activation_grid(low, high, spec)
            return fake_quantize(rows, float(scale), zero_point, spec)
        each = WeightSpec(activations.bits, rows.shape[1], True, False)
        grid = min_max_grid(rows, each, threads)
        return dequantize(quantize(rows, grid, each, threads), grid.scale, grid.zero_point, each.group_size)


def _energy(values: np.ndarray) -> float:
    return float(np.einsum("ij,ij->", values, values, dtype=np.float64))
