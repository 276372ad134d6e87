"""Weights of 3 bits as operators of our own: the graph, its bodies, and the library in their place."""

import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from qcompiler.cli import qcompile
from qcompiler.driver import compile_model
from qcompiler.errors import SchemeError
from qcompiler.files.loader import load_model
from qcompiler.kernels import library as libraries
from qcompiler.kernels.schemas import DOMAIN, OPERATORS
from qcompiler.passes import load
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
    only,
    parse,
    quantized,
    run,
    serialized,
    the_site,
)
from tests.kernels.conftest import library  # noqa: F401

SCHEMES = ("w3a16-g32-asym", "w3a16-g64-sym", "w3a16-channel-asym", "w3a16-g128-sym")


def compiled(model, scheme="w3a16-g32-asym", **config):
    """The lowered model, what the weights are then, and the pass's result."""
    ctx = context(scheme=scheme, custom_ops="always", **config)
    quantized(model, ctx)
    weights = {site.name: site.quantized.dequantized() for site in find_sites(model)[0] if site.quantized is not None}
    result = apply("fuse_custom", model, ctx)
    apply("cleanup", model, ctx)
    return weights, result


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_product_of_the_dequantized_weight(library, op, bias, scheme):  # noqa: F811
    model = linear_model(136, 24, op=op, bias=bias)
    offset = normal(24, 1) if bias else 0
    weights, result = compiled(model, scheme)
    x = normal((7, 136), 3)
    expected = x @ weights["fc"].T + offset
    assert [node.op_type for node in model.graph] == ["MatMul3Bits"]
    (record,) = result.records
    assert (record.action, record.reason.split(",")[0]) == ("fused", "MatMul3Bits")
    onnx.checker.check_model(onnx.load_from_string(serialized(model)), full_check=True)
    np.testing.assert_allclose(run(model, {"x": x})[0], expected, rtol=1e-4, atol=1e-4)
    with OrtRunner(serialized(model), threads=1, custom_ops=library) as runner:
        np.testing.assert_allclose(runner.run({"x": x})["y"], expected, rtol=1e-4, atol=1e-4)
        assert runner.run({"x": x[:0]})["y"].shape == (0, 24)


def test_codes_take_three_bits_and_zero_points_a_byte():
    model = linear_model(256, 24)
    compiled(model, "w3a16-g64-asym")
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    assert {name: (tensor.dtype.name, *tensor.shape.numpy()) for name, tensor in tensors.items()} == {
        "w_codes": ("UINT8", 24, 4, 24), "w_scales": ("FLOAT", 24, 4, 1), "w_zero_points": ("UINT8", 24, 4, 1),
        "w_bias": ("FLOAT", 1),
    }  # fmt: skip
    ctx = context(scheme="w3a16-g64-asym", custom_ops="always")
    site = the_site(quantized(linear_model(256, 24), ctx))
    assert site.quantized.spec.stored_bits(256) == 3 + (32 + 8) / 64


def test_sites_that_share_a_weight_share_its_codes():
    text = "g (float[B,64] x) => (float[B,64] y) { [a] h = MatMul(x, w) r = Relu(h) [b] y = MatMul(r, w) }"
    model = parse(text, {"w": normal((64, 64), 0)})
    compiled(model)
    first, second = (node for node in model.graph if node.op_type == "MatMul3Bits")
    assert [*first.inputs[1:4]] == [*second.inputs[1:4]]


def test_a_bias_that_does_not_fit_is_added_behind():
    model = parse(
        "g (float[B,64] x) => (float[B,24] y) { [fc] y = Gemm(x, w, c) }",
        {"w": normal((64, 24), 0), "c": normal((1, 1), 1)},
    )
    weights, _ = compiled(model)
    assert [node.op_type for node in model.graph] == ["MatMul3Bits", "Add"]
    x = normal((3, 64), 4)
    np.testing.assert_allclose(run(model, {"x": x})[0], x @ weights["fc"].T + normal((1, 1), 1), rtol=1e-4, atol=1e-4)


def test_a_convolution_with_a_kernel_of_one():
    text = "g (float[B,64,5] x) => (float[B,24,5] y) { [fc] y = Conv(x, w, b) }"
    model = parse(text, {"w": normal((24, 64, 1), 0), "b": normal(24, 1)})
    weights, _ = compiled(model)
    assert [node.op_type for node in model.graph] == ["Transpose", "MatMul3Bits", "Transpose"]
    x = normal((2, 64, 5), 4)
    expected = np.einsum("nk,bks->bns", weights["fc"], x) + normal(24, 1)[:, None]
    np.testing.assert_allclose(run(model, {"x": x})[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "operator"),
    [({"custom_ops": "never"}, "MatMulNBits"), ({"custom_ops": "auto"}, "MatMulNBits")],
)
def test_where_they_may_not_be_used_three_bits_lie_in_four(config, operator):
    model = linear_model(64, 24)
    ctx = context(scheme="w3a16-g32-sym", **config)
    quantized(model, ctx)
    records = [apply(name, model, ctx).records for name in ("fuse_custom", "fuse_matmul_nbits")]
    assert [len(each) for each in records] == [0, 1]
    assert [node.op_type for node in model.graph] == [operator]
    assert not load("fuse_custom").applies(ctx.config)


