"""The QDQ form: what it computes, that ONNX Runtime fuses it, and what its fusion makes of our bytes."""

import gc
import tracemalloc

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qcompiler.errors import KernelError, PassError
from qcompiler.files.saver import save_model
from qcompiler.graph import PASS_KEY
from qcompiler.scheme import Scheme
from qcompiler.scheme_plan import SchemePlan
from qcompiler.session import OrtRunner
from qcompiler.sites import find_sites
from tests.builders import apply, context, linear_model, normal, only, parse, quantized, run, serialized, text_of
from tests.integer_models import REACH, ROWS, TOKENS, WEIGHTS, batches, check, graph, integers

SYMMETRY = pytest.mark.parametrize("form", ["sym", "asym"])


@pytest.fixture
def run_fused(tmp_path):
    """Returns outputs with ONNX Runtime's optimizations, and the operators it made of the graph and its bodies."""
    import onnxruntime

    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 25):
        pytest.skip("before ONNX Runtime 1.25 only some QDQ forms are fused")

    def run(model, feeds, level=0):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(level))
        session = onnxruntime.InferenceSession(serialized(model), options, providers=["CPUExecutionProvider"])
        optimized = ir.load(tmp_path / "optimized.onnx")
        return session.run(None, feeds), sorted(node.op_type for graph in optimized.graphs() for node in graph)

    return run


@pytest.fixture(scope="module")
def opset_25():
    """Skips where 2-bit integers cannot be had."""
    model = parse("g (float[2] x) => (float[2] y) { y = Neg (x) }", opset=25)
    try:
        OrtRunner(serialized(model))
    except KernelError:
        pytest.skip("this ONNX Runtime does not know opset 25, which 2-bit integers need")


def configured(scheme, tables="w8a16-g32-asym", heads=None, **options):
    plan = SchemePlan(Scheme.parse(scheme), Scheme.parse(tables), Scheme.parse(heads or tables))
    return context(plan=plan, **options)


def qdq(model, scheme="w4a16-g32-asym", *others):
    """The model in QDQ form; the weights it stands for, float32 [N, K], by site; what the pass said of each."""
    ctx = configured(scheme, *others, output_format="qdq")
    quantized(model, ctx)
    weights = {site.name: site.quantized.dequantized() for site in find_sites(model)[0] if site.quantized}
    apply("raise_opset", model, ctx)
    result = apply("export_qdq", model, ctx)
    assert result.modified
    assert only(result, "fused") == list(weights)
    apply("cleanup", model, ctx)
    return model, weights, {record.site: record.reason for record in result.records}


def matmul_nbits(model, scheme, *others):
    """The model in the other form, with exact compute."""
    ctx = configured(scheme, *others, accuracy_level=0)
    quantized(model, ctx)
    for name in ("fuse_gather", "fuse_matmul_nbits", "cleanup"):
        apply(name, model, ctx)
    return model


def assert_close(found, expected):
    """Alike up to rounding in float32."""
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("size", ["g16", "g32", "g64", "g128", "g256", "channel"])
@SYMMETRY
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_format_computes_and_fuses_exactly(bits, size, form, run_fused, request):
    if bits == 2:
        request.getfixturevalue("opset_25")
    scheme, feeds = f"w{bits}a16-{size}-{form}", {"x": normal((3, 200), 5)}  # K = 200 leaves ragged last blocks
    for op in ("MatMul", "Gemm"):
        model, weights, _ = qdq(linear_model(200, 24, op=op, opset=12), scheme)
        assert_close(run(model, feeds)[0], feeds["x"] @ weights["fc"].T)
        outputs, operators = run_fused(model, feeds)
        assert operators == ["MatMulNBits"]
        assert_close(outputs[0], run(matmul_nbits(linear_model(200, 24, op=op), scheme), feeds, optimize=True)[0])


@SYMMETRY
@pytest.mark.parametrize("N", [5, 6, 7])
def test_two_bits_with_an_odd_number_of_columns_are_held_in_four(form, N, run_fused):
    feeds = {"x": normal((3, 96), 5)}
    model, weights, notes = qdq(linear_model(96, N, opset=12), f"w2a16-g32-{form}")
    assert model.opset_imports[""] == 21
    assert notes["fc"] == (
        f"DequantizeLinear of {'int4' if form == 'sym' else 'uint4'}, block 32, holding 2-bit codes because N = {N} is "
        "no multiple of 4"
    )
    outputs, operators = run_fused(model, feeds)
    assert operators == ["MatMulNBits"]
    assert_close(outputs[0], feeds["x"] @ weights["fc"].T)


