"""Formats chosen for a budget: it is met, spent where it counts, and refused where it is too small."""

import itertools

import numpy as np
import pytest

from qcompiler.errors import CalibrationError, ModelError, SchemeError
from qcompiler.graph import SCHEME_KEY
from qcompiler.passes import load
from qcompiler.scheme import Scheme
from qcompiler.sites import find_sites
from qcompiler.targets import lowered_bytes
from tests.builders import apply, context, normal, parse, serialized

K, N, LAYERS = 128, 96, 6
# One layer whose result counts ten times as much as the others'.
WEIGHTS = {f"w{i}": normal((K, K), i, scale=K**-0.5) for i in range(LAYERS)} | {
    "v": normal((K, N), 50, scale=K**-0.5),
    "tenth": np.array(0.1, np.float32),
}


def stack():
    body = " ".join(
        f"[l{i}] p{i} = MatMul (x{i}, w{i}) r{i} = Relu (p{i}) "
        + (f"x{i + 1} = Identity (r{i})" if i == 2 else f"s{i} = Mul (r{i}, tenth) x{i + 1} = Add (x{i}, s{i})")
        for i in range(LAYERS)
    )
    text = f"g (float[B,{K}] x0) => (float[B,{N}] y) {{ {body} [last] y = MatMul (x{LAYERS}, v) }}"
    model = parse(text, WEIGHTS)
    for site in find_sites(model)[0]:
        site.node.metadata_props[SCHEME_KEY] = str(Scheme.parse("w4a16-g32-asym").resolve("cpu"))
    return model


def batches(count=2):
    return [{"x0": normal((32, K), 100 + i)} for i in range(count)]


def assigned(model, **config):
    return apply("mixed_precision", model, context(batches=batches(), scheme="w4a16-g32-asym", **config))


def schemes(model):
    return {site.name: Scheme.parse(site.node.metadata_props[SCHEME_KEY]) for site in find_sites(model)[0]}


def bits_per_weight(model):
    bits = count = 0
    for site in find_sites(model)[0]:
        spec = schemes(model)[site.name].spec(site.columns, "float32")
        bits += 8 * lowered_bytes(spec, site.rows, site.columns)
        count += site.rows * site.columns
    return bits / count


@pytest.mark.parametrize("budget", [3.5, 4.5, 5.5, 7.0])
def test_a_budget_of_bits_is_met_and_spent(budget):
    model = stack()
    result = assigned(model, bits_per_weight=budget)
    assert result.modified
    assert 0.93 * budget <= bits_per_weight(model) <= budget
    assert {record.site for record in result.records} == {site.name for site in find_sites(model)[0]}
    for record in result.records:
        assert record.action == "assigned"
        assert record.spec == str(schemes(model)[record.site])


def test_what_counts_most_gets_the_most_bits():
    """`l2` replaces the stream that the others add a tenth to."""
    model = stack()
    assigned(model, bits_per_weight=4.0)
    found = schemes(model)
    others = [found[f"l{i}"].bits for i in range(LAYERS) if i != 2]
    assert found["l2"].bits >= max(others)
    assert found["l2"].bits > min(others)


def test_the_cost_that_is_expected_falls_with_the_budget():
    totals = []
    for budget in (3.0, 4.0, 5.0, 6.0, 8.0):
        result = assigned(stack(), bits_per_weight=budget)
        totals.append(sum(record.metrics["expected_cost"] for record in result.records))
    assert all(later < earlier for earlier, later in itertools.pairwise(totals))


def test_a_budget_that_nothing_fits_is_refused():
    model = stack()
    before = serialized(model)
    with pytest.raises(ModelError, match=r"the smallest formats of the 7 weights take .* MB where .* MB are left"):
        assigned(model, bits_per_weight=1.0)
    assert serialized(model) == before


def test_data_and_weight_only_sites_are_needed():
    with pytest.raises(CalibrationError, match="give --calibration PATH"):
        apply("mixed_precision", stack(), context(bits_per_weight=4.0))
    with pytest.raises(ModelError, match="no weight-only site"):
        apply("mixed_precision", parse("g (float[B] x) => (float[B] y) { y = Relu(x) }"),
              context(batches=[{"x": normal(4, 1)}], bits_per_weight=4.0))  # fmt: skip


def test_when_it_applies_and_what_it_refuses():
    kind = load("mixed_precision")
    assert not kind.applies(context().config)
    assert kind.applies(context(bits_per_weight=4.0).config)
    assert kind.applies(context(max_size=10**6).config)
    for options in ({"bits_per_weight": 4.0, "max_size": 10**6}, {"bits_per_weight": 0.0},
                    {"bits_per_weight": 4.0, "output_format": "qdq"}):  # fmt: skip
        with pytest.raises(SchemeError, match="budget"):
            context(**options)
    with pytest.raises(SchemeError, match="at least 1"):
        kind(context(bits_per_weight=4.0), {"rows": "0"})


def test_the_same_choice_twice():
    first, second = stack(), stack()
    assigned(first, bits_per_weight=4.5)
    assigned(second, bits_per_weight=4.5, threads=2)
    assert serialized(first) == serialized(second)
