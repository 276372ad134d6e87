"""Smoothing leaves what a model computes, and lessens what W8A8 changes about it."""

import numpy as np
import pytest

from qcompiler.errors import CalibrationError, NumericsError, SchemeError
from qcompiler.foldings import find_foldings
from qcompiler.graph import read_weight
from qcompiler.numerics.activation import ActivationSpec, activation_grid, fake_quantize
from qcompiler.passes import load
from qcompiler.passes.smoothquant import smoothing_factors
from qcompiler.sites import find_sites
from tests.builders import (
    Ticks,
    apply,
    assigned,
    context,
    decoder,
    loud_batches,
    loud_model,
    normal,
    only,
    parse,
    run,
    serialized,
    site_named,
    token_batches,
    values_of,
    with_outputs,
)

K, N = 32, 24
TOKEN, STATIC = "w8a8-dynamic-token", "w8a8-static"


def smoothed(model, data=None, ctx=None, check="false", **options):
    return apply("smoothquant", model, ctx or context(batches=data or loud_batches()), check=check, **options)


def rounded_rows(x):
    """Each row on its own symmetric grid of 255 codes."""
    scale = np.abs(x).max(-1, keepdims=True) / 127
    return np.rint(x / scale) * scale


def rounded_tensor(x):
    scale, zero = activation_grid(x.min(), x.max(), ActivationSpec())
    return fake_quantize(x, scale, zero, ActivationSpec())


def w8a8_error(model, round_activation, feeds):
    """Relative squared error of x W^T with both rounded to 8 bits, over all sites."""
    error = energy = 0.0
    for site in find_sites(model)[0]:
        (x,) = run(with_outputs(model, [site.input.name]), feeds, outputs=[site.input.name])
        weight = read_weight(site)
        wanted = x @ weight.T
        error += np.square(round_activation(x) @ rounded_rows(weight).T - wanted).sum()
        energy += np.square(wanted).sum()
    return error / energy


def test_the_factors_are_those_of_the_paper():
    x, w = np.array([4.0, 0.25, 9.0, 0.25, 0.25]), np.array([1.0, 4.0, 9.0, 4.0, 0.0])
    assert smoothing_factors(x, w, 0.5).tolist() == [2.0, 0.25, 1.0, 0.25, 1.0]
    assert smoothing_factors(x, w, 1.0)[:3].tolist() == [4.0, 0.25, 9.0]
    assert smoothing_factors(x, w, 0.0)[:3].tolist() == [1.0, 0.25, 1 / 9]


def test_a_channel_that_calibration_found_silent_counts_as_a_quiet_one():
    """As the median one: it is not amplified beside it, whatever other data make of it."""
    x, w = np.array([0.0, 1e-6, 0.2, 1.0, 1.0, 2.0, 50.0]), np.ones(7)
    assert smoothing_factors(x, w, 1.0).tolist() == [1, 1, 1, 1, 1, 2, 50]
    assert smoothing_factors(np.zeros(3), np.ones(3), 0.7).tolist() == [1, 1, 1]


def test_factors_come_from_the_largest_magnitude_of_all_tokens_and_all_readers():
    model, data = loud_model(TOKEN), loud_batches()
    n = values_of(model, "n", data)
    old = [read_weight(site) for site in find_sites(model)[0]]
    s = smoothing_factors(np.abs(n).max(0), np.abs(np.concatenate(old)).max(0), 0.7)
    result = smoothed(model, data, alpha=0.7)
    for site, before in zip(find_sites(model)[0], old, strict=True):
        assert np.allclose(read_weight(site), before * s, rtol=1e-5)
    (record,) = result.records
    assert (record.site, record.action, record.reason) == ("a", "scaled", "smoothed with b")
    assert record.metrics == {"alpha": 0.7, "largest_factor": pytest.approx(s.max())}
    assert result.modified


def test_padding_is_not_measured():
    data = token_batches(3)
    model, trimmed = assigned(decoder(), TOKEN), assigned(decoder(), TOKEN)
    smoothed(model, data)
    loud = [dict(feeds) for feeds in data]
    for feeds in loud:
        feeds["input_ids"] = np.where(feeds["attention_mask"] > 0, feeds["input_ids"], 7)
    smoothed(trimmed, loud)
    assert np.allclose(read_weight(site_named(model, "l0_q")), read_weight(site_named(trimmed, "l0_q")), rtol=1e-6)


