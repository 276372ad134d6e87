"""Convolutions: groups that are swept side by side get what each would get alone, and outputs gain by it."""

import numpy as np
import pytest

from qcompiler.errors import NumericsError
from qcompiler.numerics.affine import Grid, WeightSpec, clip_grid, dequantize, min_max_grid, quantize
from qcompiler.numerics.second_order import damped, sweep, sweep_groups, upper_factor
from qcompiler.passes import load
from qcompiler.statistics import LayerFacts
from tests.builders import apply, context, normal, only, parse, quantized, run

GROUPS, ROWS, K = 5, 4, 27
SPECS = [WeightSpec(4, K, False), WeightSpec(8, K, True, False), WeightSpec(2, K, True)]
SPEC = pytest.mark.parametrize("spec", SPECS, ids=str)


def hessians(seed, groups=GROUPS, columns=K):
    """Of correlated inputs, each group with a loudness of its own, float64 [groups, K, K]."""
    x = normal((groups, 200, columns), seed, "float64") @ normal((groups, columns, columns), seed + 1, "float64")
    x *= 10.0 ** np.arange(groups)[:, None, None]
    return x.swapaxes(1, 2) @ x


def problem(spec, seed=0):
    weight = normal((GROUPS * ROWS, K), seed)
    return weight, hessians(seed + 10), min_max_grid(weight, spec)


def gptq(**options):
    return load("gptq")(context(), {key: str(value) for key, value in options.items()})


def errors(weight, codes, grid, spec):
    error = weight - dequantize(codes, grid.scale, grid.zero_point, spec.group_size).astype(np.float64)
    return error.reshape(GROUPS, ROWS, K)


@SPEC
@pytest.mark.parametrize("act_order", [False, True])
def test_each_group_is_swept_as_if_alone(spec, act_order):
    weight, H, grid = problem(spec)
    codes, loss, energy = sweep_groups(weight, H, grid, spec, act_order=act_order, percdamp=0.05)
    assert codes.dtype == np.uint8
    for g in range(GROUPS):
        part = slice(g * ROWS, (g + 1) * ROWS)
        order = np.argsort(-np.diagonal(H[g]), kind="stable") if act_order else np.arange(K)
        factor = upper_factor(damped(H[g], 0.05)[np.ix_(order, order)])
        alone, own = sweep(weight[part], factor, Grid(grid.scale[part], grid.zero_point[part]), spec, order)
        assert np.array_equal(codes[part], alone)
        assert np.allclose(loss[part], own, rtol=1e-4)
    # And the figures are the quadratic forms that they stand for.
    error = errors(weight, codes, grid, spec)
    H_damped = np.stack([damped(each, 0.05) for each in H])
    assert np.allclose(loss, np.einsum("grk,gkl,grl->gr", error, H_damped, error).reshape(-1), rtol=1e-3)
    wide = weight.reshape(GROUPS, ROWS, K).astype(np.float64)
    assert np.allclose(energy, np.einsum("grk,gkl,grl->gr", wide, H, wide).reshape(-1), rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"act_order": False}, {"clip": False}, {"refine": 2}], ids=str)
def test_the_pass_treats_a_group_as_a_layer_of_its_own(options):
    spec = SPECS[0]
    weight, H, _ = problem(spec, 1)
    step = gptq(**options)
    result = step.quantize(weight, spec, LayerFacts(H, 200))
    for g in range(GROUPS):
        part = slice(g * ROWS, (g + 1) * ROWS)
        alone = step.quantize(weight[part], spec, LayerFacts(H[g], 200))
        assert np.array_equal(result.codes[part], alone.codes)
        assert np.allclose(result.grid.scale[part], alone.grid.scale, rtol=1e-6)
        assert np.array_equal(result.grid.zero_point[part], alone.grid.zero_point)
        assert np.allclose(result.loss[part], alone.loss, rtol=1e-4)
        assert np.allclose(result.energy[part], alone.energy, rtol=1e-4)
    assert result.remark == ""


def test_refinement_lessens_the_loss():
    spec = SPECS[2]
    weight, H, _ = problem(spec, 2)
    plain, refined = (gptq(refine=rounds).quantize(weight, spec, LayerFacts(H, 200)).loss for rounds in (0, 2))
    assert (refined <= plain * (1 + 1e-4)).all()
    assert refined.sum() < 0.95 * plain.sum()


