"""8-bit floats are those of the definition: 4 bits of exponent, 3 of mantissa, no infinity."""

import numpy as np
import pytest

from qcompiler.errors import NumericsError
from qcompiler.numerics.formats import FLOAT8_MAX, FORMATS, float8_bits, float8_values, int_format


def number(bits):
    """OCP 8-bit floating point, E4M3: exponent bias 7; all ones is no number."""
    sign, exponent, mantissa = -1 if bits >> 7 else 1, bits >> 3 & 15, bits & 7
    if (exponent, mantissa) == (15, 7):
        return np.nan
    return sign * (2.0**-6 * mantissa / 8 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8))


NUMBERS = np.array([number(bits) for bits in range(256)])


def test_bits_mean_the_numbers_of_the_definition():
    assert np.array_equal(float8_values(np.arange(256, dtype=np.uint8)), NUMBERS.astype(np.float32), equal_nan=True)
    assert np.nanmax(NUMBERS) == FLOAT8_MAX


def test_every_value_gets_the_nearest_number():
    values = np.random.default_rng(0).standard_normal(2000).astype(np.float32)
    values = np.concatenate([values, values * 100, values * 1e-3])
    found = float8_values(float8_bits(values))
    finite = NUMBERS[np.isfinite(NUMBERS)]
    nearest = np.abs(values[:, None] - finite).min(1)
    np.testing.assert_allclose(np.abs(values - found), nearest, rtol=1e-6)


def test_halves_go_to_the_even_mantissa_and_ends_are_met():
    values = np.array([1.0625, 1.1875, -1.0625, 447, 464, 1e6, -np.inf, 2.0**-10, 3 * 2.0**-10], np.float32)
    assert float8_values(float8_bits(values)).tolist() == [1, 1.25, -1, 448, 448, 448, -448, 0, 2.0**-8]


def test_widths():
    assert all(int_format(bits) is FORMATS[bits] for bits in FORMATS)
    with pytest.raises(NumericsError, match="no 5-bit code format; known widths: 2, 3, 4, 8"):
        int_format(5)
