"""Codes that name entries of tables, against plain loops and exact optima."""

import itertools

import numpy as np
import pytest

from qcompiler.errors import NumericsError
from qcompiler.numerics.affine import Grid, WeightSpec, clip_grid
from qcompiler.numerics.codebooks import (
    decode,
    fit_tables,
    group_scales,
    known_table,
    refit_sign_scales,
    refit_tables,
    sweep_codebooks,
    table_of_rows,
    table_rows,
)
from qcompiler.numerics.k_means import k_means, nearest
from qcompiler.numerics.second_order import damped, row_losses, sweep, upper_factor
from qcompiler.scheme import Scheme
from tests.builders import correlated, normal

SCHEMES = (
    "w1a16-g32",
    "w3a16-g32-lut",
    "w4a16-g64-lut",
    "w2a16-g32-vq2",
    "w1a16-g32-vq4",
    "w2a16-g32-vq4",
    "w4a16-channel-lut",
    "w4a16-g32-nf4",
)


def spec_of(text, columns, dtype="float32"):
    return Scheme.parse(text).resolve("cpu").spec(columns, dtype, stream=True)


def hessian(columns, seed=0):
    """Damped, and correlated enough for feedback to matter."""
    rows = correlated(columns, seed)
    return damped((rows.T @ rows).astype(np.float64) / len(rows), 0.05)


def order_of(matrix, d):
    """Loud columns first, d at a time."""
    loud = np.argsort(-np.diagonal(matrix).reshape(-1, d).sum(-1), kind="stable")
    return (loud[:, None] * d + np.arange(d)).reshape(-1)


def swept(weight, matrix, spec, **options):
    tables, scale = fit_tables(weight, np.diagonal(matrix).astype(np.float32), spec, 0)
    order = order_of(matrix, spec.vector)
    factor = upper_factor(matrix[np.ix_(order, order)])
    codes, loss = sweep_codebooks(weight, factor, tables, scale, spec, order, **options)
    return codes, loss, tables, scale


def best_split(values, weights, entries):
    """The least cost of weighted k-means in one dimension, by dynamic programming over the sorted values."""
    order = np.argsort(values)
    x, w = values[order].astype(np.float64), weights[order].astype(np.float64)
    n = len(x)
    cost = np.full((n + 1, n + 1), np.inf)
    for i in range(n):
        for j in range(i + 1, n + 1):
            mean = np.average(x[i:j], weights=w[i:j])
            cost[i, j] = (w[i:j] * np.square(x[i:j] - mean)).sum()
    least = np.full((entries + 1, n + 1), np.inf)
    least[0, 0] = 0
    for k in range(1, entries + 1):
        least[k] = [min(least[k - 1, i] + cost[i, j] for i in range(j + 1)) for j in range(n + 1)]
    return least[1 : entries + 1, n].min()


@pytest.mark.parametrize("seed", range(6))
def test_k_means_comes_near_the_optimum(seed):
    values, weights = normal((60, 1), seed), np.random.default_rng(seed).lognormal(0, 1, 60).astype(np.float32)
    centres = k_means(values, weights, 8, 0)
    assert centres.shape == (8, 1)
    assert (np.diff(centres[:, 0]) >= 0).all()
    _, apart = nearest(values, centres[None], np.zeros(60, int))
    assert (weights * apart).sum() <= 1.02 * best_split(values[:, 0], weights, 8)


def test_k_means_finds_clusters_of_vectors():
    centres = np.array([[0, 0], [5, 0], [0, 5], [5, 5]], np.float32)
    points = (centres[:, None] + normal((4, 50, 2), 1, scale=0.1)).reshape(-1, 2)
    found = k_means(points, np.ones(200, np.float32), 4, 0)
    near = np.square(found[:, None] - centres).sum(-1).min(1)
    assert near.max() < 0.05
    assert sorted(np.square(found[:, None] - centres).sum(-1).argmin(1)) == [0, 1, 2, 3]


def test_fewer_values_than_centres_are_met_exactly():
    points = np.repeat(np.array([[-1.0], [0.5], [2.0]], np.float32), 5, axis=0)
    centres = k_means(points, np.ones(15, np.float32), 8, 0)
    _, apart = nearest(points, centres[None], np.zeros(15, int))
    assert apart.max() == 0


