"""8-bit floats: weights are E4M3 bits behind DequantizeLinear, and ONNX Runtime computes what numpy makes of them."""

import ml_dtypes
import numpy as np
import onnx
import pytest

from qcompiler.driver import compile_model
from qcompiler.errors import NumericsError, SchemeError
from qcompiler.graph import read_weight
from qcompiler.numerics.affine import WeightSpec, clip_grid, dequantize, min_max_grid, quantize
from qcompiler.numerics.formats import float8_values
from qcompiler.scheme import Scheme
from tests.builders import apply, context, linear_model, normal, parse, quantized, run, serialized, the_site

FP8 = "w8a8-fp8"
SPEC = WeightSpec(8, 64, True, False, fp8=True)


def rounded(values, scale):
    """E4M3 numbers of values / scale, times the scale."""
    return np.clip(values / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale


def conv_model(op="Conv"):
    return parse(f"g (float[2,4,9,9] x) => (float[2,6,7,7] y) {{ [fc] y = {op}(x, w, b) }}",
                 {"w": normal((6, 4, 3, 3), 0), "b": normal(6, 1)})  # fmt: skip


MODELS = {
    "MatMul": lambda: linear_model(64, 24),
    "MatMul and bias": lambda: linear_model(64, 24, bias=True),
    "Gemm": lambda: linear_model(64, 24, op="Gemm", bias=True),
    "Conv": conv_model,
}


def compiled(tmp_path, model, target="cuda", **options):
    source, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    source.write_bytes(serialized(model))
    shape = [4, 64] if len(model.graph.inputs[0].shape) == 2 else [2, 4, 9, 9]
    rows = [{"x": normal(shape, seed)} for seed in range(9)]
    result = compile_model(source, FP8, target=target, calibration=rows, output=out, force=True, threads=1, **options)
    return result, onnx.load(out), rows[0]


@pytest.mark.parametrize("target", ["cuda", "tensorrt"])
@pytest.mark.parametrize("case", MODELS)
def test_the_file_holds_8_bit_floats_and_computes_what_they_mean(tmp_path, case, target):
    model = MODELS[case]()
    given = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    result, proto, feeds = compiled(tmp_path, model, target, algorithms=("rtn",), pipeline_text=PIPELINE)
    assert min(opset.version for opset in proto.opset_import if not opset.domain) >= 19
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    codes = constants["w_codes"]
    assert codes.data_type == onnx.TensorProto.FLOAT8E4M3FN
    scale, own = onnx.numpy_helper.to_array(constants["x_scale"]), onnx.numpy_helper.to_array(constants["w_scales"])
    weight = {"Gemm": lambda w: w.T}.get(case, lambda w: w)(given["w"])  # [K, N], or [N, C, h, w]
    axes, shape = ((0,), (1, -1)) if case != "Conv" else ((1, 2, 3), (-1, 1, 1, 1))
    np.testing.assert_allclose(own, np.abs(weight).max(axes) / 448, rtol=1e-6)
    plain = MODELS[case]()
    plain.graph.initializers["w"].const_value = _tensor(rounded(weight, own.reshape(shape)), case == "Gemm")
    (want,) = run(plain, {"x": rounded(feeds["x"], scale)})
    (got,) = run((tmp_path / "out.onnx").read_bytes(), feeds)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    assert 25 < result.report.verification.sqnr_db < 35  # 3 bits of mantissa, twice
    assert not result.report.verification.remarks


LIMITS = {
    "Relu(h)": ["Max(h, r_floor)"],
    "Clip(h, low, high)": ["Max(h, low)", "Min(n_Max_output, high)"],
    "Clip(h, low)": ["Max(h, low)"],
    "Clip(h, , high)": ["Min(h, high)"],
    "Clip(h)": ["Identity(h)"],
}


@pytest.mark.parametrize("limit", LIMITS)
def test_limits_in_front_of_an_encoder_are_spelled_out(tmp_path, limit):
    """ONNX Runtime would take the codes for integers, and drop a Relu without a word."""
    text = f"g (float[4,64] x) => (float[4,24] y) {{ [up] h = MatMul(x, u) [n] r = {limit} [fc] y = MatMul(r, w) }}"
    weights = {"u": normal((64, 64), 1, scale=0.1), "w": normal((64, 24), 2, scale=0.1),
               "low": np.array(-0.5, np.float32), "high": np.array(0.7, np.float32)}  # fmt: skip
    result, proto, feeds = compiled(tmp_path, parse(text, weights), pipeline_text=PIPELINE)
    found = [f"{n.op_type}({', '.join(n.input)})" for n in proto.graph.node if n.op_type in ("Max", "Min", "Identity")]
    assert found == LIMITS[limit]
    figures = [run.close.sqnr_db for run in result.report.verification.runs]
    assert min(figures) > 22, figures
    (want,) = run(parse(text, weights), feeds)
    (got,) = run((tmp_path / "out.onnx").read_bytes(), feeds)
    assert np.square(want - got).sum() < 0.01 * np.square(want).sum()


PIPELINE = "canonicalize,assign_scheme,raise_opset,rtn,insert_qdq,export_qdq,cleanup"


def _tensor(array, transpose):
    import onnx_ir as ir

    return ir.Tensor(np.ascontiguousarray(array.T if transpose else array))


def test_the_default_pipeline_rounds_to_nearest_and_says_so(tmp_path):
    result, _, _ = compiled(tmp_path, linear_model(64, 24))
    (row,) = result.report.sites
    assert row.scheme == "w8a8-static-tensor-sym-fp8"
    assert "8-bit floats are rounded to nearest" in row.reason
    assert row.form == "DequantizeLinear of float8e4m3fn, per channel"


@pytest.mark.parametrize("layout", ["MatMul", "Gemm"])
def test_between_passes_the_weight_reads_as_the_numbers_that_its_bits_mean(layout):
    model, ctx = linear_model(64, 24, op=layout), context(scheme=FP8, target="cuda")
    weight = read_weight(the_site(model))
    quantized(model, ctx)
    site = the_site(model)
    scale = np.abs(weight).max(1, keepdims=True) / np.float32(448)
    np.testing.assert_allclose(read_weight(site), rounded(weight, scale), rtol=1e-6)
    assert np.array_equal(site.quantized.numpy(), read_weight(site) if layout == "Gemm" else read_weight(site).T)
    assert site.quantized.stored_bytes == 24 * (64 + 4)


def test_zeros_constant_rows_and_outliers():
    weight = normal((4, 64), 0)
    weight[0], weight[1], weight[2, 0] = 0, 3, 1e30
    grid = min_max_grid(weight, SPEC)
    values = dequantize(float8_values(quantize(weight, grid, SPEC)), grid.scale, grid.zero_point, 64)
    assert not values[0].any()
    np.testing.assert_allclose(values[1], 3, rtol=1e-6)
    assert values[2, 0] == pytest.approx(1e30, rel=1e-6)
    assert np.isfinite(values).all()


def test_a_clipped_grid_is_never_worse():
    weight = normal((16, 64), 0)
    weight[:, 0] *= 50

    def loss(grid):
        values = dequantize(float8_values(quantize(weight, grid, SPEC)), grid.scale, grid.zero_point, 64)
        return np.square(values - weight).sum(1)

    plain, clipped = loss(min_max_grid(weight, SPEC)), loss(clip_grid(weight, SPEC))
    assert (clipped <= plain * 1.001).all()


def test_float16_scales():
    spec = WeightSpec(8, 64, True, False, "float16", fp8=True)
    grid = min_max_grid(normal((4, 64), 0), spec)
    assert np.array_equal(grid.scale, grid.scale.astype(np.float16).astype(np.float32))
    assert not grid.zero_point.any()


def test_the_grammar():
    assert Scheme.parse(FP8).resolve("cuda").spec(64, "float32").fp8
    assert str(Scheme.parse(FP8)) == FP8
    with pytest.raises(SchemeError, match="8-bit floats are static"):
        Scheme.parse("w8a8-fp8-dynamic")


def test_the_cpu_says_why_it_does_not():
    model = linear_model(64, 24)
    (record,) = apply("assign_scheme", model, context(scheme=FP8)).records
    assert (record.action, record.reason) == (
        "skipped", "the CPU has no kernels for 8-bit floats; use w8a8, or --target cuda or tensorrt",
    )  # fmt: skip
    with pytest.raises(NumericsError, match="not whole heads"):
        min_max_grid(normal((3, 64), 0), WeightSpec(8, 64, True, False, head_size=2, fp8=True))