@SYMMETRY
@pytest.mark.parametrize("N", [24, 5])
def test_three_bits_are_held_in_four_and_need_no_more_than_these(form, N, run_fused):
    model, weights, notes = qdq(linear_model(96, N, opset=12), f"w3a16-g32-{form}")
    assert model.opset_imports[""] == 21
    kind = "int4" if form == "sym" else "uint4"
    assert notes["fc"] == f"DequantizeLinear of {kind}, block 32, holding 3-bit codes"
    codes = next(tensor for name, tensor in model.graph.initializers.items() if name.endswith("_codes")).const_value
    assert codes.dtype.name.lower() == kind
    values = codes.numpy().astype(int)
    assert (values.min(), values.max()) == ((-4, 3) if form == "sym" else (0, 7))
    unit = {"x": np.eye(96, dtype=np.float32)}
    outputs, operators = run_fused(model, unit)
    assert operators == ["MatMulNBits"]
    assert np.array_equal(outputs[0], weights["fc"].T)
    assert np.array_equal(run(model, unit)[0], weights["fc"].T)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("[fc] y = MatMul (x, w)", ["y = MatMul(x, dq)"]),
        ("t = Transpose <perm = [1, 0]> (wt) [fc] y = MatMul (x, t)", ["y = MatMul(x, dq)"]),
        ("[fc] y = Gemm (x, w)", ["y = Gemm(x, dq)"]),
        ("[fc] y = Gemm <transB = 1> (x, wt, b)", ["y = Gemm(x, dq, b)"]),
        ("[fc] y = Gemm (x, w, c)", ["y = Gemm(x, dq, c)"]),
        ("[fc] y = Gemm (x, w, row)", ["y = Gemm(x, dq, row_vector)"]),
        ("[fc] y = Gemm (x, w, one)", ["fc_MatMul_output = MatMul(x, dq)", "y = Add(fc_MatMul_output, one)"]),
        ("[fc] h = MatMul (x, w) y = Add (row, h)", ["h = MatMul(x, dq)", "y = Add(row_vector, h)"]),
        ("[fc] h = MatMul (x, w) y = Add (h, one)", ["h = MatMul(x, dq)", "y = Add(h, one)"]),
    ],
)
def test_the_graph_before_and_after(before, after, run_fused):
    w, b = normal((64, 24), 0), normal(24, 1)
    known = {"w": w, "wt": w.T.copy(), "b": b, "row": b[None], "one": b[:1], "c": b}
    (stored,) = {"w", "wt"} & set(before.replace(")", " ").replace(",", " ").replace("(", " ").split())
    (bias,) = {"b", "row", "one", "c"} & set(before.replace(")", " ").replace(",", " ").replace("(", " ").split()) or (
        "",
    )
    constants = {name: known[name] for name in (stored, bias) if name not in ("", "c")}
    text = f"g (float[M,64] x, float[24] c) => (float[M,24] y) {{ {before} }}"
    model, weights, _ = qdq(parse(text, constants))
    decode = f"dq = DequantizeLinear({stored}_codes, {stored}_scales, {stored}_zero_points)"
    assert [line.replace("fc_DequantizeLinear_output", "dq") for line in text_of(model)] == [decode, *after]
    assert all(PASS_KEY in node.metadata_props for node in model.graph if node.name.startswith("fc"))
    feeds = {"x": normal((3, 64), 2), "c": b}
    (values,) = weights.values()
    expected = feeds["x"] @ values.T + (known[bias] if bias else 0)
    outputs, operators = run_fused(model, feeds)
    assert "MatMulNBits" in operators
    assert "DequantizeLinear" not in operators
    assert_close(outputs[0], expected)
    assert_close(run(model, feeds)[0], expected)


