"""Which values are quantized, and that ONNX Runtime then runs the integer operators that were counted on."""

import numpy as np
import pytest

from qcompiler.numerics.activation import ActivationSpec
from qcompiler.passes.base import explicit_activations
from qcompiler.placement import place
from qcompiler.scheme import Scheme
from qcompiler.sites import find_sites
from qcompiler.targets import IntegerRules
from tests.builders import apply, context, parse, run
from tests.integer_models import CONV, IMAGE, ROWS, TOKENS, WEIGHTS, batches, check, graph, integers

QCONV, FLOAT_MATMUL = "QLinearConv", "MatMulIntegerToFloat"
ATTENTION = """q = MatMul(x, m0) k = MatMul(x, m1) v = MatMul(x, m2) t = Transpose <perm = [0, 2, 1]> (k)
    s = MatMul(q, t) p = Softmax(s) o = MatMul(p, v) y = MatMul(o, m3)"""

SQUEEZE = f"""a = {CONV}(x, w0) g = GlobalAveragePool(a) e = {CONV}(g, w1) s = Sigmoid(e) m = Mul(a, s)
    y = {CONV}(m, w2)"""

# name: (nodes, kind, values that are quantized, groups that share a scale, operators that run)
TABLE = {
    "a chain": (f"a = {CONV}(x, w0, b0) y = {CONV}(a, w1)", IMAGE, "x a y", [], [QCONV] * 2),
    "Relu is absorbed": (f"a = {CONV}(x, w0) r = Relu(a) y = {CONV}(r, w1)", IMAGE, "x r y", [], [QCONV] * 2),
    "so is a Clip at zero": (
        f"a = {CONV}(x, w0) r = Clip(a, zero, six) y = {CONV}(r, w1)", IMAGE, "x r y", [], [QCONV] * 2
    ),
    "but no other Clip": (
        f"a = {CONV}(x, w0) r = Clip(a, less, one) y = {CONV}(r, w1)", IMAGE, "x a r y", [], ["Clip", *[QCONV] * 2]
    ),
    "nor a Relu of what others read": (
        f"a = {CONV}(x, w0) r = Relu(a) b = {CONV}(r, w1) y = Sub(b, a)", IMAGE, "x a r b", [], [*[QCONV] * 2, "Sub"]
    ),
    "a residual between convolutions": (
        f"a = {CONV}(x, w0) b = {CONV}(a, w1) s = Add(a, b) r = Relu(s) y = {CONV}(r, w2)",
        IMAGE, "x a b r y", [], ["QLinearAdd", *[QCONV] * 3],
    ),
    "a residual into a float operator": (
        f"a = {CONV}(x, w0) b = {CONV}(a, w1) s = Add(a, b) y = Tanh(s)",
        IMAGE, "x a b", [], ["Add", *[QCONV] * 2, "Tanh"]
    ),
    "pooling shares": (
        f"a = {CONV}(x, w0) r = Relu(a) p = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (r) y = {CONV}(p, w1)",
        IMAGE, "x r p y", ["r p"], ["NhwcMaxPool", *[QCONV] * 2],
    ),
    "pooling absorbs nothing": (
        f"a = {CONV}(x, w0) p = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (a) r = Relu(p) y = {CONV}(r, w1)",
        IMAGE, "x a r y", [], ["NhwcMaxPool", *[QCONV] * 2],
    ),
    "concatenation shares": (
        f"a = {CONV}(x, w0) b = {CONV}(a, w1) c = Concat <axis = 1> (a, b) y = {CONV}(c, wide)",
        IMAGE, "x a b c y", ["a b c"], ["QLinearConcat", *[QCONV] * 3],
    ),
    "concatenation of Relus shares": (
        f"a = {CONV}(x, w0) r = Relu(a) b = {CONV}(r, w1) s = Relu(b) c = Concat <axis = 1> (r, s) y = {CONV}(c, wide)",
        IMAGE, "x r s c y", ["r s c"], ["QLinearConcat", *[QCONV] * 3],
    ),
    "concatenation of a Relu and something else does not": (
        f"a = {CONV}(x, w0) r = Relu(a) b = {CONV}(r, w1) c = Concat <axis = 1> (r, b) y = {CONV}(c, wide)",
        IMAGE, "x r b c y", [], ["QLinearConcat", *[QCONV] * 3],
    ),
    "a transposition shares": (
        f"a = {CONV}(x, w0) t = Transpose <perm = [0, 1, 3, 2]> (a) y = {CONV}(t, w1)",
        IMAGE, "x a t y", ["a t"], [QCONV] * 2,
    ),
    "so do shapes": (
        f"a = {CONV}(x, w0) f = Reshape(a, flat) t = Unsqueeze(f, axis2) u = Squeeze(t, axis2) i = Reshape(u, image) "
        f"y = {CONV}(i, w1)", IMAGE, "x a f t u i y", ["a f t u i"], [QCONV, QCONV, "Squeeze", "Unsqueeze"],
    ),
    "nearest neighbours share": (
        f'a = {CONV}(x, w0) r = Resize <mode = "nearest"> (a, , double) p = MaxPool <kernel_shape = [2, 2], '
        f"strides = [2, 2]> (r) y = {CONV}(p, w1)",
        IMAGE, "x a r p y", ["a r p"], ["NhwcMaxPool", QCONV, QCONV, "Resize"],
    ),
    "interpolation is float": (
        f'a = {CONV}(x, w0) r = Resize <mode = "linear"> (a, , double) y = {CONV}(r, w1)',
        (IMAGE[0], "float[B,8,12,12] y"), "x a r y", [], [QCONV, QCONV, "Resize"],
    ),
    "a product with its own Sigmoid": (
        f"a = {CONV}(x, w0) s = Sigmoid(a) m = Mul(a, s) y = {CONV}(m, w1)",
        IMAGE, "x a s m y", [], [QCONV, QCONV, "QLinearMul", "QLinearSigmoid"],
    ),
    "averages and leaks": (
        f"a = {CONV}(x, w0) p = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (a) "
        f"l = LeakyRelu <alpha = 0.1> (p) y = {CONV}(l, w1)",
        IMAGE, "x a p l y", [], ["QLinearAveragePool", *[QCONV] * 2, "QLinearLeakyRelu"],
    ),
    "a constant": (
        f"a = {CONV}(x, w0) m = Mul(gains, a) y = {CONV}(m, w1)", IMAGE, "x a m y", [], [QCONV, QCONV, "QLinearMul"]
    ),
    "a product and its one reader": (
        "a = MatMul(x, m0) y = MatMul(a, m1)", TOKENS, "x a", [], [FLOAT_MATMUL, "QLinearMatMul"]
    ),
    "several readers": (
        "a = MatMul(x, m0) b = MatMul(x, m1) y = Mul(a, b)", TOKENS, "x", [], [*[FLOAT_MATMUL] * 2, "Mul"]
    ),
    "readers of codes and of floats": (
        "a = MatMul(x, m0) b = MatMul(a, m1) y = Mul(a, b)", TOKENS, "x a", [], [FLOAT_MATMUL, "Mul", "QLinearMatMul"]
    ),
    "a bias in between": (
        "h = MatMul(x, m0) a = Add(h, b0) b = MatMul(a, m1) y = Mul(a, b)",
        ROWS, "x a", [], [*[FLOAT_MATMUL] * 2, "Mul", "Sub"],
    ),
    "attention": (ATTENTION, TOKENS, "x q v t p o", [], [*[FLOAT_MATMUL] * 2, *["QLinearMatMul"] * 4, "Softmax"]),
    "what stays float": (
        "n = LayerNormalization(x, ones) a = MatMul(n, m0) g = Gelu(a) s = Softmax(g) y = MatMul(s, m1)",
        TOKENS, "n s", [], ["Gelu", "LayerNormalization", *[FLOAT_MATMUL] * 2, "Softmax"],
    ),
    "a classifier behind convolutions": (
        f"a = {CONV}(x, w0) r = Relu(a) g = GlobalAveragePool(r) f = Flatten(g) y = Gemm <transB = 1> (f, m0, b0)",
        (IMAGE[0], "float[B,8] y"), "x r g f", ["g f"], ["Flatten", "QGemm", QCONV, "QLinearGlobalAveragePool"],
    ),
    "Gemm with Relu": ("h = Gemm(x, m0, b0) r = Relu(h) y = Gemm(r, m1, b1)", ROWS, "x r", [], ["QGemm"] * 2),
    "MatMul with Add": ("h = MatMul(x, m0) a = Add(h, b0) y = MatMul(a, m1)", ROWS, "x a", [], [FLOAT_MATMUL, "QGemm"]),
}  # fmt: skip


