"""Quantized linear sites as MatMulNBits: the graph before and after, and that it computes the same."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.graph import PASS_KEY, SCHEME_KEY, SITE_KEY
from qcompiler.numerics.packing import unpack_codes
from qcompiler.sites import find_sites
from tests.builders import apply, context, linear_model, normal, only, parse, quantized, run, text_of, the_site

SCHEME = "w4a16-g32-asym"
W, B = normal((64, 24), 0), normal(24, 1)
BIAS = {"w": W, "b": B}


def turned(array):
    return np.ascontiguousarray(array.T)


FUSED = "MatMulNBits(x, w_codes, w_scales, w_zero_points"
LAST = FUSED.replace("x,", "fc_Transpose_output,")  # of channels last
# text, weights, shape of x and y; the graph after the pass, Transposes of the float weight being dead by then
CASES = {
    "matmul": ("[fc] y = MatMul(x, w)", {"w": W}, "B,64", "B,24", [f"y = {FUSED})"]),
    "matmul on three dimensions": ("[fc] y = MatMul(x, w)", {"w": W}, "B,S,64", "B,S,24", [f"y = {FUSED})"]),
    "matmul on one dimension": ("[fc] y = MatMul(x, w)", {"w": W}, "64", "24", [f"y = {FUSED})"]),
    "batch of one": ("[fc] y = MatMul(x, w)", {"w": W[None]}, "B,S,64", "B,S,24", [f"y = {FUSED})"]),
    "transposed": (
        "t = Transpose(w) [fc] y = MatMul(x, t)", {"w": turned(W)}, "B,64", "B,24",
        ["t = Transpose(w)", f"y = {FUSED})"],
    ),
    "matmul and bias": ("[fc] h = MatMul(x, w) y = Add(h, b)", BIAS, "B,64", "B,24", [f"y = {FUSED}, , b)"]),
    "bias and matmul": ("[fc] h = MatMul(x, w) y = Add(b, h)", BIAS, "B,64", "B,24", [f"y = {FUSED}, , b)"]),
    "bias that another node reads too": (
        "[fc] h = MatMul(x, w) z = Add(h, b) y = Mul(z, b)", BIAS, "B,64", "B,24",
        [f"z = {FUSED}, , b)", "y = Mul(z, b)"],
    ),
    "bias of one row": (
        "[fc] h = MatMul(x, w) y = Add(h, b)", {"w": W, "b": B[None]}, "B,64", "B,24",
        [f"h = {FUSED})", "y = Add(h, b)"],
    ),
    "bias of one value": (
        "[fc] h = MatMul(x, w) y = Add(h, b)", {"w": W, "b": B[0]}, "B,64", "B,24", [f"h = {FUSED})", "y = Add(h, b)"],
    ),
    "sum with two readers": (
        "[fc] h = MatMul(x, w) z = Add(h, b) y = Mul(z, h)", BIAS, "B,64", "B,24",
        [f"h = {FUSED})", "z = Add(h, b)", "y = Mul(z, h)"],
    ),
    "added to itself": (
        "[fc] h = MatMul(x, w) y = Add(h, h)", {"w": W}, "B,64", "B,24", [f"h = {FUSED})", "y = Add(h, h)"],
    ),
    "added to an activation": (
        "c = ReduceSum(x) [fc] h = MatMul(x, w) y = Add(h, c)", {"w": W}, "B,64", "B,24",
        ["c = ReduceSum(x)", f"h = {FUSED})", "y = Add(h, c)"],
    ),
    "another operator behind": (
        "[fc] h = MatMul(x, w) y = Mul(h, b)", BIAS, "B,64", "B,24", [f"h = {FUSED})", "y = Mul(h, b)"],
    ),
    "gemm": ("[fc] y = Gemm(x, w)", {"w": W}, "B,64", "B,24", [f"y = {FUSED})"]),
    "gemm transB": ("[fc] y = Gemm <transB = 1> (x, w)", {"w": turned(W)}, "B,64", "B,24", [f"y = {FUSED})"]),
    "gemm with bias": ("[fc] y = Gemm(x, w, b)", BIAS, "B,64", "B,24", [f"y = {FUSED}, , b)"]),
    "gemm with bias and a sum": (
        "[fc] h = Gemm(x, w, b) y = Add(h, b)", BIAS, "B,64", "B,24", [f"h = {FUSED}, , b)", "y = Add(h, b)"],
    ),
    "gemm with one row": (
        "[fc] y = Gemm(x, w, b)", {"w": W, "b": B[None]}, "B,64", "B,24",
        [f"fc_MatMulNBits_output = {FUSED})", "y = Add(fc_MatMulNBits_output, b)"],
    ),
    "gemm with a computed bias": (
        "c = Relu(b) [fc] y = Gemm(x, w, c)", BIAS, "B,64", "B,24",
        ["c = Relu(b)", f"fc_MatMulNBits_output = {FUSED})", "y = Add(fc_MatMulNBits_output, c)"],
    ),
    "conv 1-D": (
        "[fc] y = Conv(x, w)", {"w": turned(W)[..., None]}, "B,64,T", "B,24,T",
        [
            "fc_Transpose_output = Transpose(x)", f"fc_MatMulNBits_output = {LAST})",
            "y = Transpose(fc_MatMulNBits_output)",
        ],
    ),
    "conv 2-D with bias": (
        "[fc] y = Conv <kernel_shape = [1, 1]> (x, w, b)", {"w": turned(W)[..., None, None], "b": B},
        "B,64,H,V", "B,24,H,V",
        [
            "fc_Transpose_output = Transpose(x)",
            f"fc_MatMulNBits_output = {LAST}, , b)",
            "y = Transpose(fc_MatMulNBits_output)",
        ],
    ),
    "conv with a computed bias": (
        "c = Relu(b) [fc] y = Conv(x, w, c)", {"w": turned(W)[..., None], "b": B}, "B,64,T", "B,24,T",
        [
            "c = Relu(b)", "fc_Transpose_output = Transpose(x)",
            f"fc_MatMulNBits_output = {LAST})",
            "fc_Add_output = Add(fc_MatMulNBits_output, c)", "y = Transpose(fc_Add_output)",
        ],
    ),
}  # fmt: skip
SIZES = {"B": 3, "S": 4, "T": 5, "H": 2, "V": 3}


def input_of(shape, dtype="float32"):
    return {"x": normal([SIZES.get(size) or int(size) for size in shape.split(",")], 7, dtype)}


@pytest.mark.parametrize("case", CASES)
def test_the_graph_before_and_after(case):
    text, weights, shape, out, after = CASES[case]
    model = parse(f"g (float[{shape}] x) => (float[{out}] y) {{ {text} }}", weights)
    ctx = context(scheme=SCHEME)
    quantized(model, ctx)
    feeds = input_of(shape)
    (half,) = run(model, feeds)
    result = apply("fuse_matmul_nbits", model, ctx)
    assert result.modified
    (record,) = result.records
    assert (record.site, record.action, record.spec) == ("fc", "fused", SCHEME)
    assert record.reason == "MatMulNBits, block 32, accuracy level 0"
    assert text_of(model) == after
    for optimize in (False, True):
        (got,) = run(model, feeds, optimize=optimize)
        assert got.shape == half.shape
        assert np.linalg.norm(got - half) <= 1e-5 * np.linalg.norm(half)
    apply("cleanup", model, ctx)
    assert "w" not in model.graph.initializers
    assert np.array_equal(run(model, feeds)[0], run(model, feeds)[0])
    assert [value.name for value in model.graph.outputs] == ["y"]


def test_the_target_decides_whether_a_bias_goes_in():
    """CUDA's fast kernels take none."""
    for text in ("[fc] h = MatMul(x, w) y = Add(h, b)", "[fc] y = Gemm(x, w, b)"):
        model = parse(f"g (float[B,64] x) => (float[B,24] y) {{ {text} }}", BIAS)
        ctx = context(scheme="w4a16-g32-sym", target="cuda")
        quantized(model, ctx)
        (half,) = run(model, input_of("B,64"))
        apply("fuse_matmul_nbits", model, ctx)
        assert [node.op_type for node in model.graph] == ["MatMulNBits", "Add"]
        assert len(model.graph[0].inputs) == 3
        assert np.allclose(run(model, input_of("B,64"))[0], half, rtol=1e-5, atol=1e-5)