def test_a_bias_that_gives_the_result_an_axis_is_left_alone():
    text = "g (float[64] x) => (float[1,24] y) { [fc] h = MatMul (x, w) y = Add (h, row) }"
    model, *_ = qdq(parse(text, {"w": normal((64, 24), 0), "row": normal((1, 24), 1)}))
    assert text_of(model)[1:] == ["h = MatMul(x, fc_DequantizeLinear_output)", "y = Add(h, row)"]
    assert run(model, {"x": normal(64, 2)})[0].shape == (1, 24)


def test_a_weight_with_a_leading_one_becomes_a_matrix(run_fused):
    text = "g (float[B,S,64] x) => (float[B,S,24] y) { [fc] y = MatMul (x, w) }"
    model, weights, _ = qdq(parse(text, {"w": normal((1, 64, 24), 0)}))
    x = normal((2, 3, 64), 1)
    outputs, operators = run_fused(model, {"x": x})
    assert operators == ["MatMulNBits"]
    assert_close(outputs[0], x @ weights["fc"].T)


def test_half_precision_stays_half_precision(run_fused):
    model, *_ = qdq(linear_model(64, 24, dtype="float16", bias=True))
    feeds = {"x": normal((3, 64), 1, "float16")}
    outputs, operators = run_fused(model, feeds)
    assert set(operators) <= {"Cast", "MatMulNBits"}
    assert outputs[0].dtype == np.float16
    np.testing.assert_allclose(outputs[0], run(model, feeds)[0], atol=0.05)  # sums in float16 and in float32


def test_sites_that_share_a_weight_have_constants_of_their_own_that_are_stored_once(run_fused, tmp_path):
    text = """g (float[M,256] x) => (float[M,256] y, float[M,256] z) {
        [first] h = MatMul (x, w) [second] y = MatMul (h, w) r = Relu (h) [third] z = Gemm (r, w) }"""
    model, *_ = qdq(parse(text, {"w": normal((256, 256), 0, scale=0.1)}), "w8a16-g64-sym")
    feeds = {"x": normal((3, 256), 1)}
    outputs, operators = run_fused(model, feeds)
    assert operators == ["MatMulNBits", "MatMulNBits", "MatMulNBits", "Relu"]
    for fused, plain in zip(outputs, run(model, feeds), strict=True):
        assert_close(fused, plain)
    _, data = save_model(model, tmp_path / "shared.onnx", force=False, external=True)
    assert data.stat().st_size == 256 * 256 + 4 * 256 * 4


LOOKUP = "g (int64[B,S] i) => (float[B,S,64] y) { [embed] y = Gather (w, i) }"


def test_a_lookup_before_and_after():
    model, *_ = qdq(parse(LOOKUP, {"w": normal((300, 64), 0)}, opset=13), "w4a16", "w8a16-g16-asym")
    assert [line.replace("embed_", "") for line in text_of(model)] == [
        "Gather_output = Gather(w_table, i)",
        "Gather_1_output = Gather(w_table_scales, i)",
        "Gather_2_output = Gather(w_table_zero_points, i)",
        "Cast_output = Cast(Gather_output)",
        "Cast_1_output = Cast(Gather_2_output)",
        "Sub_output = Sub(Cast_output, Cast_1_output)",
        "Mul_output = Mul(Sub_output, Gather_1_output)",
        "y = Reshape(Mul_output, w_shape)",
    ]
    model, *_ = qdq(parse(LOOKUP, {"w": normal((300, 64), 0)}, opset=13), "w4a16", "w8a16-channel-sym")
    assert [line.replace("embed_", "") for line in text_of(model)] == [
        "Gather_output = Gather(w_table, i)",
        "Gather_1_output = Gather(w_table_scales, i)",
        "Cast_output = Cast(Gather_output)",
        "y = Mul(Cast_output, Gather_1_output)",
    ]


@SYMMETRY
@pytest.mark.parametrize("size", ["g16", "g64", "channel"])
def test_a_lookup_table_is_exact(size, form, run_fused):
    scheme = f"w8a16-{size}-{form}"
    model, weights, notes = qdq(parse(LOOKUP, {"w": normal((300, 64), 0)}, opset=12), "w4a16", scheme)
    assert model.opset_imports[""] == 13
    block = "block 16" if size == "g16" else "per channel"
    assert notes["embed"] == f"Gather of {'int8' if form == 'sym' else 'uint8'}, Cast, Mul, {block}"
    rows = np.array([[0, 5, 299], [-1, 7, -300]])
    for outputs in (run(model, {"i": rows}), run_fused(model, {"i": rows})[0]):
        np.testing.assert_array_equal(outputs[0], weights["embed"][rows])


