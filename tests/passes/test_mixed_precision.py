"""Formats chosen for a budget: it is met, spent where it counts, and refused where it is too small."""

import dataclasses
import itertools
import re

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.checkpoints import Checkpoints
from qcompiler.errors import CalibrationError, ModelError, PassError, SchemeError
from qcompiler.files.saver import save_model
from qcompiler.graph import SCHEME_KEY
from qcompiler.mixing_trials import _sample
from qcompiler.passes import load
from qcompiler.scheme import Scheme
from qcompiler.sites import find_sites
from qcompiler.targets import lowered_bytes
from tests.builders import apply, context, decoder, decoder_groups, normal, parse, run, serialized, token_batches

TIED = """g (int64[B,S] i) => (float[B,S,512] y) {
    [embed] h = Gather(t, i) [fc] k = MatMul(h, w) r = Relu(k) u = Transpose(t) [head] y = MatMul(r, u)
}"""
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


def assigned_records(result):
    return [record for record in result.records if record.action == "assigned"]


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
    assert {record.site for record in assigned_records(result)} == {site.name for site in find_sites(model)[0]}
    for record in assigned_records(result):
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
        totals.append(sum(record.metrics["expected_cost"] for record in assigned_records(result)))
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
    assert kind.applies(context(target_kl=0.02).config)
    for options in ({"bits_per_weight": 4.0, "max_size": 10**6}, {"bits_per_weight": 0.0},
                    {"bits_per_weight": 4.0, "target_kl": 0.1}):  # fmt: skip
        with pytest.raises(SchemeError, match="budget"):
            context(**options)
    for option in ("rows=0", "probes=0", "tokens=0", "swaps=-1", "units=row"):
        name, _, value = option.partition("=")
        with pytest.raises(SchemeError, match=f"pass mixed_precision: {option} (has to be|is unknown)"):
            kind(context(bits_per_weight=4.0), {name: value})


def test_the_same_choice_twice():
    first, second = stack(), stack()
    assigned(first, bits_per_weight=4.5)
    assigned(second, bits_per_weight=4.5, threads=2)
    assert serialized(first) == serialized(second)


# Trials of whole plans.


def note(result):
    (found,) = (record.reason for record in result.records if record.action == "rewritten")
    return found


def chosen_point(result):
    (found,) = (record.metrics for record in result.records if record.action == "plan" and record.metrics["chosen"])
    return found


@pytest.mark.parametrize("budget", [3.0, 4.5])
def test_swaps_keep_to_the_budget_and_never_end_worse(budget):
    model = stack()
    result = assigned(model, bits_per_weight=budget)
    assert bits_per_weight(model) <= budget
    before, after = map(float, re.search(r"measured ([\d.e-]+) by trial, ([\d.e-]+) after", note(result)).groups())
    assert after <= before


def test_the_scheme_itself_is_taken_where_trials_prefer_it(monkeypatch):
    def cost(self, units, plan, rows, tokens):
        return sum(unit.schemes[at] != unit.members[0].asked for unit, at in zip(units, plan, strict=True))

    monkeypatch.setattr("qcompiler.mixing_trials.Trials.cost", cost)
    model = stack()
    assigned(model, bits_per_weight=5.2)
    assert {str(scheme) for scheme in schemes(model).values()} == {"w4a16-g32-asym"}
    model = stack()
    assigned(model, bits_per_weight=5.0)  # which the scheme does not fit
    assert {str(scheme) for scheme in schemes(model).values()} != {"w4a16-g32-asym"}


def test_without_swaps_nothing_is_run():
    ctx = context(batches=batches(), scheme="w4a16-g32-asym", bits_per_weight=4.5)
    result = apply("mixed_precision", stack(), ctx, swaps=0)
    assert ", not tried (as --scheme says: 5.125 bits a weight" in note(result)


# What a loss costs, from gradients.


def test_gradients_find_what_counts_most():
    """As trials do; where layers make up for errors they are what is asked."""
    model = stack()
    result = assigned(model, bits_per_weight=4.0, algorithms=("gptq{drift=0.5}",))
    assert 0.93 * 4.0 <= bits_per_weight(model) <= 4.0
    found = schemes(model)
    assert found["l2"].bits > min(scheme.bits for scheme in found.values())
    assert found["l2"].bits == max(scheme.bits for scheme in found.values())
    assert ", not tried (as --scheme says" in note(result)


