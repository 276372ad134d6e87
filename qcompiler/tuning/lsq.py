"""LSQ: fake quantization whose step is learned with the weights (Esser et al. 2020, arXiv:1902.08153).

    y = round(clip(x / s, -Qn, Qp)) * s
    dy/dx = 1 inside of the range, else 0                                        (equation 5)
    dy/ds = round(x / s) - x / s inside, -Qn below and Qp above, times g          (equation 3)
    g = 1 / sqrt(n Qp), n being how many values share the step in a forward pass  (section 2.2)

A step begins at 2 mean|x| / sqrt(Qp), and stays positive (`positive`).
"""

import math

import torch
from torch import Tensor

from qcompiler.tuning.qat import passing, rounded

__all__ = ["gradient_scale", "initial_step", "learned_step", "positive"]

_SMALLEST = 1e-8


def initial_step(x: Tensor, high: int, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Where a step begins: ``2 mean|x| / sqrt(Qp)``, the mean over the dimensions that share it, which are kept."""
    mean = x.abs().mean() if dim is None else x.abs().mean(dim, keepdim=True)
    return torch.clamp(2 * mean / math.sqrt(max(high, 1)), min=_SMALLEST)


def gradient_scale(count: int, high: int) -> float:
    """``g`` for a step that `count` values share."""
    return 1 / math.sqrt(count * max(high, 1))


def positive(step: Tensor) -> Tensor:
    """The step, kept from falling to zero; its gradient passes unchanged."""
    return passing(torch.clamp(step, min=_SMALLEST), step)


def learned_step(x: Tensor, step: Tensor, low: int | Tensor, high: int | Tensor, factor: float = 1.0) -> Tensor:
    """The values that codes between `low` and `high` stand for.

    Args:
        x: Any shape.
        step: Positive, broadcast to x.
        low: -Qn; a tensor is broadcast to x.
        high: Qp, of the same kind.
        factor: g.
    """
    slow = passing(step, step, factor)
    return rounded(torch.clamp(x / slow, low, high)) * slow
