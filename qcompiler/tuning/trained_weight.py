"""A quantized weight whose float form is trained: what the methods have in common.

Shapes: latents and codes ``[N, G, g]``; scales and zero points ``[N, G, 1]``. Codes are counted from the zero point.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from qcompiler.numerics.affine import Grid, stored_scale
from qcompiler.tuning.directions import Direction, Factored
from qcompiler.tuning.learned import Learned, Parameter
from qcompiler.tuning.learned_weight import EDGE, Start
from qcompiler.tuning.qat import passing

__all__ = ["TrainedWeight"]


class TrainedWeight(Learned):
    """Trains a float32 latent, and what else `extra` names; a method says what the graph gets for it.

    Attributes:
        first: The scale at the start, with its sign.
        low: The lowest code.
        high: The highest code.
    """

    # The parameter that the latent is.
    WEIGHT = "weight"

    def __init__(
        self,
        start: Start,
        direction: Callable[[], Direction],
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        *,
        lean: bool = False,
    ) -> None:
        """Begin at the original weight, as `start` has it quantized; a lean one keeps Adafactor's magnitudes of it."""
        self.start, self._layout = start, start.shapes
        self.first = torch.from_numpy(start.grid.scale.astype(np.float32))[..., None]
        self._zero = torch.from_numpy(start.grid.zero_point.astype(np.float32))[..., None]
        low, high = start.spec.limits
        self.low, self.high = low - self._zero, high - self._zero
        self._seed = seed
        latent = self._layout.grouped(torch.from_numpy(np.array(start.weight, np.float32)))
        parameters = {self.WEIGHT: Parameter(latent, self.first.abs()), **self.extra(latent)}
        super().__init__(start.name, parameters, direction, dtype)
        if lean:
            self._directions[self.WEIGHT] = Factored()

    @property
    def generator(self) -> torch.Generator:
        """Of what is drawn at random: the same in all looks at one step, whether the run was interrupted or not."""
        return torch.Generator().manual_seed(1_000_003 * self._seed + self.steps)

    def extra(self, latent: Tensor) -> dict[str, Parameter]:
        """More that is learned; the latent may be changed to where it should begin."""
        del latent
        return {}

    def begin_at_codes(self, latent: Tensor) -> None:
        """Move the latent, in place, to where it is rounded to the codes that the weight has now.

        An algorithm with an eye to other weights chose them, and they are seldom the nearest. What lies beyond the
        range stays there.
        """
        code = self._layout.grouped(torch.from_numpy(self.start.codes.astype(np.float32))) - self._zero
        least = torch.where(code > self.low, code - EDGE, -math.inf)
        most = torch.where(code < self.high, code + EDGE, math.inf)
        latent.copy_(torch.maximum(torch.minimum(latent / self.first, most), least).mul_(self.first))

    @abstractmethod
    def quantized(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Codes and scales; no gradient is asked for."""

    @abstractmethod
    def trained(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The values of the codes in training, differentiable."""

    def form(self, parameters: Mapping[str, Tensor], *, training: bool) -> Tensor:
        """The weight in the shape that the graph stores."""
        if training:
            return self._layout.to_graph(self.trained(parameters))
        codes, scale = self.quantized(parameters)
        return self._layout.to_graph(codes * self.stored(scale))

    def stored(self, scale: Tensor) -> Tensor:
        """A scale as it will be stored; its gradient passes unchanged."""
        exact = scale.detach().expand_as(self.first).squeeze(-1)
        rounded = torch.from_numpy(stored_scale(exact.cpu().numpy(), self.start.spec))
        return passing(rounded.to(exact.device)[..., None], scale)

    @property
    def codes(self) -> np.ndarray:
        """Codes uint8 ``[N, K]``, as they will be stored."""
        with torch.no_grad():
            codes, _ = self.quantized(self._tensors())
        return np.asarray(self._layout.flat(codes + self._zero).cpu().numpy(), np.uint8)

    @property
    def grid(self) -> Grid:
        """Scales and zero points ``[N, G]``, as they will be stored."""
        with torch.no_grad():
            scale = self.stored(self.quantized(self._tensors())[1])
        return Grid(scale.squeeze(-1).cpu().numpy(), self.start.grid.zero_point)
