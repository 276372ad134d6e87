"""LSQ: fake quantization whose step is learned with the weights (Esser et al. 2020, arXiv:1902.08153).

    y = round(clip(x / s, -Qn, Qp)) * s
    dy/dx = 1 inside of the range, else 0                                        (equation 5)
    dy/ds = round(x / s) - x / s inside, -Qn below and Qp above, times g          (equation 3)
    g = 1 / sqrt(n Qp), n being how many values share the step in a forward pass  (section 2.2)

The paper begins at 2 mean|x| / sqrt(Qp); here a step begins where calibration, or the algorithm before, put it.
"""

import math
from typing import Any

import torch
from torch import Tensor

from qcompiler.tuning.qat import nearest

__all__ = ["gradient_scale", "learned_step", "slopes"]


def gradient_scale(count: int, high: int) -> float:
    """``g`` for a step that `count` values share."""
    return 1 / math.sqrt(count * max(high, 1))


def learned_step(x: Tensor, step: Tensor, low: int | Tensor, high: int | Tensor, factor: float = 1.0) -> Tensor:
    """The values that codes between `low` and `high` stand for.

    Args:
        x: Any shape.
        step: Positive, broadcast to x.
        low: -Qn; a tensor is broadcast to x.
        high: Qp, of the same kind.
        factor: g.
    """
    found: Tensor = _LearnedStep.apply(x, step, low, high, factor)
    return found


def slopes(
    slope: Tensor, x: Tensor, step: Tensor, low: int | Tensor, high: int | Tensor, factor: float
) -> tuple[Tensor, Tensor]:
    """Those of x and of the step, from that of `learned_step`."""
    place = x / step
    code = nearest(place, low, high)
    inside = (place >= low) & (place <= high)
    of_step = code.sub_(place.mul_(inside)).mul_(slope).sum_to_size(step.shape).mul_(factor)
    return slope * inside, of_step


class _LearnedStep(torch.autograd.Function):  # type: ignore[misc]
    """`learned_step`; what PyTorch would remember of its operators is several times x."""

    @staticmethod
    def forward(context: Any, x: Tensor, step: Tensor, low: int | Tensor, high: int | Tensor, factor: float) -> Tensor:
        """The values."""
        context.save_for_backward(x, step)
        context.range, context.factor = (low, high), factor
        return nearest(x / step, low, high).mul_(step)

    @staticmethod
    def backward(context: Any, slope: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """See `slopes`."""
        x, step = context.saved_tensors
        low, high = context.range
        return *slopes(slope, x, step, low, high, context.factor), None, None, None
