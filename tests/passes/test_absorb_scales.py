"""What quantization swallows: the graph before and after, through ONNX Runtime; and which kernels it runs then."""

import numpy as np
import pytest

from qcompiler.absorbing import anchor_of, behind_scalars, scalar_step
from qcompiler.passes import load
from qcompiler.session import saturates
from tests.builders import apply, context, normal, only, parse, run, text_of
from tests.integer_models import executed

GRID = {"s": np.array(0.125, np.float32), "z": np.array(100, np.uint8)}
X = normal((2, 3, 4, 5), 3, scale=4.0)


def pair(body, constants=None, *, kind="uint8", grid=None, inner="x"):
    """A float input, `body`, and codes of it, decoded: ``y = DQ(Q(h))``."""
    grid = dict(GRID if grid is None else grid)
    if kind == "int8":
        grid["z"] = np.array(-28, np.int8)
    codes = f"q = QuantizeLinear({inner}, s, z) y = DequantizeLinear(q, s, z)"
    text = f"g (float[2,3,4,5] x) => (float[2,3,4,5] y) {{ {body} {codes} }}"
    return parse(text, {**grid, **(constants or {})}, opset=13)


def number(value):
    return np.array(value, np.float32)


# Body that computes h; constants; scale and zero point of the encoder afterwards.
ENCODED = {
    "a product": ("h = Mul(x, k)", {"k": number(2.5)}, 0.05, 100),
    "from the left": ("h = Mul(k, x)", {"k": number(0.5)}, 0.25, 100),
    "a quotient": ("h = Div(x, k)", {"k": number(4.0)}, 0.5, 100),
    "whole steps": ("h = Add(x, k)", {"k": number(0.75)}, 0.125, 106),
    "down": ("h = Sub(x, k)", {"k": number(0.75)}, 0.125, 94),
    "nearly nothing": ("h = Add(x, k)", {"k": number(1e-4)}, 0.125, 100),
    "one after the other": ("a = Mul(x, k) h = Add(a, l)", {"k": number(0.25), "l": number(-0.5)}, 0.5, 96),
    "the other order": ("a = Add(x, l) h = Mul(a, k)", {"k": number(0.25), "l": number(-0.5)}, 0.5, 99),
    "one value with an axis": ("h = Mul(x, k)", {"k": np.array([2.0], np.float32)}, 0.0625, 100),
}


@pytest.mark.parametrize("kind", ["uint8", "int8"])
@pytest.mark.parametrize("case", ENCODED)
def test_scalars_go_into_the_codes_made_of_them(case, kind):
    body, constants, scale, zero = ENCODED[case]
    model = pair(body, constants, kind=kind, inner="h")
    (want,) = run(model, {"x": X})
    result = apply("absorb_scales", model)
    assert len(only(result, "rewritten")) == len(constants)
    encode, decode = model.graph
    assert (encode.op_type, decode.op_type) == ("QuantizeLinear", "DequantizeLinear")
    assert encode.inputs[1].const_value.numpy() == pytest.approx(scale)
    assert int(encode.inputs[2].const_value.numpy()) == zero - (128 if kind == "int8" else 0)
    assert encode.inputs[1].const_value.shape.rank() == 0
    assert decode.inputs[1].const_value.numpy() == np.float32(0.125)
    (got,) = run(model, {"x": X})
    # A value halfway between two codes may go to the other one, and what is nearly nothing moves a few more.
    assert np.abs(got - want).max() <= 0.1251
    assert np.mean(got != want) < 0.02
    assert not apply("absorb_scales", model).modified


