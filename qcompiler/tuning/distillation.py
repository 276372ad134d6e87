"""Distillation: the descent of `rounding` through a whole model, with the divergence of its answers as the loss.

L is the mean over tokens of KL(float || quantized) of the probabilities that the model's head gives. Blocks are run
forward and only what crosses between them is kept; then, from the last to the first, each is run again with gradients
and its weights are moved at once. So memory holds the latents of all weights, but the activations of one block.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from qcompiler.checkpoints import Arrays, Periodic
from qcompiler.torch_graph import TorchGraph
from qcompiler.torch_graph.dtypes import from_numpy
from qcompiler.tuning.learned_vector import LearnedVector
from qcompiler.tuning.learned_weight import LearnedWeight, Pace
from qcompiler.tuning.rounding import Example, Settings, products, shuffled, token_rows, torch_threads

__all__ = ["Head", "Stage", "distill"]

logger = logging.getLogger(__name__)

_Values = dict[str, Tensor]


@dataclass(frozen=True)
class Stage:
    """A block between the model's beginning and its head.

    Attributes:
        graph: Its nodes, with everything that later ones read as outputs.
        carried: What passes it by.
        weights: What is learned.
    """

    graph: TorchGraph
    carried: Sequence[str]
    weights: Sequence[LearnedWeight | LearnedVector]


@dataclass(frozen=True)
class Head:
    """The end of the model.

    Attributes:
        graph: Its nodes; its outputs are logits ``[..., V]``.
        originals: Weights that are quantized, as they were.
    """

    graph: TorchGraph
    originals: Mapping[str, Tensor]


def distill(
    stages: Sequence[Stage],
    head: Head,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    settings: Settings,
    tick: Callable[[int, int], None] | None = None,
    stored: Periodic | None = None,
) -> tuple[float, float]:
    """Learn the weights of all stages, one batch a step.

    Args:
        stages: In order.
        head: What comes after them.
        examples: To learn from: what the first stage reads, and what the head reads in the float model.
        held_out: To judge by.
        settings: How; `batch` is not used.
        tick: Called with (steps done, steps).
        stored: Where the state of the descent is stored now and then, and taken up.

    Returns:
        The divergence on the held-out batches before and after; the weights hold what was learned.
    """
    with torch_threads(settings.threads):
        done, before = (_restored(stages, stored) if stored is not None else None) or (0, _mean(stages, head, held_out))
        order = islice(shuffled(len(examples), settings.seed), done, None)
        for step in range(done, settings.steps):
            _descend(stages, head, examples[next(order)], settings, settings.pace(step))
            if tick is not None:
                tick(step + 1, settings.steps)
            if stored is not None:
                stored.offer(partial(_state, stages, step + 1, before))
        return before, _mean(stages, head, held_out)


def _state(stages: Sequence[Stage], done: int, before: float) -> Arrays:
    """Everything that the descent goes on from: the steps done, the first divergence, and what each weight has."""
    found = {"done": np.array(done), "before": np.array(before)}
    for at, weight in enumerate(weight for stage in stages for weight in stage.weights):
        found.update({f"{at}.{name}": array for name, array in weight.state().items()})
    return found


def _restored(stages: Sequence[Stage], stored: Periodic) -> tuple[int, float] | None:
    """Give each weight what was stored; the steps done and the first divergence, or None if nothing was."""
    found = stored.load()
    if found is None:
        return None
    for at, weight in enumerate(weight for stage in stages for weight in stage.weights):
        weight.restore({name: found[f"{at}.{name}"] for name in weight.state()})
    logger.info("distillation goes on behind step %d", found["done"])
    return int(found["done"]), float(found["before"])


def _descend(stages: Sequence[Stage], head: Head, example: Example, settings: Settings, pace: Pace) -> None:
    """One step of all weights."""
    slopes: _Values = {}
    opened = [{weight.name: weight.open() for weight in stage.weights} for stage in stages]
    with products(settings):
        boundaries, last = _forward(stages, opened, example)
        leaves = _leaves(last, head.graph)
        loss = _divergence(head, leaves, example)
    loss.backward()
    _gather(slopes, leaves)
    for stage in reversed(stages):
        leaves = _leaves(boundaries.pop(), stage.graph)
        with products(settings):
            results = stage.graph.run(leaves, opened.pop())
        wanted = [name for name in stage.graph.outputs if name in slopes and results[name].requires_grad]
        if wanted:
            torch.autograd.backward([results[name] for name in wanted], [slopes.pop(name) for name in wanted])
        _gather(slopes, leaves)
        for weight in stage.weights:
            weight.step(pace)


def _forward(stages: Sequence[Stage], opened: Sequence[_Values], example: Example) -> tuple[list[_Values], _Values]:
    """What each stage reads, and what the head reads, with the weights that are given for each stage."""
    boundary = {name: from_numpy(array) for name, array in example.feeds.items()}
    boundaries = []
    with torch.no_grad():
        for stage, weights in zip(stages, opened, strict=True):
            boundaries.append(boundary)
            results = stage.graph.run({name: boundary[name] for name in stage.graph.inputs}, weights)
            boundary = {**{name: boundary[name] for name in stage.carried}, **results}
    return boundaries, boundary


def _leaves(values: _Values, graph: TorchGraph) -> _Values:
    """What a graph reads, ready to gather gradients."""
    found = {name: values[name].detach() for name in graph.inputs}
    return {name: value.requires_grad_() if value.is_floating_point() else value for name, value in found.items()}


def _gather(slopes: _Values, leaves: _Values) -> None:
    """Add the gradients of leaves to those that others left for the same values."""
    for name, leaf in leaves.items():
        if leaf.grad is not None:
            slopes[name] = slopes[name] + leaf.grad if name in slopes else leaf.grad


def _divergence(head: Head, reads: _Values, example: Example) -> Tensor:
    """KL(float || quantized), the mean over tokens."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        exact = {name: from_numpy(example.targets[name]) for name in head.graph.inputs}
        wanted = head.graph.run(exact, head.originals)
        goals = {name: functional.log_softmax(_rows(logits, example), -1) for name, logits in wanted.items()}
        del wanted
    losses = []
    for name, logits in head.graph.run(reads).items():
        losses.append(_KlDivergence.apply(_rows(logits, example), goals.pop(name)))
    return torch.stack(losses).sum()


