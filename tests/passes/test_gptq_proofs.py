"""The column sweep against independent forms of the same algorithm, in float64.

The forms are the explicit recursion on the inverse Hessian, as in the optimal brain surgeon, and LDLQ's feedback with a
factor that is eliminated entry by entry. A proof is worth something only if it fails where the code is wrong, so the
mistake that is easiest to make, taking the other triangle of the factor, has to fail each of them.
"""

from itertools import pairwise

import numpy as np
import pytest

from qcompiler.numerics.affine import Grid, WeightSpec, clip_grid, dequantize, min_max_grid, quantize
from qcompiler.numerics.second_order import damped, descend, refit_scales, sweep, upper_factor
from tests.builders import correlated, normal

K, N = 48, 10
SPECS = [WeightSpec(4, 16, False), WeightSpec(2, 16, True), WeightSpec(8, 64, False), WeightSpec(4, 7, True, False)]
SPEC = pytest.mark.parametrize("spec", SPECS, ids=str)
SEEDS = range(4)


def hessian(seed, columns=K):
    return damped(correlated(columns, seed), 0.01)


def problem(spec, seed):
    weight = normal((N, K), seed + 300, "float64")
    return weight, hessian(seed), min_max_grid(weight.astype(np.float32), spec)


def spread(grid, spec):
    """Scale and zero point of every column, float64 [N, K]."""
    group = np.arange(K) // spec.group_size
    return grid.scale[:, group].astype(np.float64), grid.zero_point[:, group].astype(np.float64)


def nearest(value, scale, zero, spec):
    """Codes of one column, float64."""
    lowest = 1 if spec.symmetric and not spec.signed_scale else 0
    return np.minimum(np.maximum(np.rint(value / scale) + zero, lowest), spec.format.qmax)


def by_inverse_hessian(weight, H, grid, spec, order):
    """Fix one weight of each row after the other; the free ones move as the inverse of the remaining Hessian says."""
    scale, zero = spread(grid, spec)
    values, codes, inverse = weight.copy(), np.zeros(weight.shape, int), np.linalg.inv(H)
    loss = 0.0
    for k in order:
        codes[:, k] = nearest(values[:, k], scale[:, k], zero[:, k], spec)
        error = values[:, k] - (codes[:, k] - zero[:, k]) * scale[:, k]
        loss += float(error @ error) / inverse[k, k]
        values -= np.outer(error / inverse[k, k], inverse[k])
        inverse = inverse - np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return codes, loss


def unit_upper(H):
    """M with ones on the diagonal, upper triangular, and D with ``H = M diag(D) M^T``, by elimination from the end."""
    size = len(H)
    M, D = np.eye(size), np.zeros(size)
    for k in reversed(range(size)):
        D[k] = H[k, k] - sum(M[k, j] ** 2 * D[j] for j in range(k + 1, size))
        for i in range(k):
            M[i, k] = (H[i, k] - sum(M[i, j] * M[k, j] * D[j] for j in range(k + 1, size))) / D[k]
    return M, D


def by_feedback(weight, H, grid, spec):
    """LDLQ: each column is rounded with the weighted errors of the columns before it added."""
    scale, zero = spread(grid, spec)
    M, _ = unit_upper(H)
    codes, error = np.zeros(weight.shape, int), np.zeros(weight.shape)
    for k in range(K):
        value = weight[:, k] + sum((error[:, j] * M[j, k] for j in range(k)), np.zeros(len(weight)))
        codes[:, k] = nearest(value, scale[:, k], zero[:, k], spec)
        error[:, k] = weight[:, k] - (codes[:, k] - zero[:, k]) * scale[:, k]
    return codes


def real_loss(weight, codes, H, grid, spec):
    error = weight - dequantize(codes.astype(np.uint8), grid.scale, grid.zero_point, spec.group_size)
    return float(np.einsum("nk,kj,nj->", error, H, error))


def swept(weight, H, grid, spec, order=None, factorize=upper_factor, lazy_block=128):
    order = np.arange(K) if order is None else order
    return sweep(weight, factorize(H[np.ix_(order, order)]), grid, spec, order, lazy_block)


