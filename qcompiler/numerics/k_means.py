"""k-means with weights, in one dimension and in few.

Shapes: points ``[n, d]``; centres and tables ``[E, d]``.
"""

import numpy as np

__all__ = ["k_means", "nearest"]

_ROUNDS = 20
# Centres up to which the best are found in one dimension, and bins in which values lie then.
_SPLIT, _BINS = 16, 128
# Vectors that centres are found from.
_POINTS = 1 << 15
# Distances that are held at a time.
_HELD = 1 << 22


def k_means(points: np.ndarray, weights: np.ndarray, entries: int, seed: int) -> np.ndarray:
    """The centres of weighted k-means: least ``sum_i w_i |x_i - c|^2``.

    Few centres in one dimension start from the best for values in bins, others from points that are drawn. A centre
    that nothing is nearest to goes to the point that costs most.

    Args:
        points: float32 ``[n, d]``.
        weights: float32 ``[n]``, what each counts.
        entries: How many centres.
        seed: Of the points that more than one dimension starts from.

    Returns:
        float32 ``[E, d]``, in rising order of the first column; fewer different points than centres leave some equal.
    """
    points, weights = points.astype(np.float32), np.maximum(weights.astype(np.float64), 1e-30)
    if points.shape[1] == 1:
        return _line(points[:, 0], weights, entries, seed)
    if len(points) > _POINTS:
        some = np.linspace(0, len(points) - 1, _POINTS).astype(int)
        points, weights = points[some], weights[some]
    centres = _seeded(points, weights, entries, seed)
    for _ in range(_ROUNDS):
        codes, cost = nearest(points, centres[None], np.zeros(1, np.int32))
        total = np.bincount(codes, weights, entries)
        sums = [np.bincount(codes, weights * column, entries) for column in points.T.astype(np.float64)]
        moved = (np.stack(sums, 1) / np.maximum(total, 1e-30)[:, None]).astype(np.float32)
        empty = np.flatnonzero(total == 0)
        if len(empty):
            moved[empty] = points[np.argsort(-cost * weights, kind="stable")[: len(empty)]]
        if np.array_equal(moved, centres):
            break
        centres = moved
    return np.ascontiguousarray(centres[np.argsort(centres[:, 0], kind="stable")])


def _line(values: np.ndarray, weights: np.ndarray, entries: int, seed: int) -> np.ndarray:
    """The same in one dimension, where sorted values make a round a few searches and differences of sums."""
    order = np.argsort(values, kind="stable")
    x, w = values[order].astype(np.float64), weights[order]
    mass, first = (np.concatenate([[0], np.cumsum(each)]) for each in (w, w * x))
    if entries <= _SPLIT:
        centres = _split(x, w, entries)
    else:
        centres = np.sort(_seeded(x[:, None], w, entries, seed)[:, 0])
    for _ in range(_ROUNDS):
        edges = np.concatenate([[0], np.searchsorted(x, (centres[1:] + centres[:-1]) / 2), [len(x)]])
        total = np.diff(mass[edges])
        moved = np.sort(np.where(total > 0, np.diff(first[edges]) / np.where(total > 0, total, 1), centres))
        if np.array_equal(moved, centres):
            break
        centres = moved
    return np.asarray(centres[:, None], np.float32)


def _split(x: np.ndarray, w: np.ndarray, entries: int) -> np.ndarray:
    """The best centres ``[E]`` for sorted values that lie in a few hundred bins, by dynamic programming."""
    bins = np.arange(len(x)) * min(_BINS, len(x)) // len(x)
    mass, first, second = (np.concatenate([[0], np.cumsum(np.bincount(bins, w * x**power))]) for power in range(3))
    start, stop = np.arange(len(mass))[:, None], np.arange(len(mass))
    total = np.where(stop > start, mass - mass[:, None], 1)
    apart = (second - second[:, None]) - np.square(first - first[:, None]) / np.maximum(total, 1e-300)
    apart = np.where(stop > start, np.maximum(apart, 0), np.where(stop == start, 0, np.inf))  # [from, to]
    least, cuts = apart[0], []
    for _ in range(entries - 1):
        every = least[:, None] + apart
        cuts.append(every.argmin(0))
        least = every.min(0)
    ends = [len(mass) - 1]
    for cut in reversed(cuts):
        ends.append(int(cut[ends[-1]]))
    edges = np.array([0, *reversed(ends)])
    mean = np.diff(first[edges]) / np.maximum(np.diff(mass[edges]), 1e-300)
    mean[np.diff(edges) == 0] = x[-1]
    return np.sort(mean)


def _seeded(points: np.ndarray, weights: np.ndarray, entries: int, seed: int) -> np.ndarray:
    """Points ``[E, d]`` drawn as k-means++ does (Arthur and Vassilvitskii 2007): by what they still cost."""
    random = np.random.default_rng(seed)
    chosen = [int(random.choice(len(points), p=weights / weights.sum()))]
    cost = weights * np.square(points - points[chosen[0]]).sum(-1, dtype=np.float64)
    for _ in range(entries - 1):
        upto = np.cumsum(cost)
        chosen.append(min(int(np.searchsorted(upto, random.random() * upto[-1], "right")), len(points) - 1))
        cost = np.minimum(cost, weights * np.square(points - points[chosen[-1]]).sum(-1, dtype=np.float64))
    return points[chosen]


def nearest(points: np.ndarray, tables: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest entry of each point's table.

    Args:
        points: float32 ``[n, d]``.
        tables: float32 ``[C, E, d]``.
        table: int ``[n]``.

    Returns:
        Codes int ``[n]`` and squared distances float32 ``[n]``.
    """
    if len(tables) == 1:
        codes = _nearest_of_one(points, tables[0])
    else:
        codes = np.empty(len(points), np.int64)
        step = max(1, _HELD // (tables.shape[1] * tables.shape[2]))
        for start in range(0, len(points), step):
            part = slice(start, start + step)
            codes[part] = np.square(points[part, None] - tables[table[part]]).sum(-1).argmin(1)
    return codes, np.square(points - tables[table, codes]).sum(-1)


def _nearest_of_one(points: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The same for one table ``[E, d]``."""
    if points.shape[1] == 1:
        order = np.argsort(table[:, 0], kind="stable")
        ordered = table[order, 0]
        return np.asarray(order[np.searchsorted((ordered[1:] + ordered[:-1]) / 2, points[:, 0])])
    codes, size = np.empty(len(points), np.int64), np.square(table).sum(-1)
    step = max(1, _HELD // len(table))
    for start in range(0, len(points), step):
        # But for |x|^2, which all entries have.
        codes[start : start + step] = (size - 2 * points[start : start + step] @ table.T).argmin(1)
    return codes