def placed(model, scheme="w8a8", target="cpu", products=()):
    activations = Scheme.parse(scheme).resolve(target).activations
    rules = IntegerRules.of(target, fp8=activations.fp8)
    apply("assign_scheme", model, context(scheme=scheme, target=target))
    found = {site: explicit_activations(site) for site in find_sites(model)[0]}
    sites = {site: scheme for site, scheme in found.items() if scheme is not None}
    names = [node for node in model.graph if node.outputs[0].name in products]
    return place(model.graph, sites, names, activations, rules)


def names_of(values):
    return " ".join(value.name for value in values)


@pytest.mark.parametrize("name", TABLE)
def test_what_is_quantized_and_what_runs(name):
    body, kind, quantized, shared, operators = TABLE[name]
    model, feeds = graph(body, kind), batches(kind if kind in (IMAGE, ROWS, TOKENS) else IMAGE)
    placement = placed(model, products=("s", "o") if name == "attention" else ())
    assert names_of(placement.specs) == quantized
    assert [names_of(members) for members in placement.shared] == shared
    reference = run(model, feeds[0])
    integers(model, feeds)
    # Rounding a normal value to 8 bits leaves about 40 dB; Softmax multiplies what its input lost, and up to seven
    # roundings one behind the other lose 9 dB.
    assert check(model, reference, feeds[0], 24 if name == "attention" else 31) == operators