@pytest.mark.parametrize(("scheme", "rounding"), [(TOKEN, rounded_rows), (STATIC, rounded_tensor)])
@pytest.mark.parametrize("search", [False, True])
def test_smoothing_lessens_the_error_of_w8a8(scheme, rounding, search):
    """With channels forty times as loud as the rest, to less than a fifth on data that was not measured."""
    plain, model = loud_model(scheme), loud_model(scheme)
    feeds = loud_batches(1, seed=99)[0]
    smoothed(model, search=search)
    assert w8a8_error(model, rounding, feeds) < 0.2 * w8a8_error(plain, rounding, feeds)
    for got, wanted in zip(run(model, feeds), run(plain, feeds), strict=True):
        assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize(("scheme", "rounding"), [(TOKEN, rounded_rows), (STATIC, rounded_tensor)])
def test_the_search_finds_the_alpha_of_the_least_error(scheme, rounding):
    """The same search by brute force: the pass once for each alpha, the error measured in the model."""
    (data,) = [loud_batches(1)]
    errors = {}
    for step in range(21):
        model = loud_model(scheme, loud=6.0)
        smoothed(model, data, alpha=step / 20)
        errors[step / 20] = w8a8_error(model, rounding, data[0])
    model = loud_model(scheme, loud=6.0)
    before = w8a8_error(model, rounding, data[0])
    metrics = smoothed(model, data, search=True).records[0].metrics
    assert metrics["relative_error_before"] == pytest.approx(before, rel=1e-3)
    assert metrics["relative_error"] == pytest.approx(min(errors.values()), rel=1e-3)
    assert errors[metrics["alpha"]] == pytest.approx(min(errors.values()), rel=1e-3)
    assert w8a8_error(model, rounding, data[0]) == pytest.approx(metrics["relative_error"], rel=1e-3)


def test_the_search_leaves_alone_what_it_cannot_better():
    """Values and weights of magnitude 1 and 127: every row is on its grid already."""
    gamma = np.ones(K, np.float32)
    codes = np.sign(normal((K, N), 3))
    codes[0] = 127
    text = f"""g (float[B,{K}] x) => (float[B,{N}] y) {{ h = Mul(x, gamma) [a] y = MatMul(h, w) }}"""
    model = assigned(parse(text, {"gamma": gamma, "w": codes}), TOKEN)
    before = serialized(model)
    x = np.sign(normal((20, K), 5))
    x[:, 0] = 127
    result = smoothed(model, [{"x": x}], search=True)
    (record,) = result.records
    assert (record.action, record.reason) == ("skipped", "no alpha lessens the error")
    assert record.metrics["relative_error"] == record.metrics["relative_error_before"]
    assert not result.modified
    assert serialized(model) == before


def test_a_decoder_is_smoothed_where_that_is_legal():
    model, data = assigned(decoder(), TOKEN), token_batches(3)
    expected = run(decoder(), data[0])[0]
    result = smoothed(model, data)
    assert only(result, "scaled") == [f"l{i}_{name}" for i in (0, 1) for name in ("q", "o", "gate", "down")]
    assert only(result, "skipped") == []
    assert np.abs(run(model, data[0])[0] - expected).max() <= 1e-5 * np.abs(expected).max()


def test_only_sites_whose_activations_the_graph_quantizes_are_looked_at():
    model = assigned(assigned(decoder(), "w4a16"), TOKEN, ("l1_o",))
    assert [record.site for record in smoothed(model, token_batches(2)).records] == ["l1_o"]
    model = assigned(decoder(), "w4a16", ("l0_down", "l1_o"))
    assert [record.site for record in smoothed(model, token_batches(2)).records] == ["l0_down", "l1_o"]
    result = smoothed(decoder(), token_batches(2))
    assert (result.records, result.modified) == ((), False)


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8", "w8a8-fp8", "w8a16int", "w8a8-dynamic-tensor"])
def test_the_search_runs_for_every_scheme(scheme):
    model = loud_model(scheme)
    (record,) = smoothed(model, search=True).records
    assert record.metrics["relative_error"] <= record.metrics["relative_error_before"]


