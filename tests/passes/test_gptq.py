"""The pass: what it does with sites, options and records. That the sweep is right is proved in test_gptq_proofs."""

from dataclasses import replace

import numpy as np
import pytest

from qcompiler.errors import NumericsError, SchemeError
from qcompiler.graph import read_weight
from qcompiler.numerics.affine import WeightSpec, clip_grid, dequantize, min_max_grid, quantize
from qcompiler.numerics.second_order import damped, shift, supported_share, sweep, upper_factor
from qcompiler.passes import load
from qcompiler.scheme import Scheme
from qcompiler.scheme_plan import Pattern, SchemePlan
from qcompiler.statistics import LayerFacts
from tests.builders import (
    apply,
    context,
    decoder,
    linear_model,
    normal,
    only,
    parse,
    quantized,
    run,
    site_named,
    the_site,
    token_batches,
)

SPEC = WeightSpec(4, 16, False)


def facts(K=48, tokens=400, seed=0):
    x = normal((tokens, 12), seed) @ normal((12, K), seed + 1) + 0.3 * normal((tokens, K), seed + 2)
    x[:, ::9] *= 5
    return LayerFacts(x.astype(np.float64).T @ x.astype(np.float64), tokens)


def gptq(threads=1, **options):
    return load("gptq")(context(threads=threads), {key: str(value) for key, value in options.items()})


def loss_of(weight, result, hessian, spec=SPEC):
    columns, size = weight.shape[1], spec.group_size
    scale, zero = (np.repeat(part, size, 1)[:, :columns] for part in (result.grid.scale, result.grid.zero_point))
    error = weight - (result.codes - zero.astype(np.float64)) * scale
    return np.einsum("nk,kj,nj->n", error, hessian, error)


@pytest.mark.parametrize(
    "options", [{}, {"act_order": False}, {"clip": False}, {"refine": 2}, {"percdamp": 0.1}], ids=str
)
def test_the_reported_loss_is_that_of_the_codes_on_the_damped_hessian(options):
    weight, known = normal((10, 48), 3), facts()
    step = gptq(**options)
    result = step.quantize(weight, SPEC, known)
    H = damped(known.hessian, step.options.percdamp)
    assert np.allclose(result.loss, loss_of(weight, result, H), rtol=1e-3)
    assert np.isclose(result.loss.sum(), loss_of(weight, result, H).sum(), rtol=1e-4)
    energy = np.einsum("nk,kj,nj->n", weight.astype(np.float64), known.hessian, weight)
    assert np.allclose(result.energy, energy, rtol=1e-5)
    assert result.remark == ""
    assert result.metrics(slice(2, 5))["relative_loss"] == pytest.approx(result.loss[2:5].sum() / energy[2:5].sum())


def test_each_refinement_helps():
    """Order, clipping and refitting: each lowers the mean loss over eight problems, at 2 bits by a lot."""
    spec = WeightSpec(2, 16, False)
    plain, ordered, clipped, refined = (
        [gptq(**options).quantize(normal((10, 48), s), spec, facts(seed=s)).loss.sum() for s in range(8)]
        for options in (
            {"act_order": False, "clip": False},
            {"clip": False},
            {},
            {"refine": 3},
        )
    )
    assert np.mean(ordered) < 0.7 * np.mean(plain)
    assert np.mean(clipped) < 0.8 * np.mean(ordered)
    assert np.mean(refined) < 0.95 * np.mean(clipped)


@pytest.mark.parametrize("options", [{}, {"act_order": False}, {"clip": False}, {"refine": 2}], ids=str)
def test_options_that_change_no_result(options):
    """The unit of the Hessian, threads and the lazy block."""
    weight, known = normal((10, 48), 4), facts(seed=5)
    reference = gptq(**options).quantize(weight, SPEC, known)
    others = [
        gptq(**options).quantize(weight, SPEC, LayerFacts(1e6 * known.hessian, known.tokens)),
        gptq(threads=3, **options).quantize(weight, SPEC, known),
        gptq(lazy_block=5, **options).quantize(weight, SPEC, known),
    ]
    for other in others:
        assert np.array_equal(other.codes, reference.codes)
        assert np.allclose(other.grid.scale, reference.grid.scale, rtol=1e-6)


def drifted(seed=0, K=48, tokens=400):
    """An activation [T, K] and what it would be in the float model: another mixture of its channels, a fifth away."""
    x = normal((tokens, K), seed, "float64") @ normal((K, K), seed + 1, "float64")
    return x, x + 0.2 * x @ normal((K, K), seed + 2, "float64") / K**0.5


