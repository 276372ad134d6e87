"""What stays float becomes float16, runs in ONNX Runtime, and what that costs is said."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.driver import compile_model
from qcompiler.scheme_plan import SchemePlan
from tests.builders import (
    apply,
    context,
    decoder,
    linear_model,
    normal,
    parse,
    quantized,
    run,
    serialized,
    text_of,
    token_batches,
)

X = {"x": normal((2, 8), 0)}


def convert(model, **options):
    result = apply("convert_float16", model, context(target="cuda"), **options)
    apply("cleanup", model)
    return result


def dtypes(model):
    return {value.name: value.dtype.name for value in (*model.graph.inputs, *model.graph.outputs)}


def error_db(want, got):
    want, got = np.asarray(want, np.float64), np.asarray(got, np.float64)
    noise = np.square(want - got).sum()
    return 10 * np.log10(np.square(want).sum() / noise) if noise else np.inf


GRAPHS = {
    "a product": (
        "h = MatMul(x, w) y = Relu(h)",
        ["x_half = Cast(x)", "h = MatMul(x_half, w_half)", "y_inner = Relu(h)", "y = Cast(y_inner)"],
    ),
    "a power and what goes on from it": (
        "h = MatMul(x, w) p = Pow(h, two) m = ReduceMean(p, axis) e = Add(m, eps) r = Sqrt(e) y = Div(h, r)",
        ["x_half = Cast(x)", "h = MatMul(x_half, w_half)", "h_float = Cast(h)", "p = Pow(h_float, two)",
         "m = ReduceMean(p, axis)", "e = Add(m, eps)", "r = Sqrt(e)", "r_half = Cast(r)",
         "y_inner = Div(h, r_half)", "y = Cast(y_inner)"],
    ),
    "integers that become floats": (
        "s = Shape(x) c = Cast <to = 1> (s) d = Mul(c, eps) q = ReduceSum(d, first) y = Mul(x, q)",
        ["x_half = Cast(x)", "s = Shape(x)", "c = Cast(s)", "d = Mul(c, eps)", "q = ReduceSum(d, first)",
         "q_half = Cast(q)", "y_inner = Mul(x_half, q_half)", "y = Cast(y_inner)"],
    ),
    "a mask: what float16 cannot hold is limited, not infinite": (
        "s = Shape(x) c = Cast <to = 1> (s) d = Mul(c, lowest) q = ReduceMax <keepdims = 0> (d, first) y = Max(x, q)",
        ["x_half = Cast(x)", "s = Shape(x)", "c = Cast(s)", "c_half = Cast(c)", "d = Mul(c_half, lowest_half)",
         "q = ReduceMax(d, first)", "y_inner = Max(x_half, q)", "y = Cast(y_inner)"],
    ),
    "an operator of float32 only": (
        "c, s, z = DynamicQuantizeLinear(x) h = DequantizeLinear(c, s, z) y = MatMul(h, w)",
        ["x_half = Cast(x)", "c, s, z = DynamicQuantizeLinear(x)", "s_half = Cast(s)",
         "h = DequantizeLinear(c, s_half, z)", "y_inner = MatMul(h, w_half)", "y = Cast(y_inner)"],
    ),
}  # fmt: skip
WEIGHTS = {
    "w": normal((8, 8), 1), "two": np.array(2, np.float32), "axis": np.array([-1]), "eps": np.array(1e-5, np.float32),
    "first": np.array([0]), "lowest": np.array(-3.4e38, np.float32),
}  # fmt: skip


@pytest.mark.parametrize("case", GRAPHS)
def test_the_graph_before_and_after(case):
    text, after = GRAPHS[case]
    model = parse(f"g (float[2,8] x) => (float[2,8] y) {{ {text} }}", WEIGHTS)
    (want,) = run(model, X)
    assert convert(model).modified
    assert text_of(model) == [line for line in after if not (line == "x_half = Cast(x)" and "Dynamic" in text)]
    assert dtypes(model) == {"x": "FLOAT", "y": "FLOAT"}
    (got,) = run(model, X)
    assert got.dtype == np.float32
    assert error_db(want, got) > 50  # 11 bits


def test_inputs_and_outputs_on_request():
    model = linear_model(8, 8, rows="2")
    (want,) = run(model, X)
    assert convert(model, io=True).modified
    assert dtypes(model) == {"x": "FLOAT16", "y": "FLOAT16"}
    assert text_of(model) == ["y = MatMul(x, w_half)"]
    (got,) = run(model, {"x": X["x"].astype(np.float16)})
    assert error_db(want, got) > 50


def test_operators_are_kept_on_request():
    model = linear_model(8, 8, rows="2")
    result = convert(model, keep="MatMul+Conv")
    assert text_of(model) == ["y = MatMul(x, w)"]
    assert not result.modified


def test_constants_beyond_the_range_are_named_and_small_ones_counted():
    weight = normal((8, 8), 1)
    weight[0, :3] = 1e5, -2e6, 1e-6
    model = parse("g (float[2,8] x) => (float[2,8] y) { y = MatMul(x, w) }", {"w": weight})
    records = convert(model).records
    assert [(r.site, r.action, r.reason) for r in records] == [
        ("w", "rewritten", "2 of 64 values beyond 65504 became 65504 in float16, the largest of 2e+06"),
        ("float16", "rewritten", "64 constants converted, 1 of them (1.56%) too small for full precision"),
    ]
    stored = model.graph.initializers["w_half"].const_value.numpy()
    assert stored[0, :2].tolist() == [65504, -65504]


def test_a_constant_that_both_read_is_there_twice():
    text = "g (float[2,8] x) => (float[2,8] y) { h = MatMul(x, w) p = Pow(h, two) r = Sqrt(p) y = Mul(r, two) }"
    model = parse(text, WEIGHTS)
    convert(model)
    assert {name: value.dtype.name for name, value in model.graph.initializers.items()} == {
        "two": "FLOAT", "w_half": "FLOAT16",
    }  # fmt: skip


def test_a_type_that_values_share_changes_for_one_of_them():
    """A pass that inserts a node gives its result the type of what it reads, the very object."""
    model = parse("g (float[2,8] x) => (float[2,8] y) { h = Mul(x, w) r = Relu(x) y = Add(h, r) }", {"w": normal(8, 1)})
    for node in list(model.graph)[:2]:
        node.outputs[0].type = model.graph.inputs[0].type
    convert(model)
    assert dtypes(model) == {"x": "FLOAT", "y": "FLOAT"}
    assert text_of(model)[:3] == ["x_half = Cast(x)", "h = Mul(x_half, w_half)", "r = Relu(x_half)"]
    run(model, X)


def test_bodies_of_control_flow():
    text = """g (bool p, float[2,8] x) => (float[2,8] y) {
        a = Relu(x)
        y = If (p) <then_branch = yes () => (float[2,8] s) { b = MatMul(a, w) s = Exp(b) },
            else_branch = no () => (float[2,8] t) { t = Add(a, yes_eps) }>
    }"""
    model = parse(text, {"w": normal((8, 8), 1, scale=0.2), "yes_eps": np.array(0.5, np.float32)})
    want = [run(model, X | {"p": np.array(p)})[0] for p in (True, False)]
    convert(model)
    for p, expected in zip((True, False), want, strict=True):
        assert error_db(expected, run(model, X | {"p": np.array(p)})[0]) > 50


def test_a_loop_carries_float16():
    text = """g (float[2,8] x) => (float[2,8] y) {
        y = Loop (three, , x) <body = b (int64 i, bool go, float[2,8] h) => (bool go_on, float[2,8] k) {
            go_on = Identity(go) q = MatMul(h, w) p = Pow(q, two) k = Sqrt(p) }>
    }"""
    model = parse(text, {"three": np.array(3), "w": normal((8, 8), 1, scale=0.3), "two": np.array(2, np.float32)})
    (want,) = run(model, X)
    convert(model)
    assert error_db(want, run(model, X)[0]) > 45


@pytest.mark.parametrize("bits", [4, 8])
def test_block_scales_are_exact(bits):
    """They were rounded before the codes were chosen, so that the float32 form of the weight is the float16 form's."""
    model, ctx = linear_model(64, 24), context(scheme=f"w{bits}a16-g32-asym", float16=True)
    quantized(model, ctx)
    weight = model.graph.initializers["w"].const_value.dequantized()
    apply("fuse_matmul_nbits", model, ctx)
    before = model.graph.initializers["w_scales"].const_value.numpy()
    apply("convert_float16", model, ctx)
    apply("cleanup", model, ctx)
    after = model.graph.initializers["w_scales_half"].const_value.numpy()
    assert after.dtype == np.float16
    assert np.array_equal(before, after)
    x = normal((3, 64), 1)
    assert error_db(x @ weight.T, run(model, {"x": x})[0]) > (50 if bits == 4 else 35)  # 8 bits: int8 activations