@pytest.mark.parametrize("d", [1, 2, 4])
def test_nearest_is_the_nearest_of_the_own_table(d):
    points, tables = normal((50, d), 3), normal((5, 16, d), 4)
    table = np.arange(50) % 5
    codes, apart = nearest(points, tables, table)
    for point, own, code, distance in zip(points, table, codes, apart, strict=True):
        every = np.square(tables[own] - point).sum(-1)
        assert code == every.argmin()
        np.testing.assert_allclose(distance, every.min(), rtol=1e-5)
    alone, _ = nearest(points, tables[:1], np.zeros(50, int))
    np.testing.assert_array_equal(alone, np.square(points[:, None] - tables[0]).sum(-1).argmin(1))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(24, 96), (100, 200)])
def test_the_loss_is_that_of_what_codes_decode_to(scheme, shape):
    weight, matrix, spec = normal(shape, 5), hessian(shape[1]), spec_of(scheme, shape[1])
    codes, loss, tables, scale = swept(weight, matrix, spec)
    assert codes.shape == (shape[0], shape[1] // spec.vector)
    assert codes.max() < spec.entries
    error = weight - decode(codes, tables, scale, spec)
    np.testing.assert_allclose(loss, row_losses(error, matrix.astype(np.float32)), rtol=2e-3)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_blocks_of_columns_change_nothing(scheme):
    weight, matrix, spec = normal((16, 128), 6), hessian(128), spec_of(scheme, 128)
    _, loss, _, _ = swept(weight, matrix, spec)
    _, other, _, _ = swept(weight, matrix, spec, lazy_block=16)
    np.testing.assert_allclose(loss.sum(), other.sum(), rtol=1e-2)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_feedback_beats_the_nearest_entry(scheme):
    weight, matrix, spec = normal((48, 128), 7), hessian(128), spec_of(scheme, 128)
    _, loss, tables, scale = swept(weight, matrix, spec)
    wide = scale.repeat(spec.group_size, axis=1)[:, :128]
    table = table_of_rows(spec, 48, 128).repeat(128 // spec.vector)
    codes, _ = nearest((weight / wide).reshape(-1, spec.vector), tables, table)
    error = weight - decode(codes.reshape(48, -1), tables, scale, spec)
    assert loss.sum() < row_losses(error, matrix.astype(np.float32)).sum()


def test_a_table_of_whole_numbers_is_the_sweep_on_a_grid():
    """Entries on a uniform grid and one column a code: GPTQ."""
    weight, matrix = normal((16, 64), 8), hessian(64)
    uniform = WeightSpec(3, 64, True)
    grid = clip_grid(weight, uniform)
    spec = spec_of("w3a16-g64-lut", 64)
    order = order_of(matrix, 1)
    factor = upper_factor(matrix[np.ix_(order, order)])
    expected, loss = sweep(weight, factor, grid, uniform, order)
    tables = np.tile(np.arange(-4, 4, dtype=np.float32)[None, :, None], (-(-16 // table_rows(spec, 16, 64)), 1, 1))
    codes, found = sweep_codebooks(weight, factor, tables, grid.scale, spec, order)
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_allclose(found, loss, rtol=1e-4)


def test_tables_are_solved_for():
    """No single entry can be moved so that the loss falls."""
    weight, matrix, spec = normal((8, 64), 9), hessian(64), spec_of("w3a16-g64-lut", 64)
    codes, _, tables, scale = swept(weight, matrix, spec)
    small = matrix.astype(np.float32)

    def cost(tables):
        return row_losses(weight - decode(codes, tables, scale, spec), small).sum()

    solved = refit_tables(weight, codes, tables, scale, small, spec)
    best = cost(solved)
    assert best < cost(tables)
    for entry, step in itertools.product(range(8), (-0.01, 0.01)):
        moved = solved.copy()
        moved[0, entry] += step
        assert cost(moved) >= best * (1 - 1e-5)


def test_a_learned_table_beats_a_grid_of_as_many_values():
    """On normal weights; a zero point for each group is what the grid has besides."""
    weight, matrix = normal((96, 256), 10), hessian(256)
    _, learned, _, _ = swept(weight, matrix, spec_of("w3a16-g64-lut", 256))
    uniform, order = WeightSpec(3, 64, False), order_of(matrix, 1)
    grid = clip_grid(weight, uniform, np.diagonal(matrix).astype(np.float32))
    _, loss = sweep(weight, upper_factor(matrix[np.ix_(order, order)]), grid, uniform, order)
    assert learned.sum() < loss.sum()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(8, 64), (300, 576), (576, 1536), (13, 128)])
def test_rows_share_tables_in_blocks_and_cost_little(scheme, shape):
    spec = spec_of(scheme, shape[1])
    each, table = table_rows(spec, *shape), table_of_rows(spec, *shape)
    assert each == shape[0] or each % 8 == 0
    assert (np.bincount(table)[:-1] == each).all()
    if each < shape[0]:
        assert 32 * spec.entries * spec.vector <= 0.05 * each * shape[1]


def test_scales_are_the_values_of_largest_magnitude():
    weight = np.array([[0.5, -2.0, 1.0, 0.25], [0, 0, 3, -1]], np.float32).repeat(8, axis=1)
    scale = group_scales(weight, spec_of("w4a16-g16-lut", 32))
    np.testing.assert_array_equal(scale[0], [-2.0, 1.0])
    assert scale[1, 0] > 0  # a group of zeros
    assert np.isfinite(1 / scale).all()


def test_columns_of_a_code_stay_together():
    weight, spec = normal((8, 32), 1), spec_of("w2a16-g32-vq2", 32)
    tables, scale = fit_tables(weight, None, spec, 0)
    with pytest.raises(NumericsError, match="2 at a time"):
        sweep_codebooks(weight, np.eye(32), tables, scale, spec, np.roll(np.arange(32), 1))


def test_a_grid_is_told_from_tables_by_the_spec():
    assert spec_of("w4a16-g64-lut", 64).entries == 16
    assert spec_of("w2a16-g64-vq4", 64).entries == 256
    assert WeightSpec(4, 64, True).vector == 0
    assert Grid(np.zeros(1), np.zeros(1)).scale.shape == (1,)


def test_signs_have_the_mean_magnitude_for_a_scale():
    weight, spec = normal((6, 64), 2), spec_of("w1a16-g32", 64)
    tables, scale = fit_tables(weight, None, spec, 0)
    np.testing.assert_array_equal(tables[:, :, 0], [[-1, 1]])
    np.testing.assert_allclose(scale, np.abs(weight).reshape(6, 2, 32).mean(-1), rtol=1e-6)
    codes, _ = sweep_codebooks(weight, np.eye(64), tables, scale, spec, np.arange(64))
    np.testing.assert_array_equal(decode(codes, tables, scale, spec), np.sign(weight) * scale.repeat(32, 1))


def test_scales_of_signs_are_solved_for():
    weight, matrix, spec = normal((8, 96), 3), hessian(96), spec_of("w1a16-g32", 96)
    codes, _, tables, scale = swept(weight, matrix, spec)
    small = matrix.astype(np.float32)
    solved = refit_sign_scales(weight, codes, scale, small, spec)

    def cost(scales):
        return row_losses(weight - decode(codes, tables, scales, spec), small)

    best = cost(solved)
    assert (best <= cost(scale) * (1 + 1e-5)).all()
    for group, share in itertools.product(range(3), (0.98, 1.02)):
        moved = solved.copy()
        moved[:, group] *= share
        assert (cost(moved) >= best * (1 - 1e-5)).all()


def test_nf4_is_the_published_table():
    """The sixteen numbers of Dettmers et al. 2023, appendix E."""
    published = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]  # fmt: skip
    np.testing.assert_allclose(known_table(spec_of("w4a16-nf4", 64))[0, :, 0], published, atol=3e-7)


def test_nf4_keeps_its_table_and_fits_normal_weights_better_than_a_grid():
    """With one scale for each group its largest magnitude, as it is published; scales that leave less are found."""
    weight, spec = normal((64, 256), 5), spec_of("w4a16-g64-nf4", 256)
    tables, scale = fit_tables(weight, None, spec, 0)
    assert np.array_equal(tables, known_table(spec))
    assert (scale > 0).all()
    nearest_codes = np.abs(weight[..., None] / scale.repeat(64, axis=1)[..., None] - tables[0, :, 0]).argmin(-1)
    found = np.square(decode(nearest_codes.astype(np.uint8), tables, scale, spec) - weight).mean()
    largest = np.abs(weight.reshape(64, -1, 64)).max(-1)
    plain = np.abs(weight[..., None] / largest.repeat(64, axis=1)[..., None] - tables[0, :, 0]).argmin(-1)
    published = np.square(decode(plain.astype(np.uint8), tables, largest, spec) - weight).mean()
    step = largest / 7.5
    grid = np.square(
        np.clip(np.rint(weight / step.repeat(64, axis=1)), -8, 7) * step.repeat(64, axis=1) - weight
    ).mean()
    assert found < published < grid
    codes = np.zeros(weight.shape, np.uint8)
    assert refit_tables(weight, codes, tables, scale, np.eye(256, dtype=np.float32), spec) is tables
