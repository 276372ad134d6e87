"""Projections cut into heads and joined again: the model computes the same, whatever became of the heads."""

import re

import numpy as np
import pytest

from qcompiler.graph import SCHEME_KEY, SITE_KEY, read_weight
from qcompiler.mixing_heads import cut_heads, join_heads
from qcompiler.passes import load
from qcompiler.scheme import Scheme
from qcompiler.sites import find_sites
from tests.builders import apply, context, normal, parse, run, serialized, text_of

# Channels of the stream; query heads, key and value heads, their channels; tokens.
d, H, G, D, T = 64, 4, 2, 32, 6
SCHEME = str(Scheme.parse("w4a16-g32-asym").resolve("cpu"))
FEEDS = {"x": normal((2, T, d), 90)}
HEADS = f"[att] a = Attention <q_num_heads = {H}, kv_num_heads = {G}> (q, k, v) [o] y = MatMul(a, wo)"
PLAIN = "[q] q = MatMul(x, wq) [k] k = MatMul(x, wk) [v] v = MatMul(x, wv)"
BEHIND_TRANSPOSE = "t = Transpose(wqt) [q] q = MatMul(x, t) [k] k = MatMul(x, wk) [v] v = MatMul(x, wv)"
GEMM = """z = Reshape(x, rows) [q] q2 = Gemm <transB = 1> (z, wqt, bq) [k] k2 = Gemm(z, wk, bk) [v] v2 = Gemm(z, wv)
    q = Reshape(q2, qs) k = Reshape(k2, ks) v = Reshape(v2, ks)"""
LAYERS = {"MatMul": PLAIN, "MatMul of a Transpose": BEHIND_TRANSPOSE, "Gemm": GEMM}


def model_of(layers=PLAIN, loud=None, more=""):
    """An attention on tokens [B, T, d]; the rows of heads of values can be made loud."""
    sizes = {"wq": H * D, "wk": G * D, "wv": G * D}
    weights = {name: normal((d, size), seed, scale=d**-0.5) for seed, (name, size) in enumerate(sizes.items())}
    for head, factor in (loud or {}).items():
        weights["wv"][:, head * D : (head + 1) * D] *= factor
    weights.update(wo=normal((H * D, d), 5, scale=(H * D) ** -0.5), wqt=np.ascontiguousarray(weights["wq"].T))
    weights.update(bq=normal(H * D, 6), bk=normal((1, 1), 7), rows=np.array([-1, d]))
    weights.update(qs=np.array([-1, T, H * D]), ks=np.array([-1, T, G * D]))
    body = f"{layers} {HEADS} {more}"
    used = {name: array for name, array in weights.items() if name in re.findall(r"\w+", body)}
    model = parse(f"g (float[B,{T},{d}] x) => (float[B,{T},{d}] y) {{ {body} }}", used, opset=23)
    for site in find_sites(model)[0]:
        site.node.metadata_props.update({SCHEME_KEY: SCHEME, SITE_KEY: site.name})
    return model


def cut(model):
    return cut_heads(model, find_sites(model)[0])


def names(model):
    return [site.name for site in find_sites(model)[0]]


QUERY, KEY, VALUE = ([f"{name}.head_{i}" for i in range(count)] for name, count in (("q", H), ("k", G), ("v", G)))


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_heads_are_layers_that_compute_the_same(layers):
    model = model_of(layers)
    (expected,), weights = run(model, FEEDS), {site.name: read_weight(site) for site in find_sites(model)[0]}
    found, problems = cut(model)
    assert not problems
    assert [(layer.site.name, layer.size, len(layer.heads)) for layer in found] == [
        ("q", D, H),
        ("k", D, G),
        ("v", D, G),
    ]
    assert sorted(names(model)) == sorted([*QUERY, *KEY, *VALUE, "o"])
    for site in find_sites(model)[0]:
        layer, _, head = site.name.partition(".head_")
        rows = slice(D * int(head), D * (int(head) + 1)) if head else slice(None)
        assert np.array_equal(read_weight(site), weights[layer][rows])
        assert site.node.metadata_props[SCHEME_KEY] == SCHEME
    np.testing.assert_allclose(run(model, FEEDS)[0], expected, rtol=1e-5, atol=1e-6)
    # Nothing is left of the layers that were cut.
    assert not {"wq", "wk", "wv", "wqt"} & set(model.graph.initializers)


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_a_projection_of_one_format_is_what_it_was(layers):
    model = model_of(layers)
    before, (expected,), constants = names(model), run(model, FEEDS), set(model.graph.initializers)
    operators = sorted(node.op_type for node in model.graph)
    found, _ = cut(model)
    parts = join_heads(found)
    assert parts == {"q": [("q", QUERY)], "k": [("k", KEY)], "v": [("v", VALUE)]}
    assert sorted(node.op_type for node in model.graph) == operators
    assert set(model.graph.initializers) == constants
    assert sorted(names(model)) == sorted(before)
    assert all(site.node.metadata_props[SCHEME_KEY] == SCHEME for site in find_sites(model)[0])
    assert np.array_equal(run(model, FEEDS)[0], expected)


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_neighbours_of_one_format_are_joined(layers):
    model = model_of(layers)
    (expected,) = run(model, FEEDS)
    found, _ = cut(model)
    for site in find_sites(model)[0]:
        if site.name in ("q.head_0", "v.head_1"):
            site.node.metadata_props[SCHEME_KEY] = "w8a16-g32-asym"
        if site.name == "k.head_1":
            del site.node.metadata_props[SCHEME_KEY]
    parts = join_heads(found)
    assert parts == {
        "q": [("q.head_0", QUERY[:1]), ("q.heads_1_3", QUERY[1:])],
        "k": [("k.head_0", KEY[:1]), ("k.head_1", KEY[1:])],
        "v": [("v.head_0", VALUE[:1]), ("v.head_1", VALUE[1:])],
    }
    schemes = {site.name: site.node.metadata_props.get(SCHEME_KEY) for site in find_sites(model)[0]}
    assert schemes == {
        "q.head_0": "w8a16-g32-asym", "q.heads_1_3": SCHEME, "k.head_0": SCHEME, "k.head_1": None,
        "v.head_0": SCHEME, "v.head_1": "w8a16-g32-asym", "o": SCHEME,
    }  # fmt: skip
    np.testing.assert_allclose(run(model, FEEDS)[0], expected, rtol=1e-5, atol=1e-6)
    sizes = [value.const_value.shape.numpy() for value in model.graph.initializers.values()]
    assert sum(size[0] * size[1] for size in sizes if len(size) == 2 and max(size) > 1) == (2 * H + 2 * G) * D * d


