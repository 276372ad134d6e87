"""Adapters that an exporter left beside their weights become part of these."""

import re

import numpy as np
import pytest

from qcompiler.sites import find_sites
from tests.builders import apply, context, normal, parse, quantized, run

WEIGHTS = {
    "w": normal((24, 16), 0), "v": normal((16, 24), 1), "a": normal((24, 4), 2), "b": normal((4, 16), 3),
    "a_t": normal((4, 24), 2), "c": np.float32(0.5), "d": np.float32(4),
}  # fmt: skip
HEAD = "g (float[B,24] x) => (float[B,16] y)"


def model(body, head=HEAD):
    names = set(re.findall(r"\w+", body))
    return parse(f"{head} {{ {body} }}", {name: array for name, array in WEIGHTS.items() if name in names})


@pytest.mark.parametrize(
    "body",
    [
        "p = MatMul(x, w) q = MatMul(x, a) r = MatMul(q, b) y = Add(p, r)",
        "p = MatMul(x, w) q = MatMul(x, a) r = MatMul(q, b) s = Mul(r, c) y = Add(p, s)",
        "p = MatMul(x, w) m = Mul(x, c) q = MatMul(m, a) t = Div(q, d) r = MatMul(t, b) y = Add(r, p)",
        "p = MatMul(x, w) z = Transpose <perm = [1, 0]>(a_t) q = MatMul(x, z) r = MatMul(q, b) y = Add(p, r)",
    ],
    ids=["plain", "a factor behind", "factors in front and between, the other order", "transposed"],
)
def test_an_adapter_is_merged(body):
    found, feeds = model(body), {"x": normal((5, 24), 9)}
    reference = run(found, feeds)[0]
    result = apply("lora_merge", found, context())
    assert [(record.action, record.reason) for record in result.records] == [
        ("rewritten", "an adapter of rank 4 is merged")
    ]
    assert [node.op_type for node in found.graph if node.op_type != "Transpose"] == ["MatMul"]
    np.testing.assert_allclose(run(found, feeds)[0], reference, rtol=1e-5, atol=1e-5)
    assert not apply("lora_merge", found, context()).modified


@pytest.mark.parametrize(
    "body",
    [
        "p = MatMul(x, w) q = MatMul(x, a) r = MatMul(q, b) s = Relu(r) y = Add(p, s)",
        "p = MatMul(x, w) q = MatMul(x, a) o = Relu(q) r = MatMul(o, b) y = Add(p, r)",
        "p = MatMul(x, w) m = Relu(x) q = MatMul(m, a) r = MatMul(q, b) y = Add(p, r)",
        "p = MatMul(x, w) q = MatMul(x, w) k = MatMul(q, v) r = MatMul(k, w) y = Add(p, r)",
        "p = MatMul(x, w) y = Add(p, p)",
    ],
    ids=["bent behind", "bent between", "another input", "not of low rank", "no branch"],
)
def test_what_only_looks_like_one_is_left_alone(body):
    found = model(body)
    assert not apply("lora_merge", found, context()).modified


def test_a_part_that_others_read_keeps_the_branch():
    body = "p = MatMul(x, w) q = MatMul(x, a) r = MatMul(q, b) y = Add(p, r) z = Relu(q)"
    found = model(body, "g (float[B,24] x) => (float[B,16] y, float[B,4] z)")
    assert not apply("lora_merge", found, context()).modified


def test_a_shared_weight_is_copied():
    body = "p = MatMul(x, w) q = MatMul(x, a) r = MatMul(q, b) y = Add(p, r) z = MatMul(x, w)"
    found = model(body, "g (float[B,24] x) => (float[B,16] y, float[B,16] z)")
    feeds = {"x": normal((5, 24), 9)}
    reference = run(found, feeds)
    assert apply("lora_merge", found, context()).modified
    for expected, output in zip(reference, run(found, feeds), strict=True):
        np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)


def test_then_one_weight_is_quantized():
    found = model("p = MatMul(x, w) q = MatMul(x, a) r = MatMul(q, b) y = Add(p, r)")
    apply("lora_merge", found, context())
    quantized(found, context(scheme="w8a16-g16"))
    assert [site.quantized is not None for site in find_sites(found)[0]] == [True]


def test_a_quantized_weight_is_left_alone_and_says_so():
    found = quantized(model("p = MatMul(x, w) q = MatMul(x, a) r = MatMul(q, b) y = Add(p, r)"), context())
    (record,) = apply("lora_merge", found, context()).records
    assert record.reason == "its adapter is not merged: the weight is quantized already"
