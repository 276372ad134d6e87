"""Scales of 8 bits: what the file holds, that ONNX Runtime computes what the model says, and what is left alone."""

import json

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qcompiler import compile_model
from qcompiler.graph import original_weight
from qcompiler.numerics.metrics import sqnr_db
from qcompiler.scheme import Scheme
from qcompiler.scheme_plan import SchemePlan
from qcompiler.sites import find_sites
from tests.builders import (
    apply,
    context,
    decoder,
    linear_model,
    normal,
    quantized,
    run,
    serialized,
    the_site,
    token_batches,
)


def stored(folder, model, algorithm, **options):
    """The compiled model's path and its report."""
    folder.mkdir(exist_ok=True)
    source, out = folder / "in.onnx", folder / "out.onnx"
    onnx.save(serialized(model), source)
    compile_model(source, algorithms=(algorithm,), output=out, **options)
    return out, json.loads(out.with_suffix(".report.json").read_text("utf-8"))


def optimized(path, folder):
    """The graph as ONNX Runtime runs it."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimized.onnx").graph


@pytest.mark.parametrize("scheme", ["w4a16-g16-asym", "w4a16-g32-sym", "w2a16-g16-asym", "w4a8-g32"])
def test_the_file_is_smaller_and_runs_as_ever(tmp_path, scheme):
    model = linear_model(256, 96)
    path, report = stored(tmp_path / "double", model, "rtn,double_quantize", scheme=scheme)
    plain, before = stored(tmp_path / "plain", model, "rtn", scheme=scheme)
    groups = 256 // Scheme.parse(scheme).resolve("cpu").group_size
    saved = 96 * (4 * groups - groups - 4)
    written = [sum(len(each.raw_data) for each in onnx.load(p).graph.initializer) for p in (plain, path)]
    assert written[0] - written[1] == saved
    graph = onnx.load(path).graph
    assert [node.op_type for node in graph.node] == ["Cast", "Mul", "MatMulNBits"]
    assert [node.op_type for node in optimized(path, tmp_path).node] == ["MatMulNBits"]  # folded at load
    feeds = {"x": normal((5, 256), 3)}
    found, exact = (ort.InferenceSession(p).run(None, feeds)[0] for p in (path, plain))
    assert sqnr_db(exact, found) > 40
    assert report["bytes"]["after"] < before["bytes"]["after"]


@pytest.mark.parametrize("scheme", ["w4a16-nf4-g16", "w3a16-g32", "w1a16-g32"])
def test_our_own_operators_read_them_too(scheme):
    model = linear_model(256, 96)
    ctx = context(scheme=scheme, custom_ops="always")
    quantized(model, ctx, "codebook" if "nf4" in scheme or "w1a" in scheme else "rtn")
    apply("double_quantize", model, ctx)
    expected = run(model, {"x": normal((5, 256), 3)})[0]
    for name in ("fuse_custom", "cleanup"):
        apply(name, model, ctx)
    assert [node.domain for node in model.graph if node.op_type not in ("Cast", "Mul")] == ["ai.qcompiler"]
    assert sum(node.op_type == "Cast" for node in model.graph) == 1  # nothing is left that nobody reads
    found = run(model, {"x": normal((5, 256), 3)})[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_values_are_those_of_the_tensor_and_the_original_is_kept():
    model, ctx = linear_model(256, 96), context(scheme="w4a16-g16-asym")
    quantized(model, ctx)
    before = the_site(model).quantized
    (record,) = apply("double_quantize", model, ctx).records
    assert record.action == "quantized"
    site = the_site(model)
    assert site.quantized.spec.double
    assert np.array_equal(site.quantized.codes(), before.codes())
    assert not np.array_equal(site.quantized.scale, before.scale)
    assert record.metrics["sqnr_db"] == pytest.approx(sqnr_db(original_weight(site), site.quantized.dequantized()))
    assert record.metrics["sqnr_db"] > sqnr_db(original_weight(site), before.dequantized()) - 0.1
    assert site.quantized.stored_bytes == before.stored_bytes - 96 * (4 * 16 - 16 - 4)


@pytest.mark.parametrize(
    ("scheme", "options", "reason"),
    [
        ("w4a16-channel", {}, "there is one for each row"),
        ("w4a16-g16", {"output_format": "qdq"}, "as constants"),
        ("w8a8-dynamic", {}, "as constants"),
        ("w4a16-g16", {"float16": True}, "16 bits already"),
    ],
)
def test_what_is_left_alone_says_why(scheme, options, reason):
    model, ctx = linear_model(256, 96), context(scheme=scheme, **options)
    quantized(model, ctx)
    before = the_site(model).quantized
    (record,) = apply("double_quantize", model, ctx).records
    assert record.action == "skipped"
    assert reason in record.reason
    assert the_site(model).quantized is before


@pytest.mark.parametrize(("scheme", "loud", "kept"), [("w4a16", 1, False), ("w4a16", 3e6, True), ("w8a16", 1, True)])
def test_scales_that_cost_too_much_stay(scheme, loud, kept):
    """Behind one loud group a step is too coarse for the others, and 8-bit codes are finer than scales would be."""
    model, ctx = linear_model(256, 96), context(scheme=f"{scheme}-g16-sym")
    weight = the_site(model).weight
    values = np.array(weight.const_value.numpy())
    values[:16] *= loud
    weight.const_value = ir.tensor(values, name=weight.name)
    quantized(model, ctx)
    (record,) = apply("double_quantize", model, ctx).records
    assert ("differ too much" in record.reason) == kept
    assert the_site(model).quantized.spec.double != kept


@pytest.mark.torch
def test_training_learns_scales_of_this_form():
    data = token_batches(6, 4, 24, vocabulary=64, seed=3)
    model, ctx = decoder(), context(plan=SchemePlan(Scheme.parse("w2a16-g16"), None, None), batches=data)
    ctx.calibration.labels = None
    quantized(model, ctx, "gptq")
    apply("double_quantize", model, ctx)
    records = apply("tune", model, ctx, steps=60, batch=2, rate=0.05).records
    trained = [each for each in records if each.action == "quantized"]
    assert trained
    assert trained[0].metrics["loss_after"] < trained[0].metrics["loss_before"]
    tensors = [site.quantized for site in find_sites(model)[0] if site.quantized is not None]
    expected = run(model, data[0])[0]
    assert all(tensor.spec.double for tensor in tensors)
    apply("fuse_matmul_nbits", model, ctx)
    np.testing.assert_allclose(run(model, data[0])[0], expected, rtol=1e-4, atol=1e-4)