def residual_model(loud=1.0):
    """A normalization whose result is added to something too, so that nothing can be folded into it."""
    text = f"""g (float[B,S,{K}] x) => (float[B,S,{N}] y, float[B,S,{K}] r) {{
        [norm] n = LayerNormalization(x, gamma) [a] y = MatMul(n, w) [add] r = Add(n, x) }}"""
    gamma = 1 + normal(K, 1, scale=0.3)
    gamma[[3, 11, 30]] *= loud
    return assigned(parse(text, {"gamma": gamma, "w": normal((K, N), 2)}), TOKEN)


INSERTED = ["LayerNormalization", "Mul", "MatMul", "Add"]


@pytest.mark.parametrize("options", [{"insert": "never"}, {}, {"insert": "worth", "search": True}], ids=str)
def test_what_cannot_be_folded_is_skipped(options):
    """Where that is not wanted, or, with channels of about one loudness, where the error would not halve."""
    model = residual_model()
    before = serialized(model)
    result = smoothed(model, **options)
    (record,) = result.records
    assert (record.site, record.action) == ("a", "skipped")
    assert record.reason.startswith("not smoothed: ")
    assert "'n' has another reader: Add 'add'" in record.reason
    assert not result.modified
    assert serialized(model) == before
    if options.get("insert") != "never":
        error = w8a8_error(residual_model(), rounded_rows, loud_batches()[0])
        assert record.metrics["relative_error_before"] == pytest.approx(error, rel=0.2)
        assert record.metrics["relative_error"] == record.metrics["relative_error_before"]


@pytest.mark.parametrize("loud", [1.0, 40.0])
def test_a_node_is_inserted_where_it_always_may_be(loud):
    model = residual_model(loud)
    result = smoothed(model, insert="always")
    assert [node.op_type for node in model.graph] == INSERTED
    assert result.records[0].reason == "a Mul was inserted"
    assert result.modified
    for got, wanted in zip(run(model, loud_batches()[0]), run(residual_model(loud), loud_batches()[0]), strict=True):
        assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("search", [False, True])
def test_a_node_is_inserted_where_the_error_at_least_halves(search):
    """The error is measured anew in each model, on the rows that the pass has seen."""
    (data,) = [loud_batches(1)]
    inserted = []
    for loud in (1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 40.0):
        best = plain = w8a8_error(residual_model(loud), rounded_rows, data[0])
        for alpha in [step / 20 for step in range(21)] if search else [0.7]:
            always = residual_model(loud)
            smoothed(always, data, insert="always", alpha=alpha)
            best = min(best, w8a8_error(always, rounded_rows, data[0]))
        model = residual_model(loud)
        (record,) = smoothed(model, data, search=search).records
        inserted.append("Mul" in [node.op_type for node in model.graph])
        assert inserted[-1] == (best < 0.5 * plain)
        assert record.action == ("scaled" if inserted[-1] else "skipped")
        assert record.metrics["relative_error_before"] == pytest.approx(plain, rel=1e-3)
        assert record.metrics["relative_error"] == pytest.approx(best if inserted[-1] else plain, rel=1e-3)
    assert inserted == sorted(inserted)
    assert set(inserted) == {False, True}


def test_what_is_folded_needs_not_halve_the_error():
    """`insert` is about nodes alone."""
    for insert in ("never", "worth", "always"):
        model = loud_model(TOKEN, loud=1.0)
        (record,) = smoothed(model, insert=insert).records
        assert (record.action, record.reason) == ("scaled", "smoothed with b")
        assert [node.op_type for node in model.graph] == ["LayerNormalization", "MatMul", "MatMul"]


def test_a_site_inside_a_body_is_skipped():
    text = f"""g (float[B,{K}] x, bool c) => (float[B,{N}] y) {{ n = LayerNormalization(x, gamma)
        [if] y = If (c) <then_branch = then () => (float[B,{N}] t) {{ [inner] t = MatMul(n, w) }},
                         else_branch = other () => (float[B,{N}] e) {{ e = MatMul(n, v) }}> }}"""
    weights = {"gamma": np.ones(K, np.float32), "w": normal((K, N), 1), "v": normal((K, N), 2)}
    model = assigned(parse(text, weights), TOKEN)
    (record,) = smoothed(model).records
    assert record.action == "skipped"
    assert "inside the body of if" in record.reason


