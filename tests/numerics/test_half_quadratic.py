"""Half-quadratic refinement against the same turns written as a plain loop over groups, in float64."""

import numpy as np
import pytest

from qcompiler.numerics.affine import Grid, WeightSpec, clip_grid, dequantize, min_max_grid, quantize
from qcompiler.numerics.half_quadratic import HalfQuadratic, half_quadratic_grid
from tests.builders import normal

SPECS = pytest.mark.parametrize(
    "spec",
    [
        WeightSpec(4, 16, False),
        WeightSpec(2, 16, False),
        WeightSpec(8, 16, False),
        WeightSpec(4, 16, True),
        WeightSpec(4, 16, True, False),
        WeightSpec(2, 40, True),
        WeightSpec(4, 16, False, scale_dtype="float16"),
    ],
    ids=str,
)


def heavy(shape=(6, 40), seed=0):
    """Values with outliers; 40 columns leave a ragged group of 8."""
    return np.random.default_rng(seed).standard_t(3, shape).astype(np.float32)


def losses(weight, grid, spec, norm=0.7):
    """``sum |W - Q|^p`` of each group, float64 [N, G]."""
    values = dequantize(quantize(weight, grid, spec), grid.scale, grid.zero_point, spec.group_size)
    error = np.abs(weight.astype(np.float64) - values) ** norm
    return np.add.reduceat(error, np.arange(0, weight.shape[1], spec.group_size), axis=1)


def codes_of(values, scale, zero, spec):
    low = 1 if spec.symmetric and not spec.signed_scale else 0
    return [min(max(round(value / scale) + zero, low), spec.format.qmax) for value in values]  # round: half to even


def shrunk(error, p, beta):
    size = abs(error)
    return 0.0 if size == 0 else np.copysign(max(size - size ** (p - 1) / beta, 0.0), error)


def slope(across, along, otherwise):
    """Least squares through the origin, unless that turns the scale around."""
    above, below = sum(a * b for a, b in zip(across, along, strict=True)), sum(a * a for a in across)
    return above / below if below and above * otherwise > 0 else otherwise


def refined_group(values, scale, zero, spec, solver):
    """The turns of one group; scales as the file will hold them."""
    unit, beta, found = abs(scale), solver.beta, []
    for _ in range(solver.iterations + 1):
        codes = codes_of(values, scale, zero, spec)
        errors = [(value - (code - zero) * scale) / unit for value, code in zip(values, codes, strict=True)]
        loss = sum(abs(error) ** solver.norm for error in errors)
        if found and loss >= found[-1][0]:
            break
        found.append((loss, scale, zero))
        wanted = [value / unit - shrunk(error, solver.norm, beta) for value, error in zip(values, errors, strict=True)]
        step = scale / unit
        if not spec.symmetric:
            middle, level = np.mean(codes), np.mean(wanted)
            if solver.move_scale:
                step = slope([code - middle for code in codes], wanted, step)
            zero = min(max(round(middle - level / step), 0), spec.format.qmax)
        if solver.move_scale:
            step = slope([code - zero for code in codes], wanted, step)
        scale = float(np.dtype(spec.scale_dtype).type(step * unit))
        beta *= solver.kappa
    return found[-1]


@SPECS
@pytest.mark.parametrize("solver", [HalfQuadratic(), HalfQuadratic(0.5, 3, 1.2, 7)], ids=["default", "other"])
def test_it_takes_the_turns_of_the_paper(spec, solver):
    weight = heavy()
    start, grid = min_max_grid(weight, spec), half_quadratic_grid(weight, spec, solver)
    found = losses(weight, grid, spec, solver.norm)
    agree = 0
    for n in range(len(weight)):
        for g, first in enumerate(range(0, 40, spec.group_size)):
            values = [float(value) for value in weight[n, first : first + spec.group_size]]
            scale, zero = float(start.scale[n, g]), int(start.zero_point[n, g])
            loss, scale, zero = refined_group(values, scale, zero, spec, solver)
            agree += np.isclose(grid.scale[n, g], scale, rtol=1e-4) and grid.zero_point[n, g] == zero
            assert found[n, g] <= loss * abs(float(start.scale[n, g])) ** solver.norm * 1.2
    # The loop rounds in float64: where a value lies between two codes, a group may go another way.
    assert agree >= 0.9 * grid.scale.size


