"""Scales of 8 bits: how near they are, and that what was rounded once comes out again."""

from dataclasses import replace

import numpy as np
import pytest

from qcompiler.numerics.affine import WeightSpec, stored_scale
from qcompiler.numerics.double_scales import double_quantized, double_rounded


def scales(rows=50, groups=9, seed=0, spread=1.0):
    draw = np.random.default_rng(seed)
    made = np.exp(draw.normal(-4, spread, (rows, groups))) * draw.choice([-1, 1], (rows, groups))
    return made.astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
def test_rounding_is_near_and_done_once(seed, spread):
    exact = scales(seed=seed, spread=spread)
    codes, step = double_quantized(exact)
    rounded = double_rounded(exact)
    assert codes.dtype == np.int8
    assert step.shape == (50, 1)
    assert (np.abs(codes).max(1) == 127).all()
    assert (codes != 0).all()
    assert (np.sign(rounded) == np.sign(exact)).all()
    near = np.abs(rounded - exact) <= 0.501 * step + 127 * step * 2**-16
    assert (near | (np.abs(codes) == 1)).all()  # a scale is never zero
    assert np.array_equal(double_rounded(rounded), rounded)
    assert np.array_equal(rounded.astype(np.float64), codes.astype(np.float64) * step)  # products are exact


@pytest.mark.parametrize("power", [-60, 0, 60])
def test_powers_of_two_change_nothing(power):
    exact = scales()
    assert np.array_equal(
        double_rounded(exact * np.float32(2.0**power)), double_rounded(exact) * np.float32(2.0**power)
    )


@pytest.mark.parametrize(("columns", "size", "bits"), [(576, 64, 4 + 9 * 4 / 576 + (72 + 32) / 576), (64, 64, 4.6875)])
def test_bits_of_scales(columns, size, bits):
    spec = WeightSpec(4, size, False, double=True)
    assert spec.stored_bits(columns) == pytest.approx(bits)
    symmetric = replace(spec, symmetric=True, double=False)
    assert symmetric.stored_bits(columns) == 4 + 32 / size


def test_stored_scales_are_rounded_where_the_format_says_so():
    exact, spec = scales(), WeightSpec(4, 64, True)
    assert np.array_equal(stored_scale(exact, spec), exact)
    assert np.array_equal(stored_scale(exact, replace(spec, double=True)), double_rounded(exact))