@SYMMETRY
@pytest.mark.parametrize("shape", [(), (4,), (1, 2, 3, 1), (0, 5), None])
def test_indices_of_any_rank_and_a_turned_table(shape, form):
    text = """g (int64INDICES i, int64[R] s) => (float16ROWS y) {
        t = Transpose <perm = [1, 0]> (w) j = Reshape (i, s) [embed] y = Gather (t, j) }"""
    if shape is None:
        text = text.replace("INDICES", "[2,3]").replace("ROWS", "[]")  # the rank of j is not known
        rows = np.random.default_rng(1).integers(0, 300, (2, 3))
    else:
        text = text.replace("(t, j)", "(t, i)").replace("[]", "")
        axes = [*map(str, shape), "72"]
        text = text.replace("INDICES", f"[{','.join(axes[:-1])}]" if shape else "").replace(
            "ROWS", f"[{','.join(axes)}]"
        )
        rows = np.random.default_rng(1).integers(0, 300, shape)
    weights = {"w": normal((72, 300), 0, "float16")}  # K = 72: one block of 64 and a ragged one
    model, weights, _ = qdq(parse(text, weights), "w4a16", f"w8a16-g64-{form}")
    (found,) = run(model, {"i": rows, "s": np.array(np.shape(rows), np.int64)})
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, weights["embed"].astype(np.float16)[rows])


TIED = """g (int64[B,S] i) => (float[B,S,600] y, float[B,S,72] h) {
    [embed] h = Gather (w, i) t = Transpose <perm = [1, 0]> (w) [head] y = MatMul (h, t) }"""


@SYMMETRY
@pytest.mark.parametrize("size", ["g16", "g32", "channel"])  # K = 72 is ragged in both
def test_tied_weights_are_stored_once_and_fuse(size, form, run_fused):
    scheme = f"w8a16-{size}-{form}"
    model, weights, notes = qdq(parse(TIED, {"w": normal((600, 72), 0)}), "w4a16", scheme)
    assert notes["head"].endswith(", codes shared with the lookup table")
    assert sum(value.const_value.size >= 600 * 72 for value in model.graph.initializers.values()) == 1
    feeds = {"i": np.array([[3, 599], [0, 7]])}
    outputs, operators = run_fused(model, feeds)
    assert operators.count("MatMulNBits") == 1
    assert not {"DequantizeLinear", "MatMul", "Transpose"} & set(operators)
    np.testing.assert_array_equal(outputs[1], weights["embed"][feeds["i"]])
    ours = run(matmul_nbits(parse(TIED, {"w": normal((600, 72), 0)}), "w4a16", scheme), feeds, optimize=True)
    for found, plain, expected in zip(outputs, run(model, feeds), ours, strict=True):
        assert_close(found, expected)
        assert_close(plain, expected)


def test_a_second_projection_of_a_tied_weight_has_constants_of_its_own(run_fused):
    text = """g (int64[S] i) => (float[S,600] y, float[S,600] z) {
        [embed] h = Gather (w, i) t = Transpose <perm = [1, 0]> (w) [head] y = MatMul (h, t)
        r = Relu (h) [other] z = Gemm <transB = 1> (r, w) }"""
    model, _, notes = qdq(parse(text, {"w": normal((600, 64), 0)}), "w4a16")
    assert [note.endswith("shared with the lookup table") for note in notes.values()] == [False, True, False]
    feeds = {"i": np.array([3, 599])}
    outputs, operators = run_fused(model, feeds)
    assert operators.count("MatMulNBits") == 2
    for found, plain in zip(outputs, run(model, feeds), strict=True):
        assert_close(found, plain)


