"""Rounding weights by trial: what GPTQ would leave of them, on Hessians of the float model.

Shapes: W ``[N, K]``; H ``[K, K]``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qcompiler.errors import NumericsError
from qcompiler.numerics.affine import Grid, WeightSpec, clip_grid, dequantize, min_max_grid, quantize
from qcompiler.numerics.codebooks import codebook_losses, decode, fit_tables, sweep_codebooks
from qcompiler.numerics.second_order import damped, sweep, sweep_losses, upper_factor
from qcompiler.statistics import LayerFacts

__all__ = ["Curvature", "TrialRounding", "curvature_of", "row_losses"]

_DAMPING = 0.05
_MOST_DAMPING = 1.0
# Rows that are rounded at a time, since a vocabulary has many.
_ROWS = 8192


@dataclass(frozen=True)
class Curvature:
    """What is kept of the Hessian of an activation, divided by the number of tokens and damped.

    Attributes:
        order: int ``[K]``, columns in the order of falling diagonal.
        factor: float32 ``[K, K]``, A with ``A A^T = H`` in that order.
        importance: float32 ``[K]``, the diagonal.
    """

    order: np.ndarray
    factor: np.ndarray
    importance: np.ndarray


def curvature_of(facts: LayerFacts) -> Curvature | None:
    """Factor a Hessian; None for a convolution of groups, which has several.

    Raises:
        NumericsError: It cannot be factored with any damping.
    """
    if facts.hessian.ndim == 3:
        return None
    hessian = facts.hessian / max(facts.tokens, 1)
    importance = np.diagonal(hessian).astype(np.float32)
    order = np.argsort(-importance, kind="stable")
    damping = _DAMPING
    while True:
        try:
            factor = upper_factor(damped(hessian, damping)[np.ix_(order, order)])
            return Curvature(order, factor.astype(np.float32), importance)
        except np.linalg.LinAlgError as error:
            tried, damping = damping, 10 * damping
            if damping > _MOST_DAMPING:
                raise NumericsError(
                    f"the Hessian cannot be factored even with damping {tried:g}; give more calibration samples"
                ) from error


@dataclass(frozen=True)
class TrialRounding:
    """How weights are rounded by trial.

    Attributes:
        sweeps: As GPTQ does; otherwise each value goes to the nearest code between the extremes of its group.
    """

    sweeps: bool

    def losses(self, weight: np.ndarray, specs: Sequence[WeightSpec], known: Curvature | None) -> np.ndarray:
        """What each format leaves.

        Args:
            weight: float32 ``[N, K]``, or some of its rows.
            specs: The S formats.
            known: About what the weight reads; None weighs all columns alike.

        Returns:
            float64 ``[S, N]``: the squared error of each output, its mean over the tokens; without `known` that of the
            weight itself.
        """
        tables = [at for at, spec in enumerate(specs) if spec.vector]
        if tables:
            losses, swept = np.empty((len(specs), len(weight))), known if self.sweeps else None
            alone = [at for at in tables if specs[at].vector == 1 and swept is not None]
            if alone and swept is not None:
                found = [fit_tables(weight, swept.importance, specs[at], 0) for at in alone]
                losses[alone] = codebook_losses(weight, swept.factor, found, [specs[at] for at in alone], swept.order)
            for at in tables:
                if at not in alone:
                    losses[at] = row_losses(weight - _of_tables(weight, specs[at], swept), known)
            others = [at for at in range(len(specs)) if at not in tables]
            losses[others] = self.losses(weight, [specs[at] for at in others], known)
            return losses
        grids = [self._grid(weight, spec, known) for spec in specs]
        if known is not None and self.sweeps and not any(spec.fp8 for spec in specs):
            return sweep_losses(weight, known.factor, grids, specs, known.order)
        errors = [
            weight - _decoded(quantize(weight, grid, spec), grid, spec) for grid, spec in zip(grids, specs, strict=True)
        ]
        return np.stack([row_losses(error, known) for error in errors])

    def rounded(
        self, weight: np.ndarray, spec: WeightSpec, known: Curvature | None, *, clip: bool = True
    ) -> tuple[np.ndarray, float]:
        """A weight ``[N, K]`` after rounding, float32, and the sum of its losses as in `losses`.

        Without `clip` no better grid is searched than that between the extremes of each group, which takes longest.
        """
        if len(weight) > _ROWS and not spec.vector:
            decoded, total = np.empty_like(weight), 0.0
            for start in range(0, len(weight), _ROWS):
                part = slice(start, start + _ROWS)
                decoded[part], loss_of_part = self.rounded(weight[part], spec, known, clip=clip)
                total += loss_of_part
            return decoded, total
        if spec.vector:
            decoded = _of_tables(weight, spec, known if self.sweeps else None)
            return decoded, float(row_losses(weight - decoded, known).sum())
        grid = self._grid(weight, spec, known) if clip else min_max_grid(weight, spec)
        if known is not None and self.sweeps:
            codes, loss = sweep(weight, known.factor, grid, spec, known.order)
            return _decoded(codes, grid, spec), float(loss.sum())
        decoded = _decoded(quantize(weight, grid, spec), grid, spec)
        return decoded, float(row_losses(weight - decoded, known).sum())

    def _grid(self, weight: np.ndarray, spec: WeightSpec, known: Curvature | None) -> Grid:
        if not self.sweeps or spec.bits == 8:  # at 8 bits there is nothing to gain by clipping
            return min_max_grid(weight, spec)
        return clip_grid(weight, spec, known.importance if known is not None else None)


def _of_tables(weight: np.ndarray, spec: WeightSpec, known: Curvature | None) -> np.ndarray:
    """A weight as entries of tables of its own, float32 ``[N, K]``."""
    if known is None:
        factor, order = np.eye(weight.shape[1], dtype=np.float32), np.arange(weight.shape[1])
    else:
        factor, order = known.factor, known.order
    if spec.vector > 1:  # columns that share a code stay together, in the order in which they are
        moved = np.empty_like(order)
        moved[order] = np.arange(len(order))
        blocks = np.argsort(moved.reshape(-1, spec.vector).min(-1), kind="stable")
        together = (blocks[:, None] * spec.vector + np.arange(spec.vector)).reshape(-1)
        plain = factor[moved]  # rows in the order of the columns; A A^T is H
        order, factor = together, upper_factor((plain @ plain.T)[np.ix_(together, together)].astype(np.float64))
    tables, scale = fit_tables(weight, known.importance if known is not None else None, spec, 0)
    codes, _ = sweep_codebooks(weight, factor, tables, scale, spec, order)
    return decode(codes, tables, scale, spec)


def _decoded(codes: np.ndarray, grid: Grid, spec: WeightSpec) -> np.ndarray:
    return dequantize(codes, grid.scale, grid.zero_point, spec.group_size)


def row_losses(error: np.ndarray, known: Curvature | None) -> np.ndarray:
    """The diagonal of ``E H E^T``, float64 ``[N]``."""
    moved = error if known is None else error[:, known.order] @ known.factor
    return np.asarray(np.einsum("nk,nk->n", moved, moved, dtype=np.float64))
