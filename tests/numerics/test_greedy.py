"""The greedy sweep against the paper's recursion on the explicit inverse, and against GPTQ in a given order."""

import numpy as np
import pytest

from qcompiler.errors import NumericsError
from qcompiler.numerics.affine import WeightSpec, clip_grid, dequantize, min_max_grid, quantize
from qcompiler.numerics.greedy import greedy_sweep
from qcompiler.numerics.second_order import damped, sweep, upper_factor
from tests.builders import correlated, normal

K, N = 40, 7
SPECS = pytest.mark.parametrize(
    "spec",
    [WeightSpec(4, 16, False), WeightSpec(2, 16, True), WeightSpec(8, 64, False), WeightSpec(4, 7, True, False)],
    ids=str,
)
SEEDS = pytest.mark.parametrize("seed", range(3))
GRIDS = pytest.mark.parametrize("make_grid", [min_max_grid, clip_grid])


def hessian(seed, loud=5.0):
    return damped(correlated(K, seed, loud), 0.05)


def real_losses(weight, codes, H, grid, spec):
    error = (weight - dequantize(codes, grid.scale, grid.zero_point, spec.group_size)).astype(np.float64)
    return np.einsum("nk,kj,nj->n", error, H, error)


def nearest(value, scale, zero, spec):
    low = 1 if spec.symmetric and not spec.signed_scale else 0
    return min(max(np.rint(value / scale) + zero, low), spec.format.qmax)


def by_inverting_what_is_left(weights, H, scale, zero, spec):
    """One row: before each step the Hessian of the values that are still free is inverted from scratch."""
    values, codes, order, loss = weights.astype(np.float64), np.zeros(len(weights), np.uint8), [], 0.0
    while len(order) < len(values):
        free = [k for k in range(len(values)) if k not in order]
        inverse = np.linalg.inv(H[np.ix_(free, free)])
        rounded = [nearest(values[k], scale[k], zero[k], spec) for k in free]
        errors = [values[k] - (code - zero[k]) * scale[k] for k, code in zip(free, rounded, strict=True)]
        away = [abs(error / scale[k]) for k, error in zip(free, errors, strict=True)]
        if max(away) > 0.5 + 1e-6:
            at = int(np.argmax(away))
        else:
            at = int(np.argmin([error**2 / inverse[i, i] for i, error in enumerate(errors)]))
        codes[free[at]] = rounded[at]
        loss += errors[at] ** 2 / inverse[at, at]
        for i, k in enumerate(free):
            values[k] -= errors[at] / inverse[at, at] * inverse[i, at]
        order.append(free[at])
    return codes, loss, order


@SPECS
@SEEDS
@GRIDS
def test_it_is_the_recursion_of_the_paper(spec, seed, make_grid):
    weight, H = normal((N, K), seed + 300), hessian(seed)
    grid = make_grid(weight, spec)
    codes, loss, orders = greedy_sweep(weight, H, grid, spec)
    group = np.arange(K) // spec.group_size
    for n in range(N):
        scale, zero = grid.scale[n, group].astype(np.float64), grid.zero_point[n, group].astype(np.float64)
        want, want_loss, order = by_inverting_what_is_left(weight[n], H, scale, zero, spec)
        assert orders[n].tolist() == order
        assert np.array_equal(codes[n], want)
        assert loss[n] == pytest.approx(want_loss, rel=1e-8)


@SPECS
@SEEDS
def test_the_loss_is_that_of_the_codes_and_less_than_that_of_rounding(spec, seed):
    weight, H = normal((N, K), seed + 300), hessian(seed)
    grid = clip_grid(weight, spec, np.diagonal(H).astype(np.float32))
    codes, loss, _ = greedy_sweep(weight, H, grid, spec)
    assert np.allclose(loss, real_losses(weight, codes, H, grid, spec), rtol=1e-3)
    assert loss.sum() <= real_losses(weight, quantize(weight, grid, spec), H, grid, spec).sum()


@SPECS
@SEEDS
def test_in_a_given_order_it_is_gptq(spec, seed):
    """From left to right, and loud channels first."""
    weight, H = normal((N, K), seed + 300), hessian(seed)
    grid = min_max_grid(weight, spec)
    for order in (np.arange(K), np.argsort(-np.diagonal(H), kind="stable")):
        codes, loss, orders = greedy_sweep(weight, H, grid, spec, order)
        want, want_loss = sweep(weight, upper_factor(H[np.ix_(order, order)]), grid, spec, order)
        assert np.array_equal(codes, want)
        assert np.allclose(loss, want_loss, rtol=1e-3)
        assert (orders == order).all()


