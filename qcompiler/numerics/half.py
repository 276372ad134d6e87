"""float32 to float16: what is lost on the way, and the values that arrive."""

from dataclasses import dataclass

import numpy as np

__all__ = ["HalfLoss", "half_loss", "to_half"]

_LARGEST, _SMALLEST = float(np.finfo(np.float16).max), float(np.finfo(np.float16).tiny)
_CHUNK = 1 << 20


@dataclass(frozen=True)
class HalfLoss:
    """What becomes of an array.

    Attributes:
        size: Number of values.
        beyond: Finite values of larger magnitude than float16 has (65504).
        subnormal: Values other than zero that are too small for float16's full precision (below 6.1e-5).
        largest: Largest finite magnitude.
    """

    size: int
    beyond: int
    subnormal: int
    largest: float


def half_loss(array: np.ndarray) -> HalfLoss:
    """Count what float16 cannot hold; infinity and NaN, which it can, are left out."""
    beyond = subnormal = 0
    largest = 0.0
    flat = array.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        values = np.abs(flat[start : start + _CHUNK])
        finite = values[np.isfinite(values)]
        beyond += int(np.count_nonzero(finite > _LARGEST))
        subnormal += int(np.count_nonzero((finite < _SMALLEST) & (finite > 0)))
        largest = max(largest, float(finite.max(initial=0.0)))
    return HalfLoss(flat.size, beyond, subnormal, largest)


def to_half(array: np.ndarray) -> np.ndarray:
    """float16 of the same shape, to nearest even; finite values beyond 65504 become 65504, infinity stays."""
    limit = np.float32(_LARGEST)
    with np.errstate(over="ignore"):
        limited = np.where(np.isfinite(array), np.minimum(np.maximum(array, -limit), limit), array)
        return np.asarray(limited, np.float16)
