"""Number formats of activations: one scale and zero point for a whole tensor, as QuantizeLinear has them.

``code = clip(rint(x / scale) + zero_point, low, high)``, ``value = (code - zero_point) * scale``; 8-bit floats (E4M3)
have no zero point, and their codes are the floats nearest to ``x / scale``.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = [
    "ActivationSpec",
    "activation_grid",
    "dequantize_activation",
    "fake_quantize",
    "quantize_activation",
    "quantize_bias",
]

# The largest finite E4M3 number.
_FP8_MAX = 448.0
# Numbers of this size or more are at the end of the codes when they are divided by it; float16 holds it.
_TINY = 2.0**-14


@dataclass(frozen=True)
class ActivationSpec:
    """Format of an activation's codes.

    Attributes:
        bits: 8 or 16, or 1 to 4, whose codes lie in bytes and are cut off behind QuantizeLinear. 1 stands for signs:
            the codes beside the middle, to which everything is sent that is not zero.
        signed: int8 or int16 in the place of uint8 or uint16.
        symmetric: Zero is the middle code, and the code without a mirror image is not used.
        fp8: float8 E4M3 in the place of integers; the other fields but `bits` mean nothing then.
    """

    bits: int = 8
    signed: bool = False
    symmetric: bool = False
    fp8: bool = False

    def __str__(self) -> str:
        """For reports: ``uint8``, ``int8-sym`` ..."""
        if self.fp8:
            return "float8e4m3"
        if self.bits == 1:
            return "signs"
        return f"{'' if self.signed else 'u'}int{self.bits}{'-sym' if self.symmetric else ''}"

    @property
    def narrow(self) -> bool:
        """Whether the codes that are used are fewer than those of the type."""
        return self.bits < 8

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest code."""
        if self.bits == 1:
            return self.middle - 1, self.middle + 1
        low = -(1 << (self.bits - 1)) if self.signed else 0
        return low + (1 if self.symmetric else 0), low + (1 << self.bits) - 1

    @property
    def ends(self) -> tuple[int, int]:
        """Where codes saturate.

        The code without a mirror image is left out of a symmetric grid's scale, but QuantizeLinear may come to it.
        """
        kind = np.iinfo(self.dtype)
        return self.limits if self.narrow else (int(kind.min), int(kind.max))

    @property
    def middle(self) -> int:
        """The code that means zero on a symmetric grid."""
        if self.bits == 1:
            return 0 if self.signed else 128
        return 0 if self.signed else 1 << (self.bits - 1)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Numpy dtype of the codes."""
        if self.fp8:
            import ml_dtypes

            float8: np.dtype[Any] = np.dtype(ml_dtypes.float8_e4m3fn)
            return float8
        return np.dtype(f"{'' if self.signed else 'u'}int{max(self.bits, 8)}")

    def encoding_scale(self, scale: float) -> float:
        """What QuantizeLinear divides by: the scale, or for signs so little that every number leaves the middle."""
        return _TINY if self.bits == 1 else scale


# A step grows by a third at most to let a given number be a code.
_STRETCH = 4 / 3


def activation_grid(
    low: float, high: float, spec: ActivationSpec, scale_dtype: str = "float32", anchor: float = 0.0
) -> tuple[float, int]:
    """Scale and zero point of values in [low, high], which is widened to hold zero.

    Args:
        low: Smallest value to represent.
        high: Largest value to represent.
        spec: Format.
        scale_dtype: numpy name of the dtype the scale is stored in: float32 or float16.
        anchor: Another number that is to be a code, up to the scale's rounding, where that makes the steps no more than
            a third coarser. Symmetric formats and 8-bit floats have none.

    Returns:
        Scale, a positive normal number that the dtype holds exactly, and zero point.
    """
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    first, last = spec.limits
    if anchor and not spec.symmetric and not spec.fp8:
        low, high = _anchored(low, high, anchor, last - first)
    if spec.fp8:
        scale, zero = max(-low, high) / _FP8_MAX, 0
    elif spec.symmetric:
        scale, zero = max(-low, high) / (last - spec.middle), spec.middle
    else:
        scale, zero = (high - low) / (last - first), first
    scale = max(scale, float(np.finfo(scale_dtype).tiny)) if scale else 1.0
    scale = float(np.dtype(scale_dtype).type(scale))
    if not spec.symmetric and not spec.fp8:
        zero = int(np.clip(np.rint(first - low / np.float32(scale)), first, last))
    return scale, zero


def _anchored(low: float, high: float, anchor: float, steps: int) -> tuple[float, float]:
    """The range as wide as it has to be for the anchor to be a code, or as it is where that takes too much."""
    least, widest = min(low, anchor), max(high, anchor)
    count = math.floor(steps * abs(anchor) / (widest - least))
    if not count or steps * abs(anchor) / count > _STRETCH * (high - low):
        return low, high
    return least, least + steps * abs(anchor) / count


def quantize_activation(values: np.ndarray, scale: float, zero_point: int, spec: ActivationSpec) -> np.ndarray:
    """Codes of `values` in the format's dtype, as QuantizeLinear computes them; any shape."""
    scaled = np.divide(values, np.float32(spec.encoding_scale(scale)), dtype=np.float32)
    if spec.fp8:
        return np.asarray(np.clip(scaled, -_FP8_MAX, _FP8_MAX), spec.dtype)
    return np.asarray(np.clip(np.rint(scaled) + np.float32(zero_point), *spec.ends), spec.dtype)


def dequantize_activation(codes: np.ndarray, scale: float, zero_point: int) -> np.ndarray:
    """Values float32 of codes, as DequantizeLinear computes them."""
    return np.asarray((codes.astype(np.float32) - np.float32(zero_point)) * np.float32(scale), np.float32)


def fake_quantize(values: np.ndarray, scale: float, zero_point: int, spec: ActivationSpec) -> np.ndarray:
    """What `values` become when they are quantized and decoded: float32, the same shape."""
    return dequantize_activation(quantize_activation(values, scale, zero_point, spec), scale, zero_point)


def quantize_bias(bias: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """int32 codes of a bias ``[N]`` in the scales ``[N]`` of the product it is added to, without zero point."""
    codes = np.rint(bias.astype(np.float64) / scale.astype(np.float64))
    return np.asarray(np.clip(codes, -(2**31) + 1, 2**31 - 1), np.int32)
