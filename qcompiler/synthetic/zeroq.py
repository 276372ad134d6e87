"""Inputs of a network out of the statistics that its batch normalizations keep of the data it was trained on.

After Cai et al. 2020, "ZeroQ: A Novel Zero Shot Quantization Framework", arXiv:2001.00281: inputs begin as noise
and are moved by Adam so that what arrives at each batch normalization has the mean and the deviation that it knows:

    loss = sum_l |mean(x_l) - mean_l|^2 + |deviation(x_l) - deviation_l|^2

where x_l is what batch normalization l reads, channel by channel. Where this differs from the code that came with the
paper, ranges of activations came nearer to those of real data:

- Mean and deviation are taken over rows and space together, as training took them, and not for each row. There every
  row is an average one, and none reaches as far as real ones do.
- The noise has the spectrum of pictures, and the size with which the loss is least; the paper asks for a deviation of 1
  in the end, and inputs need not have that.
- No value is further than 2.5 deviations from its mean: inputs are bounded, and noise has tails.

Shapes: x_l ``[B, C_l, ...]``; means and deviations ``[C_l]``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qcompiler.graph import constant_array
from qcompiler.torch_graph import TorchGraph
from qcompiler.torch_graph.threads import torch_threads

__all__ = ["Distilled", "Norm", "Settings", "batch_norms", "distil"]

# In the square of a deviation: the gradient of a root is infinite at zero.
_EPSILON = 1e-6
# Of the noise that a descent begins with.
_SCALES = (0.125, 0.25, 0.5, 1.0, 2.0)
# Deviations that an input reaches. White is 2.2 to 2.6 deviations above the mean of photographs, black 2 below.
_REACH = 2.5


@dataclass(frozen=True)
class Norm:
    """What a batch normalization keeps of what it reads.

    Attributes:
        name: Of the value that it reads.
        mean: float32 ``[C]``.
        deviation: float32 ``[C]``.
    """

    name: str
    mean: np.ndarray
    deviation: np.ndarray


@dataclass(frozen=True)
class Settings:
    """How to descend.

    Attributes:
        steps: Steps for each batch.
        batch: Rows that share statistics, at most.
        rate: First step of Adam, in deviations of the noise.
        patience: Steps without a better loss after which the rate falls to a tenth.
        by_row: Whether each row has to have the statistics, and not all rows together.
    """

    steps: int = 150
    batch: int = 16
    rate: float = 0.1
    patience: int = 20
    by_row: bool = False


@dataclass(frozen=True)
class Distilled:
    """Made-up inputs.

    Attributes:
        rows: float32 ``[N, ...]``.
        first: Loss of noise, a channel, the mean over batches.
        last: Loss of `rows`, likewise.
    """

    rows: np.ndarray
    first: float
    last: float


def batch_norms(model: ir.Model) -> list[Norm]:
    """The batch normalizations of the top graph whose statistics are constants; one for each value that is read."""
    found: dict[str, Norm] = {}
    for node in model.graph:
        if node.op_type != "BatchNormalization" or node.domain not in ("", "ai.onnx") or len(node.inputs) < 5:
            continue
        value, mean, variance = node.inputs[0], node.inputs[3], node.inputs[4]
        known = mean is not None and mean.const_value is not None
        if value is None or not value.name or not known or variance is None or variance.const_value is None:
            continue
        assert mean is not None
        square = np.maximum(constant_array(variance).astype(np.float32), 0)
        found.setdefault(value.name, Norm(value.name, constant_array(mean).astype(np.float32), np.sqrt(square)))
    return list(found.values())


def distil(
    model: ir.Model,
    norms: Sequence[Norm],
    name: str,
    shape: Sequence[int],
    rows: int,
    settings: Settings,
    *,
    seed: int,
    threads: int,
    tick: Callable[[int, int], None],
) -> Distilled:
    """Make inputs that have the statistics of the batch normalizations.

    Args:
        model: Without functions, its constants as initializers; it is not changed.
        norms: What to match; see `batch_norms`.
        name: The input, a float one, that they all depend on and on no other.
        shape: Of a row, its first dimension left out.
        rows: How many rows to make.
        settings: How.
        seed: Of the noise.
        threads: Threads of PyTorch.
        tick: Called with (steps done, steps).

    Returns:
        The rows.

    Raises:
        KernelError: PyTorch has no function for an operator.
    """
    graph = TorchGraph(_needed(model, norms), model.opset_imports, [norm.name for norm in norms])
    targets = {norm.name: (torch.from_numpy(norm.mean), torch.from_numpy(norm.deviation)) for norm in norms}
    channels = sum(len(norm.mean) for norm in norms)
    parts = np.array_split(np.arange(rows), -(-rows // settings.batch))
    made, losses = [], []
    with torch_threads(threads):
        for number, part in enumerate(parts):
            random = torch.Generator().manual_seed(seed * len(parts) + number)
            noise = _noise((len(part), *shape), random)

            def done(step: int, before: int = number * settings.steps) -> None:
                tick(before + step, len(parts) * settings.steps)

            batch, first, last = _descend(graph, targets, name, noise, settings, done)
            made.append(batch)
            losses.append((first / channels, last / channels))
    first, last = np.mean(losses, axis=0)
    return Distilled(np.concatenate(made), float(first), float(last))


def _needed(model: ir.Model, norms: Sequence[Norm]) -> list[ir.Node]:
    """The nodes that what the normalizations read depends on, in order."""
    wanted = {norm.name for norm in norms}
    nodes = []
    for node in reversed(model.graph):
        if any(output.name in wanted for output in node.outputs):
            nodes.append(node)
            wanted.update(value.name or "" for value in node.inputs if value is not None)
    return nodes[::-1]


def _descend(
    graph: TorchGraph,
    targets: Mapping[str, tuple[Tensor, Tensor]],
    name: str,
    noise: Tensor,
    settings: Settings,
    done: Callable[[int], None],
) -> tuple[np.ndarray, float, float]:
    """The best rows met on the way, with the loss of the noise and theirs."""

    def loss_of(rows: Tensor) -> Tensor:
        return _loss(graph.run({name: rows}), targets, len(rows), by_row=settings.by_row)

    with torch.no_grad():
        losses = [float(loss_of(scale * noise)) for scale in _SCALES]
    first, scale = min(zip(losses, _SCALES, strict=True))
    rows = (scale * noise).requires_grad_()
    adam = torch.optim.Adam([rows], lr=scale * settings.rate)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(adam, patience=settings.patience)
    least, best = np.inf, rows.detach().clone()
    for step in range(settings.steps + 1):
        loss = loss_of(rows)
        figure = float(loss.detach())
        if figure < least:
            least, best = figure, rows.detach().clone()
        if step == settings.steps:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        plateau.step(figure)
        with torch.no_grad():
            _bound(rows)
        done(step + 1)
    return np.asarray(best.numpy()), first, float(least)


def _loss(
    values: Mapping[str, Tensor], targets: Mapping[str, tuple[Tensor, Tensor]], rows: int, *, by_row: bool
) -> Tensor:
    """How far statistics are from those that are known, summed over channels."""
    total = torch.zeros(())
    for name, (mean, deviation) in targets.items():
        x = values[name].flatten(2) if values[name].ndim > 2 else values[name][..., None]  # [B, C, T]
        found, variance = _Moments.apply(x, (2,) if by_row and x.shape[2] > 1 else (0, 2))
        error = (found - mean).square() + ((variance + _EPSILON).sqrt() - deviation).square()
        total = total + error.sum() / (rows if error.ndim > 1 else 1)
    return total


class _Moments(torch.autograd.Function):  # type: ignore[misc]
    """Mean and variance in one pass, and their gradient in another; these are most of what a step takes."""

    @staticmethod
    def forward(context: Any, x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
        context.save_for_backward(x, mean)
        return mean.squeeze(axes), variance.squeeze(axes)

    @staticmethod
    def backward(context: Any, of_mean: Tensor, of_variance: Tensor) -> tuple[Tensor, None]:
        x, mean = context.saved_tensors
        count = x.numel() // mean.numel()
        slope = (2 / count) * of_variance.reshape(mean.shape)
        return torch.addcmul(of_mean.reshape(mean.shape) / count - slope * mean, x, slope), None


def _noise(shape: Sequence[int], random: torch.Generator) -> Tensor:
    """Noise of deviation 1 whose waves are the higher the longer they are, as those of pictures and sounds."""
    white = torch.randn(tuple(shape), generator=random)
    axes = [axis for axis in range(2, len(shape)) if shape[axis] > 1]
    if not axes:
        return white
    square = torch.zeros(())
    for axis in axes:
        sizes = [-1 if each == axis else 1 for each in range(len(shape))]
        square = square + torch.fft.fftfreq(shape[axis]).square().reshape(sizes)
    longest = min(1 / shape[axis] for axis in axes)
    waves = torch.fft.fftn(white, dim=axes) / square.sqrt().clamp(min=longest)
    noise = torch.fft.ifftn(waves, dim=axes).real
    return (noise - noise.mean()) / noise.std()


def _bound(rows: Tensor) -> None:
    """Pull values back that are further from the mean of their channel than inputs reach."""
    axes = (0, *range(2, rows.ndim))
    mean, reach = rows.mean(axes, keepdim=True), _REACH * rows.std(axes, correction=0, keepdim=True)
    rows.copy_(torch.minimum(torch.maximum(rows, mean - reach), mean + reach))
