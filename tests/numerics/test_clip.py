"""The search for clipped grids against an exhaustive one, in float64, over the candidates that its docstring lists."""

import numpy as np
import pytest

from qcompiler.numerics import affine
from qcompiler.numerics.affine import Grid, WeightSpec, clip_grid, dequantize, min_max_grid, quantize, storage_dtype
from qcompiler.numerics.formats import FORMATS
from tests.builders import normal

BITS = pytest.mark.parametrize("bits", FORMATS)
FORM = pytest.mark.parametrize(("symmetric", "signed"), [(False, True), (True, True), (True, False)])
COARSE = [1 - 0.05 * step for step in range(1, 17)]  # 0.95 ... 0.2
FINE = [0.01 * step for step in (-4, -3, -2, -1, 1, 2, 3, 4)]


def losses(weight, grid, spec, importance):
    """Weighted squared error of each group, float64 [N, G]."""
    values = dequantize(quantize(weight, grid, spec), grid.scale, grid.zero_point, spec.group_size)
    error = np.square(weight.astype(np.float64) - values) * importance
    starts = np.arange(0, weight.shape[1], spec.group_size)
    return np.add.reduceat(error, starts, axis=1)


def shrunk_loss(group, keep, spec, importance):
    """Loss of one group [k] on the min-max grid of its ends, each times `keep`."""
    keep = np.float32(keep)
    ends = np.array([[min(group.min(), 0) * keep, max(group.max(), 0) * keep]], np.float32)
    whole = WeightSpec(spec.bits, len(group), spec.symmetric, spec.signed_scale, spec.scale_dtype)
    grid = min_max_grid(ends, whole)
    return float(losses(group[None], grid, whole, importance)[0, 0])


def best_loss(group, spec, importance):
    """The least loss of one group over 1, the coarse candidates, and the fine ones around the best of these."""
    loss, centre = min((shrunk_loss(group, keep, spec, importance), -keep) for keep in [1.0, *COARSE])
    return min([loss, *(shrunk_loss(group, min(step - centre, 1), spec, importance) for step in FINE)])


@BITS
@FORM
@pytest.mark.parametrize("weighted", [False, True])
def test_the_search_finds_the_best_of_its_candidates(bits, symmetric, signed, weighted):
    spec = WeightSpec(bits, 16, symmetric, signed)
    weight = np.random.default_rng(bits).standard_t(3, (3, 40)).astype(np.float32)  # heavy tails are worth clipping
    importance = np.square(normal(40, seed=1)) if weighted else np.ones(40, np.float32)
    grid = clip_grid(weight, spec, importance if weighted else None)
    found = losses(weight, grid, spec, importance)
    for n in range(3):
        for g, start in enumerate(range(0, 40, 16)):
            part = slice(start, min(start + 16, 40))
            best = best_loss(weight[n, part], spec, importance[part])
            # The search works in float32: its ends are a bit off ours, and a candidate as good as the best may win.
            assert best * (1 - 1e-5) <= found[n, g] <= best * (1 + 1e-5)


@BITS
@FORM
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("seed", range(3))
def test_no_group_is_worse_than_on_its_min_max_grid(bits, symmetric, signed, dtype, seed):
    spec = WeightSpec(bits, 32, symmetric, signed, dtype)
    generator = np.random.default_rng(seed)
    weight = generator.standard_t(4, (20, 100)).astype(np.float32) * np.float32(10.0 ** (3 * seed - 3))
    importance = generator.exponential(size=100).astype(np.float32)
    for weights in (importance, np.ones(100, np.float32)):
        clipped, spanned = clip_grid(weight, spec, weights), min_max_grid(weight, spec)
        better, worse = losses(weight, clipped, spec, weights), losses(weight, spanned, spec, weights)
        assert (better <= worse * (1 + 1e-5)).all()
        if bits < 8:
            assert better.sum() < worse.sum()


def test_clipping_pays_most_where_bits_are_few():
    """Gaussian groups of 128: at 8 bits there is nothing to gain, at 2 bits more than half of the error goes."""
    weight = normal((64, 512), seed=2)
    gain = {}
    for bits in FORMATS:
        spec = WeightSpec(bits, 128, False)
        one = np.ones(512)
        before = losses(weight, min_max_grid(weight, spec), spec, one).sum()
        gain[bits] = losses(weight, clip_grid(weight, spec), spec, one).sum() / before
    assert 0.99 < gain[8] <= 1
    assert 0.7 < gain[4] < 0.95
    assert gain[2] < gain[3] < gain[4]
    assert gain[2] < 0.55


def test_the_scale_of_the_importance_does_not_matter():
    spec = WeightSpec(4, 32, False)
    weight, importance = normal((8, 96), seed=3), np.square(normal(96, seed=4))
    reference = clip_grid(weight, spec, importance)
    for factor in (2.0**-60, 2.0**60):
        grid = clip_grid(weight, spec, importance * np.float32(factor))
        assert np.array_equal(grid.scale, reference.scale)
        assert np.array_equal(grid.zero_point, reference.zero_point)


