"""Streaming calibration: what each site is measured on, and that threads, batches and memory change nothing."""

import os

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler import readings, streaming
from qcompiler.errors import CalibrationError, NumericsError
from qcompiler.graph import input_feature_axis
from qcompiler.passes.gptq import Gptq
from qcompiler.quantized import QuantizedTensor
from qcompiler.scheme import Scheme
from qcompiler.scheme_plan import Pattern, SchemePlan
from qcompiler.scratch import Scratch
from qcompiler.session import single_threaded_blas
from qcompiler.sites import find_sites
from tests.builders import (
    Ticks,
    apply,
    context,
    decoder,
    decoder_groups,
    normal,
    only,
    parse,
    run,
    token_batches,
    with_outputs,
)
from tests.test_segments import branches, cross

SCHEME = Scheme.parse("w4a16-g32-asym")


class Recording(Gptq):
    """GPTQ that remembers what it was told about each group of sites."""

    def __init__(self, ctx, **options):
        super().__init__(ctx, {key: str(value) for key, value in options.items()})
        self.seen = []

    def quantize_sites(self, sites, facts, remark=""):
        self.seen.append(([site.name for site in sites], facts))
        return super().quantize_sites(sites, facts, remark)


def stream(model, batches, plan=None, *, threads=1, drift=0.0, **options):
    """Run GPTQ over a model; returns the algorithm and its result."""
    ctx = context(plan=plan or SchemePlan(SCHEME, SCHEME, SCHEME), batches=batches, threads=threads, **options)
    apply("canonicalize", model, ctx)
    apply("assign_scheme", model, ctx)
    algorithm = Recording(ctx, drift=drift)
    with single_threaded_blas():
        result = algorithm(model)
    return algorithm, result


def hessian_of(model, site, batches, masks):
    """The sum over tokens of x x^T of what a site reads when the whole model runs, float64."""
    rows = rows_of(model, site, batches, masks)
    return rows.T @ rows, len(rows)


def rows_of(model, site, batches, masks):
    """What a site reads when the whole model runs, float64 [T, K]."""
    found = []
    source = with_outputs(model, [site.input.name])
    for feeds, mask in zip(batches, masks, strict=True):
        (value,) = run(source, feeds, outputs=[site.input.name])
        value = np.moveaxis(value, input_feature_axis(site), -1)
        found.append(value.reshape(-1, value.shape[-1]) if mask is None else value[mask])
    return np.concatenate(found).astype(np.float64)


def quantize_like(model, other, names):
    """Give the sites of a float model that are listed the quantized weights of another."""
    weights = {site.name: site.weight.const_value for site in find_sites(other)[0]}
    for site in find_sites(model)[0]:
        if site.name in names:
            assert isinstance(weights[site.name], QuantizedTensor)
            site.weight.const_value = weights[site.name]
    return model


def mask_of(feeds):
    return feeds["attention_mask"].astype(bool) if "attention_mask" in feeds else None


def conv_model():
    text = """g (float[B,32,6] x) => (float[B,48,6] y) {
        [a] a = Conv(x, wa) r = Relu(a) [b] b = Conv(r, wb) [c] c = Conv(r, wc) s = Mul(b, c) [d] y = Conv(s, wd)
    }"""
    shapes = {"wa": (40, 32, 1), "wb": (32, 40, 1), "wc": (32, 40, 1), "wd": (48, 32, 1)}
    return parse(text, {name: normal(shape, seed) for seed, (name, shape) in enumerate(shapes.items())})