LEFT = {
    "between two steps": ("h = Add(x, k)", {"k": number(0.06)}),
    "out of the codes": ("h = Add(x, k)", {"k": number(40.0)}),
    "a negative factor": ("h = Mul(x, k)", {"k": number(-1.0)}),
    "zero": ("h = Mul(x, k)", {"k": number(0.0)}),
    "a number divided by it": ("h = Div(k, x)", {"k": number(2.0)}),
    "subtracted from a number": ("h = Sub(k, x)", {"k": number(2.0)}),
    "one for each channel": ("h = Mul(x, k)", {"k": normal((3, 1, 1), 1)}),
    "two activations": ("h = Mul(x, x)", {}),
    "an infinite factor": ("h = Mul(x, k)", {"k": number(np.inf)}),
    "a scale too small": ("h = Mul(x, k)", {"k": number(1e38)}),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_does_not_go_into_codes(case):
    body, constants = LEFT[case]
    model = pair(body, constants, inner="h")
    before = text_of(model)
    assert not apply("absorb_scales", model).modified
    assert text_of(model) == before


def test_what_others_read_stays():
    text = """g (float[2,3,4,5] x) => (float[2,3,4,5] y, float[2,3,4,5] h) {
        h = Mul(x, k) q = QuantizeLinear(h, s, z) y = DequantizeLinear(q, s, z) }"""
    assert not apply("absorb_scales", parse(text, {**GRID, "k": number(2.0)}, opset=13)).modified
    text = """g (float[2,3,4,5] x) => (float[2,3,4,5] y) {
        h = Mul(x, k) q = QuantizeLinear(h, s, z) d = DequantizeLinear(q, s, z) y = Add(h, d) }"""
    assert not apply("absorb_scales", parse(text, {**GRID, "k": number(2.0)}, opset=13)).modified


def test_a_shared_scale_is_not_changed_for_others():
    text = """g (float[2,3,4,5] x) => (float[2,3,4,5] y, float[2,3,4,5] o) {
        h = Mul(x, k) q = QuantizeLinear(h, s, z) y = DequantizeLinear(q, s, z)
        p = QuantizeLinear(x, s, z) o = DequantizeLinear(p, s, z) }"""
    model = parse(text, {**GRID, "k": number(2.0)}, opset=13)
    want = run(model, {"x": X})
    assert apply("absorb_scales", model).modified
    assert all(np.array_equal(a, b) for a, b in zip(run(model, {"x": X}), want, strict=True))


@pytest.mark.parametrize("more", ["y = Mul(d, k)", "y = Div(d, k)", "e = Mul(d, k) y = Mul(l, e)"])
def test_scalars_go_into_the_decoder_before_them(more):
    text = f"""g (float[2,3,4,5] x) => (float[2,3,4,5] y) {{
        q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) {more} }}"""
    model = parse(text, {**GRID, "k": number(2.0), "l": number(0.25)}, opset=13)
    (want,) = run(model, {"x": X})
    assert apply("absorb_scales", model).modified
    assert [node.op_type for node in model.graph] == ["QuantizeLinear", "DequantizeLinear"]
    assert model.graph[1].outputs[0].name == "y"
    assert np.allclose(run(model, {"x": X})[0], want, rtol=1e-6)


@pytest.mark.parametrize("more", ["y = Add(d, k)", "y = Mul(d, m)", "e = Mul(d, k) y = Add(d, e)"])
def test_what_does_not_go_into_a_decoder(more):
    text = f"""g (float[2,3,4,5] x) => (float[2,3,4,5] y) {{
        q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) {more} }}"""
    model = parse(text, {**GRID, "k": number(2.0), "m": number(-2.0)}, opset=13)
    assert not apply("absorb_scales", model).modified


def gate(alpha="0.16666667", beta="0.5", *, scale=0.125, zero=100, kind=np.uint8, more=""):
    """A hard sigmoid between codes and codes, and x times it."""
    text = f"""g (float[2,3,4,5] x) => (float[2,3,4,5] y{", float[2,3,4,5] h" if more == "h" else ""}) {{
        q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) e = DequantizeLinear(q, s, z)
        h = HardSigmoid <alpha = {alpha}, beta = {beta}> (d)
        p = QuantizeLinear(h, t, zero) c = DequantizeLinear(p, t, zero) y = Mul(e, c) }}"""
    zeros = {"z": np.array(zero, kind), "zero": np.array(np.iinfo(kind).min, kind)}
    return parse(text, {"s": number(scale), "t": number(1 / 255), **zeros}, opset=13)


@pytest.mark.parametrize(
    ("alpha", "beta", "scale", "zero", "kind"),
    [
        ("0.16666667", "0.5", 0.125, 100, np.uint8), ("0.2", "0.5", 0.125, 100, np.uint8),
        ("0.16666667", "0.5", 0.125, -28, np.int8), ("0.5", "0.25", 0.25, 40, np.uint8),
        ("0.16666667", "0.5", 0.03, 100, np.uint8),
    ],
)  # fmt: skip
def test_a_hard_sigmoid_clips_codes(alpha, beta, scale, zero, kind):
    model = gate(alpha, beta, scale=scale, zero=zero, kind=kind)
    result = apply("absorb_scales", model)
    assert only(result, "rewritten")
    assert [node.op_type for node in model.graph] == [
        "QuantizeLinear", "DequantizeLinear", "Clip", "DequantizeLinear", "Mul",
    ]  # fmt: skip
    limits = np.iinfo(kind)
    decoded = (np.clip(np.rint(X / np.float32(scale)) + zero, limits.min, limits.max) - zero) * scale
    want = decoded * np.clip(float(alpha) * decoded + float(beta), 0, 1)
    (got,) = run(model, {"x": X})
    # One is a code only if its place is; the rest is exact.
    assert np.abs(got - want).max() <= float(alpha) * scale * np.abs(decoded).max() / 2 + 1e-5
    inside = np.abs(decoded) < 0.4 * (1 / float(alpha))
    assert np.allclose(got[inside], want[inside], atol=1e-5)


def test_without_bounds_no_clip_is_needed():
    # All codes are in between: -3 is code 0, and 3 is code 255.
    model = gate("0.16666667", "0.5", scale=6 / 255, zero=128)
    assert not apply("absorb_scales", model).modified  # 127.5 steps
    model = gate("0.16666667", "0.5", scale=3 / 128, zero=128)
    assert apply("absorb_scales", model).modified
    assert "Clip" not in [node.op_type for node in model.graph]


@pytest.mark.parametrize(
    "options",
    [
        {"scale": 0.13}, {"zero": 10}, {"alpha": "-0.2"}, {"more": "h"}, {"beta": "60.0"},
    ],
)  # fmt: skip
def test_a_hard_sigmoid_that_no_clip_computes(options):
    model = gate(**options)
    before = text_of(model)
    assert not apply("absorb_scales", model).modified
    assert text_of(model) == before


def test_ranges_are_chosen_so_that_it_works_and_kernels_are_integer():
    swish = "h = HardSigmoid <alpha = 0.16666667> (a) m = Mul(a, h) n = Mul(m, k) o = Add(n, b)"
    conv = "Conv <pads = [1, 1, 1, 1]>"
    body = f"a = {conv} (x, w0) {swish} y = {conv} (o, w1)"
    weights = {"w0": normal((32, 32, 3, 3), 1, scale=0.14), "w1": normal((32, 32, 3, 3), 2, scale=0.1)}
    weights |= {"k": number(0.61), "b": number(-0.28)}
    model = parse(f"g (float[B,32,8,8] x) => (float[B,32,8,8] y) {{ {body} }}", weights, opset=13)
    data = [{"x": normal((1, 32, 8, 8), 20 + i)} for i in range(4)]
    (want,) = run(model, data[0])
    ctx = context(scheme="w8a8", batches=data, reduce_range=saturates())
    steps = "canonicalize assign_scheme rtn raise_opset insert_qdq absorb_scales export_qdq cleanup"
    for name in steps.split():
        apply(name, model, ctx)
    assert not {"HardSigmoid", "Add"} & {node.op_type for node in model.graph}
    (got,), kernels = executed(model, data[0])
    assert kernels == ["Clip", "QLinearConv", "QLinearConv", "QLinearMul"]
    noise = ((got - want) ** 2).sum() / (want**2).sum()
    assert 10 * np.log10(1 / noise) > 30


def test_scalar_steps_and_what_they_anchor():
    model = parse(
        "g (float[2,3,4,5] x) => (float[2,3,4,5] y) { n = Neg(x) m = Mul(n, k) o = Add(m, b) y = Abs(o) }",
        {"k": number(2.0), "b": number(-0.5)},
    )
    negate, product, shift, _ = model.graph
    assert scalar_step(negate) is None
    assert scalar_step(product)[1:] == (2.0, 0.0)
    assert scalar_step(shift)[1:] == (1.0, -0.5)
    assert behind_scalars(negate.outputs[0]) is shift.outputs[0]
    assert anchor_of(shift.outputs[0], []) == -0.5
    assert anchor_of(negate.outputs[0], []) == 0
    hard = parse("g (float[2] x) => (float[2] y) { y = HardSigmoid <alpha = 0.25> (x) }").graph[0]
    assert anchor_of(negate.outputs[0], [(hard, 0)]) == -2.0


def test_where_it_belongs():
    step = load("absorb_scales")
    assert step.applies(context(scheme="w8a8").config)
    assert not step.applies(context(scheme="w8a8-dynamic").config)
    assert not step.applies(context(scheme="w4a16").config)
    assert "insert_qdq" in step.after
