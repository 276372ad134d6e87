"""Cutting the graph where weights are read, so that calibration streams through it once, whatever passes run.

The *level* of a node is the number of sites on the longest path that leads to it, the node itself included. All sites
of a level can be quantized at the same moment: what they read is computed by lower levels alone. So the model is run
level by level: the activations that cross from lower levels are kept for all batches (the *boundary*), the sites of
the next level are measured directly on them, quantized, and the nodes of that level are run with the quantized weights
to give the next boundary.

Every site therefore sees what the quantized prefix really produces ("true sequential" in GPTQ's terms), for one
forward pass in all, and nothing is ever measured by running a node twice. Nodes are placed as late as their readers
allow, so that side computations (cross-attention keys, masks) do not sit in the boundary for longer than they have to.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from qcompiler.graph import Site, constant_array
from qcompiler.quantized import QuantizedTensor

__all__ = [
    "Segment",
    "Weights",
    "chain_parts",
    "constants_of",
    "lent",
    "plan_segments",
    "segment_model",
    "segment_parts",
    "whole_model",
]

Weights = dict[ir.Value, ir.TensorProtocol]

# Constants at least this large are fed as inputs: neither copied into the sub-model nor packed by the session.
_FED_BYTES = 1 << 14
# Operators that take a weight as a run-time input as well as they take a constant.
_FEEDABLE = {"MatMul", "Gemm", "Gather", "Transpose", "Conv", "Add", "Mul", "ConvTranspose"}


@dataclass
class Segment:
    """The nodes of one level.

    Attributes:
        sites: What is to be quantized before the nodes run.
        nodes: In topological order.
        inputs: Names of the values it reads from the boundary or the graph's inputs.
        outputs: Names of what it computes that later levels read.
        carried: Names of boundary values that later levels still read.
    """

    sites: list[Site] = field(default_factory=list)
    nodes: list[ir.Node] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    carried: list[str] = field(default_factory=list)


def whole_model(model: ir.Model) -> Segment:
    """All nodes as one segment, which has no sites."""
    inputs = [value.name or "" for value in model.graph.inputs if value.const_value is None]
    outputs = [value.name or "" for value in model.graph.outputs]
    return Segment(nodes=list(model.graph), inputs=inputs, outputs=outputs)


def read_values(node: ir.Node) -> Iterator[ir.Value]:
    """The values a node reads, those that its bodies read from outside included."""
    for value in node.inputs:
        if value is not None:
            yield value
    for attribute in node.attributes.values():
        for body in _bodies(attribute):
            inner: set[ir.Value] = {*body.inputs, *body.initializers.values()}
            for child in body:
                inner.update(child.outputs)
            reads = [value for child in body for value in read_values(child)] + list(body.outputs)
            yield from (value for value in reads if value not in inner)


def _bodies(attribute: ir.Attr) -> Sequence[ir.Graph]:
    """The graphs that an attribute holds."""
    if attribute.type == ir.AttributeType.GRAPH:
        return [attribute.as_graph()]
    return attribute.as_graphs() if attribute.type == ir.AttributeType.GRAPHS else ()


def _levels(model: ir.Model, sites: Sequence[Site]) -> dict[ir.Node, int]:
    """The level of every node that a site depends on, as late as its readers allow, and of the sites themselves."""
    nodes = list(model.graph)
    readers: dict[ir.Value, list[ir.Node]] = {}
    earliest: dict[ir.Node, int] = {}
    site_nodes = {site.node for site in sites}
    for node in nodes:
        before = 0
        for value in read_values(node):
            readers.setdefault(value, []).append(node)
            producer = value.producer()
            before = max(before, earliest[producer] if producer is not None else 0)
        earliest[node] = before + (node in site_nodes)
    at_most = dict.fromkeys(site_nodes, max(earliest[node] for node in site_nodes))
    while True:
        latest = _latest(nodes, readers, at_most)
        # Sites that read the same activation are quantized together, at the first level that suits one of them; what
        # such a site waits for beside its activation (a bias that is computed) holds it back, or has to hurry.
        shared: dict[ir.Value, int] = {}
        for site in sites:
            shared[site.input] = min(shared.get(site.input, latest[site.node]), latest[site.node])
        together = {site.node: max(shared[site.input], earliest[site.node]) for site in sites}
        if all(latest[node] == level for node, level in together.items()):
            return latest
        at_most = together


def _latest(
    nodes: Sequence[ir.Node], readers: dict[ir.Value, list[ir.Node]], at_most: dict[ir.Node, int]
) -> dict[ir.Node, int]:
    """The last level at which each node may run; `at_most` bounds the sites, what no site depends on is left out.

    What a site reads has to be there before its level begins; what is made of constants, as its weight behind a
    Transpose, need not, and would be held for every batch.
    """
    latest: dict[ir.Node, int] = {}
    for node in reversed(nodes):
        users = (user for output in node.outputs for user in readers.get(output, ()) if user in latest)
        constant = all(value is None or value.const_value is not None for value in node.inputs)
        bounds = [latest[user] - (user in at_most and not constant) for user in users]
        if node in at_most:
            bounds.append(at_most[node])
        if bounds:
            latest[node] = min(bounds)
    return latest


def plan_segments(model: ir.Model, sites: Sequence[Site]) -> list[Segment]:
    """Cut the part of the model that `sites` depend on into levels; the first has no sites.

    Args:
        model: In topological order.
        sites: Sites of the top graph.

    Returns:
        One segment a level.
    """
    levels = _levels(model, sites)
    segments = [Segment() for _ in range(max(levels.values()) + 1)]
    for site in sites:
        segments[levels[site.node]].sites.append(site)
    needed: dict[str, int] = {}  # last level that reads a value
    made: dict[str, int] = {value.name or "": -1 for value in model.graph.inputs if value.const_value is None}
    for node in model.graph:
        if node not in levels:
            continue
        level = levels[node]
        segments[level].nodes.append(node)
        made.update((output.name or "", level) for output in node.outputs)
        for value in read_values(node):
            if value.const_value is None and value.name:
                # A site's own activation has to be in the boundary before its level starts; it is, being made below it.
                needed[value.name] = max(needed.get(value.name, -1), level)
    for level, segment in enumerate(segments):
        reads = {v.name: None for node in segment.nodes for v in read_values(node) if v.const_value is None}
        segment.inputs = [name for name in reads if name and made[name] < level]
        inner = {o.name: None for node in segment.nodes for o in node.outputs if o.name}
        segment.outputs = [name for name in inner if name and needed.get(name, -1) > level]
        segment.carried = [name for name, at in made.items() if at < level and needed.get(name, -1) > level]
    return segments


def chain_parts(model: ir.Model, parts: Sequence[Sequence[ir.Node]], wanted: Iterable[str] = ()) -> list[Segment]:
    """Segments of nodes that run one part after the other.

    Args:
        model: In topological order.
        parts: Nodes in that order; what they read is computed by them, or is an input of the model.
        wanted: Names of values that are to be had after the last part.

    Returns:
        One segment a part.
    """
    made = {value.name or "": -1 for value in model.graph.inputs if value.const_value is None}
    segments = [Segment(nodes=list(part)) for part in parts]
    last_read: dict[str, int] = {}
    for index, segment in enumerate(segments):
        made.update((output.name or "", index) for node in segment.nodes for output in node.outputs)
        reads = {v.name: None for node in segment.nodes for v in read_values(node) if v.const_value is None}
        segment.inputs = [name for name in reads if name and made[name] < index]
        last_read.update(dict.fromkeys((name for name in reads if name), index))
    last_read.update(dict.fromkeys(wanted, len(segments)))
    for index, segment in enumerate(segments):
        segment.outputs = [name for name, at in made.items() if at == index and last_read.get(name, -1) > index]
        segment.carried = [name for name, at in made.items() if at < index and last_read.get(name, -1) > index]
    return segments


def segment_model(
    model: ir.Model, segment: Segment, dtypes: dict[str, np.dtype[Any]]
) -> tuple[bytes, dict[str, np.ndarray]]:
    """A segment as a model of its own.

    Args:
        model: The model it is cut from.
        segment: The segment.
        dtypes: numpy dtype of each input.

    Returns:
        The serialized sub-model, and the large constants that it takes as inputs.
    """
    proto, fed = segment_parts(model, segment)
    constants = {value.name or "": _fed_array(value) for value in fed}
    for name, array in constants.items():
        _add_input(proto.graph, name, array.dtype)
    for name in segment.inputs:
        _add_input(proto.graph, name, dtypes[name])
    return proto.SerializeToString(), constants


def segment_parts(model: ir.Model, segment: Segment) -> tuple[onnx.ModelProto, list[ir.Value]]:
    """The segment's nodes, outputs and small constants as a model without inputs, and the constants to feed it."""
    proto = onnx.ModelProto(ir_version=model.ir_version)
    for domain, version in model.opset_imports.items():
        proto.opset_import.add(domain=domain, version=version)
    graph = proto.graph
    graph.name = "segment"
    fed: list[ir.Value] = []
    seen: set[str] = set()
    for node in segment.nodes:
        serialized = _serialized(node)
        del serialized.metadata_props[:]
        graph.node.append(serialized)
        for value in read_values(node):
            if value.const_value is None or not value.name or value.name in seen:
                continue
            seen.add(value.name)
            if _is_fed(value):
                fed.append(value)
            else:
                graph.initializer.append(_small_tensor(value))
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in segment.outputs)
    return proto, fed