# The proofs: each compares the sweep with something else and says whether they agree.


def equals_the_inverse_recursion(spec, seed, factorize):
    weight, H, grid = problem(spec, seed)
    order = np.argsort(-np.diagonal(H), kind="stable")
    codes, loss = swept(weight, H, grid, spec, order, factorize)
    want, want_loss = by_inverse_hessian(weight, H, grid, spec, order)
    return np.array_equal(codes, want) and np.isclose(loss.sum(), want_loss, rtol=1e-5)


def equals_the_feedback_form(spec, seed, factorize):
    weight, H, grid = problem(spec, seed)
    codes, _ = swept(weight, H, grid, spec, factorize=factorize)
    return np.array_equal(codes, by_feedback(weight, H, grid, spec))


def reports_its_real_loss(spec, seed, factorize):
    weight, H, grid = problem(spec, seed)
    codes, loss = swept(weight, H, grid, spec, factorize=factorize)
    return np.isclose(loss.sum(), real_loss(weight, codes, H, grid, spec), rtol=1e-4)


def heeds_the_hessian(spec, seed, factorize):
    """With the identity in place of H the codes are others, and worse where it counts."""
    weight, H, grid = problem(spec, seed)
    codes, _ = swept(weight, H, grid, spec, factorize=factorize)
    blind, _ = swept(weight, np.eye(K), grid, spec, factorize=factorize)
    better, worse = real_loss(weight, codes, H, grid, spec), real_loss(weight, blind, H, grid, spec)
    return not np.array_equal(codes, blind) and better < 0.9 * worse


PROOFS = [equals_the_inverse_recursion, equals_the_feedback_form, reports_its_real_loss, heeds_the_hessian]


@SPEC
@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.__name__)
def test_proof_holds(proof, spec):
    assert [proof(spec, seed, upper_factor) for seed in SEEDS] == [True] * len(SEEDS)


@SPEC
@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.__name__)
def test_proof_notices_the_wrong_triangle(proof, spec):
    """A lower factor in the upper one's place makes all feedback zero, which is rounding to nearest unnoticed."""
    weight, H, grid = problem(spec, 0)
    codes, _ = swept(weight, H, grid, spec, factorize=np.linalg.cholesky)
    assert np.array_equal(codes, quantize(weight.astype(np.float32), grid, spec))
    assert [proof(spec, seed, np.linalg.cholesky) for seed in SEEDS] == [False] * len(SEEDS)


def test_the_factor_is_upper_triangular_and_gives_the_hessian_back():
    H = hessian(1)
    A = upper_factor(H)
    assert np.array_equal(A, np.triu(A))
    assert np.allclose(A @ A.T, H, rtol=1e-12, atol=1e-12 * H.max())
    M, D = unit_upper(H)
    assert np.allclose(M * np.sqrt(D), A, rtol=1e-9, atol=1e-9 * A.max())
    with pytest.raises(np.linalg.LinAlgError):
        upper_factor(H - 2 * np.eye(K) * np.diagonal(H).max())


@SPEC
def test_the_lazy_block_changes_nothing(spec):
    weight, H, grid = problem(spec, 5)
    codes, loss = swept(weight, H, grid, spec, lazy_block=1)
    for block in (5, 16, 48, 128):
        again, same = swept(weight, H, grid, spec, lazy_block=block)
        assert np.array_equal(again, codes)
        assert np.allclose(same, loss, rtol=1e-9)


@SPEC
@pytest.mark.parametrize("diagonal", [np.ones(K), np.full(K, 1e-9), np.linspace(1e-3, 1e6, K)])
def test_without_correlations_it_is_rounding_to_nearest(spec, diagonal):
    weight = normal((N, K), 6)
    grid = min_max_grid(weight, spec)
    codes, loss = swept(weight, np.diag(diagonal), grid, spec)
    assert np.array_equal(codes, quantize(weight, grid, spec))
    error = weight - dequantize(codes, grid.scale, grid.zero_point, spec.group_size)
    assert np.allclose(loss, np.square(error.astype(np.float64)) @ diagonal, rtol=1e-5)


