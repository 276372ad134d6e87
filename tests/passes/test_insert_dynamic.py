"""Quantization at run time, against the same arithmetic in numpy."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.numerics.metrics import sqnr_db
from qcompiler.sites import find_sites
from tests.builders import apply, context, normal, only, parse, quantized, run, text_of
from tests.integer_models import REACH, ROWS, TOKENS, WEIGHTS, check, executed, graph, integers

SCHEMES = ["w8a8-dynamic-token", "w8a8-dynamic-tensor"]
BOTH = pytest.mark.parametrize("scheme", SCHEMES)


def decoded(weight):
    """A weight [K, N] rounded to one scale a column and as many codes each way as weights have."""
    scale = np.abs(weight).max(0) / REACH
    return (np.rint(weight / scale) * scale).astype(np.float32)


def per_token(x):
    largest = np.maximum(np.abs(x).max(-1, keepdims=True), 1e-30)
    return (np.clip(np.rint(x / largest * 127), -128, 127) / 127 * largest).astype(np.float32)


def per_tensor(x):
    """As the ONNX standard says of DynamicQuantizeLinear."""
    low, high = min(x.min(), 0), max(x.max(), 0)
    scale = np.float32((high - low) / 255) or np.float32(1)
    zero = np.clip(np.rint(-low / scale), 0, 255)
    return ((np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale).astype(np.float32)


ROUND = {"w8a8-dynamic-token": per_token, "w8a8-dynamic-tensor": per_tensor}


def close(found, expected):
    """To 1e-5, but for the few values whose quotient falls on another side of a half."""
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() <= 1e-5 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("form", ["MatMul", "Gemm", "transposed", "MatMul and Add"])
@BOTH
def test_numbers_and_operators(scheme, form):
    body, operators = {
        "MatMul": ("y = MatMul(x, m0)", []),
        "Gemm": ("y = Gemm(x, m0, b0)", ["Add"]),
        "transposed": ("y = Gemm <transB = 1> (x, m0, b0)", ["Add"]),
        "MatMul and Add": ("h = MatMul(x, m0) y = Add(h, b0)", ["Add"]),
    }[form]
    x = normal((12, 8), 3)
    weight = WEIGHTS["m0"].T if form == "transposed" else WEIGHTS["m0"]
    expected = ROUND[scheme](x) @ decoded(weight) + (WEIGHTS["b0"] if operators else 0)
    model = graph(body, ROWS)
    records = integers(model, None, scheme)
    (record,) = (record for record in records if record.action == "activation")
    assert (record.site, record.spec) == ("x", "u8-" + scheme.rpartition("-")[2])
    close(run(model, {"x": x})[0], expected)
    outputs, found = executed(model, {"x": x})
    close(outputs[0], expected)
    if scheme.endswith("token"):
        assert found == sorted(["Abs", "Div", "MatMulIntegerToFloat", "Max", "Mul", "ReduceMax", *operators])
    else:  # ONNX Runtime would make a float Gemm of the Add, which is therefore a Sub of the negative
        assert found == ["DynamicQuantizeMatMul", *["Sub" for _ in operators]]


@BOTH
def test_rows_of_zeros_and_zeros_all_over(scheme):
    x = normal((12, 8), 4)
    x[[0, 5]] = 0
    model = graph("y = Gemm(x, m0, b0)", ROWS)
    integers(model, None, scheme)
    for feeds in (x, np.zeros_like(x)):
        for optimize in (False, True):
            (found,) = run(model, {"x": feeds}, optimize=optimize)
            close(found, ROUND[scheme](feeds) @ decoded(WEIGHTS["m0"]) + WEIGHTS["b0"])
        np.testing.assert_allclose(found[[0, 5]], np.stack([WEIGHTS["b0"]] * 2), atol=1e-6)


def test_an_outlier_costs_the_other_tokens_nothing():
    x = normal((2, 6, 8), 5)
    loud = x.copy()
    loud[1, 2] *= 1e6
    reference = run(graph("y = MatMul(x, m0)", TOKENS), {"x": loud})[0]
    losses = {}
    for scheme in SCHEMES:
        model = graph("y = MatMul(x, m0)", TOKENS)
        integers(model, None, scheme)
        found, quiet = (run(model, {"x": each}, optimize=True)[0] for each in (loud, x))
        others = np.ones((2, 6), bool)
        others[1, 2] = False
        losses[scheme] = sqnr_db(reference[others], found[others])
        if scheme.endswith("token"):
            np.testing.assert_array_equal(found[others], quiet[others])
    # 8 bits a token: 40 dB. With one scale for all, every other token rounds to nothing.
    assert losses["w8a8-dynamic-token"] > 38
    assert losses["w8a8-dynamic-tensor"] < 1


@BOTH
def test_readers_of_a_value_share_its_codes(scheme):
    body = "a = MatMul(x, m0) b = MatMul(x, m1) c = MatMul(x, m2) d = Add(a, b) e = Mul(d, c) y = Sub(e, x)"
    model, x = graph(body, TOKENS), normal((2, 6, 8), 6)
    reference = run(model, {"x": x})
    integers(model, None, scheme)
    encoders = [node for node in model.graph if node.op_type.endswith("QuantizeLinear")]
    assert len(encoders) == 1
    decoders = [n for n in model.graph if n.op_type == "DequantizeLinear" and n.inputs[0] is encoders[0].outputs[0]]
    assert [len(node.outputs[0].uses()) for node in decoders] == [1, 1, 1]
    # Five roundings of 8 bits, and a product of two such results.
    operators = check(model, reference, {"x": x}, 35)
    assert operators.count("MatMulIntegerToFloat") == 3


@BOTH
def test_what_one_site_computes_another_reads(scheme):
    model, x = graph("h = MatMul(x, m0) y = MatMul(h, m1)", TOKENS), normal((2, 6, 8), 7)
    integers(model, None, scheme)
    rounded = ROUND[scheme]
    expected = rounded(rounded(x) @ decoded(WEIGHTS["m0"])) @ decoded(WEIGHTS["m1"])
    (found,) = run(model, {"x": x})
    assert sqnr_db(expected, found) > 50  # a value between two codes goes to either


@BOTH
def test_a_value_that_is_an_output_keeps_name_type_and_shape(scheme):
    outputs = "float[B,T,8] y, float[B,T,8] h"
    model, x = graph("h = MatMul(x, m0) y = MatMul(h, m1)", TOKENS, outputs=outputs), normal((2, 6, 8), 8)
    before = [(value.name, value.dtype, value.shape) for value in model.graph.outputs]
    reference = run(model, {"x": x})
    integers(model, None, scheme)
    assert [(value.name, value.dtype, value.shape) for value in model.graph.outputs] == before
    check(model, reference, {"x": x}, 38)
    close(run(model, {"x": x})[1], ROUND[scheme](x) @ decoded(WEIGHTS["m0"]))


BODIES = """g (bool c, float[4,8] x) => (float[4,8] y) {
    a = Neg(x)
    y = If (c) <then_branch = yes () => (float[4,8] s) { s = MatMul(a, own) },
        else_branch = no () => (float[4,8] t) { u = MatMul(a, m0) t = Gemm(u, m0, b0) }>
}"""


@BOTH
def test_inside_bodies(scheme):
    model = parse(BODIES, {"yes.own": WEIGHTS["m1"], "m0": WEIGHTS["m0"], "b0": WEIGHTS["b0"]})
    feeds = [{"c": np.array(flag), "x": normal((4, 8), 9)} for flag in (True, False)]
    reference = [run(model, each) for each in feeds]
    integers(model, None, scheme)
    assert text_of(model) == ["a = Neg(x)", "y = If(c)"]
    fused = "MatMulIntegerToFloat" if scheme.endswith("token") else "DynamicQuantizeMatMul"
    for each, expected, count in zip(feeds, reference, (1, 2), strict=True):
        assert check(model, expected, each, 36).count(fused) == count
    expected = ROUND[scheme](-feeds[0]["x"]) @ decoded(WEIGHTS["m1"])
    close(run(model, feeds[0])[0], expected)


def test_half_precision():
    for kind, body in ((TOKENS, "y = MatMul(x, m0)"), (ROWS, "h = Gemm(x, m0, b0) y = Gemm(h, m1, b1)")):
        model = graph(body, kind, dtype="float16")
        x = normal({TOKENS: (2, 6, 8), ROWS: (12, 8)}[kind], 10, "float16")
        x[0] = 0
        reference = run(model, {"x": x})
        integers(model, None, "w8a8-dynamic-token")
        check(model, reference, {"x": x}, 36)


def test_one_scale_for_a_tensor_of_half_precision_is_refused_with_the_remedy():
    model = graph("y = MatMul(x, m0)", TOKENS, dtype="float16")
    result = apply("assign_scheme", model, context(scheme="w8a8-dynamic-tensor"))
    (record,) = (record for record in result.records if record.action == "skipped")
    assert record.reason == "DynamicQuantizeLinear has no float16 kernel; use w8a8-dynamic-token"


@pytest.mark.parametrize("opset", [13, 17, 18, 21, 23])
@BOTH
def test_every_opset(scheme, opset):
    model, x = graph("y = MatMul(x, m0)", TOKENS, opset=opset), normal((2, 6, 8), 11)
    integers(model, None, scheme)
    close(run(model, {"x": x}, optimize=True)[0], ROUND[scheme](x) @ decoded(WEIGHTS["m0"]))


def test_a_residual_of_matrices_is_not_taken_for_the_bias_of_a_float_gemm():
    model, x = graph("h = MatMul(x, m0) y = Add(x, h)", ROWS), normal((12, 8), 12)
    integers(model, None, "w8a8-dynamic-tensor")
    outputs, operators = executed(model, {"x": x})
    close(outputs[0], per_tensor(x) @ decoded(WEIGHTS["m0"]) + x)
    assert operators == ["DynamicQuantizeMatMul", "Neg", "Sub"]


def test_nodes_say_who_made_them_and_nothing_happens_without_a_dynamic_site():
    model = graph("[fc] y = MatMul(x, m0)", TOKENS)
    model.graph[0].metadata_props["pkg.torch.onnx.stack_trace"] = "line 3"
    ctx = context(scheme="w8a8-dynamic")
    quantized(model, ctx)
    result = apply("insert_dynamic", model, ctx)
    assert result.modified
    assert only(result, "activation") == ["x"]
    made = [node for node in model.graph if node.metadata_props.get("qcompiler.pass") == "insert_dynamic"]
    assert [node.op_type for node in made] == [
        "Abs", "ReduceMax", "Max", "Div", "QuantizeLinear", "DequantizeLinear", "Mul",
    ]  # fmt: skip
    assert all(node.metadata_props["pkg.torch.onnx.stack_trace"] == "line 3" for node in made)
    for scheme in ("w8a16", "w8a8-static"):
        model = graph("y = MatMul(x, m0)", TOKENS)
        ctx = context(scheme=scheme)
        quantized(model, ctx)
        before = ir.serde.serialize_model(model)
        result = apply("insert_dynamic", model, ctx)
        assert not result.modified
        assert result.records == ()
        assert ir.serde.serialize_model(model) == before
    assert all(site.quantized is not None for site in find_sites(model)[0])
