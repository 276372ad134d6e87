"""What ONNX Runtime makes of encoders and decoders, on models of which it is known."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.scheme import Scheme
from qcompiler.scheme_plan import Pattern, SchemePlan
from qcompiler.session import OrtRunner
from qcompiler.verify import verify
from qcompiler.verify_integers import audit_integers, oversight_remarks, quantizes_values
from tests.builders import apply, context, normal, parse, quantized, serialized
from tests.integer_models import CONV, PASSES, ROWS, batches, graph, integers
from tests.stored_models import make_model, value, write

CPU = "CPUExecutionProvider"
CHAIN = f"a = {CONV}(x, w0) r = Relu(a) b = {CONV}(r, w1) s = Add(r, b) c = {CONV}(s, w3)"
CHAIN = f"{CHAIN} t = Tanh(c) [last] y = {CONV}(t, w2)"


@pytest.fixture
def audit(tmp_path):
    """Audit a model: what `audit_integers` finds in the graph that ONNX Runtime saves."""

    def run(model):
        proto = onnx.load_from_string(model) if isinstance(model, bytes) else model
        path = tmp_path / "optimized.onnx"
        with OrtRunner(proto.SerializeToString(), threads=1, optimized=path):
            return audit_integers(proto, onnx.load(path, load_external_data=False))

    return run


def compiled(text, kind=None, scheme="w8a8", **options):
    kind = {} if kind is None else {"kind": kind}
    model = graph(text, **kind)
    integers(model, batches(*kind.values()), scheme, **options)
    return onnx.load_from_string(serialized(model))


def gemm(zero=False, bias=None, name="fc"):
    """x quantized to uint8 times a weight int8 [8, 4], as a Gemm of which ONNX Runtime makes QGemm if `zero`."""
    weight = (40 * normal((8, 4), 0)).astype("int8")
    constants = {"s": normal((), 1) ** 2 + 0.01, "z": 3, "w": weight, "ws": normal(4, 2) ** 2 + 0.01}
    types = {"z": "uint8", "w": "int8"}
    if zero:
        constants["wz"] = 0 * weight[0]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"], "encode"),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"], "decode"),
        helper.make_node("DequantizeLinear", ["w", "ws", *(["wz"] if zero else [])], ["wd"], "weights", axis=1),
        helper.make_node("Gemm", ["xd", "wd", *([bias] if bias else [])], ["y"], name),
    ]
    tensors = [numpy_helper.from_array(array_of(c, types.get(n, "")), n) for n, c in constants.items()]
    tensors += [numpy_helper.from_array(normal(4, 3), bias)] if bias else []
    return make_model(nodes, [value("x", ["b", 8])], [value("y", ["b", 4])], tensors, opsets=(("", 21),))


def array_of(content, dtype):
    array = np.asarray(content)
    return array.astype(dtype or ("float32" if array.dtype.kind == "f" else array.dtype))


def test_each_encoder_and_decoder_that_is_left_is_explained(audit):
    model = compiled(CHAIN)
    found, left = audit(model)
    assert found.kernels == {"QLinearConv": 4, "QLinearAdd": 1}
    assert found.written == sum(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node)
    assert found.fused == found.written - 4
    assert found.added == 0
    assert found.reasons == {
        "encodes a graph input": 1,
        "decodes the codes of QLinearConv for the float Tanh": 1,
        "encodes the result of the float Tanh for QLinearConv": 1,
        "decodes a graph output": 1,
    }
    assert all(each.necessary and not each.remedy for each in left)
    assert {each.operator for each in left} == {"QuantizeLinear", "DequantizeLinear"}
    (tanh,) = [each for each in left if "result of the float Tanh" in each.reason]
    assert tanh.place.startswith("between Tanh '")
    assert "and QLinearConv 'last" in tanh.place
    assert oversight_remarks(left) == []


def test_products_keep_their_encoders_and_decode_themselves(audit):
    found, left = audit(compiled("[fc] a = MatMul(x, m0) g = Gelu(a) [out] y = MatMul(g, m1)", ROWS))
    assert found.kernels == {"MatMulIntegerToFloat": 2}
    assert found.reasons == {
        "encodes a graph input": 1,
        "encodes the result of the float Gelu for MatMulIntegerToFloat": 1,
    }
    assert len(left) == 2


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w8a8-dynamic-tensor"])
def test_encoders_that_scale_at_run_time_are_seen(audit, scheme):
    found, left = audit(compiled("[q] a = MatMul(x, m0) [k] b = MatMul(x, m1) y = Add(a, b)", ROWS, scheme))
    assert found.kernels == {"MatMulIntegerToFloat": 2}
    assert len(left) == 1
    assert left[0].necessary


def test_a_gemm_whose_decoder_lacks_a_zero_point_is_an_oversight(audit):
    found, left = audit(gemm())
    assert found.kernels == {}
    (gemm_left,) = [each for each in left if each.operator == "Gemm"]
    assert (gemm_left.node, gemm_left.necessary) == ("fc", False)
    assert "the DequantizeLinear that makes 'wd' has no zero point" in gemm_left.reason
    (remark,) = oversight_remarks(left)
    assert remark.startswith("Gemm 'fc' was meant to be integer and runs in float, since ")
    assert remark.endswith("leave it float with --ignore 'fc', which saves the decoding")
    others = [each for each in left if each.operator != "Gemm"]
    assert [each.reason for each in others] == ["belongs to an operator that is not fused"] * 3
    assert {each.remedy for each in others} == {"see Gemm 'fc'"}


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic"])
def test_half_precision_has_no_integer_kernels_and_is_warned_of_once(audit, scheme):
    text = "g (float16[B,64] x) => (float16[B,24] y) { [one] h = MatMul(x, w) r = Relu(h) [two] y = MatMul(r, v) }"
    model = parse(text, {"w": normal((64, 64), 0, "float16"), "v": normal((64, 24), 1, "float16")})
    integers(model, [{"x": normal((16, 64), 2, "float16")}], scheme)
    found, left = audit(serialized(model))
    assert found.kernels == {}
    (remark,) = oversight_remarks(left)
    assert remark == (
        "MatMul 'one' (and 1 more) was meant to be integer and runs in float, since ONNX Runtime's CPU provider has no "
        "integer kernels of float16; compile the float32 model, with --float16 if the rest is to be float16"
    )


def test_a_gemm_with_zero_points_is_integer(audit):
    found, left = audit(gemm(zero=True))
    assert found.kernels == {"QGemm": 1}
    assert [each.reason for each in left] == ["encodes a graph input"]


def test_a_convolution_whose_result_is_read_in_float_is_an_oversight(audit):
    model = compiled(f"[first] a = {CONV}(x, w0) y = {CONV}(a, w1)")
    (conv,) = [node for node in model.graph.node if node.name == "first"]
    model.graph.output.append(value(conv.output[0], ["B", 8, 6, 6]))
    _, left = audit(model)
    (remark,) = oversight_remarks(left)
    assert "Conv 'first' was meant to be integer" in remark
    assert "the caller reads its result before it is quantized" in remark


def test_a_convolution_left_float_that_runs_on_integers_is_noticed(audit):
    model = graph(f"[first] a = {CONV}(x, w0) [mid] b = {CONV}(a, w1) [last] y = {CONV}(b, w2)")
    plan = SchemePlan(Scheme.parse("w8a8"), ignore=(Pattern("mid"),))
    ctx = context(plan=plan, batches=batches())
    quantized(model, ctx)
    for name in PASSES:
        apply(name, model, ctx)
    proto = onnx.load_from_string(serialized(model))
    (mid,) = [node for node in proto.graph.node if node.name == "mid"]
    assert mid.input[1] in {tensor.name for tensor in proto.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    found, left = audit(proto)
    remarks = oversight_remarks(left)
    # ONNX Runtime quantizes a float weight between codes on its own.
    assert found.kernels["QLinearConv"] == 3
    assert len(remarks) == 1
    assert remarks[0].startswith("Conv 'mid' was left float but runs on integers")


def test_only_models_that_encode_something_are_audited():
    assert quantizes_values(gemm())
    assert not quantizes_values(onnx.load_from_string(serialized(graph("y = MatMul(x, m0)", ROWS))))


def test_verification_holds_what_the_audit_finds(tmp_path):
    model = graph(CHAIN)
    source = tmp_path / "float.onnx"
    source.write_bytes(serialized(model))
    integers(model, batches())
    path = tmp_path / "output.onnx"
    path.write_bytes(serialized(model))
    rows = [{"x": feeds["x"][:1]} for feeds in batches(count=2)]
    for options in ({}, {"max_memory": 1}):
        found = verify(source, path, rows, providers=(CPU,), threads=1, **options)
        assert found.integers.kernels["QLinearConv"] == 4
        assert len(found.unfused) == sum(found.integers.reasons.values()) == 4
    assert {item.name for item in tmp_path.iterdir()} == {"float.onnx", "output.onnx"}
    same = verify(source, source, rows, providers=(CPU,), threads=1)
    assert (same.integers, same.unfused) == (None, ())


def test_what_runs_in_float_is_a_remark_and_not_laid_to_the_weight_alone(tmp_path):
    path = write(gemm(), tmp_path / "output.onnx")
    found = verify(path, path, [{"x": normal((1, 8), 5)}], providers=(CPU,), threads=1)
    assert [remark for remark in found.remarks if "Gemm 'fc' was meant to be integer" in remark]
    assert not [remark for remark in found.remarks if "dequantizes the weight" in remark]