def constants_of(nodes: Iterable[ir.Node]) -> Weights:
    """The constants that nodes read, as they are now."""
    values = dict.fromkeys(value for node in nodes for value in read_values(node))
    return {value: value.const_value for value in values if value.const_value is not None}


@contextmanager
def lent(weights: Mapping[ir.Value, ir.TensorProtocol]) -> Iterator[None]:
    """Give constants other values for a while."""
    stored = {value: value.const_value for value in weights}
    try:
        for value, tensor in weights.items():
            value.const_value = tensor
        yield
    finally:
        for value, kept in stored.items():
            value.const_value = kept


def _serialized(node: ir.Node) -> onnx.NodeProto:
    """The node as a message; its bodies hold the values of their initializers, wherever these are stored."""
    inner = [child for attribute in node.attributes.values() for child in _bodies(attribute)]
    graphs = [graph for body in inner for graph in (body, *body.subgraphs())]
    stored = [
        (value, value.const_value)
        for graph in graphs
        for value in graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    ]
    try:
        for value, _ in stored:
            value.const_value = ir.Tensor(np.array(constant_array(value)), name=value.name)
        return ir.serde.serialize_node(node)
    finally:
        for value, tensor in stored:
            value.const_value = tensor


def _is_fed(value: ir.Value) -> bool:
    tensor = value.const_value
    if isinstance(tensor, QuantizedTensor):
        return True
    return tensor is not None and tensor.nbytes >= _FED_BYTES and all(u.op_type in _FEEDABLE for u in value.consumers())


def _fed_array(value: ir.Value) -> np.ndarray:
    return value.const_value.numpy() if isinstance(value.const_value, QuantizedTensor) else constant_array(value)


def _small_tensor(value: ir.Value) -> onnx.TensorProto:
    tensor = value.const_value
    assert tensor is not None
    if isinstance(tensor, ir.StringTensor):
        return ir.serde.serialize_tensor(tensor)
    return onnx.TensorProto(
        name=value.name, data_type=int(tensor.dtype), dims=tensor.shape.numpy(), raw_data=tensor.tobytes()
    )


def _add_input(graph: onnx.GraphProto, name: str, dtype: np.dtype[Any]) -> None:
    kind = int(ir.DataType.from_numpy(dtype))
    graph.input.add(name=name).type.tensor_type.elem_type = kind
