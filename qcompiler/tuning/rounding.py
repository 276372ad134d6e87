"""Learned rounding: codes and scales of all weights of a block, moved by the gradient of the block's output error.

After Cheng et al. 2023, "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs",
arXiv:2309.05516, with a learned scale (Esser et al. 2020, arXiv:1902.08153). Each weight has a *latent*, a real number
of codes relative to the zero point, and each scale a factor:

    code = clip(round(latent) + zero_point),   q = (code - zero_point) * scale * factor
    latent <- latent - rate * direction(scale * dL/dq)          (the rounding passes gradients on unchanged)
    factor <- factor - scale_rate * direction(sum over the group of (code - zero_point) * scale * dL/dq)

Both rates fall linearly to zero. The direction is Adam's (Kingma and Ba 2015, arXiv:1412.6980): the sign where batches
agree, and little where they do not, so that in few steps only the weights move whose movement is known to help.

A latent starts where the original weight lies, or as near as the cell of its code allows: where GPTQ has rounded away
from the weight, the way back to it is short. L is the squared error of the block's outputs on tokens that are not
padding, each token's relative to the energy of its target, since what reads a token normalizes it. Codes and scales are
those of `numerics` at every step: what is trained is what will be stored.

Shapes: weights, latents and codes ``[N, K]``; scales and factors ``[N, G]``.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qcompiler.numerics.affine import Grid
from qcompiler.torch_graph import TorchGraph
from qcompiler.torch_graph.dtypes import from_numpy
from qcompiler.torch_graph.threads import torch_threads
from qcompiler.tuning.directions import Pace
from qcompiler.tuning.learned_weight import LearnedWeight, Start
from qcompiler.tuning.losses import LOSSES, Example

__all__ = [
    "Outcome",
    "Settings",
    "fast_bfloat16",
    "parted",
    "products",
    "shuffled",
    "tune_block",
]


@dataclass(frozen=True)
class Settings:
    """How to learn.

    Attributes:
        steps: Steps of descent.
        batch: Batches of calibration data in a step.
        rate: First step of the latents, in codes.
        scale_rate: First step of the scales, as a fraction of each.
        momentum: Share of the direction that is kept from step to step.
        seed: Of the order of batches.
        threads: Threads of PyTorch.
        bfloat16: Whether the products of descent are computed in bfloat16; what is judged is computed in float32.
        schedule: How rates fall: linear or cosine, to zero, or constant.
        decay: Share of a latent that the first step takes off.
        units: Whether rates are distances (see `directions.Pace`).
        vector_rate: First step of float vectors; None: as of scales.
        warmup: Share of the steps in which rates rise from zero.
        device: Where descent computes: cpu or cuda.
        check: Steps between looks at the held-out loss, after which the best result is kept; 0: only at the end.
        patience: Looks without a better result after which descent stops; 0: none.
    """

    steps: int = 100
    batch: int = 1
    rate: float = 0.01
    scale_rate: float = 0.001
    momentum: float = 0.9
    seed: int = 0
    threads: int = 1
    bfloat16: bool = False
    schedule: str = "linear"
    decay: float = 0.0
    units: bool = True
    check: int = 0
    patience: int = 0
    vector_rate: float | None = None
    warmup: float = 0.0
    device: str = "cpu"

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights in products."""
        return torch.bfloat16 if self.bfloat16 else torch.float32

    @property
    def place(self) -> torch.device:
        """The device."""
        return torch.device(self.device)

    def pace(self, step: int) -> Pace:
        """How far a step goes, 0 being the first."""
        done = step / self.steps
        share = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}[self.schedule]
        if self.warmup:
            share *= min(1.0, (step + 1) / (self.warmup * self.steps))
        of_vectors = None if self.vector_rate is None else self.vector_rate * share
        decay = self.decay * share
        return Pace(self.rate * share, self.scale_rate * share, self.momentum, decay, self.units, of_vectors)


@dataclass(frozen=True)
class Outcome:
    """What was learned.

    Attributes:
        codes: Of each weight, uint8 ``[N, K]``.
        grids: Of each weight.
        before: Relative error of the outputs on the held-out batches with the weights as they were.
        after: The same with what was learned.
    """

    codes: list[np.ndarray]
    grids: list[Grid]
    before: float
    after: float


def tune_block(
    graph: TorchGraph,
    starts: Sequence[Start],
    examples: Sequence[Example],
    held_out: Sequence[Example],
    settings: Settings,
    tick: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Learn the codes and scales of a block's weights.

    Args:
        graph: The block.
        starts: Its quantized weights.
        examples: To learn from.
        held_out: To judge by.
        settings: How.
        tick: Called with (steps done, steps).

    Returns:
        The result of the last step, whether it is better or not.
    """
    with torch_threads(settings.threads):
        weights = [LearnedWeight(start, dtype=settings.dtype) for start in starts]
        before = _error(graph, weights, held_out)
        order = shuffled(len(examples), settings.seed)
        for step in range(settings.steps):
            values = {weight.name: weight.open() for weight in weights}
            for _ in range(settings.batch):
                # Every batch has the same share, whatever the number of its tokens.
                with products(settings):
                    loss = _loss(graph, values, examples[next(order)])
                loss.backward()
            for weight in weights:
                weight.step(settings.pace(step))
            if tick is not None:
                tick(step + 1, settings.steps)
        after = _error(graph, weights, held_out)
    return Outcome([w.codes for w in weights], [w.grid for w in weights], before, after)


def fast_bfloat16(device: str = "cpu") -> bool:
    """Whether a device multiplies bfloat16 faster than float32."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    # PyTorch says so in private places only, which not every version has.
    return any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile"))


def products(settings: Settings) -> torch.autocast:
    """Let PyTorch compute products in the precision that the settings ask for."""
    return torch.autocast(settings.device, torch.bfloat16, enabled=settings.bfloat16)


def shuffled(count: int, seed: int) -> Iterator[int]:
    """Numbers below `count`, each once before any comes again."""
    generator = np.random.default_rng(seed)
    while True:
        yield from map(int, generator.permutation(count))


def parted(examples: Sequence[Example], held_out: int) -> tuple[list[Example], list[Example]]:
    """What to learn from, and, evenly spread, what to judge by."""
    count = len(examples)
    apart = {(2 * index + 1) * count // (2 * held_out) for index in range(held_out)}
    return [each for index, each in enumerate(examples) if index not in apart], [examples[i] for i in sorted(apart)]


def _error(graph: TorchGraph, weights: Sequence[LearnedWeight], examples: Sequence[Example]) -> float:
    with torch.no_grad():
        values = {weight.name: weight.value() for weight in weights}
        return sum(float(_loss(graph, values, example)) for example in examples) / max(1, len(examples))


def _loss(graph: TorchGraph, values: Mapping[str, Tensor], example: Example) -> Tensor:
    """Mean over tokens of the squared error of the outputs relative to the squared target."""
    feeds = {name: from_numpy(example.feeds[name]) for name in graph.inputs}
    targets = {name: from_numpy(wanted) for name, wanted in example.targets.items()}
    return LOSSES["mse"].function(lambda: graph.run(feeds, values), lambda: targets, example)
