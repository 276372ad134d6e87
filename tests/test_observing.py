"""Showing activations to collectors, against a plain run of the model."""

import numpy as np
import pytest

from qcompiler import observing
from qcompiler.errors import ModelError
from qcompiler.observing import observe
from tests.builders import decoder, linear_model, normal, parse, quantized, run, token_batches, with_outputs


class Keep:
    """Keeps a copy of all it sees."""

    def __init__(self):
        self.parts = []

    def part(self, values):
        return values.copy()

    def add(self, part):
        self.parts.append(part)


def shown(model, names, data, **options):
    """What collectors of the named values were given."""
    values = {value.name: value for value in (*model.graph.inputs, *(o for node in model.graph for o in node.outputs))}
    keepers = {name: Keep() for name in names}
    observe(model, {values[name]: [keepers[name]] for name in names}, data, **options)
    return {name: keeper.parts for name, keeper in keepers.items()}


def test_every_value_of_every_batch_is_shown_once_and_in_order():
    model, data = decoder(2), token_batches(4, padded=False)
    names = [o.name for node in model.graph for o in node.outputs if o.dtype is None or o.name != "logits"][:40]
    found = shown(model, [*names, "attention_mask"], data)
    source = with_outputs(model, names)
    for batch, feeds in enumerate(data):
        for name, expected in zip(names, run(source, feeds, outputs=names), strict=True):
            assert len(found[name]) == len(data)
            # ONNX Runtime's rewriting, which observing leaves on, adds in another order.
            np.testing.assert_allclose(found[name][batch], expected, rtol=2e-4, atol=2e-4 * np.abs(expected).max())
        np.testing.assert_array_equal(found["attention_mask"][batch], feeds["attention_mask"])


@pytest.mark.parametrize("watched", [1, 3, 100])
@pytest.mark.parametrize("threads", [1, 3])
def test_neither_chunks_nor_threads_change_what_is_shown(watched, threads, monkeypatch):
    model, data = decoder(1), token_batches(5)
    names = ["h0", "n0", "scores0", "m0", "t0", "logits"]
    expected = shown(model, names, data)
    monkeypatch.setattr(observing, "_WATCHED", watched)
    found = shown(decoder(1), names, data, threads=threads)
    for name in names:
        for one, other in zip(found[name], expected[name], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_padding_is_left_out():
    model, data = decoder(1), token_batches(3)
    found = shown(model, ["h0", "scores0"], data)
    source = with_outputs(model, ["h0"])
    for feeds, rows in zip(data, found["h0"], strict=True):
        mask = feeds["attention_mask"].astype(bool)
        assert not mask.all()
        np.testing.assert_allclose(rows, run(source, feeds, outputs=["h0"])[0][mask], rtol=1e-6)
    # Scores have the shape [B, S, S]; their first two axes are those of the mask too.
    assert [part.shape for part in found["scores0"]] == [(int(f["attention_mask"].sum()), 7) for f in data]


def test_padding_is_left_out_behind_heads_unless_a_collector_wants_all():
    text = """g (int64[B,S] input_ids, int64[B,S] attention_mask) => (float[B,5,S,4] y) {
        h = Gather(t, input_ids) r = Reshape(h, split) k = Transpose <perm = [0, 2, 1, 3]> (r) y = Neg(k) }"""
    model = parse(text, {"t": normal((512, 20), 1), "split": np.array([0, 0, 5, 4])})
    (feeds,) = token_batches(1)
    mask = feeds["attention_mask"].astype(bool)
    rows, everything = Keep(), Keep()
    everything.whole = True
    observe(model, {model.graph[2].outputs[0]: [rows, everything]}, [feeds])
    assert everything.parts[0].shape == (2, 5, 7, 4)
    assert not mask.all()
    np.testing.assert_array_equal(rows.parts[0], np.moveaxis(everything.parts[0], 2, 1)[mask])


def test_a_collector_may_watch_several_values_and_a_value_have_several_collectors():
    model = parse("g (float[B,4] x) => (float[B,4] y) { a = Neg(x) y = Exp(a) }")
    both, one = Keep(), Keep()
    x, (neg, _) = model.graph.inputs[0], model.graph
    data = [{"x": normal((2, 4), 1)}]
    observe(model, {x: [both], neg.outputs[0]: [both, one]}, data)
    assert len(both.parts) == 2
    np.testing.assert_array_equal(both.parts[0], -both.parts[1])
    np.testing.assert_array_equal(one.parts[0], -data[0]["x"])


def test_quantized_weights_are_what_the_values_are_computed_with():
    model = parse("g (float[B,64] x) => (float[B,24] y) { h = MatMul(x, w) y = Neg(h) }", {"w": normal((64, 24), 1)})
    data = [{"x": normal((3, 64), 2)}]
    quantized(model)
    (site,) = (node for node in model.graph if node.op_type == "MatMul")
    found = shown(model, ["h"], data)["h"][0]
    weight = site.inputs[1].const_value.dequantized()
    np.testing.assert_allclose(found, data[0]["x"] @ weight.T, rtol=1e-5, atol=1e-4)


def test_nothing_that_is_not_needed_runs():
    model = parse("g (float[B,4] x) => (float[B,4] y) { a = Neg(x) y = Reshape(a, bad) }", {"bad": np.array([7, 7])})
    data = [{"x": normal((2, 4), 1)}]
    np.testing.assert_array_equal(shown(model, ["a"], data)["a"][0], -data[0]["x"])


def test_the_model_is_left_as_it_was():
    from tests.builders import serialized

    model = decoder(1)
    before = serialized(model)
    shown(model, ["h0", "logits"], token_batches(2))
    assert serialized(model) == before


def test_progress_and_nothing_to_do():
    seen, model = [], linear_model()
    data = [{"x": normal((2, 64), i)} for i in range(3)]
    shown(model, ["y"], data, tick=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert shown(model, ["y"], []) == {"y": []}
    observe(model, {}, data)


def test_a_value_inside_a_body_is_refused():
    model = parse("""g (bool p, float[2,8] x) => (float[2,8] y) {
        y = If (p) <then_branch = yes () => (float[2,8] s) { s = Neg(x) },
            else_branch = no () => (float[2,8] t) { t = Abs(x) }>
    }""")
    inner = model.graph[0].attributes["then_branch"].as_graph()[0].outputs[0]
    data = [{"p": np.array(True), "x": normal((2, 8), 1)}]
    with pytest.raises(ModelError, match="'s' is not computed by the top graph and cannot be watched"):
        observe(model, {inner: [Keep()]}, data)
    # What bodies read from outside is there for them.
    np.testing.assert_array_equal(shown(model, ["y"], data)["y"][0], -data[0]["x"])