@SEEDS
def test_gptq_in_the_order_of_a_row_gives_its_codes(seed):
    spec = WeightSpec(4, 16, False)
    weight, H = normal((N, K), seed + 300), hessian(seed)
    grid = min_max_grid(weight, spec)
    codes, _, orders = greedy_sweep(weight, H, grid, spec)
    for n, order in enumerate(orders):
        want, _ = sweep(weight, upper_factor(H[np.ix_(order, order)]), grid, spec, order)
        assert np.array_equal(codes[n], want[n])


def test_loud_channels_first_is_better_than_the_cheapest_first():
    """What is left for the end has nothing to make up for it: the greedy order leaves the loud channels there."""
    spec = WeightSpec(4, 16, False)
    ratio = {}
    for loud in (1.0, 20.0):
        total = np.zeros(2)
        for seed in range(4):
            weight, H = normal((N, K), seed + 300), hessian(seed, loud)
            grid = min_max_grid(weight, spec)
            order = np.argsort(-np.diagonal(H), kind="stable")
            total += [greedy_sweep(weight, H, grid, spec, each)[1].sum() for each in (None, order)]
        ratio[loud] = total[0] / total[1]
    assert 1 < ratio[1.0] < 2 < 4 < ratio[20.0]


def test_with_a_diagonal_hessian_it_is_rounding_to_nearest():
    spec = WeightSpec(4, 16, False)
    weight, H = normal((N, K), 1), np.diag(np.arange(1.0, K + 1))
    grid = min_max_grid(weight, spec)
    codes, loss, _ = greedy_sweep(weight, H, grid, spec)
    assert np.array_equal(codes, quantize(weight, grid, spec))
    assert np.allclose(loss, real_losses(weight, codes, H, grid, spec), rtol=1e-3)


def test_values_outside_the_grid_go_first_and_the_furthest_of_them_at_once():
    spec = WeightSpec(4, K, False)
    weight = normal((1, K), 2)
    grid = min_max_grid(weight, spec)
    weight[0, 5], weight[0, 20] = 9, -12
    _, _, orders = greedy_sweep(weight, np.eye(K), grid, spec)
    assert orders[0, :2].tolist() == [20, 5]


def test_what_is_on_the_grid_stays_there_and_zero_groups_too():
    spec = WeightSpec(4, 16, False)
    H = hessian(1)
    grid = min_max_grid(normal((N, K), 3), spec)
    codes = np.random.default_rng(4).integers(0, 16, (N, K)).astype(np.uint8)
    exact = dequantize(codes, grid.scale, grid.zero_point, 16)
    again, loss, _ = greedy_sweep(exact, H, grid, spec)
    assert np.array_equal(again, codes)
    assert loss.sum() < 1e-6 * np.einsum("nk,kj,nj->", exact, H, exact)
    zeros = np.zeros((2, K), np.float32)
    codes, loss, _ = greedy_sweep(zeros, H, min_max_grid(zeros, spec), spec)
    assert not codes.any()
    assert not loss.any()


def test_threads_and_blocks_of_rows_do_not_count(monkeypatch):
    spec = WeightSpec(4, 16, False)
    weight, H = normal((N, K), 5), hessian(2)
    grid = min_max_grid(weight, spec)
    reference = greedy_sweep(weight, H, grid, spec)
    monkeypatch.setattr("qcompiler.numerics.greedy._FACTOR", 2 * K * K)
    for threads in (1, 3):
        for got, want in zip(greedy_sweep(weight, H, grid, spec, threads=threads), reference, strict=True):
            assert np.allclose(got, want, rtol=1e-12)


def test_a_hessian_that_has_no_inverse_is_an_error():
    weight = normal((N, K), 6)
    spec = WeightSpec(4, 16, False)
    H = np.eye(K)
    H[3, 4] = H[4, 3] = 1.5
    with pytest.raises(NumericsError, match="not positive definite; give more damping"):
        greedy_sweep(weight, H, min_max_grid(weight, spec), spec)
