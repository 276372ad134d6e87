"""What float16 cannot hold is counted one by one, and limited rather than made infinite."""

import numpy as np
import pytest

from qcompiler.numerics import half
from qcompiler.numerics.half import half_loss, to_half


def test_values_are_those_of_numpy_where_they_fit():
    values = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32) * 100
    assert np.array_equal(to_half(values), values.astype(np.float16))


def test_what_does_not_fit_is_limited_and_infinity_stays():
    values = np.array([65504, 65519, 7e4, -3.4e38, np.inf, -np.inf, np.nan, 0], np.float32)
    assert np.array_equal(
        to_half(values), np.array([65504, 65504, 65504, -65504, np.inf, -np.inf, np.nan, 0], np.float16), equal_nan=True
    )


def test_losses_are_counted(monkeypatch):
    monkeypatch.setattr(half, "_CHUNK", 3)
    values = np.array([[0, 1, -7e4, 1e-5], [6.1e-5, 6.2e-5, np.inf, 1e-9], [np.nan, 65504, 65505, 8e4]], np.float32)
    found = half_loss(values)
    assert (found.size, found.beyond, found.subnormal) == (12, 3, 3)
    assert found.largest == pytest.approx(8e4)
    assert half_loss(np.zeros((0, 3), np.float32)).largest == 0