@SPEC
def test_the_unit_of_the_hessian_does_not_matter(spec):
    weight, H, grid = problem(spec, 7)
    codes, loss = swept(weight, H, grid, spec)
    for unit in (1e6, 1e-6):
        again, scaled = swept(weight, unit * H, grid, spec)
        assert np.array_equal(again, codes)
        assert np.allclose(scaled, unit * loss, rtol=1e-6)


@SPEC
def test_another_order_is_the_natural_one_of_the_permuted_problem(spec):
    """With groups that stay where they are: each permuted column takes its own scale along."""
    weight, H, grid = problem(spec, 8)
    order = np.random.default_rng(8).permutation(K)
    codes, loss = swept(weight, H, grid, spec, order)
    scale, zero = spread(grid, spec)
    own = WeightSpec(spec.bits, 1, spec.symmetric, spec.signed_scale)
    permuted = Grid(scale[:, order].astype(np.float32), zero[:, order].astype(np.float32))
    again, same = swept(weight[:, order], H[np.ix_(order, order)], permuted, own)
    assert np.array_equal(codes[:, order], again)
    assert np.allclose(loss, same, rtol=1e-6)


@SPEC
def test_rows_do_not_see_each_other(spec):
    weight, H, grid = problem(spec, 9)
    codes, loss = swept(weight, H, grid, spec)
    for n in range(N):
        part = slice(n, n + 1)
        alone, own = swept(weight[part], H, Grid(grid.scale[part], grid.zero_point[part]), spec)
        assert np.array_equal(alone, codes[part])
        assert np.allclose(own, loss[part], rtol=1e-6)


@SPEC
def test_weights_on_the_grid_stay_where_they_are(spec):
    _, H, grid = problem(spec, 10)
    lowest = 1 if spec.symmetric and not spec.signed_scale else 0
    codes = np.random.default_rng(10).integers(lowest, spec.format.qmax + 1, (N, K)).astype(np.uint8)
    weight = dequantize(codes, grid.scale, grid.zero_point, spec.group_size)
    again, loss = swept(weight, H, grid, spec)
    assert np.array_equal(again, codes)
    assert (loss == 0).all()


@pytest.mark.parametrize("order", [np.arange(K), np.arange(K)[::-1]], ids=["forwards", "backwards"])
def test_the_loss_stays_below_the_bound_of_rounding_without_clipping(order):
    """Each column adds A_kk^2 times the square of a rounding error, which is half a step at most: Babai's bound.

    Feedback can push a value past the ends of its grid, where the error has no bound; so the grid is made wide.
    """
    spec = WeightSpec(8, K, False)
    weight, H, _ = problem(spec, 11)
    step = 0.25
    grid = Grid(np.full((N, 1), step, np.float32), np.full((N, 1), 128, np.float32))
    codes, loss = swept(weight, H, grid, spec, order)
    assert 0 < codes.min() <= codes.max() < 255
    A = upper_factor(H[np.ix_(order, order)])
    assert loss.max() <= step**2 / 4 * np.square(np.diagonal(A)).sum()
    rounded = real_loss(weight, quantize(weight.astype(np.float32), grid, spec), H, grid, spec)
    assert loss.sum() < 0.7 * rounded


@pytest.mark.parametrize("act_order", [False, True])
def test_on_average_it_beats_rounding_by_far(act_order):
    """No theorem for one problem, but on these correlated activations most of the loss goes."""
    spec = SPECS[0]
    ratios = []
    for seed in range(8):
        weight, H, grid = problem(spec, seed)
        order = np.argsort(-np.diagonal(H), kind="stable") if act_order else np.arange(K)
        codes, _ = swept(weight, H, grid, spec, order)
        rounded = quantize(weight.astype(np.float32), grid, spec)
        ratios.append(real_loss(weight, codes, H, grid, spec) / real_loss(weight, rounded, H, grid, spec))
    assert np.mean(ratios) < (0.15 if act_order else 0.4)


def unit_trace(H):
    return (H / np.diagonal(H).mean()).astype(np.float32)


