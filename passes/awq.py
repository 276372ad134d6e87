"""AWQ: scale up the columns of weights that meet loud activations, so that rounding hurts these less.

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", arXiv:2306.00978,
section 3.2:

    Y = (X / s)(s W),   s_j = mean|X_j|^r,   r = 0, 0.05, ..., 0.95, normalized by sqrt(max s * min s)
    with duo: s_j = mean|X_j|^r / mean|W_j|^(1 - r), |W| relative to the largest of its group

1 / s is folded into what computes X (see `foldings`), so that nothing is added to the graph. Of all r the one is taken
that leaves the least squared error of the products, summed over the readers of X, with H = X^T X of the float model:

    tr(D H D^T),   D = Q(W s) / s - W

Unlike there, the loss is that of the products and not of a whole attention or MLP; channels count as loud as a
hundredth of the median one at least, since what calibration found silent may wake up.

Shapes: X ``[T, K]``; W, D ``[N, K]``; H ``[K, K]``; s ``[K]``.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompiler.errors import NumericsError, SchemeError
from qcompiler.foldings import Folding
from qcompiler.graph import Site, read_weight
from qcompiler.numerics.affine import WeightSpec, clip_grid, dequantize, min_max_grid, quantize
from qcompiler.numerics.formats import float8_values
from qcompiler.numerics.second_order import row_losses
from qcompiler.passes.base import site_spec, streaming
from qcompiler.records import SiteRecord
from qcompiler.rescaling import RescalingPass, open_sites
from qcompiler.segments import plan_segments
from qcompiler.statistics import LayerFacts

__all__ = ["Awq", "awq_factors", "relative_magnitudes", "scaled_loss"]

logger = logging.getLogger(__name__)

_SMALLEST = 1e-4
_QUIET = 1e-2  # of the median channel
_BLOCK = 1 << 23  # weights that are rounded at a time


@dataclass(frozen=True)
class Options:
    """Options of `awq`."""

    steps: int = field(default=20, metadata={"help": "exponents that are tried, from 0 on"})
    duo: bool = field(default=False, metadata={"help": "divide by the size of the weights as well"})
    clip: bool = field(default=False, metadata={"help": "try each exponent on clipped grids, weighted by diag(H)"})
    caches: bool = field(default=False, metadata={"help": "let the values that a model caches between runs be scaled"})
    rows: int = field(default=256, metadata={"help": "rows of each weight that exponents are tried on"})

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if self.steps < 1 or self.rows < 1:
            raise SchemeError(f"pass awq: steps={self.steps} and rows={self.rows} have to be at least 1")


def awq_factors(means: np.ndarray, magnitudes: np.ndarray | None, ratio: float) -> np.ndarray:
    """The factors s, float64 ``[K]``.

    Args:
        means: ``[K]``, mean|X_j|.
        magnitudes: ``[K]``, see `relative_magnitudes`; None leaves them out.
        ratio: r.
    """
    means = means.astype(np.float64)
    loud = np.maximum(means, _QUIET * float(np.median(means)))
    if not loud.any():
        return np.ones_like(loud)
    factors = loud**ratio
    if magnitudes is not None:
        factors = factors / (magnitudes.astype(np.float64) ** (1 - ratio) + _SMALLEST)
    factors = np.maximum(factors, _SMALLEST)
    return np.asarray(factors / np.sqrt(factors.max() * factors.min()))


def relative_magnitudes(weight: np.ndarray, group_size: int) -> np.ndarray:
    """The sum over rows of |W|, relative to the largest of its group: float64 ``[K]``."""
    size, columns = np.abs(weight), weight.shape[1]
    largest = np.maximum.reduceat(size, np.arange(0, columns, group_size), axis=1)  # [N, G]
    spread = np.repeat(largest, group_size, axis=1)[:, :columns]
    return np.asarray(np.divide(size, spread, out=np.zeros_like(size), where=spread > 0).sum(0, dtype=np.float64))


def scaled_loss(weight: np.ndarray, hessian: np.ndarray, factors: np.ndarray, spec: WeightSpec, *, clip: bool) -> float:
    """``tr(D H D^T)`` with ``D = Q(W s) / s - W``.

    Args:
        weight: float32 ``[N, K]``.
        hessian: float32 ``[K, K]``.
        factors: s, ``[K]``.
        spec: Target format.
        clip: Whether grids are clipped to the least error weighted by diag(H) / s^2, or span all values.
    """
    heads, s, loss = spec.head_size or 1, factors.astype(np.float32), 0.0
    importance = np.diagonal(hessian) / np.square(s)
    step = max(1, _BLOCK // (weight.shape[1] * heads)) * heads
    for start in range(0, len(weight), step):
        part = weight[start : start + step]
        scaled = part * s
        grid = clip_grid(scaled, spec, importance) if clip else min_max_grid(scaled, spec)
        codes = quantize(scaled, grid, spec)
        decoded = dequantize(float8_values(codes) if spec.fp8 else codes, grid.scale, grid.zero_point, spec.group_size)
        loss += float(row_losses(decoded / s - part, hessian).sum())
    return loss


class Awq(RescalingPass):
    """AWQ by folding.

    1. The activations that linear sites with a scheme read are rescaled where something before them can absorb the
       factors: a normalization, a value projection, the linear factor of a gated product, a linear layer. Query heads
       that share a value head share their factors.
    2. Where folding would change what the model computes, the site is recorded as skipped with the reason.
    3. r = 0, no scaling, is among the exponents: where no other lessens the loss, nothing is touched.
    """

    name = "awq"
    after = ("smoothquant", "rotate")
    paper = "Lin et al. 2023, arXiv:2306.00978"
    Options = Options

    def rescale(self, model: ir.Model, foldings: Sequence[Folding]) -> dict[Folding, SiteRecord]:
        """See `RescalingPass`; factors are chosen while data stream through the model, and folded in afterwards."""
        at: dict[ir.Value, list[Folding]] = {}
        for folding in foldings:
            at.setdefault(folding.value, []).append(folding)
        chosen: dict[Folding, tuple[SiteRecord, np.ndarray | None]] = {}

        def on_sites(sites: list[Site], facts: LayerFacts) -> None:
            for folding in at.get(sites[0].input, ()):
                chosen[folding] = self._factors(folding, facts)

        if foldings:
            levels = plan_segments(model, [folding.sites[0] for folding in foldings])
            run = streaming(self.context, self.name, sequential=False)
            run.run(model, levels, self.context.batches, on_sites)
        for folding in foldings:
            factors = chosen[folding][1]
            if factors is not None:
                folding.apply(factors)
        return {folding: record for folding, (record, _) in chosen.items()}

    def _factors(self, folding: Folding, facts: LayerFacts) -> tuple[SiteRecord, np.ndarray | None]:
        """What becomes of a folding, and its factors if there are any that lessen the error."""
        first, *others = folding.sites
        hessian, means = facts.hessian.astype(np.float32), facts.means
        assert means is not None
        readers = [(read_weight(site), site_spec(site, self.context.config)) for site in open_sites(folding.sites)]
        if not all(np.isfinite(np.sum(weight, dtype=np.float64)) for weight, _ in readers):
            raise NumericsError(
                f"a weight that reads '{folding.value.name}', as '{first.name}' does, holds values that are NaN or "
                f"infinite; mend the model, or leave the site float with --ignore '{first.name}'"
            )
        magnitudes = None
        if self.options.duo:
            sums = [relative_magnitudes(weight, spec.group_size) for weight, spec in readers]
            magnitudes = np.sum(sums, axis=0) / sum(len(weight) for weight, _ in readers)

        samples = [(*_sample(weight, spec, self.options.rows), spec) for weight, spec in readers]

        def loss(factors: np.ndarray) -> float:
            clip = self.options.clip
            return sum(share * scaled_loss(w, hessian, factors, spec, clip=clip) for w, share, spec in samples)

        energy = sum(share * float(row_losses(weight, hessian).sum()) for weight, share, _ in samples)
        ratios = [step / self.options.steps for step in range(self.options.steps)]
        tried = [folding.tie(awq_factors(means, magnitudes, ratio)) for ratio in ratios]
        with ThreadPoolExecutor(self.context.threads) as pool:
            plain, *losses = pool.map(loss, [np.ones(folding.channels), *tried])
        best = int(np.argmin(losses))
        ratio, s, least = ratios[best], tried[best], losses[best]
        metrics = {
            "relative_error_before": plain / energy if energy else 0.0,
            "relative_error": min(plain, least) / energy if energy else 0.0,
        }
        logger.debug("%s: exponent %g, largest factor %g", first.name, ratio, s.max())
        if least >= plain:
            return SiteRecord(first.name, "skipped", reason="no exponent lessens the error", metrics=metrics), None
        metrics |= {"ratio": ratio, "largest_factor": float(s.max())}
        remarks = [f"scaled with {', '.join(site.name for site in others)}"] if others else []
        remarks += [f"the cache {name} is scaled" for name in folding.caches]
        return SiteRecord(first.name, "scaled", "", "; ".join(remarks), metrics), s


def _sample(weight: np.ndarray, spec: WeightSpec, rows: int) -> tuple[np.ndarray, float]:
    """Evenly spread rows of a weight, and for how many rows each stands; all where rows share scales."""
    if spec.head_size or len(weight) <= rows:
        return weight, 1.0
    return weight[np.linspace(0, len(weight) - 1, rows).astype(int)], len(weight) / rows
