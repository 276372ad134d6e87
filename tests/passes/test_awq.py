"""AWQ leaves what a model computes, and lessens what rounding its weights changes about it."""

import numpy as np
import pytest

from qcompiler.errors import CalibrationError, NumericsError, SchemeError
from qcompiler.foldings import find_foldings
from qcompiler.graph import SCHEME_KEY, read_weight
from qcompiler.numerics.affine import WeightSpec, dequantize, min_max_grid, quantize
from qcompiler.passes import load
from qcompiler.passes.awq import awq_factors, relative_magnitudes, scaled_loss
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
    quantized,
    run,
    serialized,
    site_named,
    token_batches,
    values_of,
)

K, N = 32, 24
W4, SPEC = "w4a16-g16-asym", WeightSpec(4, 16, False)


def awq(model, data=None, ctx=None, **options):
    return apply("awq", model, ctx or context(batches=data or loud_batches()), **options)


def rounded(weight, spec):
    grid = min_max_grid(weight, spec)
    return dequantize(quantize(weight, grid, spec), grid.scale, grid.zero_point, spec.group_size)


def output_error(model, data):
    """Relative squared error of X W^T with W as it is in the model, rounded; over all sites with a scheme."""
    error = energy = 0.0
    for site in find_sites(model)[0]:
        if SCHEME_KEY in site.node.metadata_props:
            x, weight = values_of(model, site.input.name, data), read_weight(site)
            error += np.square(x @ (rounded(weight, SPEC) - weight).astype(np.float64).T).sum()
            energy += np.square(x @ weight.astype(np.float64).T).sum()
    return error / energy


def test_the_factors_are_those_of_the_paper():
    x = np.array([4.0, 1.0, 16.0, 1.0, 1.0])
    assert np.allclose(awq_factors(x, None, 0.5), np.array([2, 1, 4, 1, 1]) / 2)
    assert awq_factors(x, None, 0.0).tolist() == [1] * 5
    w = np.array([1.0, 4.0, 1.0, 1.0, 1.0])
    plain = np.array([2, 1, 4, 1, 1]) / (np.sqrt(w) + 1e-4)
    assert np.allclose(awq_factors(x, w, 0.5), plain / np.sqrt(plain.max() * plain.min()))


def test_a_channel_that_calibration_found_silent_counts_as_a_quiet_one():
    factors = awq_factors(np.array([0.0, 1e-9, 1.0, 1.0, 100.0]), None, 1.0)
    assert np.allclose(factors / factors[2], [0.01, 0.01, 1, 1, 100])
    assert awq_factors(np.zeros(3), None, 0.7).tolist() == [1, 1, 1]


def test_magnitudes_are_relative_to_their_group():
    weight = np.array([[1, -2, 4, 0, 0, 0, -3], [5, 5, 0, 1, 2, -4, 0]], np.float32)
    assert relative_magnitudes(weight, 3).tolist() == [1.25, 1.5, 1, 0.25, 0.5, 1, 1]


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("spec", [WeightSpec(4, 16, False), WeightSpec(2, 7, True), WeightSpec(8, 32, True, fp8=True)])
def test_the_loss_is_the_error_of_the_products(clip, spec, monkeypatch):
    """Against products of 60 rows, each weight rounded on the grid of its scaled self."""
    weight, x, s = normal((10, K), 1), normal((60, K), 2), np.exp(normal(K, 3, "float64"))
    monkeypatch.setattr("qcompiler.passes.awq._BLOCK", 3 * K)
    loss = scaled_loss(weight, (x.T @ x).astype(np.float32), s, spec, clip=clip)
    if clip:
        assert loss < 1.05 * scaled_loss(weight, (x.T @ x).astype(np.float32), s, spec, clip=False)
        return
    if spec.fp8:
        assert 0 < loss < 0.01 * np.square(x @ weight.T).sum()
        return
    back = rounded((weight * s).astype(np.float32), spec) / s
    assert loss == pytest.approx(np.square(x @ (back - weight).T).sum(), rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"duo": True}], ids=str)