def test_a_sum_that_is_an_output_itself_keeps_its_name_and_a_product_that_is_one_stays():
    text = "g (float[B,64] x) => (float[B,24] h, float[B,24] y) { [fc] h = MatMul(x, w) y = Add(h, b) }"
    model = parse(text, BIAS)
    ctx = context(scheme=SCHEME)
    quantized(model, ctx)
    halves = run(model, input_of("B,64"))
    apply("fuse_matmul_nbits", model, ctx)
    assert text_of(model) == [f"h = {FUSED})", "y = Add(h, b)"]
    assert [output.name for output in model.graph.outputs] == ["h", "y"]
    for got, half in zip(run(model, input_of("B,64")), halves, strict=True):
        assert np.allclose(got, half, rtol=1e-5, atol=1e-5)


def test_attributes_type_shape_and_provenance():
    model = linear_model(72, 24, bias=True)
    model.graph[0].metadata_props["pkg.torch.onnx.name_scopes"] = "['model', 'model.fc', 'fc']"
    ctx = context(scheme=SCHEME)
    quantized(model, ctx)
    apply("fuse_matmul_nbits", model, ctx)
    (node,) = model.graph
    assert (node.domain, node.op_type) == ("com.microsoft", "MatMulNBits")
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    assert attributes == {"K": 72, "N": 24, "bits": 4, "block_size": 32, "accuracy_level": 0}
    assert node.metadata_props[PASS_KEY] == "fuse_matmul_nbits"
    assert node.metadata_props["pkg.torch.onnx.name_scopes"] == "['model', 'model.fc', 'fc']"
    assert not {SCHEME_KEY, SITE_KEY} & set(node.metadata_props)
    assert str(node.outputs[0].shape) == "[B,24]"
    assert node.outputs[0].dtype == ir.DataType.FLOAT
    assert model.graph.opset_imports["com.microsoft"] == 1
    assert find_sites(model)[0] == []


