"""Which tensors of a float model and of its compiled form are the same, and which nodes lie between them."""

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.graph import Site
from qcompiler.segments import Segment, read_values
from qcompiler.sites import find_sites
from qcompiler.targets import IntegerRules

__all__ = ["Layer", "Tap", "coded_layers", "find_layers", "find_taps"]

_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
_ABSORBED = {"Clip", "Relu"}
_QUANTIZED_OPS = {
    "DynamicQuantizeLinear", "GatherBlockQuantized", "MatMulBnb4", "MatMulNBits", "QuantizeLinear",
}  # fmt: skip
# Results that hold no part of what was read.
_FACTS = {"ArgMax", "ArgMin", "Equal", "Greater", "IsNaN", "Less", "NonZero", "Shape", "Size"}
_RULES = IntegerRules()


@dataclass(frozen=True)
class Tap:
    """Where a tensor of the float model is found in the compiled one.

    Attributes:
        value: What to watch: the value itself, or its codes.
        scale: Of the codes; None where the value itself is watched.
        zero_point: Of the codes, or None.
    """

    value: ir.Value
    scale: ir.Value | None = None
    zero_point: ir.Value | None = None


@dataclass(frozen=True)
class Layer:
    """A node of the float model, and what lies between it and the matched tensors that it depends on.

    Attributes:
        node: The node.
        name: Of the site that it is or that lies there, or of the node.
        operator: Of that site or node.
        output: The matched tensor that the node computes; empty if none is.
        quantized: Whether the compiled model computes the tensor from codes.
        site: Whether the name is that of a site.
        carries_noise: False where the result holds no part of what is read (a shape).
    """

    node: ir.Node
    name: str
    operator: str
    output: str
    quantized: bool
    site: bool
    carries_noise: bool


def find_taps(reference: ir.Model, model: ir.Model) -> dict[str, Tap]:
    """Float tensors (or those whose type is unknown) of the top graphs that both models compute, in graph order."""
    taps = {}
    for node in model.graph:
        for value in node.outputs:
            tap = _tap(value, node) if value.name and _may_be_float(value) else None
            if tap is not None:
                taps[value.name or ""] = tap
    names = [v.name for node in reference.graph for v in node.outputs if v.name and _may_be_float(v)]
    return {name: taps[name] for name in names if name in taps}


def _may_be_float(value: ir.Value) -> bool:
    return value.dtype is None or value.dtype in _FLOATS


def _tap(value: ir.Value, node: ir.Node) -> Tap | None:
    """How to watch a value; None inside of a kernel."""
    if node.op_type == "DequantizeLinear":
        codes = node.inputs[0]
        encoder = codes.producer() if codes is not None else None
        return _codes(encoder) if encoder is not None and encoder.op_type == "QuantizeLinear" else Tap(value)
    if not _is_integer(node):
        return Tap(value)
    encoder = next((user for user, index in value.uses() if user.op_type == "QuantizeLinear" and not index), None)
    return _codes(encoder) if encoder is not None else None


def _codes(encoder: ir.Node) -> Tap | None:
    scale, zero = encoder.inputs[1], encoder.inputs[2] if len(encoder.inputs) > 2 else None
    if scale is None or scale.const_value is None or scale.const_value.size != 1:
        return None
    return Tap(encoder.outputs[0], scale, zero)


def _is_integer(node: ir.Node) -> bool:
    """Whether a node becomes a kernel that reads and writes codes (see `placement`)."""
    first: ir.Node | None = node
    while first is not None and first.op_type in _ABSORBED and first.inputs[0] is not None:
        first = first.inputs[0].producer()
    if first is None or not _RULES.result_is_quantized(first) or not _ends_in_codes(node):
        return False
    indices = _RULES.follows(first) if first.op_type != "Conv" else (0,)
    reads = [v for i, v in enumerate(first.inputs) if v is not None and (not indices or i in indices)]
    makers = [value.producer() for value in reads]
    return bool(makers) and all(maker is not None and maker.op_type == "DequantizeLinear" for maker in makers)


