"""Codebooks: codes that name entries of learned tables in the place of numbers on a grid.

A weight ``[N, K]`` has scales ``[N, G]`` like any other, and a code for every d columns of a row. Code c of a row
stands for ``table[c] * scale``, the table being the one of the row's block of rows. Tables are found by k-means,
weighted by the diagonal of H (Kim et al. 2023, SqueezeLLM, arXiv:2306.07629), and codes by a sweep with error feedback
(van Baalen et al. 2024, GPTVQ, arXiv:2402.15319). Then tables are solved for with the codes as they are, and so on.

Shapes: W ``[N, K]``; scale ``[N, G]``; tables ``[C, E, d]``; codes ``[N, K / d]``; H ``[K, K]``.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from statistics import NormalDist

import numpy as np

from qcompiler.errors import NumericsError
from qcompiler.numerics.affine import WeightSpec, stored_scale
from qcompiler.numerics.k_means import k_means, nearest

__all__ = [
    "codebook_losses",
    "decode",
    "fit_tables",
    "group_scales",
    "known_table",
    "refit_sign_scales",
    "refit_tables",
    "sweep_codebooks",
    "table_of_rows",
    "table_rows",
]

# Bits per weight that tables may cost; the more rows share one, the less it costs and the worse it fits.
_OVERHEAD = 0.05
# Turns of fitting tables and searching scales, and shares of a scale that are tried.
_TURNS = 2
_SHARES = (1.0, 0.94, 0.88, 0.82, 0.75, 0.66)
# Entries times columns up to which tables are solved for, which takes as many products with H.
_SOLVED = 64


def table_rows(spec: WeightSpec, rows: int, columns: int) -> int:
    """Rows that share a table, in whole eights or all of them."""
    if known_table(spec) is not None:
        return rows
    stored = spec.entries * spec.vector * (16 if spec.scale_dtype == "float16" else 32)
    wanted = -(-stored // max(1, int(_OVERHEAD * columns * 8))) * 8
    return min(rows, wanted)


@cache
def _nf4() -> tuple[float, ...]:
    """Quantiles of the normal distribution, zero and both ends among them.

    Eight are as likely above zero and seven below (Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3); scaled to
    end at minus and plus one.
    """
    last = 0.5 * ((1 - 1 / 32) + (1 - 1 / 30))  # the probability of what is below the largest
    quantile = NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(last, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(last, 0.5, 8)[:-1]]
    return tuple(sorted(float(value / above[0]) for value in (*below, 0.0, *above)))


def known_table(spec: WeightSpec) -> np.ndarray | None:
    """The table float32 ``[1, E, 1]`` of a format that has nothing to learn, or None: signs, and NF4."""
    if spec.signs:
        return np.array([[[-1.0], [1.0]]], np.float32)
    if spec.known:
        return np.array(_nf4(), np.float32).reshape(1, -1, 1)
    return None


def table_of_rows(spec: WeightSpec, rows: int, columns: int) -> np.ndarray:
    """The table of each row of an [N, K] weight, int32 ``[N]``."""
    return (np.arange(rows) // table_rows(spec, rows, columns)).astype(np.int32)


def group_scales(weight: np.ndarray, spec: WeightSpec) -> np.ndarray:
    """The value of largest magnitude of each group, with its sign: float32 ``[N, G]``, as it is stored."""
    rows, columns = weight.shape
    groups = np.pad(weight, ((0, 0), (0, -columns % spec.group_size))).reshape(rows, -1, spec.group_size)
    place = np.abs(groups).argmax(-1, keepdims=True)
    return stored_scale(np.take_along_axis(groups, place, -1)[..., 0].astype(np.float32), spec)


def decode(codes: np.ndarray, tables: np.ndarray, scale: np.ndarray, spec: WeightSpec) -> np.ndarray:
    """The values float32 ``[N, K]`` that codes stand for."""
    rows, columns = len(codes), codes.shape[1] * spec.vector
    found = tables[table_of_rows(spec, rows, columns)[:, None], codes].reshape(rows, columns)
    return np.asarray(found * _wide(scale, spec, columns), np.float32)


def fit_tables(
    weight: np.ndarray, importance: np.ndarray | None, spec: WeightSpec, seed: int, threads: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Tables and scales for a weight.

    Tables are fitted to the weight in its scales, then scales are searched for that suit the tables, in turns.

    Args:
        weight: float32 ``[N, K]``.
        importance: ``[K]``, what the squared error of each column counts; None counts all the same.
        spec: Target format.
        seed: See `k_means`.
        threads: Tables that are fitted at the same time.

    Returns:
        Tables float32 ``[C, E, d]`` and scales float32 ``[N, G]``.
    """
    rows, columns = weight.shape
    known = known_table(spec)
    if known is not None and spec.signs:
        return known, _mean_scales(weight, importance, spec)
    each = table_rows(spec, rows, columns)
    counts = np.ones(columns, np.float32) if importance is None else np.maximum(importance, 1e-12)
    counts = counts.reshape(-1, spec.vector).mean(-1)  # [K / d]
    if known is not None:
        return known, _searched(weight, counts, known[0], np.abs(group_scales(weight, spec)), spec)
    parts = [weight[start : start + each] for start in range(0, rows, each)]
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(lambda part: _fitted(part, counts, spec, seed), parts))
    return np.stack([table for table, _ in found]), np.concatenate([scale for _, scale in found])