@pytest.mark.parametrize(
    ("scheme", "target", "custom_ops", "operator", "level"),
    [
        ("w4a8-g32", "cpu", "always", "MatMulNBits", 4),
        ("w4a8-g32", "cpu", "prefer", "MatMul4Bits", 4),
        ("w2a8-g32", "cpu", "prefer", "MatMul2Bits", 4),
        ("w3a8-g32", "cpu", "always", "MatMul3Bits", 4),
        ("w8a8-g32", "cpu", "prefer", "MatMulNBits", 4),
        ("w4a16-g32-asym", "cpu", "prefer", "MatMulNBits", 0),
        ("w4a16-g32-asym", "cuda", "always", "MatMulNBits", 0),
        ("w4a16-g32-asym", "cuda", "prefer", "MatMul4Bits", 0),
        ("w3a16-g32", "cuda", "always", "MatMul3Bits", 0),
    ],
)
def test_where_their_kernels_are_faster_they_may_be_preferred(scheme, target, custom_ops, operator, level):
    model = linear_model(64, 24)
    ctx = context(scheme=scheme, target=target, custom_ops=custom_ops)
    quantized(model, ctx)
    weight = the_site(model).quantized.dequantized()
    for name in ("fuse_custom", "fuse_matmul_nbits"):
        apply(name, model, ctx)
    (node,) = model.graph
    assert node.op_type == operator
    assert node.attributes["accuracy_level"].as_int() == level
    x = normal((3, 64), 4)
    expected = x @ weight.T
    assert np.abs(run(model, {"x": x})[0] - expected).max() <= 1e-2 * np.abs(expected).max()


def test_other_widths_and_tables_are_left_to_onnxruntime():
    model = decoder(layers=1)
    plan = SchemePlan(Scheme.parse("w4a16-g32-sym"), embedding=Scheme.parse("w3a16-g32-sym"))
    ctx = context(plan=plan, custom_ops="always")
    quantized(model, ctx)
    assert not apply("fuse_custom", model, ctx).records
    assert len(only(apply("fuse_gather", model, ctx), "fused")) == 1


def test_old_opsets_are_raised_for_the_bodies():
    model = linear_model(64, 24, opset=13)
    ctx = context(scheme="w3a16-g32-sym", custom_ops="always")
    apply("assign_scheme", model, ctx)
    result = apply("raise_opset", model, ctx)
    assert model.graph.opset_imports[""] == 18
    assert "'fc' as w3a16-g32-sym needs 18" in result.records[0].reason


def test_unknown_ways_are_refused():
    with pytest.raises(
        SchemeError, match="--custom-ops sometimes is unknown; choose one of auto, always, prefer, never"
    ):
        context(custom_ops="sometimes")


def decoder_files(tmp_path):
    onnx.save(onnx.load_from_string(serialized(decoder(layers=1))), tmp_path / "float.onnx")
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 512, (8, 16)))
    return tmp_path / "float.onnx", tmp_path / "tokens.npy"


@pytest.mark.parametrize("built", [True, False])
def test_by_itself_the_compiler_uses_them_where_they_are_built(library, built, tmp_path, monkeypatch):  # noqa: F811
    """And says how many bits they take, what ran in the verification, and that files with and without are as good."""
    source, tokens = decoder_files(tmp_path)
    if built:
        monkeypatch.setenv(libraries.VARIABLE, str(library))
    arguments = [
        source,
        "--scheme",
        "w3a16-g32-asym",
        "--embedding",
        "float",
        "--lm-head",
        "float",
        "--calibration",
        tokens,
    ]
    done = CliRunner().invoke(qcompile, [*map(str, arguments), "-o", str(tmp_path / "out.onnx")])
    assert done.exit_code == 0, done.stderr
    report = json.loads((tmp_path / "out.report.json").read_text("utf-8"))
    assert report["recipe"]["custom_ops"] == ("always" if built else "never")
    fused = report["verification"]["fused"]["CPUExecutionProvider"]
    assert fused["MatMul3Bits" if built else "MatMulNBits"] == 7
    assert ("3-bit codes stored in 4 bits" in done.stdout) != built
    model = onnx.load(tmp_path / "out.onnx")
    assert [function.name for function in model.functions] == (["MatMul3Bits"] if built else [])
    assert any(each.domain == DOMAIN for each in model.opset_import) == built


def test_a_compiled_model_is_known_and_left_as_it_is(tmp_path):
    source, _ = decoder_files(tmp_path)
    compile_model(source, "w3a16-g32-asym", custom_ops="always", output=tmp_path / "once.onnx", verify=False)
    model = load_model(tmp_path / "once.onnx")
    load("canonicalize")(context())(model)
    assert sum(node.op_type == "MatMul3Bits" for node in model.graph) == 7
    assert [function.name for function in model.functions.values()] == ["MatMul3Bits"]
    _, refusals = find_sites(model)
    assert sum("quantized already: MatMul3Bits" in each.reason for each in refusals) == 7
    again = compile_model(tmp_path / "once.onnx", "w4a16", output=tmp_path / "twice.onnx", verify=False)
    assert again.report.changed is False
    assert (tmp_path / "twice.onnx").read_bytes() == (tmp_path / "once.onnx").read_bytes()


def test_mixed_plans_may_hold_three_bits():
    from qcompiler.config import CompileConfig
    from qcompiler.mixing import formats_of

    scheme = context(scheme="w4a16-g64-asym").config.plan.default.resolve("cpu")
    site = the_site(linear_model(1536, 24))
    for ways, widths in (("always", {2, 3, 4, 8}), ("never", {2, 4, 8})):
        found = formats_of(site, scheme, 21, CompileConfig(custom_ops=ways))
        assert {each.bits for each in found.schemes[:-1]} == widths
    assert "MatMul3Bits" in OPERATORS
