"""Grids, rounding and their inverse against loops over single numbers."""

import ml_dtypes
import numpy as np
import pytest

from qcompiler.errors import NumericsError
from qcompiler.numerics.affine import (
    Grid,
    WeightSpec,
    clip_grid,
    dequantize,
    min_max_grid,
    quantize,
    round_to_grid,
    storage_dtype,
    stored_scale,
)
from qcompiler.numerics.formats import FORMATS
from qcompiler.numerics.metrics import sqnr_db
from tests.builders import normal

BITS = pytest.mark.parametrize("bits", FORMATS)
# asymmetric, symmetric over the full range with a signed scale, symmetric and restricted
FORMS = {"asym": (False, True), "sym": (True, True), "restricted": (True, False)}
FORM = pytest.mark.parametrize("form", FORMS)
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
DTYPE = pytest.mark.parametrize("dtype", DTYPES)
# The scale that stands in for one of denormal numbers, see `stored_scale`.
SMALLEST = {"float32": 1.2e-38, "float16": 6.2e-5, "bfloat16": 1.2e-38}


def spec_of(bits, form="asym", group_size=32, dtype="float32"):
    symmetric, signed = FORMS[form]
    return WeightSpec(bits, group_size, symmetric, signed, dtype)


def naive_grid(group, bits, form, dtype):
    """Scale and zero point of one group, in float32, one operation at a time."""
    f = np.float32
    qmax, mid = 2**bits - 1, 2 ** (bits - 1)
    low, high = min(f(0), group.min()), max(f(0), group.max())
    if form == "sym":
        scale = (low if -low > high else high) / f(-mid)
    elif form == "restricted":
        scale = max(-low, high) / f(mid - 1)
    else:
        scale = (high - low) / f(qmax)
    if scale == 0:
        scale = f(1)
    if abs(scale) < f(SMALLEST[dtype]):
        scale = np.copysign(f(SMALLEST[dtype]), scale)
    scale = f(DTYPES[dtype](scale))
    # Python rounds half to even, as IEEE 754 does.
    zero = mid if form != "asym" else min(max(round(float(-low / scale)), 0), qmax)
    return scale, zero


def naive_code(value, scale, zero, bits, form):
    code = round(float(np.float32(value) / np.float32(scale))) + int(zero)
    return min(max(code, 1 if form == "restricted" else 0), 2**bits - 1)


