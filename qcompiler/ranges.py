"""Ranges of activations, measured on calibration data.

The smallest and the largest value take one sweep over the data. What needs a histogram takes a second one: on the range
that the first has found, a histogram is exact, is never widened or merged, has a fixed size, and does not depend on the
order of the batches. Running the model twice costs less than what a histogram loses that has to grow.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from qcompiler.errors import CalibrationError, NumericsError, SchemeError
from qcompiler.numerics.activation import ActivationSpec
from qcompiler.numerics.ranges import (
    BINS,
    Histogram,
    bin_counts,
    bin_edges,
    entropy_range,
    expected_error,
    mse_range,
    percentile_range,
)
from qcompiler.observing import observe
from qcompiler.session import Feeds

__all__ = ["HistogramOf", "MinMax", "MovingAverage", "Range", "calibrate"]

logger = logging.getLogger(__name__)

_FLOATS = ("float16", "bfloat16", "float32", "float64")
# What can be chosen from a histogram: (histogram, format, percentile) -> (low, high). `auto` takes the first of equals.
_PICKERS: dict[str, Callable[[Histogram, ActivationSpec, float], tuple[float, float]]] = {
    "minmax": lambda histogram, spec, percentile: (histogram.low, histogram.high),
    "percentile": lambda histogram, spec, percentile: percentile_range(histogram, percentile),
    "mse": lambda histogram, spec, percentile: mse_range(histogram, spec),
    "entropy": lambda histogram, spec, percentile: entropy_range(histogram),
}
_CALIBRATORS = ("auto", "average", *_PICKERS)


@dataclass(frozen=True)
class Range:
    """What a value's codes have to reach.

    Attributes:
        low: Lower end, in the value's unit.
        high: Upper end.
        method: The calibrator that found it; never ``auto``.
    """

    low: float
    high: float
    method: str


class MinMax:
    """The smallest and the largest value of a tensor, over all batches."""

    method = "minmax"

    def __init__(self, name: str = "") -> None:
        """Start with nothing seen; the tensor's name is for messages."""
        self.name = name
        self.low, self.high = np.inf, -np.inf

    def part(self, values: np.ndarray) -> tuple[float, float]:
        """Low and high of a batch of any shape; infinite the wrong way round where it is empty."""
        return _extremes(_as_float32(values, self.name), self.name)

    def add(self, part: tuple[float, float]) -> None:
        """Widen the range."""
        self.low, self.high = min(self.low, part[0]), max(self.high, part[1])

    def range(self) -> Range:
        """The result; raises NumericsError where the data held no value."""
        if self.low > self.high:
            raise NumericsError(
                f"'{self.name}' holds no value on the calibration data; add data on which it is not empty, "
                "or leave what reads it float with --ignore"
            )
        return Range(self.low, self.high, self.method)


class MovingAverage(MinMax):
    """The exponential moving average of the batches' smallest and largest values, ``v <- (1 - m) v + m v_batch``.

    It starts with the first batch, and is the one calibrator for which the order of the batches matters.
    """

    method = "average"

    def __init__(self, momentum: float = 0.01, name: str = "") -> None:
        """Start with nothing seen; `momentum` m is the weight of a new batch."""
        super().__init__(name)
        self.momentum = momentum

    def add(self, part: tuple[float, float]) -> None:
        """Move the range; an empty batch moves nothing."""
        if part[0] > part[1]:
            return
        if self.low > self.high:
            self.low, self.high = part
        self.low += self.momentum * (part[0] - self.low)
        self.high += self.momentum * (part[1] - self.high)


class HistogramOf:
    """The histogram of a tensor whose smallest and largest value are known."""

    def __init__(self, low: float, high: float, name: str = "") -> None:
        """Start with empty bins over ``[-T, T]``, T the larger magnitude of `low` and `high`."""
        self.name = name
        self._histogram = Histogram(np.zeros(BINS, np.int64), low, high)
        self._edges = bin_edges(self._histogram.limit)
        self._zeros = 0

    def part(self, values: np.ndarray) -> tuple[np.ndarray, int]:
        """Counts int64 ``[bins]`` and the number of zeros of a batch of any shape.

        A value beyond T, which a provider that adds in another order each time may produce, counts for the outer bin.
        """
        rows = _as_float32(values, self.name)
        low, high = _extremes(rows, self.name)
        if low < self._edges[0] or high > self._edges[-1]:
            rows = np.minimum(np.maximum(rows, self._edges[0]), self._edges[-1])
        return bin_counts(rows, self._edges), int(rows.size - np.count_nonzero(rows))

    def add(self, part: tuple[np.ndarray, int]) -> None:
        """Add a batch's counts."""
        np.add(self._histogram.counts, part[0], out=self._histogram.counts)
        self._zeros += part[1]

    def histogram(self) -> Histogram:
        """The result."""
        return Histogram(self._histogram.counts, self._histogram.low, self._histogram.high, self._zeros)


