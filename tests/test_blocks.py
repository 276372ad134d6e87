"""Where blocks end, and that both streams compute what the whole model computes with either set of weights."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest

from qcompiler.blocks import TwoStreams, float_weights, join_levels, learned_outputs, measure_sizes, plan_blocks
from qcompiler.scratch import Scratch
from qcompiler.segments import plan_segments
from qcompiler.sites import find_sites
from tests.builders import context, decoder, normal, parse, quantized, run, site_named, token_batches, with_outputs

CPU = "CPUExecutionProvider"


def linear_sites(model):
    return [site for site in find_sites(model)[0] if site.role != "embedding"]


def names_of(blocks):
    return [[site.name for site in block.sites] for block in blocks]


def test_a_decoder_is_cut_at_the_residual_stream():
    """Where attention begins both the stream and the attention's result cross: no narrow place."""
    model = decoder(3)
    (feeds,) = token_batches(1)
    blocks = plan_blocks(model, linear_sites(model), feeds, CPU)
    layers = [[f"l{i}_{name}" for name in ("q", "k", "v", "o", "gate", "up", "down")] for i in range(3)]
    assert names_of(blocks) == [[], *layers, ["head"]]
    assert [learned_outputs(block, block.sites) for block in blocks[1:]] == [["h1"], ["h2"], ["h3"], ["logits"]]
    assert blocks[1].outputs == [
        "hidden",
        "h1",
    ]  # the mask is computed where it is first read, and does not depend on sites
    # The normalization belongs to the block that begins with it, since what it reads is kept anyway.
    assert "n1" in {output.name for node in blocks[2].nodes for output in node.outputs}
    assert sorted(blocks[2].inputs) == ["h1", "hidden"]
    assert blocks[2].carried == ["hidden"]


def test_narrow_places_are_counted():
    model = decoder(2)
    (feeds,) = token_batches(1)
    halves = plan_blocks(model, linear_sites(model), feeds, CPU, narrow=1)
    outputs = [learned_outputs(block, block.sites) for block in halves[1:]]
    assert outputs == [["m0"], ["h1"], ["m1"], ["h2"], ["logits"]]


@pytest.mark.parametrize("widths", [[64, 32, 16, 8], [8, 16, 32, 64]])
def test_every_site_is_in_one_block_where_nothing_is_narrow(widths):
    text = "".join(f"[s{i}] v{i + 1} = MatMul(v{i}, w{i})\n" for i in range(len(widths) - 1))
    model = parse(
        f"g (float[B,{widths[0]}] v0) => (float[B,{widths[-1]}] v{len(widths) - 1}) {{ {text} }}",
        {f"w{i}": normal(shape, i) for i, shape in enumerate(pairwise(widths))},
    )
    blocks = plan_blocks(model, linear_sites(model), {"v0": normal((2, widths[0]), 9)}, CPU)
    assert [name for names in names_of(blocks) for name in names] == [f"s{i}" for i in range(len(widths) - 1)]


def test_sizes_are_those_of_the_activations():
    model = decoder(1)
    (feeds,) = token_batches(1, rows=2, length=7)
    sizes = measure_sizes(model, plan_segments(model, linear_sites(model)), feeds, CPU)
    assert sizes["h0"] == 2 * 7 * 32 * 4
    assert sizes["t0"] == 2 * 7 * 48 * 4


def test_more_levels_than_are_looked_ahead_are_cut_all_the_same():
    """A bulge of twelve levels between two narrow places."""
    count = 14
    wide = [8, *[64] * (count - 1), 8]
    text = "".join(f"[s{i}] v{i + 1} = MatMul(v{i}, w{i})\n" for i in range(count))
    model = parse(
        f"g (float[B,8] v0) => (float[B,8] v{count}) {{ {text} }}",
        {f"w{i}": normal((wide[i], wide[i + 1]), i) for i in range(count)},
    )
    levels = plan_segments(model, linear_sites(model))
    blocks = join_levels(model, levels, measure_sizes(model, levels, {"v0": normal((2, 8), 9)}, CPU), 99)
    assert [len(block.sites) for block in blocks] == [0, 8, 6]


def test_original_weights_are_lent():
    model = decoder(1)
    quantized(model, context(scheme="w4a16-g16"))
    site = site_named(model, "l0_q")
    stored = site.quantized
    with float_weights([site.node]):
        assert site.weight.const_value is stored.meta["original"]
    assert site.weight.const_value is stored


@pytest.mark.parametrize("threads", [1, 3])
def test_both_streams_compute_what_the_model_computes(threads):
    batches = token_batches(4)
    exact, actual = decoder(2), decoder(2)
    quantized(actual, context(scheme="w4a16-g16"))
    blocks = plan_blocks(actual, linear_sites(actual), batches[0], CPU)
    with ThreadPoolExecutor(threads) as pool, Scratch(None) as scratch:
        streams = TwoStreams(actual, batches, scratch, pool, threads)
        for block in blocks[:-1]:
            streams.advance(block, CPU)
            wanted = [*block.outputs, *block.carried]
            for batch, feeds in enumerate(batches):
                for model, stream in ((exact, streams.exact), (actual, streams.actual)):
                    values = run(with_outputs(model, wanted), feeds, outputs=wanted)
                    assert stream[batch].keys() == set(wanted)
                    for name, value in zip(wanted, values, strict=True):
                        assert np.allclose(stream[batch][name], value, atol=1e-5)
        assert streams.masks[0].shape == batches[0]["input_ids"].shape
        held = {id(array): array.nbytes for s in (streams.exact, streams.actual) for f in s for array in f.values()}
        assert scratch.live_bytes == sum(held.values())
