"""What training adds to a model that stays as it is: biases (`bitfit`) and adapters (`qlora`)."""

import numpy as np
import pytest

from qcompiler.driver import compile_model
from qcompiler.scheme import Scheme
from qcompiler.scheme_plan import SchemePlan
from qcompiler.sites import find_sites
from tests.builders import apply, context, decoder, quantized, run, serialized, token_batches

pytestmark = pytest.mark.torch

PLAN = SchemePlan(Scheme.parse("w4a16-g16"), None, None)


def text(count=8, seed=3):
    """Token ids that follow a rule, so that there is something to learn: each is the one before plus three."""
    rows = []
    for at in range(count):
        first = np.random.default_rng(seed + at).integers(0, 60, (4, 1))
        ids = (first + 3 * np.arange(24)) % 60
        rows.append({"input_ids": ids.astype(np.int64), "attention_mask": np.ones((4, 24), np.int64)})
    return rows


def prepared(data, plan=PLAN):
    ctx = context(plan=plan, batches=data)
    ctx.calibration.labels = None
    model = decoder()
    quantized(model, ctx)
    return model, ctx


def losses(records):
    figures = next(record.metrics for record in records if "loss_after" in record.metrics)
    return figures["loss_before"], figures["loss_after"]


def nats(model, feeds):
    """Cross entropy of the next token by ONNX Runtime."""
    logits = run(model, feeds)[0].astype(np.float64)[:, :-1]
    probabilities = (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )
    return float(-np.take_along_axis(probabilities, feeds["input_ids"][:, 1:, None], -1).mean())


def test_bitfit_trains_biases_alone():
    data = text()
    model, ctx = prepared(data)
    before = {site.name: site.quantized.codes() for site in find_sites(model)[0] if site.quantized is not None}
    start = nats(model, data[0])
    records = apply("tune", model, ctx, method="bitfit", loss="next", steps=60, batch=4, vector_rate=0.05).records
    assert losses(records)[1] < losses(records)[0] - 0.2
    assert nats(model, data[0]) < start - 0.2
    for site in find_sites(model)[0]:
        if site.quantized is not None:
            assert np.array_equal(site.quantized.codes(), before[site.name])
    gain = next(value for name, value in model.graph.initializers.items() if name == "gain")
    assert np.array_equal(gain.const_value.numpy(), decoder().graph.initializers["gain"].const_value.numpy())
    # Every product has a bias that the kernel adds: no Add is left of those that were made.
    apply("fuse_matmul_nbits", model, ctx)
    fused = [node for node in model.graph if node.op_type == "MatMulNBits"]
    assert sum(len(node.inputs) > 5 and node.inputs[5] is not None for node in fused) == len(before)


@pytest.mark.parametrize("scheme", ["w4a16-g16", "w4a16-g16-nf4"])
def test_adapters_beside_weights_that_stay(scheme):
    data = text()
    plan = SchemePlan(Scheme.parse(scheme), None, None)
    ctx = context(plan=plan, batches=data, custom_ops="always")
    ctx.calibration.labels = None
    model = decoder()
    quantized(model, ctx, "codebook" if "nf4" in scheme else "rtn")
    codes = {site.name: site.quantized.codes() for site in find_sites(model)[0] if site.quantized is not None}
    start = nats(model, data[0])
    records = apply(
        "tune", model, ctx, method="qlora", loss="next", steps=60, batch=4, rank=4, vector_rate=0.02
    ).records
    assert losses(records)[1] < losses(records)[0] - 0.5
    assert nats(model, data[0]) < start - 0.5
    for site in find_sites(model)[0]:
        if site.name in codes:
            assert np.array_equal(site.quantized.codes(), codes[site.name])
    assert sum("_lora_A" in name for name in model.graph.initializers) == len(codes)


def test_adapters_are_a_file_that_switches_the_model(tmp_path):
    """ONNX Runtime's LoraAdapter gives the trained model, nothing gives the quantized one."""
    import onnxruntime as ort

    data = text()
    shared = {"plan": PLAN, "verify": False, "threads": 1}
    options = "method=qlora,loss=next,steps=40,batch=4,rank=4,vector_rate=0.02,held_out=1"
    results = {}
    for export in ("adapter", "nodes"):
        path = tmp_path / f"{export}.onnx"
        algorithms = ("rtn", f"tune{{{options},export={export}}}")
        found = compile_model(serialized_model(), calibration=data, output=path, algorithms=algorithms, **shared)
        assert all(file.exists() for file in found.files)
        results[export] = path
    compile_model(serialized_model(), calibration=data, output=tmp_path / "base.onnx", algorithms=("rtn",), **shared)
    session = ort.InferenceSession(str(results["adapter"]), providers=["CPUExecutionProvider"])
    adapter = ort.LoraAdapter()
    adapter.Load(str(tmp_path / "adapter.onnx_adapter"))
    with_adapter = ort.RunOptions()
    with_adapter.add_active_adapter(adapter)
    base = ort.InferenceSession(str(tmp_path / "base.onnx"), providers=["CPUExecutionProvider"]).run(None, data[0])[0]
    nodes = ort.InferenceSession(str(results["nodes"]), providers=["CPUExecutionProvider"]).run(None, data[0])[0]
    np.testing.assert_allclose(session.run(None, data[0])[0], base, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(session.run(None, data[0], with_adapter)[0], nodes, rtol=1e-4, atol=1e-4)
    assert np.abs(nodes - base).max() > 0.1


def serialized_model():
    import onnx

    return onnx.load_from_string(serialized(decoder()))


def test_merged_adapters_leave_no_trace_but_other_codes():
    data = text()
    model, ctx = prepared(data, SchemePlan(Scheme.parse("w8a16-g16"), None, None))
    count, start = len(model.graph), nats(model, data[0])
    options = {"loss": "next", "steps": 60, "batch": 4, "rank": 4, "vector_rate": 0.02, "export": "merged"}
    apply("tune", model, ctx, method="qlora", **options)
    assert len(model.graph) == count
    assert not any("lora" in name for name in model.graph.initializers)
    assert nats(model, data[0]) < start - 0.5


@pytest.mark.parametrize("method", ["bitfit", "qlora"])
def test_what_does_not_help_is_taken_out_again(method):
    """A rate so large that everything gets worse."""
    data = token_batches(6, 4, 24, vocabulary=64, seed=3)
    model, ctx = prepared(data)
    before = serialized(model)
    records = apply("tune", model, ctx, method=method, steps=2, vector_rate=1.0, schedule="constant").records
    assert all("did not lower the loss" in record.reason for record in records)
    assert serialized(model) == before
