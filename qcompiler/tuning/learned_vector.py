"""A float vector, such as the gains of a normalization or a bias, that is learned with the quantized weights around it.

Li et al. 2023, "Norm Tweaking", arXiv:2309.02784, learn the gains of normalizations alone. It costs no bytes.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qcompiler.tuning.directions import Adam, Direction
from qcompiler.tuning.learned import Learned, Parameter

__all__ = ["LearnedVector", "learnable_vectors"]

_READERS = {"Add", "LayerNormalization", "Mul", "RMSNormalization", "SimplifiedLayerNormalization"}
_READERS |= {"SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "Sum"}


class LearnedVector(Learned):
    """A float32 tensor, a vector for the most part, that moves by fractions of its root mean square, or of a unit."""

    def __init__(
        self, name: str, values: np.ndarray, direction: Callable[[], Direction] = Adam, unit: float = 0.0
    ) -> None:
        """Begin at `values`."""
        tensor = torch.from_numpy(np.array(values, np.float32))
        unit = unit or float(tensor.square().mean().sqrt()) or 1.0
        super().__init__(name, {"values": Parameter(tensor, unit, kind="vector")}, direction)

    @property
    def values(self) -> np.ndarray:
        """float32."""
        return np.asarray(self.parameters["values"].tensor.numpy())

    def form(self, parameters: Mapping[str, Tensor], *, training: bool) -> Tensor:
        """What stands in the place of the vector in the graph."""
        del training
        return parameters["values"]


def learnable_vectors(nodes: Sequence[ir.Node], *, biases: bool = False) -> dict[str, np.ndarray]:
    """The float32 vectors that only these nodes read, as gains or as biases, or as biases alone, by name."""
    inside = set(nodes)
    found: dict[str, np.ndarray] = {}
    for node in nodes:
        for value in node.inputs:
            if value is None or value.const_value is None or not value.name or not value.is_initializer():
                continue
            tensor = value.const_value
            learnable = tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) == 1 and tensor.size > 1
            uses = [(use.node, use.idx) for use in value.uses()]
            if learnable and all(user in inside and _learns(user, index, biases=biases) for user, index in uses):
                found[value.name] = tensor.numpy()
    return {name: values for name, values in found.items() if values.any()}


def _learns(node: ir.Node, index: int, *, biases: bool) -> bool:
    """Whether a node reads a vector as a gain or a bias."""
    op_type = node.op_type
    if op_type in ("Conv", "ConvTranspose", "Gemm", "LayerNormalization") and index == 2:
        return True
    return op_type in ("Add", "Sum") if biases else op_type in _READERS
