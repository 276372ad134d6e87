"""The one definition of each figure of merit.

Whatever is compared is compared in float64, a chunk that fits a core's cache at a time: a language model's logits
alone can be hundreds of megabytes. Chunks are summed in their order, so that threads change no result.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

__all__ = [
    "ErrorSums",
    "channel_products",
    "error_sums",
    "gain_free_noise",
    "kl_divergence",
    "log_softmax",
    "logits_divergence",
    "sqnr_db",
    "top1_agreement",
]

# Elements of a chunk: two float64 copies of it stay in a core's cache.
_CHUNK = 1 << 17
_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True)
class ErrorSums:
    """What the error of an approximation adds up to; sums of parts are the sums of the whole.

    Attributes:
        signal: Sum of the squares of the reference.
        noise: Sum of the squared differences.
        largest: Largest absolute difference.
        lost: Elements that are NaN or infinite where the reference is finite; in none of the sums.
        undefined: Elements where the reference itself is NaN or infinite; in none of the sums.
    """

    signal: float = 0.0
    noise: float = 0.0
    largest: float = 0.0
    lost: int = 0
    undefined: int = 0

    def __add__(self, other: "ErrorSums") -> "ErrorSums":
        return ErrorSums(
            self.signal + other.signal,
            self.noise + other.noise,
            max(self.largest, other.largest),
            self.lost + other.lost,
            self.undefined + other.undefined,
        )

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise ratio in dB: ``10 log10(signal / noise)``; inf without noise."""
        if self.noise == 0:
            return float("inf")
        return float(10 * np.log10(self.signal / self.noise)) if self.signal else float("-inf")


def error_sums(
    reference: np.ndarray, approximation: np.ndarray, rows: np.ndarray | None = None, threads: int = 1
) -> ErrorSums:
    """Compare two arrays.

    Args:
        reference: Any shape; with `rows`, ``[P, F]``.
        approximation: The same shape.
        rows: int ``[R]``, the rows to compare; None takes all elements.
        threads: Threads to use; the result does not depend on it.

    Returns:
        Sums over all elements compared, in float64.
    """
    if rows is None:
        flat, other = reference.reshape(-1), approximation.reshape(-1)
        parts: list[slice | np.ndarray] = [slice(at, at + _CHUNK) for at in range(0, flat.size, _CHUNK)]
    else:
        flat, other = reference, approximation
        step = max(1, _CHUNK // max(1, reference.shape[-1]))
        parts = [rows[at : at + step] for at in range(0, len(rows), step)]
    found = _map(lambda part: _chunk_errors(flat[part], other[part]), parts, threads)
    return sum(found, ErrorSums())


def _chunk_errors(reference: np.ndarray, approximation: np.ndarray) -> ErrorSums:
    wide = reference.astype(np.float64).reshape(-1)
    other = approximation.astype(np.float64).reshape(-1)
    lost = undefined = 0
    if not wide.size:
        return ErrorSums()
    with np.errstate(invalid="ignore", over="ignore"):
        error = wide - other
        noise = float(error @ error)
        if not np.isfinite(noise):
            known = np.isfinite(wide)
            both = known & np.isfinite(other)
            lost, undefined = int(np.count_nonzero(known & ~both)), int(np.count_nonzero(~known))
            wide, error = np.where(both, wide, 0), np.where(both, error, 0)
            noise = float(error @ error)
        return ErrorSums(float(wide @ wide), noise, float(max(error.max(), -error.min())), lost, undefined)


def channel_products(reference: np.ndarray, approximation: np.ndarray, axis: int) -> np.ndarray:
    """Sums of ``r^2``, ``r a`` and ``a^2`` over each channel; what is not finite counts as zero.

    Args:
        reference: Any shape with the axis.
        approximation: The same shape.
        axis: The one that channels run along.

    Returns:
        float64 ``[3, C]``, C the size of `axis`.
    """
    wide = [np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis]) for array in (reference, approximation)]
    r, a = (np.nan_to_num(array.astype(np.float64), nan=0, posinf=0, neginf=0) for array in wide)
    return np.stack([np.einsum("tc,tc->c", *pair) for pair in ((r, r), (r, a), (a, a))])


