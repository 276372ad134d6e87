"""Activations of 1 to 4 bits: codes in bytes, cut off by a Clip of codes, and integer kernels in front and behind."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.errors import SchemeError
from qcompiler.graph import constant_array
from qcompiler.numerics.activation import ActivationSpec, activation_grid, fake_quantize, quantize_activation
from qcompiler.scheme import Scheme
from qcompiler.scheme_plan import Pattern, SchemePlan
from qcompiler.sites import find_sites
from tests.builders import apply, context, normal, quantized, run
from tests.integer_models import CONV, IMAGE, PASSES, ROWS, batches, check, executed, graph, integers

CHAIN = f"a = {CONV}(x, w0) r = Relu(a) b = {CONV}(r, w1) y = {CONV}(b, w2)"


@pytest.mark.parametrize(("bits", "floor"), [(4, 11), (3, 5), (2, 0.5)])
@pytest.mark.parametrize("symmetric", ["", "-sym"])
def test_narrow_codes_run_on_integers(bits, floor, symmetric):
    """Codes stay within their width, convolutions are integer, and optimizations change nothing.

    The floor is what so many levels leave of normal values behind three layers.
    """
    model, data = graph(CHAIN), batches()
    reference = run(model, data[0])
    records = integers(model, data, f"w{bits}a{bits}{symmetric}")
    # What no site reads, here the result, has 8 bits.
    specs = [record.spec for record in records if record.action == "activation"]
    assert sorted({spec.removesuffix("-sym") for spec in specs}) == [f"uint{bits}", "uint8"]
    clips = [node for node in model.graph if node.op_type == "Clip"]
    assert len(clips) == 3
    for clip in clips:
        assert clip.inputs[0].producer().op_type == "QuantizeLinear"
        low, high = (int(constant_array(value)) for value in clip.inputs[1:])
        assert (low, high) in ((0, 2**bits - 1), (1, 2**bits - 1))
    operators = check(model, reference, data[0], floor)
    assert operators.count("QLinearConv") == 3
    assert "Conv" not in operators


@pytest.mark.parametrize("bits", [2, 4])
def test_weights_are_stored_in_their_width(bits):
    model, data = graph(CHAIN), batches()
    integers(model, data, f"w{bits}a8-static")
    casts = [node for node in model.graph if node.op_type == "Cast"]
    assert {node.inputs[0].const_value.dtype for node in casts} == {ir.DataType[f"INT{bits}"]}
    assert len(casts) == 3
    assert model.graph.opset_imports[""] == (25 if bits == 2 else 21)
    _, operators = executed(model, data[0])
    assert operators.count("QLinearConv") == 3


def test_gemm_and_matmul_with_narrow_codes_are_integer():
    model, data = graph("a = Gemm(x, m0, b0) r = Relu(a) y = MatMul(r, m1)", ROWS), batches(ROWS)
    reference = run(model, data[0])
    integers(model, data, "w4a4")
    assert set(check(model, reference, data[0], 8)) - {"Clip", "Cast"} <= {
        "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "Add"
    }  # fmt: skip


def test_signs():
    """Everything but zero becomes plus or minus the scale, exactly as `numerics` says."""
    body = f"t = Tanh(x) y = {CONV}(t, w0)"
    model, data = graph(body), batches()
    records = integers(model, data, "w1.58a1")
    assert next(record.spec for record in records if record.action == "activation") == "signs"
    encode = next(node for node in model.graph if node.op_type == "QuantizeLinear" and "sign" in node.inputs[1].name)
    (clip,) = (use.node for use in encode.outputs[0].uses())
    (decode,) = (use.node for use in clip.outputs[0].uses())
    decode.outputs[0].name = "signs"
    model.graph.outputs.append(decode.outputs[0])
    values = data[0]["x"].copy()
    values[0, 0, 0, :3] = 0, 1e-9, -1e-9
    found = run(model, {"x": values}, outputs=["signs"])[0]
    scale = float(constant_array(decode.inputs[1]))
    expected = np.where(np.abs(np.tanh(values)) > 2.0**-15, np.sign(values), 0) * scale
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_codes_of_a_few_bits():
    x = normal(1000, 0, scale=2.0)
    for bits in (2, 3, 4):
        for symmetric in (False, True):
            spec = ActivationSpec(bits, symmetric=symmetric)
            scale, zero = activation_grid(-1.5, 2.5, spec)
            codes = quantize_activation(x, scale, zero, spec)
            first, last = spec.limits
            naive = np.clip(np.rint(x / np.float32(scale)) + zero, first, last)
            assert np.array_equal(codes, naive.astype(np.uint8))
            assert set(np.unique(codes)) == set(range(first, last + 1))
    spec = ActivationSpec(1, symmetric=True)
    assert np.array_equal(fake_quantize(np.float32([-3, -0.1, 0, 0.1, 3]), 0.5, 128, spec), [-0.5, -0.5, 0, 0.5, 0.5])


def test_several_widths_in_one_model():
    """First and last layers of 8 bits, as training likes them."""
    model, data = graph(CHAIN), batches()
    names = [site.name for site in find_sites(model)[0]]
    plan = SchemePlan(Scheme.parse("w3a3"), overrides=tuple((Pattern(n), Scheme.parse("w8a8")) for n in names[::2]))
    records = _with_plan(model, data, plan)
    specs = {record.site: record.spec for record in records if record.action == "activation"}
    assert [specs[name] for name in ("x", "r", "b", "y")] == ["uint8", "uint3", "uint8", "uint8"]


def _with_plan(model, data, plan):
    ctx = context(plan=plan, batches=data)
    quantized(model, ctx)
    return [record for name in PASSES for record in apply(name, model, ctx).records]


def test_formats_that_differ_in_more_are_refused():
    model, data = graph(CHAIN), batches()
    names = [site.name for site in find_sites(model)[0]]
    plan = SchemePlan(Scheme.parse("w4a4-sym"), overrides=((Pattern(names[0]), Scheme.parse("w8a8-asym")),))
    with pytest.raises(SchemeError, match="differ in more than their width"):
        _with_plan(model, data, plan)


def test_other_targets_say_what_they_take():
    model, data = graph(CHAIN, IMAGE), batches()
    ctx = context(scheme="w4a4", batches=data, target="tensorrt")
    apply("canonicalize", model, ctx)
    reasons = {record.reason for record in apply("assign_scheme", model, ctx).records}
    assert reasons == {"TensorRT's integer kernels take 8 bits; use w8a8"}
