"""Factors of channels move into every kind of producer without changing what the model computes, and into no other.

Every legal case is run by ONNX Runtime before and after, with factors between 0.1 and 10.
"""

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.errors import NumericsError
from qcompiler.foldings import find_foldings
from qcompiler.foldings.shapes import BlockedError, reshaped
from qcompiler.foldings.sizes import dims_of, note_sizes
from qcompiler.graph import read_weight
from qcompiler.legality import check_legal
from qcompiler.passes.base import Stage
from qcompiler.sites import find_sites
from tests.builders import decoder, normal, parse, run, serialized, text_of, token_batches

K, N = 16, 12
X = {"x": normal((2, 5, K), 100)}


def factors(count, seed=0):
    return np.exp(np.random.default_rng(seed).uniform(np.log(0.1), np.log(10), count))


def foldings(model, **options):
    return find_foldings(model, find_sites(model)[0], **options)


def relative(got, expected):
    return max(
        float(np.abs(a.astype(np.float64) - b).max() / np.abs(b.astype(np.float64)).max())
        for a, b in zip(got, expected, strict=True)
    )


def fold_all(model, feeds, *, tolerance=1e-5, **options):
    """Apply random factors to every legal folding, prove that nothing moves, and return all foldings."""
    expected = run(model, feeds)
    found = foldings(model, **options)
    for seed, folding in enumerate(found):
        if folding.legal:
            s = factors(folding.channels, seed)
            before = [read_weight(site) for site in folding.sites]
            applied = folding.apply(s)
            assert np.array_equal(applied, folding.tie(s))
            for site, old in zip(folding.sites, before, strict=True):
                assert np.allclose(read_weight(site), old * applied, rtol=1e-2 if tolerance > 1e-3 else 1e-5)
    check_legal(model, Stage.TRANSFORM, "foldings")
    assert relative(run(model, feeds), expected) < tolerance
    return found


def linear_readers(value="n"):
    return f"[a] y = MatMul({value}, wa) [b] z = MatMul({value}, wb)"


WEIGHTS = {
    "gamma": 1 + normal(K, 1, scale=0.3),
    "beta": normal(K, 2),
    "wa": normal((K, N), 3),
    "wb": normal((K, 9), 4),
}
HEAD = f"g (float[B,S,{K}] x) => (float[B,S,{N}] y, float[B,S,9] z)"


def weights(*names, **more):
    return {**{name: WEIGHTS[name] for name in names}, **more}


def decomposed(text, *, gamma=True, beta=False, **more):
    """A normalization that is spelled out up to `hat`, its constants, and two readers of `n`."""
    used = weights("wa", "wb", *["gamma"] * gamma, *["beta"] * beta)
    used.update(two=np.float32(2), eps=np.float32(1e-5), last=np.array([-1]), **more)
    body = f"""square = Pow(x, two) mean = ReduceMean <keepdims = 1> (square, last) shifted = Add(mean, eps)
        root = Sqrt(shifted) {text} {linear_readers()}"""
    return parse(f"{HEAD} {{ {body} }}", used)


