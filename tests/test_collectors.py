"""Collectors see batches in parts and give what all of them together would."""

import numpy as np
import pytest

from qcompiler.collectors import ChannelRange, RowSample
from tests.builders import normal


def shown(collector, batches):
    for batch in batches:
        collector.add(collector.part(batch))
    return collector


@pytest.mark.parametrize("axis", [-1, 1])
def test_the_range_of_each_channel(axis):
    batches = [normal((3, 4, 4), seed) for seed in range(5)] + [np.empty((0, 4, 4), np.float32)]
    found = shown(ChannelRange(axis), batches)
    whole = np.moveaxis(np.concatenate(batches), axis, -1).reshape(-1, 4)
    assert np.array_equal(found.low, whole.min(0))
    assert np.array_equal(found.high, whole.max(0))
    assert np.array_equal(found.absmax, np.abs(whole).max(0))


@pytest.mark.parametrize(("sizes", "expected"), [
    ([3, 4], list(range(7))),
    ([40, 24], [0, 8, 16, 24, 32, 40, 48, 56]),
    ([8] * 100, [0, 128, 256, 320, 448, 512, 640, 704]),
    ([1] * 33, [0, 4, 8, 12, 16, 20, 24, 28]),
])  # fmt: skip
def test_rows_are_evenly_spaced_over_all_batches(sizes, expected):
    numbers = np.split(np.arange(sum(sizes), dtype=np.float32), np.cumsum(sizes)[:-1])
    found = shown(RowSample(8), [part.reshape(-1, 1, 1) * np.ones((1, 1, 3), np.float32) for part in numbers])
    assert found.values.shape == (len(expected), 3)
    rows = found.values[:, 0].tolist()
    assert len(set(rows)) == len(rows) == len(expected)
    steps = np.diff(rows)
    assert steps.max() <= 2 * steps.min()
    assert rows[0] == 0
    assert sum(sizes) - rows[-1] <= 2 * steps.max()


def test_what_is_held_is_bounded():
    sample = RowSample(8)
    for seed in range(50):
        sample.add(sample.part(normal((5, 7, 4), seed)))
        assert len(sample._kept) <= 16
    assert sample.values.dtype == np.float32