def _mean_scales(weight: np.ndarray, importance: np.ndarray | None, spec: WeightSpec) -> np.ndarray:
    """The scales of signs: the mean magnitude of each group (Rastegari et al. 2016, arXiv:1603.05279), weighted."""
    heed = np.ones(weight.shape[1]) if importance is None else np.maximum(importance, 1e-12)
    starts = np.arange(0, weight.shape[1], spec.group_size)
    total = np.add.reduceat(np.abs(weight) * heed, starts, axis=1) / np.add.reduceat(heed, starts)
    return stored_scale(total.astype(np.float32), spec)


def _fitted(weight: np.ndarray, counts: np.ndarray, spec: WeightSpec, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The table ``[E, d]`` and the scales of rows that share it."""
    scale = group_scales(weight, spec)
    for turn in range(_TURNS):
        wide = _wide(scale, spec, weight.shape[1])
        points = (weight / wide).reshape(-1, spec.vector)
        table = k_means(points, (np.square(wide[:, :: spec.vector]) * counts).reshape(-1), spec.entries, seed)
        if turn < _TURNS - 1:
            scale = _searched(weight, counts, table, scale, spec)
    return table, scale


def _wide(scale: np.ndarray, spec: WeightSpec, columns: int) -> np.ndarray:
    """The scale of each column, ``[N, K]``."""
    return np.asarray(scale.repeat(spec.group_size, axis=1)[:, :columns])


def _searched(
    weight: np.ndarray, counts: np.ndarray, table: np.ndarray, scale: np.ndarray, spec: WeightSpec
) -> np.ndarray:
    """Scales ``[N, G]`` at which the nearest entries of a table leave the least error in each group."""
    rows, columns = weight.shape
    starts = np.arange(0, columns // spec.vector, spec.group_size // spec.vector)
    best, least = scale, np.full(scale.shape, np.inf)
    for share in _SHARES:
        tried = stored_scale(scale * np.float32(share), spec)
        wide = _wide(tried, spec, columns)
        _, apart = nearest((weight / wide).reshape(-1, spec.vector), table[None], np.zeros(1, np.int32))
        cost = apart.reshape(rows, -1) * np.square(wide[:, :: spec.vector]) * counts
        cost = np.add.reduceat(cost, starts, axis=1)
        best, least = np.where(cost < least, tried, best), np.minimum(cost, least)
    return best


def sweep_codebooks(
    weight: np.ndarray,
    factor: np.ndarray,
    tables: np.ndarray,
    scale: np.ndarray,
    spec: WeightSpec,
    order: np.ndarray,
    lazy_block: int = 128,
) -> tuple[np.ndarray, np.ndarray]:
    """Find codes for the columns of a weight, d at a time, each making up for the errors of those before.

    With ``A A^T = H`` the loss of a row's error e is ``|e A|^2``. A block b of d columns adds
    ``|(e_b + u) A_bb|^2``, u being what the columns before leave: ``sum_j e_j A_jb A_bb^-1``.

    Args:
        weight: float32 ``[N, K]``.
        factor: float64 ``[K, K]``, `upper_factor` of the damped Hessian in visiting order.
        tables: float32 ``[C, E, d]``.
        scale: float32 ``[N, G]``.
        spec: Target format.
        order: int ``[K]``, the visiting order; d columns that share a code follow one another.
        lazy_block: Columns between two updates with matrix products.

    Returns:
        Codes uint8 ``[N, K / d]`` and the loss of each row, float64 ``[N]``.
    """
    rows, columns = weight.shape
    d = spec.vector
    if columns % d or np.any(order.reshape(-1, d) // d != order[::d, None] // d):
        raise NumericsError(f"columns that share a code have to follow one another, {d} at a time")
    entries = tables[table_of_rows(spec, rows, columns)]  # [N, E, d]
    values = np.ascontiguousarray(weight[:, order])
    found, loss = _swept(values, factor, entries, lambda at: scale[:, order[at] // spec.group_size], lazy_block)
    codes = np.empty_like(found)
    codes[:, order[::d] // d] = found
    return codes, loss


def codebook_losses(
    weight: np.ndarray,
    factor: np.ndarray,
    found: Sequence[tuple[np.ndarray, np.ndarray]],
    specs: Sequence[WeightSpec],
    order: np.ndarray,
) -> np.ndarray:
    """The losses that `sweep_codebooks` leaves in several formats, found in one go.

    Args:
        weight: float32 ``[N, K]``.
        factor: See `sweep_codebooks`.
        found: Tables and scales of each format.
        specs: The S formats, all of one column a code.
        order: int ``[K]``, the visiting order.

    Returns:
        float64 ``[S, N]``.
    """
    rows, columns = weight.shape
    most = max(spec.entries for spec in specs)
    entries = np.full((len(specs) * rows, most, 1), np.inf, np.float32)
    scales = np.empty((columns, len(specs) * rows), np.float32)
    for number, ((tables, scale), spec) in enumerate(zip(found, specs, strict=True)):
        part = slice(number * rows, (number + 1) * rows)
        entries[part, : spec.entries] = tables[table_of_rows(spec, rows, columns)]
        scales[:, part] = scale.T[order // spec.group_size]
    values = np.tile(weight[:, order], (len(specs), 1))
    _, loss = _swept(values, factor, entries, lambda at: scales[at], 128)
    return loss.reshape(len(specs), rows)


def _swept(
    values: np.ndarray,
    factor: np.ndarray,
    entries: np.ndarray,
    scale: Callable[[int], np.ndarray],
    lazy_block: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Codes ``[N, K / d]`` and losses ``[N]`` of columns ``[N, K]`` in visiting order.

    `entries` are those of each row, ``[N, E, d]``; `scale` has the scales ``[N]`` of the column at a place.
    """
    (rows, columns), d = values.shape, entries.shape[2]
    each = np.arange(rows)
    errors = np.empty((rows, columns), np.float32)
    codes, loss = np.empty((rows, columns // d), np.uint8), np.zeros(rows)
    small = factor.astype(np.float32)
    steps = max(1, lazy_block // d) * d
    for begin in range(0, columns, steps):
        end = min(begin + steps, columns)
        carried = errors[:, :begin] @ small[:begin, begin:end]  # [N, block]
        for start in range(begin, end, d):
            block = slice(start, start + d)
            own = small[block, block]
            known = carried[:, start - begin : start - begin + d] + errors[:, begin:start] @ small[begin:start, block]
            size = scale(start)[:, None]
            wanted = values[:, block] @ own + known  # [N, d], less what the entry is worth
            apart = (wanted / size)[:, None] - (entries @ own if d > 1 else entries * own)  # [N, E, d]
            far = np.square(apart[..., 0]) if d == 1 else np.square(apart).sum(-1)
            best = far.argmin(1)
            codes[:, start // d] = best
            errors[:, block] = values[:, block] - entries[each, best] * size
            loss += far[each, best].astype(np.float64) * np.square(size[:, 0])
    return codes, loss


def refit_tables(
    weight: np.ndarray,
    codes: np.ndarray,
    tables: np.ndarray,
    scale: np.ndarray,
    hessian: np.ndarray,
    spec: WeightSpec,
) -> np.ndarray:
    """The tables that leave the least ``tr((W - Q) H (W - Q)^T)`` with the codes as they are.

    Entries that no code names stay, and so do tables of more than 64 entries times columns.

    Args:
        weight: float32 ``[N, K]``.
        codes: uint8 ``[N, K / d]``.
        tables: float32 ``[C, E, d]``.
        scale: float32 ``[N, G]``.
        hessian: float32 ``[K, K]``, damped.
        spec: Target format.

    Returns:
        float32 ``[C, E, d]``.
    """
    (count, entries, d), columns = tables.shape, weight.shape[1]
    if entries * d > _SOLVED or known_table(spec) is not None:
        return tables
    table, wide = table_of_rows(spec, *weight.shape), _wide(scale, spec, columns)
    slots = codes.astype(np.int64).repeat(d, axis=1) * d + np.arange(columns) % d  # [N, K], into E d
    found = tables.copy()
    for number in range(count):
        square, product = np.zeros((entries * d, entries * d)), np.zeros(entries * d)
        for row in np.flatnonzero(table == number):
            basis = np.zeros((entries * d, columns), np.float32)
            basis[slots[row], np.arange(columns)] = wide[row]
            seen = basis @ hessian
            square += seen @ basis.T
            product += seen @ weight[row]
        used = np.flatnonzero(np.diagonal(square) > 0)
        part = square[np.ix_(used, used)]
        part[np.diag_indices(len(used))] *= 1 + 1e-6
        found[number].reshape(-1)[used] = np.linalg.solve(part, product[used])
    return np.asarray(found)


def refit_sign_scales(
    weight: np.ndarray, codes: np.ndarray, scale: np.ndarray, hessian: np.ndarray, spec: WeightSpec
) -> np.ndarray:
    """The scales of signs that leave the least ``tr((W - Q) H (W - Q)^T)`` with the signs as they are.

    A scale that would be negative stays.

    Args:
        weight: float32 ``[N, K]``.
        codes: uint8 ``[N, K]``, 1 for plus.
        scale: float32 ``[N, G]``.
        hessian: float32 ``[K, K]``, damped.
        spec: Weights of 1 bit.

    Returns:
        float32 ``[N, G]``.
    """
    columns, groups = weight.shape[1], scale.shape[1]
    found = scale.copy()
    place = np.arange(columns) // spec.group_size
    for row, (values, signs) in enumerate(zip(weight, 2.0 * codes - 1, strict=True)):
        basis = np.zeros((groups, columns), np.float32)
        basis[place, np.arange(columns)] = signs
        seen = basis @ hessian
        solved = np.linalg.solve((seen @ basis.T).astype(np.float64), (seen @ values).astype(np.float64))
        found[row] = np.where(solved > 0, solved, scale[row])
    return stored_scale(found, spec)