@pytest.mark.parametrize("sensitivity", ["trial", "gradient"])
def test_sensitivity_can_be_chosen(sensitivity):
    ctx = context(batches=batches(), scheme="w4a16-g32-asym", bits_per_weight=4.5, algorithms=("gptq{drift=0.5}",))
    result = apply("mixed_precision", stack(), ctx, sensitivity=sensitivity)
    assert ("not tried" in note(result)) == (sensitivity == "gradient")


def expected_costs(model, algorithm, **config):
    for site in find_sites(model)[0]:
        site.node.metadata_props[SCHEME_KEY] = str(Scheme.parse("w4a16-g32-asym").resolve("cpu"))
    ctx = context(scheme="w4a16-g32-asym", algorithms=(algorithm,), **config)
    result = apply("mixed_precision", model, ctx, swaps=0, rows=K)
    return {(record.site, record.spec): record.metrics["expected_cost"] for record in assigned_records(result)}


def test_gradients_and_trials_agree_on_what_a_format_costs(monkeypatch):
    """But for one factor: an answer that is no choice among words counts by its noise."""
    monkeypatch.setattr("qcompiler.mixing_trials._EVEN", 0.0)
    by_trial, by_gradient = (
        expected_costs(stack(), algorithm, batches=batches(), bits_per_weight=5.125)
        for algorithm in ("gptq", "gptq{drift=0.5}")
    )
    both = by_trial.keys() & by_gradient.keys()
    assert len(both) > 3
    ratios = np.array([by_gradient[each] / by_trial[each] for each in both])
    assert ratios.max() < 4 * ratios.min()


def test_costs_by_gradients_are_half_evened_out(monkeypatch):
    """As powers: the cost of `l2` is that of the others to the root of what it was."""

    def spread(even):
        monkeypatch.setattr("qcompiler.mixing_trials._EVEN", even)
        costs = expected_costs(stack(), "gptq{drift=0.5}", batches=batches(), bits_per_weight=2.4)
        smallest = [cost for (_, scheme), cost in costs.items() if scheme == "w2a16-g128-asym"]
        assert len(smallest) > 4
        return max(smallest) / min(smallest)

    plain, evened, same = spread(0.0), spread(0.5), spread(1.0)
    assert plain > evened > same


def test_without_pytorch_sensitivity_is_measured_by_trial_and_the_record_says_so(monkeypatch):
    monkeypatch.setattr("qcompiler.mixing_trials.find_spec", lambda name: None)
    result = assigned(stack(), bits_per_weight=4.5, algorithms=("gptq{drift=0.5}",))
    assert "sensitivity measured by trial: PyTorch, which gradients need, is not installed" in note(result)
    assert "after" in note(result)
    ctx = context(batches=batches(), scheme="w4a16-g32-asym", bits_per_weight=4.5)
    with pytest.raises(PassError, match=r"sensitivity=gradient.*not installed"):
        apply("mixed_precision", stack(), ctx, sensitivity="gradient")


def test_tables_known_by_trial_are_brought_to_the_scale_of_gradients():
    by_trial, by_gradient = (
        expected_costs(decoder(1, 64, 96), algorithm, batches=token_batches(4, 2, 12), max_size=80_000)
        for algorithm in ("gptq", "gptq{drift=0.5}")
    )
    both = by_trial.keys() & by_gradient.keys()
    assert len(both) > 3
    assert 0.2 < np.median([by_gradient[each] / by_trial[each] for each in both]) < 5


def test_rows_are_drawn_by_what_they_cost():
    weight, prices = normal((100, K), 7), np.random.default_rng(1).lognormal(0, 2, 100)
    sizes = prices * np.square(weight, dtype=np.float64).sum(-1)
    rows, counts = _sample(weight, prices, 16)
    assert len(rows) <= 16
    # Exact where the loss of each row is in proportion to its size.
    np.testing.assert_allclose(np.square(weight[rows], dtype=np.float64).sum(-1) @ counts, sizes.sum())
    assert set(np.flatnonzero(sizes > sizes.sum() / 16)) <= set(rows)
    rows, counts = _sample(weight, None, 10)
    assert len(rows) == 10
    assert counts.sum() == 100
    assert len(_sample(weight, np.zeros(100), 4)[0]) == 4


