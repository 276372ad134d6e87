"""Rotations change every weight and nothing of what a model computes, for every spelling of what they pass through."""

import numpy as np
import pytest

from qcompiler.errors import SchemeError
from qcompiler.graph import read_weight
from qcompiler.passes import load
from qcompiler.pipeline import pass_names
from qcompiler.sites import find_sites
from tests.builders import (
    apply,
    context,
    decoder,
    normal,
    only,
    parse,
    run,
    serialized,
    site_named,
    text_of,
    token_batches,
    with_outputs,
)

# Channels of the residual stream (24: Paley), inner channels, words; query heads, key and value heads, their channels.
d, INNER, V, H, G, D = 24, 40, 700, 6, 2, 8
IDS = {"ids": np.random.default_rng(0).integers(0, V, (2, 5))}

# A normalization of {x} with the result {n}, as it is spelled.
NORMS = {
    "SimplifiedLayerNormalization": "[norm{i}] {n} = SimplifiedLayerNormalization({x}, gamma{i})",
    "RMSNormalization": "[norm{i}] {n} = RMSNormalization({x}, gamma{i})",
    "LayerNormalization": "[norm{i}] {n} = LayerNormalization({x}, gamma{i}, beta{i})",
    "LayerNormalization without beta": "[norm{i}] {n} = LayerNormalization({x}, gamma{i})",
    "Pow, Div": """s{i} = Pow({x}, two) m{i} = ReduceMean(s{i}, last) e{i} = Add(m{i}, eps) r{i} = Sqrt(e{i})
        hat{i} = Div({x}, r{i}) {n} = Mul(hat{i}, gamma{i})""",
    "Mul, Reciprocal, gamma on the left": """s{i} = Mul({x}, {x}) m{i} = ReduceMean(s{i}, last) e{i} = Add(eps, m{i})
        q{i}r = Sqrt(e{i}) r{i} = Reciprocal(q{i}r) hat{i} = Mul(r{i}, {x}) {n} = Mul(gamma{i}, hat{i})""",
    "Pow -0.5": """s{i} = Pow({x}, two) m{i} = ReduceMean(s{i}, last) e{i} = Add(m{i}, eps) r{i} = Pow(e{i}, half)
        hat{i} = Mul({x}, r{i}) {n} = Mul(hat{i}, gamma{i})""",
    "ReduceL2, beta": """m{i} = ReduceL2({x}, last) r{i} = Max(m{i}, eps)
        hat{i} = Div({x}, r{i}) g{i}n = Mul(hat{i}, gamma{i}) {n} = Sub(g{i}n, beta{i})""",
    "Cast": """c{i} = Cast <to = 1> ({x}) s{i} = Pow(c{i}, two) m{i} = ReduceMean(s{i}, last) e{i} = Add(m{i}, eps)
        r{i} = Sqrt(e{i}) hat{i} = Div(c{i}, r{i}) b{i} = Cast <to = 1> (hat{i}) {n} = Mul(b{i}, gamma{i})""",
    "the mean subtracted": """mu{i} = ReduceMean({x}, last) c{i} = Sub({x}, mu{i}) s{i} = Pow(c{i}, two)
        m{i} = ReduceMean(s{i}, last) e{i} = Add(m{i}, eps) r{i} = Sqrt(e{i}) hat{i} = Div(c{i}, r{i})
        g{i}n = Mul(hat{i}, gamma{i}) {n} = Add(beta{i}, g{i}n)""",
    "SkipSimplifiedLayerNormalization": "[norm{i}] {n} = SimplifiedLayerNormalization({x}, gamma{i})",
    "SkipLayerNormalization": "[norm{i}] {n} = LayerNormalization({x}, gamma{i}, beta{i})",
}
REPEATED = """q1 = Reshape(q, hs) q2 = Transpose <perm = [0, 2, 1, 3]> (q1)
    k1 = Reshape(k, gs) k2 = Transpose <perm = [0, 2, 1, 3]> (k1) k3 = Unsqueeze(k2, axis2) k4 = Expand(k3, wide)
    k5 = Reshape(k4, full) k6 = Transpose <perm = [0, 1, 3, 2]> (k5)
    v1 = Reshape(v, gs) v2 = Transpose <perm = [0, 2, 1, 3]> (v1) v3 = Unsqueeze(v2, axis2) v4 = Expand(v3, wide)
    v5 = Reshape(v4, full) scores = MatMul(q2, k6) scaled = Mul(scores, root) p = Softmax <axis = -1> (scaled)
    a0 = MatMul(p, v5) a1 = Transpose <perm = [0, 2, 1, 3]> (a0) a = Reshape(a1, merge)"""