def test_the_search_finds_the_exponent_of_the_least_error(options):
    """The same search by brute force: factors folded in by hand, the error measured on products."""
    data = loud_batches()
    model = loud_model(W4)
    x = values_of(model, "n", data)
    weights = [read_weight(site) for site in find_sites(model)[0]]
    means = np.abs(x).mean(0)
    magnitudes = relative_magnitudes(np.concatenate(weights), 16) / (N + 9) if options else None
    errors = {}
    for step in range(20):
        s = awq_factors(means, magnitudes, step / 20)
        back = [rounded((weight * s).astype(np.float32), SPEC) / s for weight in weights]
        errors[step / 20] = sum(np.square(x @ (b - w).T).sum() for b, w in zip(back, weights, strict=True))
    energy = sum(np.square(x @ weight.T).sum() for weight in weights)
    before = output_error(model, data)
    (record,) = awq(model, data, **options).records
    assert (record.site, record.action, record.reason) == ("a", "scaled", "scaled with b")
    best = min(errors, key=errors.get)
    assert record.metrics["ratio"] == best > 0
    assert record.metrics["relative_error"] == pytest.approx(errors[best] / energy, rel=1e-3)
    assert record.metrics["relative_error_before"] == pytest.approx(before, rel=1e-3)
    assert output_error(model, data) == pytest.approx(record.metrics["relative_error"], rel=1e-2)
    s = awq_factors(means, magnitudes, best)
    assert record.metrics["largest_factor"] == pytest.approx(s.max(), rel=1e-4)
    for site, weight in zip(find_sites(model)[0], weights, strict=True):
        assert np.allclose(read_weight(site), weight * s, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_it_lessens_the_error_on_data_that_was_not_measured_and_leaves_the_float_model(dtype):
    """With channels forty times as loud as the rest, to less than a half."""
    data, held_out = ([{"x": feeds["x"].astype(dtype)} for feeds in loud_batches(2, seed)] for seed in (0, 99))
    plain, model = loud_model(W4, dtype=dtype), loud_model(W4, dtype=dtype)
    awq(model, data)
    if dtype == "float32":
        assert output_error(model, held_out) < 0.5 * output_error(plain, held_out)
    tolerance = {"float32": 1e-5, "float16": 1e-2}[dtype]
    for got, wanted in zip(run(model, held_out[0]), run(plain, held_out[0]), strict=True):
        assert np.abs(got - wanted).max() <= tolerance * np.abs(wanted).max()


def test_a_few_rows_of_each_weight_tell_enough():
    """Of three, what is measured is not far from that of all, and the error on other data falls too."""
    data, found = loud_batches(), []
    for rows in (3, N):
        model = assigned(loud_model(W4), W4)
        before = output_error(model, loud_batches(2, 99))
        records = awq(model, data, rows=rows).records
        found.append(records[0].metrics["relative_error_before"])
        assert output_error(model, loud_batches(2, 99)) < 0.9 * before
    assert found[0] != found[1]
    assert found[0] == pytest.approx(found[1], rel=0.6)


def test_a_decoder_is_scaled_where_that_is_legal():
    model, data = assigned(decoder(), W4), token_batches(6)
    expected, before = run(decoder(), data[0])[0], output_error(assigned(decoder(), W4), data)
    result = awq(model, data)
    sites = [f"l{i}_{name}" for i in (0, 1) for name in ("q", "o", "gate", "down")]
    assert [record.site for record in result.records] == sites
    assert len(only(result, "scaled")) >= 6
    assert np.abs(run(model, data[0])[0] - expected).max() <= 1e-5 * np.abs(expected).max()
    assert output_error(model, data) < before
    for record in result.records:
        less = record.metrics["relative_error"] < record.metrics["relative_error_before"]
        assert less == (record.action == "scaled")


def test_padding_is_not_measured():
    data = token_batches(3)
    model, trimmed = assigned(decoder(), W4), assigned(decoder(), W4)
    awq(model, data)
    loud = [dict(feeds) for feeds in data]
    for feeds in loud:
        feeds["input_ids"] = np.where(feeds["attention_mask"] > 0, feeds["input_ids"], 7)
    awq(trimmed, loud)
    assert np.allclose(read_weight(site_named(model, "l0_q")), read_weight(site_named(trimmed, "l0_q")), rtol=1e-5)


def test_readers_without_a_scheme_are_rescaled_but_do_not_count():
    found = []
    for names in (("a",), ("a", "b")):
        model = loud_model(W4)
        for site in find_sites(model)[0]:
            if site.name not in names:
                del site.node.metadata_props[SCHEME_KEY]
        expected = run(model, loud_batches()[0])
        (record,) = awq(model).records
        found.append(record.metrics["relative_error_before"])
        for got, wanted in zip(run(model, loud_batches()[0]), expected, strict=True):
            assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert found[0] != found[1]


@pytest.mark.parametrize("scheme", ["w2a16-g16-asym", "w3a16", "w4a16-g16-sym", "w8a16", "w4a8", "w8a8-dynamic-token"])
@pytest.mark.parametrize("clip", [False, True])
def test_it_runs_for_every_scheme(scheme, clip):
    (record,) = awq(loud_model(scheme), clip=clip).records
    assert record.metrics["relative_error"] <= record.metrics["relative_error_before"]


def test_what_it_cannot_better_is_left_alone():
    """Weights that are on their grid already have no error."""
    weight = np.random.default_rng(1).integers(-8, 8, (N, K)).astype(np.float32)
    weight[:, ::16], weight[:, 1::16] = -8, 7
    text = f"g (float[B,{K}] x) => (float[B,{N}] y) {{ h = Mul(x, gamma) [a] y = MatMul(h, w) }}"
    model = assigned(parse(text, {"gamma": np.ones(K, np.float32), "w": np.ascontiguousarray(weight.T)}), W4)
    before = serialized(model)
    result = awq(model, [{"x": normal((40, K), 5)}])
    (record,) = result.records
    assert (record.action, record.reason) == ("skipped", "no exponent lessens the error")
    assert record.metrics["relative_error"] == record.metrics["relative_error_before"] == 0
    assert not result.modified
    assert serialized(model) == before


def test_data_that_are_all_zero_change_nothing():
    text = f"g (float[B,{K}] x) => (float[B,{N}] y) {{ h = Mul(x, gamma) [a] y = MatMul(h, w) }}"
    model = assigned(parse(text, {"gamma": np.ones(K, np.float32), "w": normal((K, N), 1)}), W4)
    result = awq(model, [{"x": np.zeros((4, K), np.float32)}])
    assert (result.modified, result.records[0].metrics["relative_error_before"]) == (False, 0.0)


def test_what_cannot_be_folded_is_skipped_with_the_reason():
    text = f"""g (float[B,S,{K}] x) => (float[B,S,{N}] y, float[B,S,{K}] r) {{
        [norm] n = LayerNormalization(x, gamma) [a] y = MatMul(n, w) [add] r = Add(n, x) }}"""
    model = assigned(parse(text, {"gamma": np.ones(K, np.float32), "w": normal((K, N), 2)}), W4)
    before = serialized(model)
    result = apply("awq", model, context())  # nothing to measure, so no data are wanted
    (record,) = result.records
    assert (record.site, record.action) == ("a", "skipped")
    assert record.reason.startswith("not scaled: ")
    assert "'n' has another reader: Add 'add'" in record.reason
    assert not result.modified
    assert serialized(model) == before


def test_a_site_inside_a_body_is_skipped():
    text = f"""g (float[B,{K}] x, bool c) => (float[B,{N}] y) {{ n = LayerNormalization(x, gamma)
        [if] y = If (c) <then_branch = then () => (float[B,{N}] t) {{ [inner] t = MatMul(n, w) }},
                         else_branch = other () => (float[B,{N}] e) {{ e = MatMul(n, v) }}> }}"""
    weights = {"gamma": np.ones(K, np.float32), "w": normal((K, N), 1), "v": normal((K, N), 2)}
    (record,) = awq(assigned(parse(text, weights), W4)).records
    assert record.action == "skipped"
    assert "inside the body of if" in record.reason


def test_what_has_no_scheme_or_is_quantized_is_left_alone():
    assert awq(decoder(), token_batches(2)).records == ()
    ctx = context(scheme=W4, batches=token_batches(2))
    result = awq(quantized(decoder(), ctx), ctx=ctx)
    assert (result.modified, result.records) == (False, ())


def test_what_is_scaled_shares_factors_as_smoothing_does():
    """The foldings are those of `foldings`, with their ties: whatever can be folded has been."""
    model = assigned(decoder(), W4)
    foldings = [folding.sites[0].name for folding in find_foldings(model, find_sites(model)[0]) if folding.legal]
    records = awq(assigned(decoder(), W4), token_batches(3)).records
    assert {record.site for record in records} <= set(foldings)


def test_data_are_wanted_where_something_is_to_be_measured():
    with pytest.raises(CalibrationError, match="awq needs calibration data"):
        apply("awq", loud_model(W4), context())


def test_the_result_does_not_depend_on_threads():
    found = []
    for threads in (1, 3):
        model = assigned(decoder(), W4)
        awq(model, ctx=context(batches=token_batches(4), threads=threads))
        found.append(serialized(model))
    assert found[0] == found[1]


def test_data_go_through_the_model_once_and_what_they_become_may_lie_on_disk():
    found = []
    for limit in (None, 1):
        ticks = Ticks()
        model = assigned(decoder(), W4)
        awq(model, ctx=context(batches=token_batches(4), max_memory=limit, progress_to=ticks))
        found.append(serialized(model))
        levels = ticks.seen[-1][1]
        assert [done for _, done, _ in ticks.seen] == list(range(levels + 1))
    assert found[0] == found[1]


def test_numbers_that_are_not_finite_are_named():
    data = loud_batches()
    data[1]["x"][0, 0, 0] = np.nan
    with pytest.raises(NumericsError, match="the activation that 'a' reads holds NaN"):
        awq(loud_model(W4), data)
    weight = normal((K, N), 1)
    weight[3, 4] = np.inf
    text = f"g (float[B,{K}] x) => (float[B,{N}] y) {{ n = LayerNormalization(x, gamma) [a] y = MatMul(n, w) }}"
    model = assigned(parse(text, {"gamma": np.ones(K, np.float32), "w": weight}), W4)
    with pytest.raises(NumericsError, match=r"as 'a' does, holds values that are NaN or infinite; .* --ignore 'a'"):
        awq(model)


def test_options_and_text():
    with pytest.raises(SchemeError, match="pass awq: steps=0 and rows=256 have to be at least 1"):
        load("awq")(context(), {"steps": "0"})
    assert str(load("awq")(context(), {"duo": "true"})) == "awq{duo=True}"
