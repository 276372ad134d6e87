"""Thin helpers over onnx_ir: what a site is, and how its weight is read and replaced.

Inside the compiler a weight is always float32 ``[N, K]``: a row is an output channel (or a row of a lookup table),
groups run along K. `read_weight` and `write_weight` are the only places where the orientation that the model stores is
converted.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompiler.numerics.affine import WeightSpec
from qcompiler.quantized import QuantizedTensor, from_stored

__all__ = [
    "EXTERNAL_BYTES",
    "PASS_KEY",
    "SCHEME_KEY",
    "SITE_KEY",
    "SPARSE_KEY",
    "Refusal",
    "Site",
    "collect_names",
    "constant_array",
    "constant_scalar",
    "input_feature_axis",
    "original_weight",
    "read_weight",
    "unique_name",
    "walk",
    "weight_error",
    "write_weight",
]

# What passes note on nodes: the scheme and the name of a site while they are at work, and the pass that made the node.
SCHEME_KEY = "qcompiler.scheme"
SPARSE_KEY = "qcompiler.sparse"
SITE_KEY = "qcompiler.site"
PASS_KEY = "qcompiler.pass"
_NAMES_KEY = "qcompiler.names"
# Above this much weight data a model gets a file of external data, where several tensors can be the same bytes.
EXTERNAL_BYTES = 64 << 20


@dataclass(eq=False)
class Site:
    """One use of a constant weight that can be quantized.

    Attributes:
        name: What reports print: the exporter's module path, else the node's or the weight's name.
        node: The MatMul, Gemm, Conv or Gather.
        weight: The initializer.
        layout: How the model stores it: ``NK``, ``KN``, ``1KN``, or ``N:C,h,w`` for the [N, C, h, w] of a convolution,
            whose K is C * h * w.
        rows: N.
        columns: K.
        role: ``linear``, ``conv``, ``embedding`` or ``lm_head``.
        transpose: The Transpose between weight and node, if there is one.
        nested: Name of the control-flow node whose body holds the site, or empty.
        names: Every name that patterns may use.
        not_linear: Why it is no linear layer, so that weight-only kernels cannot run it; empty if it is one.
    """

    name: str
    node: ir.Node
    weight: ir.Value
    layout: str
    rows: int
    columns: int
    role: str = "linear"
    transpose: ir.Node | None = None
    nested: str = ""
    names: tuple[str, ...] = field(default=())
    not_linear: str = ""

    @property
    def input(self) -> ir.Value:
        """The activation (for an embedding: the indices)."""
        value = self.node.inputs[1 if self.node.op_type == "Gather" else 0]
        assert value is not None
        return value

    @property
    def dtype(self) -> ir.DataType:
        """Dtype of the weight, and so of the activation."""
        tensor = self.weight.const_value
        assert tensor is not None
        return tensor.dtype

    @property
    def scale_dtype(self) -> str:
        """Numpy name of the dtype in which scales are stored: the activation's."""
        return {ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}.get(self.dtype, "float32")

    @property
    def quantized(self) -> QuantizedTensor | None:
        """The quantized weight once a pass has written one."""
        tensor = self.weight.const_value
        return tensor if isinstance(tensor, QuantizedTensor) else None


@dataclass(frozen=True)
class Refusal:
    """A constant weight that looks like a site and is none."""

    name: str
    reason: str
    names: tuple[str, ...]


def constant_array(value: ir.Value) -> np.ndarray:
    """The constant's array as stored; what lies on disk is mapped, not read (see `files.mapped_tensor`)."""
    assert value.const_value is not None
    return np.asarray(value.const_value.numpy())


def constant_scalar(value: ir.Value | None, other: ir.Value | None = None) -> float | None:
    """The one value of a floating-point initializer that leaves the shape of `other` alone; None if it is none."""
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    tensor = value.const_value
    if tensor.size != 1 or not tensor.dtype.is_floating_point():
        return None
    rank = tensor.shape.rank()
    known = other.shape if other is not None else None
    if rank > (1 if known is None else known.rank()):
        return None
    return float(np.asarray(tensor.numpy()).reshape(()))


def read_weight(site: Site) -> np.ndarray:
    """The site's weight as a C-contiguous float32 ``[N, K]``, dequantized if it is quantized already."""
    if site.quantized is not None:
        return site.quantized.dequantized()
    stored = from_stored(constant_array(site.weight), site.layout)
    return np.ascontiguousarray(stored, dtype=np.float32)


def original_weight(site: Site) -> np.ndarray:
    """The float32 ``[N, K]`` that a quantized site's weight was before; only where ``meta["original"]`` is kept."""
    assert site.quantized is not None
    original = np.asarray(site.quantized.meta["original"].numpy())
    return np.ascontiguousarray(from_stored(original, site.layout), np.float32)


def weight_error(site: Site) -> np.ndarray:
    """What is lost of a quantized site's weight: W - Q, less what factors beside its node give back; ``[N, K]``.

    Low-rank factors (B, A) of a site lie in its weight's ``meta["factors"]``, by node: sites that share a weight do not
    share its error.
    """
    assert site.quantized is not None
    error = original_weight(site) - read_weight(site)
    factors = site.quantized.meta.get("factors", {}).get(site.node)
    return np.asarray(error if factors is None else error - factors[0] @ factors[1])


def write_weight(
    site: Site, codes: np.ndarray, grid: Any, spec: WeightSpec, pass_name: str, tables: np.ndarray | None = None
) -> QuantizedTensor:
    """Replace the site's weight by codes uint8 ``[N, K]`` on a grid ``[N, G]``; the model stays runnable."""
    tensor = QuantizedTensor(
        codes, grid, spec, layout=site.layout, dtype=site.dtype, name=site.weight.name, tables=tables
    )
    site.weight.const_value = tensor
    site.node.metadata_props[PASS_KEY] = pass_name
    return tensor


def collect_names(graph: ir.Graph) -> None:
    """Note the names of all values and nodes of a graph and its bodies, so that `unique_name` knows them in each."""
    graphs = (graph, *graph.subgraphs())
    taken: set[str | None] = set()
    for part in graphs:
        taken.update(value.name for value in (*part.inputs, *part.initializers.values()))
        for node in part:
            taken.add(node.name)
            taken.update(value.name for value in (*node.inputs, *node.outputs) if value is not None)
    for part in graphs:
        part.meta[_NAMES_KEY] = taken


def unique_name(graph: ir.Graph, base: str) -> str:
    """`base`, or `base` with the lowest number that is free.

    A body may not reuse a name of the graph around it: call `collect_names` (or `find_sites`) on the outermost graph
    first.
    """
    if _NAMES_KEY not in graph.meta:
        collect_names(graph)
    taken = graph.meta[_NAMES_KEY]
    name, number = base, 1
    while name in taken:
        name, number = f"{base}_{number}", number + 1
    taken.add(name)
    return name


def walk(graph: ir.Graph, nested: str = "") -> Iterator[tuple[ir.Node, str]]:
    """Every node, bodies of control flow included, with the name of the outermost control-flow node around it."""
    for node in graph:
        yield node, nested
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from walk(attribute.as_graph(), nested or node.name or node.op_type)
            elif attribute.type == ir.AttributeType.GRAPHS:
                for body in attribute.as_graphs():
                    yield from walk(body, nested or node.name or node.op_type)


def input_feature_axis(site: Site) -> int:
    """The axis of the activation that runs along K: 1 for a convolution, the last one otherwise."""
    return 1 if site.node.op_type == "Conv" else -1
