"""LSQ: fake quantization whose step is learned with the weights (Esser et al. 2020, arXiv:1902.08153).

    y = round(clip(x / s, -Qn, Qp)) * s
    dy/dx = 1 inside of the range, else 0                                        (equation 5)
    dy/ds = round(x / s) - x / s inside, -Qn below and Qp above, times g          (equation 3)
    g = 1 / sqrt(n Qp), n being how many values share the step in a forward pass  (section 2.2)

The paper begins at 2 mean|x| / sqrt(Qp); here a step begins where calibration, or the algorithm before, put it.
"""

import math

import torch
from torch import Tensor

from qcompiler.tuning.qat import passing, rounded

__all__ = ["gradient_scale", "learned_step"]


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
    slow = passing(step, step, factor)
    return rounded(torch.clamp(x / slow, low, high)) * slow