def measured_noise(model, exact):
    """Energy of the noise over that of the outputs, once the weights are quantized."""
    apply("gptq", model, context(batches=batches(), scheme="w4a16-g32-asym", sequential=False))
    feeds = batches()
    noise = sum(np.square(run(model, one)[0] - run(exact, one)[0]).sum() for one in feeds)
    return noise / sum(np.square(run(exact, one)[0]).sum() for one in feeds)


@pytest.mark.parametrize("target", [0.05, 0.005, 0.0005])
def test_a_target_is_reached_and_not_by_much(target):
    model = stack()
    assigned(model, target_kl=target, algorithms=("gptq",))
    assert 0.5 * target <= measured_noise(model, stack()) <= 1.2 * target


def test_a_smaller_target_takes_more_bytes_and_zero_loss_is_float():
    sizes = []
    for target in (0.1, 0.01, 0.001, 1e-12):
        model = stack()
        result = assigned(model, target_kl=target)
        sizes.append(chosen_point(result)["bytes"])
    assert all(later > earlier for earlier, later in itertools.pairwise(sizes))
    assert not any(SCHEME_KEY in site.node.metadata_props for site in find_sites(model)[0])
    skipped = [record for record in result.records if record.action == "skipped"]
    assert {record.reason for record in skipped} == {"left float, which the budget has room for"}


def test_the_curve_falls_and_the_plan_lies_on_it_or_above():
    result = assigned(stack(), bits_per_weight=4.5)
    points = [record.metrics for record in result.records if record.action == "plan" and not record.metrics["chosen"]]
    assert len(points) > 5
    for point, later in itertools.pairwise(points):
        assert later["bytes"] > point["bytes"]
        assert later["cost"] < point["cost"]
    chosen = chosen_point(result)
    below = [point["cost"] for point in points if point["bytes"] >= chosen["bytes"]]
    assert chosen["cost"] >= max(below)
    assert chosen["bits_per_weight"] == pytest.approx(bits_per_weight_of_records(result))


def bits_per_weight_of_records(result):
    sizes = {site.name: site.rows * site.columns for site in find_sites(stack())[0]}
    records = assigned_records(result)
    return sum(sizes[r.site] * r.metrics["bits_per_weight"] for r in records) / sum(sizes.values())


# Units, tables, QDQ.


def token_context(**config):
    tokens = token_batches(3, length=24, padded=False)
    return context(batches=tokens, scheme="w4a16-g32-asym", algorithms=("gptq",), **config)


def tokens_assigned(units="site", **config):
    model = decoder(layers=2, hidden=64, inner=128)
    ctx = token_context(**config)
    apply("assign_scheme", model, ctx)
    apply("raise_opset", model, ctx)
    result = apply("mixed_precision", model, ctx, units=units, swaps=4)
    return model, ctx, result


def test_weights_that_read_the_same_activation_can_share_a_format():
    model, _, _ = tokens_assigned("reading", bits_per_weight=4.0)
    found = schemes(model)
    for group in decoder_groups():
        assert len({found[name] for name in group}) == 1
    assert len({found[name] for name in itertools.chain(*decoder_groups()[:-1])}) > 1


def test_a_layer_can_have_one_format():
    model, _, _ = tokens_assigned("layer", bits_per_weight=4.0)
    found = schemes(model)
    for layer in range(2):
        assert len({scheme for name, scheme in found.items() if name.startswith(f"l{layer}_")}) == 1


def test_a_size_is_met_by_the_file_with_tables_and_projection(tmp_path):
    whole = decoder(layers=2, hidden=64, inner=128)
    apply("assign_scheme", whole, token_context())
    for name in ("rtn", "fuse_matmul_nbits", "fuse_gather", "cleanup"):
        apply(name, whole, token_context())
    (uniform,) = save_model(whole, tmp_path / "uniform.onnx", force=False)
    size = int(0.8 * uniform.stat().st_size)
    model, ctx, result = tokens_assigned(max_size=size)
    assert {"embed", "head"} <= {record.site for record in assigned_records(result)}
    for name in ("gptq", "fuse_matmul_nbits", "fuse_gather", "cleanup"):
        apply(name, model, ctx)
    (file,) = save_model(model, tmp_path / "m.onnx", force=False)
    assert 0.93 * size <= file.stat().st_size <= size


