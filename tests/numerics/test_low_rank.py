"""Low-rank factors of a weight's error, against singular value decompositions written down plainly."""

import numpy as np
import pytest

from qcompiler.numerics.low_rank import low_rank_factors
from tests.builders import normal


def problem(rows, columns, tokens=200, seed=0):
    """An error [N, K] and the Hessian of correlated activations, a few of whose channels are loud."""
    x = normal((tokens, columns), seed, "float64") @ normal((columns, columns), seed + 1, "float64")
    x[:, ::7] *= 10
    return normal((rows, columns), seed + 2, scale=0.01), x.T @ x


def loss(error, hessian):
    return float(np.einsum("nk,kj,nj->", error, hessian, error, optimize=True))


def by_decomposition(error, hessian, rank):
    """U_r S_r V_r^T H^(-1/2) of E H^(1/2), and the singular values that are left out."""
    values, vectors = np.linalg.eigh(hessian)
    root, inverse = (vectors * values**power @ vectors.T for power in (0.5, -0.5))
    u, s, v = np.linalg.svd(error.astype(np.float64) @ root, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank] @ inverse, s[rank:]


SHAPES = [(12, 30), (30, 12), (20, 20), (1, 9), (9, 1)]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_they_are_the_truncated_decomposition(rows, columns, rank):
    error, hessian = problem(rows, columns)
    outer, inner = low_rank_factors(error, hessian, rank)
    wanted, left_out = by_decomposition(error, hessian, rank)
    r = min(rank, rows, columns)
    assert (outer.shape, inner.shape) == ((rows, r), (r, columns))
    assert np.abs(outer @ inner - wanted).max() <= 1e-5 * np.abs(error).max()
    left = loss(error - outer.astype(np.float64) @ inner, hessian)
    assert left == pytest.approx(np.square(left_out).sum(), rel=1e-3, abs=1e-9 * loss(error, hessian))


def test_no_other_factors_of_that_rank_are_better():
    error, hessian = problem(10, 16)
    outer, inner = low_rank_factors(error, hessian, 3)
    least = loss(error - outer @ inner, hessian)
    for seed in range(20):
        for size in (1e-3, 1e-2):
            b, a = outer + normal(outer.shape, seed, scale=size), inner + normal(inner.shape, seed + 50, scale=size)
            assert loss(error - b @ a, hessian) > least


def test_the_hessian_counts():
    """With the identity in its place the factors are others, and worse."""
    error, hessian = problem(24, 40)
    weighed, plain = (low_rank_factors(error, h, 4) for h in (hessian, np.eye(40)))
    assert loss(error - weighed[0] @ weighed[1], hessian) < 0.9 * loss(error - plain[0] @ plain[1], hessian)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("tokens", [0, 2, 200])
def test_neither_the_loss_nor_the_error_grows(rows, columns, tokens):
    """Whatever H is: zero, singular, or of full rank."""
    error, hessian = problem(rows, columns, tokens)
    for rank in range(1, 10):
        outer, inner = low_rank_factors(error, hessian, rank)
        left = error - outer.astype(np.float64) @ inner
        assert loss(left, hessian) <= (1 + 1e-6) * loss(error, hessian)
        assert np.linalg.norm(left) <= (1 + 1e-6) * np.linalg.norm(error)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("tokens", [0, 2, 200])
def test_of_full_rank_they_are_the_error_itself(rows, columns, tokens):
    error, hessian = problem(rows, columns, tokens)
    outer, inner = low_rank_factors(error, hessian, 64)
    assert np.abs(outer @ inner - error).max() <= 1e-5 * np.abs(error).max()


def test_both_are_of_one_size():
    """An error of 1e-4 would be subnormal in float16 if B were orthonormal."""
    error, hessian = problem(20, 30)
    outer, inner = low_rank_factors(error * np.float32(1e-2), hessian, 5)
    assert np.allclose(np.linalg.norm(outer, axis=0), np.linalg.norm(inner, axis=1), rtol=1e-5)


def test_no_error_has_no_factors():
    outer, inner = low_rank_factors(np.zeros((4, 6), np.float32), np.eye(6), 2)
    assert not (outer @ inner).any()
    assert np.isfinite(outer).all()