FUSED = f"a = com.microsoft.GroupQueryAttention <num_heads = {H}, kv_num_heads = {G}> (q, k, v, , , past, total)"
STANDARD = f"a = Attention <q_num_heads = {H}, kv_num_heads = {G}> (q, k, v)"


def joined(kind, i, old, added, new, n):
    """The addition to the stream and the normalization of the sum."""
    if kind.startswith("Skip"):
        inputs = f"{old}, {added}, gamma{i}" + (f", beta{i}" if kind == "SkipLayerNormalization" else "")
        return f"[norm{i}] {n}, , , {new} = com.microsoft.{kind}({inputs})"
    return f"{new} = Add({old}, {added}) {NORMS[kind].format(i=i, x=new, n=n)}"


def constants(seed=0):
    shapes = {"table": (V, d), "head": (d, V), "wq": (d, H * D), "wk": (d, G * D), "wv": (d, G * D), "wo": (H * D, d)}
    shapes.update(wg=(d, INNER), wu=(d, INNER), wd=(INNER, d))
    made = {name: normal(shape, seed + i, scale=shape[0] ** -0.5) for i, (name, shape) in enumerate(shapes.items())}
    made["table"] = normal((V, d), seed)
    for i in range(3):
        made[f"gamma{i}"] = 1 + normal(d, seed + 20 + i, scale=0.3)
        made[f"beta{i}"] = normal(d, seed + 30 + i, scale=0.5)
    made.update(bv=normal(G * D, 40), bo=normal(d, 41), bd=normal(d, 42))
    for name, shape in {"hs": (0, 0, H, D), "gs": (0, 0, G, D), "merge": (0, 0, -1), "full": (0, H, -1, D)}.items():
        made[name] = np.array(shape)
    made.update(wide=np.array([1, 1, H // G, 1, 1]), axis2=np.array([2]), last=np.array([-1]))
    made.update({name: np.float32(x) for name, x in {"two": 2, "eps": 1e-5, "half": -0.5, "root": D**-0.5}.items()})
    made.update(past=np.full(2, 4, np.int32), total=np.array(5, np.int32))
    return made


def model_of(kind="SimplifiedLayerNormalization", *, attention=REPEATED, tied=False, biases=False, more="", **given):
    """One layer of a decoder on ids [2, 5], with or without biases."""
    value, out, down = "v = MatMul(n0, wv)", "o = MatMul(a, wo)", "y = MatMul(t, wd)"
    if biases:
        value, out, down = "vb = MatMul(n0, wv) [bias] v = Add(vb, bv)", "ob = MatMul(a, wo) o = Add(bo, ob)", ""
        down = "yb = MatMul(t, wd) y = Add(yb, bd)"
    head = (
        "th = Transpose <perm = [1, 0]> (table) [lm] logits = MatMul(n2, th)"
        if tied
        else "[lm] logits = MatMul(n2, head)"
    )
    outputs = f"float[B,S,{V}] logits{given.pop('outputs', '')}"
    text = f"""g (int64[B,S] ids) => ({outputs}) {{ [embed] h0 = Gather(table, ids)
        {NORMS[kind].format(i=0, x="h0", n="n0")} [q] q = MatMul(n0, wq) [k] k = MatMul(n0, wk) [v] {value}
        {attention} [o] {out} {joined(kind, 1, "h0", "o", "h1", "n1")} [gate] g = MatMul(n1, wg) [up] u = MatMul(n1, wu)
        z = Sigmoid(g) silu = Mul(g, z) t = Mul(silu, u) [down] {down} {joined(kind, 2, "h1", "y", "h2", "n2")}
        {more} {given.pop("end", head)} }}"""
    weights = {**constants(), **given}
    words = set(text.replace("(", " ").replace(")", " ").replace(",", " ").split())
    return parse(text, {name: x for name, x in weights.items() if name in words}, opset=23)


def relative(got, expected):
    got, expected = got[0].astype(np.float64), expected[0].astype(np.float64)
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def rotated(model, feeds=None, tolerance=1e-5, seed=0, **options):
    """Rotate, prove that the first output stays what it was, and return the records."""
    expected = run(model, feeds or IDS)
    result = apply("rotate", model, context(seed=seed), **options)
    assert result.modified == bool(only(result, "rewritten"))
    assert relative(run(model, feeds or IDS), expected) < tolerance
    return result.records


@pytest.mark.parametrize("kind", NORMS)
def test_a_stream_rotates_through_every_normalization(kind):
    model = model_of(kind, biases=True)
    before = {site.name: read_weight(site) for site in find_sites(model)[0]}
    (record,) = rotated(model, r2=False)
    centred = "LayerNormalization" in kind.removeprefix("Skip")[:18] or kind == "the mean subtracted"
    assert record.action == "rewritten"
    assert ("keeps means" in record.reason) == centred
    assert "1 tables, 2 writers, 3 gains, 6 readers" in record.reason
    for site in find_sites(model)[0]:
        assert np.abs(read_weight(site) - before[site.name]).max() > 0.01
    for i in range(3):
        assert (model.graph.initializers[f"gamma{i}"].const_value.numpy() == 1).all()


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("attention", [REPEATED, FUSED, STANDARD], ids=["repeated", "fused", "standard"])
def test_values_rotate_through_every_attention(attention, biases):
    model = model_of(attention=attention, biases=biases)
    before = {site.name: read_weight(site) for site in find_sites(model)[0]}
    (record,) = rotated(model, r1="never")
    assert (record.site, record.action) == ("o", "rewritten")
    assert "values of 'v' rotated in 2 heads by Hadamard matrices of order 8" in record.reason
    moved = {site.name for site in find_sites(model)[0] if not np.array_equal(read_weight(site), before[site.name])}
    assert moved == {"v", "o"}
    # Channels are mixed in their heads alone: the energy of a head's rows stays.
    energy = np.square(read_weight(site_named(model, "v"))).reshape(G, -1).sum(1)
    assert np.allclose(energy, np.square(before["v"]).reshape(G, -1).sum(1), rtol=1e-5)


def test_values_next_to_queries_and_keys_in_one_weight():
    both = np.concatenate([constants()[name] for name in ("wq", "wk", "wv")], 1)
    text = f"""g (int64[2,5] ids) => (float[2,5,{V}] y) {{ [embed] h = Gather(table, ids)
        [qkv] m = MatMul(h, both) a = com.microsoft.GroupQueryAttention <num_heads = {H}, kv_num_heads = {G}>
        (m, , , , , past, total) [o] o = MatMul(a, wo) y = MatMul(o, head) }}"""
    used = constants()
    model = parse(text, {name: used[name] for name in ("table", "head", "wo", "past", "total")} | {"both": both})
    (record,) = rotated(model)
    assert (record.site, record.action) == ("o", "rewritten")
    moved = (read_weight(site_named(model, "qkv")) != both.T).any(1)
    assert moved.tolist() == [False] * (H + G) * D + [True] * G * D


def test_everything_at_once():
    model = model_of("SkipSimplifiedLayerNormalization", attention=FUSED, biases=True)
    assert [record.action for record in rotated(model)] == ["rewritten"] * 2


def test_a_decoder_with_layer_normalization():
    (stream, *values) = rotated(decoder(), token_batches(1, padded=False)[0])
    assert "keeps means" in stream.reason
    assert len(values) == 2


@pytest.mark.parametrize("kind", ["Pow, Div", "LayerNormalization"])
def test_a_tied_table_is_rotated_at_run_time(kind):
    model = model_of(kind, tied=True)
    table = model.graph.initializers["table"].const_value.numpy().copy()
    record, _ = rotated(model)
    assert "at run time for the tied embed, lm" in record.reason
    assert np.array_equal(model.graph.initializers["table"].const_value.numpy(), table)
    assert len(model.graph.initializers["table"].uses()) == 2
    made = [line for line in text_of(model) if "rotation" in line]
    assert len(made) == 2
    assert "MatMul" in made[0]
    assert "Transpose" in made[1]
    added = {"logits", *(output.name for node in model.graph for output in node.outputs)}
    assert len(added) == len(model_of(kind, tied=True).graph) + 4  # two products, a Transpose and the last gain


def test_a_tied_table_can_be_copied():
    model = model_of(tied=True)
    *_, record = rotated(model, r1="untie")
    assert record.reason == "with a weight of their own: embed"
    assert site_named(model, "embed").weight is not site_named(model, "lm").weight
    assert not any("rotation" in line for line in text_of(model))


def test_a_weight_that_layers_share_is_untied_where_it_has_to_be():
    """Gate and up read the same activation; the second gate and up have another gain in front of them."""
    weights = constants()
    more = "[g2] f = MatMul(n2, wg)"
    model = model_of(more=more, end="[lm] l0 = MatMul(n2, head) f2 = ReduceSum(f, last) logits = Add(l0, f2)")
    *_, record = rotated(model, r2=False)
    assert record.reason == "with a weight of their own: gate"
    assert not np.allclose(read_weight(site_named(model, "gate")), read_weight(site_named(model, "g2")))
    same = model_of(wu=weights["wg"])
    rotated(same)
    assert np.array_equal(read_weight(site_named(same, "gate")), read_weight(site_named(same, "up")))


def test_what_has_no_hadamard_matrix():
    """18 channels: a random orthogonal matrix."""
    text = """g (int64[B,S] ids) => (float[B,S,9] y) { [embed] h = Gather(table, ids) k = MatMul(h, w) m = Add(h, k)
        n = RMSNormalization(m, gamma) y = MatMul(n, v) }"""
    weights = {"table": normal((60, 18), 1), "w": normal((18, 18), 2), "v": normal((18, 9), 3)}
    model = parse(text, {**weights, "gamma": 1 + normal(18, 4, scale=0.3)}, opset=23)
    (record,) = rotated(model, {"ids": np.arange(12).reshape(3, 4)})
    assert "rotated by an orthogonal matrix; 1 tables, 1 writers, 1 gains, 2 readers" in record.reason


def test_shape_operators_and_a_position_table_in_the_stream():
    text = """g (int64[2,5] ids, int64[2,5] at) => (float[2,9] y) { [embed] e = Gather(table, ids)
        s = Mul(e, two) p = Gather(places, at) x = Add(s, p) x1 = Add(x, shift) h = Reshape(x1, rows) k = Gemm(h, w, b)
        m = Add(h, k) back = Reshape(m, cube) t = Transpose <perm = [1, 0, 2]> (back)
        one = Slice(t, first, second, first) f = Squeeze(one, first)
        n = RMSNormalization(f, gamma) y = MatMul(n, v) }"""
    weights = {"table": normal((60, d), 1), "places": normal((5, d), 2), "w": normal((d, d), 3), "b": normal(d, 4)}
    weights.update(v=normal((d, 9), 5), gamma=1 + normal(d, 6, scale=0.3), shift=np.float32(0.7), two=np.float32(2))
    weights.update(rows=np.array([10, d]), cube=np.array([2, 5, d]), first=np.array([0]), second=np.array([1]))
    feeds = {"ids": np.arange(10).reshape(2, 5), "at": np.arange(10).reshape(2, 5) % 5}
    (record,) = rotated(parse(text, weights, opset=23), feeds)
    assert "2 tables, 1 writers, 1 gains, 2 readers" in record.reason


def test_rows_of_a_position_table_by_gathernd():
    text = """g (int64[B,S] ids, int64[B,S,1] at) => (float[B,S,9] y) { [embed] e = Gather(table, ids)
        p = GatherND(places, at) h = Add(e, p) n = LayerNormalization(h, gamma) y = MatMul(n, v) }"""
    weights = {"table": normal((60, d), 1), "places": normal((5, d), 2), "v": normal((d, 9), 5)}
    feeds = {"ids": np.arange(10).reshape(2, 5), "at": np.arange(10).reshape(2, 5, 1) % 5}
    (record,) = rotated(parse(text, {**weights, "gamma": 1 + normal(d, 6, scale=0.3)}), feeds)
    assert "2 tables, 0 writers, 1 gains, 1 readers" in record.reason


def test_normalized_queries_and_keys_do_not_matter():
    """They rotate nothing that a stream needs, and are no streams of their own."""
    normed = REPEATED.replace("q2 = Transpose <perm = [0, 2, 1, 3]> (q1)", "qn = RMSNormalization(q1, small) "
                              "qr = Mul(qn, small) q2 = Transpose <perm = [0, 2, 1, 3]> (qr)")  # fmt: skip
    stream, values = rotated(model_of(attention=normed, small=1 + normal(D, 50, scale=0.3)))
    assert (stream.action, values.action) == ("rewritten", "rewritten")


def silent():
    gamma = np.ones(d, np.float32)
    gamma[3] = 0
    return model_of("LayerNormalization", gamma1=gamma)


REFUSED = {
    "'h2' is an output of the graph": lambda: model_of(outputs=f", float[B,S,{d}] h2"),
    "'n2' is an output of the graph": lambda: model_of(outputs=f", float[B,S,{d}] n2"),
    "Sigmoid 'act' reads 'h2' and is no linear layer": lambda: model_of(
        end="[act] s = Sigmoid(h2) l = Mul(n2, s) logits = MatMul(l, head)"
    ),
    "Add 'late' reads 'n1' behind SimplifiedLayerNormalization 'norm1' and is no linear layer": lambda: model_of(
        end="[late] l = Add(n1, n2) logits = MatMul(l, head)"
    ),
    "'h3' comes out of Mul 'scale', which is no linear layer": lambda: model_of(
        end="[scale] h3 = Mul(k, bk) h4 = Add(h2, h3) n4 = RMSNormalization(h4, gamma2) logits = MatMul(n4, head)",
        wk=normal((d, d), 1), bk=normal(d, 2), attention="a = Identity(q)",
    ),
    "'beta1' shifts channels that the gain of LayerNormalization 'norm1' silences": silent,
    "'embeddings' is an input of the graph, which nothing can rotate": lambda: parse(
        f"""g (float[B,{d}] embeddings) => (float[B,9] y) {{ k = MatMul(embeddings, w) m = Add(embeddings, k)
        n = RMSNormalization(m, gamma) y = MatMul(n, v) }}""",
        {"w": normal((d, d), 1), "v": normal((d, 9), 2), "gamma": np.ones(d, np.float32)}, opset=23,
    ),
    "RMSNormalization 'post' normalizes what is added to the stream": lambda: parse(
        """g (int64[B] ids) => (float[B,9] y) { h = Gather(table, ids) k = MatMul(h, w)
        [post] p = RMSNormalization(k, gamma) m = Add(h, p) n = RMSNormalization(m, gamma) y = MatMul(n, v) }""",
        {"table": normal((60, d), 3), "w": normal((d, d), 1), "v": normal((d, 9), 2), "gamma": np.ones(d, np.float32)},
        opset=23,
    ),
    "the gain of RMSNormalization 'rms' is not a constant": lambda: parse(
        f"""g (int64[B] ids, float[{d}] gain) => (float[B,9] y) {{ h = Gather(table, ids) k = MatMul(h, w)
        m = Add(h, k) [rms] n = RMSNormalization(m, gain) y = MatMul(n, v) }}""",
        {"table": normal((60, d), 3), "w": normal((d, d), 1), "v": normal((d, 9), 2)}, opset=23,
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_streams_that_are_refused(reason):
    model = REFUSED[reason]()
    before = serialized(model)
    result = apply("rotate", model, context(), r2=False)
    assert reason in [record.reason.removeprefix("stream not rotated: ") for record in result.records]
    assert not result.modified
    assert serialized(model) == before


VALUES_REFUSED = {
    "Relu 'act' does not treat the channels of a head alike": lambda: model_of(
        attention="[act] vr = Relu(v) " + REPEATED.replace("Reshape(v,", "Reshape(vr,")
    ),
    "Mul 'each' does not treat the channels of a head alike": lambda: model_of(
        attention=REPEATED.replace("a = Reshape(a1", "am = Reshape(a1") + " gq = Sigmoid(q) [each] a = Mul(am, gq)"
    ),
}


@pytest.mark.parametrize("reason", VALUES_REFUSED)
def test_values_that_are_refused(reason):
    model = VALUES_REFUSED[reason]()
    before = serialized(model)
    result = apply("rotate", model, context(), r1="never")
    assert [(r.site, r.action, r.reason) for r in result.records] == [("o", "skipped", f"values not rotated: {reason}")]
    assert not result.modified
    assert serialized(model) == before


def test_a_cache_is_rotated_only_where_that_is_asked_for():
    cache = f"float[2,{G},P,{D}]"
    text = f"""g (int64[2,S] ids, {cache} past_k, {cache} past_v, int32[2] past, int32 total) =>
        (float[2,S,{V}] logits, float[2,{G},T,{D}] new_k, float[2,{G},T,{D}] new_v) {{ [embed] h = Gather(table, ids)
        [q] q = MatMul(h, wq) [k] k = MatMul(h, wk) [v] v = MatMul(h, wv)
        a, new_k, new_v = com.microsoft.GroupQueryAttention <num_heads = {H}, kv_num_heads = {G}>
        (q, k, v, past_k, past_v, past, total) [o] o = MatMul(a, wo) [lm] logits = MatMul(o, head) }}"""
    model = parse(text, {name: constants()[name] for name in ("table", "wq", "wk", "wv", "wo", "head")})
    (record,) = apply("rotate", model, context()).records
    assert record.action == "skipped"
    assert "the cache 'past_v' would hold" in record.reason
    empty = dict.fromkeys(("past_k", "past_v"), np.zeros((2, G, 0, D), np.float32))
    feeds = {**IDS, **empty, "past": np.full(2, 4, np.int32), "total": np.array(5, np.int32)}
    before = run(model, feeds)
    step = {"ids": IDS["ids"][:, :1], "past": np.full(2, 5, np.int32), "total": np.array(6, np.int32)}
    expected = run(model, {**step, "past_k": before[1], "past_v": before[2]})
    (record,) = rotated(model, feeds, caches=True)
    assert "the cache past_v is rotated; the cache new_v is rotated" in record.reason
    after = run(model, feeds)
    assert relative(after[2:], before[2:]) > 0.1
    assert relative(run(model, {**step, "past_k": after[1], "past_v": after[2]}), expected) < 1e-5


def test_nothing_to_rotate():
    model = parse("g (float[B,16] x) => (float[B,8] y) { y = MatMul(x, w) }", {"w": normal((16, 8), 1)})
    before = serialized(model)
    result = apply("rotate", model, context())
    assert (result.modified, result.records) == (False, ())
    assert serialized(model) == before
    assert apply("rotate", model_of(), context(), r1="never", r2=False).records == ()


def test_the_seed_decides():
    found = []
    for seed in (0, 0, 1):
        model = model_of()
        rotated(model, seed=seed)
        found.append(serialized(model))
    assert found[0] == found[1] != found[2]


def test_loud_channels_are_spread():
    """Two of 24 channels of the stream are thirty times as loud: 8 bits for a token leave the others few steps.

    Rotated, no channel is louder than 30 * (2 + 2) / 24^0.5 = 24 where a token is at twice its size, in the place of
    60, so that the steps, and the error of the product, are less than half.
    """
    loud = np.ones(d, np.float32)
    loud[[3, 17]] = 30
    given = {name: constants()[name] * loud for name in ("table", "wo", "wd")}
    given |= {name: constants()[name] / loud[:, None] for name in ("wq", "wk", "wv", "wg", "wu", "head")}
    error = []
    for wanted in (False, True):
        model = model_of(**given)
        if wanted:
            rotated(model)
        (rows,) = run(with_outputs(model, ["n1"]), IDS, outputs=["n1"])
        step = np.abs(rows).max(-1, keepdims=True) / 127
        weight = read_weight(site_named(model, "gate"))
        error.append(relative([(np.rint(rows / step) * step) @ weight.T], [rows @ weight.T]))
    assert error[1] < error[0] / 2


def test_options_and_order():
    with pytest.raises(SchemeError, match="choose auto, untie or never"):
        apply("rotate", model_of(), context(), r1="maybe")
    assert str(load("rotate")(context(), {"r1": "untie"})) == "rotate{r1=untie}"
    names = pass_names()
    assert names.index("assign_scheme") < names.index("rotate") < names.index("smoothquant") < names.index("gptq")
