"""That gradients are those of the whole model's answer, and what is made of them."""

import numpy as np
import pytest

from qcompiler.blocks import answer_block, plan_blocks
from qcompiler.calibration import row_mask
from qcompiler.guidance import guidance
from qcompiler.passes.base import streaming
from qcompiler.scratch import Scratch
from qcompiler.sites import find_sites
from tests.builders import context, decoder, normal, parse, site_named, token_batches

pytestmark = pytest.mark.torch

CPU = "CPUExecutionProvider"


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Products in float32, whatever the processor can do."""
    from qcompiler.tuning import fisher

    monkeypatch.setattr(fisher, "fast_bfloat16", lambda: False)


def measured(model, rows, draws=1, seed=0):
    """OutputFacts by the name of the site, and the ticks."""
    from qcompiler.tuning import fisher_information

    sites = [site for site in find_sites(model)[0] if site.role != "embedding"]
    blocks = plan_blocks(model, sites, rows[0], CPU)
    blocks[-1] = answer_block(model, blocks)
    masks, ticks = [row_mask(feeds) for feeds in rows], []
    with Scratch(None) as scratch:
        found = fisher_information(
            model,
            blocks,
            rows,
            masks,
            scratch,
            seed=seed,
            threads=1,
            draws=draws,
            tick=lambda *done: ticks.append(done),
        )
        return {site.name: facts for site, facts in found}, ticks


def test_gradients_are_those_of_the_whole_model():
    import torch

    from qcompiler.torch_graph import TorchGraph
    from qcompiler.torch_graph.dtypes import from_numpy
    from qcompiler.tuning import fisher

    model, rows = decoder(), token_batches(3, 1, 12)
    found, ticks = measured(model, rows)
    assert ticks[-1] == (12, 12)
    names = {site.name: site.node.outputs[0].name for site in find_sites(model)[0] if site.role == "linear"}
    assert found.keys() == names.keys() - {"embed", "head"}
    # The oracle: the whole graph at once.
    whole = TorchGraph(list(model.graph), model.opset_imports, ["logits", *(names[name] for name in found)])
    table = from_numpy(np.array(model.graph.initializers["table"].const_value.numpy())).requires_grad_()
    sums = {name: 0.0 for name in found}
    for number, feeds in enumerate(rows):
        results = whole.run({name: from_numpy(array) for name, array in feeds.items()}, {"table": table})
        mask, random = row_mask(feeds), torch.Generator().manual_seed(number)
        (slope,) = fisher._drawn({"logits"}, mask, random, {"logits": results["logits"].detach()}).values()
        taps = [results[names[name]] for name in found]
        for name, gradient in zip(found, torch.autograd.grad(results["logits"], taps, slope), strict=True):
            g = gradient.numpy()[mask].astype(np.float64)
            lengths = np.square(g).sum(1)
            limit = 10 * np.sort(lengths[lengths > 0])[(np.count_nonzero(lengths) - 1) // 2]  # torch's median
            counts = np.minimum(lengths, limit)
            assert np.allclose(found[name].tokens[number], counts, rtol=1e-3, atol=1e-5 * limit), name
            g *= np.sqrt(np.divide(counts, lengths, out=np.zeros_like(lengths), where=lengths > 0))[:, None]
            sums[name] += g.T @ g
    for name, facts in found.items():
        (total,) = facts.sums
        assert np.allclose(total, sums[name], rtol=1e-3, atol=1e-4 * np.abs(sums[name]).max()), name


def test_the_mean_of_many_draws_is_the_fisher_information():
    """Of a choice among words with chances p that is diag(p) - p p^T."""
    import torch

    from qcompiler.tuning import fisher

    logits = torch.from_numpy(normal((1, 1, 6), 0)).expand(1, 40000, 6)
    slope = fisher._choice(logits, None, torch.Generator().manual_seed(0))[0].numpy()
    p = np.exp(logits[0, 0].numpy()) / np.exp(logits[0, 0].numpy()).sum()
    assert np.allclose(slope.T @ slope / len(slope), np.diag(p) - np.outer(p, p), atol=0.01)


def test_an_answer_without_words_counts_by_its_squared_error():
    """y = x W: the gradients at y are noise in units of y, whatever W, and all outputs count the same."""
    import torch

    from qcompiler.tuning import fisher

    values = torch.from_numpy(normal((2, 500, 8), 1, scale=30))
    mask = np.ones((2, 500), bool)
    mask[:, 400:] = False
    slope = fisher._noise(values, mask, torch.Generator().manual_seed(0))
    assert not slope[:, 400:].any()
    assert slope[:, :400].std() == pytest.approx(1 / float(values[:, :400].square().mean().sqrt()), rel=0.05)


def test_a_wide_layer_is_taken_in_parts(monkeypatch):
    from qcompiler.statistics import OutputFacts

    model, rows = decoder(), token_batches(2, 1, 12)
    whole, _ = measured(model, rows)
    monkeypatch.setattr("qcompiler.statistics._WIDEST", 20)
    monkeypatch.setattr(OutputFacts, "width", 20)
    parts, _ = measured(model, rows)
    assert [part.shape for part in parts["l0_up"].sums] == [(20, 20), (20, 20), (8, 8)]
    assert np.allclose(parts["l0_up"].sums[1], whole["l0_up"].sums[0][20:40, 20:40], rtol=1e-4, atol=1e-6)


def guide(model, batches, **options):
    """What `guidance` yields, read before leaving: for each site tokens and curvatures."""
    ctx = context(batches=batches, **options)
    with guidance(model, batches, streaming(ctx, "t", sequential=False), draws=1, seed=0) as found:
        sites = [site for site in find_sites(model)[0] if site.role != "embedding"]
        known = {site.name: (found.tokens([site]), found.curvatures(site)) for site in sites if found.knows(site)}
        return known, found.problem


def test_guidance_is_laid_out_for_the_batches():
    model, batches = decoder(), token_batches(3, 2, 12)
    known, problem = guide(model, batches)
    assert problem == ""
    rows = [{name: array[row : row + 1] for name, array in feeds.items()} for feeds in batches for row in range(2)]
    facts, _ = measured(model, rows)
    for name, (tokens, curvatures) in known.items():
        assert [len(each) for each in tokens] == [int(feeds["attention_mask"].sum()) for feeds in batches]
        flat = np.concatenate(facts[name].tokens)
        assert np.allclose(np.concatenate(tokens), 0.4 + 0.6 * flat / flat.mean(), rtol=1e-5)
        assert np.allclose(curvatures[0], facts[name].sums[0], rtol=2e-3, atol=2e-3 * facts[name].sums[0].max())


def test_sites_that_read_the_same_share_what_tokens_count():
    model, batches = decoder(), token_batches(2, 2, 12)
    ctx = context(batches=batches)
    with guidance(model, batches, streaming(ctx, "t", sequential=False), draws=2, seed=0) as found:
        sites = [site_named(model, name) for name in ("l0_q", "l0_k", "l0_v")]
        together = np.concatenate(found.tokens(sites))
        assert together.mean() == pytest.approx(1)
        assert found.tokens([*sites, site_named(model, "head")]) is None
        alone = [np.concatenate(found.tokens([site])) for site in sites]
        assert (together <= np.max(alone, axis=0) * (1 + 1e-5)).all()
        assert (together >= np.min(alone, axis=0) * (1 - 1e-5)).all()


def test_layers_behind_the_last_narrow_place_are_measured_too():
    """An encoder has no head: its last layers are in the block that gives the answer, normalization included."""
    text = """g (float[B,S,16] x) => (float[B,S,12] y) {
        [a] h = MatMul(x, wa) r = Relu(h) [b] z = MatMul(r, wb) y = LayerNormalization(z, gain, shift) }"""
    weights = {"wa": normal((16, 32), 0), "wb": normal((32, 12), 1), "gain": np.ones(12, np.float32)}
    model = parse(text, {**weights, "shift": np.zeros(12, np.float32)})
    known, problem = guide(model, [{"x": normal((2, 30, 16), 2)}])
    assert problem == ""
    assert known.keys() == {"a", "b"}
    # What a normalization takes away, the mean and the size, nothing hangs on.
    (curvature,) = known["b"][1]
    assert np.ones(12) @ curvature @ np.ones(12) < 1e-2 * np.trace(curvature)


def test_what_pytorch_cannot_run_is_said():
    text = "g (float[B,8] x) => (int32[B,1] y) { [fc] h = MatMul(x, w) y = Multinomial(h) }"
    known, problem = guide(parse(text, {"w": normal((8, 4), 0)}), [{"x": normal((2, 8), 0)}])
    assert known == {}
    assert problem == (
        "the model cannot run in PyTorch: ai.onnx.Multinomial 'y' at version 21: the operator is not among those "
        "implemented in PyTorch"
    )


def test_a_model_without_layers_has_no_guidance():
    known, problem = guide(parse("g (float[B,8] x) => (float[B,8] y) { y = Relu(x) }"), [{"x": normal((2, 8), 0)}])
    assert (known, problem) == ({}, "")


def test_prices_are_half_the_mean_square_of_gradients():
    model, rows = decoder(), token_batches(3, 1, 12)
    found, _ = measured(model, rows)
    with guidance(model, rows, streaming(context(batches=rows), "x", sequential=False), draws=1, seed=0) as guide:
        for site in find_sites(model)[0]:
            facts = found.get(site.name)
            if facts is None:
                assert guide.prices(site) is None
                continue
            tokens = sum(len(each) for each in facts.tokens)
            expected = np.concatenate([np.diagonal(total) for total in facts.sums]) / (2 * tokens)
            np.testing.assert_allclose(guide.prices(site), expected, rtol=1e-5)
