"""Fake quantization with a straight-through gradient: what quantization-aware training is made of.

A value is rounded on the way forward, and on the way back passes the gradient on as if it had not been, if it lay
within the range of the codes (Bengio et al. 2013, arXiv:1308.3432; Jacob et al. 2018, arXiv:1712.05877):

    code = clip(round(x / scale) + zero, low, high),   y = (code - zero) * scale
    dy/dx = 1 where low <= x / scale + zero <= high, else 0

Rounding is half to even, as in ONNX's QuantizeLinear, so that y is what ONNX Runtime computes from the codes.
"""

import torch
from torch import Tensor

__all__ = ["fake_quantize", "nearest", "passing"]


def passing(value: Tensor, x: Tensor, share: Tensor | float = 1.0) -> Tensor:
    """A value to the last bit, whose gradient goes to x, times a share of it."""
    return value.detach() + share * (x - x.detach())


def nearest(place: Tensor, low: int | Tensor, high: int | Tensor) -> Tensor:
    """The nearest codes of what is measured in steps."""
    if isinstance(low, Tensor) and isinstance(high, Tensor):
        return torch.minimum(torch.maximum(place, low), high).round_()
    return torch.clamp(place, low, high).round_()


def fake_quantize(x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    """The values that codes of x stand for.

    Args:
        x: Any shape.
        scale: Positive, broadcast to x; no gradient reaches it.
        zero: Whole numbers, broadcast to x.
        low: Lowest code.
        high: Highest code.
    """
    scale = scale.detach()
    place = x.detach() / scale + zero
    code = torch.clamp(torch.round(x.detach() / scale) + zero, low, high)
    return passing((code - zero) * scale, x, (place >= low) & (place <= high))
