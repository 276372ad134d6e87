"""Hadamard matrices are orthogonal, of all orders that Paley's two constructions reach over prime fields."""

import numpy as np
import pytest

from qcompiler.numerics.hadamard import hadamard, orthogonal, random_hadamard

# Sizes of residual streams and heads, with the smallest order that they are a power of two times of.
SIZES = [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 60, 64, 68, 76, 80, 128, 576, 640, 768, 896, 960, 1152]


@pytest.mark.parametrize("size", SIZES)
def test_rows_are_orthogonal(size):
    matrix = hadamard(size)
    assert matrix.dtype == np.int8
    assert (np.abs(matrix) == 1).all()
    product = matrix.astype(np.int64) @ matrix.T.astype(np.int64)
    assert np.array_equal(product, size * np.eye(size, dtype=np.int64))


# 52 takes a field of 25 elements, 92 was found by a search (Baumert, Golomb and Hall 1962).
@pytest.mark.parametrize("size", [3, 5, 6, 7, 14, 18, 36 * 3 + 2, 52, 92, 1000 + 2])
def test_orders_without_a_matrix(size):
    assert hadamard(size) is None


@pytest.mark.parametrize(("size", "known"), [(1, True), (36, True), (64, True), (6, False), (52, False)])
def test_random_matrices(size, known):
    matrix, is_hadamard = random_hadamard(size, np.random.default_rng(1))
    assert is_hadamard is known
    assert np.abs(matrix @ matrix.T - np.eye(size)).max() < 1e-13
    again, _ = random_hadamard(size, np.random.default_rng(1))
    other, _ = random_hadamard(size, np.random.default_rng(2))
    assert np.array_equal(matrix, again)
    assert size == 1 or not np.array_equal(matrix, other)
    if known:
        assert np.allclose(np.abs(matrix), size**-0.5, rtol=1e-12)


@pytest.mark.parametrize("size", [2, 5, 36])
def test_the_mean_can_be_kept(size):
    matrix = orthogonal(size, np.random.default_rng(3), keep_ones=True)
    assert np.abs(matrix @ matrix.T - np.eye(size)).max() < 1e-13
    assert np.allclose(np.ones(size) @ matrix, 1, rtol=1e-12)
    assert np.allclose(matrix @ np.ones(size), 1, rtol=1e-12)
    assert size == 2 or np.abs(matrix - np.eye(size)).max() > 0.1


def test_one_loud_channel_is_spread_evenly():
    matrix, _ = random_hadamard(576, np.random.default_rng(4))
    vector = np.zeros(576)
    vector[7] = 24
    assert np.allclose(np.abs(vector @ matrix), 1, rtol=1e-12)