MODELS = {
    # model, batches, groups in the order in which they are quantized, sites quantized before them
    "decoder": (decoder, token_batches, decoder_groups(), ["embed"]),
    "cross": (
        lambda: cross()[0],
        lambda: [{"x": normal((2, n, 32), n), "memory": normal((2, 9, 32), 50 + n)} for n in (3, 5)],
        [["d1"], ["enc1"], ["d2"], ["enc2"], ["d3"], ["ck", "cv"], ["cq"], ["co"]],
        [],
    ),
    "branches": (
        lambda: branches()[0],
        lambda: [{"x": normal((9, 32), n), "flag": np.array(n == 1)} for n in (1, 2)],
        [["first"], ["second"], ["third"]],
        ["inner"],
    ),
    "convolutions": (
        conv_model,
        lambda: [{"x": normal((3, 32, 6), n)} for n in (1, 2)],
        [["a"], ["b", "c"], ["d"]],
        [],
    ),
}
# Groups that may come in either order: they are of one level and read different values.
LEVELS = {"cross": [{"d1"}, {"d2", "enc1"}, {"d3", "enc2"}, {"ck", "cv", "cq"}, {"co"}]}


@pytest.mark.parametrize("name", MODELS)
def test_each_site_is_measured_on_what_the_quantized_prefix_produces(name):
    """Against a new run of the whole model, for every group, with all earlier groups quantized and the rest float."""
    build, make_batches, groups, before = MODELS[name]
    batches = make_batches()
    model = build()
    algorithm, result = stream(model, batches)
    measured = [(names, facts) for names, facts in algorithm.seen if facts is not None]
    levels = LEVELS.get(name, [set(group) for group in groups])
    assert sorted(map(sorted, (names for names, _ in measured))) == sorted(map(sorted, groups))
    assert [names for names, facts in algorithm.seen if facts is None] == [[name] for name in before]
    assert len(only(result, "quantized")) == sum(map(len, groups)) + len(before)
    done = list(before)
    masks = [mask_of(feeds) for feeds in batches]
    for level in levels:
        of_level = [(names, facts) for names, facts in measured if set(names) <= level]
        assert {name for names, _ in of_level for name in names} == level
        half = quantize_like(build(), model, done)
        for names, facts in of_level:
            (site,) = (site for site in find_sites(half)[0] if site.name == names[0])
            want, tokens = hessian_of(half, site, batches, masks)
            assert facts.tokens == tokens
            # Sums in float32 within a batch, float64 in ours.
            assert np.linalg.norm(facts.hessian - want) <= 1e-6 * np.linalg.norm(want), names
        done += sorted(level)


def test_the_float_model_would_give_other_hessians():
    """So the test above means something: what a site reads has changed by percents by the time it is measured."""
    build, make_batches, _, _ = MODELS["decoder"]
    batches = make_batches()
    algorithm, _ = stream(build(), batches)
    plain = build()
    for names, facts in algorithm.seen[1:]:
        (site,) = (site for site in find_sites(plain)[0] if site.name == names[0])
        want, _ = hessian_of(plain, site, batches, [mask_of(feeds) for feeds in batches])
        assert np.linalg.norm(facts.hessian - want) > 1e-3 * np.linalg.norm(want), names


@pytest.mark.parametrize("name", MODELS)
def test_the_drift_is_that_from_the_float_model(name):
    """Against runs of both whole models; what has nothing to measure is quantized in both."""
    build, make_batches, groups, before = MODELS[name]
    batches = make_batches()
    masks = [mask_of(feeds) for feeds in batches]
    model = build()
    algorithm, _ = stream(model, batches, drift=0.5)
    plain, done, drifted = quantize_like(build(), model, before), list(before), 0
    for level in LEVELS.get(name, [set(group) for group in groups]):
        half = quantize_like(build(), model, done)
        for names, facts in algorithm.seen:
            if facts is None or not set(names) <= level:
                continue
            (site,) = (site for site in find_sites(half)[0] if site.name == names[0])
            x, wanted = (rows_of(each, site, batches, masks) for each in (half, plain))
            want = (wanted - x).T @ x
            assert np.linalg.norm(facts.drift - want) <= 1e-5 * np.linalg.norm(x.T @ x), names
            drifted += np.linalg.norm(want) > 1e-3 * np.linalg.norm(x.T @ x)
        done += sorted(level)
    assert drifted >= len(groups) / 2


