"""Noise layer by layer: what is compared with what, the figures, and who is named as guilty."""

import math

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler import observing
from qcompiler.graph import constant_array
from qcompiler.propagation import propagate, without_padding
from qcompiler.propagation_graph import find_taps
from qcompiler.session import InputSpec
from tests.builders import decoder, normal, quantized, run, serialized, token_batches, with_outputs
from tests.integer_models import CONV, IMAGE, ROWS, batches, graph, integers

MLP = "a = MatMul(x, m0) r = Relu(a) b = MatMul(r, m1) s = Add(b, x) [last] y = MatMul(s, m2)"


def shaken(model, **noise):
    """The model with noise of a seed added to weights, by name; the number is its size."""
    for value in model.graph.initializers.values():
        if value.name in noise:
            array = constant_array(value)
            value.const_value = ir.Tensor(
                array + normal(array.shape, len(array) + sum(map(ord, value.name)), scale=noise[value.name]),
                name=value.name,
            )
    return model


def by_output(found):
    return {layer.output: layer for layer in found.layers}


def naive_share(reference, model, data, name):
    """Noise by energy of one tensor, from two plain runs of each batch."""
    signal = noise = 0.0
    for feeds in data:
        one, other = (run(with_outputs(each, [name]), feeds, outputs=[name])[0] for each in (reference, model))
        signal += float((one.astype(np.float64) ** 2).sum())
        noise += float(((one.astype(np.float64) - other) ** 2).sum())
    return noise / signal


def test_figures_are_those_of_two_plain_runs():
    reference, data = graph(MLP, ROWS), batches(ROWS)
    model = shaken(graph(MLP, ROWS), m0=0.01, m2=0.02)
    found = propagate(reference, model, data)
    assert (found.matched, found.tensors, found.rows) == (5, 5, len(data))
    shares = {name: naive_share(reference, model, data, name) for name in "arbsy"}
    for name, layer in by_output(found).items():
        assert layer.after_db == pytest.approx(-10 * math.log10(shares[name]), abs=1e-3)
    layers = by_output(found)
    assert layers["a"].before_db == math.inf
    assert layers["a"].added == pytest.approx(shares["a"], rel=1e-4)
    assert layers["a"].drop_db is None
    assert layers["b"].added == pytest.approx(shares["b"] - shares["r"], rel=1e-3)
    assert layers["y"].drop_db == pytest.approx(layers["s"].after_db - layers["y"].after_db)


def test_what_two_inputs_bring_along_is_not_blamed_on_a_sum_or_product():
    text = "a = MatMul(x, m0) b = MatMul(x, m1) s = Add(a, b) p = Mul(a, b) c = Concat <axis = 1> (a, b) y = Neg(s)"
    outputs = "float[B,8] y, float[B,8] p, float[B,16] c"
    models = [graph(text, ROWS, outputs=outputs) for _ in range(2)]
    found = by_output(propagate(models[0], shaken(models[1], m0=0.02, m1=0.03), batches(ROWS, 20)))
    for name in "spc":
        share = 10 ** (-found[name].after_db / 10)
        assert abs(found[name].added) < 0.2 * share, name
    assert found["y"].added == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("watched", [1, 2, 100])
@pytest.mark.parametrize("threads", [1, 3])
def test_neither_chunks_nor_threads_change_the_figures(watched, threads, monkeypatch):
    def figures():
        model = shaken(decoder(2), wq1=0.02, wd0=0.02)
        found = propagate(decoder(2), model, token_batches(5), threads=threads)
        return {layer.output: layer.after_db for layer in found.layers if layer.after_db < 120}

    expected = figures()
    monkeypatch.setattr(observing, "_WATCHED", watched)
    assert figures() == pytest.approx(expected, abs=1e-2)
    assert {"q1", "d0", "logits"} <= set(expected)


