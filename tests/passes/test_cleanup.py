"""What nobody reads any more is removed, and nothing else."""

import numpy as np
import pytest

from qcompiler.errors import PassError
from qcompiler.files.saver import save_model
from qcompiler.graph import PASS_KEY, SCHEME_KEY, SITE_KEY
from qcompiler.scheme import Scheme
from qcompiler.scheme_plan import SchemePlan
from tests.builders import apply, context, linear_model, normal, parse, quantized, run, text_of

W = normal((8, 8), 0)
X = {"x": normal((2, 8), 1)}

CASES = {
    "dead nodes": ("a = Neg(x) b = Relu(a) y = Exp(x)", {}, ["y = Exp(x)"], []),
    "a dead transpose and its weight": ("t = Transpose(w) y = Exp(x)", {"w": W}, ["y = Exp(x)"], []),
    "a weight that nobody reads": ("y = Exp(x)", {"w": W}, ["y = Exp(x)"], []),
    "one of two readers": ("a = MatMul(x, w) y = Gemm(x, w)", {"w": W}, ["y = Gemm(x, w)"], ["w"]),
    "one of two results": ("a, b = Split <axis = 1, num_outputs = 2> (x) y = Concat <axis = 1> (b, b)", {},
                           ["a, b = Split(x)", "y = Concat(b, b)"], []),
    "nothing": ("a = MatMul(x, w) y = Relu(a)", {"w": W}, ["a = MatMul(x, w)", "y = Relu(a)"], ["w"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_graph_before_and_after(case):
    text, weights, after, kept = CASES[case]
    model = parse(f"g (float[2,8] x) => (float[2,8] y) {{ {text} }}", weights)
    before = [*text_of(model), *model.graph.initializers]
    (want,) = run(model, X)
    result = apply("cleanup", model)
    assert text_of(model) == after
    assert list(model.graph.initializers) == kept
    assert result.modified == (before != [*after, *kept])
    assert np.array_equal(run(model, X)[0], want)
    assert not apply("cleanup", model).modified


def test_inputs_and_outputs_of_the_model_stay():
    text = "g (float[2,8] x, float[2,8] unused) => (float[2,8] y, float[8,8] w) { y = Relu(x) }"
    model = parse(text, {"w": W})
    assert not apply("cleanup", model).modified
    assert [value.name for value in model.graph.inputs] == ["x", "unused"]
    assert list(model.graph.initializers) == ["w"]


def test_a_weight_that_was_listed_among_the_inputs_leaves_them():
    """Otherwise what was a default value would become an input that has to be fed."""
    text = "g (float[B,64] x, float[64,24] w) => (float[B,24] y) { [fc] y = MatMul(x, w) }"
    model = parse(text, {"w": normal((64, 24), 0)}, opset=8, ir_version=3)
    ctx = context(scheme="w4a16-g32-asym")
    quantized(model, ctx)
    apply("fuse_matmul_nbits", model, ctx)
    assert apply("cleanup", model, ctx).modified
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert list(model.graph.initializers) == ["w_codes", "w_zero_points", "w_scales"]


def test_bodies_are_cleaned_too():
    text = """g (bool p, float[2,8] x) => (float[2,8] y) {
        y = If (p) <then_branch = yes () => (float[2,8] s) { a = MatMul(x, own) b = MatMul(x, w) s = Relu(x) },
            else_branch = no () => (float[2,8] t) { t = Neg(x) }>
    }"""
    model = parse(text, {"w": W, "yes.own": normal((8, 8), 2)})
    assert apply("cleanup", model).modified
    assert {graph.name: text_of(graph) for graph in model.graphs()} == {
        "g": ["y = If(p)"], "yes": ["s = Relu(x)"], "no": ["t = Neg(x)"],
    }  # fmt: skip
    assert all(not graph.initializers for graph in model.graphs())


def test_a_dead_node_takes_what_only_its_body_read_with_it():
    text = """g (bool p, float[2,8] x) => (float[2,8] y) {
        a = MatMul(x, w)
        z = If (p) <then_branch = yes () => (float[2,8] s) { s = Relu(a) },
            else_branch = no () => (float[2,8] t) { t = Neg(x) }>
        y = Exp(x)
    }"""
    model = parse(text, {"w": W})
    assert apply("cleanup", model).modified
    assert text_of(model) == ["y = Exp(x)"]
    assert list(model.graph.initializers) == []


def test_marks_of_sites_are_removed():
    model = linear_model(64, 24)
    apply("assign_scheme", model)
    (node,) = model.graph
    assert {SCHEME_KEY, SITE_KEY} <= set(node.metadata_props)
    assert apply("cleanup", model).modified
    assert not {SCHEME_KEY, SITE_KEY} & set(node.metadata_props)


def test_a_quantized_weight_that_was_never_lowered_is_noticed():
    model = quantized(linear_model(64, 24))
    with pytest.raises(PassError, match="cleanup: the quantized weight 'w' was never lowered"):
        apply("cleanup", model)


TIED = """g (int64[B,S] i) => (float[B,S,512] y) {
    [embed] h = Gather(t, i) r = Relu(h) w = Transpose(t) [head] y = MatMul(r, w) }"""


def tied(text=TIED):
    """A model whose lookup table and last projection are one weight, lowered."""
    scheme = Scheme.parse("w4a16-g32-asym")
    model, ctx = parse(text, {"t": normal((512, 64), 1)}), context(plan=SchemePlan(scheme, scheme, scheme))
    quantized(model, ctx)
    for name in ("fuse_matmul_nbits", "fuse_gather"):
        apply(name, model, ctx)
    return model


@pytest.mark.parametrize("optimize", [False, True])
def test_codes_that_a_table_shares_with_a_product_are_stored_once(tmp_path, optimize):
    model, feeds = tied(), {"i": np.array([[0, 3, 511], [17, 3, 1]])}
    (want,) = run(model, feeds, optimize=optimize)
    before = sum(path.stat().st_size for path in save_model(model, tmp_path / "twice.onnx", force=False))
    result = apply("cleanup", model)
    assert result.modified
    assert text_of(model) == [
        "t_table = Flatten(t_codes)",
        "h = GatherBlockQuantized(t_table, i, t_scales, t_zero_points)",
        "r = Relu(h)",
        "y = MatMulNBits(r, t_codes, t_scales, t_zero_points)",
    ]
    assert model.graph[0].metadata_props[PASS_KEY] == "cleanup"
    assert np.array_equal(run(model, feeds, optimize=optimize)[0], want)
    after = sum(path.stat().st_size for path in save_model(model, tmp_path / "once.onnx", force=False))
    assert before - after > 0.95 * 512 * 64 / 2 + 4 * 512 * 64  # the codes, and the float weight
    assert not apply("cleanup", model).modified


def test_a_tied_table_inside_of_a_body_is_shared_too():
    text = """g (bool p, int64[B,S] i, float[B,S,64] x) => (float[B,S,64] y, float[B,S,512] z) {
        w = Transpose(t) [head] z = MatMul(x, w)
        y = If (p) <then_branch = yes () => (float[B,S,64] s) { [embed] s = Gather(t, i) },
            else_branch = no () => (float[B,S,64] u) { u = Relu(x) }> }"""
    model = tied(text)
    feeds = {"p": np.array(True), "i": np.array([[0, 3, 511]]), "x": normal((1, 3, 64), 3)}
    want = run(model, feeds)
    assert apply("cleanup", model).modified
    assert "t_table" not in model.graph.initializers
    for got, wanted in zip(run(model, feeds), want, strict=True):
        assert np.array_equal(got, wanted)


def test_an_opset_whose_flatten_has_no_integers_keeps_both():
    model = tied()
    model.opset_imports[""] = 8
    apply("cleanup", model)
    assert {"t_codes", "t_table"} <= set(model.graph.initializers)


def test_a_model_too_large_for_one_file_keeps_both(monkeypatch):
    """A file of external data holds the bytes once, and maps them."""
    model = tied()
    monkeypatch.setattr("qcompiler.passes.cleanup.EXTERNAL_BYTES", 512 * 64 // 2)
    apply("cleanup", model)
    assert {"t_codes", "t_table"} <= set(model.graph.initializers)