def test_what_an_output_is_added_to_is_compared_with_the_float_model():
    """The residual stream beside the output of attention and of the MLP; no other output is added to anything."""
    build, make_batches, _, before = MODELS["decoder"]
    batches, model, done = make_batches(), build(), list(before)
    masks = [mask_of(feeds) for feeds in batches]
    algorithm, _ = stream(model, batches, drift=0.5)
    plain = quantize_like(build(), model, before)
    added = {"l0_o": "h0", "l0_down": "m0", "l1_o": "h1", "l1_down": "m1"}
    moved = 0
    for names, facts in algorithm.seen:
        if facts is None:
            continue
        assert (facts.residual is not None) == (names[0] in added), names
        if names[0] in added:
            half = quantize_like(build(), model, done)
            (site,) = (site for site in find_sites(half)[0] if site.name == names[0])
            x = rows_of(half, site, batches, masks)
            r, exact = (
                np.concatenate(
                    [
                        run(with_outputs(each, [added[names[0]]]), feeds, outputs=[added[names[0]]])[0][mask]
                        for feeds, mask in zip(batches, masks, strict=True)
                    ]
                )
                for each in (half, plain)
            )
            want = (exact - r).astype(np.float64).T @ x
            assert np.linalg.norm(facts.residual - want) <= 1e-5 * np.linalg.norm(x) * np.linalg.norm(exact), names
            moved += np.linalg.norm(want) > 1e-4 * np.linalg.norm(x) * np.linalg.norm(exact)
        done += names
    assert moved >= 2


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[a] p = MatMul(x, w) y = Add(r, p)", "r"),
        ("[a] p = MatMul(x, w) q = Add(p, b) y = Add(q, r)", "r"),
        ("[a] p = MatMul(x, w) y = com.microsoft.SkipSimplifiedLayerNormalization(r, p, b)", "r"),
        ("[a] p = MatMul(x, w) q = Relu(p) y = Add(q, r)", None),
        ("[a] p = MatMul(x, w) q = Add(p, r) y = Add(q, p)", None),
        ("[a] p = MatMul(x, w) y = Add(p, p)", None),
        ("[a] y = MatMul(x, w)", None),
    ],
)
def test_what_a_residual_is(text, found):
    head = "g (float[B,32] x, float[B,32] r) => (float[B,32] y) {"
    model = parse(f"{head} {text} }}", {"w": normal((32, 32), 0), "b": np.ones(32, np.float32)})
    (site,) = find_sites(model)[0]
    value = readings.residual_of(site)
    assert (value.name if value is not None else None) == found


def test_one_batch_of_eight_is_there_to_judge_by():
    """The same as the facts of that batch alone; with fewer batches there is none."""
    batches = token_batches(10)
    algorithm, _ = stream(decoder(1), batches, drift=0.5, sequential=False)
    alone, _ = stream(decoder(1), batches[-1:], drift=0.5, sequential=False)
    for (names, facts), (same, last) in zip(algorithm.seen, alone.seen, strict=True):
        assert names == same
        if facts is not None:
            assert facts.held_out.tokens == last.tokens < facts.tokens
            assert np.allclose(facts.held_out.hessian, last.hessian, rtol=1e-5)
            assert last.held_out is None


def test_drift_is_measured_only_where_it_is_wanted():
    algorithm, _ = stream(decoder(1), token_batches())
    assert all(facts is None or facts.drift is None for _, facts in algorithm.seen)
    algorithm, _ = stream(decoder(1), token_batches(), drift=1.0, sequential=False)
    assert not any(facts.drift.any() for _, facts in algorithm.seen if facts is not None)


