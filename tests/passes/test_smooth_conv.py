"""Smoothing between convolutions leaves what a model computes, and lessens what one scale for a tensor changes."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.errors import CalibrationError, NumericsError, SchemeError
from qcompiler.numerics.activation import ActivationSpec, activation_grid, fake_quantize
from qcompiler.passes import load
from qcompiler.passes.smooth_conv import bounded_factors
from tests.builders import Ticks, apply, assigned, context, normal, only, parse, run, serialized, text_of, with_outputs

C = 8
STATIC = "w8a8-static"


def channels(seed, decades=3.0):
    """Loudness of eight channels, over powers of ten in random order; the largest is 3."""
    return 3 * 10 ** (-decades * np.random.default_rng(seed).permutation(np.linspace(0, 1, C)))


WEIGHTS = {
    "w": (normal((C, 3, 3, 3), 1, scale=0.3) * channels(1).reshape(-1, 1, 1, 1)).astype(np.float32),
    "b": (0.1 * normal(C, 2) * channels(1)).astype(np.float32),
    "v": normal((5, C, 3, 3), 3),
    "k": normal((C, 1, 3, 3), 4),
    "l": normal((2 * C, 2, 1, 1), 5),
    "c": normal(5, 6),
    "zero": np.array(0, np.float32),
    "one": np.array(1, np.float32),
    "six": np.array(6, np.float32),
}
FIRST = "[first] c0 = Conv <pads = [1, 1, 1, 1]> (x, w, b)"
SECOND = "[second] y = Conv (d, v, c)"
DEPTHWISE = f"[second] y = Conv <group = {C}, pads = [1, 1, 1, 1]> (d, k)"
GROUPS = "[second] y = Conv <group = 4> (d, l)"


def model_of(between, second=SECOND, weights=WEIGHTS, outputs="float y", scheme=STATIC, kind="float"):
    body = f"{FIRST} {between} {second}"
    used = {name: array for name, array in weights.items() if any(f"{a}{name}{b}" in body for a in " (" for b in ",)")}
    if kind == "float16":
        used = {name: array.astype(np.float16) for name, array in used.items()}
    text = f"g ({kind}[B,3,9,9] x) => ({outputs.replace('float', kind)}) {{ {body} }}"
    return assigned(parse(text, used), scheme)


def batches(count=3, dtype="float32"):
    return [{"x": normal((2, 3, 9, 9), 20 + i, dtype)} for i in range(count)]


def smoothed(model, data=None, **options):
    return apply("smooth_conv", model, context(batches=batches() if data is None else data), **options)


def constant(model, name):
    return model.graph.initializers[name].const_value.numpy()


BETWEEN = {
    "nothing": "d = Identity(c0)",
    "Relu": "d = Relu(c0)",
    "LeakyRelu": "d = LeakyRelu <alpha = 0.2> (c0)",
    "two": "e = Relu(c0) d = Identity(e)",
    "Clip at 6": "d = Clip(c0, zero, six)",
    "Clip at 1, which is reached": "d = Clip(c0, zero, one)",
    "Clip without an end": "d = Clip(c0, zero)",
    "Clip between": "e = Relu(c0) f = Clip(e, zero, six) d = Identity(f)",
}


@pytest.mark.parametrize("second", [SECOND, DEPTHWISE, GROUPS], ids=["dense", "depthwise", "groups"])
@pytest.mark.parametrize("between", BETWEEN)
def test_a_pair_computes_the_same_on_the_calibration_data(between, second):
    model, data = model_of(BETWEEN[between], second), batches()
    want = [run(model, feeds)[0] for feeds in data]
    before, old = text_of(model), {name: constant(model, name) for name in ("w", "b")}
    result = smoothed(model, data)
    assert result.modified
    assert text_of(model) == before
    for feeds, wanted in zip(data, want, strict=True):
        assert np.abs(run(model, feeds)[0] - wanted).max() <= 1e-5 * np.abs(wanted).max()
    s = (old["w"] / constant(model, "w"))[:, 0, 0, 0]
    assert np.allclose(old["w"] / s[:, None, None, None], constant(model, "w"), rtol=1e-5)
    assert np.allclose(old["b"] / s, constant(model, "b"), rtol=1e-5)
    assert 1e-3 <= s.min() < 0.9
    assert s.max() == pytest.approx(1)
    record, last = result.records
    assert (record.site, record.action, record.reason) == ("first", "scaled", "smoothed for 'second'")
    assert record.metrics == {"smallest_factor": pytest.approx(s.min(), rel=1e-5)}
    assert (last.site, last.action) == ("second", "skipped")
    assert last.reason == "not smoothed: its result is an output of the model"


@pytest.mark.parametrize("between", ["Relu", "LeakyRelu", "nothing"])
def test_without_a_bound_nothing_moves_on_other_data_either(between):
    model, feeds = model_of(BETWEEN[between]), {"x": 10 * normal((2, 3, 9, 9), 70)}
    (want,) = run(model, feeds)
    smoothed(model)
    assert np.abs(run(model, feeds)[0] - want).max() <= 1e-5 * np.abs(want).max()


def test_channels_in_front_of_a_depthwise_convolution_become_equally_loud():
    model = model_of("d = Relu(c0)", DEPTHWISE)
    smoothed(model)
    d = np.concatenate([run(with_outputs(model, ["d"]), feeds, outputs=["d"])[0] for feeds in batches()])
    loudest = d.max((0, 2, 3))
    # All but what is a thousand times quieter than the loudest: a factor ends at 1e-3.
    assert np.sort(loudest)[1] == pytest.approx(loudest.max(), rel=0.01)


def rounded(values):
    scale, zero = activation_grid(values.min(), values.max(), ActivationSpec())
    return fake_quantize(values, scale, zero, ActivationSpec())


def rounded_channels(weight):
    scale = np.abs(weight).max((1, 2, 3), keepdims=True) / 127
    return np.rint(weight / scale) * scale


def sqnr(model, feeds):
    """Of the result, in dB, with both weights rounded to 8 bits a channel and the activation between to 8 bits."""
    want, read = run(with_outputs(model, ["d"]), feeds, outputs=["y", "d"])
    rest = ir.serde.deserialize_model(ir.serde.serialize_model(model))
    for node in rest.graph:
        if node.op_type == "Conv":
            value = node.inputs[1]
            weight = rounded_channels(value.const_value.numpy()).astype(np.float32)
            value.const_value = ir.Tensor(weight, name=value.name)
    (read,) = run(with_outputs(rest, ["d"]), feeds, outputs=["d"])
    (second,) = (node for node in rest.graph if node.name == "second")
    given = ir.Value(name="given", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(read.shape))
    rest.graph.inputs.append(given)
    second.replace_input_with(0, given)
    (got,) = run(rest, {**feeds, "given": rounded(read)}, outputs=["y"])
    return 10 * np.log10(np.square(want.astype(np.float64)).sum() / np.square(want - got.astype(np.float64)).sum())


@pytest.mark.parametrize(("second", "gain"), [(SECOND, 3.0), (DEPTHWISE, 20.0)], ids=["dense", "depthwise"])
@pytest.mark.parametrize("between", ["Relu", "LeakyRelu", "Clip at 6"])
def test_quiet_channels_survive_8_bits(between, second, gain):
    """On other data; weights that make the quiet channels count as much as the loud ones."""
    loud = channels(1).astype(np.float32)
    weights = {**WEIGHTS, "v": WEIGHTS["v"] / loud[:, None, None], "k": WEIGHTS["k"] / loud[:, None, None, None]}
    feeds = {"x": normal((4, 3, 9, 9), 70)}
    model = model_of(BETWEEN[between], second, weights)
    before = sqnr(model, feeds)
    smoothed(model)
    assert sqnr(model, feeds) > before + gain


REFUSED = {
    "its result is read by Sigmoid": "d = Sigmoid(c0)",
    "its result is read by Clip": "d = Clip(c0, one, six)",
    "its result is read by Mul": "d = Mul(c0, six)",
    "its result is read by MaxPool": "d = MaxPool <kernel_shape = [2, 2]> (c0)",
    "its result has other readers": "d = Relu(c0) e = Relu(c0)",
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_refused(reason):
    model = model_of(REFUSED[reason], outputs="float y, float e" if " e = " in REFUSED[reason] else "float y")
    before = serialized(model)
    result = apply("smooth_conv", model, context())  # nothing to measure, so that no data is missed
    assert not result.modified
    assert result.records[0].site == "first"
    assert result.records[0].action == "skipped"
    assert result.records[0].reason == f"not smoothed: {reason}"
    assert serialized(model) == before


def test_a_result_that_is_an_output_too_is_refused():
    result = apply("smooth_conv", model_of("d = Relu(c0)", outputs="float y, float d"), context())
    assert not result.modified
    assert result.records[0].reason == "not smoothed: its result has other readers"


def test_a_computed_bias_and_a_body_are_refused():
    text = f"""g (float[B,3,9,9] x, float[{C}] z, bool p) => (float y, float t) {{
        [first] e = Conv <pads = [1, 1, 1, 1]> (x, w, z) d = Relu(e) {SECOND}
        t = If (p) <then_branch = yes () => (float s) {{ [inner] i = Conv (d, v) s = Conv (i, u) }},
            else_branch = no () => (float r) {{ r = Relu(d) }}> }}"""
    model = assigned(parse(text, {**{name: WEIGHTS[name] for name in "wvc"}, "u": normal((5, 5, 1, 1), 8)}), STATIC)
    result = apply("smooth_conv", model, context())
    assert not result.modified
    assert {record.site: record.reason for record in result.records} == {
        "first": "not smoothed: its bias is computed",
        "second": "not smoothed: its result is an output of the model",
    }


@pytest.mark.parametrize("scheme", ["w8a8-dynamic-token", "w8a8-dynamic-tensor", "w8a16"])
def test_only_static_activations_are_smoothed(scheme):
    result = apply("smooth_conv", model_of("d = Relu(c0)", scheme=scheme), context())
    assert (result.modified, result.records) == (False, ())


def test_a_second_layer_that_stays_float_is_no_pair():
    model = parse(f"g (float[B,3,9,9] x) => (float y) {{ {FIRST} d = Relu(c0) {SECOND} }}",
                  {name: WEIGHTS[name] for name in "wbvc"})  # fmt: skip
    result = apply("smooth_conv", assigned(model, STATIC, names=("first",)), context())
    assert [record.reason for record in result.records] == ["not smoothed: its result is read by Conv"]


def test_weights_that_others_read_too_stay_for_them():
    weights = {"w": (normal((C, C, 3, 3), 1) * channels(1).reshape(-1, 1, 1, 1)).astype(np.float32), "b": WEIGHTS["b"]}
    text = f"""g (float[B,{C},9,9] x) => (float y, float z, float[{C},{C},3,3] w0) {{
        [first] e = Conv (x, w, b) d = Relu(e) [second] y = Conv (d, w, b) z = Conv (x, w, b) w0 = Identity(w) }}"""
    model = assigned(parse(text, weights), STATIC)
    data = [{"x": normal((2, C, 9, 9), 20)}]
    want = run(model, data[0])
    assert only(smoothed(model, data), "scaled") == ["first"]
    assert np.array_equal(constant(model, "w"), weights["w"])
    assert np.array_equal(constant(model, "b"), weights["b"])
    for got, wanted in zip(run(model, data[0]), want, strict=True):
        assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_a_chain_is_smoothed_link_by_link():
    text = f"""g (float[B,3,9,9] x) => (float y) {{ {FIRST} e = Clip(c0, zero, six)
        [deep] f = Conv <group = {C}, pads = [1, 1, 1, 1]> (e, k) d = Relu(f) {SECOND} }}"""
    model = assigned(parse(text, {name: WEIGHTS[name] for name in ("w", "b", "k", "v", "c", "zero", "six")}), STATIC)
    want = [run(model, feeds)[0] for feeds in batches()]
    assert only(smoothed(model), "scaled") == ["first", "deep"]
    for feeds, wanted in zip(batches(), want, strict=True):
        assert np.abs(run(model, feeds)[0] - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_half_precision_stays_half_precision():
    model, data = model_of("d = Relu(c0)", kind="float16"), batches(dtype="float16")
    (want,) = run(model, data[0])
    assert only(smoothed(model, data), "scaled") == ["first"]
    assert {value.const_value.dtype for value in model.graph.initializers.values()} == {ir.DataType.FLOAT16}
    # Roundings to 11 bits of each weight and of what is between, before and after.
    assert np.allclose(run(model, data[0])[0], want, rtol=5e-3, atol=5e-3 * np.abs(want).max())


def test_what_would_exceed_half_precision_is_refused():
    """The activation leaves a hundredth of a channel with a bias of -30000, so that its factor is below 0.1."""
    weights = {**WEIGHTS, "b": WEIGHTS["b"].copy()}
    weights["b"][0] = -3e4
    model = model_of("d = LeakyRelu <alpha = 1e-5> (c0)", DEPTHWISE, weights, kind="float16")
    before = serialized(model)
    result = smoothed(model, batches(dtype="float16"))
    assert not result.modified
    assert result.records[0].reason == "not smoothed: a weight or bias would exceed the range of its type"
    assert serialized(model) == before


def test_even_channels_are_left_alone():
    """All of them reach the bound, so that each has to keep it."""
    weights = {**WEIGHTS, "b": np.full(C, 9, np.float32)}
    model = model_of("d = Clip(c0, zero, six)", DEPTHWISE, weights)
    before = serialized(model)
    result = smoothed(model)
    assert not result.modified
    assert result.records[0].reason == "not smoothed: its channels are even already"
    assert serialized(model) == before


def test_a_model_without_convolutions_is_not_modified():
    result = apply("smooth_conv", parse("g (float[B] x) => (float[B] y) { y = Relu(x) }"), context())
    assert (result.modified, result.records) == (False, ())


@pytest.mark.parametrize("data", [None, []])
def test_calibration_data_is_needed(data):
    with pytest.raises(CalibrationError, match="smooth_conv needs calibration data; give --calibration PATH"):
        apply("smooth_conv", model_of("d = Relu(c0)"), context(batches=data))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_named(value):
    data = batches()
    data[1]["x"][0, 0, 0, 0] = value
    with pytest.raises(NumericsError, match="'second' reads"):
        smoothed(model_of("d = Identity(c0)"), data)


def test_factors_are_those_of_smoothquant_with_the_largest_being_one():
    reached, weights = np.array([4.0, 1.0, 0.25]), np.array([1.0, 4.0, 0.5])
    for alpha in (0.0, 0.3, 0.5, 1.0):
        plain = reached**alpha / weights ** (1 - alpha)
        assert np.allclose(bounded_factors(reached, weights, alpha), plain / plain.max())
        assert np.allclose(bounded_factors(reached, weights, alpha, margin=8.0), plain / plain.max())
    assert bounded_factors(reached, weights, 1.0).tolist() == [1, 0.25, 0.0625]
    # A channel is divided by a thousand at most.
    assert bounded_factors(np.array([1, 1e-6]), np.ones(2), 1.0).tolist() == [1, 1e-3]


def test_dead_channels_have_the_factor_one():
    reached, weights = np.array([0.0, 4.0, 2.0, 3.0]), np.array([1.0, 1.0, 1.0, 0.0])
    for bound in (np.inf, 6.0, 1.0):
        assert bounded_factors(reached, weights, 1.0, bound)[[0, 3]].tolist() == [1, 1]
    assert bounded_factors(reached, weights, 1.0).tolist() == [1, 1, 0.5, 1]
    assert bounded_factors(np.zeros(3), np.ones(3), 0.5).tolist() == [1, 1, 1]
    assert bounded_factors(np.zeros(3), np.ones(3), 0.5, 6.0).tolist() == [1, 1, 1]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("margin", [1.0, 8.0])
@pytest.mark.parametrize("seed", range(5))
def test_a_bound_leaves_each_channel_its_room(alpha, margin, seed):
    generator = np.random.default_rng(seed)
    bound = 6.0
    reached = np.minimum(10 ** generator.uniform(-3, 1.5 if seed else 0, 20), bound)
    weights = 10 ** generator.uniform(-1, 1, 20)
    s = bounded_factors(reached, weights, alpha, bound, margin)
    assert s.max() == 1
    assert (s * bound >= np.minimum(bound, margin * reached) * (1 - 1e-12)).all()
    assert (s[reached == bound] == 1).all()
    # Beyond that the order is that of the factors without a bound.
    free = (s < 1) & (s > np.minimum(bound, margin * reached) / bound * (1 + 1e-9)) & (s > 1e-3)
    plain = np.minimum(bound, margin * reached) ** alpha / weights ** (1 - alpha)
    assert np.ptp(np.log(s[free] / plain[free])) < 1e-9 if free.any() else True


def test_its_options_and_progress():
    kind = load("smooth_conv")
    assert str(kind(context(), {"alpha": "0.5", "margin": "4"})) == "smooth_conv{alpha=0.5,margin=4.0}"
    assert not kind.applies(context(scheme=STATIC).config)
    for option in ("alpha=1.5", "alpha=-0.1", "alpha=nan", "margin=0.5", "margin=nan", "margin=inf"):
        with pytest.raises(SchemeError, match=f"pass smooth_conv: .*{option} is no"):
            kind(context(), dict([option.split("=")]))
    ticks = Ticks()
    apply("smooth_conv", model_of("d = Relu(c0)"), context(batches=batches(), progress_to=ticks))
    assert ticks.seen == [("smooth_conv", i, 3) for i in (1, 2, 3)]


def test_the_result_does_not_depend_on_threads():
    found = []
    for threads in (1, 3):
        model = model_of("d = Relu(c0)")
        apply("smooth_conv", model, context(batches=batches(5), threads=threads))
        found.append(serialized(model))
    assert found[0] == found[1]