def test_a_weight_that_others_read_too_stays():
    model = model_of(more="extra = Transpose(wq) [other] z = MatMul(a, extra)")
    before = model.graph.initializers["wq"].const_value
    found, _ = cut(model)
    assert model.graph.initializers["wq"].const_value is before
    join_heads(found)
    assert len(model.graph.initializers["wq"].uses()) == 2


def test_what_is_not_cut():
    model = model_of(GEMM.replace("bq)", "bx)").replace("[q]", "bx = Identity(b) [q]").replace("(b)", "(bq)"))
    found, problems = cut(model)
    assert problems == {"q": "its bias is computed"}
    assert [layer.site.name for layer in found] == ["k", "v"]
    model = model_of()
    (value,) = (site for site in find_sites(model)[0] if site.name == "v")
    found, problems = cut_heads(model, [value])
    assert [layer.site.name for layer in found] == ["v"]
    assert not problems
    assert not cut(parse(f"g (float[B,{d}] x) => (float[B,{d}] y) {{ y = Relu(x) }}"))[0]


def assigned(model, **config):
    batches = [{"x": normal((2, T, d), 100 + i)} for i in range(4)]
    ctx = context(batches=batches, scheme="w4a16-g32-asym", **config)
    return apply("mixed_precision", model, ctx, units="head"), ctx


def test_loud_heads_get_more_bits_in_a_model_that_runs():
    model = model_of(loud={0: 0.05, 1: 20.0})
    (expected,) = run(model, FEEDS)
    result, ctx = assigned(model, bits_per_weight=4.2)
    schemes = {
        site.name: Scheme.parse(site.node.metadata_props[SCHEME_KEY])
        for site in find_sites(model)[0]
        if SCHEME_KEY in site.node.metadata_props
    }
    assert schemes["v.head_1"].bits > schemes["v.head_0"].bits
    records = {record.site: record for record in result.records if record.action == "assigned"}
    assert set(records) == set(schemes)
    assert {name: record.spec for name, record in records.items()} == {name: str(s) for name, s in schemes.items()}
    weights = {site.name: site.rows * site.columns for site in find_sites(model)[0]}
    bits = sum(record.metrics["bits_per_weight"] * weights[name] for name, record in records.items())
    assert 0.9 * 4.2 <= bits / sum(weights.values()) <= 4.2
    for name in ("gptq", "fuse_matmul_nbits", "cleanup"):
        apply(name, model, ctx)
    assert sum(line.count("MatMulNBits") for line in text_of(model)) == len(schemes)
    (found,) = run(model, FEEDS)
    assert np.square(found - expected).mean() < 0.3 * np.square(expected).mean()  # most heads have 2 bits


def test_heads_that_cannot_be_told_apart_are_skipped_with_the_reason():
    model = model_of(more="extra = Add(v, v)")
    result, _ = assigned(model, bits_per_weight=5.0)
    (record,) = (record for record in result.records if "not cut into heads" in record.reason)
    assert record.action == "skipped"


def test_a_budget_that_nothing_fits_leaves_the_model_whole():
    model = model_of()
    operators, (expected,) = sorted(node.op_type for node in model.graph), run(model, FEEDS)
    with pytest.raises(Exception, match="the smallest formats"):
        assigned(model, bits_per_weight=1.0)
    assert sorted(node.op_type for node in model.graph) == operators
    assert np.array_equal(run(model, FEEDS)[0], expected)


def test_the_same_twice_and_by_name_of_the_option():
    first, second = model_of(), model_of()
    assigned(first, bits_per_weight=4.5)
    assigned(second, bits_per_weight=4.5, threads=2)
    assert serialized(first) == serialized(second)
    assert load("mixed_precision")(context(bits_per_weight=4.0), {"units": "head"}).options.units == "head"