def test_a_group_that_nobody_heeds_is_weighed_evenly():
    spec = WeightSpec(4, 32, False)
    weight, importance = normal((8, 96), seed=5), np.square(normal(96, seed=6))
    importance[32:64] = 0
    grid, even = clip_grid(weight, spec, importance), clip_grid(weight, spec)
    assert np.array_equal(grid.scale[:, 1], even.scale[:, 1])
    assert not np.array_equal(grid.scale[:, 0], even.scale[:, 0])
    nothing = clip_grid(weight, spec, np.zeros(96, np.float32))
    assert np.array_equal(nothing.scale, even.scale)


def test_a_column_that_nobody_heeds_may_be_clipped_at_will():
    """Outliers without importance at both ends: the grid is that of the others, which lie within +-2.2."""
    spec = WeightSpec(4, 32, False)
    weight = normal((1, 32), seed=7)
    weight[0, [3, 9]] = 8, -8
    importance = np.ones(32, np.float32)
    importance[[3, 9]] = 0
    assert min_max_grid(weight, spec).scale[0, 0] == np.float32(16 / 15)
    assert clip_grid(weight, spec, importance).scale[0, 0] < 5 / 15
    assert clip_grid(weight, spec).scale[0, 0] > 15 / 15


def test_lowest_bounds_the_coarse_search():
    """An unheeded outlier pulls the search to its lower end; the fine steps may pass it by 0.04."""
    spec = WeightSpec(4, 32, True, False)
    weight = normal((1, 32), seed=8)
    weight[0, 0] = 20
    importance = np.ones(32, np.float32)
    importance[0] = 0
    full = float(min_max_grid(weight, spec).scale[0, 0])
    kept = {p: float(clip_grid(weight, spec, importance, lowest=p).scale[0, 0]) / full for p in (0.2, 0.5, 0.9)}
    assert 0.16 <= kept[0.2] < 0.4
    assert 0.4599 < kept[0.5] < 0.5001
    assert 0.8599 < kept[0.9] < 0.9001


def test_ragged_ends_count_their_own_columns_only():
    spec = WeightSpec(4, 32, False)
    weight = normal((4, 40), seed=9)
    alone = clip_grid(np.ascontiguousarray(weight[:, 32:]), spec)
    grid = clip_grid(weight, spec)
    assert np.array_equal(grid.scale[:, 1:], alone.scale)
    assert np.array_equal(grid.zero_point[:, 1:], alone.zero_point)


def test_grids_are_stored_numbers():
    for dtype in ("float16", "bfloat16"):
        spec = WeightSpec(4, 32, False, True, dtype)
        grid = clip_grid(normal((4, 64), seed=10), spec)
        assert isinstance(grid, Grid)
        assert np.array_equal(grid.scale.astype(storage_dtype(dtype)).astype(np.float32), grid.scale)
        assert np.array_equal(grid.zero_point, grid.zero_point.astype(np.uint8))


@pytest.mark.parametrize("each_row", [False, True])
def test_rows_of_a_head_are_searched_together(each_row):
    weight = normal((12, 40), 8) ** 3
    importance = np.abs(normal((12, 40) if each_row else 40, 9))
    found = clip_grid(weight, WeightSpec(4, 20, True, False, head_size=3), importance)
    for row in range(0, 12, 3):
        for at, start in enumerate((0, 20)):
            part = (slice(row, row + 3), slice(start, start + 20))
            heed = np.broadcast_to(importance, weight.shape)[part].reshape(-1)
            alone = clip_grid(weight[part].reshape(1, -1), WeightSpec(4, 60, True, False), heed)
            assert np.unique(found.scale[row : row + 3, at]).size == 1
            assert found.scale[row, at] == pytest.approx(alone.scale[0, 0], rel=1e-6)


@BITS
@pytest.mark.parametrize("symmetric", [False, True])
def test_importance_may_differ_from_row_to_row(bits, symmetric):
    """Each row as it would be alone, however much more is made of the others; one row is heeded by nobody."""
    spec = WeightSpec(bits, 32, symmetric, False)
    weight = np.random.default_rng(bits).standard_t(3, (12, 80)).astype(np.float32)
    importance = np.square(normal((12, 80), seed=11)) * np.logspace(-15, 15, 12, dtype=np.float32)[:, None]
    importance[5] = 0
    grid = clip_grid(weight, spec, importance)
    for n in range(12):
        alone = clip_grid(weight[n : n + 1], spec, importance[n])
        assert np.array_equal(grid.scale[n], alone.scale[0])
        assert np.array_equal(grid.zero_point[n], alone.zero_point[0])
    assert not np.array_equal(grid.scale, clip_grid(weight, spec).scale)


def test_threads_share_rows_of_their_own_importance(monkeypatch):
    monkeypatch.setattr(affine, "_BLOCK", 200)
    spec = WeightSpec(4, 32, False)
    weight, importance = normal((12, 80), seed=12), np.square(normal((12, 80), seed=13))
    reference = clip_grid(weight, spec, importance)
    assert np.array_equal(clip_grid(weight, spec, importance, threads=3).scale, reference.scale)
    monkeypatch.undo()
    assert np.array_equal(clip_grid(weight, spec, importance).scale, reference.scale)
