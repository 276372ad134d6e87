"""The pass: which sites it tunes, what it keeps, what it records. Descent itself is tested in tests/tuning."""

import dataclasses
import sys

import numpy as np
import pytest

from qcompiler.errors import CalibrationError, PassError, SchemeError
from qcompiler.passes import load
from qcompiler.scheme import Scheme
from qcompiler.scheme_plan import SchemePlan
from qcompiler.sites import find_sites
from tests.builders import (
    Ticks,
    apply,
    context,
    decoder,
    only,
    parse,
    quantized,
    run,
    serialized,
    token_batches,
    with_outputs,
)

pytestmark = pytest.mark.torch

LAYER = ["q", "k", "v", "o", "gate", "up", "down"]


def plan(scheme="w4a16-g16-asym", **others):
    return SchemePlan(Scheme.parse(scheme), others.pop("embedding", None), others.pop("lm_head", None), **others)


def batches(count=12, **options):
    """Token ids out of 64, so that each is seen often."""
    return token_batches(count, 4, 24, vocabulary=64, seed=3, **options)


def tuned(model, ctx, start="gptq", **options):
    """The model started by an algorithm, then tuned, and the records of tuning."""
    if start:
        quantized(model, ctx, start)
    else:
        apply("canonicalize", model, ctx)
        apply("assign_scheme", model, ctx)
    return apply("learned_rounding", model, ctx, **{"steps": 60, "rate": 0.02, **options})


def codes(model):
    return {site.name: site.quantized.codes() for site in find_sites(model)[0] if site.quantized is not None}


def error(model, outputs=("h1", "h2")):
    """Mean relative error of the residual stream behind each layer, on tokens that were not calibrated on."""
    feeds = batches(14, padded=False)[12:]
    total = 0.0
    for batch in feeds:
        wanted = run(with_outputs(decoder(), outputs), batch, outputs=list(outputs))
        found = run(with_outputs(model, outputs), batch, outputs=list(outputs))
        for a, b in zip(wanted, found, strict=True):
            total += (np.square(a - b).sum(-1) / np.square(a).sum(-1)).mean()
    return total / len(feeds)


@pytest.mark.parametrize(
    ("scheme", "factor"),
    [("w4a16-g16-asym", 0.85), ("w4a16-g16-sym", 0.85), ("w3a16-g16-sym", 0.85), ("w2a16-g16-asym", 0.75)],
)
def test_blocks_come_nearer_to_the_float_model_than_gptq_brings_them(scheme, factor):
    """Random weights on random tokens leave less to learn than a trained model; at 2 bits there is more."""
    model, ctx = decoder(), context(plan=plan(scheme), batches=batches())
    quantized(model, ctx, "gptq")
    before = error(model)
    result = apply("learned_rounding", model, ctx, steps=60, rate=0.02)
    assert only(result, "quantized") == [f"l{i}_{name}" for i in range(2) for name in LAYER]
    assert error(model) < factor * before
    for record in result.records:
        assert record.spec == scheme
        assert record.metrics["loss_after"] < record.metrics["loss_before"]
        assert 0 < record.metrics["changed_codes"] < 1
        assert record.metrics["sqnr_db"] > 5
    for site in find_sites(model)[0]:
        if site.quantized is not None:
            assert site.quantized.codes().max() <= site.quantized.spec.limits[1]
            assert "original" in site.quantized.meta


def divergence(model):
    """KL of the answers from those of the float model, on tokens that were not calibrated on."""
    total = 0.0
    feeds = batches(14, padded=False)[12:]
    for batch in feeds:
        wanted, found = (run(each, batch)[0].astype(np.float64) for each in (decoder(), model))
        p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (wanted, found))
        total += (np.exp(p) * (p - q)).sum(-1).mean()
    return total / len(feeds)


