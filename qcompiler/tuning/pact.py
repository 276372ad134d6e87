"""PACT: activations clipped at a level that is learned, and DoReFa's weights (Choi et al. 2018, arXiv:1805.06085).

    y = clip(x, 0, alpha),   y_q = round(y (2^k - 1) / alpha) alpha / (2^k - 1)     (equations 1 and 2)
    dy_q/dx = 1 where 0 <= x < alpha, else 0;   dy_q/dalpha = 1 where x >= alpha    (equation 3)

An L2 penalty on alpha keeps ranges small; it begins at 10, or at what activations reach. Weights are those of DoReFa
(Zhou et al. 2016, arXiv:1606.06160): w_q = 2 quantize_k(tanh w / (2 max|tanh w|) + 1/2) - 1.
"""

import torch
from torch import Tensor

from qcompiler.tuning.qat import passing, rounded

__all__ = ["clipped", "dorefa_weight"]


def clipped(x: Tensor, alpha: Tensor, bits: int) -> Tensor:
    """Activations of `bits` bits between 0 and alpha, a positive scalar."""
    y = torch.where(x >= alpha, alpha, torch.relu(x))
    steps = (1 << bits) - 1
    with torch.no_grad():
        quantized = torch.round(y * (steps / alpha)) * (alpha / steps)
    return passing(quantized, y)


def dorefa_weight(weight: Tensor, bits: int) -> Tensor:
    """Weights of `bits` bits between -1 and 1; the gradient is that of the squashed weight."""
    squashed = torch.tanh(weight)
    unit = squashed / (2 * squashed.abs().max().detach()) + 0.5
    steps = (1 << bits) - 1
    return 2 * rounded(unit * steps) / steps - 1