@pytest.mark.parametrize("name", MODELS)
def test_without_sequential_sites_are_measured_on_the_float_model(name):
    """Tables and bodies are left float here: they have nothing to measure and are quantized before the rest."""
    build, make_batches, _, before = MODELS[name]
    batches = make_batches()
    overrides = tuple((Pattern(name), None) for name in before)
    plan = SchemePlan(SCHEME, SCHEME, SCHEME, overrides)
    algorithm, _ = stream(build(), batches, plan, sequential=False)
    plain = build()
    assert algorithm.seen
    for names, facts in algorithm.seen:
        (site,) = (site for site in find_sites(plain)[0] if site.name == names[0])
        want, tokens = hessian_of(plain, site, batches, [mask_of(feeds) for feeds in batches])
        assert facts.tokens == tokens
        assert np.linalg.norm(facts.hessian - want) <= 1e-6 * np.linalg.norm(want), names


def test_padding_is_not_measured():
    """Rows of different length in one batch count as much as each of them alone without padding."""
    batches = token_batches()
    assert any((feeds["attention_mask"] == 0).any() for feeds in batches)
    padded, _ = stream(decoder(), batches)
    alone = []
    for feeds in batches:
        for ids, mask in zip(feeds["input_ids"], feeds["attention_mask"], strict=True):
            length = int(mask.sum())
            alone.append({"input_ids": ids[None, :length], "attention_mask": mask[None, :length]})
    bare, _ = stream(decoder(), alone)
    for (names, facts), (same, wanted) in zip(padded.seen[1:], bare.seen[1:], strict=True):
        assert names == same
        assert facts.tokens == wanted.tokens == sum(int(feeds["attention_mask"].sum()) for feeds in batches)
        assert np.linalg.norm(facts.hessian - wanted.hessian) <= 1e-5 * np.linalg.norm(wanted.hessian)


def stored_bytes_of(model):
    found = []
    for site in find_sites(model)[0]:
        tensor = site.weight.const_value
        if isinstance(tensor, QuantizedTensor):
            zeros = b"" if tensor.zero_point is None else tensor.zero_point.tobytes()
            found.append((site.name, tensor.packed.tobytes(), tensor.scale.tobytes(), zeros))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_threads_change_no_byte(name):
    build, make_batches, groups, before = MODELS[name]
    batches = make_batches() * 3
    results = []
    for threads in (1, 2, 3, 4):
        model = build()
        stream(model, batches, threads=threads)
        results.append(stored_bytes_of(model))
    assert len(results[0]) == sum(map(len, groups)) + len(before)
    assert all(result == results[0] for result in results)


def test_spilling_to_disk_changes_no_byte(monkeypatch):
    spilled = []

    class Watched(Scratch):
        def __exit__(self, *arguments):
            spilled.append((self.spilled_bytes, self.live_bytes))
            super().__exit__(*arguments)

    monkeypatch.setattr(streaming, "Scratch", Watched)
    batches = token_batches(2, rows=8, length=64)  # 64 KiB of activations, the least that is worth a file
    results = []
    for max_memory in (None, 4):
        model = decoder(1)
        stream(model, batches, max_memory=max_memory)
        results.append(stored_bytes_of(model))
    assert results[0] == results[1]
    assert spilled[0][0] == 0
    assert spilled[1][0] >= 5 * 2 * (1 << 16)
    assert all(live >= 0 for _, live in spilled)


def test_feeds_that_are_mapped_files_outlive_the_run(tmp_path):
    """Feeds leave the boundary like any other value, but what holds them is the caller's."""
    np.save(tmp_path / "x.npy", normal((40, 32), 1))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    text = "g (float[B,32] x) => (float[B,32] y) { [a] a = MatMul(x, wa) [b] y = MatMul(a, wb) }"
    model = parse(text, {"wa": normal((32, 32), 2), "wb": normal((32, 32), 3)})
    stream(model, [{"x": mapped[:20]}, {"x": mapped[20:]}], max_memory=4)
    assert os.listdir(tmp_path) == ["x.npy"]
    assert np.array_equal(np.load(tmp_path / "x.npy"), normal((40, 32), 1))