def test_a_weight_around_a_body_is_given_to_the_body(run_fused):
    text = """g (float[M,64] x, bool c) => (float[M,24] y) { [if] y = If (c) <
        then_branch = t () => (float[M,24] a) { [yes] a = MatMul (x, w) },
        else_branch = e () => (float[M,24] b) { [no] n = Neg (x) [no_fc] b = MatMul (n, w) }> }"""
    model, weights, _ = qdq(parse(text, {"w": normal((64, 24), 0)}))
    for flag in (True, False):
        feeds = {"x": normal((3, 64), 1), "c": np.array(flag)}
        outputs, operators = run_fused(model, feeds)
        assert operators == ["If", "MatMulNBits", "MatMulNBits", "Neg"]
        assert_close(outputs[0], (feeds["x"] if flag else -feeds["x"]) @ weights["yes"].T)


def test_a_tied_projection_in_a_body_reads_the_table_around_it(run_fused):
    text = """g (int64[S] i, bool c) => (float[S,600] y) { [embed] h = Gather (w, i) [if] y = If (c) <
        then_branch = t () => (float[S,600] a) { [head] a = Gemm <transB = 1> (h, w) },
        else_branch = e () => (float[S,600] b) { n = Neg (h) [other] b = Gemm <transB = 1> (n, w) }> }"""
    model, weights, _ = qdq(parse(text, {"w": normal((600, 64), 0)}), "w4a16")
    for flag in (True, False):
        feeds = {"i": np.array([3, 599]), "c": np.array(flag)}
        outputs, operators = run_fused(model, feeds)
        assert operators.count("MatMulNBits") == 2
        rows = weights["embed"][feeds["i"]]
        assert_close(outputs[0], (rows if flag else -rows) @ weights["embed"].T)


def test_the_ir_version_is_what_the_integer_type_needs(tmp_path, opset_25):
    del opset_25
    for scheme, version in (("w8a16-g32-sym", 8), ("w4a16-g32-sym", 10), ("w2a16-g32-sym", 13)):
        path = tmp_path / f"{scheme}.onnx"
        model, *_ = qdq(linear_model(64, 24, ir_version=8), scheme)
        save_model(model, path, force=False)
        proto = onnx.load(path)
        assert proto.ir_version == version
        if version <= onnx.IR_VERSION:
            onnx.checker.check_model(proto, full_check=True)
        OrtRunner(path)


def test_codes_are_not_in_memory_twice():
    ctx = configured("w4a16-g128-asym", output_format="qdq")
    model = quantized(linear_model(2048, 1024), ctx)
    gc.collect()
    tracemalloc.start()
    apply("export_qdq", model, ctx)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2048 * 1024 / 2 / 4  # a quarter of the packed codes


def test_without_quantized_sites_nothing_happens():
    model = linear_model()
    before = ir.serde.serialize_model(model)
    result = apply("export_qdq", model)
    assert not result.modified
    assert result.records == ()
    assert ir.serde.serialize_model(model) == before


CONV = "g (float[1,64,8] x) => (float[1,24,8] y) { [conv] y = Conv (x, w) }"


@pytest.mark.parametrize(
    ("text", "shape", "opset", "message"),
    [
        (
            CONV,
            (24, 64, 1),
            21,
            "export_qdq: 'conv' is a Conv of 4 bits, which has no QDQ form; leave it float with --ignore 'conv', or "
            "use --format matmulnbits",
        ),
        (
            LOOKUP,
            (300, 64),
            21,
            "export_qdq: 'embed' is a Gather of 4 bits, which has no QDQ form; leave it float with --ignore 'embed', "
            "or use --format matmulnbits",
        ),
        (
            "g (float[M,64] x) => (float[M,24] y) { [fc] y = MatMul (x, w) }",
            (64, 24),
            20,
            "export_qdq: 'fc' needs operators of opset 21, but the model is of opset 20; run raise_opset before",
        ),
    ],
)
def test_what_has_no_such_form_is_refused(text, shape, opset, message):
    model = quantized(parse(text, {"w": normal(shape, 0)}, opset=opset), configured("w4a16-g32", "w4a16-g32"))
    with pytest.raises(PassError) as caught:
        apply("export_qdq", model)
    assert str(caught.value) == message


def integer(body, kind=ROWS, scheme="w8a8", weights=None, **options):
    """A lowered model whose activations are quantized, its float outputs on the feeds, and the feeds."""
    model, data = graph(body, kind), batches(kind)
    for name, array in (weights or {}).items():
        model.graph.initializers[name].const_value = ir.Tensor(array, name=name)
    reference = run(model, data[0])
    integers(model, data, scheme, calibrator="minmax", **options)
    return model, reference, data[0]