def test_values_that_a_kernel_encodes_are_watched_as_codes():
    text = f"a = {CONV}(x, w0) r = Relu(a) b = {CONV}(r, w1) y = Sigmoid(b)"
    reference, model, data = graph(text), graph(text), batches()
    integers(model, data)
    taps = find_taps(reference, model)
    assert taps.keys() == {"r", "b", "y"}
    assert {name for name, tap in taps.items() if tap.scale is not None} == {"r", "b"}
    found = propagate(reference, model, data)
    assert (found.matched, found.tensors) == (3, 4)
    layers = by_output(found)
    assert [layers[name].quantized for name in "rby"] == [True, True, False]
    decoded = [output.name for node in model.graph for output in node.outputs if node.op_type == "DequantizeLinear"]
    values = run(with_outputs(model, decoded), data[0], outputs=decoded)
    expected = run(with_outputs(reference, ["r"]), data[0], outputs=["r"])[0]
    errors = [float(((array - expected) ** 2).sum()) for array in values if array.shape == expected.shape]
    one = propagate(reference, model, data[:1])
    share = min(errors) / float((expected.astype(np.float64) ** 2).sum())
    assert by_output(one)["r"].after_db == pytest.approx(-10 * math.log10(share), abs=0.1)
    assert (layers["r"].name, layers["r"].operator, layers["r"].site) == ("w0", "Conv", True)


def test_an_output_that_is_decoded_for_the_caller_keeps_its_name():
    text = f"a = {CONV}(x, w0) y = {CONV}(a, w1)"
    reference, model, data = graph(text), graph(text), batches()
    integers(model, data)
    found = by_output(propagate(reference, model, data))
    expected = naive_share(reference, model, data, "y")
    assert found["y"].after_db == pytest.approx(-10 * math.log10(expected), abs=0.1)


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w8a8-dynamic-tensor"])
def test_values_that_are_scaled_at_run_time_are_matched_too(scheme):
    reference, model, data = graph(MLP, ROWS), graph(MLP, ROWS), batches(ROWS)
    integers(model, data, scheme)
    found = propagate(reference, model, data)
    assert (found.matched, found.tensors) == (5, 5)
    assert {layer.output for layer in found.layers if layer.quantized} == {"a", "b", "y"}


def test_the_noise_of_a_quantized_layer_is_its_own():
    reference, model, data = graph(MLP, ROWS), graph(MLP, ROWS), batches(ROWS)
    integers(model, data)
    layers = by_output(propagate(reference, model, data))
    weights = {name: constant_array(reference.graph.initializers[name]).astype(np.float64) for name in ("m1", "m2")}
    for read, weight, made in (("r", "m1", "b"), ("s", "m2", "y")):
        noise = signal = 0.0
        for feeds in data:
            arrived, result = run(with_outputs(model, [read, made]), feeds, outputs=[read, made])
            (expected,) = run(with_outputs(reference, [made]), feeds, outputs=[made])
            noise += float(((arrived.astype(np.float64) @ weights[weight] - result) ** 2).sum())
            signal += float((expected.astype(np.float64) ** 2).sum())
        assert layers[made].added == pytest.approx(noise / signal, rel=0.05)


def test_the_worst_layers_are_the_quantized_ones_that_add_noise():
    text = "a = MatMul(x, m0) g = Softmax(a) b = MatMul(g, m1) [last] y = MatMul(b, m2)"
    reference, model = graph(text, ROWS), graph(text, ROWS)
    quantized(model)
    for value, size in (("m0", 0.0), ("m1", 0.0), ("m2", 0.3)):
        shaken(model, **{value: size})
    found = propagate(reference, model, batches(ROWS))
    assert found.worst(5) == []  # the weights are floats again: nothing is computed from codes
    model = graph(text, ROWS)
    integers(model, batches(ROWS))
    shaken(model, m2=0.0)
    found = propagate(reference, model, batches(ROWS))
    worst = found.worst(2)
    assert len(worst) == 2
    assert worst[0].added >= worst[1].added > 0
    assert all(layer.site for layer in found.worst(9, sites=True))
    assert found.worst(0) == []


def test_channels_that_were_rescaled_are_no_noise():
    text = "a = MatMul(x, m0) y = MatMul(a, m1)"
    reference, model = graph(text, ROWS), shaken(graph(text, ROWS), m0=1e-4)
    factors = np.array([1, 2, 3, 4, 5, 6, 7, 0.1], np.float32)
    for name, change in (("m0", factors), ("m1", 1 / factors[:, None])):
        value = model.graph.initializers[name]
        value.const_value = ir.Tensor((constant_array(value) * change).astype(np.float32), name=name)
    layers = by_output(propagate(reference, model, batches(ROWS)))
    assert (layers["a"].rescaled, layers["y"].rescaled) == (True, False)
    assert layers["a"].after_db > 60
    assert layers["y"].after_db > 60


