"""A float vector, such as the gains of a normalization or a bias, that is learned with the quantized weights around it.

Li et al. 2023, "Norm Tweaking", arXiv:2309.02784, learn the gains of normalizations alone. It costs no bytes.
"""

from collections.abc import Sequence

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
        return self._values.numpy()

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


def learnable_vectors(nodes: Sequence[ir.Node]) -> dict[str, ir.Value]:
    """The float32 vectors that only these nodes read, as gains or as biases, by name."""
    inside = set(nodes)
    found: dict[str, ir.Value] = {}
    for node in nodes:
        for value in node.inputs:
            if value is None or value.const_value is None or not value.name or not value.is_initializer():
                continue
            tensor = value.const_value
            learnable = tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) == 1 and tensor.size > 1
            if learnable and all(user.op_type in _READERS and user in inside for user in value.consumers()):
                found[value.name] = value
    return {name: value for name, value in found.items() if np.any(value.const_value.numpy())}  # type: ignore[union-attr]
