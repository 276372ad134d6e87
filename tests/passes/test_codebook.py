"""Schemes whose codes name entries of tables: from the command to what a runtime computes."""

import numpy as np
import onnx
import pytest

from qcompiler.driver import compile_model
from qcompiler.kernels.schemas import DOMAIN
from qcompiler.scheme import Scheme
from qcompiler.scheme_plan import SchemePlan
from qcompiler.session import OrtRunner
from qcompiler.sites import find_sites
from tests.builders import (
    apply,
    context,
    decoder,
    linear_model,
    normal,
    run,
    serialized,
    token_batches,
)
from tests.kernels.conftest import library  # noqa: F401

SCHEMES = {
    "w3a16-g32-lut": "MatMulCodebook8",
    "w4a16-g64-lut": "MatMulCodebook16",
    "w4a16-channel-lut": "MatMulCodebook16",
    "w4a16-g32-nf4": "MatMulCodebook16",
    "w2a16-g32-vq2": "MatMulCodebook16",
    "w1a16-g32-vq4": "MatMulCodebook16",
    "w2a16-g32-vq4": "MatMulCodebook256",
    "w4a16-g32-vq2": "MatMulCodebook256",
    "w1a16-g32": "MatMul1Bit",
    "w1a16-channel": "MatMul1Bit",
}


def compiled(model, scheme, batches=None, **config):
    """The lowered model, what the weights are then, and the results of both passes."""
    config = {"custom_ops": "always"} | config
    ctx = context(scheme=scheme, batches=batches, **config)
    apply("canonicalize", model, ctx)
    apply("assign_scheme", model, ctx)
    result = apply("codebook", model, ctx)
    weights = {site.name: site.quantized.dequantized() for site in find_sites(model)[0] if site.quantized is not None}
    lowered = apply("fuse_custom", model, ctx)
    apply("cleanup", model, ctx)
    return weights, result, lowered


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_product_of_the_decoded_weight(library, op, scheme, dtype):  # noqa: F811
    model = linear_model(136, 24, op=op, dtype=dtype)
    weights, result, lowered = compiled(model, scheme)
    x = normal((7, 136), 3, dtype)
    expected = x.astype(np.float32) @ weights["fc"].astype(dtype).astype(np.float32).T
    assert [node.op_type for node in model.graph] == [SCHEMES[scheme]]
    assert [(record.action, record.spec) for record in result.records] == [("quantized", scheme)]
    assert [record.reason.split(",")[0] for record in lowered.records] == [SCHEMES[scheme]]
    onnx.checker.check_model(onnx.load_from_string(serialized(model)), full_check=True)
    (body,) = run(model, {"x": x})
    with OrtRunner(serialized(model), threads=1, custom_ops=library) as runner:
        kernel = runner.run({"x": x})["y"]
    near = 2e-5 if dtype == "float32" else 1e-2
    for found in (body, kernel):
        assert np.abs(found.astype(np.float32) - expected).max() <= near * np.abs(expected).max()


