"""A weight whose codes and scales are moved by gradient; see `rounding` for the rule.

Shapes: weights ``[N, K]``; latents and codes ``[N, G, g]``, the columns by their groups, the last of which is filled up
with zeros; scales and factors ``[N, G]``.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qcompiler.numerics.affine import Grid, WeightSpec, stored_scale
from qcompiler.tuning.directions import Adam, Factored, Pace
from qcompiler.tuning.layout import Layout

__all__ = ["EDGE", "PAST", "LearnedWeight", "Start"]

# How near to the edge of its cell a latent starts whose code is not the nearest.
EDGE = 0.4
# How far past the middle of the last cell a latent may go, so that it is rounded to a code of the format.
PAST = 0.49
# No scale moves further than this from where it starts.
_FACTORS = (0.5, 2.0)


@dataclass(frozen=True)
class Start:
    """A weight of the block, as it is quantized now.

    Attributes:
        name: Of the value that holds it.
        weight: The original, float32 ``[N, K]``.
        codes: uint8 ``[N, K]``.
        grid: Scale and zero point ``[N, G]``.
        spec: The format.
        layout: How the node stores it; see `graph.Site`.
    """

    name: str
    weight: np.ndarray
    codes: np.ndarray
    grid: Grid
    spec: WeightSpec
    layout: str

    @property
    def shapes(self) -> Layout:
        """Its shapes."""
        return Layout(len(self.weight), self.weight.shape[1], self.spec.group_size, self.layout)


class LearnedWeight:
    """The latents and factors of one weight; `value` is what stands in the place of the weight in the graph.

    A *lean* one keeps Adafactor's magnitudes (Shazeer and Stern 2018, arXiv:1804.04235: one for each row and column)
    and the running mean in bfloat16: half of the memory, for whole models.
    """

    def __init__(self, start: Start, *, lean: bool = False, dtype: torch.dtype = torch.float32) -> None:
        """Begin at the codes of `start`; `dtype` is that of `open`."""
        self.name, self.spec = start.name, start.spec
        self._first, self._layout = start.grid, start.shapes
        self._zero = torch.from_numpy(start.grid.zero_point)[..., None]  # [N, G, 1]
        self._factor = torch.ones(start.grid.scale.shape)
        centre = self._layout.grouped(torch.from_numpy(start.codes.astype(np.float32))) - self._zero
        self._latent = (
            self._layout.grouped(torch.from_numpy(start.weight)) / torch.from_numpy(start.grid.scale)[..., None]
        )
        torch.maximum(self._latent, centre - EDGE, out=self._latent)
        torch.minimum(self._latent, centre + EDGE, out=self._latent)
        self._dtype = dtype
        self._directions = (Factored() if lean else Adam(), Adam())
        self._tensor: Tensor | None = None

    @property
    def grid(self) -> Grid:
        """Scales and zero points ``[N, G]``, as they will be stored."""
        return Grid(stored_scale(self._first.scale * self._factor.numpy(), self.spec), self._first.zero_point)

    @property
    def codes(self) -> np.ndarray:
        """Codes uint8 ``[N, K]``."""
        return np.asarray(self._layout.flat(self._latent.round().add_(self._zero)).numpy(), np.uint8)

    def value(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dequantized weight in the shape that the graph stores."""
        values = torch.empty(self._latent.shape, dtype=dtype)
        torch.mul(self._latent.round(), torch.from_numpy(self.grid.scale)[..., None], out=values)
        return self._layout.to_graph(values)

    def open(self) -> Tensor:
        """The same, to gather gradients until `step`."""
        self._tensor = self.value(self._dtype).requires_grad_()
        return self._tensor

    def step(self, pace: Pace) -> None:
        """Move against the gradient."""
        tensor, self._tensor = self._tensor, None
        if tensor is None or tensor.grad is None:
            return
        slope = self._layout.from_graph(tensor.grad)
        groups = self._by_head((slope * self._layout.from_graph(tensor.detach())).sum(-1, dtype=torch.float32))
        slope = slope * torch.from_numpy(self.grid.scale)[..., None]
        latent, factor = self._directions
        self._latent.sub_(latent(slope, pace.momentum), alpha=pace.rate)
        first, last = self.spec.limits
        self._latent.clamp_(first - self._zero - PAST, last - self._zero + PAST)
        self._factor.sub_(factor(groups, pace.momentum), alpha=pace.scale_rate).clamp_(*_FACTORS)

    def state(self) -> dict[str, np.ndarray]:
        """All that `step` has changed, in the memory that it changes."""
        found = {"latent": self._latent.numpy(), "factor": self._factor.numpy()}
        for at, direction in enumerate(self._directions):
            found.update({f"{at}{name}": array for name, array in direction.state().items()})
        return found

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from what `state` gave."""
        self._latent.copy_(torch.from_numpy(np.array(state["latent"])))
        self._factor.copy_(torch.from_numpy(np.array(state["factor"])))
        for at, direction in enumerate(self._directions):
            direction.restore({name[1:]: array for name, array in state.items() if name.startswith(str(at))})

    def _by_head(self, groups: Tensor) -> Tensor:
        """Sums over the rows of a head, which share their scales: [N, G]."""
        heads = self.spec.head_size or 1
        return groups.reshape(-1, heads, groups.shape[1]).sum(1).repeat_interleave(heads, 0)
