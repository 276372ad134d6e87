"""Distillation: the descent of `rounding` through a whole model, with the divergence of its answers as the loss.

L is the mean over tokens of KL(float || quantized) of the probabilities that the model's head gives. Blocks are run
forward and only what crosses between them is kept; then, from the last to the first, each is run again with gradients
and its weights are moved at once. So memory holds the latents of all weights, but the activations of one block.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcompiler.checkpoints import Arrays, Periodic
from qcompiler.torch_graph import TorchGraph
from qcompiler.torch_graph.devices import computing_on
from qcompiler.torch_graph.threads import torch_threads
from qcompiler.tuning.directions import Pace
from qcompiler.tuning.learned import Learned
from qcompiler.tuning.learned_weight import LearnedWeight
from qcompiler.tuning.losses import LOSSES, Example, Loss
from qcompiler.tuning.rounding import Settings, products, shuffled

__all__ = ["Head", "Stage", "distill", "time_of_step"]

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
    weights: Sequence[LearnedWeight | Learned]


@dataclass(frozen=True)
class Head:
    """The end of the model.

    Attributes:
        graph: Its nodes; its outputs are logits ``[..., V]``.
        originals: Weights that are quantized, as they were.
        loss: What its outputs are judged by.
    """

    graph: TorchGraph
    originals: Mapping[str, Tensor]
    loss: Loss = LOSSES["kl"]


def distill(
    stages: Sequence[Stage],
    head: Head,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    settings: Settings,
    tick: Callable[[int, int, float], None] | None = None,
    stored: Periodic | None = None,
) -> tuple[float, float]:
    """Learn the weights of all stages, `settings.batch` examples a step.

    Args:
        stages: In order.
        head: What comes after them.
        examples: To learn from: what the first stage reads, and what the head reads in the float model.
        held_out: To judge by.
        settings: How.
        tick: Called with (steps done, steps, loss of the last one).
        stored: Where the state of the descent is stored now and then, and taken up.

    Returns:
        The loss on the held-out examples before and after; the weights hold what was learned.
    """
    with torch_threads(settings.threads), computing_on(head.graph.device):
        best = _Best()
        resumed = _restored(stages, stored, best) if stored is not None else None
        done, before = resumed or (0, _mean(stages, head, held_out))
        order = islice(shuffled(len(examples), settings.seed), done * settings.batch, None)
        for step in range(done, settings.steps):
            batch = [examples[index] for index in islice(order, settings.batch)]
            loss = _descend(stages, head, batch, settings, settings.pace(step))
            if tick is not None:
                tick(step + 1, settings.steps, loss)
            if settings.check and ((step + 1) % settings.check == 0 or step + 1 == settings.steps):
                best.look(stages, _mean(stages, head, held_out))
                if settings.patience and best.misses >= settings.patience:
                    logger.info("no better result in %d looks: descent stops after step %d", best.misses, step + 1)
                    break
            if stored is not None:
                stored.offer(partial(_state, stages, step + 1, before, best))
        return before, best.put_back(stages) if settings.check else _mean(stages, head, held_out)


def time_of_step(stages: Sequence[Stage], head: Head, examples: Sequence[Example], settings: Settings) -> float:
    """Seconds that a step takes: the second of two on the first examples, none of which moves anything."""
    seconds = 0.0
    with torch_threads(settings.threads), computing_on(head.graph.device):
        for _ in range(2):
            began = time.monotonic()
            opened = [{weight.name: weight.open() for weight in stage.weights} for stage in stages]
            for at in range(settings.batch):
                _slopes(stages, head, examples[at % len(examples)], settings, opened, 1 / settings.batch, None)
            standing = replace(settings.pace(0), rate=0.0, scale_rate=0.0, vector_rate=0.0, decay=0.0)
            for weight in _weights(stages):
                kept = {name: array.copy() for name, array in weight.state().items()}
                weight.step(standing)
                weight.restore(kept)
            seconds = time.monotonic() - began
    return seconds


@dataclass
class _Best:
    """The best result that was seen: its loss, the parameters, and how many looks ago it was."""

    loss: float = math.inf
    misses: int = 0
    kept: list[dict[str, np.ndarray]] = field(default_factory=list)

    def look(self, stages: Sequence[Stage], loss: float) -> None:
        """Keep the weights as they are if the loss is the lowest."""
        self.misses += 1
        if loss < self.loss:
            self.loss, self.misses = loss, 0
            self.kept = [{n: array.copy() for n, array in each.state().items()} for each in _weights(stages)]

    def put_back(self, stages: Sequence[Stage]) -> float:
        """Give the weights what was kept; returns its loss."""
        for weight, state in zip(_weights(stages), self.kept, strict=True):
            weight.restore(state)
        return self.loss


def _weights(stages: Sequence[Stage]) -> list[Any]:
    return [weight for stage in stages for weight in stage.weights]


def _state(stages: Sequence[Stage], done: int, before: float, best: _Best) -> Arrays:
    """All that the descent goes on from: steps done, the first loss, what each weight has, and the best so far."""
    found = {"done": np.array(done), "before": np.array(before)}
    found.update({"best": np.array(best.loss), "misses": np.array(best.misses)})
    found.update({f"{at}.{n}": a for at, each in enumerate(_weights(stages)) for n, a in each.state().items()})
    found.update({f"best {at}.{n}": a for at, state in enumerate(best.kept) for n, a in state.items()})
    return found


def _restored(stages: Sequence[Stage], stored: Periodic, best: _Best) -> tuple[int, float] | None:
    """Give each weight what was stored; the steps done and the first loss, or None if nothing was."""
    found = stored.load()
    if found is None:
        return None
    seen = np.isfinite(found["best"])
    for at, weight in enumerate(_weights(stages)):
        names = list(weight.state())
        if seen:
            best.kept.append({name: found[f"best {at}.{name}"] for name in names})
        weight.restore({name: found[f"{at}.{name}"] for name in names})
    best.loss, best.misses = float(found["best"]), int(found["misses"])
    logger.info("descent goes on behind step %d", found["done"])
    return int(found["done"]), float(found["before"])


def _descend(stages: Sequence[Stage], head: Head, batch: Sequence[Example], settings: Settings, pace: Pace) -> float:
    """One step of all weights; returns the mean loss."""
    opened = [{weight.name: weight.open() for weight in stage.weights} for stage in stages]
    total = 0.0
    for at, example in enumerate(batch):
        last = at == len(batch) - 1
        total += _slopes(stages, head, example, settings, opened, 1 / len(batch), pace if last else None)
    return total


def _slopes(
    stages: Sequence[Stage],
    head: Head,
    example: Example,
    settings: Settings,
    opened: list[_Values],
    share: float,
    pace: Pace | None,
) -> float:
    """Gather the gradients of a share of an example's loss; with a pace every stage steps as soon as it has its own.

    A model in one stage is run once: what it remembers is as much as running it again would need.
    """
    if len(stages) == 1:
        loss = _at_once(stages[0], head, example, settings, opened[0], share)
        _step(stages[0], pace)
        return loss
    slopes: _Values = {}
    with products(settings):
        boundaries, last = _forward(stages, opened, example)
        leaves = _leaves(last, head.graph)
        loss_of_head = _loss(head, leaves, example) * share
    loss_of_head.backward()
    _gather(slopes, leaves)
    for stage in reversed(stages):
        values = opened.pop() if pace is not None else opened[len(boundaries) - 1]
        _pass_back(stage, boundaries.pop(), values, slopes, settings)
        del values
        _step(stage, pace)
    return float(loss_of_head.detach())


def _at_once(stage: Stage, head: Head, example: Example, settings: Settings, values: _Values, share: float) -> float:
    """Gather the gradients of a share of an example's loss in a model of one stage; returns that share."""
    feeds = stage.graph.tensors(example.feeds)
    with products(settings):
        results = stage.graph.run({name: feeds[name] for name in stage.graph.inputs}, values)
        loss = _loss(head, {**{name: feeds[name] for name in stage.carried}, **results}, example) * share
    loss.backward()
    return float(loss.detach())