@SPEC
@pytest.mark.parametrize("seed", SEEDS)
def test_refitted_scales_and_moved_codes_never_lose(spec, seed):
    weight = normal((N, K), seed)
    H = unit_trace(hessian(seed))
    grid = clip_grid(weight, spec, np.diagonal(H))
    codes, _ = sweep(weight, upper_factor(H.astype(np.float64)), grid, spec, np.arange(K))
    losses = [real_loss(weight, codes, H, grid, spec)]
    for _ in range(3):
        grid = refit_scales(weight, codes, H, grid, spec)
        losses.append(real_loss(weight, codes, H, grid, spec))
        codes = descend(weight, codes, H, grid, spec)
        losses.append(real_loss(weight, codes, H, grid, spec))
    # float32 sums
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(losses))
    assert losses[-1] < (1 if spec.bits == 8 else 0.995) * losses[0]


def test_a_refitted_scale_is_the_best_one_for_its_codes():
    """One group a row: the scale solves a least squares problem in one unknown."""
    spec = WeightSpec(4, K, False)
    weight, H = normal((N, K), 12), unit_trace(hessian(12))
    grid = min_max_grid(weight, spec)
    codes = quantize(weight, grid, spec)
    refitted = refit_scales(weight, codes, H, grid, spec)
    A = upper_factor(H.astype(np.float64))
    for n in range(N):
        values = codes[n].astype(float) - grid.zero_point[n, 0]
        best = np.linalg.lstsq((values @ A)[:, None], weight[n] @ A, rcond=None)[0][0]
        assert refitted.scale[n, 0] == pytest.approx(best, rel=1e-5)
    assert np.array_equal(refitted.zero_point, grid.zero_point)


def test_refitted_scales_are_stored_numbers():
    spec = WeightSpec(4, 16, True, True, "float16")
    weight, H = normal((N, K), 13), unit_trace(hessian(13))
    grid = min_max_grid(weight, spec)
    refitted = refit_scales(weight, quantize(weight, grid, spec), H, grid, spec)
    assert not np.array_equal(refitted.scale, grid.scale)
    assert np.array_equal(refitted.scale, refitted.scale.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("lazy_block", [1, 5, 128])
def test_a_round_of_descent_takes_each_column_to_its_best_code(lazy_block):
    """Against a loop that tries every code of every weight, one column after the other."""
    spec = WeightSpec(2, 16, False)
    weight, H = normal((3, K), 14), unit_trace(hessian(14))
    grid = min_max_grid(weight, spec)
    codes = quantize(weight, grid, spec)
    wanted = codes.copy()
    for n in range(3):
        row = Grid(grid.scale[n : n + 1], grid.zero_point[n : n + 1])
        for k in range(K):
            losses = []
            for code in range(4):
                trial = wanted[n : n + 1].copy()
                trial[0, k] = code
                losses.append(real_loss(weight[n : n + 1], trial, H, row, spec))
            wanted[n, k] = int(np.argmin(losses))
    assert not np.array_equal(wanted, codes)
    assert np.array_equal(descend(weight, codes, H, grid, spec, lazy_block), wanted)


def test_damping_adds_a_share_of_each_diagonal_entry_and_a_tenth_as_much_of_their_mean():
    """The mean, 3, is that of columns that fire."""
    H = np.diag([4.0, 0.0, 2.0])
    H[0, 2] = H[2, 0] = 1
    result = damped(H, 0.1)
    assert np.allclose(result, [[4.43, 0, 1], [0, 0.03, 0], [1, 0, 2.23]])
    assert np.array_equal(H, [[4, 0, 1], [0, 0, 0], [1, 0, 2]])
    # Nothing couples to a column that never fires; without damping any positive number makes H definite.
    assert np.diagonal(damped(H, 0.0)).tolist() == [4, 3, 2]
    assert np.array_equal(damped(np.zeros((2, 2)), 0.0), np.eye(2))
    assert np.allclose(damped(1e6 * H, 0.1), 1e6 * result)
    assert damped(H.astype(np.float32), 0.1).dtype == np.float64