def constant(model, name):
    return model.graph.initializers[name].const_value.numpy()


@pytest.mark.parametrize("form", ["plain", "transposed", "row", "MatMul and Add", "Add of a row"])
def test_the_bias_of_an_integer_gemm_is_codes_in_the_scale_of_the_product(form):
    body = {
        "plain": "[fc] y = Gemm(x, m0, b0)",
        "transposed": "[fc] y = Gemm <transB = 1> (x, m0, b0)",
        "row": "[fc] y = Gemm(x, m0, b0)",
        "MatMul and Add": "[fc] h = MatMul(x, m0) y = Add(h, b0)",
        "Add of a row": "[fc] h = MatMul(x, m0) y = Add(b0, h)",
    }[form]
    bias = WEIGHTS["b0"].reshape(1, 8) if "row" in form else WEIGHTS["b0"]
    model, reference, feeds = integer(body, weights={"b0": bias})
    name = "b0_vector" if "row" in form else "b0"
    codes, scales = constant(model, f"{name}_codes"), constant(model, f"{name}_scales")
    assert codes.dtype == np.int32
    np.testing.assert_allclose(scales, constant(model, "m0_scales") * constant(model, "x_scale"), rtol=1e-6)
    np.testing.assert_array_equal(codes, np.rint(WEIGHTS["b0"] / scales.astype(np.float64)))
    assert constant(model, "m0_zero_points").dtype == np.int8
    assert not constant(model, "m0_zero_points").any()
    assert check(model, reference, feeds, 38) == ["QGemm"]  # one rounding of 8 bits


@pytest.mark.parametrize("form", ["Gemm(x, m0, b0)", "MatMul(x, m0)"])
@pytest.mark.parametrize("problem", ["a bias too large for its scale", "a column of zeros"])
def test_a_bias_without_codes_stays_float_and_exact(form, problem):
    weight = WEIGHTS["m0"].copy()
    weight[:, 3] *= 0 if problem == "a column of zeros" else 1e-12
    body = f"[fc] y = {form}" if "b0" in form else f"[fc] h = {form} y = Add(h, b0)"
    model, reference, feeds = integer(body, weights={"m0": weight})
    assert "b0_codes" not in model.graph.initializers
    np.testing.assert_allclose(run(model, feeds, optimize=True)[0][:, 3], WEIGHTS["b0"][3], rtol=1e-6)
    assert check(model, reference, feeds, 38) == ["MatMulIntegerToFloat", "Sub"]


def test_biases_that_are_computed_or_shared():
    model, reference, feeds = integer("n = Neg(b0) [one] h = Gemm(x, m0, n) [two] g = Gemm(x, m1, b1) [three] "
                                      "f = Gemm(g, m2, b1) s = Mul(h, f) y = Mul(s, g)")  # fmt: skip
    assert sum(name.startswith("b1_codes") for name in model.graph.initializers) == 2
    operators = check(model, reference, feeds, 30)  # a product of four roundings
    assert operators.count("QGemm") == 2


@pytest.mark.parametrize("shape", ["float[B,8]", "float[12,8]", "float[1,12,8]", "float[B,T,8]"])
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic-tensor"])
@pytest.mark.parametrize("other", ["b0", "x"])
def test_an_add_makes_no_float_gemm_of_an_integer_product(shape, scheme, other):
    model = graph(f"[fc] h = MatMul(x, m0) y = Add(h, {other})", (f"{shape} x", f"{shape} y"))
    x = normal((1, 12, 8) if shape.count(",") == 2 else (12, 8), 1)
    reference = run(model, {"x": x})
    integers(model, [{"x": x}], scheme)
    assert "Gemm" not in " ".join(op for op in check(model, reference, {"x": x}, 38) if op != "QGemm")
    plain = run(model, {"x": x}, optimize=True)[0]
    assert plain.shape == x.shape


def test_a_product_that_others_read_too_keeps_its_add():
    model, reference, feeds = integer("[fc] h = MatMul(x, m0) a = Add(h, b0) y = Mul(a, h)")
    assert [node.op_type for node in model.graph][-2:] == ["Add", "Mul"]
    assert check(model, reference, feeds, 35) == ["Add", "MatMulIntegerToFloat", "Mul"]


