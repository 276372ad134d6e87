"""Facts measured from activations, accumulated batch by batch into arrays of fixed size."""

from dataclasses import dataclass

import numpy as np

from qcompiler.errors import NumericsError

__all__ = ["Hessian", "LayerFacts"]


@dataclass(frozen=True)
class LayerFacts:
    """What is known about the activation that a site reads.

    Attributes:
        hessian: float64 ``[K, K]``, the sum over tokens of x x^T; ``[groups, K, K]`` for a convolution of groups, each
            of which reads channels of its own.
        tokens: Number of tokens in the sum.
        drift: float64 ``[K, K]``, the sum over tokens of (x_f - x) x^T with x_f the activation in the float model; None
            where it was not asked for, and for a convolution of groups.
        held_out: The share in these sums of batches to judge by; None where there is no drift.
    """

    hessian: np.ndarray
    tokens: int
    drift: np.ndarray | None = None
    held_out: "LayerFacts | None" = None


class Hessian:
    """The sum of x x^T over tokens, ``X^T X`` for X ``[T, K]``: float32 within a batch, float64 across batches.

    With groups, X is ``[groups, T, K]`` and the sum ``[groups, K, K]``.
    """

    def __init__(self, columns: int, groups: int = 1) -> None:
        """Start with zeros."""
        self.total = np.zeros((groups, columns, columns) if groups > 1 else (columns, columns), np.float64)
        self.tokens = 0

    def product(self, rows: np.ndarray) -> tuple[np.ndarray, int]:
        """One batch's share, float32 ``[K, K]`` from tokens ``[T, K]``, and T; safe to call from threads."""
        if rows.shape[-1] != self.total.shape[-1]:
            raise NumericsError(
                f"an activation has {rows.shape[-1]} features where the weight has K = {self.total.shape[-1]}"
            )
        rows = np.ascontiguousarray(rows, np.float32)
        return np.swapaxes(rows, -1, -2) @ rows, rows.shape[-2]

    def add(self, product: np.ndarray, tokens: int) -> None:
        """Add a batch's share."""
        self.total += product
        self.tokens += tokens

    def facts(self, site: str, drift: np.ndarray | None = None) -> LayerFacts:
        """The result; raises NumericsError naming `site` if an activation was not finite."""
        if not (np.isfinite(self.total).all() and (drift is None or np.isfinite(drift).all())):
            raise NumericsError(
                f"the activation that '{site}' reads holds NaN or infinity on the calibration data; "
                "check the data, or leave the site float with --ignore"
            )
        return LayerFacts(self.total, self.tokens, drift)
