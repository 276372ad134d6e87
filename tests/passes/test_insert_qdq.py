"""Calibrated Q/DQ pairs: where they are, with which scales, what they cost, and what is left as it was."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.driver import compile_model
from qcompiler.errors import CalibrationError, SchemeError
from qcompiler.files.saver import save_model
from qcompiler.numerics.metrics import sqnr_db
from qcompiler.scheme import Scheme
from qcompiler.scheme_plan import Pattern, SchemePlan
from qcompiler.session import saturates
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
    text_of,
    token_batches,
    with_outputs,
)
from tests.integer_models import CONV, IMAGE, ROWS, TOKENS, WEIGHTS, batches, check, executed, graph, integers

RESIDUAL = f"a = {CONV}(x, w0) r = Relu(a) b = {CONV}(r, w1) s = Add(r, b) y = {CONV}(s, w2)"


def inserted(model, data, scheme="w8a8", **options):
    """The model with quantized weights and Q/DQ pairs, not lowered; the pass's result."""
    ctx = context(scheme=scheme, batches=data, **options)
    quantized(model, ctx)
    apply("raise_opset", model, ctx)
    return apply("insert_qdq", model, ctx)


def without_pairs(model):
    """The model whose activations are not quantized any more: every reader of decoded codes reads the value."""
    for node in list(model.graph):
        if node.op_type != "DequantizeLinear":
            continue
        codes, value = node.inputs[0], node.outputs[0]
        encode = codes.producer()
        if encode is None:
            continue
        assert encode.op_type == "QuantizeLinear"
        value.replace_all_uses_with(encode.inputs[0], replace_graph_outputs=True)
    return model


def test_the_graph_before_and_after():
    model, data = (
        graph("[one] h = MatMul(x, m0) n = Neg(h) [two] t = MatMul(h, m1) y = Add(t, n)", TOKENS),
        batches(TOKENS),
    )
    result = inserted(model, data)
    assert text_of(model) == [
        "one_QuantizeLinear_output = QuantizeLinear(x, x_scale, x_zero_point)",
        "one_DequantizeLinear_output = DequantizeLinear(one_QuantizeLinear_output, x_scale, x_zero_point)",
        "h = MatMul(one_DequantizeLinear_output, m0)",
        "one_QuantizeLinear_1_output = QuantizeLinear(h, h_scale, h_zero_point)",
        "Neg_DequantizeLinear_output = DequantizeLinear(one_QuantizeLinear_1_output, h_scale, h_zero_point)",
        "n = Neg(Neg_DequantizeLinear_output)",
        "two_DequantizeLinear_output = DequantizeLinear(one_QuantizeLinear_1_output, h_scale, h_zero_point)",
        "t = MatMul(two_DequantizeLinear_output, m1)",
        "y = Add(t, n)",
    ]
    assert result.modified
    assert only(result, "activation") == ["x", "h"]
    for record in result.records:
        assert record.spec == "uint8"
        assert record.reason in ("minmax", "percentile", "mse", "entropy")
        constant = model.graph.initializers[f"{record.site}_scale"].const_value
        assert constant.shape.rank() == 0  # ONNX Runtime does not fuse scales of shape [1]
        assert record.metrics["scale"] == constant.numpy()


def test_scales_are_those_of_the_data_as_the_quantized_weights_compute_it():
    model, data = graph(RESIDUAL), batches()
    ctx = context(scheme="w8a8", batches=data, calibrator="minmax")
    quantized(model, ctx)
    source = with_outputs(model, ["x", "r", "b", "s"])
    seen = [dict(zip("rbsy", run(source, feeds, outputs=list("rbsy")), strict=True), **feeds) for feeds in data]
    apply("insert_qdq", model, ctx)
    for name in "xrbsy":
        low, high = min(s[name].min() for s in seen), max(s[name].max() for s in seen)
        scale = (max(high, 0) - min(low, 0)) / 255
        constants = [model.graph.initializers[f"{name}_{part}"].const_value.numpy() for part in ("scale", "zero_point")]
        assert constants[0] == pytest.approx(scale, rel=1e-5)
        assert constants[1] == round(-min(low, 0) / scale)
        assert constants[1].dtype == np.uint8


