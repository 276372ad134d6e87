"""Grids of activations, against ONNX Runtime's QuantizeLinear and plain loops."""

import numpy as np
import pytest

from qcompiler.numerics.activation import (
    ActivationSpec,
    activation_grid,
    dequantize_activation,
    fake_quantize,
    quantize_activation,
    quantize_bias,
)
from tests.builders import normal, parse, run

INTEGERS = [
    ActivationSpec(bits, signed, symmetric)
    for bits in (8, 16)
    for signed in (False, True)
    for symmetric in (False, True)
]
RANGES = [(-1.0, 3.0), (0.0, 5.0), (-7.0, 0.0), (2.0, 3.0), (-3.0, -2.0), (-1e-30, 1e30), (-1e-42, 1e-42), (-0.3, 0.3)]


@pytest.mark.parametrize("spec", INTEGERS, ids=str)
def test_names_limits_and_middle(spec):
    kind = np.iinfo(spec.dtype)
    assert str(spec) == ("" if spec.signed else "u") + f"int{spec.bits}" + ("-sym" if spec.symmetric else "")
    assert spec.limits == (kind.min + spec.symmetric, kind.max)
    assert spec.middle == (0 if spec.signed else 2 ** (spec.bits - 1))
    if spec.symmetric:
        assert spec.middle - spec.limits[0] == spec.limits[1] - spec.middle


@pytest.mark.parametrize("ends", RANGES, ids=str)
@pytest.mark.parametrize("spec", INTEGERS, ids=str)
def test_a_grid_spans_its_range_and_holds_zero(spec, ends):
    scale, zero = activation_grid(*ends, spec)
    low, high = min(ends[0], 0), max(ends[1], 0)
    assert np.float32(scale) == scale >= np.finfo(np.float32).tiny
    first, last = spec.limits
    assert first <= zero <= last
    # Half a step is lost where the zero point is rounded.
    assert (first - zero) * scale <= low + 0.501 * scale
    assert (last - zero) * scale >= high - 0.501 * scale
    assert fake_quantize(np.zeros(1, np.float32), scale, zero, spec)[0] == 0
    if spec.symmetric:
        assert zero == spec.middle
    tight = max(-low, high) / (last - spec.middle) if spec.symmetric else (high - low) / (last - first)
    assert scale == pytest.approx(max(tight, np.finfo(np.float32).tiny), rel=1e-6)


@pytest.mark.parametrize("spec", [*INTEGERS, ActivationSpec(fp8=True)], ids=str)
def test_a_range_of_zeros_has_a_scale_of_one(spec):
    scale, zero = activation_grid(0, 0, spec)
    assert scale == 1
    assert fake_quantize(np.zeros(3, np.float32), scale, zero, spec).tolist() == [0, 0, 0]


def test_a_relu_has_its_zero_at_the_end_so_that_clipping_is_free():
    assert activation_grid(0, 6, ActivationSpec()) == (float(np.float32(6 / 255)), 0)
    assert activation_grid(0, 6, ActivationSpec(signed=True))[1] == -128


@pytest.mark.parametrize("ends", [(-1.0, 3.0), (-1e-4, 1e-3), (-1e-9, 1e-9), (0.0, 6e4)], ids=str)
@pytest.mark.parametrize("bits", [8, 16])
def test_a_scale_of_half_precision_is_a_normal_number_and_the_zero_point_fits_it(bits, ends):
    spec = ActivationSpec(bits)
    scale, zero = activation_grid(*ends, spec, "float16")
    assert np.float16(scale) == scale >= np.finfo(np.float16).tiny
    assert zero == np.rint(-ends[0] / scale)


@pytest.mark.parametrize("spec", INTEGERS, ids=str)
def test_codes_are_those_of_onnx_runtime(spec):
    values = np.concatenate([normal(500, 1, scale=2), [0, 1e30, -1e30, 0.5, -0.5]]).astype(np.float32)
    scale, zero = activation_grid(-2.5, 4, spec)
    values[:256] = np.float32(scale) * (np.arange(256) - 127.5).astype(np.float32)  # ties
    kind = f"{'' if spec.signed else 'u'}int{spec.bits}"
    model = parse(
        f"g (float[N] x) => ({kind}[N] q, float[N] y) {{ q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }}",
        {"s": np.float32(scale), "z": np.asarray(zero, spec.dtype)},
    )
    codes, decoded = run(model, {"x": values})
    found = quantize_activation(values, scale, zero, spec)
    assert found.dtype == spec.dtype
    np.testing.assert_array_equal(found, codes)
    np.testing.assert_array_equal(dequantize_activation(found, scale, zero), decoded)
    np.testing.assert_array_equal(fake_quantize(values, scale, zero, spec), decoded)


def test_codes_of_8_bit_floats_are_the_nearest_of_all():
    import ml_dtypes

    spec, values = ActivationSpec(fp8=True), np.concatenate([normal(300, 2), [0, 1e9, -1e9]]).astype(np.float32)
    scale, zero = activation_grid(-3, 2, spec)
    assert str(spec) == "float8e4m3"
    assert (scale, zero) == (float(np.float32(3 / 448)), 0)
    table = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    table = table[np.isfinite(table)]
    found = quantize_activation(values, scale, zero, spec)
    assert found.dtype == ml_dtypes.float8_e4m3fn
    for value, code in zip(values / np.float32(scale), found.astype(np.float64), strict=True):
        assert abs(code - value) == np.abs(table - value).min()


def test_a_bias_in_the_scale_of_its_product():
    bias = np.array([0.5, -0.25, 1e9, -1e9, 0], np.float32)
    scale = np.array([0.1, 0.1, 1e-6, 1e-6, 1], np.float32)
    codes = quantize_bias(bias, scale)
    assert codes.dtype == np.int32
    assert codes.tolist() == [5, -2, 2**31 - 1, -(2**31) + 1, 0]  # half to even: 2.5 would, 0.25 / 0.1 is not quite


@pytest.mark.parametrize("anchor", [-3.0, 0.75, -0.031, 2.0])
@pytest.mark.parametrize("ends", [(-5.3, 7.1), (-3.2, 0.1), (-4.0, 11.0), (-0.5, 2.2)])
@pytest.mark.parametrize("signed", [False, True])
def test_an_anchor_is_a_code(ends, anchor, signed):
    spec = ActivationSpec(signed=signed)
    plain, _ = activation_grid(*ends, spec)
    scale, zero = activation_grid(*ends, spec, anchor=anchor)
    steps = anchor / scale
    assert scale <= plain * 4 / 3 * (1 + 1e-6)
    if scale == plain and abs(steps - round(steps)) > 1e-4:  # it would have taken more
        least = (max(ends[1], anchor) - min(ends[0], anchor)) / 255
        count = np.floor(abs(anchor) / least)
        assert not count or abs(anchor) / count > plain * 4 / 3
        return
    assert abs(steps - round(steps)) < 1e-4
    assert spec.limits[0] <= zero + round(steps) <= spec.limits[1]
    for end in ends:  # a step is lost at one end, as rounding the zero point loses half of one
        assert spec.limits[0] - 1 <= zero + end / scale <= spec.limits[1] + 1


@pytest.mark.parametrize("spec", [ActivationSpec(signed=True, symmetric=True), ActivationSpec(fp8=True)])
def test_symmetric_formats_have_no_anchor(spec):
    assert activation_grid(-2, 5, spec, anchor=-3.0) == activation_grid(-2, 5, spec)