def test_bits_of_linear_layers_leave_the_others_as_they_are():
    model, _, _ = tokens_assigned(bits_per_weight=3.5)
    assert {str(schemes(model)[name]) for name in ("embed", "head")} == {"w8a16-g64-asym"}


def test_a_table_that_is_also_the_projection_stays_one_weight():
    model = parse(TIED, {"t": normal((512, 64), 1), "w": normal((64, 64), 2)})
    ctx = context(batches=[{"i": np.arange(40).reshape(2, 20)}], max_size=30_000)
    apply("assign_scheme", model, ctx)
    apply("mixed_precision", model, ctx)
    found = schemes(model)
    assert found["embed"] == found["head"]
    assert found["embed"].bits < 8


def test_qdq_gets_formats_of_its_opset():
    model, ctx, _ = tokens_assigned(bits_per_weight=5.5, output_format="qdq")
    assert {scheme.bits for name, scheme in schemes(model).items() if name.startswith("l")} == {4, 8}
    apply("gptq", model, ctx)
    apply("export_qdq", model, ctx)
    assert run(model, token_context().calibration.batches[0])[0].shape == (2, 24, 512)
    model, ctx, _ = tokens_assigned(bits_per_weight=3.5, output_format="qdq", opset=25)
    assert 2 in {scheme.bits for scheme in schemes(model).values()}


def test_a_scheme_of_three_bits_is_a_candidate_that_pays_for_four():
    model = stack()
    for site in find_sites(model)[0]:
        site.node.metadata_props[SCHEME_KEY] = "w3a16-g32-asym"
    ctx = context(batches=batches(), scheme="w3a16-g32-asym", bits_per_weight=4.2)
    result = apply("mixed_precision", model, ctx, swaps=0)
    assert 4 < bits_per_weight(model) <= 4.2
    # 5.125 bits a weight is what the scheme takes, with 36 / 32 for scales and zero points.
    assert "as --scheme says: 5.125 bits a weight" in result.records[0].reason


def test_small_constants_count_like_the_typical_weight():
    text = "g (float[B,64] x) => (float[B,8] y) { [a] h = MatMul(x, v) [b] y = MatMul(h, w) }"
    model = parse(text, {"v": normal((64, 128), 1), "w": normal((128, 8), 2)})  # 4 KB of w are part of the session
    ctx = context(batches=[{"x": normal((32, 64), 3)}], scheme="w4a16-g32-asym", bits_per_weight=4.5)
    apply("assign_scheme", model, ctx)
    result = apply("mixed_precision", model, ctx)
    assert all(record.metrics["expected_cost"] > 0 for record in assigned_records(result))


def test_a_plan_is_remembered_until_something_changes(tmp_path, monkeypatch):
    """The plan of an interrupted run is taken over as it is; another budget, or another weight, has one of its own."""
    store = Checkpoints(tmp_path)

    def planned(budget, change=0.0):
        model = stack()
        value = model.graph.initializers["w1"]
        value.const_value = ir.tensor(value.const_value.numpy() + np.float32(change))
        ctx = context(batches=batches(), scheme="w4a16-g32-asym", bits_per_weight=budget)
        result = apply("mixed_precision", model, dataclasses.replace(ctx, checkpoints=store))
        return schemes(model), result.records

    first = planned(4.0)
    assert store.tally == {"mixed_precision": (0, LAYERS + 1)}
    assert planned(5.0)[0] != first[0]
    planned(4.0, 0.01)
    assert store.tally == {"mixed_precision": (0, 3 * (LAYERS + 1))}
    monkeypatch.setattr("qcompiler.mixing_trials.Trials.measure", lambda *_: pytest.fail("measured again"))
    again = planned(4.0)
    assert store.tally == {"mixed_precision": (LAYERS + 1, 4 * (LAYERS + 1))}
    assert again == first
