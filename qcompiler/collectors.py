"""What reduces the activations of a float model to a few numbers, batch by batch (see `observing.Collector`)."""

import numpy as np

from qcompiler.numerics.rows import feature_rows

__all__ = ["ChannelRange", "RowSample"]


class ChannelRange:
    """Smallest and largest value of each channel, over all other axes.

    Attributes:
        low: float32 ``[K]``; None before the first batch.
        high: float32 ``[K]``; None before the first batch.
    """

    def __init__(self, axis: int = -1) -> None:
        """`axis` is the one that channels run along."""
        self.axis = axis
        self.low: np.ndarray | None = None
        self.high: np.ndarray | None = None

    def part(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """A batch's range."""
        rows = feature_rows(values, self.axis)
        return (rows.min(0).astype(np.float32), rows.max(0).astype(np.float32)) if len(rows) else None

    def add(self, part: tuple[np.ndarray, np.ndarray] | None) -> None:
        """Widen the range."""
        if part is None:
            return
        low, high = part
        self.low = low if self.low is None else np.minimum(self.low, low)
        self.high = high if self.high is None else np.maximum(self.high, high)

    @property
    def absmax(self) -> np.ndarray:
        """Largest magnitude of each channel, float32 ``[K]``."""
        assert self.low is not None and self.high is not None
        return np.asarray(np.maximum(-self.low, self.high))


class RowSample:
    """A fixed number of rows (tokens, positions), evenly spaced over all that were seen.

    The same data gives the same rows, however many threads show it; at most twice the wanted number is held.
    """

    def __init__(self, rows: int = 512, axis: int = -1) -> None:
        """Keep `rows` rows; `axis` is the one that channels run along."""
        self.wanted, self.axis = rows, axis
        self._kept: list[np.ndarray] = []
        self._seen, self._stride = 0, 1

    def part(self, values: np.ndarray) -> np.ndarray:
        """Up to the wanted number of rows of a batch, float32 ``[T, K]``."""
        rows = feature_rows(values, self.axis)
        return np.array(rows[_evenly(len(rows), self.wanted)], np.float32)

    def add(self, part: np.ndarray) -> None:
        """Keep each row whose number is a multiple of the stride, which doubles when there are too many."""
        first = -self._seen % self._stride
        self._seen += len(part)
        self._kept += [row.copy() for row in part[first :: self._stride]]
        while len(self._kept) > 2 * self.wanted:
            self._kept = self._kept[::2]
            self._stride *= 2

    @property
    def values(self) -> np.ndarray:
        """The rows, float32 ``[T, K]`` with T up to the wanted number."""
        assert self._kept
        return np.stack([self._kept[i] for i in _evenly(len(self._kept), self.wanted)])


def _evenly(count: int, wanted: int) -> np.ndarray:
    """Up to `wanted` of the numbers below `count`, evenly spaced."""
    return np.arange(min(count, wanted)) * count // max(min(count, wanted), 1)