@BITS
@FORM
@DTYPE
def test_grid_codes_and_values_equal_those_of_a_loop_over_groups(bits, form, dtype):
    for size in (16, 32, 64, 128, 256, 1000):  # 1000: one group a row
        for columns in (1, 7, 33, 129):
            spec = spec_of(bits, form, size, dtype)
            weight = normal((2, columns), seed=size + columns)
            grid = min_max_grid(weight, spec)
            codes = quantize(weight, grid, spec)
            values = dequantize(codes, grid.scale, grid.zero_point, size)
            assert grid.scale.shape == grid.zero_point.shape == (2, -(-columns // size)) == (2, spec.groups(columns))
            assert codes.dtype == np.uint8
            assert values.dtype == np.float32
            for n in range(2):
                for g in range(spec.groups(columns)):
                    part = slice(g * size, min((g + 1) * size, columns))
                    scale, zero = naive_grid(weight[n, part], bits, form, dtype)
                    assert (grid.scale[n, g], grid.zero_point[n, g]) == (scale, zero)
                    expected = [naive_code(value, scale, zero, bits, form) for value in weight[n, part]]
                    assert codes[n, part].tolist() == expected
                    naive = [np.float32(code - zero) * scale for code in expected]
                    assert values[n, part].tolist() == naive


@BITS
@FORM
@DTYPE
def test_every_code_is_the_nearest_one_on_the_stored_scale(bits, form, dtype):
    """Codes are derived from the rounded scale, so no other code comes closer to its weight."""
    spec = spec_of(bits, form, 32, dtype)
    weight = normal((4, 96), seed=3)
    grid = min_max_grid(weight, spec)
    assert np.array_equal(grid.scale, grid.scale.astype(DTYPES[dtype]).astype(np.float32))
    codes = quantize(weight, grid, spec).astype(int)
    scale, zero = np.repeat(grid.scale, 32, 1), np.repeat(grid.zero_point, 32, 1)
    lowest = 1 if form == "restricted" else 0
    every = np.arange(lowest, 2**bits, dtype=np.float64)[:, None, None]
    distance = np.abs(weight - (every - zero) * scale)  # [codes, N, K]
    chosen = np.take_along_axis(distance, codes[None] - lowest, 0)[0]
    # 1e-6: a quotient next to a half may be rounded to it.
    assert (chosen <= distance.min(0) + 1e-6 * np.abs(scale)).all()


@BITS
def test_rounding_the_scale_afterwards_would_give_other_codes(bits):
    """What "codes are derived from the rounded scale" prevents; at 2 bits no weight of this sample is close enough."""
    weight = normal((64, 256), seed=4)
    exact = min_max_grid(weight, spec_of(bits, "asym", 32, "float32"))
    spec = spec_of(bits, "asym", 32, "bfloat16")
    rounded = min_max_grid(weight, spec)
    assert (quantize(weight, exact, spec) != quantize(weight, rounded, spec)).any()


@BITS
def test_halves_go_to_the_even_code_before_the_zero_point_is_added(bits):
    spec = spec_of(bits, "asym", 4)
    mid = FORMATS[bits].mid
    weight = np.array([[0.5, -0.5, 1.5, -1.5]], np.float32)
    for zero in (mid, mid - 1):  # even and odd: rounding w / s + z would move the halves of one of the two
        grid = Grid(np.ones((1, 1), np.float32), np.full((1, 1), zero, np.float32))
        wanted = [min(max(zero + step, 0), spec.format.qmax) for step in (0, 0, 2, -2)]
        assert quantize(weight, grid, spec).tolist() == [wanted]


@BITS
@FORM
@DTYPE
def test_zeros_stay_zero(bits, form, dtype):
    spec = spec_of(bits, form, 16, dtype)
    weight = np.zeros((2, 24), np.float32)
    weight[0, 16:] = 1
    for grid in (min_max_grid(weight, spec), clip_grid(weight, spec)):
        codes = quantize(weight, grid, spec)
        assert (grid.scale[1] == 1).all()
        assert np.array_equal(codes[1], np.repeat(grid.zero_point[1], 16)[:24])
        assert (dequantize(codes, grid.scale, grid.zero_point, 16)[:, :16] == 0).all()


@BITS
@FORM
@pytest.mark.parametrize("constant", [1.0, -1.0, 0.3, -7e3])
def test_a_constant_group_is_kept(bits, form, constant):
    spec = spec_of(bits, form, 16)
    weight = np.full((1, 20), constant, np.float32)
    grid = min_max_grid(weight, spec)
    codes = quantize(weight, grid, spec)
    values = dequantize(codes, grid.scale, grid.zero_point, 16)
    # The scale is the constant over a small integer, and the value is that integer times the scale: two roundings.
    assert np.abs(values / np.float32(constant) - 1).max() <= 2**-23
    assert len(np.unique(codes)) == 1


@BITS
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_symmetric_grid_holds_the_extreme_value_exactly(bits, dtype):
    """On code 0, whose value is -mid * scale: a power of two times a scale that is the extreme over that power."""
    weight = normal((50, 64), seed=5, dtype=dtype).astype(np.float32)
    spec = spec_of(bits, "sym", 32, dtype)
    grid = min_max_grid(weight, spec)
    codes = quantize(weight, grid, spec)
    groups = weight.reshape(50, 2, 32)
    at = np.abs(groups).argmax(-1)[..., None]
    values = dequantize(codes, grid.scale, grid.zero_point, 32).reshape(groups.shape)
    assert np.array_equal(np.take_along_axis(values, at, -1), np.take_along_axis(groups, at, -1))
    assert (np.take_along_axis(codes.reshape(groups.shape), at, -1) == 0).all()
    assert (grid.scale > 0).any()
    assert (grid.scale < 0).any()


@BITS
def test_the_restricted_form_has_positive_scales_and_no_code_0(bits):
    weight = normal((50, 64), seed=6)
    spec = spec_of(bits, "restricted", 32)
    for grid in (min_max_grid(weight, spec), clip_grid(weight, spec)):
        codes = quantize(weight, grid, spec)
        assert (grid.scale > 0).all()
        assert codes.min() == 1
        assert codes.max() == spec.format.qmax
        assert (grid.zero_point == spec.format.mid).all()


@BITS
@FORM
@DTYPE
def test_an_outlier_costs_its_group_alone_and_overflows_nothing(bits, form, dtype):
    weight = normal((1, 96), seed=7)
    weight[0, 40] = 6e4 if dtype == "float16" else 1e30
    spec = spec_of(bits, form, 32, dtype)
    alone = min_max_grid(np.delete(weight, np.s_[32:64], 1), spec)
    for grid in (min_max_grid(weight, spec), clip_grid(weight, spec)):
        values = dequantize(quantize(weight, grid, spec), grid.scale, grid.zero_point, 32)
        assert np.isfinite(values).all()
        # 0.7 %: bfloat16 keeps 8 bits of the scale, and the other end of the group is a step away from zero at most.
        assert abs(values[0, 40] / weight[0, 40] - 1) < 0.007
    assert np.array_equal(np.delete(min_max_grid(weight, spec).scale, 1, 1), alone.scale)


@BITS
@FORM
@DTYPE
def test_denormal_numbers_are_harmless(bits, form, dtype):
    """float32 has nothing but denormal numbers below 1.2e-38, where a scale has no finite reciprocal."""
    weight = normal((2, 64), seed=8, scale=1e-40)
    weight[1, 0] = 1e-20
    spec = spec_of(bits, form, 32, dtype)
    for grid in (min_max_grid(weight, spec), clip_grid(weight, spec, lowest=0.5)):
        assert (np.abs(grid.scale) >= np.float32(1.17e-38)).all()
        values = dequantize(quantize(weight, grid, spec), grid.scale, grid.zero_point, 32)
        assert np.isfinite(values).all()
        assert (np.abs(values) <= np.abs(weight).max(1, keepdims=True) * 1.01).all()


def test_small_float16_scales_are_raised_to_normal_numbers():
    """float16 numbers below 6.1e-5 lose a bit at each halving."""
    spec = spec_of(4, "sym", 32, "float16")
    scale = stored_scale(np.array([1e-7, -1e-7, 7e-5, -7e-5, 0.1], np.float32), spec)
    assert np.allclose(np.abs(scale[:2]), 6.2e-5, rtol=1e-3)
    assert scale[1] < 0 < scale[0]
    assert np.allclose(scale[2:], [7e-5, -7e-5, 0.1], rtol=5e-4)  # 11 bits
    assert stored_scale(np.array([1e-7], np.float32), spec_of(4)) == np.float32(1e-7)


def test_rounding_broadcasts_scales():
    spec = spec_of(4, "asym")
    scale, zero = np.array([[1.0], [2.0]], np.float32), np.array([[0.0], [3.0]], np.float32)
    values = np.array([3.4, -9.0, 99.0], np.float32)
    assert round_to_grid(values, scale, zero, spec).tolist() == [[3, 0, 15], [5, 0, 15]]


@FORM
def test_threads_and_neighbouring_rows_change_nothing(form):
    """200 x 700 elements are five blocks of rows."""
    weight = normal((200, 700), seed=9)
    importance = np.abs(normal(700, seed=10))
    spec = spec_of(4, form, 64)
    results = []
    for threads in (1, 2, 3, 4):
        grids = [
            min_max_grid(weight, spec, threads),
            clip_grid(weight, spec, importance, threads=threads),
        ]
        codes = [quantize(weight, grid, spec, threads) for grid in grids]
        results.append([array.tobytes() for grid in grids for array in (grid.scale, grid.zero_point)])
        results[-1] += [array.tobytes() for array in codes]
    assert all(result == results[0] for result in results)
    some = weight[37:40]
    grid = clip_grid(some, spec, importance)
    assert grid.scale.tobytes() == grids[1].scale[37:40].tobytes()
    assert quantize(some, grid, spec).tobytes() == codes[1][37:40].tobytes()


@BITS
@pytest.mark.parametrize("form", ["asym", "sym"])
@pytest.mark.parametrize("seed", range(3))
def test_gaussian_weights_reach_the_floor_of_the_table(bits, form, seed):
    """The floor is where min-max groups of 32 lie, less a dB; a grid that is off by a step would miss it."""
    weight = normal((256, 512), seed)
    spec = spec_of(bits, form, 32)
    grid = min_max_grid(weight, spec)
    values = dequantize(quantize(weight, grid, spec), grid.scale, grid.zero_point, 32)
    floor = FORMATS[bits].sqnr_floor_db
    assert floor <= sqnr_db(weight, values) <= floor + 4
    clipped = clip_grid(weight, spec)
    better = dequantize(quantize(weight, clipped, spec), clipped.scale, clipped.zero_point, 32)
    assert sqnr_db(weight, better) >= sqnr_db(weight, values)


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "dtype", "expected"),
    [
        (4, 128, True, "float16", 4.125),  # 16 / 128
        (4, 128, False, "float16", 4.15625),  # (16 + 4) / 128
        (4, 64, False, "float32", 4.5625),  # (32 + 4) / 64
        (2, 64, False, "bfloat16", 2.28125),  # (16 + 2) / 64
        (3, 64, False, "float32", 4.5625),  # codes and zero points of 3 bits are stored in 4
        (8, 512, True, "float32", 8.0625),  # one scale a row
    ],
)
def test_stored_bits_count_scales_and_zero_points(bits, group, symmetric, dtype, expected):
    spec = WeightSpec(bits, group, symmetric, True, dtype)
    assert spec.stored_bits(512) == expected
    assert storage_dtype(dtype).itemsize == (4 if dtype == "float32" else 2)