@pytest.mark.parametrize(("form", "target"), [("asym", "cpu"), ("sym", "cpu"), ("sym", "tensorrt")])
def test_symmetric_grids(form, target):
    model = graph(f"a = {CONV}(x, w0) n = Neg(a) y = {CONV}(n, w1)")
    inserted(model, batches(), f"w8a8-{form}", target=target)
    zero = model.graph.initializers["n_zero_point"].const_value.numpy()
    assert zero.dtype == (np.int8 if target == "tensorrt" else np.uint8)
    assert (zero in (0, 128)) is (form == "sym")


def test_values_that_share_a_scale_do():
    pool = "MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]>"
    model = graph(f"a = {CONV}(x, w0) p = {pool}(a) c = Concat <axis = 1> (a, p) y = {CONV}(c, wide)")
    result = inserted(model, batches(), calibrator="minmax")
    values = {value.name: value for node in model.graph for value in node.outputs}
    encoders = [use.node for name in "apc" for use in values[name].uses() if use.node.op_type == "QuantizeLinear"]
    assert len(encoders) == 3
    assert len({node.inputs[1:3] for node in encoders}) == 1  # the very same constants
    shared = {record.site: record for record in result.records if "shared" in record.reason}
    assert list(shared) == ["a", "p", "c"]
    assert {record.reason for record in shared.values()} == {"minmax, shared by 3 values"}
    assert len({record.metrics["low"] for record in shared.values()}) == 1


def test_outputs_that_are_decoded_keep_name_type_and_shape_and_whoever_else_reads_them_reads_the_same():
    outputs = "float[B,8,6,6] y, float[B,8,6,6] a, float[B,8,6,6] n"
    model, data = graph(f"a = {CONV}(x, w0) n = Neg(a) y = {CONV}(a, w1)", outputs=outputs), batches()
    before = [(value.name, value.dtype, value.shape) for value in model.graph.outputs]
    reference = run(model, data[0])
    integers(model, data)
    assert [(value.name, value.dtype, value.shape) for value in model.graph.outputs] == before
    y, a, n = run(model, data[0])
    np.testing.assert_array_equal(n, -a)
    scale = model.graph.initializers["a_scale"].const_value.numpy()
    assert np.abs(a / scale - np.rint(a / scale)).max() < 1e-3  # whole steps
    assert check(model, reference, data[0], 32) == ["Neg", "QLinearConv", "QLinearConv"]
    assert y.shape == a.shape


def test_an_output_that_is_listed_twice():
    model, data = graph(f"y = {CONV}(x, w0)"), batches()
    model.graph.outputs.append(model.graph.outputs[0])
    inserted(model, data)
    assert [value.name for value in model.graph.outputs] == ["y", "y"]
    assert model.graph.outputs[0] is model.graph.outputs[1]


def test_constants_of_integer_operators_are_stored_as_codes_and_others_stay():
    model, data = (
        graph(f"a = {CONV}(x, w0) m = Mul(gains, a) n = Neg(gains) s = Mul(m, gains) y = {CONV}(s, w1)"),
        batches(),
    )
    model.graph.outputs.append(model.graph[2].outputs[0])
    reference = run(model, data[0])
    records = integers(model, data)
    (record,) = (record for record in records if record.reason == "constant")
    assert record.site == "gains"
    assert model.graph.initializers["gains_codes"].const_value.dtype == ir.DataType.UINT8
    outputs = run(model, data[0])
    np.testing.assert_array_equal(outputs[1], reference[1])
    assert check(model, reference, data[0], 28).count("QLinearMul") == 2  # two more roundings than a chain's


