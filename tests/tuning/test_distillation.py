"""That gradients gathered block by block are those of the whole model, and what the loss is."""

import numpy as np
import pytest

from tests.builders import context, decoder, normal, quantized, site_named

pytestmark = pytest.mark.torch

CPU = "CPUExecutionProvider"


class Recorder:
    """Stands in for a LearnedWeight: an ordinary tensor whose gradient is kept."""

    def __init__(self, name, array):
        self.name, self.array, self.slope = name, array, None

    def open(self):
        import torch

        self.tensor = torch.from_numpy(self.array.copy()).requires_grad_()
        return self.tensor

    def value(self):
        return self.open().detach()

    def step(self, pace):
        del pace
        self.slope = self.tensor.grad


def parts(model):
    """Blocks of the model, what the first of them reads, and what the head reads in the float model."""
    from concurrent.futures import ThreadPoolExecutor

    from qcompiler.blocks import TwoStreams, plan_blocks
    from qcompiler.scratch import Scratch
    from qcompiler.sites import find_sites
    from tests.builders import token_batches

    feeds = token_batches(1, 2, 9)
    sites = [site for site in find_sites(model)[0] if site.role != "embedding"]
    first, *middle, end = plan_blocks(model, sites, feeds[0], CPU)
    with ThreadPoolExecutor(1) as pool, Scratch(None) as scratch:
        streams = TwoStreams(model, feeds, scratch, pool, 1)
        streams.advance(first, CPU)
        for block in middle:
            streams.follow(block, CPU)
    return middle, end, streams.actual[0], streams.exact[0], streams.masks[0], feeds[0]


def test_gradients_are_those_of_the_whole_model():
    import torch

    from qcompiler.torch_graph import TorchGraph
    from qcompiler.torch_graph.dtypes import from_numpy
    from qcompiler.tuning import Example, Head, Settings, Stage, distill

    model = quantized(decoder(), context(scheme="w4a16-g16"))
    middle, end, reads, exact, mask, feeds = parts(model)
    names = {site.weight.name: site for block in middle for site in block.sites}
    moved = {
        name: np.array(site.weight.const_value.numpy()) + normal(site.weight.const_value.shape.numpy(), 5, scale=0.02)
        for name, site in names.items()
    }
    recorders = {name: Recorder(name, array) for name, array in moved.items()}
    stages = [
        Stage(
            TorchGraph(block.nodes, model.opset_imports, block.outputs),
            block.carried,
            [recorders[site.weight.name] for site in block.sites],
        )
        for block in middle
    ]
    original = from_numpy(np.array(site_named(model, "head").quantized.meta["original"].numpy()))
    head = Head(TorchGraph(end.nodes, model.opset_imports, end.outputs), {"wh": original})
    example = Example(reads, exact, mask)
    before, after = distill(stages, head, [example], [example], Settings(steps=1))
    # The oracle: the whole graph at once, and the divergence spelled out in double precision.
    whole = TorchGraph.from_model(model)
    leaves = {name: torch.from_numpy(array.copy()).requires_grad_() for name, array in moved.items()}
    inputs = {name: from_numpy(array) for name, array in feeds.items()}
    logits = whole.run(inputs, leaves)["logits"][torch.from_numpy(mask)].double()
    with torch.no_grad():
        kept = {value.name: value for value in model.graph.initializers.values()}
        floats = {
            name: from_numpy(np.array(value.const_value.meta["original"].numpy()))
            for name, value in kept.items()
            if "original" in value.const_value.meta
        }
        wanted = whole.run(inputs, floats)["logits"][torch.from_numpy(mask)].double()
    p, q = torch.log_softmax(wanted, -1), torch.log_softmax(logits, -1)
    loss = (p.exp() * (p - q)).sum(-1).mean()
    loss.backward()
    assert before == after == pytest.approx(float(loss.detach()), rel=1e-4)
    for name, leaf in leaves.items():
        scale = float(leaf.grad.abs().max())
        assert torch.allclose(recorders[name].slope, leaf.grad, rtol=1e-3, atol=1e-4 * scale), name


def test_a_lean_weight_goes_the_way_that_lowers_the_loss():
    """On a quadratic: codes follow the gradient, the size of a step is bounded, and codes stay within the format."""
    import torch

    from qcompiler.numerics.affine import WeightSpec, clip_grid, quantize
    from qcompiler.tuning import LearnedWeight, Pace, Start

    spec, weight = WeightSpec(4, 16, False), normal((8, 32), 0)
    grid = clip_grid(weight, spec)
    goal = torch.from_numpy(np.ascontiguousarray((weight + 0.3).T))
    learned = LearnedWeight(Start("w", weight, quantize(weight, grid, spec), grid, spec, "KN"), lean=True)
    losses = []
    for _ in range(60):
        loss = (learned.open() - goal).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        learned.step(Pace(0.05, 0.002, 0.0))
    assert losses[-1] < 0.5 * losses[0]
    assert 0 <= learned.codes.min() <= learned.codes.max() <= 15
    assert learned.codes.dtype == np.uint8