def test_spec_counts_ragged_groups():
    spec = WeightSpec(4, 64, False)
    assert [spec.groups(columns) for columns in (1, 64, 65, 128)] == [1, 1, 2, 2]


@pytest.mark.parametrize("heads", [1, 4, 12])
@pytest.mark.parametrize("group", [16, 40])
@FORM
def test_rows_of_a_head_share_the_grid_that_spans_them_all(form, group, heads):
    weight = normal((24, 40), 3) * np.linspace(0.1, 4, 24, dtype=np.float32)[:, None]
    symmetric, signed = FORMS[form]
    shared = min_max_grid(weight, WeightSpec(8, group, symmetric, signed, head_size=heads))
    plain = WeightSpec(8, heads * group, symmetric, signed)
    for row in range(0, 24, heads):
        for at, start in enumerate(range(0, 40, group)):
            unit = weight[row : row + heads, start : start + group].reshape(1, -1)
            alone = min_max_grid(unit, plain)
            assert (shared.scale[row : row + heads, at] == alone.scale).all()
            assert (shared.zero_point[row : row + heads, at] == alone.zero_point).all()


def test_heads_are_whole_whatever_the_threads(monkeypatch):
    import qcompiler.numerics.affine as affine

    spec, weight = WeightSpec(8, 64, True, False, head_size=6), normal((60, 64), 4)
    whole = min_max_grid(weight, spec)
    for block in (1, 64 * 7, 64 * 13):
        monkeypatch.setattr(affine, "_BLOCK", block)
        for threads in (1, 3):
            np.testing.assert_array_equal(min_max_grid(weight, spec, threads).scale, whole.scale)
    with pytest.raises(NumericsError, match="61 output channels are not whole heads of 6"):
        min_max_grid(normal((61, 64), 4), spec)


