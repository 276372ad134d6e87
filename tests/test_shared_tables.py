"""Tables that are the weights of products too are rounded for both."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.calibration import row_mask
from qcompiler.graph import SCHEME_KEY
from qcompiler.passes.base import assigned_sites, streaming
from qcompiler.shared_tables import products_of, read_products, with_lookups
from qcompiler.sites import find_sites
from qcompiler.statistics import LayerFacts
from tests.builders import apply, context, normal, parse, run

V, d = 512, 32
TIED = f"""g (int64[B,S] ids) => (float[B,S,{V}] y) {{
    [embed] h = Gather(table, ids) k = MatMul(h, w) t = Tanh(k) r = Add(t, loud) turned = Transpose(table)
    [head] y = MatMul(r, turned) }}"""
APART = f"""g (int64[B,S] ids) => (float[B,S,{V}] y) {{
    [embed] h = Gather(table, ids) k = MatMul(h, w) t = Tanh(k) r = Add(t, loud) [head] y = MatMul(r, head) }}"""


def model_of(text=TIED):
    """What the head reads is loud in a few channels, and does not hang on a looked-up row by much."""
    loud = np.zeros(d, np.float32)
    loud[:3] = 20, -30, 10
    weights = {"table": normal((V, d), 0), "w": normal((d, d), 1), "loud": loud}
    return parse(text, weights | ({"head": normal((d, V), 2)} if text is APART else {}))


def batches(count=4):
    random = np.random.default_rng(5)
    return [{"ids": random.integers(0, V, (2, 24))} for _ in range(count)]


def planned(text=TIED, scheme="w4a16-g32-asym", **config):
    model, ctx = model_of(text), context(scheme=scheme, batches=batches(), **config)
    for site in find_sites(model)[0]:
        if site.role == "linear":
            continue
        site.node.metadata_props[SCHEME_KEY] = str(ctx.config.plan.default.resolve("cpu"))
    return model, ctx


def test_the_hessian_counts_lookups_in_all_columns():
    facts = LayerFacts(np.diag([4.0, 2.0, 0.0, 2.0]), 7)
    found = with_lookups(facts).hessian
    np.testing.assert_allclose(found, np.diag([4.2, 2.2, 0.2, 2.2]))
    assert facts.hessian[2, 2] == 0


def test_what_the_product_reads_is_measured_in_the_float_model():
    model, ctx = planned()
    tables = [site for site in assigned_sites(model) if site.role == "embedding"]
    assert {value.name: site.name for value, site in products_of(model, tables).items()} == {"table": "head"}
    seen = []
    how = streaming(ctx, "x", sequential=False)
    read_products(model, tables, ctx.batches, how, lambda table, reading: seen.append((table.name, reading.facts)))
    ((name, facts),) = seen
    assert name == "embed"
    table, w = normal((V, d), 0), model.graph.initializers["w"].const_value.numpy()
    rows = np.concatenate([table[feeds["ids"]].reshape(-1, d) for feeds in ctx.batches]).astype(np.float64)
    rows = np.tanh(rows @ w) + model.graph.initializers["loud"].const_value.numpy()
    hessian = rows.T @ rows
    np.testing.assert_allclose(facts.hessian, hessian + 0.1 * np.trace(hessian) / d * np.eye(d), rtol=1e-4, atol=1e-2)
    assert row_mask(ctx.batches[0]) is None


def noise(model, exact):
    feeds = batches(8)[4:]
    return sum(float(np.square(run(model, one)[0] - run(exact, one)[0]).sum()) for one in feeds)


def test_answers_are_closer_than_with_rounding_to_nearest():
    errors = {}
    for name in ("rtn", "gptq"):
        model, ctx = planned()
        result = apply(name, model, ctx)
        errors[name] = noise(model, model_of())
    reasons = {record.site: record.reason for record in result.records if record.action == "quantized"}
    assert "for lookups and for the product that shares its weight" in reasons["embed"]
    assert errors["gptq"] < 0.6 * errors["rtn"]


@pytest.mark.parametrize(
    ("text", "scheme", "algorithm"),
    [(APART, "w4a16-g32-asym", "gptq"), (TIED, "w8a16-g32-asym", "gptq"), (TIED, "w4a16-g32-asym", "obq")],
)
def test_what_is_rounded_to_nearest_all_the_same(text, scheme, algorithm):
    """Tables of their own, those of 8 bits, and where rows would take too long."""
    model, ctx = planned(text, scheme)
    records = {record.site: record.reason for record in apply(algorithm, model, ctx).records}
    assert records["embed"] == "a lookup table has no activations, rounded to nearest"


def test_the_codes_are_shared_and_run(tmp_path):
    model, ctx = planned()
    apply("gptq", model, ctx)
    dequantized = model.graph.initializers["table"].const_value.numpy()
    (expected,) = run(model, batches()[0])
    for name in ("fuse_matmul_nbits", "fuse_gather", "cleanup"):
        apply(name, model, ctx)
    (found,) = run(model, batches()[0])
    assert isinstance(model, ir.Model)
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())
    assert dequantized.shape == (V, d)


def test_a_table_of_many_rows_is_quantized_in_parts(monkeypatch):
    whole, parts = [], []
    for found, rows in ((whole, 1 << 20), (parts, 100)):
        monkeypatch.setattr("qcompiler.passes.gptq._ROWS", rows)
        model, ctx = planned()
        (record,) = (each for each in apply("gptq", model, ctx, refine=1).records if each.site == "embed")
        found += [model.graph.initializers["table"].const_value.numpy(), record.metrics]
    np.testing.assert_allclose(parts[0], whole[0], atol=1e-5)
    assert parts[1] == pytest.approx(whole[1], rel=1e-4)
