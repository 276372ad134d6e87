"""Facts measured from activations, accumulated batch by batch into arrays of fixed size."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from qcompiler.errors import NumericsError

__all__ = ["Hessian", "LayerFacts", "OutputFacts"]

# Outputs further apart than this are taken for unrelated, so that memory grows with a layer and not with its square.
_WIDEST = 2048


@dataclass(frozen=True)
class LayerFacts:
    """What is known about the activation that a site reads.

    Attributes:
        hessian: float64 ``[K, K]``, the sum over tokens of x x^T; ``[groups, K, K]`` for a convolution of groups, each
            of which reads channels of its own.
        tokens: Number of tokens in the sum.
        drift: float64 ``[K, K]``, the sum over tokens of (x_f - x) x^T with x_f the activation in the float model; None
            where it was not asked for, and for a convolution of groups.
        residual: float64 ``[N, K]``, the sum over tokens of (r_f - r) x^T with r what the output is added to; None
            where that is not known, and for several sites.
        held_out: The share in these sums of batches to judge by; None where there is no drift.
        curvatures: G of outputs next to one another, float32 ``[n, n]`` each, of all rows of the weight in order (see
            `tuning.fisher`); None where outputs are taken for unrelated and all count the same.
        means: float64 ``[K]``, the mean over tokens of |x|; None for a convolution of groups.
    """

    hessian: np.ndarray
    tokens: int
    drift: np.ndarray | None = None
    held_out: "LayerFacts | None" = None
    curvatures: Sequence[np.ndarray] | None = None
    means: np.ndarray | None = None
    residual: np.ndarray | None = None


class OutputFacts:
    """How much a model's answer hangs on what a site computes; see `tuning.fisher`.

    Attributes:
        sums: G of outputs next to one another, float32 ``[n, n]`` each.
        tokens: For each row of data what its tokens count, float32 ``[T]``.
    """

    width = _WIDEST

    def __init__(self, rows: int) -> None:
        """Start with zeros for a site of N rows."""
        sizes = [min(_WIDEST, rows - start) for start in range(0, rows, _WIDEST)]
        self.sums = [np.zeros((size, size), np.float32) for size in sizes]
        self.tokens: list[np.ndarray] = []

    @property
    def finite(self) -> bool:
        """Whether no gradient ran over."""
        return all(np.isfinite(array).all() for array in (*self.sums, *self.tokens))

    def correlations(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each of `sums`, the roots of its diagonal float32 ``[n]``, and the rest relative to them, float16."""
        for total in self.sums:
            size = np.sqrt(np.diagonal(total))
            unit = np.divide(1, size, out=np.zeros_like(size), where=size > 0)
            yield size, (total * unit * unit[:, None]).astype(np.float16)


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