def gain_free_noise(products: np.ndarray) -> float:
    """Summed squared error that is left when each channel of the approximation is scaled as fits the reference best.

    Args:
        products: Sums of `channel_products`, ``[3, C]``.

    Returns:
        ``sum_c r^2 - (r a)^2 / a^2``, never below zero.
    """
    own, mixed, other = products
    left = own - np.divide(mixed * mixed, other, out=np.zeros_like(own), where=other > 0)
    return float(np.maximum(left, 0).sum())


def sqnr_db(reference: np.ndarray, approximation: np.ndarray) -> float:
    """Signal to quantization noise ratio in dB: ``10 log10(sum r^2 / sum (r - a)^2)``; inf where they are equal.

    Args:
        reference: Any shape.
        approximation: The same shape.

    Returns:
        Ratio in dB, computed in float64.
    """
    return error_sums(reference, approximation).sqnr_db


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural log-probabilities float32 over the last axis; shape unchanged."""
    logits = np.asarray(logits, np.float32)
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)), np.float32)


def logits_divergence(
    reference: np.ndarray,
    logits: np.ndarray,
    rows: np.ndarray | None = None,
    threads: int = 1,
    *,
    probabilities: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """KL(reference || other) in nats of each position, and whether both have their largest value at the same place.

    A value of minus infinity in both is a token that cannot occur; it adds nothing. A position whose reference holds
    NaN, plus infinity, or nothing but minus infinity has no divergence: NaN.

    Args:
        reference: ``[P, V]``.
        logits: The same shape.
        rows: int ``[R]``, the positions to compare; None takes all P.
        threads: Threads to use; the result does not depend on it.
        probabilities: Whether the arrays hold probabilities instead of logits.

    Returns:
        float64 ``[R]`` and bool ``[R]``.
    """
    index = np.arange(len(reference)) if rows is None else rows
    step = max(1, _CHUNK // max(1, reference.shape[-1]))
    parts = [index[at : at + step] for at in range(0, len(index), step)]

    def chunk(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        r, a = reference[part], logits[part]
        return _chunk_divergence(_logarithm(r), _logarithm(a)) if probabilities else _chunk_divergence(r, a)

    found = _map(chunk, parts, threads)
    if not found:
        return np.zeros(0), np.zeros(0, bool)
    return np.concatenate([kl for kl, _ in found]), np.concatenate([same for _, same in found])


def _logarithm(probabilities: np.ndarray) -> np.ndarray:
    """Natural logarithm float64; what underflowed to zero counts as the smallest float32."""
    return np.asarray(np.log(np.maximum(probabilities, np.finfo(np.float32).tiny, dtype=np.float64)))


def _chunk_divergence(reference: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of ``[R, V]``: with r, a shifted by their maxima, ``sum p (r - a) - log sum e^r + log sum e^a``."""
    at, other_at, each = reference.argmax(-1), logits.argmax(-1), np.arange(len(reference))
    with np.errstate(invalid="ignore", over="ignore"):
        r = np.subtract(reference, reference[each, at][:, None], dtype=np.float64)
        a = np.subtract(logits, logits[each, other_at][:, None], dtype=np.float64)
        weight = np.exp(r)
        r -= a
        np.exp(a, out=a)
        total, other_total = weight.sum(-1), a.sum(-1)
        kl = np.einsum("rv,rv->r", weight, r)
        if not np.isfinite(kl).all():
            kl = (weight * np.where(weight > 0, r, 0)).sum(-1)
        return kl / total - np.log(total) + np.log(other_total), at == other_at


def _map(function: Callable[[_In], _Out], parts: Sequence[_In], threads: int) -> list[_Out]:
    """Results in the order of `parts`."""
    if threads <= 1 or len(parts) <= 1:
        return [function(part) for part in parts]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, parts))


def kl_divergence(reference_logits: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """KL(reference || other) in nats of each position: float64 ``[...]`` from ``[..., V]``."""
    width = reference_logits.shape[-1]
    kl, _ = logits_divergence(reference_logits.reshape(-1, width), logits.reshape(-1, width))
    return kl.reshape(reference_logits.shape[:-1])


def top1_agreement(reference_logits: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Where both have their largest value at the same place: bool ``[...]`` from ``[..., V]``."""
    return np.asarray(reference_logits.argmax(-1) == logits.argmax(-1))
