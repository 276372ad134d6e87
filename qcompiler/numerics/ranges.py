"""Ranges of activations, picked from a histogram: what is clipped so that the rest is rounded less.

A histogram has its bins over ``[-T, T]`` for the largest magnitude T of data whose smallest and largest value are known
beforehand. So it is exact, and never widened or merged; its bins are those of ``numpy.histogram``, and of ONNX Runtime.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, product

import numpy as np

from qcompiler.numerics.activation import ActivationSpec, activation_grid

__all__ = [
    "BINS",
    "Histogram",
    "bin_counts",
    "bin_edges",
    "entropy_range",
    "expected_error",
    "mse_range",
    "percentile_range",
]

BINS = 2048
# Values binned at a time: they and their bin numbers stay in a core's cache.
_BLOCK = 1 << 14
# Below this float32 cannot hold the number of bins in a unit, and further down no edges between the bins.
_SMALLEST_LIMIT = 1e-30
# What probabilities of zero become before a divergence is taken (as in MXNet and ONNX Runtime).
_EPSILON = 1e-4
# The smallest share of the range that is tried: some ten bins on each side.
_LEAST_SHARE = 0.01
_Range = tuple[float, float]


@dataclass(frozen=True, eq=False)
class Histogram:
    """How often a tensor's values fall into bins over ``[-T, T]``, T the larger magnitude of `low` and `high`.

    Attributes:
        counts: int64 ``[bins]``, an even number of them.
        low: Smallest value.
        high: Largest value.
        zeros: How many values are exactly zero; they are in `counts` too.
    """

    counts: np.ndarray
    low: float
    high: float
    zeros: int = 0

    @property
    def limit(self) -> float:
        """The largest magnitude T."""
        return max(abs(self.low), abs(self.high))

    @cached_property
    def edges(self) -> np.ndarray:
        """float32 ``[bins + 1]``, from -T to T."""
        return bin_edges(self.limit, len(self.counts))

    @classmethod
    def of(cls, values: np.ndarray, bins: int = BINS) -> "Histogram":
        """The histogram of an array of any shape that holds something, as float32."""
        values = np.asarray(values, np.float32)
        low, high = float(values.min()), float(values.max())
        counts = bin_counts(values, bin_edges(max(abs(low), abs(high)), bins))
        return cls(counts, low, high, int(values.size - np.count_nonzero(values)))


def bin_edges(limit: float, bins: int = BINS) -> np.ndarray:
    """The edges float32 ``[bins + 1]`` of equal bins over [-limit, limit], rounded as ``numpy.histogram`` does.

    A limit below 1e-30 counts as that. The edge in the middle is zero.
    """
    end = np.float32(max(limit, _SMALLEST_LIMIT))
    # A width of more than the largest float32 number would be infinite.
    wide = end > np.finfo(np.float32).max / 2
    return np.linspace(-float(end) if wide else -end, float(end) if wide else end, bins + 1, dtype=np.float32)


def bin_counts(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Count values in equal bins, as ``numpy.histogram`` does.

    Args:
        values: Any shape, taken as float32; between the outer edges, as NaN is not.
        edges: float32 ``[bins + 1]`` from `bin_edges`. A bin holds its left edge, and the last one both.

    Returns:
        int64 ``[bins]``.
    """
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    bins = len(edges) - 1
    per_unit = np.float32(bins / 2 / float(edges[-1]))
    # A bin number computed in float32 may be wrong by one next to an edge. It is made too high rather than too low, so
    # that one comparison, with the exact edge, mends it.
    offset = np.float32(bins // 2 + bins * 2.0**-21)
    counts = np.zeros(bins + 1, np.int64)
    position = np.empty(min(_BLOCK, flat.size), np.float32)
    number, above = np.empty(position.size, np.intp), np.empty(position.size, bool)
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        x, at, beyond = position[: block.size], number[: block.size], above[: block.size]
        np.multiply(block, per_unit, out=x)
        np.add(x, offset, out=x)
        np.copyto(at, x, casting="unsafe")
        np.less(block, np.take(edges, at, out=x, mode="clip"), out=beyond)
        np.subtract(at, beyond, out=at)
        counts += np.bincount(at, minlength=bins + 1)
    counts[-2] += counts[-1]
    return counts[:-1]


def percentile_range(histogram: Histogram, percentile: float) -> _Range:
    """The range that leaves out half of ``100 - percentile`` percent of the values on each side.

    Equal to ONNX Runtime's ``PercentileCalibrater`` with ``symmetric=False``, which takes the left edge of the bin on
    both sides, but for two cases: a percentile of 100 is the whole range, and a range that would end before it begins
    (all values are in one bin) ends where it begins.

    Args:
        histogram: Of one tensor.
        percentile: Percent of the values to keep, 0 to 100.

    Returns:
        Low and high.
    """
    total = histogram.counts.sum()
    if percentile >= 100 or not total:
        return histogram.low, histogram.high
    share = np.cumsum(histogram.counts / total)
    cut = (100.0 - percentile) / 200.0
    low = float(histogram.edges[np.searchsorted(share, cut)])
    high = float(histogram.edges[np.searchsorted(share, 1.0 - cut)])
    low, high = max(low, histogram.low), min(high, histogram.high)
    return low, max(low, high)


def entropy_range(histogram: Histogram, levels: int = 128) -> _Range:
    """The range, symmetric but for the ends of the data, that changes the distribution least when it is cut to levels.

    For each number of bins around zero: P are their counts, with what lies outside added to the outer two; Q are the
    counts without that, merged into levels and spread evenly over the bins of a level that P has something in, rounded
    down. Of all KL(P || Q), in nats, the smallest wins, and the narrowest range among equals. This is the calibration
    of Migacz 2017, "8-bit inference with TensorRT", as ONNX Runtime's ``EntropyCalibrater(num_bins=2048,
    num_quantized_bins=128)`` does it. The result is equal, since every float32 sum is taken in the same order.

    Args:
        histogram: Of one tensor.
        levels: Levels that each range is cut to, at least 2; more than there are bins leave the range as it is.

    Returns:
        Low and high.
    """
    middle, bins = len(histogram.counts) // 2, len(histogram.counts)
    if not histogram.counts.any() or levels // 2 > middle:
        return histogram.low, histogram.high
    halves = np.arange(levels // 2, middle + 1)
    starts, ends = middle - halves, np.minimum(middle + halves + 1, bins)
    # Candidates with the same number of bins in a level have the same shape and are computed together.
    merged = (ends - starts) // levels
    parts = [
        _divergences(histogram.counts, starts[merged == each], ends[merged == each], levels)
        for each in np.unique(merged)
    ]
    best = int(np.argmin(np.concatenate(parts)))
    low, high = float(histogram.edges[starts[best]]), float(histogram.edges[ends[best]])
    return max(low, histogram.low), min(high, histogram.high)


def _divergences(counts: np.ndarray, starts: np.ndarray, ends: np.ndarray, levels: int) -> np.ndarray:
    """KL(P || Q) in nats, float32 ``[C]``, of ranges of bins ``[start, end)`` with the same number of bins a level.

    Args:
        counts: int64 ``[bins]``.
        starts: int ``[C]``.
        ends: int ``[C]``.
        levels: Levels L of each range. The bins that are left over have no place in Q, but count for its last level.
    """
    widths = ends - starts
    merged, rows = int(widths[0]) // levels, np.arange(len(starts))
    total = np.concatenate([[0], np.cumsum(counts)])  # [bins + 1]: what lies before an edge
    filled = np.concatenate([[0], np.cumsum(counts != 0)])
    bounds = starts[:, None] + merged * np.arange(levels + 1)  # [C, L + 1]
    before, after = total[starts], total[-1] - total[ends]
    first, last = counts[starts], counts[ends - 1]
    # Empty outer bins that are not empty any more with what lies outside.
    begun, ended = (first == 0) & (before > 0), (last == 0) & (after > 0)

    masses = np.diff(total[bounds])
    masses[:, -1] += total[ends] - total[bounds[:, -1]]
    members = np.diff(filled[bounds])
    members[:, 0] += begun
    members[:, -1] += ended & (ends == bounds[:, -1])
    spread = np.floor(masses / np.maximum(members, 1)) * (members > 0)
    found = merged * np.count_nonzero(spread, axis=1)
    level = _smooth(spread.astype(np.float32), widths - found, np.maximum(found, 1))

    width = int(widths.max())
    padded = np.concatenate([counts, np.zeros(width, np.int64)]).astype(np.float32)
    p = np.lib.stride_tricks.sliding_window_view(padded, width)[starts]  # [C, width]; past an end it is not used
    p[:, 0] = first + before
    p[rows, widths - 1] = last + after
    found_p = filled[ends] - filled[starts] + begun + ended
    p = _smooth(p, widths - found_p, found_p)
    q = np.full(p.shape, np.float32(_EPSILON))
    q[:, : levels * merged] = np.repeat(level, merged, axis=1)

    p /= _sums(p, widths)[:, None]
    q /= _sums(q, widths)[:, None]
    np.divide(p, q, out=q)
    p *= np.log(q, out=q)
    # Where nothing is left of Q, nothing can be compared.
    return np.asarray(np.where(found > 0, _sums(p, widths), np.float32(np.inf)))


def _smooth(counts: np.ndarray, empty: np.ndarray, filled: np.ndarray) -> np.ndarray:
    """Counts float32 ``[C, ...]`` with a little for the empty bins taken from the others; both int ``[C]``."""
    share = (-_EPSILON * empty / filled).astype(np.float32)
    return np.asarray(np.where(counts == 0, np.float32(_EPSILON), counts + share[:, None]))


def _sums(rows: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """The float32 sums ``[C]`` of as many elements of each row as its width says, added in the order of numpy.sum."""
    return np.array([np.add.reduce(row[:width]) for row, width in zip(rows, widths, strict=True)], np.float32)


def mse_range(histogram: Histogram, spec: ActivationSpec, candidates: int = 64) -> _Range:
    """The range of least expected squared error, among shrunk ones.

    The shares of the range that are tried fall geometrically from 1 to 0.01. A symmetric range, or one with values on
    one side of zero only, has one share. Otherwise both ends shrink in proportion, or one of them alone; and from the
    best of these, first the lower and then the upper end is chosen anew.

    Args:
        histogram: Of one tensor.
        spec: Format. 8-bit floats keep the largest magnitude: clipping would gain them no precision.
        candidates: Number of shares; with 1 the result is the whole range.

    Returns:
        Low and high.
    """
    if spec.fp8:
        return -histogram.limit, histogram.limit
    error = _error_function(histogram, spec)
    shares = [float(share) for share in _LEAST_SHARE ** (np.arange(candidates) / max(candidates - 1, 1))]
    best, least = (1.0, 1.0), error(histogram.low, histogram.high)
    one_sided = histogram.low >= 0 or histogram.high <= 0
    tries = [(share, share) for share in shares]
    if not spec.symmetric and not one_sided:
        tries = list(chain(tries, product(shares, [1.0]), product([1.0], shares)))
    for turn in range(3):
        for shrink in tries:
            found = error(*_shrunk(histogram, shrink))
            if found < least:
                best, least = shrink, found
        if spec.symmetric or one_sided:
            break
        tries = [(share, best[1]) for share in shares] if turn == 0 else [(best[0], share) for share in shares]
    return _shrunk(histogram, best)


def _shrunk(histogram: Histogram, shares: _Range) -> _Range:
    """Shares of the ends of the data; where both are on one side of zero, the one next to zero stays if it can."""
    low = histogram.low * (shares[0] if histogram.low < 0 else 1.0)
    high = histogram.high * (shares[1] if histogram.high > 0 else 1.0)
    return (min(low, high), high) if histogram.high > 0 else (low, max(low, high))


def expected_error(histogram: Histogram, low: float, high: float, spec: ActivationSpec) -> float:
    """The mean squared error of quantizing the values with the grid of a range, clipping and rounding alike.

    Values are taken as evenly spread over their bin; those that are exactly zero have no error.

    Args:
        histogram: Of one tensor.
        low: Lower end of the range.
        high: Upper end of the range.
        spec: Format.

    Returns:
        Squared error in the square of the tensor's unit, at the scale that is stored.
    """
    return _error_function(histogram, spec)(low, high)


def _error_function(histogram: Histogram, spec: ActivationSpec) -> Callable[[float, float], float]:
    """Maps a range to its expected error."""
    edges, drops = _density(histogram)
    table = _float8_table(spec) if spec.fp8 else None

    def error(low: float, high: float) -> float:
        scale, zero_point = activation_grid(low, high, spec)
        steps = edges / float(scale)
        if table is not None:
            integral = _float8_integral(steps, *table)
        else:
            first, last = spec.ends
            integral = _integral(steps, first - zero_point, last - zero_point)
        return float(scale) ** 3 * max(float(drops @ integral), 0.0)

    return error


def _density(histogram: Histogram) -> tuple[np.ndarray, np.ndarray]:
    """The density of the values, constant within a bin: the edges, and how much it drops at each.

    Zeros are left out, and the outer bins end where the data do. The integral of the density times a function is then
    the sum over the edges of the drop times the integral of the function up to there.

    Returns:
        Edges float64 ``[n]``, in the tensor's unit, and drops of the density float64 ``[n]``, in one over that unit.
    """
    counts, edges = histogram.counts.astype(np.float64), histogram.edges.astype(np.float64)
    total, filled = counts.sum(), np.flatnonzero(counts)
    if not len(filled):
        return np.zeros(1), np.zeros(1)
    counts[len(counts) // 2] -= histogram.zeros
    first, last = int(filled[0]), int(filled[-1]) + 1
    edges, counts = edges[first : last + 1], counts[first:last]
    # A bin that is cut to a point would have no width to spread its values over.
    least = 1e-6 * (edges[1] - edges[0])
    edges[0] = min(max(edges[0], histogram.low), edges[1] - least)
    edges[-1] = max(min(edges[-1], histogram.high), edges[-2] + least)
    return edges, -np.diff(counts / total / np.diff(edges), prepend=0.0, append=0.0)


def _integral(x: np.ndarray, first: int, last: int) -> np.ndarray:
    """The integral from 0 to x of the squared error of rounding to the integers in [first, last].

    Around an integer k it grows by ``(x - k)^3 / 3``, and by 1 / 12 from one integer to the next.
    """
    nearest = np.rint(x)
    np.maximum(np.minimum(nearest, last, out=nearest), first, out=nearest)
    rest = x - nearest
    return np.asarray(rest * rest * rest / 3 + nearest / 12)


def _float8_table(spec: ActivationSpec) -> tuple[np.ndarray, np.ndarray]:
    """The finite 8-bit floats, float64 ``[n]`` ascending, and the integral of `_float8_integral` at each."""
    numbers = np.arange(256, dtype=np.uint8).view(spec.dtype).astype(np.float64)
    numbers = np.unique(numbers[np.isfinite(numbers)])
    return numbers, np.concatenate([[0.0], np.cumsum(np.diff(numbers) ** 3 / 12)])


def _float8_integral(x: np.ndarray, numbers: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """The integral up to x of the squared error of rounding to the nearest of the numbers, but for a constant."""
    nearest = np.searchsorted((numbers[1:] + numbers[:-1]) / 2, x)
    return np.asarray((x - numbers[nearest]) ** 3 / 3 + sums[nearest])
