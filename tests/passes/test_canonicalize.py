"""Functions, constants and nodes that do nothing; the graph before and after as text."""

import numpy as np
import onnx
import onnx.parser
import pytest

from qcompiler.sites import find_sites
from tests.builders import apply, linear_model, normal, parse, run, text_of

W = normal((8, 8), 0)
X = {"x": normal((2, 8), 1)}


def constant(name, shape="8,8"):
    values = ", ".join(map(str, np.asarray(normal(tuple(map(int, shape.split(","))), 2)).reshape(-1)))
    return f"{name} = Constant <value = float[{shape}] {{{values}}}> ()"


CASES = {
    "a constant becomes an initializer": (
        f"{constant('w')} [fc] y = MatMul(x, w)", {}, ["y = MatMul(x, w)"],
    ),
    "a constant that is an output stays": (f"{constant('y', '2,8')}", {}, ["y = Constant()"]),
    "an identity is bypassed": ("i = Identity(w) [fc] y = MatMul(x, i)", {"w": W}, ["y = MatMul(x, w)"]),
    "a cast to the same type is bypassed": (
        "c = Cast <to = 1> (w) [fc] y = MatMul(x, c)", {"w": W}, ["y = MatMul(x, w)"],
    ),
    "identities in a row are bypassed": (
        f"{constant('w')} i = Identity(w) j = Identity(i) [fc] y = MatMul(x, j)", {}, ["y = MatMul(x, w)"],
    ),
    "a real cast stays": (
        "c = Cast <to = 1> (w) [fc] y = MatMul(x, c)", {"w": W.astype(np.float16)}, ["c = Cast(w)", "y = MatMul(x, c)"],
    ),
    "an identity of an activation stays": ("i = Identity(x) y = Relu(i)", {}, ["i = Identity(x)", "y = Relu(i)"]),
    "an identity that is an output stays": ("y = Identity(w)", {"w": W[:2]}, ["y = Identity(w)"]),
    "the rest stays": (
        "t = Transpose(w) h = MatMul(x, t) y = Gemm <transB = 1> (h, w)", {"w": W},
        ["t = Transpose(w)", "h = MatMul(x, t)", "y = Gemm(h, w)"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_graph_before_and_after(case):
    text, weights, after = CASES[case]
    model = parse(f"g (float[2,8] x) => (float[2,8] y) {{ {text} }}", weights)
    before = text_of(model)
    (want,) = run(model, X)
    result = apply("canonicalize", model)
    assert text_of(model) == after
    assert result.modified == (before != after)
    assert result.records == ()
    assert np.array_equal(run(model, X)[0], want)
    assert model.graph.outputs[0].name == "y"
    again = apply("canonicalize", model)
    assert not again.modified
    assert text_of(model) == after


def test_bodies_are_treated_alike():
    text = f"""g (bool p, float[2,8] x) => (float[2,8] y) {{
        {constant("v")}
        y = If (p) <then_branch = yes () => (float[2,8] s) {{ {constant("u")} i = Identity(u) [a] s = MatMul(x, i) }},
            else_branch = no () => (float[2,8] t) {{ j = Identity(v) [b] t = MatMul(x, j) }}>
    }}"""
    model = parse(text)
    wants = [run(model, {**X, "p": np.array(flag)})[0] for flag in (True, False)]
    assert apply("canonicalize", model).modified
    assert {graph.name: text_of(graph) for graph in model.graphs()} == {
        "g": ["y = If(p)"],
        "yes": ["s = MatMul(x, u)"],
        "no": ["t = MatMul(x, v)"],
    }
    assert [site.name for site in find_sites(model)[0]] == ["a", "b"]
    for flag, want in zip((True, False), wants, strict=True):
        assert np.array_equal(run(model, {**X, "p": np.array(flag)})[0], want)


def test_what_a_body_returns_is_not_bypassed():
    text = """g (bool p, float[2,8] x) => (float[2,8] y) {
        z = If (p) <then_branch = yes () => (float[2,8] s) { s = Identity(w) },
            else_branch = no () => (float[2,8] t) { t = Relu(x) }>
        y = Add(x, z)
    }"""
    model = parse(text, {"w": W[:2]})
    assert not apply("canonicalize", model).modified
    assert np.array_equal(run(model, {**X, "p": np.array(True)})[0], X["x"] + W[:2])


FUNCTION = """<domain: "my", opset_import: ["" : 21]> layer (a, w) => (c) { h = MatMul(a, w) c = Relu(h) }"""


def test_functions_are_inlined():
    function = onnx.parser.parse_function(FUNCTION)
    text = "g (float[2,8] x) => (float[2,8] y) { h = my.layer(x, w) y = my.layer(h, v) }"
    model = parse(text, {"w": W, "v": normal((8, 8), 3)}, functions=[function])
    assert find_sites(model)[0] == []
    result = apply("canonicalize", model)
    assert result.modified
    (record,) = result.records
    assert (record.site, record.action, record.reason) == ("model", "rewritten", "1 local functions inlined")
    assert [node.op_type for node in model.graph] == ["MatMul", "Relu", "MatMul", "Relu"]
    assert not model.functions
    assert len(find_sites(model)[0]) == 2
    want = np.maximum(np.maximum(X["x"] @ W, 0) @ normal((8, 8), 3), 0)
    assert np.allclose(run(model, X)[0], want, rtol=1e-5, atol=1e-5)
    assert model.graph.outputs[0].name == "y"


def test_a_function_that_nobody_calls_is_dropped():
    model = parse(
        "g (float[2,8] x) => (float[2,8] y) { y = Relu(x) }", functions=[onnx.parser.parse_function(FUNCTION)]
    )
    assert apply("canonicalize", model).modified
    assert not model.functions


def test_a_model_in_form_is_not_modified():
    model = linear_model(8, 8, bias=True)
    before = text_of(model)
    assert not apply("canonicalize", model).modified
    assert text_of(model) == before