def _rows(logits: Tensor, example: Example) -> Tensor:
    """[T, V] float32, padding left out."""
    return token_rows(logits, example.mask).reshape(-1, logits.shape[-1]).float()


class _KlDivergence(torch.autograd.Function):  # type: ignore[misc]
    """KL(p || q) for logits of q and logarithms of p, ``[T, V]``; its slope is (q - p) / T.

    What PyTorch would remember to differentiate it is several times the size of the logits.
    """

    @staticmethod
    def forward(context: Any, logits: Tensor, goals: Tensor) -> Tensor:
        """The mean over tokens; writes over `goals`."""
        found, wanted = functional.log_softmax(logits, -1), goals.exp()
        loss = torch.dot(wanted.flatten(), goals.sub_(found).flatten()) / len(goals)
        if context.needs_input_grad[0]:
            context.save_for_backward(found.exp_().sub_(wanted).div_(len(goals)))
        return loss

    @staticmethod
    def backward(context: Any, slope: Tensor) -> tuple[Tensor, None]:
        """The slope of the logits."""
        return context.saved_tensors[0] * slope, None


def _mean(stages: Sequence[Stage], head: Head, examples: Sequence[Example]) -> float:
    with torch.no_grad():
        values = [{weight.name: weight.value() for weight in stage.weights} for stage in stages]
        found = [float(_divergence(head, _forward(stages, values, example)[1], example)) for example in examples]
    return sum(found) / max(1, len(found))