@pytest.mark.parametrize("head", [None, "w8a16-g32-asym"])
def test_distillation_brings_the_answers_nearer(head):
    model = decoder()
    ctx = context(plan=plan(lm_head=head and Scheme.parse(head)), batches=batches(16))
    quantized(model, ctx, "gptq")
    before = divergence(model)
    result = apply("learned_rounding", model, ctx, steps=0, distill=120, distill_rate=0.01, distill_scale_rate=0.001)
    assert divergence(model) < 0.75 * before
    assert only(result, "quantized") == [f"l{i}_{name}" for i in range(2) for name in LAYER]
    record = result.records[-1]
    assert record.reason == "distilled"
    assert record.metrics["loss_after"] < 0.8 * record.metrics["loss_before"]
    assert record.metrics["loss_before"] == pytest.approx(before, rel=0.5)


def test_distillation_gives_the_same_bytes_and_tells_its_progress():
    models, ticks = [decoder(), decoder()], Ticks()
    for model in models:
        tuned(model, context(plan=plan(), batches=batches(6), progress_to=ticks), steps=0, distill=3)
    assert serialized(models[0]) == serialized(models[1])
    assert ("distillation", 3, 3) in ticks.seen


def test_without_a_vocabulary_at_the_end_nothing_is_distilled():
    text = "g (float[B,32] x) => (float[B,32] y) { [a] h = MatMul(x, wa) r = Relu(h) [b] y = MatMul(r, wb) }"
    generator = np.random.default_rng(0)
    weights = {name: generator.standard_normal((32, 32)).astype(np.float32) for name in ("wa", "wb")}
    data = [{"x": generator.standard_normal((40, 32)).astype(np.float32)} for _ in range(4)]
    result = tuned(parse(text, weights), context(plan=plan(), batches=data), steps=0, distill=2)
    assert {record.reason for record in result.records} == {
        "rounding not learned: no vocabulary is at the end, so that nothing is distilled"
    }


def test_by_itself_it_starts_from_rounding_to_nearest():
    alone, rounded = decoder(), decoder()
    ctx = context(plan=plan("w2a16-g16-asym"), batches=batches())
    quantized(rounded, ctx, "rtn", clip="true")
    result = tuned(alone, ctx, start="")
    assert error(alone) < 0.7 * error(rounded)
    assert [record.reason for record in result.records[:14]] == ["start of learned rounding"] * 14


