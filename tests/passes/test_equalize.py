"""Ranges of layers that follow one another; ONNX Runtime runs the graph before and after."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.errors import SchemeError
from qcompiler.passes import load
from qcompiler.passes.equalize import equalized
from tests.builders import apply, context, normal, only, parse, run, text_of


def uneven(shape, seed, axis=0, decades=2.0):
    """Normal values whose range goes over `decades` powers of ten along an axis, in random order."""
    weights = normal(shape, seed)
    factors = 10 ** (decades * np.random.default_rng(seed + 100).permutation(np.linspace(-0.5, 0.5, shape[axis])))
    return (weights * factors.reshape([-1 if i == axis else 1 for i in range(len(shape))])).astype(np.float32)


X = "float[B,3,12,12] x"
FIRST = "[first] c = Conv <pads = [1, 1, 1, 1]> (x, w, b)"
SECOND = "[second] y = Conv (d, v)"
WEIGHTS = {"w": uneven((8, 3, 3, 3), 1), "b": normal(8, 2), "v": uneven((4, 8, 3, 3), 3, axis=1)}


def model_of(between, weights=WEIGHTS, **options):
    return parse(f"g ({X}) => (float[B,C,H,W] y) {{ {FIRST} {between} {SECOND} }}", weights, **options)


def largest(model, name, axis):
    weight = np.abs(model.graph.initializers[name].const_value.numpy().astype(np.float64))
    return weight.max(tuple(i for i in range(weight.ndim) if i != axis))


def proportional(first, second, rtol=1e-4):
    ratio = first / second
    return np.allclose(ratio, ratio.mean(), rtol=rtol)


BETWEEN = {
    "Relu": "d = Relu(c)",
    "LeakyRelu": "d = LeakyRelu <alpha = 0.2> (c)",
    "PRelu": "d = PRelu(c, slope)",
    "Identity": "d = Identity(c)",
    "Relu and pooling": "r = Relu(c) d = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)",
    "average": "r = Relu(c) d = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (r)",
    "a Clip without an end": "d = Clip(c, zero)",
}


@pytest.mark.parametrize("case", BETWEEN)
def test_a_pair_computes_the_same_with_equal_ranges(case):
    extra = {"slope": normal((8, 1, 1), 5), "zero": np.array(0, np.float32)}
    model = model_of(BETWEEN[case], {**WEIGHTS, **extra})
    x = {"x": normal((2, 3, 12, 12), 9)}
    (want,) = run(model, x)
    before = text_of(model)
    r1, r2 = largest(model, "w", 0), largest(model, "v", 1)
    result = apply("equalize", model)
    assert result.modified
    assert text_of(model) == before
    assert np.allclose(run(model, x)[0], want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    # Eq. 11, but for a factor that all channels share.
    scale = np.sqrt(r1 / r2)
    scale /= np.exp(np.log(scale).mean())
    assert np.allclose(largest(model, "w", 0), r1 / scale, rtol=1e-5)
    assert np.allclose(largest(model, "v", 1), r2 * scale, rtol=1e-5)
    assert proportional(largest(model, "w", 0), largest(model, "v", 1))
    bias = model.graph.initializers["b"].const_value.numpy()
    assert np.allclose(bias, WEIGHTS["b"] / scale, rtol=1e-5)
    record, last = result.records
    assert (record.site, record.action, record.reason) == ("first", "scaled", "equalized with 'second'")
    assert record.metrics["largest_scale"] == pytest.approx(max(scale.max(), 1 / scale.min()))
    assert record.metrics["spread_before"] == pytest.approx(max(r1.max() / r1.min(), r2.max() / r2.min()))
    assert record.metrics["spread_after"] == pytest.approx(np.sqrt(r1 * r2).max() / np.sqrt(r1 * r2).min())
    assert (last.site, last.action) == ("second", "skipped")
    assert last.reason == "not equalized: its result is an output of the model"
    again = apply("equalize", model)
    assert not again.modified
    assert again.records[0].reason == "not equalized: its ranges are equal already"


CHAINS = {
    "depthwise in the middle": (
        "[a] c = Conv (x, w, b) d = Relu(c) [dw] e = Conv <group = 8, pads = [1, 1, 1, 1]> (d, k, l) f = Relu(e) "
        "[z] y = Conv (f, v)",
        {"k": uneven((8, 1, 3, 3), 4), "l": normal(8, 5)}, ["a", "dw"],
    ),
    "a depthwise multiplier": (
        "[a] c = Conv (x, w, b) [dw] e = Conv <group = 8> (c, k) [z] y = Conv (e, u)",
        {"k": uneven((16, 1, 3, 3), 4), "u": uneven((4, 16, 1, 1), 6, axis=1)}, ["a", "dw"],
    ),
    "groups": (
        "[a] c = Conv (x, w, b) d = Relu(c) [g] e = Conv <group = 2> (d, k) f = Relu(e) [z] y = Conv (f, v)",
        {"k": uneven((8, 4, 3, 3), 4)}, ["a", "g"],
    ),
    "transposed": (
        "[a] c = Conv (x, w, b) d = Relu(c) [t] e = ConvTranspose <strides = [2, 2]> (d, k, l) f = Relu(e) "
        "[z] y = Conv (f, v)",
        {"k": uneven((8, 8, 2, 2), 4, axis=1), "l": normal(8, 5)}, ["a", "t"],
    ),
    "transposed in groups": (
        "[a] c = Conv (x, w, b) [t] e = ConvTranspose <group = 4> (c, k) [z] y = Conv (e, u)",
        {"k": uneven((8, 3, 2, 2), 4, axis=0), "u": uneven((4, 12, 1, 1), 6, axis=1)}, ["a", "t"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CHAINS)
def test_a_chain_is_balanced_pair_by_pair(case):
    text, extra, names = CHAINS[case]
    model = parse(f"g ({X}) => (float[B,C,H,W] y) {{ {text} }}", {**WEIGHTS, **extra})
    x = {"x": normal((2, 3, 12, 12), 9)}
    (want,) = run(model, x)
    result = apply("equalize", model)
    assert only(result, "scaled") == names
    assert only(result, "skipped") == ["z"]
    assert np.allclose(run(model, x)[0], want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_a_depthwise_chain_ends_with_three_like_ranges():
    """At the optimum a channel has, within each of the three layers, the same share of the range."""
    text, extra, _ = CHAINS["depthwise in the middle"]
    model = parse(f"g ({X}) => (float[B,C,H,W] y) {{ {text} }}", {**WEIGHTS, **extra})
    product = largest(model, "w", 0) * largest(model, "k", 0) * largest(model, "v", 1)
    apply("equalize", model, limit=1e4)
    for name, axis in (("w", 0), ("k", 0), ("v", 1)):
        assert proportional(largest(model, name, axis), np.cbrt(product), rtol=1e-2)


@pytest.mark.parametrize("flags", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_fully_connected_layers(flags):
    text = f"""g (float[B,6] x) => (float[B,5] y) {{
        [first] c = Gemm <transB = {flags[0]}, alpha = 0.7> (x, w, b) d = Relu(c)
        [second] y = Gemm <transB = {flags[1]}> (d, v) }}"""
    w, v = uneven((6, 8), 1, axis=1), uneven((8, 5), 2)
    weights = {"w": w.T.copy() if flags[0] else w, "v": v.T.copy() if flags[1] else v, "b": normal((1, 8), 3)}
    model = parse(text, weights)
    x = {"x": normal((7, 6), 9)}
    (want,) = run(model, x)
    assert only(apply("equalize", model), "scaled") == ["first"]
    assert np.allclose(run(model, x)[0], want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    assert proportional(largest(model, "w", 1 - flags[0]), largest(model, "v", flags[1]))


def test_the_arithmetic_is_that_of_a_naive_loop():
    rng = np.random.default_rng(0)
    first, second = np.exp(rng.standard_normal((1, 5, 4))), np.exp(rng.standard_normal((1, 3, 5)))
    wants = [np.sqrt(first[0, i].max() / second[0, :, i].max()) for i in range(5)]
    (scale,) = equalized([first, second], [(0, 1)], 100.0)
    assert np.allclose(scale, wants / np.prod(wants) ** (1 / 5), rtol=1e-12)
    for i in range(5):
        assert np.isclose(first[0, i].max() / first.max(), second[0, :, i].max() / second.max(), rtol=1e-12)


def test_a_factor_that_all_channels_share_is_left_where_it_is():
    """A whole layer that is a million times larger than the next one is as easy to quantize as any other."""
    rng = np.random.default_rng(0)
    first, second = np.exp(rng.standard_normal((1, 5, 4))), np.exp(rng.standard_normal((1, 3, 5)))
    (want,) = equalized([first.copy(), second.copy()], [(0, 1)], 100.0)
    (got,) = equalized([1e6 * first, second], [(0, 1)], 100.0)
    assert np.allclose(got, want, rtol=1e-9)


def test_dead_channels_keep_their_scale():
    weights = {name: array.copy() for name, array in WEIGHTS.items()}
    weights["w"][2] = 0
    weights["v"][:, 5] = 1e-39
    model = model_of("d = Relu(c)", weights)
    x = {"x": normal((2, 3, 12, 12), 9)}
    (want,) = run(model, x)
    apply("equalize", model)
    assert np.allclose(run(model, x)[0], want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    after = {name: model.graph.initializers[name].const_value.numpy() for name in "wvb"}
    for i in (2, 5):
        assert np.array_equal(after["w"][i], weights["w"][i])
        assert np.array_equal(after["v"][:, i], weights["v"][:, i])
        assert after["b"][i] == weights["b"][i]


def test_no_channel_is_scaled_by_more_than_the_limit():
    model = model_of("d = Relu(c)")
    x = {"x": normal((2, 3, 12, 12), 9)}
    (want,) = run(model, x)
    record = apply("equalize", model, limit=2).records[0]
    assert record.metrics["largest_scale"] == pytest.approx(2)
    ratio = WEIGHTS["b"] / model.graph.initializers["b"].const_value.numpy()
    assert 0.499 < ratio.min() < ratio.max() < 2.001
    assert np.allclose(run(model, x)[0], want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


LIMITS = {"zero": np.array(0, np.float32), "six": np.array(6, np.float32)}


def test_a_bounded_clip_is_refused_or_approximated():
    model = model_of("[clip] d = Clip(c, zero, six)", {**WEIGHTS, **LIMITS})
    result = apply("equalize", model)
    assert not result.modified
    assert result.records[0].reason == (
        "not equalized: Clip at 6 does not commute with a scale; relu6=true approximates it by Relu"
    )
    small = {"x": normal((2, 3, 12, 12), 9, scale=0.01)}  # far below the bound, where nothing is approximated
    (want,) = run(model, small)
    result = apply("equalize", model, relu6="true")
    assert result.modified
    assert result.records[0].reason == "equalized with 'second', Clip turned into Relu"
    assert [node.op_type for node in model.graph] == ["Conv", "Relu", "Conv"]
    assert np.allclose(run(model, small)[0], want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_a_clip_with_attributes_is_known_too():
    model = parse(
        f"g ({X}) => (float[B,C,H,W] y) {{ {FIRST} d = Clip <min = 0.0, max = 6.0> (c) {SECOND} }}", WEIGHTS, opset=9
    )
    assert "Clip at 6" in apply("equalize", model).records[0].reason
    assert only(apply("equalize", model, relu6="true"), "scaled") == ["first"]


REFUSED = {
    "another reader": ("d = Relu(c) [r] e = Relu(c)", "", "its result has 2 readers"),
    "an output behind": ("d = Relu(c)", ", float[B,C,H,W] d", "its result is an output of the model"),
    "a sum": ("d = Add(c, one)", "", "Add does not commute with a scale"),
    "a sigmoid": ("d = Sigmoid(c)", "", "Sigmoid does not commute with a scale"),
    "a Clip from minus one": ("d = Clip(c, minus)", "", "Clip does not commute with a scale"),
    "a slope": ("[p] d = PRelu(x, c)", "", "its result is read by PRelu in a way that does not commute with a scale"),
    "a computed weight": ("d = Relu(c) t = Relu(v)", "", "the weight of 'second' is no constant"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_equalized_is_left_alone_with_the_reason(case):
    between, outputs, reason = REFUSED[case]
    second = SECOND.replace(", v", ", t") if case == "a computed weight" else SECOND
    text = f"g (float[B,8,12,12] x) => (float[B,C,H,W] y{outputs}) {{ {FIRST} {between} {second} }}"
    constants = {"one": np.array([1], np.float32), "minus": np.array(-1, np.float32)}
    model = parse(text, {**WEIGHTS, "w": uneven((8, 8, 3, 3), 1), **constants})
    before = text_of(model)
    result = apply("equalize", model)
    assert not result.modified
    assert text_of(model) == before
    record = result.records[0]
    assert (record.site, record.action, record.reason) == ("first", "skipped", f"not equalized: {reason}")
    assert np.array_equal(model.graph.initializers["v"].const_value.numpy(), WEIGHTS["v"])


def test_channels_that_do_not_match_are_refused():
    """A convolution over one input channel that reads eight is no valid model, but is not made worse."""
    model = model_of("d = Relu(c)", {**WEIGHTS, "v": normal((4, 1, 3, 3), 3)})
    assert apply("equalize", model).records[0].reason == "not equalized: 'second' reads 1 channels, not 8"


def test_shared_weights_are_untied():
    text = f"""g (float[B,8,9,9] x) => (float[B,C,H,W] y, float[B,D,K,L] z) {{
        {FIRST.replace(" <pads = [1, 1, 1, 1]>", "")} d = Relu(c) {SECOND} [third] z = Conv (x, w, b) }}"""
    weights = {"w": uneven((8, 8, 3, 3), 1), "b": normal(8, 2), "v": uneven((4, 8, 3, 3), 3, axis=1)}
    model = parse(text, weights)
    x = {"x": normal((2, 8, 9, 9), 9)}
    want = run(model, x)
    assert only(apply("equalize", model), "scaled") == ["first"]
    assert text_of(model) == ["c = Conv(x, w_first, b_first)", "d = Relu(c)", "y = Conv(d, v)", "z = Conv(x, w, b)"]
    for got, wanted in zip(run(model, x), want, strict=True):
        assert np.allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_a_weight_of_both_layers_of_a_pair():
    text = "g (float[B,8,9,9] x) => (float[B,C,H,W] y) { [first] c = Conv (x, w) d = Relu(c) [second] y = Conv (d, w) }"
    model = parse(text, {"w": uneven((8, 8, 3, 3), 1)})
    x = {"x": normal((2, 8, 9, 9), 9)}
    (want,) = run(model, x)
    assert only(apply("equalize", model), "scaled") == ["first"]
    assert np.allclose(run(model, x)[0], want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_half_precision_stays_half_precision():
    text = f"g ({X.replace('float', 'float16')}) => (float16[B,C,H,W] y) {{ {FIRST} d = Relu(c) {SECOND} }}"
    model = parse(text, {name: array.astype(np.float16) for name, array in WEIGHTS.items()})
    x = {"x": normal((2, 3, 12, 12), 9, "float16")}
    (want,) = run(model, x)
    assert only(apply("equalize", model), "scaled") == ["first"]
    assert {value.const_value.dtype for value in model.graph.initializers.values()} == {ir.DataType.FLOAT16}
    # Two roundings to 11 bits of each weight, before and after.
    assert np.allclose(run(model, x)[0], want, rtol=5e-3, atol=5e-3 * np.abs(want).max())


def test_what_would_exceed_half_precision_is_refused():
    weights = {**WEIGHTS, "b": np.full(8, 3e4)}
    text = f"g ({X.replace('float', 'float16')}) => (float16[B,C,H,W] y) {{ {FIRST} d = Relu(c) {SECOND} }}"
    model = parse(text, {name: array.astype(np.float16) for name, array in weights.items()})
    result = apply("equalize", model)
    assert not result.modified
    assert result.records[0].reason == "not equalized: a weight or bias would exceed the range of its type"


def test_a_model_without_layers_is_not_modified():
    result = apply("equalize", parse("g (float[B] x) => (float[B] y) { y = Relu(x) }"))
    assert (result.modified, result.records) == (False, ())


def test_its_options():
    kind = load("equalize")
    assert str(kind(context(), {"limit": "20", "relu6": "true"})) == "equalize{limit=20.0,relu6=True}"
    assert not kind.applies(context(scheme="w8a8").config)
    with pytest.raises(SchemeError, match="pass equalize has no option 'rounds'; it has: limit, relu6"):
        kind(context(), {"rounds": "3"})