def test_bodies_read_decoded_codes_which_are_decoded_before_them():
    model = parse(
        f"""g (bool c, float[1,8,6,6] x) => (float[1,8,6,6] y) {{
            a = {CONV}(x, w0)
            y = If (c) <then_branch = yes () => (float[1,8,6,6] s) {{ s = Neg(a) }},
                else_branch = no () => (float[1,8,6,6] t) {{ u = Abs(a) t = Add(u, a) }}>
        }}""",
        {"w0": WEIGHTS["w0"]},
    )
    data = [{"c": np.array(i % 2 == 0), "x": normal((1, 8, 6, 6), i)} for i in range(4)]
    reference = [run(model, feeds) for feeds in data]
    integers(model, data)
    assert [line.split(" = ")[1].split("(")[0] for line in text_of(model)] == [
        "QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "Conv", "QuantizeLinear",
        *["DequantizeLinear"] * 3, "If",
    ]  # fmt: skip
    for feeds, expected in zip(data, reference, strict=True):
        assert "QLinearConv" in check(model, expected, feeds, 36)


def test_metadata_of_the_model_survive():
    model, data = graph(RESIDUAL), batches()
    model.metadata_props["author"] = "me"
    model.graph[0].metadata_props["pkg.torch.onnx.stack_trace"] = "line 3"
    names = [node.name for node in model.graph]
    inserted(model, data)
    assert model.metadata_props["author"] == "me"
    assert set(names) <= {node.name for node in model.graph}
    made = [node for node in model.graph if node.op_type.endswith("eLinear")]
    assert made
    assert all(node.metadata_props["qcompiler.pass"] == "insert_qdq" for node in made)
    assert all("qcompiler.scheme" not in node.metadata_props for node in made)
    assert [value.name for value in model.graph.inputs] == ["x"]


@pytest.mark.parametrize("kind", [IMAGE, ROWS])
def test_half_precision_without_types_of_the_values_between(kind):
    body = RESIDUAL if kind is IMAGE else "h = Gemm(x, m0, b0) r = Relu(h) y = Gemm(r, m1, b1)"
    model, data = graph(body, kind, dtype="float16"), batches(kind, dtype="float16")
    assert model.graph[0].outputs[0].dtype is None
    reference = run(model, data[0])
    integers(model, data)
    scales = [v.const_value for name, v in model.graph.initializers.items() if name.endswith("_scale")]
    assert scales
    assert {scale.dtype for scale in scales} == {ir.DataType.FLOAT16}
    check(model, reference, data[0], 31)


def test_tiny_values_of_half_precision_get_a_scale_that_is_none_of_its_smallest_numbers():
    model, data = graph("y = Gemm(x, m0)", ROWS, dtype="float16"), batches(ROWS, dtype="float16")
    for feeds in data:
        feeds["x"] *= np.float16(1e-6)
    inserted(model, data)
    assert model.graph.initializers["x_scale"].const_value.numpy() == np.finfo(np.float16).tiny


def test_values_that_are_always_zero():
    model, data = graph("a = MatMul(x, m0) z = Mul(a, b0) y = MatMul(z, m1)", TOKENS), batches(TOKENS)
    model.graph.initializers["b0"].const_value = ir.Tensor(np.zeros(8, np.float32), name="b0")
    reference = run(model, data[0])
    integers(model, data)
    assert not reference[0].any()
    assert not run(model, data[0], optimize=True)[0].any()


@pytest.mark.parametrize("text", ["w8a8", "w8a16int"])
@pytest.mark.parametrize("name", ["convolutions", "decoder"])
def test_without_the_pairs_the_model_is_the_one_with_quantized_weights(name, text):
    model, data = (graph(RESIDUAL), batches()) if name == "convolutions" else (decoder(1), token_batches(3))
    ctx = context(scheme=text, batches=data, target="portable" if text == "w8a16int" else "cpu")
    quantized(model, ctx)
    expected = run(model, data[0])
    apply("insert_qdq", model, ctx)
    rounded = run(model, data[0])
    assert sqnr_db(expected[0], rounded[0]) < 100
    for found, reference in zip(run(without_pairs(model), data[0]), expected, strict=True):
        np.testing.assert_allclose(found, reference, rtol=1e-5, atol=1e-5 * np.abs(reference).max())


