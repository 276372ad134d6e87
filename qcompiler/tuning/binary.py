"""Binary weights and activations: BinaryConnect, binarized networks and XNOR-Net.

    BinaryConnect   w_b = sign(w), or +1 with probability clip((w + 1) / 2, 0, 1); the gradient of w_b moves w, which is
                    kept within [-1, 1]   (Courbariaux et al. 2015, arXiv:1511.00363, sections 2.2 to 2.4)
    BNN             activations are signs too; dy/dx = 1 where |x| <= 1   (Courbariaux et al. 2016, arXiv:1602.02830)
    XNOR-Net        W = alpha sign(w), alpha = mean|w| of each output channel, n being its weights;
                    dW/dw = 1/n + alpha where |w| <= 1, 1/n elsewhere; activations are signs times their mean magnitude,
                    here times a learned scale   (Rastegari et al. 2016, arXiv:1603.05279, sections 3.1 and 3.2)

sign(0) is +1, as in `kernels.schemas`.
"""

import torch
from torch import Tensor

from qcompiler.tuning.qat import passing

__all__ = ["binary_weight", "sign_activations", "xnor_weight"]


def signs_of(x: Tensor) -> Tensor:
    """Plus and minus one."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def binary_weight(weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Signs of weights, whose gradient passes unchanged; with a generator they are drawn."""
    if generator is None:
        signs = signs_of(weight)
    else:
        likely = torch.clamp((weight + 1) / 2, 0, 1)
        signs = torch.where(torch.rand(weight.shape, generator=generator) < likely, 1.0, -1.0).to(weight.dtype)
    return passing(signs, weight)


def sign_activations(x: Tensor) -> Tensor:
    """Signs of activations; the gradient passes where ``|x| <= 1``."""
    return passing(signs_of(x), x, x.detach().abs() <= 1)


def xnor_weight(weight: Tensor) -> Tensor:
    """Signs of a weight ``[N, K]`` times the mean magnitude of each row."""
    alpha = weight.detach().abs().mean(-1, keepdim=True)
    return passing(alpha * signs_of(weight), weight, 1 / weight.shape[-1] + alpha * (weight.detach().abs() <= 1))
