"""The constants of the form QDQ: codes, scales and zero points as DequantizeLinear reads them.

Codes are turned and packed when the model is written, so that memory never holds them twice.
"""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from qcompiler.graph import Site, unique_name
from qcompiler.lowering import add_constant
from qcompiler.numerics.packing import integer_codes, pack_codes, pack_matmul_nbits, transpose_packed
from qcompiler.quantized import QuantizedTensor

__all__ = [
    "Constants",
    "channel_constants",
    "code_dtype",
    "column_constants",
    "graph_of",
    "group_count",
    "row_constants",
]

# Codes, scales and, where the format has them, zero points.
Constants = tuple[ir.Value, ...]


def graph_of(site: Site) -> ir.Graph:
    """The graph of a site's node."""
    graph = site.node.graph
    assert isinstance(graph, ir.Graph)
    return graph


def code_dtype(tensor: QuantizedTensor, width: int) -> ir.DataType:
    """The type of codes that are stored in `width` bits."""
    if tensor.spec.fp8:
        return ir.DataType.FLOAT8E4M3FN
    return ir.DataType[f"{'' if tensor.spec.symmetric else 'U'}INT{width}"]


def group_count(tensor: QuantizedTensor) -> int:
    """Scales in a row."""
    return int(tensor.scale.shape[1])


def row_constants(site: Site) -> Constants:
    """Constants of a lookup table, where its weight is.

    Codes [N, G, group size], scales and zero points [N, G, 1]; for G = 1 codes [N, K], scales and zero points [N, 1].
    """
    tensor, graph, name = site.quantized, site.weight.graph, site.weight.name
    assert tensor is not None and graph is not None
    spec, columns = tensor.spec, tensor.columns
    blocks = group_count(tensor) > 1
    shape = (tensor.rows, group_count(tensor), spec.group_size) if blocks else (tensor.rows, columns)

    def codes() -> np.ndarray:
        size = spec.group_size if blocks else columns
        padded = pack_matmul_nbits(tensor.packed, spec.bits, columns, size, spec.format.mid)
        return integer_codes(padded, spec.bits, signed=spec.symmetric, width=spec.bits)

    def one_a_group(array: np.ndarray) -> np.ndarray:
        return array[:, :, None] if blocks else array

    made = [
        _add_lazily(graph, f"{name}_table", code_dtype(tensor, spec.bits), shape, codes),
        add_constant(graph, f"{name}_table_scales", one_a_group(tensor.scale)),
    ]
    if tensor.zero_point is not None:
        made.append(add_constant(graph, f"{name}_table_zero_points", one_a_group(tensor.zero_point)))
    return tuple(made)


def channel_constants(site: Site, tensor: QuantizedTensor) -> list[ir.Value]:
    """Constants of a convolution: codes in the weight's shape, scales [N]."""
    name, bits, width = site.weight.name, tensor.spec.bits, tensor.spec.format.container
    shape = tuple(int(size) for size in tensor.shape.numpy())

    def codes() -> np.ndarray:
        found = integer_codes(tensor.codes(), bits, signed=tensor.signed, width=width)
        return pack_codes(found.reshape(-1), width)

    scale = add_constant(graph_of(site), f"{name}_scales", tensor.scale[:, 0])
    return [_add_lazily(graph_of(site), f"{name}_codes", code_dtype(tensor, width), shape, codes), scale]


def column_constants(site: Site, tensor: QuantizedTensor, width: int, *, integers: bool) -> list[ir.Value]:
    """Constants of a linear site: codes [K, N], scales and zero points [G, N], or [N] for G = 1, where its node is."""
    graph, name, bits, signed = graph_of(site), site.weight.name, tensor.spec.bits, tensor.signed
    scale = tensor.scale.T if group_count(tensor) > 1 else tensor.scale[:, 0]

    def codes() -> np.ndarray:
        return transpose_packed(tensor.packed, bits, tensor.columns, signed=signed, width=width)

    made = [
        _add_lazily(graph, f"{name}_codes", code_dtype(tensor, width), (tensor.columns, tensor.rows), codes),
        add_constant(graph, f"{name}_scales", scale),
    ]
    if integers:
        made.append(add_constant(graph, f"{name}_zero_points", np.zeros(tensor.rows, np.int8)))
    elif tensor.zero_point is not None:
        packed = pack_codes(np.ascontiguousarray(tensor.zero_point.T).reshape(-1), width)
        made.append(_add_lazily(graph, f"{name}_zero_points", code_dtype(tensor, width), scale.shape, lambda: packed))
    return made


def _add_lazily(
    graph: ir.Graph, name: str, dtype: ir.DataType, shape: tuple[int, ...], data: Callable[[], np.ndarray]
) -> ir.Value:
    """Register an initializer whose bytes, uint8 and packed, are made by `data` when they are asked for."""

    def evaluate() -> ir.TensorProtocol:
        if dtype.bitwidth < 8:
            return ir.PackedTensor(data(), dtype, shape=shape)
        return ir.Tensor(data().view(dtype.numpy()).reshape(shape))

    tensor = ir.LazyTensor(evaluate, dtype, ir.Shape(shape), name=unique_name(graph, name))
    value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
