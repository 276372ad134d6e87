"""What ONNX Runtime fuses becomes a Sum, which it leaves alone, and nothing else changes."""

import numpy as np
import pytest

from qcompiler.config import CompileConfig
from qcompiler.graph import PASS_KEY
from qcompiler.passes import load
from qcompiler.scheme import Scheme
from qcompiler.scheme_plan import SchemePlan
from qcompiler.session import OrtRunner
from tests.builders import apply, context, decoder, normal, parse, run, serialized, text_of, token_batches

K = 32
WEIGHTS = {
    "u": normal((K, K), 1, scale=0.2), "v": normal((K, K), 2, scale=0.2), "gain": 1 + normal(K, 3, scale=0.3),
    "shift": normal(K, 4), "eps": np.array(1e-5, np.float32), "two": np.array(2, np.float32),
    "last": np.array([-1], np.int64), "constant": normal(K, 5),
}  # fmt: skip
NORM = "LayerNormalization <axis = -1> (h, gain, shift)"
SPELLED = """m = ReduceMean <axes = [-1]> (h) d = Sub(h, m) q = Pow(d, two) s = ReduceMean <axes = [-1]> (q)
    e = Add(s, eps) t = Sqrt(e) f = Div(d, t) g = Mul(f, gain) n = Add(g, shift)"""
SQUARE = "q = Pow(h, two) s = ReduceMean <axes = [-1]> (q) e = Add(s, eps) t = Sqrt(e)"
# Text of the norm n of h = x + a; opset; whether ONNX Runtime 1.31 fuses both where nothing else reads h.
NORMS = {
    "layer": (f"n = {NORM}", 17, True),
    "layer, spelled out": (SPELLED, 14, True),
    "rms, by a reciprocal": (f"{SQUARE} i = Reciprocal(t) f = Mul(h, i) n = Mul(f, gain)", 14, False),
    "rms, by a division": (f"{SQUARE} f = Div(h, t) n = Mul(f, gain)", 14, False),
    "rms, the operator": ("n = RMSNormalization <axis = -1> (h, gain)", 23, False),
    "rms, that of ONNX Runtime": ("n = SimplifiedLayerNormalization <axis = -1> (h, gain)", 17, False),
}
PLACES = {"pre": "y = MatMul(n, v) r = Relu(h)", "post": "y = MatMul(n, v) r = Relu(n)"}


def model_of(norm, place="pre", kind="float"):
    """A residual addition and a norm behind it; in a pre-norm block the sum goes on too."""
    text, opset, _ = NORMS[norm]
    head = f"g ({kind}[B,S,{K}] x) => ({kind}[B,S,{K}] y, {kind}[B,S,{K}] r)"
    body = f"{head} {{ a = MatMul(x, u) [add] h = Add(x, a) {text} {PLACES[place]} }}"
    used = {name: array for name, array in WEIGHTS.items() if f" {name})" in body or f"({name}," in body}
    used |= {"gain": WEIGHTS["gain"]} | ({"shift": WEIGHTS["shift"]} if "shift" in body else {})
    if kind == "float16":
        used = {name: array.astype(np.float16) if array.dtype == np.float32 else array for name, array in used.items()}
    return parse(body, used, opset=opset)


def executed(model, feeds):
    """The operators that ONNX Runtime runs, with all of its optimizations."""
    with OrtRunner(serialized(model), threads=1, record=True) as runner:
        runner.run(feeds)
        return [node.op_type for node in runner.executed()]


def is_fused(model, feeds):
    return any(name.startswith("Skip") for name in executed(model, feeds))