def test_16_bits_lose_30_db_less_than_8_where_the_weights_lose_nothing():
    codes = np.random.default_rng(0).integers(-127, 128, (3, 8, 8, 3, 3)).astype(np.float32) / 1024
    codes[:, :, 0, 0, 0] = 127 / 1024  # so that the scale is 1 / 1024
    found, data = {}, batches()
    for text in ("w8a8", "w8a16int"):
        model = parse(
            f"g (float[B,8,6,6] x) => (float[B,8,6,6] y) {{ a = {CONV}(x, w0) r = Relu(a) b = {CONV}(r, w1) "
            f"y = {CONV}(b, w2) }}",
            {f"w{i}": codes[i] for i in range(3)},
        )
        reference = run(model, data[0])
        records = integers(model, data, text, target="portable", calibrator="minmax", reduce_range=False)
        assert all(
            record.spec == f"uint{16 if 'int' in text else 8}" for record in records if record.action == "activation"
        )
        found[text] = sqnr_db(reference[0], run(model, data[0])[0])
    assert found["w8a16int"] - found["w8a8"] >= 30  # 8 bits are 48 dB; rounding of the scales in float32 takes some


def test_products_are_quantized_unless_the_user_says_otherwise():
    body = "q = MatMul(x, m0) t = Transpose <perm = [0, 2, 1]> (x) [scores] s = MatMul(q, t) y = MatMul(s, x)"
    data = batches(TOKENS)
    for options, ignored, count in (({}, (), 6), ({"products": "false"}, (), 1), ({}, ("scores",), 3)):
        model = graph(body, TOKENS)
        plan = SchemePlan(Scheme.parse("w8a8"), ignore=tuple(map(Pattern, ignored)))
        ctx = context(plan=plan, batches=data)
        quantized(model, ctx)
        apply("insert_qdq", model, ctx, **options)
        assert sum(node.op_type == "DequantizeLinear" for node in model.graph) == count - (count == 6)


def test_two_static_formats_are_refused():
    model, data = graph("a = MatMul(x, m0) n = Neg(a) [two] y = MatMul(n, m1)", TOKENS), batches(TOKENS)
    plan = SchemePlan(Scheme.parse("w8a8"), overrides=((Pattern("two"), Scheme.parse("w8a8-sym")),))
    ctx = context(plan=plan, batches=data)
    quantized(model, ctx)
    with pytest.raises(SchemeError, match="two static formats of activations in one model"):
        apply("insert_qdq", model, ctx)


@pytest.mark.parametrize("data", [None, []])
def test_no_calibration_data(data):
    model = graph("y = MatMul(x, m0)", TOKENS)
    with pytest.raises(CalibrationError) as caught:
        inserted(model, data)
    assert str(caught.value) == (
        "static activations need calibration data for their ranges; give --calibration PATH, or use a -dynamic scheme"
    )
    with pytest.raises(CalibrationError, match="static activations need calibration data"):
        compile_model(ir.serde.serialize_model(graph("y = MatMul(x, m0)", TOKENS)), "w8a8")


