"""The shapes of a weight: as the graph stores it, as a matrix ``[N, K]``, and by groups of columns ``[N, G, g]``."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompiler.quantized import stored_shape

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """How one weight is laid out.

    Attributes:
        rows: N.
        columns: K.
        group_size: g; the last group is filled up with zeros.
        text: How the node stores it; see `graph.Site`.
    """

    rows: int
    columns: int
    group_size: int
    text: str

    def grouped(self, matrix: Tensor) -> Tensor:
        """[N, K] -> [N, G, g]."""
        padded = torch.nn.functional.pad(matrix, (0, -self.columns % self.group_size))
        return padded.reshape(len(matrix), -1, self.group_size)

    def flat(self, groups: Tensor) -> Tensor:
        """[N, G, g] -> [N, K]."""
        return groups.reshape(len(groups), -1)[:, : self.columns]

    def to_graph(self, groups: Tensor) -> Tensor:
        """[N, G, g] -> the shape that the graph stores."""
        flat = self.flat(groups)
        stored = flat.T if self._transposed else flat
        return stored.reshape(stored_shape(self.text, self.rows, self.columns))

    def from_graph(self, tensor: Tensor) -> Tensor:
        """The shape that the graph stores -> [N, G, g]."""
        if self._transposed:
            return self.grouped(tensor.reshape(self.columns, self.rows).T)
        return self.grouped(tensor.reshape(self.rows, self.columns))

    @property
    def _transposed(self) -> bool:
        return self.text in ("KN", "1KN")
