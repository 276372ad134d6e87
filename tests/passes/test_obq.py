"""The pass `obq`: what it does with sites, options and records; the sweep itself is in test_greedy."""

from itertools import chain

import numpy as np
import pytest

from qcompiler.errors import NumericsError, SchemeError
from qcompiler.numerics.affine import Grid, WeightSpec, clip_grid, dequantize, min_max_grid, quantize
from qcompiler.numerics.greedy import greedy_sweep
from qcompiler.numerics.second_order import damped
from qcompiler.passes import load
from qcompiler.scheme import Scheme
from qcompiler.scheme_plan import SchemePlan
from qcompiler.statistics import LayerFacts
from tests.builders import (
    apply,
    context,
    decoder,
    decoder_groups,
    linear_model,
    normal,
    only,
    quantized,
    run,
    site_named,
    the_site,
    token_batches,
)

SPEC = WeightSpec(4, 16, False)


def facts(K=48, tokens=400, seed=0):
    x = normal((tokens, 12), seed) @ normal((12, K), seed + 1) + 0.3 * normal((tokens, K), seed + 2)
    x[:, ::9] *= 3
    return LayerFacts(x.astype(np.float64).T @ x.astype(np.float64), tokens)


def obq(threads=1, **options):
    return load("obq")(context(threads=threads), {key: str(value) for key, value in options.items()})


@pytest.mark.parametrize("options", [{}, {"clip": False}, {"percdamp": 0.2}], ids=str)
def test_codes_and_loss_are_those_of_the_sweep(options):
    weight, known = normal((10, 48), 3), facts()
    step = obq(**options)
    result = step.quantize(weight, SPEC, known)
    importance = np.diagonal(known.hessian).astype(np.float32)
    grid = clip_grid(weight, SPEC, importance) if step.options.clip else min_max_grid(weight, SPEC)
    H = damped(known.hessian, step.options.percdamp)
    codes, loss, _ = greedy_sweep(weight, H, grid, SPEC)
    assert np.array_equal(result.codes, codes)
    assert np.array_equal(result.grid.scale, grid.scale)
    assert np.allclose(result.loss, loss)
    rounded = weight - dequantize(quantize(weight, grid, SPEC), grid.scale, grid.zero_point, 16).astype(np.float64)
    assert result.loss.sum() < np.einsum("nk,kj,nj->", rounded, H, rounded)
    energy = np.einsum("nk,kj,nj->n", weight.astype(np.float64), known.hessian, weight)
    assert np.allclose(result.energy, energy, rtol=1e-5)


def test_the_hessian_counts():
    """With the identity in its place the codes are others, and worse."""
    weight, known = normal((10, 48), 3), facts()
    H = damped(known.hessian, 0.05)
    losses = []
    for hessian in (known.hessian, np.eye(48)):
        result = obq(clip=False).quantize(weight, SPEC, LayerFacts(hessian, 400))
        error = weight - dequantize(result.codes, result.grid.scale, result.grid.zero_point, 16).astype(np.float64)
        losses.append(np.einsum("nk,kj,nj->", error, H, error))
    assert losses[0] < 0.8 * losses[1]


def test_groups_of_a_convolution_are_rounded_as_if_alone():
    weight, spec = normal((12, 9), 4), WeightSpec(4, 9, False)
    hessians = np.stack([facts(9, seed=seed).hessian for seed in (5, 6, 7)])
    result = obq().quantize(weight, spec, LayerFacts(hessians, 400))
    for g in range(3):
        part = slice(4 * g, 4 * g + 4)
        alone = obq().quantize(weight[part], spec, LayerFacts(hessians[g], 400))
        assert np.array_equal(result.codes[part], alone.codes)
        assert np.allclose(result.loss[part], alone.loss)
        assert np.allclose(result.energy[part], alone.energy)


def test_columns_that_never_fire_keep_their_nearest_codes():
    weight, known = normal((10, 48), 6), facts(seed=7)
    dead = [0, 5, 30, 47]
    hessian = known.hessian.copy()
    hessian[dead] = 0
    hessian[:, dead] = 0
    result = obq().quantize(weight, SPEC, LayerFacts(hessian, known.tokens))
    grid = Grid(result.grid.scale, result.grid.zero_point)
    assert np.array_equal(result.codes[:, dead], quantize(weight, grid, SPEC)[:, dead])


