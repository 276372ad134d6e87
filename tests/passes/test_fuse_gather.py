"""Quantized lookup tables as GatherBlockQuantized."""

import numpy as np
import pytest

from qcompiler.graph import PASS_KEY
from qcompiler.passes import load
from qcompiler.scheme import Scheme
from qcompiler.scheme_plan import SchemePlan
from tests.builders import apply, context, normal, only, parse, quantized, run, text_of, the_site

INDICES = {"i": np.array([[0, 3, 511], [-1, 17, 3]])}


def plan(text):
    scheme = Scheme.parse(text)
    return SchemePlan(scheme, scheme, scheme)


def lookup(K=64, dtype="float", text="[embed] y = Gather(t, i)", table=None):
    table = normal((512, K), 1, "float16" if dtype == "float16" else "float32") if table is None else table
    return parse(f"g (int64[B,S] i) => ({dtype}[B,S,{K}] y) {{ {text} }}", {"t": table})


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", ["g16", "g32", "g64"])
@pytest.mark.parametrize("form", ["sym", "asym"])
def test_looked_up_rows_are_those_of_the_dequantized_table(bits, group, form):
    model = lookup(64)
    ctx = context(plan=plan(f"w{bits}a16-{group}-{form}"))
    quantized(model, ctx)
    (half,) = run(model, INDICES)
    result = apply("fuse_gather", model, ctx)
    assert result.modified
    (record,) = result.records
    assert (record.site, record.action, record.spec) == ("embed", "fused", f"w{bits}a16-{group}-{form}")
    assert record.reason == f"GatherBlockQuantized, block {group[1:]}" + (", holding 3-bit codes" if bits == 3 else "")
    zeros = ", t_zero_points" if form == "asym" else ""
    assert text_of(model) == [f"y = GatherBlockQuantized(t_table, i, t_scales{zeros})"]
    (node,) = model.graph
    assert node.domain == "com.microsoft"
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    width = 4 if bits == 3 else bits
    assert attributes == {"bits": width, "block_size": int(group[1:]), "gather_axis": 0, "quantize_axis": 1}
    assert node.metadata_props[PASS_KEY] == "fuse_gather"
    apply("cleanup", model, ctx)
    assert "t" not in model.graph.initializers
    for optimize in (False, True):
        (got,) = run(model, INDICES, optimize=optimize)
        assert np.allclose(got, half, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("K", [33, 40, 95])
@pytest.mark.parametrize("scheme", ["g32-asym", "g16-sym", "channel-asym"])
def test_rows_that_do_not_fill_their_blocks_are_cut(bits, K, scheme):
    model = lookup(K)
    ctx = context(plan=plan(f"w{bits}a16-{scheme}"))
    quantized(model, ctx)
    (half,) = run(model, INDICES)
    apply("fuse_gather", model, ctx)
    apply("cleanup", model, ctx)
    assert [node.op_type for node in model.graph] == ["GatherBlockQuantized", "Slice"]
    assert all(node.metadata_props[PASS_KEY] == "fuse_gather" for node in model.graph)
    (got,) = run(model, INDICES)
    assert got.shape == (2, 3, K)
    assert np.allclose(got, half, rtol=1e-6, atol=1e-6)
    assert model.graph.outputs[0].name == "y"


def test_a_table_stored_by_columns_is_looked_up_by_rows():
    model = lookup(
        64, text="u = Transpose(t) [embed] y = Gather(u, i)", table=np.ascontiguousarray(normal((512, 64), 1).T)
    )
    ctx = context(plan=plan("w4a16-g32-asym"))
    quantized(model, ctx)
    (half,) = run(model, INDICES)
    apply("fuse_gather", model, ctx)
    apply("cleanup", model, ctx)
    assert [node.op_type for node in model.graph] == ["GatherBlockQuantized"]
    assert np.allclose(run(model, INDICES)[0], half, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", ["", "1", "B", "B,S,T"])
def test_indices_of_any_rank(shape):
    rank = len([part for part in shape.split(",") if part])
    text = f"g (int64[{shape}] i) => (float y) {{ [embed] h = Gather(t, i) y = ReduceSum <keepdims = 0> (h) }}"
    model = parse(text, {"t": normal((512, 64), 1)})
    ctx = context(plan=plan("w4a16-g32-asym"))
    quantized(model, ctx)
    feeds = {"i": np.full((1,) * rank, 3)}
    (half,) = run(model, feeds)
    apply("fuse_gather", model, ctx)
    assert np.allclose(run(model, feeds)[0], half, rtol=1e-5, atol=1e-5)


def test_int32_indices_and_float16_tables():
    text = "g (int32[B,S] i) => (float16[B,S,64] y) { [embed] y = Gather(t, i) }"
    model = parse(text, {"t": normal((512, 64), 1, "float16")})
    ctx = context(plan=plan("w4a16-g32-asym"))
    quantized(model, ctx)
    feeds = {"i": INDICES["i"].astype(np.int32)}
    (half,) = run(model, feeds)
    apply("fuse_gather", model, ctx)
    assert the_scales(model).dtype.name == "FLOAT16"
    (got,) = run(model, feeds)
    assert got.dtype == np.float16
    assert np.allclose(got, half, rtol=2e-3, atol=2e-3)  # one rounding to 11 bits


def the_scales(model):
    return model.graph[0].inputs[2].const_value


@pytest.mark.parametrize("form", ["sym", "asym"])
@pytest.mark.parametrize("K", [64, 40])
def test_a_tied_table_of_three_bits_means_the_same_to_both_readers(K, form):
    text = """g (int64[B,S] i) => (float[B,S,512] y, float[B,S,K] h) {
        [embed] h = Gather(t, i) w = Transpose(t) [head] y = MatMul(h, w) }"""
    model = parse(text, {"t": normal((512, K), 1)})
    ctx = context(plan=plan(f"w3a16-g32-{form}"))
    quantized(model, ctx)
    half = run(model, INDICES)
    for name in ("fuse_gather", "fuse_matmul_nbits", "cleanup"):
        apply(name, model, ctx)
    nodes = {node.op_type: node for node in model.graph}
    assert [nodes[name].attributes["bits"].as_int() for name in ("GatherBlockQuantized", "MatMulNBits")] == [4, 4]
    got = run(model, INDICES)
    assert np.array_equal(got[1], half[1])
    assert np.linalg.norm(got[0] - half[0]) <= 1e-5 * np.linalg.norm(half[0])


@pytest.mark.parametrize("K", [64, 40])
def test_a_tied_table_is_stored_once(K):
    """Codes of both shapes are one piece of memory, then one initializer; so are scales and zero points."""
    text = """g (int64[B,S] i) => (float[B,S,512] y) {
        [embed] h = Gather(t, i) r = Relu(h) w = Transpose(t) [head] y = MatMul(r, w) }"""
    model = parse(text, {"t": normal((512, K), 1)})
    ctx = context(plan=plan("w4a16-g32-asym"))
    quantized(model, ctx)
    (half,) = run(model, INDICES)
    assert only(apply("fuse_matmul_nbits", model, ctx), "fused") == ["head"]
    assert only(apply("fuse_gather", model, ctx), "fused") == ["embed"]
    constants = model.graph.initializers
    codes, table = constants["t_codes"].const_value.numpy(), constants["t_table"].const_value.numpy()
    assert np.shares_memory(codes, table)
    assert codes.tobytes() == table.tobytes()
    apply("cleanup", model, ctx)
    assert np.allclose(run(model, INDICES)[0], half, rtol=1e-5, atol=1e-4)
    assert {"t_codes", "t_scales", "t_zero_points"} <= set(constants)
    assert "t_table" not in constants
    gather = next(node for node in model.graph if node.op_type == "GatherBlockQuantized")
    product = next(node for node in model.graph if node.op_type == "MatMulNBits")
    assert gather.inputs[2] is product.inputs[2]
    assert gather.inputs[3] is product.inputs[3]


def test_a_table_in_a_body():
    text = """g (bool p, int64[B,S] i) => (float[B,S,40] y) {
        y = If (p) <then_branch = yes () => (float[B,S,40] s) { [one] s = Gather(own, i) },
            else_branch = no () => (float[B,S,40] u) { [two] u = Gather(t, i) }>
    }"""
    model = parse(text, {"yes.own": normal((512, 40), 1), "t": normal((512, 40), 2)})
    ctx = context(plan=plan("w4a16-g32-asym"))
    quantized(model, ctx)
    feeds = [{**INDICES, "p": np.array(flag)} for flag in (True, False)]
    halves = [run(model, each)[0] for each in feeds]
    assert only(apply("fuse_gather", model, ctx), "fused") == ["one", "two"]
    apply("cleanup", model, ctx)
    for each, half in zip(feeds, halves, strict=True):
        assert np.allclose(run(model, each)[0], half, rtol=1e-6, atol=1e-6)


def test_float_tables_and_other_sites_are_left_alone():
    model = lookup()
    result = apply("fuse_gather", model)
    assert (result.modified, result.records) == (False, ())
    assert the_site(model).quantized is None
    text = "g (float[B,64] x) => (float[B,24] y) { [fc] y = MatMul(x, w) }"
    model = quantized(parse(text, {"w": normal((64, 24), 1)}))
    assert not apply("fuse_gather", model).modified
    step = load("fuse_gather")
    assert step.applies(context().config)
    assert not step.applies(context(output_format="qdq").config)
