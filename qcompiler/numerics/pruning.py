"""Pruning: which values of a weight become zero, and how the others make up for them.

With H the sum over tokens of x x^T, the loss of a pruned weight P is ``tr((W - P) H (W - P)^T)``. To delete w_q costs

    magnitude   w_q^2               nothing is known of H
    OBD         w_q^2 H_qq          others stay (LeCun et al. 1989, Optimal Brain Damage)
    OBS         w_q^2 / [H^-1]_qq   others move by -w_q / [H^-1]_qq H^-1_:q (Hassibi and Stork 1993, Optimal Brain
                                    Surgeon)

half of that in their papers, whose H is twice ours. OBS is exact for one value; for many it goes on with what is left,
one value at a time (`prune_greedily`; Frantar and Alistarh 2022, arXiv:2208.11580), or a column after the other in one
order for all rows (`prune_swept`; Frantar and Alistarh 2023, SparseGPT, arXiv:2301.00774), which makes it faster by a
factor of about K.

Shapes: W ``[N, K]``; H ``[K, K]``; masks bool ``[N, K]``, true where a value becomes zero.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from qcompiler.errors import NumericsError
from qcompiler.numerics.greedy import inverted

__all__ = ["Sparsity", "cheapest", "made_up_for", "prune_greedily", "prune_swept"]

_FACTOR = 1 << 20  # values of the factors of all rows at a time in a thread


@dataclass(frozen=True)
class Sparsity:
    """How much of a weight becomes zero.

    Attributes:
        share: Of all values, 0 to 1.
        kept: Values that stay of each `of` neighbouring columns; 0 where any values may go.
        of: Columns in a run, of which the last may be shorter.
    """

    share: float
    kept: int = 0
    of: int = 0

    @classmethod
    def parse(cls, text: str) -> "Sparsity":
        """Read ``50`` (percent) or ``2:4`` (2 of 4 stay); raises NumericsError."""
        runs = re.fullmatch(r"(\d+):(\d+)", text)
        if runs:
            kept, of = int(runs[1]), int(runs[2])
            if 0 < kept < of:
                return cls(1 - kept / of, kept, of)
        elif re.fullmatch(r"\d+(\.\d+)?", text) and 0 < float(text) < 100:
            return cls(float(text) / 100)
        raise NumericsError(f"'{text}' is no sparsity; give a share in percent, such as 50, or runs, such as 2:4")

    def __str__(self) -> str:
        """Canonical text; parsing it gives the sparsity back."""
        return f"{self.kept}:{self.of}" if self.of else f"{100 * self.share:g}"


def cheapest(costs: np.ndarray, sparsity: Sparsity) -> np.ndarray:
    """The mask of the values that cost least: of the whole weight, or of each run of a row; ties go to the first.

    Args:
        costs: ``[N, K]``, finite.
        sparsity: How many.
    """
    rows, columns = costs.shape
    mask = np.zeros((rows, columns), bool)
    if not sparsity.of:
        count = round(sparsity.share * costs.size)
        mask.reshape(-1)[np.argsort(costs, axis=None, kind="stable")[:count]] = True
        return mask
    whole = columns // sparsity.of * sparsity.of
    runs = costs[:, :whole].reshape(rows, -1, sparsity.of)
    taken = np.argsort(runs, axis=-1, kind="stable")[..., : sparsity.of - sparsity.kept]
    found = np.zeros(runs.shape, bool)
    np.put_along_axis(found, taken, True, axis=-1)
    mask[:, :whole] = found.reshape(rows, whole)
    if columns - whole > sparsity.kept:  # a shorter run keeps as many
        rest = np.argsort(costs[:, whole:], axis=-1, kind="stable")[:, : columns - whole - sparsity.kept]
        np.put_along_axis(mask[:, whole:], rest, True, axis=-1)
    return mask


def made_up_for(weight: np.ndarray, mask: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """The weight of least loss whose masked values are zero: for each row ``w_F + H_FF^-1 H_FS w_S``.

    F are the values that stay and S those that go: the solution of the Karush-Kuhn-Tucker conditions.

    Args:
        weight: float32 ``[N, K]``.
        mask: bool ``[N, K]``.
        hessian: float64 ``[K, K]``, positive definite.

    Returns:
        float32 ``[N, K]``.
    """
    found = np.where(mask, 0, weight).astype(np.float64)
    for row, (values, gone) in enumerate(zip(weight.astype(np.float64), mask, strict=True)):
        stay = ~gone
        if stay.any() and gone.any():
            found[row, stay] += np.linalg.solve(hessian[np.ix_(stay, stay)], hessian[np.ix_(stay, gone)] @ values[gone])
    return found.astype(np.float32)


def prune_greedily(
    weight: np.ndarray, hessian: np.ndarray, sparsity: Sparsity, threads: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """OBS: delete the value that costs least, let the others of its row make up for it, and so on.

    Where any values may go, each row is followed to its end, and those steps are taken that cost least of all rows.
    The time grows with N K^3.

    Args:
        weight: float32 ``[N, K]``.
        hessian: float64 ``[K, K]``, positive definite.
        sparsity: How many go.
        threads: Threads to use; the result does not depend on it.

    Returns:
        The pruned weight float32 ``[N, K]`` and its mask.

    Raises:
        NumericsError: H is not positive definite.
    """
    rows, columns = weight.shape
    inverse = inverted(hessian)
    orders, costs = np.empty((rows, columns), np.int64), np.empty((rows, columns))

    def block(part: slice) -> None:
        orders[part], costs[part] = _deleted_rows(weight[part], inverse, sparsity)

    step = max(1, _FACTOR // columns**2)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(block, [slice(start, min(start + step, rows)) for start in range(0, rows, step)]))
    taken = np.isfinite(costs)
    if not sparsity.of:
        # A step cannot be taken without those before it, so it costs as much as the dearest of them.
        taken = cheapest(np.maximum.accumulate(costs, axis=1), sparsity)
    mask = np.zeros((rows, columns), bool)
    np.put_along_axis(mask, orders, taken, axis=1)
    return made_up_for(weight, mask, hessian), mask


def _deleted_rows(weight: np.ndarray, inverse: np.ndarray, sparsity: Sparsity) -> tuple[np.ndarray, np.ndarray]:
    """The order in which values of a few rows go, [n, K], and what each step costs, infinite where it is not allowed.

    As in `greedy`, the inverse without what is gone is H^-1 - V^T V, V being a pivoted Cholesky factor.
    """
    rows, columns = weight.shape
    each = np.arange(rows)
    values = weight.astype(np.float64)
    pivots = np.tile(np.diagonal(inverse), (rows, 1))
    taken = np.empty((rows, columns, columns))
    free = np.ones((rows, columns), bool)
    orders, costs = np.empty((rows, columns), np.int64), np.full((rows, columns), np.inf)
    run = np.arange(columns) // sparsity.of if sparsity.of else np.zeros(columns, np.int64)
    lengths = np.bincount(run)
    left = np.tile(np.maximum(lengths - sparsity.kept, 0), (rows, 1))  # that may still go, of each run
    for turn in range(columns):
        cost = np.where(free & (left[:, run] > 0), np.square(values) / pivots, np.inf)
        chosen = cost.argmin(1)
        allowed = np.isfinite(cost[each, chosen])
        chosen = np.where(allowed, chosen, free.argmax(1))  # the rest in any order
        orders[:, turn], costs[:, turn] = chosen, cost[each, chosen]
        free[each, chosen] = False
        left[each, run[chosen]] -= allowed
        if not allowed.any():
            continue
        pivot = pivots[each, chosen]
        column = inverse[chosen] - (taken[each, :turn, chosen][:, None] @ taken[:, :turn])[:, 0]
        column[~allowed] = 0
        values -= (values[each, chosen] / pivot)[:, None] * column
        taken[:, turn] = column / np.sqrt(pivot)[:, None]
        pivots -= np.square(taken[:, turn])
        pivots[~free] = 1
    return orders, costs


def prune_swept(
    weight: np.ndarray, factor: np.ndarray, sparsity: Sparsity, block: int = 128
) -> tuple[np.ndarray, np.ndarray]:
    """SparseGPT: one column after the other, those to come making up for what is deleted.

    With ``A A^T = H`` a deleted value v of column k costs ``(v A_kk)^2``. What goes of a block of columns is chosen as
    the block begins, what goes of a run as the run begins, by these costs; the values are those that have made up for
    all columns before.

    Args:
        weight: float32 ``[N, K]``.
        factor: float64 ``[K, K]``, `second_order.upper_factor` of the damped Hessian.
        sparsity: How many go.
        block: Columns, a multiple of those in a run.

    Returns:
        The pruned weight float32 ``[N, K]`` and its mask.
    """
    columns = weight.shape[1]
    step = sparsity.of or block
    diagonal = np.diagonal(factor)
    feedback = np.ascontiguousarray((factor / diagonal).T, np.float32)  # row k holds A_jk / A_kk for j < k
    values = np.ascontiguousarray(weight.T)  # [K, N]
    errors, found = np.zeros_like(values), np.empty_like(values)
    mask = np.zeros(values.shape, bool)
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        current = values[start:stop] + feedback[start:stop, :start] @ errors[:start]
        costs = np.square(current * diagonal[start:stop, None])
        mask[start:stop] = cheapest(np.ascontiguousarray(costs.T), sparsity).T
        for k in range(start, stop):
            value = current[k - start] + feedback[k, start:k] @ errors[start:k]
            found[k] = np.where(mask[k], 0, value)
            np.subtract(values[k], found[k], out=errors[k])
    return np.ascontiguousarray(found.T), np.ascontiguousarray(mask.T)
