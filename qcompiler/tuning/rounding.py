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

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qcompiler.numerics.affine import Grid, WeightSpec, dequantize, round_to_grid, stored_scale
from qcompiler.quantized import stored_shape
from qcompiler.torch_graph import TorchGraph
from qcompiler.torch_graph.dtypes import from_numpy

__all__ = [
    "Example",
    "LearnedWeight",
    "Outcome",
    "Settings",
    "Start",
    "shuffled",
    "token_rows",
    "torch_threads",
    "tune_block",
]

# How near to the edge of its cell a latent starts whose code is not the nearest.
_EDGE = 0.4
# No scale moves further than this from where it starts.
_FACTORS = (0.5, 2.0)
# Share of the running magnitude of a slope that is kept from step to step.
_MAGNITUDE = 0.99
_TINY = 1e-30
# Share of the newest slope in a magnitude that is held by rows and columns.
_NEW = 0.1
# No latent moves further in one step than this many times the rate.
_LONGEST = 3.0


@dataclass(frozen=True)
class Settings:
    """How to learn.

    Attributes:
        steps: Steps of descent.
        batch: Batches of calibration data in a step.
        rate: First step of the latents, in codes; falls linearly to zero.
        scale_rate: First step of the scales, as a fraction of each.
        momentum: Share of the direction that is kept from step to step.
        seed: Of the order of batches.
        threads: Threads of PyTorch.
    """

    steps: int = 100
    batch: int = 1
    rate: float = 0.01
    scale_rate: float = 0.001
    momentum: float = 0.9
    seed: int = 0
    threads: int = 1


@dataclass(frozen=True)
class Start:
    """A weight of the block, as it is quantized now.

    Attributes:
        name: Of the value that holds it.
        weight: The original, float32 ``[N, K]``.
        codes: uint8 ``[N, K]``.
        grid: Scale and zero point ``[N, G]``.
        spec: The format.
        layout: How the node stores it; see `graph.Site`.
    """

    name: str
    weight: np.ndarray
    codes: np.ndarray
    grid: Grid
    spec: WeightSpec
    layout: str


@dataclass(frozen=True)
class Example:
    """One batch: what the block reads, what it should compute, and which rows of that are tokens (None: all)."""

    feeds: Mapping[str, np.ndarray]
    targets: Mapping[str, np.ndarray]
    mask: np.ndarray | None = None


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


class LearnedWeight:
    """The latents and factors of one weight; `value` is what stands in the place of the weight in the graph.

    A *lean* one keeps latents alone and forms codes anew each time, with Adafactor's magnitudes (Shazeer and Stern
    2018, arXiv:1804.04235: one for each row and column) and no running mean: a third of the memory, for whole models.
    """

    def __init__(self, start: Start, *, lean: bool = False) -> None:
        """Begin at the codes of `start`."""
        self.name, self.spec, self.layout = start.name, start.spec, start.layout
        self._first, self._lean = start.grid, lean
        self._shape = start.weight.shape
        with np.errstate(over="ignore"):
            nearest = start.weight / self._wide(start.grid.scale)
        centre = start.codes - self._wide(start.grid.zero_point)
        self._latent = torch.from_numpy(np.minimum(np.maximum(nearest, centre - _EDGE), centre + _EDGE))
        self._factor = torch.ones(start.grid.scale.shape)
        self._directions = (_Factored() if lean else _Adam(), _Adam())
        self._tensor: Tensor | None = None

    def _wide(self, values: np.ndarray) -> np.ndarray:
        """[N, G] -> [N, K]."""
        return np.repeat(values, self.spec.group_size, axis=1)[:, : self._shape[1]]

    @property
    def grid(self) -> Grid:
        """Scales and zero points ``[N, G]``, as they will be stored."""
        return Grid(stored_scale(self._first.scale * self._factor.numpy(), self.spec), self._first.zero_point)

    @property
    def codes(self) -> np.ndarray:
        """Codes float32 ``[N, K]``."""
        return round_to_grid(self._latent.numpy(), np.float32(1), self._wide(self._first.zero_point), self.spec)

    def value(self) -> Tensor:
        """The dequantized weight in the shape that the graph stores."""
        grid = self.grid
        values = from_numpy(dequantize(self.codes, grid.scale, grid.zero_point, self.spec.group_size))
        stored = values.T if self.layout in ("KN", "1KN") else values
        return stored.reshape(stored_shape(self.layout, *self._shape))

    def open(self) -> Tensor:
        """The same, to gather gradients until `step`."""
        self._tensor = self.value().detach().requires_grad_()
        return self._tensor

    def step(self, settings: Settings, share: float) -> None:
        """Move against the gradient; `share` of the first rates is left."""
        tensor, self._tensor = self._tensor, None
        if tensor is None or tensor.grad is None:
            return
        rows, columns = self._shape
        slope = tensor.grad
        slope = slope.reshape(columns, rows).T if self.layout in ("KN", "1KN") else slope.reshape(rows, columns)
        slope = slope * torch.from_numpy(self._wide(self.grid.scale))
        zero = self._wide(self._first.zero_point)
        groups = self._by_group(slope * torch.from_numpy(self.codes - zero))
        first, last = self.spec.limits
        latent, factor = self._directions
        self._latent.sub_(latent(slope, settings.momentum), alpha=settings.rate * share)
        # No further than to the edge of the last cell, so that the way back is not long.
        torch.maximum(self._latent, torch.from_numpy(first - zero - 0.5), out=self._latent)
        torch.minimum(self._latent, torch.from_numpy(last - zero + 0.5), out=self._latent)
        self._factor.sub_(factor(groups, settings.momentum), alpha=settings.scale_rate * share).clamp_(*_FACTORS)

    def _by_group(self, slope: Tensor) -> Tensor:
        """Sums over groups [N, G]; rows of a head share theirs."""
        parts = torch.nn.functional.pad(slope, (0, -slope.shape[1] % self.spec.group_size))
        groups = parts.reshape(len(parts), -1, self.spec.group_size).sum(-1)
        heads = self.spec.head_size or 1
        return groups.reshape(-1, heads, groups.shape[1]).sum(1).repeat_interleave(heads, 0)


