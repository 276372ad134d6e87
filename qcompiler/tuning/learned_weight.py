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
from qcompiler.quantized import stored_shape

__all__ = ["Adam", "LearnedWeight", "Pace", "Start"]

# How near to the edge of its cell a latent starts whose code is not the nearest.
_EDGE = 0.4
# How far past the middle of the last cell a latent may go, so that it is rounded to a code of the format.
_PAST = 0.49
# No scale moves further than this from where it starts.
_FACTORS = (0.5, 2.0)
# Share of the running magnitude of a slope that is kept from step to step.
_MAGNITUDE = 0.99
_TINY = 1e-30
# Share of the newest slope in a magnitude that is held by rows and columns.
_NEW = 0.1
# No latent moves further in one step than this many times the rate.
_LONGEST = 3.0


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


@dataclass(frozen=True)
class Pace:
    """How far a step goes.

    Attributes:
        rate: Of latents, in codes.
        scale_rate: Of scales, as a fraction of each.
        momentum: Share of the direction that is kept from step to step.
    """

    rate: float
    scale_rate: float
    momentum: float


class LearnedWeight:
    """The latents and factors of one weight; `value` is what stands in the place of the weight in the graph.

    A *lean* one keeps Adafactor's magnitudes (Shazeer and Stern 2018, arXiv:1804.04235: one for each row and column)
    and the running mean in bfloat16: half of the memory, for whole models.
    """

    def __init__(self, start: Start, *, lean: bool = False, dtype: torch.dtype = torch.float32) -> None:
        """Begin at the codes of `start`; `dtype` is that of `open`."""
        self.name, self.spec, self.layout = start.name, start.spec, start.layout
        self._first, self._shape = start.grid, start.weight.shape
        self._zero = torch.from_numpy(start.grid.zero_point)[..., None]  # [N, G, 1]
        self._factor = torch.ones(start.grid.scale.shape)
        centre = self._grouped(torch.from_numpy(start.codes.astype(np.float32))) - self._zero
        self._latent = self._grouped(torch.from_numpy(start.weight)) / torch.from_numpy(start.grid.scale)[..., None]
        torch.maximum(self._latent, centre - _EDGE, out=self._latent)
        torch.minimum(self._latent, centre + _EDGE, out=self._latent)
        self._dtype = dtype
        self._directions = (_Factored() if lean else Adam(), Adam())
        self._tensor: Tensor | None = None

    @property
    def grid(self) -> Grid:
        """Scales and zero points ``[N, G]``, as they will be stored."""
        return Grid(stored_scale(self._first.scale * self._factor.numpy(), self.spec), self._first.zero_point)

    @property
    def codes(self) -> np.ndarray:
        """Codes uint8 ``[N, K]``."""
        return np.asarray(self._flat(self._latent.round().add_(self._zero)).numpy(), np.uint8)

    def value(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dequantized weight in the shape that the graph stores."""
        values = torch.empty(self._latent.shape, dtype=dtype)
        torch.mul(self._latent.round(), torch.from_numpy(self.grid.scale)[..., None], out=values)
        flat = self._flat(values)
        stored = flat.T if self.layout in ("KN", "1KN") else flat
        return stored.reshape(stored_shape(self.layout, *self._shape))

    def open(self) -> Tensor:
        """The same, to gather gradients until `step`."""
        self._tensor = self.value(self._dtype).requires_grad_()
        return self._tensor

    def step(self, pace: Pace) -> None:
        """Move against the gradient."""
        tensor, self._tensor = self._tensor, None
        if tensor is None or tensor.grad is None:
            return
        slope = self._stored(tensor.grad)
        groups = self._by_head((slope * self._stored(tensor.detach())).sum(-1, dtype=torch.float32))
        slope = slope * torch.from_numpy(self.grid.scale)[..., None]
        latent, factor = self._directions
        self._latent.sub_(latent(slope, pace.momentum), alpha=pace.rate)
        first, last = self.spec.limits
        self._latent.clamp_(first - self._zero - _PAST, last - self._zero + _PAST)
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

    def _stored(self, tensor: Tensor) -> Tensor:
        """A tensor in the shape that the graph stores -> [N, G, g]."""
        rows, columns = self._shape
        transposed = self.layout in ("KN", "1KN")
        return self._grouped(tensor.reshape(columns, rows).T if transposed else tensor.reshape(rows, columns))

    def _grouped(self, matrix: Tensor) -> Tensor:
        """[N, K] -> [N, G, g]."""
        size = self.spec.group_size
        padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % size))
        return padded.reshape(len(matrix), -1, size)

    def _flat(self, grouped: Tensor) -> Tensor:
        """[N, G, g] -> [N, K]."""
        return grouped.reshape(len(grouped), -1)[:, : self._shape[1]]

    def _by_head(self, groups: Tensor) -> Tensor:
        """Sums over the rows of a head, which share their scales: [N, G]."""
        heads = self.spec.head_size or 1
        return groups.reshape(-1, heads, groups.shape[1]).sum(1).repeat_interleave(heads, 0)


class _Direction:
    """Which way to go, from slopes one after the other; its attributes are tensors and counts."""

    def state(self) -> dict[str, np.ndarray]:
        """All attributes; numpy has no bfloat16, whose bits are stored."""
        found = {}
        for name, value in vars(self).items():
            bits = isinstance(value, Tensor) and value.dtype == torch.bfloat16
            found[name] = np.asarray(value.view(torch.int16) if bits else value)
        return found

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """The reverse of `state`."""
        for name, array in state.items():
            if isinstance(getattr(self, name), Tensor):
                tensor = torch.from_numpy(array.copy())
                setattr(self, name, tensor.view(torch.bfloat16) if array.dtype == np.int16 else tensor)
            else:
                setattr(self, name, array.item())


class Adam(_Direction):
    """A slope's running mean over its running magnitude: about 1 where all batches agree."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._mean = self._square = torch.zeros(())
        self._count = 0

    def __call__(self, slope: Tensor, momentum: float) -> Tensor:
        """The direction."""
        if not self._count:
            self._mean, self._square = torch.zeros_like(slope), torch.zeros_like(slope)
        self._count += 1
        self._mean.mul_(momentum).add_(slope, alpha=1 - momentum)
        self._square.mul_(_MAGNITUDE).addcmul_(slope, slope, value=1 - _MAGNITUDE)
        size = (self._square / (1 - _MAGNITUDE**self._count)).sqrt_().add_(_TINY)
        return (self._mean / (1 - momentum**self._count)).div_(size)


class _Factored(_Direction):
    """A slope [N, G, g] over its running magnitude, which is held as a factor for each row and each column."""

    def __init__(self) -> None:
        self._mean = self._rows = self._columns = torch.zeros(())
        self._count = 0

    def __call__(self, slope: Tensor, momentum: float) -> Tensor:
        """The direction, in the place of the slope."""
        if not self._count:
            self._mean = torch.zeros_like(slope, dtype=torch.bfloat16)
        rows, columns = torch.linalg.vector_norm(slope, dim=(1, 2)), torch.linalg.vector_norm(slope, dim=0)
        found = rows.square_() / slope[0].numel(), columns.square_() / len(slope)
        self._rows, self._columns = (
            new if not self._count else old.lerp(new, _NEW)
            for old, new in zip((self._rows, self._columns), found, strict=True)
        )
        self._count += 1
        slope.mul_((self._rows / (self._rows.mean() + _TINY) + _TINY).rsqrt()[:, None, None])
        slope.mul_((self._columns + _TINY).rsqrt()).clamp_(-_LONGEST, _LONGEST)
        self._mean.mul_(momentum).add_(slope, alpha=1 - momentum)
        return torch.div(self._mean, 1 - momentum**self._count, out=slope)