def test_nothing_to_measure_with_is_an_error_only_where_something_is_to_be_measured():
    with pytest.raises(CalibrationError, match="needs calibration data"):
        apply("smoothquant", loud_model(TOKEN), context())
    assert not apply("smoothquant", residual_model(), context(), insert="never").modified


def test_the_result_does_not_depend_on_threads():
    found = []
    for threads in (1, 3):
        model = assigned(decoder(), TOKEN)
        smoothed(model, ctx=context(batches=token_batches(4), threads=threads), search=True, rows=16)
        found.append(serialized(model))
    assert found[0] == found[1]


def test_samples_that_do_not_fit_in_memory_are_taken_in_turns():
    """Each turn measures a model that the turns before it have rescaled, which moves nothing but the last digits."""
    found = []
    for limit in (None, 1):
        ticks = Ticks()
        ctx = context(batches=token_batches(4), max_memory=limit, progress_to=ticks)
        records = smoothed(assigned(decoder(), TOKEN), ctx=ctx, search=True, rows=16).records
        found.append([record.metrics["alpha"] for record in records])
        assert len(ticks.seen) == (4 if limit is None else 32)
    assert found[0] == found[1]


def test_numbers_that_are_not_finite_are_named():
    data = loud_batches()
    data[1]["x"][0, 0, 0] = np.nan
    with pytest.raises(NumericsError, match="'a' reads"):
        smoothed(loud_model(TOKEN), data)


@pytest.mark.parametrize("options", [{"alpha": 1.5}, {"alpha": -0.1}, {"rows": 0}, {"insert": True}], ids=str)
def test_options_that_mean_nothing(options):
    with pytest.raises(SchemeError, match="smoothquant"):
        smoothed(loud_model(TOKEN), **options)


def test_progress_and_text():
    ticks = Ticks()
    ctx = context(batches=loud_batches(), progress_to=ticks)
    smoothed(loud_model(TOKEN), ctx=ctx)
    assert ticks.seen == [("smoothquant", i, 4) for i in range(1, 5)]
    assert str(load("smoothquant")(ctx, {"search": "true"})) == "smoothquant{search=True}"


def test_a_folding_that_is_smoothed_twice_is_balanced_the_second_time():
    """X / s and s W have the share alpha between them already: s is 1, but for channels that are below the median."""
    model = loud_model(TOKEN)
    (folding,) = find_foldings(model, find_sites(model)[0])
    moved, before = [], [read_weight(site) for site in folding.sites]
    for _ in range(2):
        smoothed(model)
        after = [read_weight(site) for site in folding.sites]
        moved.append(max(float(np.abs(np.log(new / old)).max()) for new, old in zip(after, before, strict=True)))
        before = after
    assert moved[1] < 0.2 < 2 < moved[0]


def test_what_would_get_worse_is_left_alone():
    """alpha = 0 evens out the weights at the cost of the activations, which are even already."""
    weight = normal((K, N), 2)
    weight[0] *= 100
    text = f"g (float[B,{K}] x) => (float[B,{N}] y) {{ n = LayerNormalization(x, gamma) y = MatMul(n, w) }}"

    def model():
        return assigned(parse(text, {"gamma": np.ones(K, np.float32), "w": weight}), TOKEN)

    assert smoothed(model(), alpha=0.0).records[0].action == "scaled"
    checked = model()
    before = serialized(checked)
    (record,) = smoothed(checked, check="true", alpha=0.0).records
    assert (record.action, record.reason) == ("skipped", "no alpha lessens the error")
    assert serialized(checked) == before
    (record,) = smoothed(checked, check="true", alpha=0.5).records
    assert record.action == "scaled"
    assert record.metrics["relative_error"] < record.metrics["relative_error_before"]


def test_convolutions_are_left_to_another_pass():
    text = f"g (float[B,{K},T] x) => (float[B,{N},T] y) {{ y = Conv(x, w) }}"
    model = assigned(parse(text, {"w": normal((N, K, 1), 2)}), TOKEN)
    assert smoothed(model, {"x": normal((2, K, 8), 1)}, insert="always").records == ()
