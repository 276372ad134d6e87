"""Hard sigmoid and hard swish in simpler operators; ONNX Runtime runs the graph before and after."""

import numpy as np
import pytest

from qcompiler.graph import PASS_KEY
from qcompiler.passes import load
from tests.builders import apply, context, normal, only, parse, run, text_of

NUMBERS = {"zero": 0, "one": 1, "two": 2, "three": 3, "six": 6, "half": 0.5, "fifth": 0.2, "sixth": 1 / 6, "minus": -1}
CONSTANTS = {name: np.array(number, np.float32) for name, number in NUMBERS.items()}
X = normal((2, 3, 4, 5), 7, scale=3.0)


def graph(body, *, opset=13, kind="float", constants=None, known=True):
    shape = "2,3,4,5" if known else "B,C,H,W"
    dtype = "float16" if kind == "float16" else "float32"
    given = {name: array.astype(dtype) for name, array in (CONSTANTS | (constants or {})).items()}
    used = {name: array for name, array in given.items() if name in body.replace("(", " ").replace(",", " ").split(" ")
            or f"{name})" in body}  # fmt: skip
    return parse(f"g ({kind}[{shape}] x) => ({kind}[{shape}] y) {{ {body} }}", used, opset=opset)


SWISH = ["h = HardSigmoid", "y = Mul"]
# Body: what it becomes, without arguments.
CASES = {
    "divided at the product": ("a = Add(x, three) c = Clip(a, zero, six) p = Mul(x, c) y = Div(p, six)", SWISH),
    "the other way round": ("a = Add(three, x) c = Clip(a, zero, six) p = Mul(c, x) y = Mul(sixth, p)", SWISH),
    "multiplied by a sixth": ("a = Add(x, three) c = Clip(a, zero, six) p = Mul(x, c) y = Mul(p, sixth)", SWISH),
    "divided at the Clip": ("a = Add(x, three) c = Clip(a, zero, six) d = Div(c, six) y = Mul(x, d)", SWISH),
    "divided at x": ("d = Div(x, six) a = Add(x, three) c = Clip(a, zero, six) y = Mul(d, c)", SWISH),
    "x times a sixth": ("d = Mul(sixth, x) a = Add(x, three) c = Clip(a, zero, six) y = Mul(c, d)", SWISH),
    "subtracted": ("a = Sub(x, n) c = Clip(a, zero, six) p = Mul(x, c) y = Div(p, six)", SWISH),
    "alone": ("a = Add(x, three) c = Clip(a, zero, six) y = Div(c, six)", SWISH[:1]),
    "up to one": ("m = Mul(x, fifth) a = Add(half, m) y = Clip(a, zero, one)", SWISH[:1]),
    "shifted first": ("a = Add(x, three) m = Div(a, six) y = Clip(m, zero, one)", SWISH[:1]),
    "falling": ("a = Sub(three, x) c = Clip(a, zero, six) y = Div(c, six)", SWISH[:1]),
    "with other numbers": (
        "m = Mul(x, three) a = Add(m, one) c = Clip(a, zero, two) p = Mul(x, c) y = Mul(half, p)",
        SWISH,
    ),
    "one value with an axis": ("a = Add(x, v) c = Clip(a, zero, six) p = Mul(x, c) y = Div(p, six)", SWISH),
}  # fmt: skip
EXTRA = {"n": np.array(-3, np.float32), "v": np.array([3], np.float32)}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_the_operator_made_for_it(case, known):
    body, expected = CASES[case]
    model = graph(body, constants=EXTRA, known=known)
    (want,) = run(model, {"x": X})
    result = apply("simplify_activations", model)
    assert result.modified
    assert len(only(result, "rewritten")) == len(result.records) == 1
    assert [node.op_type for node in model.graph] == [text.split(" = ")[1] for text in expected]
    assert model.graph[-1].outputs[0].name == "y"
    (got,) = run(model, {"x": X})
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    again = apply("simplify_activations", model)
    assert not again.modified
    assert not again.records


def test_what_it_looks_like():
    model = graph(CASES["divided at the product"][0])
    apply("simplify_activations", model)
    hard, product = model.graph
    assert (hard.attributes["alpha"].as_float(), hard.attributes["beta"].as_float()) == pytest.approx((1 / 6, 0.5))
    assert text_of(model) == [f"{hard.outputs[0].name} = HardSigmoid(x)", f"y = Mul(x, {hard.outputs[0].name})"]
    assert hard.metadata_props[PASS_KEY] == "simplify_activations"
    assert product.inputs[0].name == "x"


def test_bounds_in_attributes():
    model = graph("a = Add(x, three) c = Clip <min = 0.0, max = 6.0> (a) y = Div(c, six)", opset=9)
    (want,) = run(model, {"x": X})
    assert apply("simplify_activations", model).modified
    assert [node.op_type for node in model.graph] == ["HardSigmoid"]
    assert np.allclose(run(model, {"x": X})[0], want, rtol=1e-5, atol=1e-6)


def test_x_keeps_its_other_readers():
    model = graph("a = Add(x, three) c = Clip(a, zero, six) p = Mul(x, c) d = Div(p, six) y = Add(x, d)")
    (want,) = run(model, {"x": X})
    assert apply("simplify_activations", model).modified
    assert [node.op_type for node in model.graph] == ["HardSigmoid", "Mul", "Add"]
    assert np.allclose(run(model, {"x": X})[0], want, rtol=1e-5, atol=1e-5)