def test_signs_times_signs(library):  # noqa: F811
    model = linear_model(136, 24)
    weights, _, lowered = compiled(model, "w1a1-g32")
    assert [node.op_type for node in model.graph] == ["MatMulSigns"]
    assert {name.rsplit("_", 1)[-1] for name in model.graph.initializers} == {"codes", "magnitudes", "bias"}
    assert lowered.records[0].reason == "MatMulSigns, group 32"
    x = normal((7, 136), 3)
    signs = np.where(x >= 0, 1, -1) * np.abs(x).mean(-1, keepdims=True)
    (body,) = run(model, {"x": x})
    np.testing.assert_allclose(body, signs @ weights["fc"].T, rtol=1e-4, atol=1e-4)
    with OrtRunner(serialized(model), threads=1, custom_ops=library) as runner:
        np.testing.assert_allclose(runner.run({"x": x})["y"], body, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", ["w3a16-g32-lut", "w2a16-g32-vq2", "w1a16-g32"])
def test_data_make_products_better(scheme):
    def noise(batches):
        model = linear_model(128, 48)
        weights, _, _ = compiled(model, scheme, batches)
        (weight,) = (site.weight.const_value.numpy() for site in find_sites(linear_model(128, 48))[0])
        x = data[0]["x"]
        exact = x @ weight
        return np.square(x @ weights["fc"].T - exact).sum() / np.square(exact).sum()

    mixing = normal((128, 128), 1, scale=0.3)
    data = [{"x": normal((400, 128), 2) @ mixing}]
    assert noise(data) < 0.9 * noise(None)


def test_the_same_bytes_twice():
    first, second = decoder(), decoder()
    data = token_batches(4)
    for model, threads in ((first, 1), (second, 2)):
        plan = SchemePlan(Scheme.parse("w4a16-g32-lut"), None, None)
        compiled_with(model, data, plan, threads)
    assert serialized(first) == serialized(second)


def compiled_with(model, batches, plan, threads=1):
    ctx = context(plan=plan, batches=batches, threads=threads, custom_ops="always")
    for name in ("canonicalize", "assign_scheme", "codebook", "rtn", "fuse_custom", "fuse_matmul_nbits", "fuse_gather"):
        apply(name, model, ctx)


def test_other_algorithms_take_the_rest():
    model = decoder()
    plan = SchemePlan(Scheme.parse("w4a16-g32-lut"), None, Scheme.parse("w8a16-g32"))
    compiled_with(model, token_batches(2), plan)
    kinds = {node.op_type for node in model.graph if node.domain}
    assert kinds == {"MatMulCodebook16", "MatMulNBits"}
    assert DOMAIN in model.graph.opset_imports


@pytest.mark.parametrize("algorithms", [(), ("gptq",), ("gptq", "codebook{rounds=0}"), ("rtn",)])
def test_it_runs_before_what_is_named(tmp_path, algorithms):
    source, output = tmp_path / "model.onnx", tmp_path / "out.onnx"
    source.write_bytes(serialized(linear_model(64, 32)))
    options = {"algorithms": algorithms} if algorithms else {}
    compile_model(
        source,
        "w4a16-g32-lut",
        custom_ops="always",
        calibration=[{"x": normal((8, 64), seed)} for seed in range(3)],
        output=output,
        **options,
    )
    assert [node.op_type for node in onnx.load(output).graph.node] == ["MatMulCodebook16"]


@pytest.mark.torch
def test_codes_of_tables_are_not_learned_further():
    model, ctx = (
        decoder(1, 64, 96),
        context(
            plan=SchemePlan(Scheme.parse("w4a16-g32-lut"), None, None), batches=token_batches(4), custom_ops="always"
        ),
    )
    for name in ("canonicalize", "assign_scheme", "codebook"):
        apply(name, model, ctx)
    before = {site.name: site.quantized.codes() for site in find_sites(model)[0] if site.quantized is not None}
    result = apply("learned_rounding", model, ctx, steps=2)
    assert {record.reason for record in result.records} == {"rounding not learned: its codes name entries of tables"}
    for site in find_sites(model)[0]:
        if site.name in before:
            np.testing.assert_array_equal(site.quantized.codes(), before[site.name])


@pytest.mark.parametrize("scheme", ["w4a16-g32-lut", "w1a16-g32", "w1a1-g32", "w2a16-g32-vq2"])
def test_float16_models_have_tables_and_scales_in_float16(tmp_path, scheme):
    source = tmp_path / "model.onnx"
    source.write_bytes(serialized(decoder(1, 64, 96)))
    compile_model(
        source,
        plan=SchemePlan(Scheme.parse(scheme), None, None),
        custom_ops="always",
        float16=True,
        output=tmp_path / "out.onnx",
    )
    graph = onnx.load(tmp_path / "out.onnx").graph
    kept = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.domain == DOMAIN:
            own = {kept[name].data_type for name in node.input[1:]}
            assert own <= {onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT32}


def test_what_cannot_be_is_said():
    (record,) = apply("assign_scheme", linear_model(64, 32), context(scheme="w4a16-g32-lut")).records
    assert (record.action, "need our own operators" in record.reason) == ("skipped", True)
    ctx = context(scheme="w2a16-g32-vq4", custom_ops="always")
    (record,) = apply("assign_scheme", linear_model(66, 32), ctx).records
    assert (record.action, "66 columns are no multiple of 4" in record.reason) == ("skipped", True)


@pytest.mark.parametrize("scheme", [*SCHEMES, "w1a1-g32"])
@pytest.mark.parametrize("data", [True, False])
def test_whole_models_are_compiled_and_verified(tmp_path, scheme, data):
    source = tmp_path / "model.onnx"
    source.write_bytes(serialized(decoder(1, 64, 96)))
    result = compile_model(
        source,
        plan=SchemePlan(Scheme.parse(scheme), None, None),
        custom_ops="always",
        calibration=token_batches(4) if data else None,
        output=tmp_path / "out.onnx",
    )
    operator = "MatMulSigns" if scheme == "w1a1-g32" else SCHEMES[scheme]
    kinds = [node.op_type for node in onnx.load(tmp_path / "out.onnx").graph.node if node.domain == DOMAIN]
    assert kinds == [operator] * 7
    assert {row.scheme for row in result.report.sites if row.action == "quantized"} == {scheme}
    again = compile_model(tmp_path / "out.onnx", "w4a16", output=tmp_path / "twice.onnx", verify=False)
    assert sum(row.action == "quantized" for row in again.report.sites) <= 2  # what was float: table and projection
