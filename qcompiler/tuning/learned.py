"""A tensor of the graph as a function of what is learned: the form that every training method takes in the descent.

Descent sees leaves: `open` gives the tensor that stands in the graph, whose gradient backward leaves there, and `step`
sends it on through the function to the parameters. So nothing of the function is remembered in between, and a model's
weights need no more memory than their parameters and what the directions keep.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from qcompiler.tuning.directions import Direction, Pace

__all__ = ["Learned", "Parameter"]


@dataclass
class Parameter:
    """What is learned.

    Attributes:
        tensor: float32, changed in place.
        unit: What a direction of 1 is worth: the step between two codes for weights, the first value for scales.
        kind: Which rate it moves at: weight, scale or vector; weights alone decay.
    """

    tensor: Tensor
    unit: Tensor | float
    kind: str = "weight"


class Learned(ABC):
    """A value of the graph that follows from parameters.

    Attributes:
        name: Of the value that it stands for.
        parameters: By name.
        steps: How often they were moved.
        differs: Whether the value in training may be another than what would be stored.
    """

    differs: ClassVar[bool] = True

    def __init__(
        self,
        name: str,
        parameters: Mapping[str, Parameter],
        direction: Callable[[], Direction],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Begin with the parameters; `direction` makes one for each, `dtype` is that of `open`."""
        self.name, self.parameters = name, dict(parameters)
        self._directions = {key: direction() for key in parameters}
        self._dtype = dtype
        self._tensor: Tensor | None = None
        self.steps = 0

    @abstractmethod
    def form(self, parameters: Mapping[str, Tensor], *, training: bool) -> Tensor:
        """The value, differentiable in the parameters; in training it may be drawn at random."""

    def settle(self) -> None:  # noqa: B027  (most parameters are free)
        """Keep parameters within their bounds, in place."""

    def value(self) -> Tensor:
        """What will be stored."""
        with torch.no_grad():
            return self.form(self._tensors(), training=False)

    def open(self) -> Tensor:
        """The value in training, to gather gradients until `step`."""
        with torch.no_grad():
            made = self.form(self._tensors(), training=self.differs)
        self._tensor = made.to(self._dtype).detach().requires_grad_()
        return self._tensor

    def step(self, pace: Pace) -> None:
        """Move against the gradient."""
        opened, self._tensor = self._tensor, None
        if opened is None or opened.grad is None:
            return
        slopes = self.slopes(opened.grad.float())
        for key, each in self.parameters.items():
            slope = slopes.get(key)
            if slope is None:
                continue
            if each.kind == "weight" and pace.decay:
                each.tensor.mul_(1 - pace.decay)
            direction = self._directions[key](slope, pace.momentum)
            each.tensor.sub_(direction * each.unit if pace.units else direction, alpha=pace.of(each.kind))
        self.steps += 1
        self.settle()

    def slopes(self, slope: Tensor) -> Mapping[str, Tensor | None]:
        """Those of the parameters, which descent may write over, from that of the value."""
        leaves = {key: tensor.detach().requires_grad_() for key, tensor in self._tensors().items()}
        with torch.enable_grad():
            self.form(leaves, training=True).backward(slope)
        return {key: leaf.grad for key, leaf in leaves.items()}

    def to(self, device: torch.device) -> None:
        """Have everything on a device from now on; before the first step."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        for each in self.parameters.values():
            each.tensor = each.tensor.to(device)
            each.unit = each.unit.to(device) if isinstance(each.unit, Tensor) else each.unit

    def state(self) -> dict[str, np.ndarray]:
        """All that `step` has changed, on the CPU in the memory that it changes."""
        found = {key: each.tensor.cpu().numpy() for key, each in self.parameters.items()}
        for key, direction in self._directions.items():
            found.update({f"{key}.{name}": array for name, array in direction.state().items()})
        return {**found, "steps": np.array(self.steps)}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from what `state` gave."""
        for key, each in self.parameters.items():
            each.tensor.copy_(torch.from_numpy(np.array(state[key])))
            kept = {name.removeprefix(f"{key}."): array for name, array in state.items() if name.startswith(f"{key}.")}
            self._directions[key].restore(kept, each.tensor.device)
        self.steps = int(state["steps"])

    def _tensors(self) -> dict[str, Tensor]:
        return {key: each.tensor for key, each in self.parameters.items()}