@pytest.mark.parametrize(
    ("bits", "wanted", "level"), [(4, None, 0), (3, None, 0), (2, None, 4), (8, None, 4), (8, 0, 0), (4, 4, 4)]
)
def test_the_accuracy_level_is_always_written(bits, wanted, level):
    model = linear_model(64, 24)
    ctx = context(scheme=f"w{bits}a16-g32-sym", accuracy_level=wanted)
    quantized(model, ctx)
    (half,) = run(model, input_of("B,64"))
    (record,) = apply("fuse_matmul_nbits", model, ctx).records
    assert model.graph[0].attributes["accuracy_level"].as_int() == level
    held = ", holding 3-bit codes" if bits == 3 else ""
    assert record.reason == f"MatMulNBits, block 32, accuracy level {level}{held}"
    (got,) = run(model, input_of("B,64"))
    # Level 4 rounds activations to 8 bits.
    assert np.linalg.norm(got - half) <= (1e-2 if level == 4 else 1e-5) * np.linalg.norm(half)


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])  # with and without negative scales
@pytest.mark.parametrize("form", ["sym", "asym"])
@pytest.mark.parametrize("size", ["g16", "g64", "channel"])
@pytest.mark.parametrize("K", [64, 77])
def test_three_bits_are_held_in_four_with_zero_where_the_kernel_looks_for_it(target, form, size, K):
    """The product with the unit matrix is the weight, exactly: one code times one scale."""
    model = linear_model(K, 24)
    ctx = context(scheme=f"w3a16-{size}-{form}", target=target)
    quantized(model, ctx)
    tensor = the_site(model).quantized
    values, codes = tensor.dequantized(), tensor.codes()
    apply("fuse_matmul_nbits", model, ctx)
    (node,) = model.graph
    assert node.attributes["bits"].as_int() == 4
    stored = unpack_codes(node.inputs[1].const_value.numpy(), 4, node.attributes["block_size"].as_int())
    stored = stored.reshape(24, -1)[:, :K]
    assert np.array_equal(stored, codes + (4 if form == "sym" else 0))
    assert codes.max() == 7
    assert len(np.unique(codes)) == (7 if (form, target) == ("sym", "tensorrt") else 8)
    (got,) = run(model, {"x": np.eye(K, dtype=np.float32)})
    assert np.array_equal(got, values.T)