@SPECS
@pytest.mark.parametrize("seed", range(3))
def test_no_group_ends_with_more_than_it_started_with(spec, seed):
    weight = heavy(seed=seed)
    starts = [min_max_grid(weight, spec), clip_grid(weight, spec)]
    both = losses(weight, half_quadratic_grid(weight, spec, starts=starts), spec)
    for start in starts:
        alone = losses(weight, half_quadratic_grid(weight, spec, starts=[start]), spec)
        assert (alone <= losses(weight, start, spec) * (1 + 1e-5)).all()
        assert (both <= alone * (1 + 1e-5)).all()
    assert both.sum() < 0.99 * losses(weight, starts[0], spec).sum()


def test_a_zero_point_alone_does_not_move():
    """Its least squares lie within half a step of where it is: without the scale nothing is gained at 4 bits."""
    weight, spec = heavy((32, 64)), WeightSpec(4, 16, False)
    start = min_max_grid(weight, spec)
    grid = half_quadratic_grid(weight, spec, HalfQuadratic(move_scale=False))
    assert np.array_equal(grid.scale, start.scale)
    assert np.array_equal(grid.zero_point, start.zero_point)


def test_the_unit_of_the_weights_does_not_count():
    weight, spec = heavy(), WeightSpec(4, 16, False)
    grid, tiny = half_quadratic_grid(weight, spec), half_quadratic_grid(weight * np.float32(2**-20), spec)
    assert np.array_equal(grid.zero_point, tiny.zero_point)
    assert np.allclose(grid.scale * 2**-20, tiny.scale, rtol=1e-6)


def test_heads_share_their_scales():
    """Rows that share a scale are one group: as if they stood side by side."""
    weight, spec = heavy((8, 16)), WeightSpec(4, 16, False, head_size=4)
    grid = half_quadratic_grid(weight, spec)
    joined = half_quadratic_grid(weight.reshape(2, 64), WeightSpec(4, 64, False))
    assert np.allclose(grid.scale, np.repeat(joined.scale, 4, 0), rtol=1e-6)
    assert np.array_equal(grid.zero_point, np.repeat(joined.zero_point, 4, 0))


def test_blocks_of_rows_do_not_count(monkeypatch):
    weight, spec = heavy((10, 40)), WeightSpec(4, 16, False)
    whole = half_quadratic_grid(weight, spec)
    monkeypatch.setattr("qcompiler.numerics.half_quadratic._BLOCK", 100)
    parts = half_quadratic_grid(weight, spec)
    assert np.array_equal(whole.scale, parts.scale)
    assert np.array_equal(whole.zero_point, parts.zero_point)


@SPECS
def test_what_is_on_the_grid_stays_there(spec):
    """All zeros, a constant group, and weights that are codes times a scale: a loss of nothing cannot shrink."""
    weight = np.zeros((3, 40), np.float32)
    weight[1] = 0.5
    weight[2] = np.tile([-7, 7, 1, 0, -3, 2, 5, -6], 5)
    grid = half_quadratic_grid(weight, spec)
    assert np.isfinite(grid.scale).all()
    assert (losses(weight, grid, spec)[0] == 0).all()
    assert (losses(weight, grid, spec) <= losses(weight, min_max_grid(weight, spec), spec)).all()


def test_an_outlier_costs_the_others_little():
    """One weight of 64 is about four times as large as the next: squares follow it, the 0.7th power does not."""
    weight, spec = normal((32, 64), 1), WeightSpec(4, 64, False)
    weight[:, 9] = 10
    others = np.arange(64) != 9

    def error(grid: Grid):
        values = dequantize(quantize(weight, grid, spec), grid.scale, grid.zero_point, 64)
        return float(np.square(values - weight)[:, others].mean())

    start, squares = min_max_grid(weight, spec), clip_grid(weight, spec)
    refined = half_quadratic_grid(weight, spec, starts=[start, squares])
    assert error(refined) < error(squares) < error(start)
