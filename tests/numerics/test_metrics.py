"""Figures of merit against float64 loops."""

import math

import numpy as np
import pytest

from qcompiler.numerics.metrics import (
    ErrorSums,
    channel_products,
    error_sums,
    gain_free_noise,
    kl_divergence,
    log_softmax,
    logits_divergence,
    sqnr_db,
    top1_agreement,
)
from tests.builders import normal


def naive_sqnr(reference, other):
    signal = math.fsum(float(r) ** 2 for r in reference.reshape(-1))
    noise = math.fsum((float(r) - float(a)) ** 2 for r, a in zip(reference.reshape(-1), other.reshape(-1), strict=True))
    return 10 * math.log10(signal / noise)


def naive_kl(reference, other):
    def log_probabilities(row):
        most = max(float(v) for v in row)
        total = math.log(math.fsum(math.exp(float(v) - most) for v in row))
        return [float(v) - most - total for v in row]

    p, q = log_probabilities(reference), log_probabilities(other)
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("shape", [(7,), (3, 50), (2, 3, 4)])
@pytest.mark.parametrize("noise", [1e-4, 1.0, 30.0])
def test_sqnr_equals_a_float64_loop(shape, noise):
    reference = normal(shape, seed=1)
    other = reference + normal(shape, seed=2, scale=noise)
    assert sqnr_db(reference, other) == pytest.approx(naive_sqnr(reference, other), rel=1e-12)


def test_sqnr_of_float16_does_not_overflow():
    reference = np.full(100, 6e4, np.float16)
    other = np.full(100, 5.9e4, np.float16)
    assert sqnr_db(reference, other) == pytest.approx(naive_sqnr(reference, other), rel=1e-12)


def test_sqnr_at_its_ends():
    zeros, ones = np.zeros(3), np.ones(3)
    assert sqnr_db(ones, ones) == math.inf
    assert sqnr_db(zeros, zeros) == math.inf
    assert sqnr_db(zeros, ones) == -math.inf
    assert sqnr_db(ones, zeros) == 0
    assert sqnr_db(ones, 1.1 * ones) == pytest.approx(20)  # a tenth of the amplitude


def test_sums_of_parts_are_the_sums_of_the_whole_whatever_the_threads():
    """300,000 elements are three chunks."""
    reference = normal(300_000, seed=3)
    other = reference + normal(300_000, seed=4, scale=0.1)
    whole = error_sums(reference, other)
    assert [error_sums(reference, other, threads=n) for n in (2, 3, 4)] == [whole] * 3
    halves = error_sums(reference[:1000], other[:1000]) + error_sums(reference[1000:], other[1000:])
    assert halves.sqnr_db == pytest.approx(whole.sqnr_db, rel=1e-12)
    assert halves.largest == whole.largest == np.abs(other.astype(float) - reference).max()
    rows = np.arange(0, 300, 7)
    some = error_sums(reference.reshape(300, -1), other.reshape(300, -1), rows, threads=2)
    direct = error_sums(reference.reshape(300, -1)[rows], other.reshape(300, -1)[rows])
    assert some.noise == pytest.approx(direct.noise, rel=1e-12)
    assert error_sums(reference[:0], other[:0]) == ErrorSums()


def test_what_is_not_finite_is_counted_and_left_out():
    reference = np.array([1.0, np.nan, 2.0, np.inf, 3.0, -np.inf])
    other = np.array([1.5, 0.0, np.nan, np.inf, -np.inf, 0.0])
    assert error_sums(reference, other) == ErrorSums(1.0, 0.25, 0.5, lost=2, undefined=3)


@pytest.mark.parametrize("spread", [0.1, 3.0, 40.0])
def test_divergence_equals_a_float64_loop(spread):
    reference, other = normal((4, 5, 33), seed=5, scale=spread), normal((4, 5, 33), seed=6, scale=spread)
    got = kl_divergence(reference, other)
    assert got.shape == (4, 5)
    want = [[naive_kl(reference[i, j], other[i, j]) for j in range(5)] for i in range(4)]
    assert np.allclose(got, want, rtol=1e-10, atol=1e-14)
    assert (got > 0).all()


