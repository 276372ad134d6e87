"""Double quantization: the scales of a row as codes of 8 bits times one step.

Dettmers et al. 2023, "QLoRA", arXiv:2305.14314, section 3, have blocks of 256 scales less their mean; a row is what our
formats share, and scales may be negative.

    step = max|s| / 127,   s ~ code * step

A step has 16 significant bits, so that products with codes are exact: what was rounded once comes out again.
"""

import numpy as np

__all__ = ["double_quantized", "double_rounded"]

_LAST = 127
# Bits of a float32 that a step does without.
_DROPPED = 8


def double_quantized(scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and steps.

    Args:
        scale: float32 ``[N, G]``; no zeros.

    Returns:
        Codes int8 ``[N, G]``, none of them zero, and steps float32 ``[N, 1]``.
    """
    exact = np.abs(scale).max(-1, keepdims=True).astype(np.float32) / np.float32(_LAST)
    bits = exact.view(np.uint32)
    step = ((bits + (1 << (_DROPPED - 1))) & ~np.uint32((1 << _DROPPED) - 1)).astype(np.uint32).view(np.float32)
    codes = np.clip(np.rint(scale / step), -_LAST, _LAST)
    codes = np.where(codes == 0, np.copysign(np.float32(1), scale), codes)
    return codes.astype(np.int8), step


def double_rounded(scale: np.ndarray) -> np.ndarray:
    """What the codes stand for, float32 ``[N, G]``."""
    codes, step = double_quantized(scale)
    rounded: np.ndarray = codes * step
    return rounded