def _as_float32(values: np.ndarray, name: str) -> np.ndarray:
    if values.dtype.name not in _FLOATS:
        raise NumericsError(
            f"'{name}' is {values.dtype.name}, and only floating-point values have a range to measure; "
            "leave what reads it float with --ignore"
        )
    with np.errstate(over="ignore"):
        return np.asarray(values, np.float32)


def _extremes(values: np.ndarray, name: str) -> tuple[float, float]:
    """The smallest and the largest of float32 values, or NumericsError if one is not finite."""
    if not values.size:
        return np.inf, -np.inf
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise NumericsError(
            f"'{name}' holds NaN or infinity on the calibration data; "
            "check the data, or leave what reads it float with --ignore"
        )
    return low, high


_Found = TypeVar("_Found", MinMax, HistogramOf)


def calibrate(
    values: Mapping[ir.Value, ActivationSpec],
    model: ir.Model,
    batches: Sequence[Feeds],
    *,
    calibrator: str,
    percentile: float = 99.99,
    provider: str = "CPUExecutionProvider",
    threads: int = 1,
    tick: Callable[[int, int], None] | None = None,
) -> dict[ir.Value, Range]:
    """Choose a range for each value.

    Args:
        values: What to measure, and the format that each will have. An 8-bit float's range is the largest magnitude
            both ways, whatever the calibrator: clipping would gain it no precision.
        model: In topological order; it is not changed.
        batches: Feeds of the whole model; what belongs to padding tokens is left out.
        calibrator: ``minmax`` or ``average`` (one sweep over the data); ``percentile``, ``mse`` or ``entropy`` (two);
            or ``auto``: of minmax, percentile, mse and entropy the one with the least expected squared error.
        percentile: Percent of the values that `percentile` keeps.
        provider: Execution provider.
        threads: Batches in flight; the result does not depend on it.
        tick: Called with (batches done, batches), over both sweeps together.

    Raises:
        CalibrationError: There are no batches.
        NumericsError: A value holds NaN or infinity, is not of floating point, or is always empty.
        SchemeError: An unknown calibrator, or a percentile that is none.
    """
    if calibrator not in _CALIBRATORS:
        raise SchemeError(f"calibrator {calibrator} is unknown; choose one of {', '.join(_CALIBRATORS)}")
    if not 0 <= percentile <= 100:
        raise SchemeError(f"percentile {percentile} is not one; choose 0 to 100, for example 99.99")
    if values and not len(batches):
        raise CalibrationError("there are no batches to measure the ranges of activations on; give calibration data")
    # 8-bit floats, and calibrators that need no histogram, are done after the first sweep.
    twice = [] if calibrator in ("minmax", "average") else [v for v, spec in values.items() if not spec.fp8]
    total, finished = len(batches) * (2 if twice else 1), 0

    def sweep(collectors: dict[ir.Value, _Found]) -> dict[ir.Value, _Found]:
        nonlocal finished
        before = finished
        watch = {value: [collector] for value, collector in collectors.items()}
        report = (lambda done, _: tick(before + done, total)) if tick is not None else None
        observe(model, watch, batches, provider=provider, threads=threads, tick=report)
        finished += len(batches)
        return collectors

    def first(value: ir.Value, spec: ActivationSpec) -> MinMax:
        name = value.name or ""
        return MovingAverage(name=name) if calibrator == "average" and not spec.fp8 else MinMax(name)

    ends = sweep({value: first(value, spec) for value, spec in values.items()})
    found = {value: _both_ways(end.range()) if values[value].fp8 else end.range() for value, end in ends.items()}
    bins = sweep({v: HistogramOf(found[v].low, found[v].high, v.name or "") for v in twice})
    found.update((v, _pick(bins[v].histogram(), values[v], calibrator, percentile)) for v in twice)
    for value, chosen in found.items():
        logger.debug("range of %s: %.6g to %.6g (%s)", value.name, chosen.low, chosen.high, chosen.method)
    return found


def _both_ways(found: Range) -> Range:
    limit = max(abs(found.low), abs(found.high))
    return Range(-limit, limit, found.method)


def _pick(histogram: Histogram, spec: ActivationSpec, calibrator: str, percentile: float) -> Range:
    """The range that a calibrator chooses, or `auto` the best of all."""
    names = list(_PICKERS) if calibrator == "auto" else [calibrator]
    ranges = [Range(*_PICKERS[name](histogram, spec, percentile), name) for name in names]
    return min(ranges, key=lambda each: expected_error(histogram, each.low, each.high, spec))
