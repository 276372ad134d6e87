"""Multiplying constants of a model by factors, in place and without touching what else reads them."""

import logging
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.errors import NumericsError
from qcompiler.graph import PASS_KEY, Site, constant_array, unique_name
from qcompiler.quantized import from_stored, to_stored

__all__ = ["ScaledTensor", "own_constant", "own_weight", "scaled_constant", "scaled_weight"]

logger = logging.getLogger(__name__)


class ScaledTensor(ir.LazyTensor):
    """A stored weight whose rows and columns are multiplied by factors each time it is read.

    The weight stays where it is (on disk, most often), and however many factors it meets, it is rounded to its dtype
    once.
    """

    __slots__ = ("_base", "_columns", "_layout", "_rows")

    def __init__(self, base: ir.TensorProtocol, layout: str, rows: np.ndarray, columns: np.ndarray) -> None:
        """Scale `base`, stored as `layout` says (see `graph.Site`), by float32 `rows` [N] and `columns` [K]."""
        self._base, self._layout, self._rows, self._columns = base, layout, rows, columns
        shape = ir.Shape([int(size) for size in base.shape.numpy()])
        super().__init__(self._evaluate, base.dtype, shape, name=base.name)

    def scaled(self, rows: np.ndarray, columns: np.ndarray, layout: str) -> "ScaledTensor":
        """The weight with further factors."""
        if layout != self._layout:
            return ScaledTensor(self, layout, rows, columns)
        return ScaledTensor(self._base, layout, self._rows * rows, self._columns * columns)

    def _evaluate(self) -> ir.TensorProtocol:
        weight = from_stored(self._base.numpy(), self._layout).astype(np.float32)  # [N, K]
        weight *= self._rows[:, None]
        weight *= self._columns
        stored = to_stored(weight, self._layout)
        return ir.Tensor(np.ascontiguousarray(stored, dtype=self.dtype.numpy()), name=self.name)


def scaled_weight(site: Site, rows: np.ndarray | None = None, columns: np.ndarray | None = None) -> ScaledTensor:
    """The site's weight with its rows [N] and columns [K] multiplied by float32 factors.

    Raises:
        NumericsError: A product leaves the range of the weight's dtype.
    """
    tensor = site.weight.const_value
    assert tensor is not None
    rows = np.ones(site.rows, np.float32) if rows is None else rows.astype(np.float32)
    columns = np.ones(site.columns, np.float32) if columns is None else columns.astype(np.float32)
    if isinstance(tensor, ScaledTensor):
        result = tensor.scaled(rows, columns, site.layout)
    else:
        result = ScaledTensor(tensor, site.layout, rows, columns)
    # Factors are moderate: only the narrow range of float16 is worth reading the weight for.
    if tensor.dtype == ir.DataType.FLOAT16:
        with np.errstate(over="ignore"):
            _check_finite(result.numpy(), site.name)
    return result


def scaled_constant(value: ir.Value, factors: np.ndarray) -> ir.TensorProtocol:
    """A constant multiplied by factors that broadcast against it; may have more elements than before.

    Raises:
        NumericsError: A product leaves the range of the constant's dtype.
    """
    stored = constant_array(value)
    with np.errstate(over="ignore"):
        result = (stored.astype(np.float32) * factors.astype(np.float32)).astype(stored.dtype)
    _check_finite(result, value.name or "")
    return ir.Tensor(np.ascontiguousarray(result), name=value.name)


def _check_finite(array: np.ndarray, name: str) -> None:
    if not np.isfinite(array.astype(np.float32)).all():
        raise NumericsError(
            f"'{name}' leaves the range of {array.dtype} when it is rescaled; leave the site out (--ignore), or "
            "convert the model to float32"
        )


def own_constant(node: ir.Node, index: int) -> ir.Value:
    """The initializer that `node` reads as input `index`, which no one else reads: a copy where others do."""
    value = node.inputs[index]
    assert value is not None and value.graph is not None
    if list(value.uses()) == [(node, index)] and not value.is_graph_output():
        return value
    copy = _copy(value, node.name or node.op_type)
    node.replace_input_with(index, copy)
    return copy


def own_weight(sites: Sequence[Site]) -> None:
    """Give sites that share a weight and its orientation an initializer that no one else reads."""
    weight = sites[0].weight
    nodes = {site.node for site in sites}
    between = {site.transpose for site in sites if site.transpose is not None}
    direct = nodes if not between else nodes | between
    shared = any(user not in direct for user in weight.consumers()) or weight.is_graph_output()
    for node in between:
        output = node.outputs[0]
        shared |= output.is_graph_output() or any(user not in nodes for user in output.consumers())
    if not shared:
        return
    copy = _copy(weight, sites[0].name)
    for site in sites:
        reader = site.node if site.transpose is None else _own_transpose(site)
        reader.replace_input_with(next(i for i, value in enumerate(reader.inputs) if value is weight), copy)
        site.weight = copy


def _own_transpose(site: Site) -> ir.Node:
    """The site's Transpose, duplicated if other nodes read it too."""
    old = site.transpose
    assert old is not None and old.graph is not None
    result = old.outputs[0]
    if len(result.uses()) == 1 and not result.is_graph_output():
        return old
    output = ir.Value(name=unique_name(old.graph, f"{result.name}_{site.name}"), shape=result.shape, type=result.type)
    node = ir.Node("", "Transpose", [site.weight], list(old.attributes.values()), outputs=[output])
    node.metadata_props[PASS_KEY] = "foldings"
    old.graph.insert_after(old, node)
    site.node.replace_input_with(next(i for i, value in enumerate(site.node.inputs) if value is result), output)
    site.transpose = node
    return node


def _copy(value: ir.Value, reader: str) -> ir.Value:
    """Another initializer with the same data."""
    graph = value.graph
    assert graph is not None
    name = unique_name(graph, f"{value.name}_{reader}")
    copy = ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
    graph.register_initializer(copy)
    logger.debug("'%s' is untied: %s gets a copy", value.name, reader)
    return copy