def test_it_beats_rounding_on_what_the_layer_computes():
    """What counts is the output, on tokens that were not calibrated on."""
    mixing = normal((48, 48), 1)
    mixing[:, ::6] *= 3
    batches = [{"x": normal((300, 48), n) @ mixing} for n in (2, 3)]
    held_out = {"x": normal((100, 48), 4) @ mixing}
    errors = {}
    for algorithm in ("rtn", "obq"):
        model = linear_model(48, 32)
        (want,) = run(model, held_out)
        quantized(model, context(scheme="w4a16-g16-asym", batches=batches), algorithm)
        (got,) = run(model, held_out)
        errors[algorithm] = float(np.linalg.norm(got - want))
    assert errors["obq"] < 0.8 * errors["rtn"]


@pytest.mark.parametrize("symmetric", [True, False])
def test_three_bits_lie_between_two_and_four(symmetric):
    weight, known, loss = normal((10, 48), 3), facts(), {}
    for bits in (2, 3, 4):
        result = obq().quantize(weight, WeightSpec(bits, 16, symmetric), known)
        assert result.codes.max() <= 2**bits - 1
        loss[bits] = result.loss.sum()
    assert loss[4] < 0.5 * loss[3] < 0.25 * loss[2]


def test_all_sites_of_a_model_are_recorded():
    plan = SchemePlan(Scheme.parse("w4a16-g16-asym"), Scheme.parse("w8a16-g32-asym"), None)
    data = token_batches(2)
    model = decoder()
    apply("assign_scheme", model, context(plan=plan))
    result = apply("obq", model, context(plan=plan, batches=data))
    assert only(result, "quantized") == ["embed", *chain.from_iterable(decoder_groups()[:-1])]
    assert result.records[0].reason == "a lookup table has no activations, rounded to nearest"
    assert all(0 < record.metrics["relative_loss"] < 0.1 for record in result.records[1:])
    assert not apply("obq", model, context(plan=plan, batches=data)).modified


def test_what_is_too_wide_is_an_error_before_anything_is_done():
    model = decoder()
    plan = SchemePlan(Scheme.parse("w4a16-g16-asym"), None, None)
    ctx = context(plan=plan, batches=token_batches(1))
    apply("assign_scheme", model, ctx)
    wanted = (
        r"'l0_down' has K = 48 columns, more than 40, .* \(--set 'l0_down=float'\), allow it \(obq\{max_columns=48\}\)"
    )
    with pytest.raises(SchemeError, match=wanted):
        apply("obq", model, ctx, max_columns=40)
    assert all(site_named(model, name).quantized is None for name in ("l0_q", "l0_down"))
    assert apply("obq", model, ctx, max_columns=48).modified


def test_what_is_rounded_to_nearest_may_be_wide():
    model = decoder()
    scheme = Scheme.parse("w4a16-g16-asym")
    ctx = context(plan=SchemePlan(None, scheme, None))
    apply("assign_scheme", model, ctx)
    assert only(apply("obq", model, ctx, max_columns=8), "quantized") == ["embed"]


def test_floats_of_8_bits_are_rounded_to_nearest_and_it_says_so():
    spec = WeightSpec(8, 48, True, False, fp8=True)
    result = obq().quantize(normal((4, 48), 1), spec, facts())
    assert result.remark == "8-bit floats are rounded to nearest"


def test_a_hessian_that_cannot_be_inverted_is_an_error_that_names_the_site():
    hessian = np.eye(48)
    hessian[3, 4] = hessian[4, 3] = 3
    model, ctx = linear_model(48, 8), context(scheme="w4a16-g16")
    apply("assign_scheme", model, ctx)
    with pytest.raises(
        NumericsError, match=r"'fc': obq: with percdamp=0.05 the Hessian is not positive definite; give"
    ):
        load("obq")(ctx).quantize_sites([the_site(model)], LayerFacts(hessian, 100))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"percdamp": "2"}, "percdamp=2 is not between 0 and 1"),
        ({"percdamp": "nan"}, "percdamp=nan is not between"),
        ({"max_columns": "0"}, "max_columns=0 accepts no layer"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(SchemeError, match=message):
        load("obq")(context(), options)


def test_threads_change_nothing():
    results = [obq(threads=threads).quantize(normal((40, 48), 3), SPEC, facts()) for threads in (1, 3)]
    assert np.array_equal(results[0].codes, results[1].codes)
    assert np.array_equal(results[0].loss, results[1].loss)
