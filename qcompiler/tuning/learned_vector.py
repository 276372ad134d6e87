"""A float vector, such as the gains of a normalization or a bias, that is learned with the quantized weights around it.

Li et al. 2023, "Norm Tweaking", arXiv:2309.02784, learn the gains of normalizations alone. It costs no bytes.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qcompiler.tuning.directions import Adam, Direction
from qcompiler.tuning.learned import Learned, Parameter

__all__ = ["LearnedVector", "put_back_vectors", "vector_arrays", "vectors_apart"]

_KEY = "vector "

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
        return np.asarray(self.parameters["values"].tensor.cpu().numpy())

    def form(self, parameters: Mapping[str, Tensor], *, training: bool) -> Tensor:
        """What stands in the place of the vector in the graph."""
        del training
        return parameters["values"]


def _learnable_vectors(nodes: Sequence[ir.Node], *, biases: bool = False) -> dict[str, np.ndarray]:
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


def vectors_apart(parts: Sequence[Sequence[ir.Node]], *, biases: bool = False) -> list[dict[str, np.ndarray]]:
    """For each part of a model the vectors that it alone reads, as gains or as biases, or as biases alone, by name."""
    found = [_learnable_vectors(nodes, biases=biases) for nodes in parts]
    count = Counter(name for names in found for name in names)
    return [{name: values for name, values in each.items() if count[name] == 1} for each in found]


def vector_arrays(vectors: Iterable[Learned]) -> dict[str, np.ndarray]:
    """What was learned of initializers, for a checkpoint and for `put_back_vectors`."""
    return {_KEY + each.name: np.asarray(each.value().cpu().numpy()) for each in vectors}


def put_back_vectors(model: ir.Model, arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Give the model the initializers of `vector_arrays`; returns their names."""
    names = [key.removeprefix(_KEY) for key in arrays if key.startswith(_KEY)]
    for name in names:
        model.graph.initializers[name].const_value = ir.tensor(np.array(arrays[_KEY + name]), name=name)
    return names