def test_the_shifted_target_is_the_float_product_in_other_words():
    """``||Q X - W X_f||^2`` and ``||(Q - target) X||^2`` differ by the same for all Q."""
    x, wanted = drifted()
    wanted += normal(wanted.shape, 9)  # which nothing can make up for
    weight = normal((10, 48), 3)
    target = weight + shift(weight, (wanted - x).T @ x, x.T @ x)
    differences = []
    for seed in range(4):
        other = normal((10, 48), seed + 4)
        errors = x @ other.T - wanted @ weight.T, x @ (other - target).T
        differences.append(np.square(errors[0]).sum() - np.square(errors[1]).sum())
    assert np.allclose(differences, differences[0], rtol=1e-3)


@pytest.mark.parametrize("rows", [10, 60])
def test_the_target_makes_up_for_what_the_product_is_added_to(rows):
    """``||(Q X + r) - (W X_f + r_f)||^2`` and ``||(Q - target) X||^2`` differ by the same for all Q."""
    x, wanted = drifted()
    weight, missing = normal((rows, 48), 3), normal((len(x), rows), 8, "float64") + x[:, :1]
    drift, residual = (wanted - x).T @ x, missing.T @ x
    target = weight + shift(weight, drift, x.T @ x, residual)
    differences = []
    for seed in range(4):
        other = normal((rows, 48), seed + 4)
        errors = x @ other.T - wanted @ weight.T - missing, x @ (other - target).T
        differences.append(np.square(errors[0]).sum() - np.square(errors[1]).sum())
    assert np.allclose(differences, differences[0], rtol=1e-3)
    # All of it is supported by the data that it was found on, and none by those on which it is the other way round.
    change = target - weight
    assert supported_share(weight, change, drift, x.T @ x, residual) == pytest.approx(1, abs=1e-3)
    assert supported_share(weight, change, -drift, x.T @ x, -residual) == 0


def test_drift_is_made_up_for():
    """The more of it, the nearer the product comes to that of the float weight and the float activation."""
    x, wanted = drifted()
    weight = normal((10, 48), 3)
    known = LayerFacts(x.T @ x, len(x), (wanted - x).T @ x)
    errors = []
    for share in (0, 0.5, 1):
        result = gptq(drift=share, percdamp=0.001).quantize(weight, WeightSpec(8, 16, False), known)
        values = dequantize(result.codes, result.grid.scale, result.grid.zero_point, 16)
        errors.append(np.linalg.norm(x @ values.T - wanted @ weight.T))
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < 0.2 * errors[0]


def test_drift_that_held_out_data_deny_is_not_made_up_for():
    """Where it is the other way round there, nothing is; where it is half as large, half of it is."""
    x, wanted = drifted()
    weight, size = normal((10, 48), 3), len(x) // 2

    def known(factor):
        """The second half of the tokens drifts by `factor` times as much."""
        apart = LayerFacts(x[size:].T @ x[size:], size, factor * (wanted[size:] - x[size:]).T @ x[size:])
        seen = x[:size].T @ x[:size], (wanted[:size] - x[:size]).T @ x[:size]
        return LayerFacts(seen[0] + apart.hessian, len(x), seen[1] + apart.drift, apart)

    def codes(facts, drift):
        return gptq(drift=drift, percdamp=0.0).quantize(weight, WeightSpec(8, 16, False), facts).codes

    assert np.array_equal(codes(known(-1.0), 1.0), codes(known(-1.0), 0.0))
    without = replace(known(1.0), held_out=None)
    assert np.mean(codes(known(1.0), 1.0) != codes(without, 1.0)) < 0.01
    half = replace(known(0.5), held_out=None)
    assert np.mean(codes(known(0.5), 1.0) != codes(half, 0.5)) < 0.01
    assert np.mean(codes(known(0.5), 1.0) != codes(half, 1.0)) > 0.1


def test_without_drift_nothing_is_shifted():
    weight, known = normal((10, 48), 3), facts()
    still = LayerFacts(known.hessian, known.tokens, np.zeros((48, 48)))
    want = gptq().quantize(weight, SPEC, known)
    assert np.array_equal(gptq(drift=1.0).quantize(weight, SPEC, still).codes, want.codes)
    assert np.array_equal(gptq(drift=1.0).quantize(weight, SPEC, known).codes, want.codes)
    assert [gptq(drift=share).wants_drift for share in (0, 0.5)] == [False, True]