@pytest.mark.parametrize("scheme", ["w2a16-channel-sym", "w4a16-channel-asym", "w8a16-channel-asym", "w4a16-g256-sym"])
@pytest.mark.parametrize("K", [1, 10, 77, 256, 300])
def test_one_scale_a_row_and_ragged_rows_of_any_length(scheme, K):
    """With one scale a row each block gets a copy of it."""
    model = linear_model(K, 7)
    ctx = context(scheme=scheme, accuracy_level=0)
    quantized(model, ctx)
    (half,) = run(model, input_of(f"B,{K}"))
    apply("fuse_matmul_nbits", model, ctx)
    apply("cleanup", model, ctx)
    assert model.graph[0].op_type == "MatMulNBits"
    (got,) = run(model, input_of(f"B,{K}"))
    assert np.linalg.norm(got - half) <= 1e-5 * np.linalg.norm(half)


def test_float16_models_get_float16_scales_and_run():
    model = linear_model(64, 24, dtype="float16", bias=True)
    ctx = context(scheme=SCHEME)
    quantized(model, ctx)
    feeds = input_of("B,64", "float16")
    values = the_site(model).quantized.dequantized()
    apply("fuse_matmul_nbits", model, ctx)
    apply("cleanup", model, ctx)
    scales = model.graph[0].inputs[2].const_value
    assert scales.dtype.name == "FLOAT16"
    (got,) = run(model, feeds)
    assert got.dtype == np.float16
    want = feeds["x"].astype(np.float64) @ values.T + normal(24, 1, "float16")
    assert np.linalg.norm(got - want) <= 1e-3 * np.linalg.norm(want)  # 11 bits


def test_bfloat16_models_get_bfloat16_scales():
    """No CPU kernel computes in bfloat16, so the constants are all that can be looked at."""
    model = linear_model(64, 24, dtype="bfloat16", bias=True)
    ctx = context(scheme=SCHEME)
    quantized(model, ctx)
    tensor = the_site(model).quantized
    apply("fuse_matmul_nbits", model, ctx)
    (node,) = model.graph
    assert node.op_type == "MatMulNBits"
    scales, bias = node.inputs[2].const_value, node.inputs[5].const_value
    assert scales.dtype.name == bias.dtype.name == "BFLOAT16"
    assert scales.numpy().dtype == ml_dtypes.bfloat16
    assert np.array_equal(scales.numpy(), tensor.scale)


def test_sites_that_share_a_weight_share_its_constants():
    text = "g (float[B,64] x) => (float[B,64] y) { [a] h = MatMul(x, w) r = Relu(h) [b] y = MatMul(r, w) }"
    model = parse(text, {"w": normal((64, 64), 1, scale=0.1)})
    ctx = context(scheme=SCHEME)
    quantized(model, ctx)
    (half,) = run(model, input_of("B,64"))
    result = apply("fuse_matmul_nbits", model, ctx)
    assert only(result, "fused") == ["a", "b"]
    first, _, second = model.graph
    assert list(first.inputs)[1:] == list(second.inputs)[1:]
    apply("cleanup", model, ctx)
    assert sorted(model.graph.initializers) == ["w_codes", "w_scales", "w_zero_points"]
    assert np.allclose(run(model, input_of("B,64"))[0], half, rtol=1e-5, atol=1e-5)


