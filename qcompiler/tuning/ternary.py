"""Ternary weights: minus one, zero and one times a scale.

    TWN       t = sign(w) where |w| > 0.7 mean|w|, alpha = mean|w| of these   (Li et al. 2016, arXiv:1605.04711)
    TTQ       both scales are learned; |w| > 0.05 max|w| counts   (Zhu et al. 2017, arXiv:1612.01064)
    absmean   t = clip(round(w / mean|w|), -1, 1), alpha = mean|w|   (Ma et al. 2024, BitNet b1.58, arXiv:2402.17764)

Thresholds and scales are those of each row of a weight ``[N, K]``, or of each group of columns in ``[N, G, g]``: of the
last dimension.
"""

import torch
from torch import Tensor

from qcompiler.tuning.qat import passing

__all__ = ["TTQ_SHARE", "absmean_weight", "trained_ternary", "ttq_signs", "twn_ternary"]

_TWN, TTQ_SHARE = 0.7, 0.05


def _best_scale(weight: Tensor, codes: Tensor) -> Tensor:
    """The mean magnitude of the weights whose codes are not zero, ``[.., 1]``; 1 where there are none."""
    used = codes != 0
    total, count = (weight.abs() * used).sum(-1, keepdim=True), used.sum(-1, keepdim=True)
    return torch.where(count > 0, total / count.clamp(min=1), torch.ones_like(total))


def twn_ternary(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales ``[.., 1]`` of TWN."""
    threshold = _TWN * weight.abs().mean(-1, keepdim=True)
    codes = torch.sign(weight) * (weight.abs() > threshold)
    return codes, _best_scale(weight, codes)


def absmean_weight(weight: Tensor) -> Tensor:
    """The ternary weight of BitNet; the gradient passes unchanged."""
    scale = weight.abs().mean(-1, keepdim=True).detach().clamp(min=1e-8)
    return passing(torch.clamp(torch.round(weight / scale), -1, 1) * scale, weight)


def ttq_signs(weight: Tensor) -> Tensor:
    """Which weights TTQ takes for large: 1 and -1, and 0 for the others."""
    return torch.sign(weight) * (weight.abs() > TTQ_SHARE * weight.abs().amax(-1, keepdim=True))


def trained_ternary(weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """``up`` and ``-down``, both positive, where the weight is large, zero elsewhere.

    Gradients (equations 7 and 8 of TTQ): of each scale the sum over its weights; of a weight that of its value, times
    its scale where it has one.
    """
    signs = ttq_signs(weight.detach())
    above, below = signs > 0, signs < 0
    value = up * above - down * below
    factor = torch.where(above, up, torch.where(below, down, torch.ones_like(weight))).detach()
    return value + factor * (weight - weight.detach())
