"""Channels put in the order of their size: the model computes the same, and its groups are more even."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.errors import SchemeError
from qcompiler.graph import SCHEME_KEY, read_weight
from qcompiler.numerics.affine import min_max_grid
from qcompiler.passes import load
from qcompiler.passes.base import site_spec
from qcompiler.scheme import Scheme
from qcompiler.sites import find_sites
from tests.builders import (
    apply,
    assigned,
    context,
    decoder,
    normal,
    parse,
    run,
    site_named,
    text_of,
    token_batches,
)

K, H, N = 64, 96, 24
W4 = "w4a16-g16-asym"
GATED = "[gate] a = MatMul(x, wg) [up] b = MatMul(x, wu) s = Sigmoid(a) t = Mul(a, s) h = Mul(t, b)"


def uneven(columns, rows, seed):
    """A weight [K, N] as MatMul reads it, whose input channels are of all sizes, in random order."""
    sizes = np.random.default_rng(seed + 50).permutation(np.geomspace(0.1, 1.0, columns))
    return (normal((columns, rows), seed, scale=columns**-0.5) * sizes[:, None]).astype(np.float32)


WEIGHTS = {
    "wg": uneven(K, H, 1),
    "wu": uneven(K, H, 2),
    "wd": uneven(H, N, 3),
    "bg": normal(H, 4),
    "bu": normal(H, 5),
    "half": np.array([0.5], np.float32),
    "gains": normal(H, 6),
}
X = {"x": normal((5, K), 7)}


def mlp(body=GATED, scheme=W4, **options):
    text = f"g (float[B,{K}] x) => (float[B,{N}] y) {{ {body} [down] y = MatMul(h, wd) }}"
    return assigned(parse(text, {name: w for name, w in WEIGHTS.items() if name in text}, **options), scheme)


def reordered(model, **options):
    """The result of the pass; asserts that the model computes what it did."""
    before = run(model, X)
    result = apply("reorder", model, context(scheme=W4), **options)
    for was, now in zip(before, run(model, X), strict=True):
        np.testing.assert_allclose(now, was, rtol=2e-5, atol=2e-5)
    return result


def gathers(model):
    return sum(" = Gather(" in line for line in text_of(model))


def records(result):
    return {record.site: record for record in result.records}


def squared_scales(model, name):
    site = site_named(model, name)
    return float(np.square(min_max_grid(read_weight(site), site_spec(site, context(scheme=W4).config)).scale).mean())


def test_rows_follow_where_elementwise_operators_are_between_and_a_gather_does_it_elsewhere():
    model = mlp()
    before = {name: squared_scales(model, name) for name in ("gate", "up", "down")}
    result = reordered(model)
    assert [line.split(" = ")[1].split("(")[0] for line in text_of(model)] == [
        "Gather", "MatMul", "MatMul", "Sigmoid", "Mul", "Mul", "MatMul",
    ]  # fmt: skip
    found = records(result)
    assert found["down"].reason == "reordered with the rows of up, gate"
    assert found["gate"].reason == "reordered behind a Gather: 'x' is an input or output of the model"
    assert {record.action for record in result.records} == {"rewritten"}
    after = {name: squared_scales(model, name) for name in before}
    assert after["down"] / before["down"] == pytest.approx(1 - found["down"].metrics["gain"])
    assert after["down"] < 0.85 * before["down"]
    assert after["gate"] + after["up"] < 0.95 * (before["gate"] + before["up"])


def test_the_order_is_that_of_the_channels_sizes():
    model = mlp()
    plain = read_weight(site_named(model, "down"))
    order = np.argsort(np.square(plain).mean(0))
    rows = read_weight(site_named(model, "up"))[order]
    reordered(model)
    np.testing.assert_array_equal(read_weight(site_named(model, "down")), plain[:, order])
    together = np.log(np.square(WEIGHTS["wg"].T).mean(0)) + np.log(np.square(WEIGHTS["wu"].T).mean(0))
    np.testing.assert_array_equal(read_weight(site_named(model, "up")), rows[:, np.argsort(together)])


@pytest.mark.parametrize(
    "body",
    [
        "[gate] a = Gemm(x, wg, bg) h = Relu(a)",
        "[gate] a = MatMul(x, wg) b = Add(bg, a) c = Mul(b, half) d = Mul(c, gains) h = Tanh(d)",
        "[gate] a = MatMul(x, wg) [up] u = Gemm(x, wu, bu) c = Add(a, u) h = Identity(c)",
    ],
)
def test_biases_and_gains_follow(body):
    result = reordered(mlp(body))
    assert records(result)["down"].reason.startswith("reordered with the rows of ")


OTHERS = {
    "another reader": (GATED + " z = Softmax(h)", "Softmax 'z' reads it too"),
    "a norm": ("[gate] a = MatMul(x, wg) h = LayerNormalization(a, gains)", "needs the order"),
    "an unknown operator": ("[gate] a = MatMul(x, wg) h = Softmax(a)", "needs the order"),
    "another way": ("[gate] a = MatMul(x, wg) r = ReduceSum(x) h = Mul(a, r)", "ReduceSum 'r' needs the order"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_needs_its_channels_in_order_gets_a_gather(case):
    body, reason = OTHERS[case]
    model = mlp(body)
    result = reordered(model)
    assert reason in records(result)["down"].reason
    assert gathers(model) == 2


def test_a_gather_can_be_refused():
    model = mlp()
    result = reordered(model, gather=False)
    assert gathers(model) == 0
    assert records(result)["gate"].action == "skipped"
    assert records(result)["down"].action == "rewritten"


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ("w4a16-channel", "not reordered: 'gate' has one group for all of its channels"),
        ("w8a8-dynamic", "not reordered: the activations of 'gate' are quantized"),
    ],
)
def test_schemes_that_gain_nothing(scheme, reason):
    model = mlp(scheme=scheme)
    before = text_of(model)
    result = reordered(model)
    assert records(result)["gate"].reason == reason
    assert (result.modified, text_of(model)) == (False, before)


def test_what_gains_little_is_left_alone():
    model = mlp()
    for name, shape in (("wg", (K, H)), ("wu", (K, H)), ("wd", (H, N))):
        model.graph.initializers[name].const_value = ir.tensor(normal(shape, 11), name=name)
    result = reordered(model, least=0.5)
    assert {record.action for record in result.records} == {"skipped"}
    assert "it would gain " in result.records[0].reason


def test_a_weight_that_is_read_twice_stays():
    body = "[a] a = MatMul(x, wg) [b] b = MatMul(z, wg) y = Add(a, b)"
    text = f"g (float[B,{K}] x, float[B,{K}] z) => (float[B,{H}] y) {{ {body} }}"
    model = assigned(parse(text, {"wg": WEIGHTS["wg"]}), W4)
    result = apply("reorder", model, context(scheme=W4))
    assert [record.reason for record in result.records] == [
        f"not reordered: the weight of '{name}' is read elsewhere too" for name in "ab"
    ]


def test_a_decoder_computes_the_same_on_more_even_groups():
    model = decoder()
    linear = [site for site in find_sites(model)[0] if site.role == "linear"]
    for number, site in enumerate(linear):
        stored = site.weight.const_value.numpy()  # [K, N]
        sizes = np.random.default_rng(number).permutation(np.geomspace(0.2, 2, len(stored)))
        site.weight.const_value = ir.tensor((stored * sizes[:, None]).astype(np.float32), name=site.weight.name)
        site.node.metadata_props[SCHEME_KEY] = str(Scheme.parse("w4a16-g16-asym").resolve("cpu"))
    feeds = token_batches()[0]
    expected, before = run(model, feeds)[0], [squared_scales(model, site.name) for site in linear]
    result = apply("reorder", model, context(scheme=W4))
    np.testing.assert_allclose(run(model, feeds)[0], expected, rtol=1e-4, atol=1e-4)
    reasons = [record.reason for record in result.records]
    assert sum(reason.startswith("reordered with the rows of") for reason in reasons) == 2  # the down projections
    assert sum(reason.startswith("reordered within heads, with the rows of") for reason in reasons) == 2
    after = [squared_scales(model, site.name) for site in linear]
    assert sum(after) < 0.95 * sum(before)


@pytest.mark.parametrize("least", [-0.1, 1.5])
def test_options_that_mean_nothing(least):
    with pytest.raises(SchemeError, match="least="):
        load("reorder")(context(), {"least": least})