def test_nodes_of_one_name_in_a_graph_and_its_body_do_not_clash():
    """A body that reuses a name of the graph around it is refused by ONNX Runtime."""
    text = """g (bool p, float[B,64] x) => (float[B,64] y) {
        [mm] h = Gemm(x, w, b)
        y = If (p) <then_branch = yes () => (float[B,64] s) { [mm] k = Gemm(h, w, b) s = Relu(k) },
            else_branch = no () => (float[B,64] t) { [mm] l = Gemm(h, v, b) t = Neg(l) }>
    }"""
    weights = {"w": normal((64, 64), 1, scale=0.1), "v": normal((64, 64), 2, scale=0.1), "b": normal((1, 64), 3)}
    model = parse(text, weights)
    ctx = context(scheme=SCHEME)
    quantized(model, ctx)
    feeds = [{**input_of("B,64"), "p": np.array(flag)} for flag in (True, False)]
    halves = [run(model, each)[0] for each in feeds]
    assert len(only(apply("fuse_matmul_nbits", model, ctx), "fused")) == 3
    apply("cleanup", model, ctx)
    for each, half in zip(feeds, halves, strict=True):
        assert np.allclose(run(model, each)[0], half, rtol=1e-5, atol=1e-5)


def test_float_sites_and_tables_are_left_alone():
    text = "g (int64[B] i) => (float[B,24] y) { [embed] h = Gather(t, i) [fc] y = MatMul(h, w) }"
    model = parse(text, {"t": normal((512, 64), 1), "w": W})
    before = text_of(model)
    result = apply("fuse_matmul_nbits", model)
    assert (result.modified, result.records) == (False, ())
    ctx = context(scheme="w4a16-g32-asym")
    quantized(model, ctx)
    assert only(apply("fuse_matmul_nbits", model, ctx), "fused") == ["fc"]
    assert text_of(model)[0] == before[0]
    assert not apply("fuse_matmul_nbits", model, ctx).modified


def test_it_applies_to_its_output_form_alone():
    from qcompiler.passes import load

    step = load("fuse_matmul_nbits")
    assert step.applies(context().config)
    assert not step.applies(context(output_format="qdq").config)


@pytest.mark.parametrize(("scheme", "bits"), [("w4a8", 4), ("w3a8", 4), ("w2a8-g32", 2), ("w8a8-g32", 8), ("w4a16", 4)])
@pytest.mark.parametrize("wanted", [None, 0, 1])
def test_8_bit_activations_by_blocks_are_the_kernels_work(scheme, bits, wanted):
    model = linear_model(64, 24)
    ctx = context(scheme=scheme, accuracy_level=wanted)
    quantized(model, ctx)
    for name in ("insert_qdq", "insert_dynamic"):
        assert not apply(name, model, ctx).modified
    result = apply("fuse_matmul_nbits", model, ctx)
    (node,) = model.graph
    assert node.op_type == "MatMulNBits"
    assert node.attributes["bits"].as_int() == bits
    level = 4 if "a8" in scheme else 0 if wanted is None else wanted
    assert node.attributes["accuracy_level"].as_int() == level
    assert f"accuracy level {level}" in result.records[0].reason


def test_sites_whose_activations_the_graph_quantizes_are_left_to_export_qdq():
    model = linear_model(64, 24)
    ctx = context(scheme="w8a8-dynamic")
    quantized(model, ctx)
    assert not apply("fuse_matmul_nbits", model, ctx).modified