@pytest.mark.parametrize("form", ["asym", "sym"])
def test_values_that_share_a_scale_have_one_format(form):
    pool = "MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]>"
    model, feeds = graph(f"a = {CONV}(x, w0) r = Relu(a) p = {pool}(r) y = {CONV}(p, w1)"), batches()
    specs = placed(model, f"w8a8-{form}").specs
    by_name = {value.name: spec for value, spec in specs.items()}
    assert by_name["r"] == by_name["p"] == ActivationSpec()  # begins at zero, so that the Relu is absorbed
    assert by_name["y"] == ActivationSpec(symmetric=form == "sym")
    reference = run(model, feeds[0])
    integers(model, feeds, f"w8a8-{form}")
    assert check(model, reference, feeds[0], 31) == ["NhwcMaxPool", QCONV, QCONV]


def test_readers_of_codes_and_of_floats():
    body = f"a = {CONV}(x, w0) b = {CONV}(a, w1) n = Neg(a) y = Sub(b, n)"
    placement = placed(graph(body))
    readers = {value.name: [(n.outputs[0].name, i) for n, i in found] for value, found in placement.readers.items()}
    assert readers == {"x": [("a", 0)], "a": [("b", 0)], "b": []}
    assert {value.name for value in placement.forced} == {"a", "b"}  # Neg and Sub read what was decoded


def test_constants_with_their_readers():
    placement = placed(graph(f"a = {CONV}(x, w0) m = Mul(gains, a) n = Mul(m, gains) y = {CONV}(n, w1)"))
    assert [(v.name, [(n.outputs[0].name, i) for n, i in r]) for v, r in placement.constants.items()] == [
        ("gains", [("m", 0), ("n", 1)])
    ]


