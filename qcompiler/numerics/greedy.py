"""Rounding a weight one value at a time in the order that costs least, each row in its own.

Frantar & Alistarh 2022, "Optimal Brain Compression", arXiv:2208.11580, section 5 (Optimal Brain Quantization). With
R = H^-1 over the values of a row that are still free:

    q = argmin (round(v_q) - v_q)^2 / R_qq     the value whose rounding adds the least loss, and its loss
    v <- v - (v_q - round(v_q)) / R_qq R_:q    how the free ones make up for it
    R <- R - R_:q R_q: / R_qq                  and the inverse without it

R itself is never updated: the columns R_:q / sqrt(R_qq) that were taken so far are the rows of V, a pivoted Cholesky
factor of H^-1, and the next column is that of H^-1 - V^T V. That takes half the arithmetic, and reads memory in the
place of writing it.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from qcompiler.errors import NumericsError
from qcompiler.numerics.affine import Grid, WeightSpec, round_to_grid

__all__ = ["greedy_sweep", "inverted"]

_FACTOR = 1 << 20  # values of all factors V at a time in a thread: what a core's cache holds, a row at least
_HALF = 0.5 * (1 + 1e-6)  # of a step: what is further from its code lies outside the grid


def greedy_sweep(
    weight: np.ndarray,
    hessian: np.ndarray,
    grid: Grid,
    spec: WeightSpec,
    order: np.ndarray | None = None,
    threads: int = 1,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantize the values of each row one after the other, in float64.

    Values that lie outside the grid, because the grid clips them or others pushed them there, go first, the furthest
    one before the others: later there would be fewer that can make up for them.

    Args:
        weight: float32 ``[N, K]``.
        hessian: float64 ``[K, K]``, positive definite.
        grid: Scale and zero point ``[N, G]``.
        spec: Target format, integer codes.
        order: int ``[K]``, an order for all rows in the place of the cheapest; GPTQ's codes then.
        threads: Threads to use; the result does not depend on it.

    Returns:
        Codes uint8 ``[N, K]``; the loss of each row, float64 ``[N]``: the diagonal of ``(W - Q) H (W - Q)^T``; and the
        order in which the values of each row were rounded, int ``[N, K]``.

    Raises:
        NumericsError: H is not positive definite.
    """
    rows, columns = weight.shape
    inverse = inverted(hessian)
    group = np.arange(columns) // spec.group_size
    codes, loss, orders = np.empty((rows, columns), np.uint8), np.empty(rows), np.empty((rows, columns), np.int64)

    def block(part: slice) -> None:
        scale, zero = grid.scale[part][:, group], grid.zero_point[part][:, group]  # [n, K]
        codes[part], loss[part], orders[part] = _rounded_rows(weight[part], inverse, scale, zero, spec, order)

    step = max(1, _FACTOR // columns**2)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(block, [slice(start, min(start + step, rows)) for start in range(0, rows, step)]))
    return codes, loss, orders


def inverted(hessian: np.ndarray) -> np.ndarray:
    """H^-1, float64 ``[K, K]``; raises NumericsError where H is not positive definite."""
    try:
        factor = np.linalg.inv(np.linalg.cholesky(hessian.astype(np.float64)))
    except np.linalg.LinAlgError as error:
        raise NumericsError("the Hessian is not positive definite; give more damping or calibration samples") from error
    return np.asarray(factor.T @ factor)


def _rounded_rows(
    weight: np.ndarray,
    inverse: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    spec: WeightSpec,
    order: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [n, K], losses [n] and orders [n, K] of a few rows; scale and zero point [n, K]."""
    rows, columns = weight.shape
    each = np.arange(rows)
    values, scale = weight.astype(np.float64), scale.astype(np.float64)
    pivots = np.tile(np.diagonal(inverse), (rows, 1))  # the diagonal of R, [n, K]
    taken = np.empty((rows, columns, columns))  # V: as many of its rows as values are rounded
    free = np.ones((rows, columns), bool)
    codes, loss = np.empty((rows, columns), np.uint8), np.zeros(rows)
    orders = np.empty((rows, columns), np.int64)
    for turn in range(columns):
        code = round_to_grid(values, scale, zero, spec)
        errors = values - (code - zero) * scale
        chosen = _next(errors, scale, pivots, free) if order is None else np.full(rows, order[turn])
        pivot, error = pivots[each, chosen], errors[each, chosen]
        column = inverse[chosen] - (taken[each, :turn, chosen][:, None] @ taken[:, :turn])[:, 0]  # R_:q, [n, K]
        codes[each, chosen], orders[:, turn], free[each, chosen] = code[each, chosen], chosen, False
        loss += np.square(error) / pivot
        values -= (error / pivot)[:, None] * column
        taken[:, turn] = column / np.sqrt(pivot)[:, None]
        pivots -= np.square(taken[:, turn])
        # What is rounded stays so, and rounding it once more costs no further division by nothing.
        pivots[~free] = 1
    return codes, loss, orders


def _next(errors: np.ndarray, scale: np.ndarray, pivots: np.ndarray, free: np.ndarray) -> np.ndarray:
    """The value of each row to round next, [n]; errors, scale, pivots and free [n, K]."""
    away = np.where(free, np.abs(errors / scale), 0)
    outside = away.argmax(1)
    cheapest = np.where(free, np.square(errors) / pivots, np.inf).argmin(1)
    return np.asarray(np.where(away.max(1) > _HALF, outside, cheapest))
