"""Normalizations and constant scales in the layers before them; ONNX Runtime runs the graph before and after."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.graph import PASS_KEY
from qcompiler.passes import load
from qcompiler.scheme import Scheme
from qcompiler.scheme_plan import Pattern, SchemePlan
from tests.builders import apply, context, normal, only, parse, run, text_of


def statistics(channels, seed=0, dtype="float32"):
    """Parameters of a BatchNormalization whose scale goes from 0.1 to 10 and has both signs."""
    gamma = (10 ** np.linspace(-1, 1, channels) * np.resize([1, -1], channels)).astype(dtype)
    return {
        "gamma": gamma,
        "beta": normal(channels, seed + 1, dtype),
        "mean": normal(channels, seed + 2, dtype),
        "var": (0.2 + normal(channels, seed + 3) ** 2).astype(dtype),
    }


BN = "BatchNormalization (c, gamma, beta, mean, var)"
# Name: layer, weights, shape of x, channels.
LAYERS = {
    "conv": ("Conv <pads = [1, 1, 1, 1]> (x, w)", {"w": normal((6, 4, 3, 3), 1)}, (2, 4, 7, 5), 6),
    "conv with bias": ("Conv <strides = [2, 2]> (x, w, b)", {"w": normal((6, 4, 3, 2), 1), "b": normal(6, 2)},
                       (2, 4, 7, 5), 6),
    "grouped conv": ("Conv <group = 2> (x, w)", {"w": normal((6, 2, 1, 1), 1)}, (2, 4, 7, 5), 6),
    "depthwise conv": ("Conv <group = 4> (x, w)", {"w": normal((8, 1, 3, 3), 1)}, (2, 4, 7, 5), 8),
    "conv in one dimension": ("Conv (x, w)", {"w": normal((6, 4, 3), 1)}, (2, 4, 9), 6),
    "transposed conv": ("ConvTranspose <strides = [2, 2]> (x, w, b)", {"w": normal((4, 6, 3, 3), 1), "b": normal(6, 2)},
                        (2, 4, 5, 5), 6),
    "grouped transposed conv": ("ConvTranspose <group = 2> (x, w)", {"w": normal((4, 3, 2, 2), 1)}, (2, 4, 5, 5), 6),
    "gemm": ("Gemm <transB = 1> (x, w, b)", {"w": normal((6, 4), 1), "b": normal(6, 2)}, (3, 4), 6),
    "gemm with alpha": ("Gemm <alpha = 0.5> (x, w)", {"w": normal((4, 6), 1)}, (3, 4), 6),
    "gemm with a row of one": ("Gemm (x, w, b)", {"w": normal((4, 6), 1), "b": normal((1, 1), 2)}, (3, 4), 6),
}  # fmt: skip


def model_of(layer, weights, shape, channels, behind=BN, *, kind="float", extra=None):
    sizes = ",".join(map(str, shape))
    text = (
        f"g ({kind}[{sizes}] x) => ({kind}[{'N,' * (len(shape) - 1)}M] y) {{ [layer] c = {layer} [bn] y = {behind} }}"
    )
    dtype = "float16" if kind == "float16" else "float32"
    weights = {name: array.astype(dtype) for name, array in weights.items()}
    known = statistics(channels, dtype=dtype) if "BatchNormalization" in behind else {}
    return parse(text, {**weights, **known, **(extra or {})})


@pytest.mark.parametrize("case", LAYERS)
def test_a_normalization_goes_into_the_layer(case):
    layer, weights, shape, channels = LAYERS[case]
    model = model_of(layer, weights, shape, channels)
    x = {"x": normal(shape, 9)}
    (want,) = run(model, x)
    result = apply("fold_batchnorm", model)
    assert result.modified
    (record,) = result.records
    assert (record.site, record.action) == ("layer", "rewritten")
    assert record.reason == "BatchNormalization folded into its weight and bias"
    assert [node.op_type for node in model.graph] == [layer.split()[0]]
    assert [node.outputs[0].name for node in model.graph] == ["y"]
    (got,) = run(model, x)
    assert np.allclose(got, want, rtol=1e-4, atol=1e-4)
    assert not apply("fold_batchnorm", model).modified


def test_the_folded_weight_is_that_of_the_formula():
    layer, weights, shape, channels = LAYERS["conv with bias"]
    model = model_of(layer, weights, shape, channels)
    apply("fold_batchnorm", model)
    known = {name: array.astype(np.float64) for name, array in statistics(channels).items()}
    factor = known["gamma"] / np.sqrt(known["var"] + 1e-5)
    (node,) = model.graph
    weight, bias = (node.inputs[i].const_value.numpy() for i in (1, 2))
    assert np.array_equal(weight, (weights["w"] * factor[:, None, None, None]).astype(np.float32))
    assert np.array_equal(bias, (known["beta"] + (weights["b"] - known["mean"]) * factor).astype(np.float32))


def test_behind_a_matmul_the_bias_is_an_add():
    text = "g (float[B,4] x) => (float[B,6] y) { [fc] c = MatMul(x, w) [bn] y = " + BN + " }"
    model = parse(text, {"w": normal((4, 6), 1), **statistics(6)})
    x = {"x": normal((3, 4), 9)}
    (want,) = run(model, x)
    assert only(apply("fold_batchnorm", model), "rewritten") == ["fc"]
    assert text_of(model) == ["c = MatMul(x, w)", "y = Add(c, w_bias)"]
    assert model.graph[1].metadata_props[PASS_KEY] == "fold_batchnorm"
    assert np.allclose(run(model, x)[0], want, rtol=1e-4, atol=1e-4)


def test_an_add_between_matmul_and_normalization_is_taken_up():
    text = "g (float[B,4] x) => (float[B,6] y) { [fc] h = MatMul(x, w) c = Add(b, h) [bn] y = " + BN + " }"
    model = parse(text, {"w": normal((4, 6), 1), "b": normal(6, 2), **statistics(6)})
    x = {"x": normal((3, 4), 9)}
    (want,) = run(model, x)
    (record,) = apply("fold_batchnorm", model).records
    assert record.reason == "Add, BatchNormalization folded into its weight and bias"
    assert text_of(model) == ["h = MatMul(x, w)", "y = Add(h, w_bias)"]
    assert np.allclose(run(model, x)[0], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "text", ["y = MatMul(x, w)", "h = MatMul(x, w) y = Add(h, b)", "h = MatMul(x, w) y = Mul(h, b)"]
)
def test_a_linear_layer_without_a_normalization_is_left_alone(text):
    model = parse(f"g (float[B,4] x) => (float[B,6] y) {{ {text} }}", {"w": normal((4, 6), 1), "b": normal(6, 2)})
    before = text_of(model)
    result = apply("fold_batchnorm", model)
    assert (result.modified, result.records, text_of(model)) == (False, (), before)


ONE, EACH = np.array([1.7], np.float32), normal((5, 1, 1), 3) + 4
CHAINS = {
    "one value": ("y = Mul(k, c)", {"k": ONE}),
    "a scalar": ("y = Add(c, k)", {"k": np.array(0.3, np.float32)}),
    "one for each channel": ("y = Mul(c, k)", {"k": EACH}),
    "with a batch axis": ("y = Add(c, k)", {"k": EACH[None]}),
    "as PaddlePaddle writes it": ("d = Mul(k, c) y = Add(d, l)", {"k": ONE, "l": ONE - 3}),
    "a normalization taken apart": (
        "d = Sub(c, k) e = Div(d, l) f = Mul(e, l) y = Add(f, k)", {"k": EACH, "l": np.abs(EACH) + 1},
    ),
    "from the left": ("d = Sub(k, c) y = Mul(l, d)", {"k": EACH, "l": EACH - 1}),
    "around a normalization": (
        "d = Add(c, k) e = BatchNormalization(d, gamma, beta, mean, var) y = Mul(e, k)", {"k": EACH},
    ),
}  # fmt: skip


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", CHAINS)
def test_constant_scales_and_shifts_go_into_a_convolution(case, bias):
    text, constants = CHAINS[case]
    weights = {"w": normal((5, 4, 3, 3), 1), **({"b": normal(5, 2)} if bias else {}), **constants}
    weights |= statistics(5) if "gamma" in text else {}
    head = "g (float[B,4,H,W] x) => (float[B,5,H,W] y)"
    model = parse(f"{head} {{ [layer] c = Conv (x, w{', b' if bias else ''}) {text} }}", weights)
    x = {"x": normal((2, 4, 6, 6), 9)}
    (want,) = run(model, x)
    assert only(apply("fold_batchnorm", model), "rewritten") == ["layer"]
    assert [node.op_type for node in model.graph] == ["Conv"]
    assert np.allclose(run(model, x)[0], want, rtol=1e-4, atol=1e-4)


def test_without_a_shift_no_bias_is_made():
    model = model_of(*LAYERS["conv"], "Mul(c, k)", extra={"k": ONE})
    apply("fold_batchnorm", model)
    assert text_of(model) == ["y = Conv(x, w)"]


CONV = "[layer] c = Conv (x, w)"
BEHIND = "[bn] y = BatchNormalization (c, gamma, beta, mean, var)"
REFUSED = {
    "another reader": (f"{CONV} {BEHIND} r = Relu(c) z = ReduceSum(r)", "", "bn", "what it reads has other readers"),
    "a graph output": (f"{CONV} {BEHIND}", ", float[B,5,H,W] c", "bn", "what it reads has other readers"),
    "a computed weight": (
        f"v = Relu(w) [layer] c = Conv (x, v) {BEHIND}", "", "bn", "the weight of 'layer' is no constant",
    ),
    "a computed bias": (
        f"v = Relu(mean) [layer] c = Conv (x, w, v) {BEHIND}", "", "bn", "the bias of 'layer' is no constant",
    ),
    "computed statistics": (
        f"{CONV} v = Relu(mean) [bn] y = BatchNormalization (c, gamma, beta, v, var)", "", "bn",
        "its statistics are no constants",
    ),
    "no layer in front": (
        "[bn] y = BatchNormalization (x, four, four, four, four)", "", "bn",
        "what it reads is not the result of Conv, ConvTranspose, Gemm or MatMul",
    ),
    "a value for each column in between": (
        f"{CONV} [m] d = Mul(c, row) {BEHIND.replace('(c,', '(d,')}", "", "bn",
        "'m' in front of it is not: its constant of shape [6] is not one value, or one for each channel",
    ),
    "a constant of more axes in between": (
        f"{CONV} [m] d = Mul(c, more) {BEHIND.replace('(c,', '(d,')}", "", "bn",
        "'m' in front of it is not: its constant of shape [1, 1, 1, 1, 1] is not one value, or one for each channel",
    ),
    "division by it": (
        f"{CONV} [m] d = Div(one, c) {BEHIND.replace('(c,', '(d,')}", "", "bn",
        "'m' in front of it is not: it divides by the layer's result",
    ),
    "division by zero": (
        f"{CONV} [m] d = Div(c, zero) {BEHIND.replace('(c,', '(d,')}", "", "bn",
        "'m' in front of it is not: it divides by zero",
    ),
    "a normalization taken apart": (
        f"{CONV} [m] d = Mul(c, each) [a] y = Add(d, each) r = Relu(c) z = ReduceSum(r)", "", "m",
        "what it reads has other readers",
    ),
    "one taken apart the other way round": (
        f"{CONV} [a] d = Sub(c, each) [m] y = Div(d, each) r = Relu(c) z = ReduceSum(r)", "", "a",
        "what it reads has other readers",
    ),
    "a variance that is not positive": (
        f"{CONV} [bn] y = BatchNormalization (c, gamma, beta, mean, negative)", "", "bn",
        "its variance is not positive",
    ),
    "the training form": (
        f"{CONV} [bn] y, m, v = BatchNormalization <training_mode = 1> (c, gamma, beta, mean, var)", "", "bn",
        "it is in its training form",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_folded_is_left_alone_with_the_reason(case):
    text, outputs, name, reason = REFUSED[case]
    weights = {"w": normal((5, 4, 3, 3), 1), "row": normal(6, 2), "more": normal((1, 1, 1, 1, 1), 2), **statistics(5)}
    weights |= {"four": np.ones(4, np.float32), "negative": -np.ones(5, np.float32)}
    weights |= {"one": np.array(1, np.float32), "zero": np.array(0, np.float32), "each": 1 + normal((5, 1, 1), 4) ** 2}
    model = parse(f"g (float[B,4,H,W] x) => (float[B,5,H,W] y{outputs}) {{ {text} }}", weights)
    before = text_of(model)
    result = apply("fold_batchnorm", model)
    assert not result.modified
    assert text_of(model) == before
    (record,) = result.records
    assert (record.site, record.action, record.reason) == (name, "skipped", f"not folded: {reason}")
    assert np.array_equal(model.graph.initializers["w"].const_value.numpy(), weights["w"])


# Scales and shifts that nobody would call a normalization.
SILENT = {
    "a value for each column": "y = Mul(c, row)",
    "a scale of its own": "y = Mul(c, each) r = Relu(c) z = ReduceSum(r)",
    "a scale before a residual": "d = Mul(c, each) y = Add(d, c)",
    "one shift before a scale": "d = Add(c, one) y = Mul(d, each) r = Relu(c) z = ReduceSum(r)",
    "division by it": "y = Div(one, c)",
    "a hard swish": "d = Add(c, one) e = HardSigmoid(d) y = Mul(c, e)",
}


@pytest.mark.parametrize("case", SILENT)
def test_of_other_arithmetic_nothing_is_said(case):
    weights = {"w": normal((5, 4, 3, 3), 1), "row": normal(6, 2), "each": normal((5, 1, 1), 3)}
    weights["one"] = np.array(1, np.float32)
    model = parse(f"g (float[B,4,8,8] x) => (float[B,5,6,6] y) {{ {CONV} {SILENT[case]} }}", weights)
    result = apply("fold_batchnorm", model)
    assert (result.modified, result.records) == (False, ())


def test_a_shift_that_stays_behind_its_folded_scale_is_recorded():
    weights = {"w": normal((5, 4, 3, 3), 1), "k": normal((5, 1, 1), 2)}
    text = f"{CONV} [m] d = Mul(c, k) [a] y = Add(d, k) r = Relu(d) z = ReduceSum(r)"
    model = parse(f"g (float[B,4,8,8] x) => (float[B,5,6,6] y) {{ {text} }}", weights)
    records = [(record.site, record.action, record.reason) for record in apply("fold_batchnorm", model).records]
    assert records == [
        ("layer", "rewritten", "Mul folded into its weight and bias"),
        ("a", "skipped", "not folded: what it reads has other readers"),
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[fc] c = MatMul(x, w)", "the result of 'fc' is not known to be a matrix, whose columns are channels"),
        ("[fc] c = MatMul(x, v)", "the weight of 'fc' is no matrix"),
    ],
)
def test_a_product_that_is_no_matrix_is_refused(text, reason):
    rank = "2,5,4" if "w)" in text else "5,4"
    head = f"g (float[{rank}] x) => (float[{'2,' if rank[0] == '2' or 'v' in text else ''}5,5] y)"
    weights = {"w": normal((4, 5), 1), "v": normal((1, 4, 5), 1), **statistics(5)}
    model = parse(f"{head} {{ {text} {BEHIND} }}", weights)
    (record,) = apply("fold_batchnorm", model).records
    assert (record.action, record.reason) == ("skipped", f"not folded: {reason}")


def test_a_gemm_with_a_bias_for_each_row_or_a_beta_is_refused():
    for text, reason in (
        ("Gemm (x, w, b)", "the bias of 'layer' has one value for each row"),
        ("Gemm <beta = 0.5> (x, w)", "'layer' has a beta other than 1"),
    ):
        model = model_of(text, {"w": normal((4, 6), 1), "b": normal((3, 1), 1)}, (3, 4), 6)
        (record,) = apply("fold_batchnorm", model).records
        assert (record.site, record.reason) == ("bn", f"not folded: {reason}")


def test_shared_weights_and_biases_are_untied():
    text = """g (float[B,5,H,W] x) => (float[B,5,H,W] y, float[B,5,H,W] z) {
        [first] c = Conv (x, w, b) [bn] y = BatchNormalization (c, gamma, beta, mean, var)
        [second] z = Conv (x, w, b) }"""
    weights = {"w": normal((5, 5, 1, 1), 1), "b": normal(5, 2), **statistics(5)}
    model = parse(text, weights)
    x = {"x": normal((2, 5, 4, 4), 9)}
    want = run(model, x)
    assert only(apply("fold_batchnorm", model), "rewritten") == ["first"]
    assert text_of(model) == ["y = Conv(x, w_first, b_first)", "z = Conv(x, w, b)"]
    for got, wanted in zip(run(model, x), want, strict=True):
        assert np.allclose(got, wanted, rtol=1e-4, atol=1e-4)
    assert np.array_equal(model.graph.initializers["w"].const_value.numpy(), weights["w"])


def test_a_weight_that_is_an_output_stays():
    text = "g (float[B,5,H,W] x) => (float[B,5,H,W] y, float[5,5,1,1] w) { [layer] c = Conv (x, w) " + BEHIND + " }"
    model = parse(text, {"w": normal((5, 5, 1, 1), 1), **statistics(5)})
    x = {"x": normal((2, 5, 4, 4), 9)}
    want = run(model, x)
    apply("fold_batchnorm", model)
    for got, wanted in zip(run(model, x), want, strict=True):
        assert np.allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_half_precision_is_rounded_once():
    model = model_of(*LAYERS["conv with bias"], kind="float16")
    weights = {"w": normal((6, 4, 3, 2), 1, "float16"), **statistics(6, dtype="float16")}
    x = {"x": normal((2, 4, 7, 5), 9, "float16")}
    (want,) = run(model, x)
    apply("fold_batchnorm", model)
    (node,) = model.graph
    assert node.inputs[1].dtype == node.inputs[2].dtype == ir.DataType.FLOAT16
    known = {name: array.astype(np.float64) for name, array in weights.items()}
    factor = (known["gamma"] / np.sqrt(known["var"] + 1e-5))[:, None, None, None]
    assert np.array_equal(node.inputs[1].const_value.numpy(), (known["w"] * factor).astype(np.float16))
    # A sum of 24 products with up to 11 bits each, scaled by up to 20.
    assert np.allclose(run(model, x)[0], want, rtol=5e-3, atol=5e-2)


def test_what_exceeds_half_precision_is_refused():
    model = model_of(*LAYERS["conv"], kind="float16")
    gamma = model.graph.initializers["gamma"]
    gamma.const_value = ir.tensor(np.full(6, 6e4, np.float16), name="gamma")
    (record,) = apply("fold_batchnorm", model).records
    assert (record.site, record.reason) == ("bn", "not folded: the weight or bias would exceed float16")


def test_bodies_are_treated_alike():
    text = f"""g (bool p, float[2,4,5,5] x) => (float[2,5,3,3] y) {{
        y = If (p) <then_branch = yes () => (float[2,5,3,3] s) {{ {CONV} {BEHIND.replace("y =", "s =")} }},
            else_branch = no () => (float[2,5,3,3] t) {{ t = Conv (x, w) }}>
    }}"""
    model = parse(text, {"w": normal((5, 4, 3, 3), 1), **statistics(5)})
    feeds = [{"x": normal((2, 4, 5, 5), 9), "p": np.array(flag)} for flag in (True, False)]
    wants = [run(model, feed)[0] for feed in feeds]
    assert apply("fold_batchnorm", model).modified
    assert {graph.name: text_of(graph) for graph in model.graphs()}["yes"] == ["s = Conv(x, w_layer, w_layer_bias)"]
    for feed, want in zip(feeds, wants, strict=True):
        assert np.allclose(run(model, feed)[0], want, rtol=1e-4, atol=1e-4)


def test_it_belongs_where_activations_are_quantized():
    kind = load("fold_batchnorm")
    w8a8, w4a16 = Scheme.parse("w8a8"), Scheme.parse("w4a16")
    assert kind.applies(context(scheme="w8a8").config)
    assert kind.applies(context(scheme="w8a8-dynamic").config)
    assert kind.applies(context(plan=SchemePlan(w4a16, overrides=((Pattern("re:conv"), w8a8),))).config)
    assert not kind.applies(context(scheme="w4a16").config)
    assert not kind.applies(context(scheme="w4a8").config)


# In front of convolutions: nodes that compute h from x, constants.
IN_FRONT = {
    "a scale": ("h = Mul(x, k)", {"k": 0.3}),
    "a negative scale from the left": ("h = Mul(k, x)", {"k": -2.0}),
    "a quotient": ("h = Div(x, k)", {"k": 4.0}),
    "a shift": ("h = Add(x, k)", {"k": 0.7}),
    "down": ("h = Sub(x, k)", {"k": 0.7}),
    "subtracted from one": ("h = Sub(k, x)", {"k": 1.0}),
    "both": ("a = Mul(x, k) h = Add(a, l)", {"k": 0.3, "l": -0.7}),
}  # fmt: skip


def in_front(body, constants, *, pads=0, bias=True):
    weights = {"w": normal((6, 4, 3, 3), 1), "v": normal((5, 4, 1, 1), 2), **({"b": normal(6, 3)} if bias else {})}
    weights |= {name: np.array(value, np.float32) for name, value in constants.items()}
    attributes = f"<pads = [{', '.join([str(pads)] * 4)}]>"
    layers = f"[one] y = Conv {attributes} (h, w{', b' if bias else ''}) [two] z = Conv(h, v)"
    outputs = "float[B,6,H,W] y, float[B,5,I,J] z"
    return parse(f"g (float[B,4,8,8] x) => ({outputs}) {{ {body} {layers} }}", weights)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", IN_FRONT)
def test_what_stands_in_front_of_convolutions_goes_into_all_of_them(case, bias):
    body, constants = IN_FRONT[case]
    model = in_front(body, constants, bias=bias)
    x = {"x": normal((2, 4, 8, 8), 9)}
    want = run(model, x)
    result = apply("fold_batchnorm", model)
    assert set(only(result, "rewritten")) == {"one", "two"}
    assert [node.op_type for node in model.graph] == ["Conv", "Conv"]
    for got, expected in zip(run(model, x), want, strict=True):
        assert np.allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_padding_is_scaled_and_not_shifted():
    model = in_front("h = Mul(x, k)", {"k": 0.3}, pads=1)
    assert apply("fold_batchnorm", model).modified
    model = in_front("a = Mul(x, k) h = Add(a, l)", {"k": 0.3, "l": 0.7}, pads=1)
    before = text_of(model)
    assert not apply("fold_batchnorm", model).modified
    assert text_of(model) == before


@pytest.mark.parametrize(
    "body",
    [
        "h = Mul(x, k) o = Neg(h)", "h = Div(k, x)", "h = Mul(x, each)", "h = Div(x, nil)", "h = Mul(x, x)",
    ],
)  # fmt: skip
def test_what_in_front_of_a_convolution_stays(body):
    model = in_front(body, {"k": 2.0, "nil": 0.0, "each": normal((4, 1, 1), 4)})
    before = text_of(model)
    assert not apply("fold_batchnorm", model).modified
    assert text_of(model) == before