def test_columns_and_groups_that_never_fire_keep_their_nearest_codes():
    spec = SPECS[0]
    weight, H, _ = problem(spec, 3)
    H[1, [0, 7]] = 0
    H[1, :, [0, 7]] = 0
    H[4] = 0
    result = gptq().quantize(weight, spec, LayerFacts(H, 200))
    nearest = quantize(weight, result.grid, spec)
    assert np.array_equal(result.codes[ROWS : 2 * ROWS, [0, 7]], nearest[ROWS : 2 * ROWS, [0, 7]])
    assert np.array_equal(result.codes[4 * ROWS :], nearest[4 * ROWS :])
    assert np.array_equal(result.grid.scale[4 * ROWS :], clip_grid(weight[4 * ROWS :], spec).scale)
    assert not np.array_equal(result.codes[: 4 * ROWS], nearest[: 4 * ROWS])
    assert (result.energy[4 * ROWS :] == 0).all()
    assert result.metrics(slice(4 * ROWS, None))["relative_loss"] == 0


def indefinite(below):
    """One group of three has a least eigenvalue of -`below`, its diagonal is 1."""
    H = np.stack([np.eye(K)] * 3)
    H[1, 3, 4] = H[1, 4, 3] = 1 + below
    return LayerFacts(H, 100)


def test_damping_that_had_to_grow_is_in_the_remark():
    weight = normal((6, K), 9)
    result = gptq(percdamp=0.03).quantize(weight, SPECS[0], indefinite(0.2))
    assert result.remark == "damping grew to 0.3"
    error = weight - dequantize(result.codes, result.grid.scale, result.grid.zero_point, K).astype(np.float64)
    damp = np.stack([damped(each, 0.3) for each in indefinite(0.2).hessian])
    want = np.einsum("grk,gkl,grl->gr", error.reshape(3, 2, K), damp, error.reshape(3, 2, K))
    assert np.allclose(result.loss, want.reshape(-1), rtol=1e-4)
    assert gptq(percdamp=0).quantize(weight, SPECS[0], indefinite(0.005)).remark == "damping grew to 0.01"
    for percdamp, tried in ((0.1, "1"), (0.03, "0.3"), (1, "1")):
        with pytest.raises(NumericsError, match=f"even with damping {tried}; give more"):
            gptq(percdamp=percdamp).quantize(weight, SPECS[0], indefinite(3))


CONVOLUTIONS = {
    "dense": ("<pads = [1, 1, 1, 1]>", (12, 6, 3, 3)),
    "strides": ("<strides = [2, 2], pads = [1, 1, 1, 1]>", (12, 6, 3, 3)),
    "groups": ("<group = 3, pads = [1, 1, 1, 1]>", (12, 2, 3, 3)),
    "depthwise": ("<group = 6, pads = [1, 1, 1, 1]>", (6, 1, 3, 3)),
    "depthwise with a multiplier": ("<group = 6, strides = [1, 2]>", (12, 1, 3, 3)),
}


def images(seed, size=12):
    """Images whose neighbours and channels are alike, [4, 6, size, size]."""
    x = normal((4, 6, size + 4, size + 4), seed)
    x = sum(np.roll(x, shift, (2, 3)) for shift in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (0, 2)))
    mixing = np.eye(6, dtype=np.float32) + 0.5 * normal((6, 6), 77)
    return {"x": np.ascontiguousarray(np.einsum("bchw,cd->bdhw", x, mixing)[..., 4:, 4:])}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_a_convolution_computes_better_than_with_rounded_weights(case):
    """On other images than those it was calibrated on, in the mean over four weights."""
    attributes, shape = CONVOLUTIONS[case]
    ratios = []
    for seed in range(4):
        squares = {}
        for algorithm in ("rtn", "gptq"):
            text = f"g (float[B,6,H,W] x) => (float y) {{ [conv] y = Conv {attributes} (x, w) }}"
            model = parse(text, {"w": normal(shape, seed)})
            held_out = images(seed + 50)
            (want,) = run(model, held_out)
            ctx = context(scheme="w8a8-static", batches=[images(seed + 20), images(seed + 30)], target="portable")
            if algorithm == "rtn":
                quantized(model, ctx, "rtn", clip=True)
            else:
                apply("assign_scheme", model, ctx)
                assert only(apply("gptq", model, ctx), "quantized") == ["conv"]
            squares[algorithm] = np.square(run(model, held_out)[0].astype(np.float64) - want).sum()
        ratios.append(squares["gptq"] / squares["rtn"])
    assert np.mean(ratios) < 0.9