def test_values_read_along_two_axes_are_measured_along_each():
    """A convolution's features are axis 1, a MatMul's the last one; here both have 32."""
    text = """g (float[B,32,32] x) => (float[B,16,32] y, float[B,32,16] z) {
        n = Neg(x) [conv] y = Conv(n, wc) [mm] z = MatMul(n, wm)
    }"""
    model = parse(text, {"wc": normal((16, 32, 1), 1), "wm": normal((32, 16), 2)})
    x = normal((5, 32, 32), 3)
    algorithm, _ = stream(model, [{"x": x}])
    facts = {names[0]: found for names, found in algorithm.seen}
    assert set(facts) == {"conv", "mm"}
    wide = x.astype(np.float64)
    assert np.allclose(facts["conv"].hessian, np.einsum("bit,bjt->ij", wide, wide), rtol=1e-4, atol=1e-3)
    assert np.allclose(facts["mm"].hessian, np.einsum("bti,btj->ij", wide, wide), rtol=1e-4, atol=1e-3)


def test_inputs_that_hold_weights_work_like_initializers():
    """Before IR version 4 every initializer was listed among the inputs."""
    text = """g (float[B,32] x, float[32,32] wa, float[32,32] wb) => (float[B,32] y) {
        [a] a = MatMul(x, wa) [b] y = MatMul(a, wb)
    }"""
    weights = {"wa": normal((32, 32), 2), "wb": normal((32, 32), 3)}
    old = parse(text, weights, opset=8, ir_version=3)
    new = parse(text.replace(", float[32,32] wa, float[32,32] wb", ""), weights)
    for model in (old, new):
        _, result = stream(model, [{"x": normal((20, 32), 1)}])
        assert only(result, "quantized") == ["a", "b"]
    assert stored_bytes_of(old) == stored_bytes_of(new)


def test_progress_is_told_level_by_level():
    ticks = Ticks()
    ctx = context(scheme="w4a16", batches=token_batches(1), progress_to=ticks)
    model = decoder(1)
    apply("assign_scheme", model, ctx)
    apply("gptq", model, ctx)
    assert ticks.seen == [("gptq", done, 6) for done in range(7)]  # before each of 6 levels, and at the end


@pytest.mark.parametrize("batches", [None, []])
def test_without_data_there_is_an_error_that_says_what_to_do(batches):
    with pytest.raises(CalibrationError, match="gptq needs calibration data; give --calibration PATH, or use rtn"):
        stream(decoder(1), batches)


def test_nothing_to_measure_needs_no_data():
    plan = SchemePlan(None, SCHEME, None)
    algorithm, result = stream(decoder(1), None, plan)
    assert [(names, facts) for names, facts in algorithm.seen] == [(["embed"], None)]
    assert result.records[0].reason == "a lookup table has no activations, rounded to nearest"


def test_an_activation_that_is_not_finite_is_an_error_that_names_the_site():
    text = "g (float[B,32] x) => (float[B,32] y) { e = Exp(x) [a] y = MatMul(e, w) }"
    model = parse(text, {"w": normal((32, 32), 2)})
    with pytest.raises(NumericsError, match="the activation that 'a' reads holds NaN or infinity"):
        stream(model, [{"x": np.full((2, 32), 1000, np.float32)}])


KERNELS = """g (float[B,4,9,7] x) => (float[B,6,C,D] y, float[B,8,E,F] z, float[B,8,G,H] u, float[B,4,I,J] v,
    float[B,4,M,O] q) {
    [a] y = Conv <pads = [1, 1, 1, 1], strides = [2, 1]> (x, wa)
    [same] z = Conv <pads = [1, 1, 1, 1], strides = [2, 1]> (x, wb)
    [other] u = Conv <dilations = [2, 2]> (x, we)
    [pairs] p = Conv <group = 2> (x, wc) r = Relu(p) [more] q = Conv <group = 2> (x, wf)
    [deep] v = Conv <group = 4, pads = [1, 1, 1, 1]> (r, wd)
}"""


