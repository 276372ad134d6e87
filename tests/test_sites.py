"""What is a site and what is none, with the reason; names; and which way round a weight is read."""

import numpy as np
import pytest

from qcompiler.graph import input_feature_axis, read_weight
from qcompiler.scheme_plan import Pattern
from qcompiler.sites import find_products, find_sites, module_path
from tests.builders import apply, decoder, normal, parse, run, the_site

W = normal((64, 24), 0)  # [K, N]


def linear(text, weights, shape="B,64", out="B,24"):
    return parse(f"g (float[{shape}] x) => (float[{out}] y) {{ {text} }}", weights)


def turned(array):
    return np.ascontiguousarray(array.T)


# text of the graph, weights, shape of x and y, layout; each computes W^T x along the feature axis
LINEAR = {
    "matmul": ("[fc] y = MatMul(x, w)", {"w": W}, "B,64", "B,24", "KN"),
    "matmul of three dimensions": ("[fc] y = MatMul(x, w)", {"w": W}, "B,S,64", "B,S,24", "KN"),
    "transposed": ("t = Transpose <perm = [1, 0]> (w) [fc] y = MatMul(x, t)", {"w": turned(W)}, "B,64", "B,24", "NK"),
    "transposed by default": ("t = Transpose (w) [fc] y = MatMul(x, t)", {"w": turned(W)}, "B,64", "B,24", "NK"),
    "batch of one": ("[fc] y = MatMul(x, w)", {"w": W[None]}, "B,S,64", "B,S,24", "1KN"),
    "gemm": ("[fc] y = Gemm(x, w)", {"w": W}, "B,64", "B,24", "KN"),
    "gemm with bias": ("[fc] y = Gemm(x, w, b)", {"w": W, "b": np.zeros(24, np.float32)}, "B,64", "B,24", "KN"),
    "gemm transB": ("[fc] y = Gemm <transB = 1> (x, w)", {"w": turned(W)}, "B,64", "B,24", "NK"),
    "gemm transB with bias": (
        "[fc] y = Gemm <alpha = 1.0, beta = 1.0, transA = 0, transB = 1> (x, w, b)",
        {"w": turned(W), "b": np.zeros(24, np.float32)},
        "B,64",
        "B,24",
        "NK",
    ),
    "conv 1-D": ("[fc] y = Conv(x, w)", {"w": turned(W)[..., None]}, "B,64,T", "B,24,T", "N:64,1"),
    "conv 2-D": (
        "[fc] y = Conv <kernel_shape = [1, 1], strides = [1, 1], pads = [0, 0, 0, 0]> (x, w, b)",
        {"w": turned(W)[..., None, None], "b": np.zeros(24, np.float32)},
        "B,64,H,V",
        "B,24,H,V",
        "N:64,1,1",
    ),
}


