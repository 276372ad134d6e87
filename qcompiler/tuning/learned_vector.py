"""A float vector, such as the gains of a normalization or a bias, that is learned with the quantized weights around it.

Li et al. 2023, "Norm Tweaking", arXiv:2309.02784, learn the gains of normalizations alone. It costs no bytes.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qcompiler.tuning.learned_weight import Adam, Pace

__all__ = ["LearnedVector", "learnable_vectors"]

_READERS = {"Add", "LayerNormalization", "Mul", "RMSNormalization", "SimplifiedLayerNormalization"}
_READERS |= {"SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "Sum"}


class LearnedVector:
    """A float32 vector ``[K]`` that moves by fractions of its root mean square; used like a `LearnedWeight`."""

    def __init__(self, name: str, values: np.ndarray) -> None:
        """Begin at `values`."""
        self.name = name
        self._values = torch.from_numpy(values.astype(np.float32))
        self._unit = float(self._values.square().mean().sqrt())
        self._direction = Adam()
        self._tensor: Tensor | None = None

    @property
    def values(self) -> np.ndarray:
        """float32 ``[K]``."""
        return np.asarray(self._values.numpy())

    def value(self) -> Tensor:
        """What stands in the place of the vector in the graph."""
        return self._values

    def open(self) -> Tensor:
        """The same, to gather gradients until `step`."""
        self._tensor = self._values.clone().requires_grad_()
        return self._tensor

    def step(self, pace: Pace) -> None:
        """Move against the gradient, as far as scales do."""
        tensor, self._tensor = self._tensor, None
        if tensor is not None and tensor.grad is not None:
            self._values.sub_(self._direction(tensor.grad, pace.momentum), alpha=pace.scale_rate * self._unit)

    def state(self) -> dict[str, np.ndarray]:
        """All that `step` has changed, in the memory that it changes."""
        return {"values": self._values.numpy(), **self._direction.state()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from what `state` gave."""
        self._values.copy_(torch.from_numpy(np.array(state["values"])))
        self._direction.restore({name: array for name, array in state.items() if name != "values"})


def learnable_vectors(nodes: Sequence[ir.Node]) -> dict[str, np.ndarray]:
    """The float32 vectors that only these nodes read, as gains or as biases, by name."""
    inside = set(nodes)
    found: dict[str, np.ndarray] = {}
    for node in nodes:
        for value in node.inputs:
            if value is None or value.const_value is None or not value.name or not value.is_initializer():
                continue
            tensor = value.const_value
            learnable = tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) == 1 and tensor.size > 1
            if learnable and all(user.op_type in _READERS and user in inside for user in value.consumers()):
                found[value.name] = tensor.numpy()
    return {name: values for name, values in found.items() if values.any()}
