"""Text that a language model writes itself."""

import numpy as np
import pytest

from qcompiler.calibration_inputs import ModelInputs
from qcompiler.feeding import input_specs
from qcompiler.synthetic.decoders import CachedDecoder, PlainDecoder, Sessions, cache_outputs
from qcompiler.synthetic.stepping import stepped_decoder
from qcompiler.synthetic.text import TextSettings, draw, write_rows
from tests.builders import normal
from tests.synthetic.models import VOCABULARY, language_model

CPU = Sessions("CPUExecutionProvider", 1)
LENGTH = 24


def inputs_of(model):
    return ModelInputs(input_specs(model), vocabulary=VOCABULARY)


def plain_decoder(model):
    return PlainDecoder(model, inputs_of(model), "logits", CPU)


def stepped(model, length=LENGTH):
    ids = np.random.default_rng(9).integers(0, VOCABULARY, (2, 6))
    return stepped_decoder(model, inputs_of(model), "logits", length, CPU, ids, plain_decoder(model).all_logits(ids))


def written(decoder, rows=5, length=LENGTH, seed=0, memory=1 << 30, ticks=None, **settings):
    tick = (lambda done, total: ticks.append((done, total))) if ticks is not None else lambda done, total: None
    return write_rows(decoder, rows, length, VOCABULARY, TextSettings(**settings), seed=seed, memory=memory, tick=tick)


def likelihood(model, ids):
    """Mean log-probability of the tokens behind the first ones."""
    logits = plain_decoder(model).all_logits(ids)[:, :-1].astype(np.float64)
    chances = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    chances -= logits.max(-1, keepdims=True)
    return np.take_along_axis(chances, ids[:, 1:, None], -1).mean()


def slowly_drawn(logits, temperature, top_p, chance):
    """The plain definition, a row at a time."""
    found = []
    for row, point in zip(logits.astype(np.float64) / temperature, chance, strict=True):
        chances = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        kept, total = set(), 0.0
        for token in np.argsort(-chances, kind="stable"):
            if total >= top_p:
                break
            kept.add(int(token))
            total += chances[token]
        target, below = point * total, 0.0
        for token in sorted(kept):
            below += chances[token]
            if below > target:
                found.append(token)
                break
    return found


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 0.95), (0.5, 0.5), (2.0, 1.0), (1.0, 1e-6)])
def test_tokens_are_drawn_from_the_fewest_that_make_up_top_p(temperature, top_p):
    logits = 3 * normal((40, 50), 0)
    chance = np.random.default_rng(1).random(40)
    assert draw(logits, temperature, top_p, chance).tolist() == slowly_drawn(logits, temperature, top_p, chance)


def test_a_cached_decoder_answers_as_the_whole_model_does():
    model = language_model(cache=True)
    inputs = inputs_of(model)
    decoder = CachedDecoder(model, inputs, "logits", cache_outputs(model, inputs), CPU)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (3, 9))
    whole = plain_decoder(language_model()).all_logits(ids)
    steps = np.stack([decoder.logits(ids[:, : place + 1]) for place in range(9)], axis=1)
    np.testing.assert_allclose(steps, whole, atol=1e-4)
    np.testing.assert_allclose(decoder.logits(ids[:, :1]), whole[:, 0], atol=1e-4)  # begins anew


def test_a_cache_is_derived_where_the_graph_has_none():
    model = language_model()
    before = [node.op_type for node in model.graph]
    decoder = stepped(model)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (3, LENGTH))
    whole = plain_decoder(model).all_logits(ids)
    steps = np.stack([decoder.logits(ids[:, : place + 1]) for place in range(LENGTH)], axis=1)
    np.testing.assert_allclose(steps, whole, atol=1e-4)
    assert decoder.bytes_per_token == 2 * 32 * 4  # keys and values of 32 floats
    assert [node.op_type for node in model.graph] == before


def test_no_cache_is_derived_where_it_would_not_hold():
    assert stepped(language_model(causal=False)) is None


def test_rows_are_what_their_seed_says_whichever_way_they_are_written():
    model, cached = language_model(), language_model(cache=True)
    inputs = inputs_of(cached)
    ways = [
        stepped(model),
        CachedDecoder(cached, inputs, "logits", cache_outputs(cached, inputs), CPU),
    ]
    ticks = []
    first, second = (written(way, ticks=ticks) for way in ways)
    assert first.shape == (5, LENGTH)
    assert first.min() >= 0
    assert first.max() < VOCABULARY
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, written(ways[0], memory=1))  # row by row
    assert (first != written(ways[0], seed=1)).mean() > 0.9
    assert ticks[-1] == (LENGTH, LENGTH)


def test_the_model_finds_its_text_likely():
    model = language_model()
    text = written(stepped(model), rows=8)
    random = np.random.default_rng(0).integers(0, VOCABULARY, text.shape)
    assert likelihood(model, text) > likelihood(model, random) + 2  # nats a token


def test_the_first_tokens_are_the_likeliest_ones():
    model = language_model()
    text = written(stepped(model), greedy=3)
    best = plain_decoder(model).all_logits(text).argmax(-1)
    np.testing.assert_array_equal(text[:, 1:4], best[:, :3])
    assert (text[:, 4:] != best[:, 3:-1]).any()


def test_a_row_is_made_of_texts():
    decoder = stepped(language_model())
    text = written(decoder, rows=3, text=10)
    alone = written(decoder, rows=9, length=10)
    np.testing.assert_array_equal(text, alone.reshape(3, 30)[:, :LENGTH])


def test_without_a_cache_texts_are_short():
    decoder = plain_decoder(language_model())
    assert decoder.longest == 32
    decoder.longest = 10
    np.testing.assert_array_equal(written(decoder), written(decoder, text=10))