def test_divergence_of_equal_logits_is_zero_and_shifts_do_not_count():
    logits = normal((6, 100), seed=7, scale=10)
    assert np.abs(kl_divergence(logits, logits)).max() < 1e-14
    # float32 holds logits near 1000 to 6e-5, and the divergence grows with the square of an error.
    assert np.abs(kl_divergence(logits, logits + np.float32(1000))).max() < 1e-8


def test_divergence_of_certain_and_contrary_predictions_is_large_but_finite():
    """Each is certain of its own token by 2000 nats, far beyond what exp can take in float64."""
    reference, other = np.array([[2000.0, 0.0]]), np.array([[0.0, 2000.0]])
    assert kl_divergence(reference, other).tolist() == [2000]


def test_tokens_that_cannot_occur_add_nothing():
    reference, other = normal((3, 10), seed=8), normal((3, 10), seed=9)
    want = kl_divergence(np.delete(reference, 4, 1), np.delete(other, 4, 1))
    reference[:, 4] = other[:, 4] = -np.inf
    assert np.allclose(kl_divergence(reference, other), want, rtol=1e-12)
    reference[0, 1] = np.nan
    assert np.isnan(kl_divergence(reference, other)).tolist() == [True, False, False]


def test_positions_can_be_chosen_and_threads_change_nothing():
    """With 20,000 logits a chunk has six positions."""
    reference, other = normal((40, 20_000), seed=10), normal((40, 20_000), seed=11)
    kl, same = logits_divergence(reference, other)
    for threads in (2, 3, 4):
        again, agreed = logits_divergence(reference, other, threads=threads)
        assert again.tobytes() == kl.tobytes()
        assert agreed.tobytes() == same.tobytes()
    rows = np.array([3, 39, 0])
    some, agreed = logits_divergence(reference, other, rows)
    assert np.allclose(some, kl[rows], rtol=1e-12)
    assert agreed.tolist() == same[rows].tolist()
    nothing, _ = logits_divergence(reference, other, np.zeros(0, int))
    assert nothing.shape == (0,)


def test_log_softmax_equals_a_float64_loop():
    logits = normal((3, 20), seed=12, scale=50)
    wide = logits.astype(np.float64)
    want = wide - wide.max(-1, keepdims=True)
    want -= np.log(np.exp(want).sum(-1, keepdims=True))
    got = log_softmax(logits)
    assert got.dtype == np.float32
    assert np.allclose(got, want, rtol=1e-5, atol=1e-5)


def test_agreement_compares_places_of_the_largest():
    reference = np.array([[[1.0, 3.0, 2.0], [5.0, 4.0, 0.0]]])
    other = np.array([[[0.0, 9.0, 8.0], [1.0, 2.0, 0.0]]])
    assert top1_agreement(reference, other).tolist() == [[True, False]]
    assert logits_divergence(reference[0], other[0])[1].tolist() == [True, False]


@pytest.mark.parametrize("axis", [1, -1])
def test_what_no_gain_of_a_channel_removes_is_found_by_a_search(axis):
    reference = normal((3, 4, 5), seed=13)
    other = reference * np.array([0.5, -2, 1, 30], np.float32)[:, None] + normal((3, 4, 5), seed=14, scale=0.1)
    left = 0.0
    for r, a in zip(np.moveaxis(reference, axis, 0), np.moveaxis(other, axis, 0), strict=True):
        wide = (r.astype(np.float64).reshape(-1, 1), a.astype(np.float64).reshape(-1, 1))
        gain = np.linalg.lstsq(wide[1], wide[0], rcond=None)[0][0, 0]
        left += float(((wide[0] - gain * wide[1]) ** 2).sum())
    assert gain_free_noise(channel_products(reference, other, axis)) == pytest.approx(left, rel=1e-9)


def test_channels_without_signal_or_numbers_have_no_noise_of_their_own():
    reference = np.array([[1.0, 2.0], [3.0, np.inf]])
    other = np.array([[2.0, 0.0], [6.0, np.nan]])
    products = channel_products(reference, other, -1)
    assert products.tolist() == [[10, 4], [20, 0], [40, 0]]
    assert gain_free_noise(products) == pytest.approx(4)