def test_a_static_site_inside_a_body_is_refused_with_the_remedy():
    model = parse(
        """g (bool c, float[4,8] x) => (float[4,8] y) {
            [choice] y = If (c) <then_branch = yes () => (float[4,8] s) { [in] s = MatMul(x, own) },
                else_branch = no () => (float[4,8] t) { t = Neg(x) }>
        }""",
        {"yes.own": WEIGHTS["m1"]},
    )
    ctx = context(scheme="w8a8", batches=[{"c": np.array(True), "x": normal((4, 8), 1)}])
    result = apply("assign_scheme", model, ctx)
    (record,) = result.records
    assert record.action == "skipped"
    assert record.reason == "inside the body of choice, where no ranges can be measured; use w8a8-dynamic"
    assert not apply("insert_qdq", model, ctx).modified


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8-dynamic", "w4a8"])
def test_nothing_happens_without_a_static_site(scheme):
    model = linear_model()
    ctx = context(scheme=scheme, batches=[])
    quantized(model, ctx)
    before = serialized(model)
    result = apply("insert_qdq", model, ctx)
    assert not result.modified
    assert result.records == ()
    assert serialized(model) == before


def test_reduced_range_uses_7_bits_of_the_weights():
    model, data = graph(f"a = {CONV}(x, w0) y = {CONV}(a, w1)"), batches()
    reference = run(model, data[0])
    integers(model, data, reduce_range=True)
    for name in ("w0_codes", "w1_codes"):
        codes = model.graph.initializers[name].const_value.numpy()
        assert codes.dtype == np.int8
        assert np.abs(codes.astype(int)).max() == 63
        assert (np.abs(codes.astype(int)).reshape(8, -1).max(1) == 63).all()
    assert check(model, reference, data[0], 28) == ["QLinearConv", "QLinearConv"]  # 6 dB less for a bit less


MIXED = (("l0_down", "w4a16-g16"), ("l1_q", "w8a8-dynamic"))


def mixed():
    return dict(
        plan=SchemePlan(
            Scheme.parse("w8a8"),
            Scheme.parse("w8a16-g32"),
            Scheme.parse("w8a16-g32"),
            overrides=(
                (Pattern("l0_down"), Scheme.parse("w4a16-g16")),
                (Pattern("l1_q"), Scheme.parse("w8a8-dynamic")),
            ),
        ),
        algorithms=("rtn",),
        verify=False,
        reduce_range=saturates(),
    )


def test_schemes_of_every_kind_in_one_model(tmp_path):
    model, data = decoder(2), token_batches(4)
    source = ir.serde.serialize_model(model)
    reference = run(model, data[0])[0]
    result = compile_model(source, calibration=data, output=tmp_path / "out.onnx", **mixed())
    (found,), operators = executed((tmp_path / "out.onnx").read_bytes(), data[0])
    mask = data[0]["attention_mask"].astype(bool)
    assert sqnr_db(reference[mask], found[mask]) > 20 - 6 * saturates()  # 4-bit weights among them
    assert operators.count("MatMulNBits") == 2  # l0_down, and the projection onto the vocabulary
    assert operators.count("GatherBlockQuantized") == 1
    # Twelve float32 products, and four of two activations, without l0_down and the product that reads no codes.
    assert operators.count("MatMulIntegerToFloat") + operators.count("QLinearMatMul") == 13 + 4
    assert "MatMul" not in operators
    schemes = {r.site: r.spec for p in result.report.passes for r in p.records if r.action == "assigned"}
    assert schemes["l0_down"].startswith("w4a16")
    assert schemes["l1_q"] == "w8a8-dynamic-token-sym"
    assert schemes["l0_q"] == "w8a8-static-tensor-asym"


def test_the_same_input_gives_the_same_bytes(tmp_path):
    source, written = ir.serde.serialize_model(decoder(1)), []
    options = mixed()
    options["plan"] = SchemePlan(Scheme.parse("w8a8"), Scheme.parse("w8a16"), Scheme.parse("w8a16"))
    for threads in (1, 2):
        path = tmp_path / str(threads) / "out.onnx"
        path.parent.mkdir()
        compile_model(source, calibration=token_batches(4), output=path, threads=threads, **options)
        model = ir.load(path)
        model.metadata_props.clear()  # the recipe names the number of threads
        save_model(model, path.with_name("bare.onnx"), force=False)
        written.append(path.with_name("bare.onnx").read_bytes())
    assert written[0] == written[1]