def test_scales_of_an_integer_bias_stay_float32():
    """The product of two scales is too small for float16."""
    text = "g (float[2,8] x) => (float[2,8] y) { b = DequantizeLinear <axis = 0> (codes, scales) y = Add(x, b) }"
    scales = np.full(8, 3e-7, np.float32)
    model = parse(text, {"codes": np.arange(8, dtype=np.int32) * 10**6, "scales": scales})
    (want,) = run(model, X)
    convert(model)
    assert list(model.graph.initializers) == ["codes", "scales"]
    assert error_db(want, run(model, X)[0]) > 50


def test_sequences_are_left_alone():
    text = "g (float[2,8] x) => (float[4,8] y) { s = SequenceConstruct(x, x) y = ConcatFromSequence <axis = 0> (s) }"
    model = parse(text)
    model.graph[0].outputs[0].type = ir.SequenceType(ir.TensorType(ir.DataType.FLOAT))
    result = apply("convert_float16", model)
    assert not result.modified
    assert "sequences" in result.records[0].reason


def test_a_model_of_float16_is_not_touched():
    model = linear_model(8, 8, dtype="float16")
    before = serialized(model)
    assert not apply("convert_float16", model).modified
    assert serialized(model) == before


def test_what_was_float16_already_stays_as_it_is():
    text = """g (float16[2,8] a, float[2,8] x) => (float[2,8] y, float16[2,8] b) {
        b = Relu(a)
        up = Cast <to = 1> (b)
        e = Mul(up, two)
        s = Sqrt(e)
        y = Add(s, x)
    }"""
    model = parse(text, WEIGHTS)
    data = X | {"a": np.abs(normal((2, 8), 3)).astype(np.float16)}
    want = run(model, data)
    convert(model)
    assert text_of(model) == [
        "x_half = Cast(x)", "b = Relu(a)", "up = Cast(b)", "e = Mul(up, two)", "s = Sqrt(e)", "s_half = Cast(s)",
        "y_inner = Add(s_half, x_half)", "y = Cast(y_inner)",
    ]  # fmt: skip
    got = run(model, data)
    assert error_db(want[0], got[0]) > 50
    assert np.array_equal(want[1], got[1])