@pytest.mark.parametrize(
    ("attributes", "shape"), [("", (8, 8, 3, 3)), ("group = 2, ", (8, 8, 3, 3)), ("group = 32, ", (32, 1, 3, 3))]
)
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-head4"])
def test_convolutions_have_a_scale_for_each_output_channel(attributes, shape, scheme):
    N, channels = shape[0], {"": 8, "group = 2, ": 16, "group = 32, ": 32}[attributes]
    weight = normal(shape, 1) * np.linspace(0.1, 1, N, dtype=np.float32)[:, None, None, None]
    text = f"""g (float[B,{channels},6,6] x) => (float[B,{N},6,6] y) {{
        [c] y = Conv <{attributes}pads = [1, 1, 1, 1]> (x, w0, b0)
    }}"""
    model, feeds = parse(text, {"w0": weight, "b0": normal(N, 2)}), {"x": normal((2, channels, 6, 6), 3)}
    reference = run(model, feeds)
    integers(model, [feeds], scheme, target="portable")  # which refuses none for being faster in float
    largest = np.abs(weight).reshape(N, -1).max(1)
    if scheme == "w8a8-head4":
        largest = np.repeat(largest.reshape(-1, 4).max(1), 4)
    np.testing.assert_allclose(constant(model, "w0_scales"), largest / REACH, rtol=1e-6)
    codes = constant(model, "w0_codes")
    assert (codes.dtype, codes.shape) == (np.int8, shape)
    np.testing.assert_array_equal(codes, np.rint(weight / constant(model, "w0_scales")[:, None, None, None]))
    conv = next(node for node in model.graph if node.op_type == "Conv")
    assert conv.inputs[2].name == "b0"  # ONNX Runtime makes int32 codes of it
    assert check(model, reference, feeds, 35) == ["QLinearConv"]


def test_16_bit_activations_meet_a_float_bias():
    model, reference, feeds = integer("[fc] y = Gemm(x, m0, b0)", scheme="w8a16int", target="portable")
    gemm = model.graph[-1]
    assert (gemm.op_type, gemm.inputs[2].name) == ("Gemm", "b0")
    # The rounding of the weights alone. ONNX Runtime 1.32 and newer fuse 8-bit weights of a Gemm, and round activations
    # inside the product to 8 bits unless told otherwise (see `verify_audit`).
    assert check(model, reference, feeds, 40, close=45) in (["Gemm"], ["MatMulNBits"])


def test_tensorrt_gets_float_biases():
    for body in ("[fc] y = Gemm(x, m0, b0)", "[fc] h = MatMul(x, m0) y = Add(h, b0)"):
        model, reference, feeds = integer(body, target="tensorrt")
        assert not any("b0_" in name for name in model.graph.initializers)
        assert model.graph[-1].op_type == ("Gemm" if "Gemm" in body else "Add")
        check(model, reference, feeds, 38)


def test_sites_that_share_a_weight_run_on_integers_each():
    model, reference, feeds = integer("[one] h = MatMul(x, m0) n = Neg(h) [two] y = MatMul(n, m0)", TOKENS)
    assert check(model, reference, feeds, 35).count("MatMulIntegerToFloat") == 2


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic", "w8a8-dynamic-tensor", "w8a16int"])
@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
def test_records_name_the_activations_too(scheme, op):
    """A layer on integers is no w8a16, at any step."""
    model, batches = linear_model(64, 24, op=op), [{"x": normal((8, 64), 3)}]
    ctx = context(scheme=scheme, batches=batches, target="portable" if "int" in scheme else "cpu")
    names = ("assign_scheme", "raise_opset", "rtn", "correct_bias", "insert_qdq", "insert_dynamic", "export_qdq")
    records = [record for name in names for record in apply(name, model, ctx).records]
    specs = [record.spec for record in records if record.site == "fc" and record.action in ("quantized", "fused")]
    assert len(specs) == (3 if op == "Gemm" else 2)  # correct_bias has no bias to correct without one
    assert set(specs) == {str(Scheme.parse(scheme).resolve(ctx.config.target))}