def test_columns_that_never_fire_keep_their_nearest_codes_and_disturb_nobody():
    weight, known = normal((10, 48), 6), facts(seed=7)
    dead = [0, 5, 30, 47]
    hessian = known.hessian.copy()
    hessian[dead] = 0
    hessian[:, dead] = 0
    result = gptq().quantize(weight, SPEC, LayerFacts(hessian, known.tokens))
    grid = clip_grid(weight, SPEC, np.diagonal(hessian).astype(np.float32))
    assert np.array_equal(result.grid.scale, grid.scale)
    assert np.array_equal(result.codes[:, dead], quantize(weight, grid, SPEC)[:, dead])
    # The others get the codes that they would get if these weights were on the grid already, without an error.
    scale, zero = np.repeat(grid.scale, 16, 1), np.repeat(grid.zero_point, 16, 1)
    exact = weight.copy()
    exact[:, dead] = ((result.codes - zero) * scale)[:, dead]
    step = gptq(clip=False)
    order = np.argsort(-np.diagonal(hessian), kind="stable")
    factor = upper_factor(damped(hessian, step.options.percdamp)[np.ix_(order, order)])
    again, loss = sweep(exact, factor, grid, SPEC, order)
    assert np.array_equal(again, result.codes)
    # And they do not fill the loss: their share of it is damping alone.
    assert 0.95 * result.loss.sum() < loss.sum() < result.loss.sum()


def test_no_tokens_at_all_is_rounding_to_nearest():
    weight = normal((10, 48), 8)
    result = gptq().quantize(weight, SPEC, LayerFacts(np.zeros((48, 48)), 0))
    grid = clip_grid(weight, SPEC)
    assert np.array_equal(result.codes, quantize(weight, grid, SPEC))
    assert result.metrics(slice(None))["relative_loss"] == 0


def indefinite(below):
    """A Hessian whose least eigenvalue is -`below` times the mean of its diagonal, which is 1."""
    H = np.eye(48)
    H[3, 4] = H[4, 3] = 1 + below
    return H


def test_damping_that_had_to_grow_is_in_the_record():
    """0.03 times 1.1 is not enough against -0.2, 0.3 times 1.1 is."""
    result = gptq(percdamp=0.03).quantize(normal((4, 48), 9), SPEC, LayerFacts(indefinite(0.2), 100))
    assert result.remark == "damping grew to 0.3"
    H = damped(indefinite(0.2), 0.3)
    assert np.allclose(result.loss, loss_of(normal((4, 48), 9), result, H), rtol=1e-4)


def test_damping_starts_from_zero_where_none_is_wanted():
    result = gptq(percdamp=0).quantize(normal((4, 48), 9), SPEC, LayerFacts(indefinite(0.005), 100))
    assert result.remark == "damping grew to 0.01"


