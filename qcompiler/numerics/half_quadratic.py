"""Half-quadratic refinement of a grid: the weights alone decide, and outliers among them count for little.

Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models", mobiusml.github.io/hqq_blog:

    minimize over s, z   sum_k |w_k - (c_k - z) s|^p,   p < 1,   c_k = round(w_k / s) + z within the codes
    by turns   (1) e = shrink(w - (c - z) s),   shrink(x) = sign(x) max(|x| - |x|^(p - 1) / beta, 0)
               (2) the s and z of the least squares of (c - z) s against w - e;   beta <- kappa beta

As there, a group stops at the first turn that does not lessen its loss, and keeps the best. Unlike there, errors are
taken in steps of the grid that a group starts from, so that beta means the same whatever the unit of the weights; zero
points are whole numbers, as runtimes want them; and since these hardly move by less than a half, (2) moves the scale
along with them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qcompiler.numerics.affine import Grid, WeightSpec, min_max_grid, round_to_grid, stored_scale

__all__ = ["HalfQuadratic", "half_quadratic_grid"]

_BLOCK = 1 << 16  # elements of a block of rows


@dataclass(frozen=True)
class HalfQuadratic:
    """How to refine.

    Attributes:
        norm: p, the power of the errors, above 0 and up to 1.
        beta: How near e comes to the error; large is near.
        kappa: By how much beta grows from turn to turn.
        iterations: Most turns.
        move_scale: Whether scales move too; symmetric grids have nothing else that moves.
    """

    norm: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20
    move_scale: bool = True


def half_quadratic_grid(
    weight: np.ndarray, spec: WeightSpec, solver: HalfQuadratic | None = None, starts: Sequence[Grid] = ()
) -> Grid:
    """Refine grids to less ``sum |W - Q|^p``, group by group; no group ends with more than any of its starts had.

    Args:
        weight: float32 ``[N, K]``.
        spec: Target format, integer codes.
        solver: How.
        starts: Where from, each ``[N, G]``; the min-max grid if there are none.

    Returns:
        Scale and zero point ``[N, G]``, for each group of the start that led to the least.
    """
    solver = solver or HalfQuadratic()
    starts = starts or [min_max_grid(weight, spec)]
    rows, columns = weight.shape
    heads = spec.head_size or 1
    scale, zero_point = np.empty_like(starts[0].scale), np.empty_like(starts[0].zero_point)
    step = max(1, _BLOCK // max(columns * heads, 1)) * heads
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        values, valid = _groups(weight[part], spec.group_size, heads)
        found = [
            _refined(values, valid, start.scale[part][::heads], start.zero_point[part][::heads], spec, solver)
            for start in starts
        ]
        best = np.argmin([loss for loss, _, _ in found], axis=0)[None]  # [1, U, G]
        for index, into in ((1, scale), (2, zero_point)):
            chosen = np.take_along_axis(np.stack([each[index] for each in found]), best, axis=0)[0]
            into[part] = np.repeat(chosen, heads, 0)
    return Grid(scale, zero_point)


def _groups(weight: np.ndarray, size: int, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """[N, K] -> what shares a scale [N / heads, G, heads * size], zeros in the ragged end, and where it has values."""
    columns = weight.shape[1]
    count = -(-columns // size)
    both = []
    for array in (weight, np.ones((heads, columns), np.float32)):
        padded = np.pad(array, ((0, 0), (0, count * size - columns)))
        joined = padded.reshape(-1, heads, count, size).swapaxes(1, 2)
        both.append(joined.reshape(-1, count, heads * size))
    return both[0], both[1]


def _refined(
    values: np.ndarray, valid: np.ndarray, scale: np.ndarray, zero: np.ndarray, spec: WeightSpec, solver: HalfQuadratic
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Least loss, its scale and zero point [U, G], of groups [U, G, n]; valid [1, G, n] is 0 where no value is."""
    unit = np.abs(scale)
    wanted = values / unit[..., None]  # in steps of the starting grid, as all that follows
    best_loss, best_scale, best_zero = np.full_like(scale, np.inf), scale.copy(), zero.copy()
    active = np.ones(scale.shape, bool)
    beta = solver.beta
    for _ in range(solver.iterations + 1):
        codes = round_to_grid(values, scale[..., None], zero[..., None], spec)
        error = wanted - (codes - zero[..., None]) * (scale / unit)[..., None]
        size = np.abs(error)
        power = size**solver.norm
        loss = (power * valid).sum(-1) * unit**solver.norm
        active &= loss < best_loss
        if not active.any():
            break
        for best, new in ((best_loss, loss), (best_scale, scale), (best_zero, zero)):
            np.copyto(best, new, where=active)
        keep = np.maximum(size - np.divide(power, size * beta, out=np.zeros_like(size), where=size > 0), 0)
        scale, zero = _least_squares(codes, wanted - np.copysign(keep, error), valid, scale / unit, zero, spec, solver)
        scale = stored_scale(scale * unit, spec)
        beta *= solver.kappa
    return best_loss, best_scale, best_zero


def _least_squares(
    codes: np.ndarray,
    wanted: np.ndarray,
    valid: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    spec: WeightSpec,
    solver: HalfQuadratic,
) -> tuple[np.ndarray, np.ndarray]:
    """The scale and the zero point [U, G] with which (codes - zero) * scale comes next to what is wanted [U, G, n]."""
    count = valid.sum(-1)
    if not spec.symmetric:
        middle, level = (codes * valid).sum(-1) / count, (wanted * valid).sum(-1) / count
        if solver.move_scale:
            spread = (codes - middle[..., None]) * valid
            scale = _quotient((spread * wanted).sum(-1), np.square(spread).sum(-1), scale)
        zero = np.clip(np.rint(middle - level / scale), *spec.limits)
    if solver.move_scale:
        steps = (codes - zero[..., None]) * valid
        scale = _quotient((steps * wanted).sum(-1), np.square(steps).sum(-1), scale)
    return scale, zero


def _quotient(above: np.ndarray, below: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """The quotient where that has the sign of `otherwise`, which stands in elsewhere."""
    return np.asarray(np.divide(above, below, out=otherwise.copy(), where=(below > 0) & (above * otherwise > 0)))