def _ends_in_codes(node: ir.Node) -> bool:
    """Whether a node's result, behind a Relu or Clip, is encoded."""
    while True:
        users = [user for user, _ in node.outputs[0].uses()]
        if any(user.op_type == "QuantizeLinear" for user in users):
            return True
        if len(users) != 1 or users[0].op_type not in _ABSORBED:
            return False
        node = users[0]


def find_layers(
    reference: ir.Model, model: ir.Model, taps: Mapping[str, Tap], measured: set[str], other: set[str]
) -> tuple[list[Layer], int]:
    """The layers of a float model, and how many float tensors it computes.

    Args:
        reference: The float model.
        model: The compiled model.
        taps: From `find_taps`.
        measured: Names of tensors that were compared.
        other: Names of tensors that turned out to be of no floating point, or of another shape.

    Returns:
        A layer for each node of the top graph, in order.
    """
    sites = {site.node: site for site in find_sites(reference)[0]}
    coded = _coded(model, taps, measured)
    pending: dict[str, tuple[ir.Node, ...]] = {}
    layers, tensors = [], 0
    for node in reference.graph:
        nodes: dict[ir.Node, None] = {}
        for value in node.inputs:
            if value is not None and value.name not in measured:
                nodes.update(dict.fromkeys(pending.get(value.name or "", ())))
        nodes[node] = None
        known = next((output.name or "" for output in node.outputs if output.name in measured), "")
        pending.update((output.name or "", tuple(nodes)) for output in node.outputs)
        tensors += sum(bool(v.name) and _may_be_float(v) and v.name not in other for v in node.outputs)
        layers.append(_layer(node, tuple(nodes), known, sites, known in coded))
    return layers, tensors


def coded_layers(reference: ir.Model, model: ir.Model, taps: Mapping[str, Tap]) -> dict[str, Segment]:
    """The float form of each layer that the compiled model computes from codes, by the name of its result.

    A layer takes matched tensors and graph inputs to a matched tensor; what it needs in between is part of it.
    """
    coded = _coded(model, taps, set(taps))
    pending: dict[str, tuple[ir.Node, ...]] = {}
    layers: dict[str, Segment] = {}
    for node in reference.graph:
        nodes: dict[ir.Node, None] = {}
        for value in read_values(node):
            if value.name not in taps:
                nodes.update(dict.fromkeys(pending.get(value.name or "", ())))
        nodes[node] = None
        pending.update((output.name or "", tuple(nodes)) for output in node.outputs)
        names = [output.name or "" for output in node.outputs]
        if any(name in coded for name in names):
            inner = {output.name for member in nodes for output in member.outputs}
            reads = {v.name: None for member in nodes for v in read_values(member) if v.const_value is None}
            inputs = [name for name in reads if name and (name in taps or name not in inner)]
            if not inner.intersection(inputs):
                layers.update((name, Segment([], list(nodes), inputs, [name])) for name in names if name in coded)
    return layers


def _layer(
    node: ir.Node, nodes: tuple[ir.Node, ...], output: str, sites: Mapping[ir.Node, Site], quantized: bool
) -> Layer:
    titled = next((member for member in reversed(nodes) if member in sites), node)
    site = sites.get(titled)
    name = site.name if site is not None else node.name or output or node.op_type
    return Layer(node, name, titled.op_type, output, quantized, site is not None, node.op_type not in _FACTS)


def _coded(model: ir.Model, taps: Mapping[str, Tap], measured: set[str]) -> set[str]:
    """Tensors that the compiled model computes from codes that are made or stored behind the last matched tensor."""
    ends = {taps[name].value: name for name in measured}
    marked: dict[ir.Value, bool] = {}
    found = set()
    for node in model.graph:
        inputs = [value for value in node.inputs if value is not None]
        stored = node.op_type == "DequantizeLinear" and inputs[0].const_value is not None
        coded = stored or node.op_type in _QUANTIZED_OPS
        coded = coded or any(marked.get(value, False) for value in inputs if value not in ends)
        for value in node.outputs:
            marked[value] = coded
            if coded and value in ends:
                found.add(ends[value])
    return found