def kernels():
    shapes = {"wa": (6, 4, 3, 3), "wb": (8, 4, 3, 3), "wc": (4, 2, 3, 3), "wd": (4, 1, 3, 3), "we": (8, 4, 3, 3)}
    shapes["wf"] = (4, 2, 3, 3)
    return parse(KERNELS, {name: normal(shape, seed) for seed, (name, shape) in enumerate(shapes.items())})


def taps_of(model, name, feeds):
    """What a convolution's taps meet, [groups, T, K], by one beside it whose every output is one of its inputs."""
    model = ir.serde.deserialize_model(ir.serde.serialize_model(model))
    (site,) = (site for site in find_sites(model)[0] if site.name == name)
    groups, shape = site.node.attributes.get_int("group", 1), site.weight.const_value.shape.numpy()
    one_hot = np.eye(site.columns, dtype=np.float32).reshape(site.columns, *shape[1:])
    weight = ir.Tensor(np.concatenate([one_hot] * groups), name="one_hot")
    value = ir.Value(name="one_hot", const_value=weight)
    model.graph.register_initializer(value)
    attributes = {key: attribute.value for key, attribute in site.node.attributes.items()}
    model.graph.append(ir.node("Conv", [site.input, value], attributes, outputs=[ir.Value(name="taps")]))
    (taps,) = run(with_outputs(model, ["taps"]), feeds, outputs=["taps"])
    return np.moveaxis(taps, 1, -1).reshape(-1, groups, site.columns).swapaxes(0, 1).astype(np.float64)


def test_convolutions_are_measured_on_what_their_taps_meet():
    """Each group of channels for itself; what meets the same is measured once, but for convolutions of groups."""
    batches = [{"x": normal((n, 4, 9, 7), n)} for n in (2, 3)]
    plan = SchemePlan(Scheme.parse("w8a8-static"))
    algorithm, result = stream(kernels(), batches, plan, sequential=False, target="portable")
    assert [names for names, _ in algorithm.seen] == [["a", "same"], ["other"], ["pairs"], ["more"], ["deep"]]
    assert sorted(only(result, "quantized")) == ["a", "deep", "more", "other", "pairs", "same"]
    shapes = {"a": (36, 36), "other": (36, 36), "pairs": (2, 18, 18), "more": (2, 18, 18), "deep": (4, 9, 9)}
    for names, facts in algorithm.seen:
        taps = [taps_of(kernels(), names[0], feeds) for feeds in batches]
        want = sum(each.swapaxes(1, 2) @ each for each in taps)
        assert facts.hessian.shape == shapes[names[0]]
        assert facts.tokens == sum(each.shape[1] for each in taps)
        got = facts.hessian.reshape(want.shape)
        assert np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want), names


def test_of_large_images_some_positions_are_measured(monkeypatch):
    monkeypatch.setattr(readings, "_MOST_PATCHES", 20)
    batches = [{"x": normal((2, 4, 9, 7), n)} for n in (1, 2)]
    plan = SchemePlan(Scheme.parse("w8a8-static"))
    (_, facts), *_ = stream(kernels(), batches, plan, sequential=False, target="portable")[0].seen
    # 5 x 7 positions of 2 samples: every second one along each axis.
    taps = [taps_of(kernels(), "a", feeds).reshape(2, 5, 7, -1)[:, ::2, ::2].reshape(-1, 36) for feeds in batches]
    want = sum(each.T @ each for each in taps)
    assert facts.tokens == 2 * 2 * 3 * 4
    assert np.linalg.norm(facts.hessian - want) <= 1e-6 * np.linalg.norm(want)
