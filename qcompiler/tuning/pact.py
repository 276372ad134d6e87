"""PACT: activations clipped at a level that is learned (Choi et al. 2018, arXiv:1805.06085).

    y = clip(x, 0, alpha),   y_q = round(y (2^k - 1) / alpha) alpha / (2^k - 1)     (equations 1 and 2)
    dy_q/dx = 1 where 0 <= x < alpha, else 0;   dy_q/dalpha = 1 where x >= alpha    (equation 3)

What is learned here is the step alpha / (2^k - 1); with a zero point both ends of the range move with it. The paper
keeps ranges small by an L2 penalty on alpha, and begins at 10; calibrated ranges, where this begins, need neither. Its
weights are those of DoReFa (Zhou et al. 2016, arXiv:1606.06160), 2^k levels without a zero between -1 and 1, which no
integer format with a zero point has: here weights are trained as in `qat`.
"""

import torch
from torch import Tensor

from qcompiler.tuning.qat import passing

__all__ = ["clipped"]


def clipped(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """The values of codes from `low` to `high`, counted from the zero point.

    Args:
        x: Any shape.
        step: A positive scalar.
        low: Zero, or with a zero point less; no value below it moves.
        high: The highest code; values from ``alpha = high * step`` on move alpha.
    """
    place = x.detach() / step.detach()
    with torch.no_grad():
        quantized = torch.clamp(torch.round(place), low, high) * step
    return passing(quantized, torch.where(place >= high, high * step, torch.where(place < low, low * step, x)))