# Body: why nothing is done; None where nothing is said.
REFUSED = {
    "no affine part": ("c = Clip(x, zero, six) y = Div(c, six)", None),
    "no shift": ("m = Mul(x, fifth) y = Clip(m, zero, one)", None),
    "another lower bound": ("a = Add(x, three) c = Clip(a, one, six) y = Div(c, six)", None),
    "no upper bound": ("a = Add(x, three) c = Clip(a, zero) y = Div(c, six)", None),
    "bounds that are computed": (
        "t = ReduceMax <keepdims = 0> (x) a = Add(x, three) c = Clip(a, zero, t) y = Div(c, six)",
        None,
    ),
    "a constant for each channel": ("a = Add(x, each) c = Clip(a, zero, six) y = Div(c, six)", None),
    "divided by another number": (
        "a = Add(x, three) c = Clip(a, zero, six) y = Div(c, three)",
        "nothing divides by its bound of 6",
    ),
    "divides six": (
        "a = Add(x, three) c = Clip(a, zero, six) s = Add(c, one) y = Div(six, s)",
        "nothing divides by its bound of 6",
    ),
    "never divided": ("a = Add(x, three) c = Clip(a, zero, six) y = Mul(x, c)", "nothing divides by its bound of 6"),
    "read before the Clip": (
        "a = Add(x, three) c = Clip(a, zero, six) d = Div(c, six) y = Add(a, d)",
        "what it clips has other readers",
    ),
    "read behind the Clip": (
        "a = Add(x, three) c = Clip(a, zero, six) d = Div(c, six) y = Add(c, d)",
        "what it computes has other readers before it is divided",
    ),
    "x divided has other readers": (
        "d = Div(x, six) a = Add(x, three) c = Clip(a, zero, six) p = Mul(d, c) y = Add(p, d)",
        "what it computes has other readers before it is divided",
    ),
    "the product has other readers": (
        "a = Add(x, three) c = Clip(a, zero, six) p = Mul(x, c) d = Div(p, six) y = Add(p, d)",
        "what it computes has other readers before it is divided",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_left_alone(case):
    body, reason = REFUSED[case]
    model = graph(body, constants={"each": normal((3, 1, 1), 1)})
    before = text_of(model)
    result = apply("simplify_activations", model)
    assert (result.modified, text_of(model)) == (False, before)
    reasons = [f"no hard sigmoid: {reason}"] if reason else []
    assert [(record.action, record.reason) for record in result.records] == [("skipped", text) for text in reasons]


@pytest.mark.parametrize("output", ["a", "c", "p"])
def test_what_the_caller_gets_is_left_alone(output):
    body = "a = Add(x, three) c = Clip(a, zero, six) p = Mul(x, c) y = Div(p, six)"
    text = f"g (float[2,3,4,5] x) => (float[2,3,4,5] y, float[2,3,4,5] {output}) {{ {body} }}"
    model = parse(text, {name: CONSTANTS[name] for name in ("zero", "three", "six")})
    result = apply("simplify_activations", model)
    assert not result.modified
    assert only(result, "skipped")


def test_half_precision_has_no_kernel():
    model = graph(CASES["alone"][0], kind="float16")
    (record,) = apply("simplify_activations", model).records
    assert record.reason == "no hard sigmoid: ONNX Runtime has HardSigmoid in float32 only"


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("m = Mul(x, one) s = Sigmoid(m) y = Mul(x, s)", ["Sigmoid", "Mul"]),
        ("m = Mul(one, x) d = Div(m, one) s = Sigmoid(d) y = Mul(x, s)", ["Sigmoid", "Mul"]),
        ("y = Mul(x, one)", ["Mul"]), ("m = Div(one, x) y = Neg(m)", ["Div", "Neg"]),
        ("m = Mul(x, two) y = Neg(m)", ["Mul", "Neg"]), ("m = Mul(x, each) y = Neg(m)", ["Mul", "Neg"]),
    ],
)  # fmt: skip
def test_multiplying_by_one_goes_away(body, left):
    model = graph(body, constants={"each": np.ones((3, 1, 1), np.float32)})
    (want,) = run(model, {"x": X})
    before = len(model.graph)
    result = apply("simplify_activations", model)
    assert [node.op_type for node in model.graph] == left
    assert len(only(result, "rewritten")) == before - len(left)
    assert np.array_equal(run(model, {"x": X})[0], want)


def test_inside_a_body():
    model = parse(
        """g (bool b, float[2,3] x) => (float[2,3] y) {
        y = If (b) <then_branch = then () => (float[2,3] t) {
            a = Add(x, three) c = Clip(a, zero, six) p = Mul(x, c) t = Div(p, six) },
          else_branch = other () => (float[2,3] e) { e = Neg(x) }> }""",
        {name: CONSTANTS[name] for name in ("zero", "three", "six")},
    )
    feeds = {"b": np.array(True), "x": X[0, 0, :2, :3]}
    (want,) = run(model, feeds)
    assert apply("simplify_activations", model).modified
    assert np.allclose(run(model, feeds)[0], want, rtol=1e-5, atol=1e-5)


def test_where_it_belongs():
    step = load("simplify_activations")
    assert step.applies(context(scheme="w8a8").config)
    assert not step.applies(context(scheme="w4a16").config)