def test_the_same_seed_gives_the_same_bytes():
    models = [decoder() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        tuned(model, context(plan=plan(), batches=batches(6), seed=seed), steps=10)
    first, again, other = map(serialized, models)
    assert first == again
    assert first != other


def test_what_padding_tokens_are_makes_no_difference():
    models = [decoder(), decoder()]
    feeds = batches(6)
    others = [{**batch, "input_ids": np.where(batch["attention_mask"], batch["input_ids"], 7)} for batch in feeds]
    for model, data in zip(models, (feeds, others), strict=True):
        tuned(model, context(plan=plan(), batches=data), steps=10)
    first, second = (codes(model) for model in models)
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_what_does_not_help_on_held_out_data_is_not_kept():
    """Steps of half a code undo all that GPTQ did."""
    model, ctx = decoder(), context(plan=plan(), batches=batches(6))
    quantized(model, ctx, "gptq")
    before = codes(model)
    result = apply("learned_rounding", model, ctx, steps=2, rate=0.5)
    assert not result.modified
    assert only(result, "skipped") == [f"l{i}_{name}" for i in range(2) for name in LAYER]
    for record in result.records:
        assert "did not lower the error on held-out data" in record.reason
        assert record.metrics["loss_after"] >= record.metrics["loss_before"]
    assert all(np.array_equal(before[name], array) for name, array in codes(model).items())


def test_an_operator_that_pytorch_is_not_given_leaves_its_block_alone(monkeypatch):
    """One in the second layer's gate; the first is tuned."""
    from qcompiler import torch_graph

    model, ctx = decoder(), context(plan=plan(), batches=batches(6))
    quantized(model, ctx, "gptq")
    squash = next(node for node in model.graph if node.outputs[0].name == "s1")
    before = codes(model)
    original = torch_graph.unsupported
    monkeypatch.setattr(
        torch_graph,
        "unsupported",
        lambda nodes, imports: (
            [f"{node.op_type} is unknown" for node in nodes if node is squash] or original(nodes, imports)
        ),
    )
    result = apply("learned_rounding", model, ctx, steps=40, rate=0.02)
    assert only(result, "quantized") == [f"l0_{name}" for name in LAYER]
    assert only(result, "skipped") == [f"l1_{name}" for name in LAYER]
    reasons = {record.reason for record in result.records if record.action == "skipped"}
    (reason,) = reasons
    assert reason.startswith("rounding not learned: its block cannot run in PyTorch: ")
    assert "Sigmoid is unknown" in reason
    after = codes(model)
    assert all(np.array_equal(before[name], after[name]) == name.startswith("l1") for name in before)


def test_what_is_not_tuned_is_recorded_with_the_reason():
    eight = Scheme.parse("w8a16-g16-asym")
    model = decoder(1)
    ctx = context(plan=plan(embedding=eight, lm_head=eight), batches=batches(4))
    result = tuned(model, ctx, steps=1)
    reasons = {record.site: record.reason for record in result.records if record.action == "skipped"}
    assert reasons["embed"] == "rounding not learned: a lookup table has no activations"
    assert reasons["head"] == "rounding not learned: its output is more than 8 times as wide as its input"


def test_a_site_in_a_body_keeps_what_it_has():
    text = """g (bool flag, float[B,32] x) => (float[B,32] y) {
        [first] f = MatMul(x, wf)
        z = If (flag) <
            then_branch = yes () => (float[B,32] t) { [inner] t = MatMul(f, wi) },
            else_branch = no () => (float[B,32] e) { e = Neg(f) }
        >
        [last] y = MatMul(z, wl)
    }"""
    generator = np.random.default_rng(0)
    weights = {name: generator.standard_normal((32, 32)).astype(np.float32) for name in ("wf", "wi", "wl")}
    data = [{"x": generator.standard_normal((40, 32)).astype(np.float32), "flag": np.array(True)} for _ in range(8)]
    result = tuned(parse(text, weights), context(plan=plan(), batches=data), start="gptq")
    (inner,) = (record for record in result.records if record.site == "inner")
    assert inner.action == "skipped"
    assert inner.reason.startswith("rounding not learned: inside the body of")


def test_without_enough_calibration_data_it_says_what_to_give():
    for data in (None, [], batches(2)):
        model = decoder(1)
        ctx = context(plan=plan(), batches=data)
        apply("assign_scheme", model, ctx)
        with pytest.raises(CalibrationError, match=r"needs calibration data of more than 2 batches.*--calibration"):
            apply("learned_rounding", model, ctx)


def test_nothing_to_tune_changes_nothing():
    model = decoder(1)
    result = apply("learned_rounding", model, context(plan=plan()))
    assert (result.modified, result.records) == (False, ())


def test_without_torch_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(PassError, match=r"needs the package torch.*pip install 'onnx-qcompiler\[torch\]'.*gptq"):
        apply("learned_rounding", decoder(1))


def test_progress_is_told():
    ticks = Ticks()
    tuned(decoder(), context(plan=plan(), batches=batches(4), progress_to=ticks), steps=2)
    told = [entry for entry in ticks.seen if entry[0] == "learned_rounding"]
    assert told[-1][1] == told[-1][2]
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "steps=-1 has to be at least 0"),
        ({"distill_rate": -1}, "distill_rate=-1 is not between"),
        ({"held_out": 0}, "held_out=0 has to be"),
        ({"rate": 2.0}, "rate=2 is not between 0 and 1"),
        ({"momentum": 1.0}, "momentum=1 is not at least 0 and below 1"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(SchemeError, match=message):
        load("learned_rounding")(context(), {key: str(value) for key, value in options.items()})


def test_every_option_is_explained():
    for option in dataclasses.fields(load("learned_rounding").Options):
        assert option.metadata["help"]


def test_it_comes_after_what_it_starts_from():
    assert {"gptq", "rtn"} <= set(load("learned_rounding").after)