def _step(stage: Stage, pace: Pace | None) -> None:
    """Move the weights of a stage, if it is time."""
    if pace is not None:
        for weight in stage.weights:
            weight.step(pace)


def _pass_back(stage: Stage, boundary: _Values, values: _Values, slopes: _Values, settings: Settings) -> None:
    """Run a stage again, and make slopes of what it reads out of those of what it computes."""
    leaves = _leaves(boundary, stage.graph)
    with products(settings):
        results = stage.graph.run(leaves, values)
    wanted = [name for name in stage.graph.outputs if name in slopes and results[name].requires_grad]
    if wanted:
        torch.autograd.backward([results[name] for name in wanted], [slopes.pop(name) for name in wanted])
    _gather(slopes, leaves)


def _forward(stages: Sequence[Stage], opened: Sequence[_Values], example: Example) -> tuple[list[_Values], _Values]:
    """What each stage reads, and what the head reads, with the weights that are given for each stage."""
    boundary = stages[0].graph.tensors(example.feeds)
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


def _loss(head: Head, reads: _Values, example: Example) -> Tensor:
    """The loss of what the head makes of its reads."""

    def wanted() -> _Values:
        with torch.no_grad(), torch.autocast(head.graph.device.type, enabled=False):
            exact = {name: example.targets[name] for name in head.graph.inputs}
            return head.graph.run(head.graph.tensors(exact), head.originals)

    given = {name: reads[name] for name in head.graph.inputs}
    return head.loss.function(lambda: head.graph.run(given), wanted, example)


def _mean(stages: Sequence[Stage], head: Head, examples: Sequence[Example]) -> float:
    with torch.no_grad():
        values = [{weight.name: weight.value() for weight in stage.weights} for stage in stages]
        found = [float(_loss(head, _forward(stages, values, example)[1], example)) for example in examples]
    return sum(found) / max(1, len(found))
