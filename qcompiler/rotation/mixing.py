"""Multiplying the constants of a model by orthogonal matrices, in float64 and rounded once; permuting them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.errors import NumericsError
from qcompiler.foldings.scaling import own_constant, own_weight
from qcompiler.graph import Site, constant_array
from qcompiler.quantized import from_stored, to_stored

__all__ = ["Changes", "Mix", "MixedTensor", "Order", "set_constant"]

# Rows of a weight that are float64 at a time.
_ROWS = 4096


@dataclass(frozen=True, eq=False)
class Mix:
    """An orthogonal matrix for each group of channels.

    Attributes:
        index: int ``[G, D]``, the channels of each group; no channel twice.
        matrices: float64 ``[G, D, D]``.
    """

    index: np.ndarray
    matrices: np.ndarray

    def apply(self, vectors: np.ndarray) -> np.ndarray:
        """Rows float64 ``[.., K]`` times the matrices."""
        mixed: np.ndarray = vectors.copy()
        for index, matrix in zip(self.index, self.matrices, strict=True):
            mixed[..., index] = vectors[..., index] @ matrix
        return mixed


@dataclass(frozen=True, eq=False)
class Order:
    """A permutation of the channels.

    Attributes:
        channels: int ``[K]``, which channel stands at each place.
    """

    channels: np.ndarray

    def apply(self, vectors: np.ndarray) -> np.ndarray:
        """Rows ``[.., K]`` in that order."""
        return vectors[..., self.channels]


@dataclass(frozen=True, eq=False)
class Step:
    """What becomes of a weight [N, K]: its rows are mixed, or its columns multiplied by `gain` [K] and mixed."""

    mix: Mix | Order
    rows: bool
    gain: np.ndarray | None = None

    def apply(self, weight: np.ndarray) -> np.ndarray:
        """The weight, float64 ``[N, K]``."""
        if self.rows:
            return np.asarray(self.mix.apply(weight.T).T)
        return self.mix.apply(weight if self.gain is None else weight * self.gain)


class MixedTensor(ir.LazyTensor):
    """A stored weight whose rows and columns are mixed each time it is read; the weight itself stays where it is."""

    __slots__ = ("_base", "_layout", "_steps")

    def __init__(self, base: ir.TensorProtocol, layout: str, steps: Sequence[Step]) -> None:
        """Change `base`, stored as `layout` says (see `graph.Site`), by the steps in turn."""
        self._base: ir.TensorProtocol = base
        self._layout: str = layout
        self._steps: list[Step] = list(steps)
        shape = ir.Shape([int(size) for size in base.shape.numpy()])
        super().__init__(self._evaluate, base.dtype, shape, name=base.name)

    def _evaluate(self) -> ir.TensorProtocol:
        weight = from_stored(np.asarray(self._base.numpy()), self._layout)  # [N, K]
        result = np.empty(weight.shape, self.dtype.numpy())
        size = len(weight) if any(step.rows for step in self._steps) else _ROWS
        for start in range(0, len(weight), size):
            part = weight[start : start + size].astype(np.float64)
            for step in self._steps:
                part = step.apply(part)
            result[start : start + size] = part
        return ir.Tensor(np.ascontiguousarray(to_stored(result, self._layout)), name=self.name)


class Changes:
    """What is to be done to the weights and constants of a model; nothing is touched before `commit`."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._sites: dict[ir.Node, tuple[Site, list[Step]]] = {}
        self._constants: list[tuple[ir.Node, int, np.ndarray]] = []

    def rows(self, site: Site, mix: Mix | Order) -> None:
        """Let the site write mixed channels."""
        self._sites.setdefault(site.node, (site, []))[1].append(Step(mix, rows=True))

    def columns(self, site: Site, mix: Mix | Order, gain: np.ndarray | None = None) -> None:
        """Let the site read mixed channels, multiplied by `gain` before; a lookup table writes them so."""
        self._sites.setdefault(site.node, (site, []))[1].append(Step(mix, rows=False, gain=gain))

    def constant(self, place: tuple[ir.Node, int], array: np.ndarray) -> None:
        """Let what is read at (node, input) be an array, rounded to the dtype it has."""
        self._constants.append((*place, array))

    def commit(self) -> list[str]:
        """Change the model; returns the names of the sites that got a weight of their own.

        Raises:
            NumericsError: A number leaves the range of its dtype; the model has not changed then.
        """
        groups = self._groups()
        tensors = [
            _checked(MixedTensor(_tensor(sites[0].weight), sites[0].layout, steps), sites[0].name)
            for sites, steps in groups
        ]
        arrays = []
        for node, index, array in self._constants:
            value = node.inputs[index]
            assert value is not None
            arrays.append(_rounded(array, constant_array(value).dtype, value.name or ""))
        for (node, index, _), array in zip(self._constants, arrays, strict=True):
            set_constant(node, index, array)
        untied = []
        for (sites, _), tensor in zip(groups, tensors, strict=True):
            before = sites[0].weight
            own_weight(sites)
            if sites[0].weight is not before:
                untied += [site.name for site in sites]
            _replace(sites[0].weight, tensor)
        return untied

    def _groups(self) -> list[tuple[list[Site], list[Step]]]:
        """Sites that share a weight, its orientation and all that becomes of it."""
        groups: dict[tuple[object, ...], tuple[list[Site], list[Step]]] = {}
        for site, steps in self._sites.values():
            key = (site.weight, site.layout, *((step.mix, step.rows, _bytes(step.gain)) for step in steps))
            groups.setdefault(key, ([], steps))[0].append(site)
        return list(groups.values())


def set_constant(node: ir.Node, index: int, array: np.ndarray) -> None:
    """Let the node, and it alone, read an array."""
    value = own_constant(node, index)
    _replace(value, ir.Tensor(np.ascontiguousarray(array), name=value.name))


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value


def _bytes(gain: np.ndarray | None) -> bytes:
    return b"" if gain is None else gain.tobytes()


def _replace(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    tensor.name = value.name
    value.const_value, value.shape = tensor, tensor.shape  # type: ignore[assignment]


def _checked(tensor: MixedTensor, name: str) -> MixedTensor:
    """The tensor; only the narrow range of float16 is worth reading it for."""
    if tensor.dtype == ir.DataType.FLOAT16:
        with np.errstate(over="ignore"):
            _require_finite(tensor.numpy(), name)
    return tensor


def _rounded(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    _require_finite(result, name)
    return result


def _require_finite(array: np.ndarray, name: str) -> None:
    if not np.isfinite(array.astype(np.float32)).all():
        raise NumericsError(
            f"'{name}' leaves the range of {array.dtype} when it is rotated; leave rotate out, or convert the model to "
            "float32"
        )