@pytest.mark.parametrize("scheme", ["w4a16", "w8a16"])
@pytest.mark.parametrize("form", ["matmulnbits", "qdq"])
def test_a_compiled_decoder(tmp_path, scheme, form):
    path = tmp_path / "decoder.onnx"
    path.write_bytes(serialized(decoder(layers=1)))
    found = {}
    for half in (False, True):
        result = compile_model(
            path, scheme, calibration=token_batches(9, rows=1, padded=False), float16=half, output_format=form,
            accuracy_level=0, algorithms=("rtn",), threads=1,
        )  # fmt: skip
        found[half] = result.report.verification.sqnr_db
        assert result.report.config.recipe()["float16"] == half
    assert found[True] > found[False] - 1


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic-tensor", "w8a8-dynamic-token"])
def test_integer_operators_stay_integer(tmp_path, scheme):
    """Their scales are float32: ONNX Runtime's CPU provider fuses no others."""
    path = tmp_path / "decoder.onnx"
    path.write_bytes(serialized(decoder(layers=1)))
    found = {}
    for half in (False, True):
        result = compile_model(
            path, scheme, calibration=token_batches(9, rows=1, padded=False), float16=half, algorithms=("rtn",),
            threads=1,
        )  # fmt: skip
        counts = result.report.verification.fused["CPUExecutionProvider"]
        kernels = {"MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm"}
        found[half] = sum(counts.get(name, 0) for name in kernels), result.report.verification.sqnr_db
    assert found[True][0] == found[False][0] > 0
    assert found[True][1] > found[False][1] - 2


def test_nothing_but_float16(tmp_path):
    path, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    path.write_bytes(serialized(linear_model(256, 128)))
    result = compile_model(path, float16=True, output=out, plan=SchemePlan(None))
    assert result.report.quantized_sites == 0
    assert result.report.verification.sqnr_db > 50
    assert out.stat().st_size < 0.6 * path.stat().st_size