class _Adam:
    """A slope's running mean over its running magnitude: about 1 where all batches agree."""

    def __init__(self) -> None:
        self._mean = self._square = torch.zeros(())
        self._count = 0

    def __call__(self, slope: Tensor, momentum: float) -> Tensor:
        if not self._count:
            self._mean, self._square = torch.zeros_like(slope), torch.zeros_like(slope)
        self._count += 1
        self._mean.mul_(momentum).add_(slope, alpha=1 - momentum)
        self._square.mul_(_MAGNITUDE).addcmul_(slope, slope, value=1 - _MAGNITUDE)
        size = (self._square / (1 - _MAGNITUDE**self._count)).sqrt_().add_(_TINY)
        return (self._mean / (1 - momentum**self._count)).div_(size)


class _Factored:
    """A slope over its running magnitude, which is held as a factor for each row and each column."""

    def __init__(self) -> None:
        self._rows = self._columns = torch.zeros(())
        self._count = 0

    def __call__(self, slope: Tensor, momentum: float) -> Tensor:
        del momentum
        square = slope.square()
        found = square.mean(1), square.mean(0)
        self._rows, self._columns = (
            new if not self._count else old.lerp(new, _NEW)
            for old, new in zip((self._rows, self._columns), found, strict=True)
        )
        self._count += 1
        slope = slope * (self._rows / (self._rows.mean() + _TINY) + _TINY).rsqrt()[:, None]
        return slope.mul_((self._columns + _TINY).rsqrt()).clamp_(-_LONGEST, _LONGEST)


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
        weights = [LearnedWeight(start) for start in starts]
        before = _error(graph, weights, held_out)
        order = shuffled(len(examples), settings.seed)
        for step in range(settings.steps):
            values = {weight.name: weight.open() for weight in weights}
            for _ in range(settings.batch):
                # Every batch has the same share, whatever the number of its tokens.
                _loss(graph, values, examples[next(order)]).backward()
            for weight in weights:
                weight.step(settings, 1 - step / settings.steps)
            if tick is not None:
                tick(step + 1, settings.steps)
        after = _error(graph, weights, held_out)
    return Outcome([w.codes.astype(np.uint8) for w in weights], [w.grid for w in weights], before, after)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let PyTorch use a number of threads for a while."""
    used = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(used)


def shuffled(count: int, seed: int) -> Iterator[int]:
    """Numbers below `count`, each once before any comes again."""
    generator = np.random.default_rng(seed)
    while True:
        yield from map(int, generator.permutation(count))


def _error(graph: TorchGraph, weights: Sequence[LearnedWeight], examples: Sequence[Example]) -> float:
    with torch.no_grad():
        values = {weight.name: weight.value() for weight in weights}
        return sum(float(_loss(graph, values, example)) for example in examples) / max(1, len(examples))


def _loss(graph: TorchGraph, values: Mapping[str, Tensor], example: Example) -> Tensor:
    """Mean over tokens of the squared error of the outputs relative to the squared target."""
    feeds = {name: from_numpy(example.feeds[name]) for name in graph.inputs}
    results = graph.run(feeds, values)
    losses = []
    for name, wanted in example.targets.items():
        target = from_numpy(wanted)
        if not target.is_floating_point():
            continue
        rows, goals = (token_rows(each, example.mask) for each in (results[name], target))
        energy = goals.square().mean(-1)
        # A token whose target is nearly zero counts no more than ten times what one in the middle counts.
        losses.append(((rows - goals).square().mean(-1) / (energy + 0.1 * energy.median() + 1e-30)).mean())
    return torch.stack(losses).sum()


def token_rows(values: Tensor, mask: np.ndarray | None) -> Tensor:
    """[B, S, ..., K] or [B * S, K] without padding; anything else as it is."""
    if mask is None:
        return values
    keep = torch.from_numpy(mask)
    if values.ndim > 2 and values.shape[:2] == keep.shape:
        return values[keep]
    return values[keep.reshape(-1)] if values.ndim == 2 and len(values) == keep.numel() else values