NORMS = {
    "LayerNormalization": lambda: parse(
        f"{HEAD} {{ [norm] n = LayerNormalization(x, gamma, beta) {linear_readers()} }}",
        weights("gamma", "beta", "wa", "wb"),
    ),
    "LayerNormalization without beta": lambda: parse(
        f"{HEAD} {{ [norm] n = LayerNormalization(x, gamma) {linear_readers()} }}", weights("gamma", "wa", "wb")
    ),
    "RMSNormalization": lambda: parse(
        f"{HEAD} {{ [norm] n = RMSNormalization(x, gamma) {linear_readers()} }}", weights("gamma", "wa", "wb"), opset=23
    ),
    "SimplifiedLayerNormalization": lambda: parse(
        f"{HEAD} {{ [norm] n = SimplifiedLayerNormalization(x, gamma) {linear_readers()} }}",
        weights("gamma", "wa", "wb"),
    ),
    "SkipLayerNormalization": lambda: parse(
        f"""g (float[B,S,{K}] x) => (float[B,S,{N}] y, float[B,S,9] z, float[B,S,{K}] passed) {{
        [norm] n, , , passed = com.microsoft.SkipLayerNormalization(x, x, gamma, beta, bias) {linear_readers()} }}""",
        weights("gamma", "beta", "wa", "wb", bias=normal(K, 9)),
    ),
    "SkipSimplifiedLayerNormalization": lambda: parse(
        f"""g (float[B,S,{K}] x) => (float[B,S,{N}] y, float[B,S,9] z, float[B,S,{K}] passed) {{
        [norm] n, , , passed = com.microsoft.SkipSimplifiedLayerNormalization(x, x, gamma) {linear_readers()} }}""",
        weights("gamma", "wa", "wb"),
    ),
    "Div, gamma on the right": lambda: decomposed("hat = Div(x, root) n = Mul(hat, gamma)"),
    "Reciprocal, gamma on the left": lambda: decomposed("r = Reciprocal(root) hat = Mul(x, r) n = Mul(gamma, hat)"),
    "beta": lambda: decomposed("hat = Div(x, root) m = Mul(hat, gamma) n = Add(beta, m)", beta=True),
    "gamma of three axes, Sub": lambda: decomposed(
        "hat = Div(x, root) m = Mul(hat, g3) n = Sub(m, beta)", gamma=False, beta=True,
        g3=WEIGHTS["gamma"].reshape(1, 1, K),
    ),
    "Cast around": lambda: decomposed(
        "d = Cast <to = 11> (x) hat = Div(x, root) h = Cast <to = 1> (hat) c = Cast <to = 1> (half) "
        "m = Mul(c, h) n = Cast <to = 1> (m) unused = Identity(d)",
        gamma=False, half=WEIGHTS["gamma"].astype(np.float16),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_a_normalization_absorbs_the_factors(name):
    # A float16 gamma holds the quotients with three digits.
    (found,) = fold_all(NORMS[name](), X, tolerance=3e-3 if name == "Cast around" else 1e-5)
    assert found.kind == ("norm" if "Normalization" in name else "gain")
    assert [site.name for site in found.sites] == ["a", "b"]
    assert found.value.name == "n"
    assert found.caches == ()


GATED = """g (float[B,S,16] x) => (float[B,S,12] y) {
    [gate] gt = MatMul(x, wg) [up] u0 = MatMul(x, wu) u = Add(u0, bu) sig = Sigmoid(gt) silu = Mul(gt, sig)
    h = Mul(%s) [down] y = MatMul(h, wd) }"""
GATED_WEIGHTS = {"wg": normal((K, 20), 5), "wu": normal((K, 20), 6), "bu": normal(20, 7), "wd": normal((20, N), 8)}


@pytest.mark.parametrize("order", ["silu, u", "u, silu"])
def test_the_up_projection_absorbs_the_factors_of_down(order):
    first, found = fold_all(parse(GATED % order, GATED_WEIGHTS), X)
    assert not first.legal
    assert "input" in first.reason or "nothing before 'x'" in first.reason
    assert (found.kind, found.plan.source.name) == ("gated", "up")


def test_of_a_fused_gate_and_up_only_the_half_that_is_linear_is_scaled():
    text = """g (float[B,S,16] x) => (float[B,S,12] y) {
        [both] t = MatMul(x, w) gt, u = Split <axis = -1, num_outputs = 2> (t) sig = Sigmoid(gt) silu = Mul(gt, sig)
        h = Mul(silu, u) [down] y = MatMul(h, wd) }"""
    model = parse(text, {"w": normal((K, 40), 5), "wd": GATED_WEIGHTS["wd"]})
    found = fold_all(model, X)[1]
    assert found.kind == "gated"
    changed = (read_weight(find_sites(model)[0][0]) != normal((K, 40), 5).T).any(1)
    assert not changed[:20].any()
    assert changed[20:].all()


def test_a_slice_of_a_fused_weight():
    text = """g (float[B,S,16] x) => (float[B,S,12] y) {
        [both] t = MatMul(x, w) gt = Slice(t, zero, mid, last) u = Slice(t, mid, end, last) sig = Sigmoid(gt)
        h = Mul(sig, u) [down] y = MatMul(h, wd) }"""
    ends = {"zero": np.array([0]), "mid": np.array([20]), "end": np.array([2**62]), "last": np.array([-1])}
    model = parse(text, {"w": normal((K, 40), 5), "wd": GATED_WEIGHTS["wd"], **ends})
    assert fold_all(model, X)[1].kind == "gated"


@pytest.mark.parametrize("between", ["Relu", "LeakyRelu", "Identity", "Neg", "Reshape", "Unsqueeze"])
def test_a_linear_layer_absorbs_the_factors_through_what_is_homogeneous(between):
    extra = {"Reshape": ", s4", "Unsqueeze": ", first"}.get(between, "")
    text = f"""g (float[B,S,{K}] x) => (float[D,B,S,{N}] y) {{
        [fc1] h0 = MatMul(x, w1) h1 = Add(b1, h0) h = {between}(h1{extra}) [fc2] y = MatMul(h, w2) }}"""
    used = {"w1": normal((K, 20), 5), "b1": normal(20, 6), "w2": normal((20, N), 7)}
    used.update({"s4": np.array([1, 0, -1, 20])} if extra == ", s4" else {"first": np.array([0])} if extra else {})
    if between not in ("Reshape", "Unsqueeze"):
        text = text.replace("D,B", "B")
    found = fold_all(parse(text.replace("[D,B", "[1,B"), used), X)
    assert [(f.kind, f.legal) for f in found] == [("", False), ("linear", True)]


def test_a_chain_of_gemms_with_biases():
    text = f"""g (float[B,{K}] x) => (float[B,{N}] y) {{
        [one] h0 = Gemm <transB = 1> (x, w1, b1) h = Relu(h0) [two] k0 = Gemm(h, w2, b2) k = Relu(k0)
        [three] y = Gemm <transB = 1> (k, w3, b3) }}"""
    used = {"w1": normal((20, K), 1), "b1": normal(20, 2), "w2": normal((20, 14), 3), "b2": normal(14, 4)}
    used.update(w3=normal((N, 14), 5), b3=normal(N, 6))
    found = fold_all(parse(text, used), {"x": normal((7, K), 0)})
    assert [f.kind for f in found] == ["", "linear", "linear"]


def test_convolutions_of_kernel_one():
    text = """g (float[B,16,H,W] x) => (float[B,12,H,W] y) {
        [one] h0 = Conv(x, w1, b1) h = Relu(h0) [two] y = Conv(h, w2) }"""
    used = {"w1": normal((20, K, 1, 1), 1), "b1": normal(20, 2), "w2": normal((N, 20, 1, 1), 3)}
    model = parse(text, used)
    feeds = {"x": normal((2, K, 3, 4), 0)}
    assert [f.kind for f in fold_all(model, feeds)] == ["", "linear"]
    model = parse(text, used)
    expected, (first, _) = run(model, feeds), foldings(model)
    first.insert(factors(K))
    assert relative(run(model, feeds), expected) < 1e-5
    assert text_of(model)[0].startswith("one_Mul_output = Mul(x, x_factors")


# Attention: H query heads, G key and value heads, of D channels each.
H, G, D, S = 6, 2, 8, 5


def attention_weights(**more):
    shapes = {"wq": (K, H * D), "wk": (K, G * D), "wv": (K, G * D), "wo": (H * D, N)}
    made = {name: normal(shape, seed + 20) for seed, (name, shape) in enumerate(shapes.items())}
    made.update(bv=normal(G * D, 30), axis2=np.array([2]), root=np.float32(D**-0.5))
    for name, shape in {"hs": (0, 0, H, D), "gs": (0, 0, G, D), "merge": (0, 0, -1)}.items():
        made[name] = np.array(shape)
    made.update(wide=np.array([1, 1, H // G, 1, 1]), full=np.array([0, H, -1, D]), **more)
    return made


REPEATED = """g (float[B,S,16] x) => (float[B,S,12] y) {
    [q] q0 = MatMul(x, wq) [k] k0 = MatMul(x, wk) [v] v0 = MatMul(x, wv) v1 = Add(v0, bv)
    q1 = Reshape(q0, hs) q2 = Transpose <perm = [0, 2, 1, 3]> (q1)
    k1 = Reshape(k0, gs) k2 = Transpose <perm = [0, 2, 1, 3]> (k1) k3 = Unsqueeze(k2, axis2) k4 = Expand(k3, wide)
    k5 = Reshape(k4, full) k6 = Transpose <perm = [0, 1, 3, 2]> (k5)
    v2 = Reshape(v1, gs) v3 = Transpose <perm = [0, 2, 1, 3]> (v2) v4 = Unsqueeze(v3, axis2) v5 = Expand(v4, wide)
    v6 = Reshape(v5, full)
    scores = MatMul(q2, k6) scaled = Mul(scores, root) p = Softmax <axis = -1> (scaled)
    o0 = MatMul(p, v6) o1 = Transpose <perm = [0, 2, 1, 3]> (o0) o2 = Reshape(o1, merge) [o] y = MatMul(o2, wo) }"""


def test_value_heads_that_are_repeated_by_expand_share_their_factors():
    found = fold_all(parse(REPEATED, attention_weights()), X)
    assert [f.kind for f in found] == ["", "attention"]
    s = np.arange(1, H * D + 1.0)
    tied = found[1].tie(s).reshape(G, H // G, D)
    assert (tied == s.reshape(G, H // G, D).max(1, keepdims=True)).all()
    assert np.array_equal(found[1].tie(tied.reshape(-1)), tied.reshape(-1))


def test_values_that_are_not_shaped_into_heads():
    text = """g (float[B,S,16] x) => (float[B,S,12] y) {
        [v] v = MatMul(x, wv) xt = Transpose <perm = [0, 2, 1]> (x) scores = MatMul(x, xt) p = Softmax(scores)
        a = MatMul(p, v) [o] y = MatMul(a, wo) }"""
    found = fold_all(parse(text, {"wv": normal((K, 8), 1), "wo": normal((8, N), 2)}), X)
    assert [f.kind for f in found] == ["", "attention"]
    assert np.array_equal(found[1].tie(factors(8)), factors(8))


def grouped(caches, packed):
    """GroupQueryAttention with separate or fused projections, with or without a cache."""
    inputs = f"float[B,S,{K}] x, int32[B] last, int32 total"
    outputs = f"float[B,S,{N}] y"
    past = ", "
    result = "a"
    if caches:
        cache = f"float[B,{G},P,{D}]"
        inputs += f", {cache} past_k, {cache} past_v"
        outputs += f", float[B,{G},T,{D}] present_k, float[B,{G},T,{D}] present_v"
        past, result = "past_k, past_v", "a, present_k, present_v"
    made = attention_weights(bqkv=normal((H + 2 * G) * D, 31))
    made["wqkv"] = np.concatenate([made["wq"], made["wk"], made["wv"]], 1)
    heads = f"num_heads = {H}, kv_num_heads = {G}"
    if packed:
        before, read = "[qkv] m = MatMul(x, wqkv) q = Add(m, bqkv)", "q, , "
    else:
        before, read = "[q] q = MatMul(x, wq) [k] k = MatMul(x, wk) [v] v0 = MatMul(x, wv) v = Add(v0, bv)", "q, k, v"
    text = f"""g ({inputs}) => ({outputs}) {{ {before}
        {result} = com.microsoft.GroupQueryAttention <{heads}> ({read}, {past}, last, total) [o] y = MatMul(a, wo) }}"""
    used = [name for name in made if name in text.replace("(", " ").replace(")", " ").replace(",", " ").split()]
    return parse(text, {name: made[name] for name in used})


def grouped_feeds(**more):
    return {**X, "last": np.full(2, S - 1, np.int32), "total": np.array(S, np.int32), **more}


@pytest.mark.parametrize("packed", [False, True])
def test_grouped_query_attention(packed):
    model = grouped(False, packed)
    found = fold_all(model, grouped_feeds())
    assert [f.kind for f in found] == ["", "attention"]
    s = np.arange(1, H * D + 1.0).reshape(G, H // G, D)
    assert (found[1].tie(s.reshape(-1)).reshape(s.shape) == s.max(1, keepdims=True)).all()
    if packed:
        before = read_weight(find_sites(grouped(False, True))[0][0])
        moved = (read_weight(find_sites(model)[0][0]) != before).any(1)
        assert moved.tolist() == [False] * (H + G) * D + [True] * G * D


@pytest.mark.parametrize("packed", [False, True])
def test_a_cache_is_scaled_only_where_that_is_asked_for(packed):
    model = grouped(True, packed)
    assert "cache" in foldings(model)[1].reason
    empty = dict.fromkeys(("past_k", "past_v"), np.zeros((2, G, 0, D), np.float32))
    old = run(model, grouped_feeds(**empty))
    _, found = foldings(model, caches=True)
    assert set(found.caches) == {"past_v", "present_v"}
    found.apply(factors(H * D))
    new = run(model, grouped_feeds(**empty))
    assert relative(new[:2], old[:2]) < 1e-5
    assert relative(new[2:], old[2:]) > 0.1
    # The next token, from each model's own cache.
    step = {"x": normal((2, 1, K), 5), "last": np.full(2, S, np.int32), "total": np.array(S + 1, np.int32)}
    expected = run(grouped(True, packed), {**step, "past_k": old[1], "past_v": old[2]})
    assert relative(run(model, {**step, "past_k": new[1], "past_v": new[2]})[:1], expected[:1]) < 1e-5


@pytest.mark.parametrize("bias", ["", ", b"])
def test_multi_head_attention(bias):
    text = f"""g (float[B,S,16] x) => (float[B,S,12] y) {{
        [q] q = MatMul(x, wq) [k] k = MatMul(x, wk) [v] v = MatMul(x, wv)
        a = com.microsoft.MultiHeadAttention <num_heads = 2> (q, k, v{bias}) [o] y = MatMul(a, wo) }}"""
    used = {"wq": normal((K, 8), 1), "wk": normal((K, 8), 2), "wv": normal((K, 8), 3), "wo": normal((8, N), 4)}
    found = fold_all(parse(text, {**used, "b": normal(24, 5)} if bias else used), X)
    assert [f.kind for f in found] == ["", "attention"]


def test_the_standard_attention_of_opset_23():
    text = f"""g (float[B,S,16] x) => (float[B,S,12] y) {{
        [q] q = MatMul(x, wq) [k] k = MatMul(x, wk) [v] v = MatMul(x, wv)
        a = Attention <q_num_heads = {H}, kv_num_heads = {G}> (q, k, v) [o] y = MatMul(a, wo) }}"""
    made = attention_weights()
    found = fold_all(parse(text, {name: made[name] for name in ("wq", "wk", "wv", "wo")}, opset=23), X)
    assert [f.kind for f in found] == ["", "attention"]


def test_a_whole_decoder():
    model = decoder()
    found = fold_all(model, token_batches(1)[0])
    assert [f.kind for f in found] == ["norm", "attention", "norm", "gated"] * 2 + [""]


def norm_then(text, outputs=f"float[B,S,{N}] y", **more):
    used = weights("gamma", "beta", "wa", **more)
    body = f"[norm] n = LayerNormalization(x, gamma, beta) {text}"
    return parse(f"g (float[B,S,{K}] x) => ({outputs}) {{ {body} }}", used)


REFUSED = {
    "'n' is an output": lambda: norm_then("[a] y = MatMul(n, wa)", f"float[B,S,{N}] y, float[B,S,{K}] n"),
    "'n' has another reader: Add 'add'": lambda: norm_then(
        "[a] y = MatMul(n, wa) [add] r = Add(n, x)", f"float[B,S,{N}] y, float[B,S,{K}] r"
    ),
    "'n' has another reader: Softmax 'soft'": lambda: norm_then(
        "[a] y = MatMul(n, wa) [soft] r = Softmax(n)", f"float[B,S,{N}] y, float[B,S,{K}] r"
    ),
    "'n' has another reader: MatMul 'scores' sums over": lambda: norm_then(
        "[a] y = MatMul(n, wa) t = Transpose <perm = [0, 2, 1]> (x) [scores] r = MatMul(n, t)",
        f"float[B,S,{N}] y, float[B,S,S] r",
    ),
    "'g' comes out of Gelu 'gelu'": lambda: norm_then("[gelu] g = Gelu(n) [a] y = MatMul(g, wa)"),
    "'g' comes out of Sigmoid": lambda: norm_then("[act] g = Sigmoid(n) [a] y = MatMul(g, wa)"),
    "'n' has another reader: Sigmoid": lambda: norm_then("e = Sigmoid(n) g = Mul(n, e) [a] y = MatMul(g, wa)"),
    "'n' has another reader: Mul 'square' reads it on both": lambda: norm_then(
        "[square] g = Mul(n, n) [a] y = MatMul(g, wa)"
    ),
    "Mul 'meet' reads it on both sides": lambda: norm_then(
        "r = Relu(n) g = Mul(n, x) [meet] h = Mul(r, n) [a] y = MatMul(g, wa) [b] z = MatMul(h, wa)",
        f"float[B,S,{N}] y, float[B,S,{N}] z",
    ),
    "'sum' is not the normalized result": lambda: parse(
        f"""g (float[B,S,{K}] x) => (float[B,S,{N}] y, float[B,S,{K}] n) {{
        n, , , sum = com.microsoft.SkipLayerNormalization(x, x, gamma) [a] y = MatMul(sum, wa) }}""",
        weights("gamma", "wa"),
    ),
    "is tied with the lookup table 'look'": lambda: parse(
        """g (int64[B,S] i) => (float[B,S,1024] y) {
        [look] e = Gather(table, i) [norm] n = RMSNormalization(e, gamma) t = Transpose <perm = [1, 0]> (table)
        [a] y = MatMul(n, t) }""",
        weights("gamma", table=normal((1024, K), 1)), opset=23,
    ),
    "nothing before 'x' can take the factors": lambda: parse(
        f"g (float[B,{K}] x) => (float[B,{N}] y) {{ [a] y = MatMul(x, wa) }}", weights("wa")
    ),
    "is not a constant with an element for each channel": lambda: parse(
        f"""g (float[B,{K}] x, float[{K}] gain) => (float[B,{N}] y) {{
        n = LayerNormalization(x, gain) [a] y = MatMul(n, wa) }}""",
        weights("wa"),
    ),
    "the bias of LayerNormalization": lambda: parse(
        f"""g (float[B,{K}] x, float[{K}] shift) => (float[B,{N}] y) {{
        n = LayerNormalization(x, gamma, shift) [a] y = MatMul(n, wa) }}""",
        weights("gamma", "wa"),
    ),
    "in another order": lambda: norm_then(
        "[a] y = MatMul(n, wa) r = Reshape(n, split) t = Transpose <perm = [0, 1, 3, 2]> (r) m = Reshape(t, merge) "
        "[b] z = MatMul(m, wb)",
        f"float[B,S,{N}] y, float[B,S,9] z",
        wb=WEIGHTS["wb"], split=np.array([0, 0, 4, 4]), merge=np.array([0, 0, 16]),
    ),
    "'h' has another reader: Conv": lambda: parse(
        """g (float[B,16,H,W] x) => (float[B,8,H,W] y, float[B,12,H,W] z) { h0 = Conv(x, w1) h = Relu(h0)
        y = Conv <pads = [1, 1, 1, 1]> (h, w3) z = Conv(h, w2) }""",
        {"w1": normal((20, K, 1, 1), 1), "w2": normal((12, 20, 1, 1), 2), "w3": normal((8, 20, 3, 3), 3)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_refused(reason):
    model = REFUSED[reason]()
    before = serialized(model)
    reasons = [f.reason for f in foldings(model)]
    assert any(reason in text for text in reasons)
    assert not any(f.legal for f in foldings(model))
    assert serialized(model) == before


def test_a_residual_may_read_what_is_not_scaled():
    """Of a post-norm layer only the edge to the linear layer cannot be told from the residual's: a Mul is inserted."""
    model = norm_then("[a] y = MatMul(n, wa) [add] r = Add(n, x)", f"float[B,S,{N}] y, float[B,S,{K}] r")
    expected = run(model, X)
    (found,) = foldings(model)
    s = factors(K)
    assert np.array_equal(found.insert(s, "mine"), s)
    check_legal(model, Stage.TRANSFORM, "foldings")
    assert relative(run(model, X), expected) < 1e-5
    (made,) = (node for node in model.graph if node.op_type == "Mul")
    assert made.metadata_props["qcompiler.pass"] == "mine"
    assert found.sites[0].input is made.outputs[0]


def test_a_tied_table_cannot_even_be_inserted_before():
    (found,) = foldings(REFUSED["is tied with the lookup table 'look'"]())
    assert "lookup table" in found.stuck
    (found,) = foldings(REFUSED["nothing before 'x' can take the factors"]())
    assert found.stuck == ""


@pytest.mark.parametrize("caches", [False, True])
def test_factors_of_one_leave_every_byte(caches):
    for model in (decoder(), grouped(True, True), NORMS["beta"](), REFUSED["'n' is an output"]()):
        before = serialized(model)
        for found in foldings(model, caches=caches):
            ones = np.ones(found.channels)
            assert np.array_equal(found.apply(ones) if found.legal else found.insert(ones), ones)
        assert serialized(model) == before


def test_what_others_read_is_untied():
    text = f"""g (float[B,S,{K}] x) => (float[B,S,{K}] y, float[B,S,{K}] other, float[B,S,{K}] m) {{
        [one] n = LayerNormalization(x, gamma, gamma) [a] h0 = MatMul(n, w) h = Relu(h0) [b] y = MatMul(h, w)
        [two] m = LayerNormalization(x, gamma) [c] other = MatMul(x, w) }}"""
    model = parse(text, weights("gamma", w=normal((K, K), 1)))
    fold_all(model, X)
    values = model.graph.initializers
    assert np.array_equal(values["w"].const_value.numpy(), normal((K, K), 1))
    assert np.array_equal(values["gamma"].const_value.numpy(), WEIGHTS["gamma"])
    assert len({site.weight.name for site in find_sites(model)[0]}) == 3


def test_readers_that_share_a_weight_keep_sharing_it():
    text = f"{HEAD} {{ n = LayerNormalization(x, gamma) {linear_readers()} }}".replace("wb", "wa").replace("9", "12")
    model = parse(text, weights("gamma", "wa"))
    fold_all(model, X)
    assert len({site.weight for site in find_sites(model)[0]}) == 1


def test_a_transpose_that_others_read_is_duplicated():
    text = f"""g (float[B,S,{K}] x) => (float[B,S,{N}] y, float[B,S,{N}] z) {{
        n = LayerNormalization(x, gamma) t = Transpose <perm = [1, 0]> (w)
        [a] y = MatMul(n, t) [b] z = MatMul(x, t) }}"""
    model = parse(text, weights("gamma", w=normal((N, K), 1)))
    fold_all(model, X)
    assert [node.op_type for node in model.graph].count("Transpose") == 2


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-2), ("bfloat16", 1e-1)])
def test_narrow_floats(dtype, tolerance):
    kind = {"float16": "float16", "bfloat16": "bfloat16"}[dtype]
    text = f"""g ({kind}[B,{K}] x) => ({kind}[B,{N}] y) {{
        [fc1] h0 = MatMul(x, w1) h1 = Add(h0, b1) h = Relu(h1) [fc2] y = MatMul(h, w2) }}"""
    import ml_dtypes

    number = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(np.float16)
    w1, b1, w2 = (normal(shape, seed).astype(number) for seed, shape in enumerate([(K, 20), (20,), (20, N)]))
    model = parse(text, {"w1": w1, "b1": b1, "w2": w2})
    found = foldings(model)[1]
    s = found.apply(factors(20))
    assert {value.const_value.dtype for value in model.graph.initializers.values()} == {ir.DataType.from_numpy(number)}
    first, second = (read_weight(site) for site in find_sites(model)[0])
    bias = next(node for node in model.graph if node.op_type == "Add").inputs[1].const_value.numpy().astype(np.float32)
    x = normal((7, K), 9)
    got = np.maximum(x @ first.T + bias, 0) @ second.T
    wanted = np.maximum(x @ w1.astype(np.float32) + b1.astype(np.float32), 0) @ w2.astype(np.float32)
    assert relative([got], [wanted]) < tolerance
    assert np.array_equal(second, (w2.astype(np.float32) * s[:, None].astype(np.float32)).astype(number).T)
    if dtype == "float16":
        feeds = {"x": x.astype(np.float16)}
        assert relative(run(model, feeds), run(parse(text, {"w1": w1, "b1": b1, "w2": w2}), feeds)) < tolerance


def test_two_factors_are_rounded_once():
    """The columns of a value projection are scaled with the norm before it, its rows with the output projection."""
    text = f"""g (float16[B,{K}] x) => (float16[B,{N}] y) {{
        n = LayerNormalization(x, gamma) [fc1] h0 = MatMul(n, w1) h = Relu(h0) [fc2] y = MatMul(h, w2) }}"""
    w1 = normal((K, 20), 1, "float16")
    model = parse(text, {"gamma": np.ones(K, np.float16), "w1": w1, "w2": normal((20, N), 2, "float16")})
    first, second = foldings(model)
    a, b = first.apply(factors(K, 1)).astype(np.float32), second.apply(factors(20, 2)).astype(np.float32)
    exact = w1.astype(np.float64) * a[:, None] / b
    got = read_weight(find_sites(model)[0][0]).T
    assert np.abs(got - exact).max() <= np.abs(exact * 2.0**-11).max()


def test_factors_that_do_not_fit_are_refused_and_change_nothing():
    text = f"g (float16[B,{K}] x) => (float16[B,{N}] y) {{ n = LayerNormalization(x, gamma) [a] y = MatMul(n, wa) }}"
    model = parse(text, {"gamma": np.ones(K, np.float16), "wa": normal((K, N), 1, "float16")})
    before, (found,) = serialized(model), foldings(model)
    for bad in (np.full(K, 1e6), np.full(K, 1e-6), np.zeros(K), np.full(K, np.nan), np.ones(K - 1)):
        with pytest.raises(NumericsError):
            found.apply(bad)
    assert serialized(model) == before


def test_only_what_is_asked_for_is_looked_at_but_all_readers_move():
    model = NORMS["LayerNormalization"]()
    sites = find_sites(model)[0]
    (found,) = find_foldings(model, [sites[1]])
    assert [site.name for site in found.sites] == ["a", "b"]
    assert found.sites[1] is sites[1]
    assert find_foldings(model, []) == []


def test_a_deep_model_without_annotations_takes_no_time():
    """Whatever is looked for is looked for once: 60 products, each of two computed values."""
    steps = " ".join(f"p{i} = Mul(x{i}, x{i}) x{i + 1} = Add(p{i}, x{i})" for i in range(60))
    text = f"""g (float[B,S,{K}] x) => (float[B,S,{N}] y) {{
        x0 = Identity(x) {steps} r = Reshape(x60, s) y = MatMul(r, w) }}"""
    (found,) = foldings(parse(text, {"w": normal((K, N), 1), "s": np.array([0, 0, K])}))
    assert not found.legal


@pytest.mark.parametrize(
    ("shape", "before", "after", "expected"),
    [
        ((12,), ["b", "s", 12], ["b", "s", 3, 4], (3, 4)),
        ((12,), ["b", "s", 12], [None, None, None, 4], (3, 4)),
        ((12,), None, [None, None, 3, 4], (3, 4)),
        ((3, 4), ["b", "s", 3, 4], ["b", "s", None], (12,)),
        ((12,), ["b", "s", 12], [None, 12], (12,)),
        ((3, 1, 1, 4), ["b", 3, 2, "s", 4], ["b", 6, "s", 4], (6, 1, 4)),
        ((3, 1, 1, 4), ["b", 3, 2, "s", 4], [None, None, None, 4], (6, 1, 4)),
        ((3, 1, 4), [None, 3, None, 4], [None, 3, None, 4], (3, 1, 4)),
        ((3, 1, 4), ["b", 3, "s", 4], ["b", 3, "t", 4], None),
        ((12,), None, [None, None, None, 4], None),
        ((12,), ["b", "s", 12], [None, 5], None),
        ((3, 1, 4), ["b", 3, "s", 4], ["b", None, 4], None),
        ((12,), ["b", "s", 12], [0, 0, 3, 4], (3, 4)),
        ((12,), ["b", "s", 12], [0, 0, 0, 4], (3, 4)),
    ],
    ids=str,
)
def test_channels_through_a_reshape(shape, before, after, expected):
    channels = np.arange(np.prod(shape)).reshape(shape)
    if expected is None:
        with pytest.raises(BlockedError):
            reshaped(channels, before, after, "r")
        return
    assert reshaped(channels, before, after, "r").shape == expected


def test_sizes_are_found_without_annotations():
    model = parse(REPEATED, attention_weights())
    made = {node.outputs[0].name: node.outputs[0] for node in model.graph}
    note_sizes(model)
    assert made["v5"].shape is None
    assert dims_of(made["v2"]) == ["B", "S", G, D]
    assert dims_of(made["v5"]) == ["B", G, H // G, "S", D]
    assert dims_of(made["v6"]) == ["B", H, None, D]
    assert dims_of(made["scores"])[:2] == ["B", H]


def test_heads_whose_number_is_to_be_found_out():
    """As older exporters write it: nothing is annotated, and the shapes are put together from Shape and -1."""
    text = f"""g (int64[B,S] ids) => (float[B,S,{N}] y) {{
        e = Gather(table, ids) mean = ReduceMean <keepdims = 1, axes = [-1]> (e) d = Sub(e, mean) sq = Pow(d, two)
        var = ReduceMean <keepdims = 1, axes = [-1]> (sq) root = Sqrt(var) hat = Div(d, root) n = Mul(hat, gamma)
        mask = ConstantOfShape(nothing) sizes = Shape(ids) b0 = Gather(sizes, zero) s0 = Gather(sizes, one)
        b = Unsqueeze(b0, first) s = Unsqueeze(s0, first)
        heads = Concat <axis = 0> (b, s, open, size) merge = Concat <axis = 0> (b, s, open)
        [q] q0 = MatMul(n, wq) q1 = Reshape(q0, heads) q2 = Transpose <perm = [0, 2, 1, 3]> (q1)
        [k] k0 = MatMul(n, wk) k1 = Reshape(k0, heads) k2 = Transpose <perm = [0, 2, 3, 1]> (k1)
        [v] v0 = MatMul(n, wv) v1 = Add(bv, v0) v2 = Reshape(v1, heads) v3 = Transpose <perm = [0, 2, 1, 3]> (v2)
        scores = MatMul(q2, k2) masked = Add(scores, mask) p = Softmax <axis = -1> (masked) o0 = MatMul(p, v3)
        o1 = Transpose <perm = [0, 2, 1, 3]> (o0) o2 = Reshape(o1, merge) [o] y = MatMul(o2, wo) }}"""
    used = {name: normal((K, K), seed) for seed, name in enumerate(("wq", "wk", "wv"))}
    used.update(wo=normal((K, N), 4), bv=normal(K, 5), gamma=WEIGHTS["gamma"], table=normal((1024, K), 6))
    used.update(two=np.float32(2), zero=np.array(0), one=np.array(1), first=np.array([0]), open=np.array([-1]))
    used.update(size=np.array([4]), nothing=np.array([], np.int64))
    model = parse(text, used, opset=14)
    found = fold_all(model, {"ids": np.random.default_rng(0).integers(0, 1024, (2, 5))})
    assert [f.kind for f in found] == ["gain", "attention"]