def test_tensors_of_another_shape_or_type_are_not_matched():
    reference = graph("a = Neg(x) b = Neg(a) y = Neg(b)", ROWS)
    other = graph("t = Concat <axis = 0> (x, x) a = Neg(t) b = Shape(x) y = Neg(x)", ROWS)
    found = propagate(reference, other, batches(ROWS, 2))
    assert [layer.output for layer in found.layers] == ["y"]


def test_nothing_to_run_is_nothing_found():
    found = propagate(graph(MLP, ROWS), graph(MLP, ROWS), [])
    assert (found.layers, found.matched) == ((), 0)


def test_inputs_of_another_type_are_converted():
    reference, half = graph(MLP, ROWS), graph(MLP, ROWS, dtype="float16")
    found = propagate(reference, half, batches(ROWS), inputs=[InputSpec("x", "float16", (None, 8))])
    assert found.matched == 5
    assert all(layer.after_db > 50 for layer in found.layers)


def test_progress_is_reported_and_models_stay_as_they_are():
    reference, model, seen = graph(MLP, ROWS), graph(MLP, ROWS), []
    before = serialized(reference), serialized(model)
    propagate(reference, model, batches(ROWS, 3), tick=lambda *step: seen.append(step))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert (serialized(reference), serialized(model)) == before


# Padding.


def test_padding_is_left_out_wherever_the_tokens_run():
    mask = np.array([[True, True, False], [True, False, False]])
    plain = normal((2, 3, 4), 0)
    np.testing.assert_array_equal(without_padding(plain, mask), plain[mask])
    heads = normal((2, 5, 3, 4), 1)
    expected = np.stack([heads[0, :, 0], heads[0, :, 1], heads[1, :, 0]])
    np.testing.assert_array_equal(without_padding(heads, mask), expected)
    np.testing.assert_array_equal(without_padding(heads.reshape(10, 3, 4), mask), expected)
    np.testing.assert_array_equal(without_padding(plain, None), plain)
    image = normal((2, 5, 6, 7), 2)
    np.testing.assert_array_equal(without_padding(image, mask), image)


def test_scores_of_hidden_keys_count_nothing():
    mask = np.array([[True, True, False]])
    scores = normal((1, 2, 3, 3), 3)
    found = without_padding(scores, mask)
    assert found.shape == (2, 2, 3)
    assert not found[..., 2].any()
    np.testing.assert_array_equal(found[0, :, :2], scores[0, :, 0, :2])
    np.testing.assert_array_equal(without_padding(np.array([1, -3e38, 2], np.float32), None), [1, 0, 2])


def test_padding_tokens_change_no_figure():
    (feeds,) = token_batches(1, rows=1, padded=False)
    longer = {
        "input_ids": np.concatenate([feeds["input_ids"], np.full((1, 3), 5)], 1),
        "attention_mask": np.concatenate([feeds["attention_mask"], np.zeros((1, 3), np.int64)], 1),
    }
    figures = []
    for data in (feeds, longer):
        found = propagate(decoder(1), shaken(decoder(1), wq0=0.05), [data])
        figures.append({name: layer.after_db for name, layer in by_output(found).items()})
    for name in ("q0", "p0", "a0", "logits"):
        assert figures[0][name] == pytest.approx(figures[1][name], abs=0.01), name
    assert figures[0]["k0"] == math.inf


def test_an_image_model_is_matched_whole():
    text = f"a = {CONV}(x, w0) b = Add(a, x) y = {CONV}(b, w1)"
    reference, model, data = graph(text, IMAGE), graph(text, IMAGE), batches()
    integers(model, data)
    found = propagate(reference, model, data, threads=2)
    assert (found.matched, found.tensors) == (3, 3)
    assert all(layer.quantized and 20 < layer.after_db < 60 for layer in found.layers)
