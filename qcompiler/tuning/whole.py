"""A model cut into blocks as `distillation` takes it, and what is learned of it as arrays."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir

from qcompiler.checkpoints import Arrays, Periodic
from qcompiler.graph import Site
from qcompiler.torch_graph import TorchGraph, unsupported
from qcompiler.torch_graph.dtypes import to_torch
from qcompiler.tuning.distillation import Head, Stage, distill
from qcompiler.tuning.learned_vector import LearnedVector, vector_arrays, vectors_apart
from qcompiler.tuning.learned_weight import LearnedWeight
from qcompiler.tuning.losses import Example
from qcompiler.tuning.rounding import Outcome, Settings
from qcompiler.tuning.sites import outcome_arrays, start_of

if TYPE_CHECKING:
    from qcompiler.segments import Segment

__all__ = ["learn_whole", "whole_problem"]


def whole_problem(model: ir.Model, blocks: "Sequence[Segment]") -> str:
    """Why nothing can be learned through the whole of a model that is cut into blocks, or nothing."""
    if len(blocks) < 3 or any(site.role != "lm_head" for site in blocks[-1].sites):
        return "no vocabulary is at the end"
    problems = unsupported([node for block in blocks[1:] for node in block.nodes], model.opset_imports)
    return f"its model cannot run in PyTorch: {problems[0]}" if problems else ""


def learn_whole(
    model: ir.Model,
    sites: Sequence[Site],
    blocks: "Sequence[Segment]",
    examples: tuple[Sequence[Example], Sequence[Example]],
    settings: Settings,
    *,
    vectors: bool,
    tick: Callable[[int, int, float], None],
    stored: Periodic | None,
) -> Arrays:
    """Learn the weights of all blocks but the last, which is the head.

    Args:
        model: The model.
        sites: Whose weights are learned.
        blocks: In order.
        examples: To learn from, and to judge by; see `distill`.
        settings: How.
        vectors: Whether gains and biases are learned as well.
        tick: Called with (steps done, steps, loss).
        stored: See `distill`.

    Returns:
        `outcome_arrays` of the sites, and the vectors for `put_back_vectors`.
    """
    *middle, end = blocks
    learned = {site.node: LearnedWeight(start_of(site), lean=True, dtype=settings.dtype) for site in sites}
    found = vectors_apart([block.nodes for block in middle]) if vectors else [{} for _ in middle]
    beside = [[LearnedVector(name, values) for name, values in each.items()] for each in found]
    stages = [
        Stage(
            TorchGraph(block.nodes, model.opset_imports, block.outputs),
            block.carried,
            [*(learned[site.node] for site in block.sites if site.node in learned), *around],
        )
        for block, around in zip(middle, beside, strict=True)
    ]
    quantized = [(site.weight.name, site.quantized) for site in end.sites if site.quantized is not None]
    originals = {name: to_torch(tensor.meta["original"]) for name, tensor in quantized if name}
    head = Head(TorchGraph(end.nodes, model.opset_imports, end.outputs), originals)
    before, after = distill(stages, head, *examples, settings, tick, stored)
    codes, grids = [each.codes for each in learned.values()], [each.grid for each in learned.values()]
    outcome = outcome_arrays(Outcome(codes, grids, before, after), sites)
    return {**outcome, **vector_arrays([each for around in beside for each in around])}