def test_the_right_operand_of_a_product_is_signed_like_a_weight():
    specs = {value.name: spec for value, spec in placed(graph(ATTENTION, TOKENS), products=("s", "o")).specs.items()}
    signed = ActivationSpec(8, signed=True, symmetric=True)
    assert {name for name, spec in specs.items() if spec == signed} == {"t", "v"}
    wide = placed(graph(ATTENTION, TOKENS), "w8a16int", "portable", ("s", "o")).specs
    assert {str(spec) for spec in wide.values()} == {"uint16"}


def test_squeeze_and_excitation():
    model, feeds = graph(SQUEEZE), batches()
    assert set("xagmy") <= {value.name for value in placed(model).specs}
    reference = run(model, feeds[0])
    integers(model, feeds)
    operators = check(model, reference, feeds[0], 31)
    assert operators.count(QCONV) >= 2  # the convolution between, of one position, may be float
    assert {"QLinearGlobalAveragePool", "QLinearMul"} <= set(operators)


def test_tensorrt_gets_the_inputs_of_products_and_no_more():
    placement = placed(graph(SQUEEZE), target="tensorrt")
    assert names_of(placement.specs) == "x g m"  # what convolutions read
    assert {str(spec) for spec in placement.specs.values()} == {"int8-sym"}
    assert not placement.forced
    assert not placed(graph("a = MatMul(x, m0) b = MatMul(a, m1) y = Mul(a, b)", TOKENS), target="tensorrt").forced
    assert not placement.shared
    assert not placement.constants


def test_a_follower_needs_codes_on_both_sides():
    for body, expected in (
        (f"t = Transpose <perm = [0, 1, 3, 2]> (x) y = {CONV}(t, w0)", "t y"),  # gets none
        (f"a = {CONV}(x, w0) t = Transpose <perm = [0, 1, 3, 2]> (a) y = Neg(t)", "x a"),  # gives none
        (f"n = Neg(x) s = Sigmoid(n) m = Mul(s, s) y = {CONV}(m, w0)", "m y"),
    ):
        assert names_of(placed(graph(body)).specs) == expected


def test_a_result_that_is_also_an_output_is_quantized_before_its_relu():
    body = f"a = {CONV}(x, w0) r = Relu(a) y = {CONV}(r, w1)"
    placement = placed(graph(body, outputs="float[B,8,6,6] y, float[B,8,6,6] a"))
    assert names_of(placement.specs) == "x a r y"
    assert {value.name for value in placement.forced} == {"a", "y"}


def test_what_a_body_reads_is_no_reason_to_quantize_and_no_absorbed_relu():
    model = parse(
        f"""g (bool c, float[1,8,6,6] x) => (float[1,8,6,6] y) {{
            a = {CONV}(x, w0)
            y = If (c) <then_branch = yes () => (float[1,8,6,6] s) {{ s = Relu(a) }},
                else_branch = no () => (float[1,8,6,6] t) {{ t = Neg(a) }}>
        }}""",
        {"w0": WEIGHTS["w0"]},
    )
    placement = placed(model)
    assert names_of(placement.specs) == "x a"
    assert names_of(placement.forced) == "a"


def test_operators_of_other_domains_and_with_several_outputs_do_not_follow():
    rules = IntegerRules()
    model = graph(f"a = {CONV}(x, w0) p, i = MaxPool <kernel_shape = [1, 1]> (a) y = {CONV}(p, w1)")
    pool = model.graph[1]
    assert rules.follows(pool) is None
    assert names_of(placed(model).specs) == "x a p y"
    relu = graph("y = Sigmoid(x)").graph[0]
    assert rules.follows(relu) == (0,)
    relu.domain = "mine"
    assert rules.follows(relu) is None
    assert IntegerRules(followers=False).follows(graph("y = Sigmoid(x)").graph[0]) is None


def test_nothing_to_place():
    placement = place(
        graph("y = Sigmoid(x)").graph, {}, [], Scheme.parse("w8a8").resolve("cpu").activations, IntegerRules()
    )
    assert not placement.specs
    assert not placement.constants
    assert np.size(placement.shared) == 0