def test_past_the_limit_of_damping_there_is_an_error_that_names_the_sites():
    model = linear_model(48, 8)
    ctx = context(scheme="w4a16-g16")
    apply("assign_scheme", model, ctx)
    step = load("gptq")(ctx, {"percdamp": "0.1"})
    with pytest.raises(NumericsError, match=r"'fc': gptq: .* even with damping 1; give more .* float with --ignore"):
        step.quantize_sites([the_site(model)], LayerFacts(indefinite(3), 100))
    assert the_site(model).quantized is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"percdamp": "2"}, "percdamp=2 is not between 0 and 1"),
        ({"percdamp": "-0.1"}, "percdamp=-0.1 is not between"),
        ({"percdamp": "nan"}, "percdamp=nan is not between"),
        ({"lazy_block": "0"}, "lazy_block=0 have to be at least 0 and 1"),
        ({"refine": "-1"}, "refine=-1 and lazy_block=128 have to be"),
        ({"drift": "1.5"}, "drift=1.5 is not between 0 and 1"),
        ({"act_order": "maybe"}, "option act_order=maybe is not a bool"),
        ({"damp": "1"}, "has no option 'damp'; it has: percdamp, act_order, clip, refine, lazy_block, drift"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(SchemeError, match=message):
        load("gptq")(context(), options)


def test_sites_that_read_the_same_activation_are_swept_together_and_recorded_one_by_one():
    """Rows do not see each other, so the codes are those of each site on its own; so are the figures."""
    text = """g (float[B,48] x) => (float[B,16] y, float[B,32] z, float[B,8] u) {
        [a] y = MatMul(x, wa) [b] z = MatMul(x, wb) [c] u = MatMul(x, wc)
    }"""
    weights = {"wa": normal((48, 16), 1), "wb": 3 * normal((48, 32), 2), "wc": normal((48, 8), 3)}
    batches = [{"x": normal((200, 48), n) @ normal((48, 48), 9)} for n in (4, 5)]
    model = parse(text, weights)
    result = apply("gptq", quantized_plan(model), context(scheme="w4a16-g16-asym", batches=batches))
    assert [record.site for record in result.records] == ["a", "b", "c"]
    assert len({record.metrics["relative_loss"] for record in result.records}) == 3
    for record in result.records:
        alone = parse(text, weights)
        scheme = Scheme.parse("w4a16-g16-asym")
        only_one = context(batches=batches, plan=SchemePlan(None, overrides=((Pattern(record.site), scheme),)))
        (single,) = apply("gptq", quantized_plan(alone, only_one), only_one).records
        codes = [site_named(each, record.site).quantized.packed for each in (alone, model)]
        assert np.array_equal(*codes)
        for name, figure in single.metrics.items():
            assert record.metrics[name] == pytest.approx(figure, rel=1e-5), name


def quantized_plan(model, ctx=None):
    """The model with its schemes assigned."""
    apply("assign_scheme", model, ctx or context(scheme="w4a16-g16-asym"))
    return model


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_it_beats_rounding_on_what_the_layer_computes(dtype):
    """8 channels of 48 carry most of the energy; what counts is the output, on tokens that were not calibrated on."""
    mixing = normal((48, 48), 1)
    mixing[:, ::6] *= 8
    batches = [{"x": (normal((300, 48), n) @ mixing).astype(dtype)} for n in (2, 3)]
    held_out = {"x": (normal((100, 48), 4) @ mixing).astype(dtype)}
    errors = {}
    for algorithm in ("rtn", "gptq"):
        model = linear_model(48, 32, dtype=dtype)
        (want,) = run(model, held_out)
        quantized(model, context(scheme="w4a16-g16-asym", batches=batches), algorithm)
        (got,) = run(model, held_out)
        errors[algorithm] = np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want.astype(np.float64))
    assert errors["gptq"] < 0.5 * errors["rtn"] < 0.05


@pytest.mark.parametrize("form", ["sym", "asym"])
def test_three_bits_lie_between_two_and_four_and_beat_rounding(form):
    """What counts is the loss on the Hessian, the mean of four problems."""
    loss = {}
    for bits in (2, 3, 4):
        spec = WeightSpec(bits, 16, form == "sym")
        for name in ("gptq", "rtn"):
            step = load(name)(context(), {})
            loss[name, bits] = 0.0
            for seed in range(4):
                weight, known = normal((10, 48), seed), facts(seed=seed)
                result = step.quantize(weight, spec, known)
                assert result.codes.max() <= spec.format.qmax
                loss[name, bits] += loss_of(weight, result, known.hessian, spec).sum()
    assert loss["gptq", 4] < 0.5 * loss["gptq", 3] < 0.25 * loss["gptq", 2]
    assert loss["gptq", 3] < 0.5 * loss["rtn", 3]


def test_tables_and_bodies_are_rounded_on_clipped_grids():
    plan = SchemePlan(Scheme.parse("w4a16-g32-asym"), Scheme.parse("w4a16-g32-asym"), Scheme.parse("w4a16-g32-asym"))
    model = decoder(1)
    weight = read_weight(site_named(model, "embed"))
    ctx = context(plan=plan, batches=token_batches(1))
    apply("assign_scheme", model, ctx)
    result = apply("gptq", model, ctx)
    assert result.modified
    record = result.records[0]
    assert (record.site, record.action) == ("embed", "quantized")
    assert record.reason == "a lookup table has no activations, rounded to nearest"
    assert "loss" not in record.metrics
    tensor = site_named(model, "embed").quantized
    grid = clip_grid(weight, tensor.spec)
    assert np.array_equal(tensor.codes(), quantize(weight, grid, tensor.spec))
    assert not np.array_equal(grid.scale, min_max_grid(weight, tensor.spec).scale)
    again = apply("gptq", model, ctx)
    assert not again.modified
    assert again.records == ()


def test_only_what_is_assigned_is_quantized():
    model = decoder(1)
    ctx = context(scheme="w4a16-g16-asym", batches=token_batches(1))
    result = apply("gptq", model, ctx)
    assert (result.modified, result.records) == (False, ())
    assert only(result, "quantized") == []