@pytest.mark.parametrize("case", LINEAR)
def test_a_linear_layer_is_found_and_its_weight_is_n_by_k(case):
    text, weights, shape, out, layout = LINEAR[case]
    model = linear(text, weights, shape, out)
    site = the_site(model)
    assert (site.name, site.role, site.layout, site.rows, site.columns) == ("fc", "linear", layout, 24, 64)
    assert site.input.name == "x"
    assert site.nested == ""
    assert (site.transpose is not None) == ("Transpose" in text)
    weight = read_weight(site)
    assert weight.dtype == np.float32
    assert weight.flags.c_contiguous
    assert np.array_equal(weight, W.T)
    x = normal([{"B": 2, "S": 3, "T": 5, "H": 2, "V": 3}.get(size) or int(size) for size in shape.split(",")], 1)
    axis = input_feature_axis(site)
    (y,) = run(model, {"x": x})
    want = np.moveaxis(np.moveaxis(x, axis, -1) @ weight.T, -1, axis)
    assert np.allclose(y, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_weights_are_sites_with_scales_of_their_own_type(dtype):
    import ml_dtypes

    kind = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    model = parse(f"g ({dtype}[B,64] x) => ({dtype}[B,24] y) {{ [fc] y = MatMul(x, w) }}", {"w": W.astype(kind)})
    site = the_site(model)
    assert site.scale_dtype == dtype
    assert np.array_equal(read_weight(site), W.astype(kind).astype(np.float32).T)


TABLE = normal((512, 32), 1)


def lookup(text, weights):
    return parse(f"g (int64[B,S] i) => (float[B,S,32] y) {{ {text} }}", weights)


@pytest.mark.parametrize(
    ("text", "table", "layout"),
    [
        ("[embed] y = Gather(t, i)", TABLE, "NK"),
        ("[embed] y = Gather <axis = 0> (t, i)", TABLE, "NK"),
        ("[embed] y = Gather <axis = -2> (t, i)", TABLE, "NK"),
        ("u = Transpose(t) [embed] y = Gather(u, i)", turned(TABLE), "KN"),
    ],
)
def test_a_lookup_table_is_found(text, table, layout):
    site = the_site(lookup(text, {"t": table}))
    assert (site.name, site.role, site.layout, site.rows, site.columns) == ("embed", "embedding", layout, 512, 32)
    assert site.input.name == "i"
    assert np.array_equal(read_weight(site), TABLE)


# text, weights, what the reason says; None: nothing that looks like a site, and no reason
SMALL = {"w": normal((8, 8), 2), "v": normal((8, 8), 3)}
INT8 = {"w": np.ones((8, 8), np.int8), "s": np.full((), 0.5, np.float32), "z": np.zeros((), np.int8)}
REFUSED = {
    "constant on the left": ("[n] y = MatMul(w, x)", SMALL, "the constant is the left operand"),
    "two constants": ("c = MatMul(w, v) y = Add(x, c)", SMALL, "both operands are constants"),
    "two activations": ("[n] y = MatMul(x, x)", {}, None),
    "batch of weights": ("[n] y = MatMul(x, w)", {"w": normal((4, 8, 8), 3)}, r"a batch of .* \[4, 8, 8\]"),
    "vector": ("[n] y = MatMul(x, w)", {"w": normal(8, 3)}, r"shape \[8\] is not one matrix"),
    "batch of one over a matrix": ("[n] y = MatMul(x, w)", {"w": normal((1, 8, 8), 3)}, "is not one matrix"),
    "integers": (
        "i = Cast <to = 6> (x) [n] j = MatMul(i, w) y = Cast <to = 1> (j)",
        {"w": np.ones((8, 8), np.int32)},
        None,
    ),
    "alpha": ("[n] y = Gemm <alpha = 0.5> (x, w)", SMALL, "alpha = 0.5"),
    "beta": ("[n] y = Gemm <beta = 2.0> (x, w, v)", SMALL, "beta = 2.0"),
    "transA": ("[n] y = Gemm <transA = 1> (x, w)", SMALL, "transA = 1"),
    "gemm of a transposed weight": ("t = Transpose(w) [n] y = Gemm(x, t)", SMALL, "fold the transposition"),
    "cast weight": (
        "c = Cast <to = 1> (w) [n] y = MatMul(x, c)",
        {"w": np.ones((8, 8), np.float16)},
        "is behind Cast; fold",
    ),
    "reshaped weight": (
        "c = Reshape(w, s) [n] y = MatMul(x, c)",
        {"w": normal(64, 1), "s": np.array([8, 8])},
        "is behind Reshape; fold",
    ),
    "scaled by an activation": ("c = Mul(w, x) [n] y = MatMul(x, c)", SMALL, None),
    "double": (
        "d = Cast <to = 11> (x) [n] e = MatMul(d, w) y = Cast <to = 1> (e)",
        {"w": np.ones((8, 8))},
        "a float64 weight has no kernel",
    ),
    "codes behind a cast": (
        "c = Cast <to = 1> (w) m = Mul(c, s) [n] y = MatMul(x, m)",
        INT8,
        "quantized already: int8 codes behind Cast -> Mul",
    ),
    "codes behind DequantizeLinear": (
        "m = DequantizeLinear(w, s, z) t = Transpose(m) [n] y = MatMul(x, t)",
        INT8,
        "quantized already: int8 codes behind DequantizeLinear -> Transpose",
    ),
    "gemm of codes": ("m = DequantizeLinear(w, s, z) [n] y = Gemm(x, m)", INT8, "quantized already"),
    "matmul nbits": (
        "[n] y = com.microsoft.MatMulNBits <K = 8, N = 8, bits = 4, block_size = 16> (x, q, sc)",
        {"q": np.zeros((8, 1, 8), np.uint8), "sc": np.ones((8, 1), np.float32)},
        "quantized already: MatMulNBits",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_site_is_named_with_the_reason(case):
    text, weights, reason = REFUSED[case]
    sites, refusals = find_sites(linear(text, weights, "8,8", "8,8"))
    assert sites == []
    if reason is None:
        assert refusals == []
    else:
        (refusal,) = refusals
        assert Pattern("re:" + reason).matches((refusal.reason,))
        assert refusal.name == ("n" if "[n]" in text else "MatMul")
        assert not refusal.reason.endswith(".")


KERNEL1 = normal((8, 8, 1), 4)
CONVOLUTIONS = {
    "kernel of three": ("[n] y = Conv(x, w)", normal((8, 8, 3), 4), r"a kernel of \[3\]"),
    "groups": ("[n] y = Conv <group = 8> (x, w)", normal((8, 1, 1), 4), "8 groups"),
    "depthwise with a wide kernel": ("[n] y = Conv <group = 8> (x, w)", normal((8, 1, 3), 4), r"a kernel of \[3\]"),
    "stride": ("[n] y = Conv <strides = [2]> (x, w)", KERNEL1, "stride or padding"),
    "padding": ("[n] y = Conv <pads = [1, 1]> (x, w)", KERNEL1, "stride or padding"),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_that_are_no_linear_layer_say_why(case):
    text, weight, reason = CONVOLUTIONS[case]
    (site,), refusals = find_sites(linear(text, {"w": weight}, "B,8,T", "B,8,U"))
    assert refusals == []
    assert (site.role, site.rows, site.columns) == ("conv", 8, weight[0].size)
    assert Pattern("re:" + reason).matches((site.not_linear,))
    assert np.array_equal(read_weight(site), weight.reshape(8, -1))


def test_a_transposed_convolution_is_refused():
    sites, (refusal,) = find_sites(linear("[n] y = ConvTranspose(x, w)", {"w": KERNEL1}, "B,8,T", "B,8,U"))
    assert sites == []
    assert refusal.reason == "a transposed convolution has no integer kernel"


def test_quantized_convolutions_are_recognized():
    weights = {"w": np.ones((8, 8, 1), np.int8), "s": np.full((), 0.5, np.float32), "z": np.zeros((), np.int8)}
    _, (refusal,) = find_sites(linear("m = DequantizeLinear(w, s, z) [n] y = Conv(x, m)", weights, "B,8,T", "B,8,T"))
    assert refusal.reason == "quantized already: int8 codes behind DequantizeLinear"


def test_recurrent_layers_are_refused():
    weights = {"w": normal((1, 32, 16), 1), "r": normal((1, 32, 8), 2)}
    text = "g (float[T,B,16] x) => (float[T,1,B,8] y) { [rnn] y = LSTM <hidden_size = 8> (x, w, r) }"
    sites, (refusal,) = find_sites(parse(text, weights))
    assert sites == []
    reason = "no weight-only kernel runs an LSTM; w8a8-dynamic runs it on integers on the CPU"
    assert (refusal.name, refusal.reason) == ("rnn", reason)


@pytest.mark.parametrize(
    ("text", "weights", "reason"),
    [
        ("[n] y = Gather(t, i)", {"t": TABLE[:500]}, "a table of 500 x 32 is too small to gain"),
        ("[n] g = Gather <axis = 1> (t, i) y = Transpose <perm = [1, 2, 0]> (g)", {"t": turned(TABLE)}, None),
        ("[n] y = Gather(t, i)", {"t": TABLE[:, None]}, None),
        (
            "d = DequantizeLinear(t, s) [n] y = Gather(d, i)",
            {"t": np.ones((512, 32), np.int8), "s": np.full((), 0.5, np.float32)},
            "quantized already: int8 codes behind DequantizeLinear",
        ),
    ],
    ids=["small", "columns", "three dimensions", "codes"],
)
def test_tables_that_are_none(text, weights, reason):
    sites, refusals = find_sites(lookup(text, weights))
    assert sites == []
    assert [refusal.reason.startswith(reason or "") for refusal in refusals] == ([True] if reason else [])


def test_rows_that_a_constant_chooses_are_no_lookup():
    text = "g (float[B,32] x) => (float[B,32] y) { r = Gather(t, i) y = Add(x, r) }"
    assert find_sites(parse(text, {"t": TABLE, "i": np.array(3)})) == ([], [])


TIED = """g (int64[B,S] i) => (float[B,S,512] y) {{
    {before} [embed] h = Gather({table}, i) n = Relu(h) {between} [head] y = MatMul(n, {weight})
}}"""


@pytest.mark.parametrize("way", ["table stored by rows", "table stored by columns"])
def test_a_tied_projection_is_the_head_whichever_way_the_weight_is_stored(way):
    if way == "table stored by rows":
        text = TIED.format(before="", table="t", between="w = Transpose(t)", weight="w")
        model, layouts = parse(text, {"t": TABLE}), ["NK", "NK"]
    else:
        text = TIED.format(before="u = Transpose(t)", table="u", between="", weight="t")
        model, layouts = parse(text, {"t": turned(TABLE)}), ["KN", "KN"]
    table, head = find_sites(model)[0]
    assert [site.role for site in (table, head)] == ["embedding", "lm_head"]
    assert [site.layout for site in (table, head)] == layouts
    assert table.weight is head.weight
    assert np.array_equal(read_weight(table), TABLE)
    assert np.array_equal(read_weight(head), TABLE)


def test_the_head_is_as_wide_as_a_table_and_read_by_no_other_site():
    roles = {site.name: site.role for site in find_sites(decoder())[0]}
    assert roles.pop("embed") == "embedding"
    assert roles.pop("head") == "lm_head"
    assert set(roles.values()) == {"linear"}
    text = """g (int64[B,S] i) => (float[B,S,32] y) {
        [embed] h = Gather(t, i) [wide] a = MatMul(h, w) r = Relu(a) [back] y = MatMul(r, v)
    }"""
    model = parse(text, {"t": TABLE, "w": normal((32, 512), 1), "v": normal((512, 32), 2)})
    assert [site.role for site in find_sites(model)[0]] == ["embedding", "linear", "linear"]


def test_without_a_table_there_is_no_head():
    assert the_site(linear("[fc] y = MatMul(x, w)", {"w": W})).role == "linear"


# Names.


def scoped(model, scopes):
    for node, scope in zip(model.graph, scopes, strict=True):
        node.metadata_props["pkg.torch.onnx.name_scopes"] = repr(scope)
    return model


TWO = "g (float[B,8] x) => (float[B,8] y) { [a] h = MatMul(x, w) [b] y = MatMul(h, v) }"


def test_a_site_has_its_module_its_node_and_its_weight_for_names():
    model = scoped(parse(TWO, SMALL), [["", "model", "model.up", "matmul"], ["", "model", "model.down", "matmul"]])
    first, second = find_sites(model)[0]
    assert first.names == ("model.up", "a", "w")
    assert (first.name, second.name) == ("model.up", "model.down")
    assert all(Pattern(name).matches(first.names) for name in ("model.up", "a", "w", "re:up$", "re:^model"))
    assert not Pattern("re:up$").matches(second.names)


def test_a_name_that_two_sites_share_gives_way_to_the_next():
    model = scoped(parse(TWO, SMALL), [["model", "model.block", "matmul"]] * 2)
    assert [site.name for site in find_sites(model)[0]] == ["a", "b"]
    unnamed = parse(TWO.replace("[a]", "").replace("[b]", ""), SMALL)
    assert [site.name for site in find_sites(unnamed)[0]] == ["w", "v"]


def test_sites_without_a_name_of_their_own_have_that_of_their_result():
    """Two unnamed nodes read one weight; a pattern can still tell them apart, or mean both."""
    text = "g (float[B,8] x) => (float[B,8] y) { h = MatMul(x, w) y = MatMul(h, w) }"
    first, second = find_sites(parse(text, SMALL | {"v": normal(1, 1)}))[0]
    assert [site.name for site in (first, second)] == ["h", "y"]
    assert first.names == ("w", "h")
    assert Pattern("w").matches(first.names)
    assert Pattern("w").matches(second.names)
    assert not Pattern("h").matches(second.names)


def test_a_name_stays_when_the_sites_around_it_change():
    """Reports join what passes say by name; here the first site is lowered and would free the weight's name."""
    text = "g (float[B,64] x) => (float[B,64] y) { h = MatMul(x, w) r = Relu(h) y = MatMul(r, w) }"
    model = parse(text, {"w": normal((64, 64), 1)})
    apply("assign_scheme", model)
    first, second = find_sites(model)[0]
    assert [first.name, second.name] == ["h", "y"]
    model.graph.outputs[0] = first.node.outputs[0]
    model.graph.remove([node for node in model.graph if node is not first.node], safe=False)
    assert the_site(model).name == "h"


@pytest.mark.parametrize("scopes", [None, "", "not a list", "['only']", "[1, 2]", "{}"])
def test_scopes_that_say_nothing_are_no_module(scopes):
    model = parse(TWO, SMALL)
    node = model.graph[0]
    if scopes is not None:
        node.metadata_props["pkg.torch.onnx.name_scopes"] = scopes
    assert module_path(node) == ""
    assert find_sites(model)[0][0].name == "a"


# Bodies.

LOOP = """g (int64 n, bool go, float[B,8] x) => (float[B,8] y) {
    [loop] y = Loop (n, go, x) <body = step (int64 i, bool c, float[B,8] h) => (bool d, float[B,8] k) {
        [inner] m = MatMul(h, w) k = Relu(m) d = Identity(c)
        }>
}"""
NESTED = """g (bool p, bool q, float[B,8] x) => (float[B,8] y) {
    [outer] y = If (p) <then_branch = a () => (float[B,8] s) {
            [mid] s = If (q) <then_branch = b () => (float[B,8] t) { [deep] t = MatMul(x, own) },
                else_branch = c () => (float[B,8] u) { [other] u = MatMul(x, w) }>
        }, else_branch = d () => (float[B,8] v) { v = Relu(x) }>
}"""


def test_sites_in_bodies_are_found_with_the_outermost_node_around_them():
    (site,) = find_sites(parse(LOOP, SMALL))[0]
    assert (site.name, site.nested) == ("inner", "loop")
    model = parse(NESTED, {"w": SMALL["w"], "b.own": SMALL["v"]})
    deep, other = find_sites(model)[0]
    assert [(site.name, site.nested) for site in (deep, other)] == [("deep", "outer"), ("other", "outer")]
    assert np.array_equal(read_weight(deep), SMALL["v"].T)
    assert other.weight.graph is model.graph
    assert deep.weight.graph is not model.graph
    unnamed = parse(NESTED.replace("[outer]", ""), {"w": SMALL["w"], "b.own": SMALL["v"]})
    assert [site.nested for site in find_sites(unnamed)[0]] == ["If", "If"]


@pytest.mark.parametrize("count", [2, 3])
def test_every_use_of_a_shared_weight_is_a_site(count):
    steps = " ".join(f"[n{i}] h{i + 1} = MatMul(h{i}, w)" for i in range(count))
    model = parse(f"g (float[B,8] h0) => (float[B,8] h{count}) {{ {steps} }}", {"w": SMALL["w"]})
    sites = find_sites(model)[0]
    assert [site.name for site in sites] == [f"n{i}" for i in range(count)]
    assert len({site.weight for site in sites}) == 1


def test_a_weight_may_be_an_output_or_be_listed_among_the_inputs():
    text = "g (float[B,8] x) => (float[B,8] y, float[8,8] w) { [fc] y = MatMul(x, w) }"
    assert the_site(parse(text, {"w": SMALL["w"]})).name == "fc"
    text = "g (float[B,8] x, float[8,8] w) => (float[B,8] y) { [fc] y = MatMul(x, w) }"
    assert the_site(parse(text, {"w": SMALL["w"]}, opset=8, ir_version=3)).name == "fc"
    assert find_sites(parse(text, {})) == ([], [])


def test_products_of_two_activations():
    """Attention's; neither sites, nor what reads a weight behind other operators."""
    text = """g (float[B,64] x) => (float[B,B] y) {
        [site] a = MatMul(x, w) t = Transpose(w) [tied] b = MatMul(x, t)
        c = DequantizeLinear(codes, scale) [decoded] d = MatMul(x, c) u = Transpose(x) [left] e = MatMul(w, u)
        [scores] f = MatMul(a, u) g = Relu(f) h = Relu(e) [mix] y = MatMul(g, f) }"""
    weights = {"w": normal((64, 64), 0), "codes": np.ones((64, 64), np.int8), "scale": np.array(0.1, np.float32)}
    assert [node.name for node in find_products(parse(text, weights).graph)] == ["scores", "mix"]
