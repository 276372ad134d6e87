"""Which way to go: what descent makes of slopes that come one after the other, and how far it goes.

A direction is about 1 where all batches agree, and little where they do not, so that rates are distances: of a latent
in codes, of a scale in parts of itself. `Momentum` alone gives slopes as they are.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qcompiler.torch_graph.devices import CPU

__all__ = ["Adam", "Direction", "Factored", "Momentum", "Pace"]

# Share of the running magnitude of a slope that is kept from step to step.
_MAGNITUDE = 0.99
_TINY = 1e-30
# Share of the newest slope in a magnitude that is held by rows and columns.
_NEW = 0.1
# No latent moves further in one step than this many times the rate.
_LONGEST = 3.0


@dataclass(frozen=True)
class Pace:
    """How far a step goes.

    Attributes:
        rate: Of latents, in codes.
        scale_rate: Of scales, as a fraction of each.
        momentum: Share of the direction that is kept from step to step.
        decay: Share of each latent that a step takes off.
        units: Whether rates are distances in units of what moves; else they are factors of slopes.
        vector_rate: Of float vectors, as a fraction of each; None: as scales.
    """

    rate: float
    scale_rate: float
    momentum: float
    decay: float = 0.0
    units: bool = True
    vector_rate: float | None = None

    def of(self, kind: str) -> float:
        """The rate of a kind of parameter: weight, scale or vector."""
        if kind == "weight":
            return self.rate
        return self.scale_rate if kind == "scale" or self.vector_rate is None else self.vector_rate


class Direction(ABC):
    """Which way to go, from slopes one after the other; its attributes are tensors and counts."""

    @abstractmethod
    def __call__(self, slope: Tensor, momentum: float) -> Tensor:
        """The direction; the slope may be written over."""

    def state(self) -> dict[str, np.ndarray]:
        """All attributes; numpy has no bfloat16, whose bits are stored."""
        found = {}
        for name, value in vars(self).items():
            bits = isinstance(value, Tensor) and value.dtype == torch.bfloat16
            held = value.cpu() if isinstance(value, Tensor) else value
            found[name] = np.asarray(held.view(torch.int16) if bits else held)
        return found

    def restore(self, state: Mapping[str, np.ndarray], device: torch.device = CPU) -> None:
        """The reverse of `state`; the device is that of slopes."""
        for name, array in state.items():
            if isinstance(getattr(self, name), Tensor):
                tensor = torch.from_numpy(array.copy())
                tensor = tensor.view(torch.bfloat16) if array.dtype == np.int16 else tensor
                setattr(self, name, tensor.to(device))
            else:
                setattr(self, name, array.item())


class Adam(Direction):
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


class Factored(Direction):
    """A slope [N, G, g] over its running magnitude, which is held as a factor for each row and each column."""

    def __init__(self) -> None:
        """Begin with nothing."""
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


class Momentum(Direction):
    """The running sum of slopes, as stochastic gradient descent with momentum goes."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._sum = torch.zeros(())

    def __call__(self, slope: Tensor, momentum: float) -> Tensor:
        """The direction."""
        self._sum = slope.clone() if self._sum.shape != slope.shape else self._sum.mul_(momentum).add_(slope)
        return self._sum
