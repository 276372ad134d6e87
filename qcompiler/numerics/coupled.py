"""Rounding where errors of outputs add up: the loss is ``tr(E H E^T G)``, E = W - Q, and not that of each row alone.

H is the sum over tokens of x x^T, G that of g g^T, g being the gradient of the model's answer (see `tuning.fisher`).
With G the identity, all of this is what `second_order` has. A stack of weights has a G for each part of its rows, and
rows of different parts are taken for unrelated.

Shapes: W, Q, E ``[N, K]``; H ``[K, K]``; G ``[n, n]``, N in all; scale, zero point ``[N, groups]``.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from qcompiler.numerics.affine import Grid, WeightSpec, dequantize, stored_scale
from qcompiler.numerics.second_order import descend, sweep, upper_factor

__all__ = ["descend_coupled", "refit_coupled", "sweep_coupled"]

# Rows of a part that are rounded at a time, as if they were unrelated: few enough that little of what relates them is
# lost, many enough for whole vectors.
_BLOCK = 32
# Added to what relates the scales of a group, as a fraction of its diagonal.
_RIDGE = 1e-3


def _parts(curvatures: Sequence[np.ndarray]) -> Iterator[tuple[slice, np.ndarray]]:
    start = 0
    for curvature in curvatures:
        yield slice(start, start + len(curvature)), curvature
        start += len(curvature)


def _decoded(codes: np.ndarray, grid: Grid, spec: WeightSpec) -> np.ndarray:
    return dequantize(codes, grid.scale, grid.zero_point, spec.group_size)


def _rows(grid: Grid, rows: np.ndarray | slice) -> Grid:
    return Grid(grid.scale[rows], grid.zero_point[rows])


def sweep_coupled(
    weight: np.ndarray,
    factor: np.ndarray,
    curvatures: Sequence[np.ndarray],
    grid: Grid,
    spec: WeightSpec,
    order: np.ndarray,
    lazy_block: int = 128,
    block: int = _BLOCK,
) -> tuple[np.ndarray, np.ndarray]:
    """Quantize row after row, and the columns of each one after the other.

    With ``G = A A^T``, A upper triangular, the best error of row n given those of the rows before is
    ``-sum_{m<n} E_m A_mn / A_nn``: that much is taken away from the row before it is swept (Tseng et al. 2025,
    arXiv:2505.22988). Rows are visited in the order of falling diag(G), some at a time.

    Args:
        weight: float32 ``[N, K]``.
        factor: See `second_order.sweep`.
        curvatures: Damped G, float64.
        grid: Of the columns in their own order.
        spec: Target format.
        order: int ``[K]``, in which columns are visited.
        lazy_block: See `second_order.sweep`.
        block: Rows of a part that are swept at a time.

    Returns:
        Codes uint8 ``[N, K]``, and of each row the loss of what it was when its turn came, float64 ``[N]``.
    """
    visits: list[tuple[np.ndarray, np.ndarray]] = []  # rows in visiting order, A
    for part, curvature in _parts(curvatures):
        visit = np.argsort(-np.diagonal(curvature), kind="stable")
        visits.append((part.start + visit, upper_factor(curvature[np.ix_(visit, visit)])))
    error, codes, loss = np.zeros_like(weight), np.empty(weight.shape, np.uint8), np.empty(len(weight))
    for begin in range(0, max(len(rows) for rows, _ in visits), block):
        wanted, chosen = [], []
        for rows, upper in visits:
            here, before = slice(begin, begin + block), slice(0, begin)
            if begin < len(rows):
                share = np.linalg.solve(upper[here, here].T, upper[before, here].T).astype(np.float32)
                wanted.append(weight[rows[here]] + share @ error[rows[before]])
                chosen.append(rows[here])
        at = np.concatenate(chosen)
        part_grid = _rows(grid, at)
        codes[at], loss[at] = sweep(np.concatenate(wanted), factor, part_grid, spec, order, lazy_block)
        error[at] = weight[at] - _decoded(codes[at], part_grid, spec)
    return codes, loss


def refit_coupled(
    weight: np.ndarray,
    codes: np.ndarray,
    hessian: np.ndarray,
    curvatures: Sequence[np.ndarray],
    grid: Grid,
    spec: WeightSpec,
) -> Grid:
    """Move the scales of all rows of a group to the least loss with the codes held fixed, one group after the other.

    With c = code - zero ``[n, group]``, the loss is quadratic in what is added to the scales of a part, d ``[n]``:
    ``d^T A d - 2 b^T d`` with ``A = G * (c H_gg c^T)`` and ``b = rowsum(c * (G E H)_g)``, so that ``d = A^-1 b``.

    Args:
        weight: float32 ``[N, K]``.
        codes: uint8 ``[N, K]``.
        hessian: float32 ``[K, K]``.
        curvatures: Damped G.
        grid: Where the scales are.
        spec: Target format.

    Returns:
        The grid with new scales.
    """
    scale, error = grid.scale.copy(), weight - _decoded(codes, grid, spec)
    for part, curvature in _parts(curvatures):
        g = curvature.astype(np.float32)
        for group in range(scale.shape[1]):
            columns = slice(group * spec.group_size, min((group + 1) * spec.group_size, weight.shape[1]))
            c = codes[part, columns] - grid.zero_point[part, group, None]
            related = g * (c @ hessian[columns, columns] @ c.T)
            diagonal = np.einsum("nn->n", related)
            diagonal += _RIDGE * diagonal + 1e-30
            slope = np.einsum("nk,nk->n", c, g @ (error[part] @ hessian[:, columns]))
            moved = stored_scale(scale[part, group] + np.linalg.solve(related, slope), spec)
            error[part, columns] -= (moved - scale[part, group])[:, None] * c
            scale[part, group] = moved
    return Grid(scale, grid.zero_point)


def descend_coupled(
    weight: np.ndarray,
    codes: np.ndarray,
    hessian: np.ndarray,
    curvatures: Sequence[np.ndarray],
    grid: Grid,
    spec: WeightSpec,
    lazy_block: int = 128,
    block: int = _BLOCK,
) -> np.ndarray:
    """One round of coordinate descent on the codes, block of rows after block of rows.

    With all other rows held fixed the loss of row n is ``G_nn ||q - t||_H^2`` with ``t = q + (G E)_n / G_nn``. A block
    that makes the loss of all rows larger stays as it was.

    Args:
        weight: float32 ``[N, K]``.
        codes: uint8 ``[N, K]``.
        hessian: float32 ``[K, K]``.
        curvatures: Damped G.
        grid: Scales and zero points.
        spec: Target format.
        lazy_block: See `second_order.descend`.
        block: Rows of a part that move at a time.

    Returns:
        Codes uint8 ``[N, K]``.
    """
    codes, error = codes.copy(), weight - _decoded(codes, grid, spec)
    for part, curvature in _parts(curvatures):
        g = curvature.astype(np.float32)
        for begin in range(0, len(g), block):
            here = slice(begin, min(begin + block, len(g)))
            rows = slice(part.start + here.start, part.start + here.stop)
            slope, part_grid = g[here] @ error[part], _rows(grid, rows)
            before = _decoded(codes[rows], part_grid, spec)
            target = before + slope / np.diagonal(g)[here, None]
            found = descend(target, codes[rows], hessian, part_grid, spec, lazy_block)
            moves = _decoded(found, part_grid, spec) - before
            # Rows that are related may go too far together.
            if np.einsum("nk,nk->", moves @ hessian, 2 * slope - g[here, here] @ moves, dtype=np.float64) > 0:
                codes[rows] = found
                error[rows] -= moves
    return codes