@pytest.mark.parametrize(
    ("spec", "limits"),
    [
        (WeightSpec(8, 32, False), (0, 255)),
        (WeightSpec(8, 32, True), (0, 255)),
        (WeightSpec(8, 32, True, False), (1, 255)),
        (WeightSpec(8, 32, True, False, reduced=True), (65, 191)),
        (WeightSpec(4, 32, True, False), (1, 15)),
        (WeightSpec(4, 32, True, True, reduced=True), (0, 15)),  # whole range: no 8-bit activation meets it
    ],
)
def test_the_codes_that_are_used(spec, limits):
    assert spec.limits == limits
    weight = normal((16, 64), 5)
    for grid in (min_max_grid(weight, spec), clip_grid(weight, spec)):
        codes = quantize(weight, grid, spec)
        assert limits[0] <= codes.min()
        assert codes.max() <= limits[1]
    if spec.symmetric and not spec.signed_scale:  # the range of each group is used to its end
        codes = quantize(weight, min_max_grid(weight, spec), spec).reshape(16, 2, 32).astype(int) - spec.format.mid
        assert (np.abs(codes).max(-1) == limits[1] - spec.format.mid).all()


def test_a_pair_of_products_of_reduced_codes_fits_16_bits():
    reach = WeightSpec(8, 32, True, False, reduced=True).limits[1] - 128
    assert 2 * 255 * reach < 2**15 <= 2 * 255 * 127