@pytest.mark.parametrize("norm", [name for name, (_, _, fused) in NORMS.items() if fused])
def test_a_residual_addition_is_left_alone_by_onnx_runtime(norm):
    model, feeds = model_of(norm, "post"), {"x": normal((2, 5, K), 9)}
    want, before = run(model, feeds), text_of(model)
    assert is_fused(model, feeds)
    result = apply("split_skip_norm", model)
    assert result.modified
    assert text_of(model) == [line.replace("h = Add(x, a)", "h = Sum(x, a)") for line in before]
    (node,) = (node for node in model.graph if node.op_type == "Sum")
    assert node.metadata_props[PASS_KEY] == "split_skip_norm"
    (record,) = result.records
    assert (record.site, record.action) == ("model", "rewritten")
    assert record.reason == "1 additions before normalizations written as Sum, which ONNX Runtime leaves alone"
    for got, wanted in zip(run(model, feeds), want, strict=True):
        assert np.array_equal(got, wanted)
    assert not is_fused(model, feeds)
    for got, wanted in zip(run(model, feeds, optimize=True), want, strict=True):
        assert np.allclose(got, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
    again = apply("split_skip_norm", model)
    assert (again.modified, again.records) == (False, ())


def test_half_precision():
    model, feeds = model_of("layer", "post", "float16"), {"x": normal((2, 5, K), 9, "float16")}
    want = run(model, feeds)
    assert is_fused(model, feeds)
    assert apply("split_skip_norm", model).modified
    assert not is_fused(model, feeds)
    for got, wanted in zip(run(model, feeds, optimize=True), want, strict=True):
        assert np.allclose(got, wanted, rtol=2e-2, atol=2e-2)


NOT_FUSED = [(norm, place) for place in PLACES for norm in NORMS if place == "pre" or not NORMS[norm][2]]


@pytest.mark.parametrize(("norm", "place"), NOT_FUSED)
def test_what_onnx_runtime_leaves_alone_is_left_alone(norm, place):
    """Sums that the residual stream reads too, and norms without a mean."""
    model = model_of(norm, place)
    assert not is_fused(model, {"x": normal((2, 5, K), 9)})
    before = serialized(model)
    result = apply("split_skip_norm", model)
    assert (result.modified, result.records) == (False, ())
    assert serialized(model) == before


# Inputs, what computes h, and whether ONNX Runtime fuses it.
SHAPES = {
    "two inputs of one shape": ("[B,S,32] x, float[B,S,32] z", "h = Add(x, z)", True),
    "one input twice": ("[B,S,32] x, float[B,S,32] z", "h = Add(x, x)", True),
    "sizes of other names": ("[B,S,32] x, float[C,T,32] z", "h = Add(x, z)", False),
    "broadcast rows": ("[2,5,32] x, float[1,5,32] z", "h = Add(x, z)", False),
    "two axes": ("[S,32] x, float[S,32] z", "h = Add(x, z)", False),
    "four axes": ("[B,2,S,32] x, float[B,2,S,32] z", "h = Add(x, z)", False),
    "a constant of its shape": ("[2,5,32] x, float[2,5,32] z", "h = Add(x, whole)", True),
    "a reshaped one": ("[B,S,32] x, float[B,S,32] z", "r = Reshape(z, zeros) h = Add(x, r)", True),
}  # fmt: skip


@pytest.mark.parametrize("case", SHAPES)
def test_shapes_decide_as_in_onnx_runtime(case):
    inputs, body, fused = SHAPES[case]
    weights = {"whole": normal((2, 5, K), 6), "zeros": np.array([0, 0, K]), "gain": WEIGHTS["gain"]}
    weights["shift"] = WEIGHTS["shift"]
    model = parse(f"g (float{inputs}) => (float y, float w) {{ {body} y = {NORM} w = Relu(z) }}", weights, opset=17)
    sizes = {"B": 2, "S": 5, "C": 2, "T": 5}
    shapes = {v.name: [sizes.get(getattr(d, "value", d), d) for d in v.shape] for v in model.graph.inputs}
    feeds = {name: normal(shape, 9) for name, shape in shapes.items()}
    assert is_fused(model, feeds) == fused
    assert apply("split_skip_norm", model).modified == fused
    assert not is_fused(model, feeds)


LEFT = {
    "a constant": f"a = MatMul(x, u) h = Add(a, constant) y = {NORM}",
    "a constant on the left": f"a = MatMul(x, u) h = Add(constant, a) y = {NORM}",
    "another reader": "a = MatMul(x, u) h = Add(x, a) y = Relu(h)",
    "a mean alone": "a = MatMul(x, u) h = Add(x, a) m = ReduceMean <axes = [-1]> (h) y = Mul(h, m)",
    "a norm of something else": "h = Add(gain, shift) y = LayerNormalization <axis = -1> (x, h)",
    "a scale": "a = MatMul(x, u) h = ReduceMax <axes = [0, 1], keepdims = 0> (a) b = ReduceMin <axes = [0, 1], "
               "keepdims = 0> (a) i = Add(h, b) y = LayerNormalization <axis = -1> (x, i)",
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
def test_other_additions_stay(case):
    text = f"g (float[B,S,{K}] x) => (float[B,S,{K}] y) {{ {LEFT[case]} }}"
    model = parse(text, {name: WEIGHTS[name] for name in ("u", "constant", "gain", "shift") if name in text}, opset=17)
    before = serialized(model)
    result = apply("split_skip_norm", model)
    assert (result.modified, result.records) == (False, ())
    assert serialized(model) == before


def test_integers_have_no_sum():
    text = """g (int32[B,8] x, int32[B,8] z) => (int32[B,8] y) {
        h = Add(x, z) m = ReduceMean <axes = [-1]> (h) y = Sub(h, m) }"""
    model, feeds = parse(text, opset=17), {name: np.arange(16, dtype=np.int32).reshape(2, 8) for name in "xz"}
    (want,) = run(model, feeds)
    assert not apply("split_skip_norm", model).modified
    assert np.array_equal(run(model, feeds)[0], want)


def test_a_sum_that_is_a_graph_output_stays():
    text = (
        f"g (float[B,S,{K}] x, float[B,S,{K}] z) => (float[B,S,{K}] y, float[B,S,{K}] h) {{ h = Add(x, z) y = {NORM} }}"
    )
    model = parse(text, {name: WEIGHTS[name] for name in ("gain", "shift")}, opset=17)
    assert not is_fused(model, {name: normal((2, 5, K), 9) for name in "xz"})
    assert not apply("split_skip_norm", model).modified


def test_the_residual_stream_of_a_decoder_stays():
    """It normalizes in front of its layers, so that each sum is read by the next one too."""
    model, feeds = decoder(), token_batches(1)[0]
    assert not is_fused(model, feeds)
    assert not apply("split_skip_norm", model).modified


@pytest.mark.parametrize(
    ("target", "scheme", "applies"),
    [
        ("cpu", "w8a8-static", True),
        ("cpu", "w8a8", True),
        ("cpu", "w8a8-dynamic-token", True),
        ("cpu", "w4a16", False),
        ("cpu", "w4a8", False),
        ("cuda", "w8a8-static", False),
        ("tensorrt", "w8a8-static", False),
        ("portable", "w8a8-static", False),
    ],
)
def test_it_runs_for_the_cpu_where_activations_are_quantized(target, scheme, applies):
    config = CompileConfig(plan=SchemePlan(Scheme.parse(scheme)), target=target)
    assert load("split_skip_norm").applies(config) == applies
    assert str(load("split_skip_norm")(context())) == "split_skip_norm"
