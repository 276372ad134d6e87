"""Attention heads as units of mixed precision: projections cut into a layer for each head, and joined again.

The layers that compute queries, keys and values have the rows of one head after the other. Cut, each head is a layer of
its own, behind which a Concat puts all together, so that it can be measured and get a format like any other. Once
formats are chosen, neighbours of one format become one layer again, and a projection of one format is what it was.

Left whole: the projection behind the attention, since its columns that belong to a head would be a product of their own
that is added to the others; and what is no plain MatMul or Gemm.

Shapes: W ``[N, K]``; a head has D of the N rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import onnx_ir as ir

from qcompiler.foldings import find_foldings
from qcompiler.foldings.shapes import BlockedError
from qcompiler.foldings.sizes import dims_of
from qcompiler.graph import SCHEME_KEY, SITE_KEY, Site, constant_array, unique_name
from qcompiler.lowering import add_constant, make_node, replace_nodes
from qcompiler.quantized import from_stored, stored_shape, to_stored
from qcompiler.rotation import linear_heads, reads_attention
from qcompiler.sites import find_sites

__all__ = ["CutLayer", "cut_heads", "join_heads"]

_PASS = "mixed_precision"


class RowsTensor(ir.LazyTensor):
    """Some rows of a stored weight, which stays where it is."""

    __slots__ = ("_base", "_layouts", "_rows")

    def __init__(self, base: ir.TensorProtocol, layouts: tuple[str, str], rows: slice, columns: int) -> None:
        """The rows of `base`, stored as the first layout says (see `graph.Site`), as the second one says."""
        self._base, self._layouts, self._rows = base, layouts, rows
        shape = ir.Shape(stored_shape(layouts[1], rows.stop - rows.start, columns))
        super().__init__(self._evaluate, base.dtype, shape)

    def _evaluate(self) -> ir.TensorProtocol:
        rows = from_stored(np.asarray(self._base.numpy()), self._layouts[0])[self._rows]
        return ir.Tensor(np.ascontiguousarray(to_stored(rows, self._layouts[1])), name=self.name)


@dataclass(eq=False)
class CutLayer:
    """A layer that is cut into heads.

    Attributes:
        site: The layer as it was; its node is no part of the graph any more.
        size: Rows of a head.
        nodes: The heads' nodes, in the order of their rows, and the Concat behind them.
        inputs: What the node read.
        added: Initializers of the heads.
    """

    site: Site
    size: int
    nodes: list[ir.Node] = field(default_factory=list)
    inputs: list[ir.Value | None] = field(default_factory=list)
    added: list[ir.Value] = field(default_factory=list)

    @property
    def heads(self) -> list[ir.Node]:
        """The heads' nodes."""
        return self.nodes[:-1]


def cut_heads(model: ir.Model, sites: Sequence[Site]) -> tuple[list[CutLayer], dict[str, str]]:
    """Cut the projections to queries, keys and values into heads.

    Args:
        model: In topological order.
        sites: Layers that may be cut: of the rest, heads have no formats to choose.

    Returns:
        The layers that were cut, and by name of a site why one that an attention reads was not.
    """
    linear = {site.node: site for site in find_sites(model)[0] if site.role == "linear"}
    mine = {site.node for site in sites}
    wanted: dict[Site, int] = {}
    problems: dict[str, str] = {}
    for folding in find_foldings(model, linear.values()):
        if folding.kind != "attention" and (folding.legal or not reads_attention(folding.value)):
            continue
        try:
            size = linear_heads(folding).heads.shape[1]
        except BlockedError as blocked:
            problems[folding.sites[0].name] = str(blocked)
            continue
        for node in _projections(folding.value, linear):
            if node in mine:
                wanted[linear[node]] = size
    layers = []
    for site in linear.values():
        if site not in wanted:
            continue
        size = wanted[site]
        problem = _problem(site, size)
        if problem:
            problems[site.name] = problem
        elif site.rows > size:
            layers.append(CutLayer(site, size))
    for layer in layers:
        _cut(layer)
    return layers, problems


def join_heads(layers: Sequence[CutLayer]) -> dict[str, list[tuple[str, list[str]]]]:
    """Join neighbouring heads whose nodes carry the same scheme, and forget the rest of the cuts.

    Returns:
        By name of the layer that was cut, its parts: the name of each, and those of the heads in it.
    """
    return {layer.site.name: _join(layer) for layer in layers}


def _projections(value: ir.Value, linear: dict[ir.Node, Site]) -> Iterator[ir.Node]:
    """The linear layers that an activation is computed from with no other linear layer between."""
    seen: set[ir.Node] = set()
    waiting = [value]
    while waiting:
        node = waiting.pop().producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in linear:
            yield node
        else:
            waiting += [operand for operand in node.inputs if operand is not None]


def _problem(site: Site, size: int) -> str:
    """Why a layer cannot be cut; empty if it can."""
    if site.nested:
        return f"inside the body of {site.nested}"
    if site.node.op_type not in ("MatMul", "Gemm") or site.layout not in ("NK", "KN"):
        return f"a weight of {site.node.op_type} stored as {site.layout} is not cut"
    if site.rows % size:
        return f"its {site.rows} rows are no whole heads of {size}"
    bias = site.node.inputs[2] if len(site.node.inputs) > 2 else None
    if bias is not None and bias.const_value is None and (dims_of(bias) or [None])[-1] != 1:
        return "its bias is computed"
    return ""


def _cut(layer: CutLayer) -> None:
    """Put the heads in the place of the node, and what only the node needed out of the graph."""
    site, graph = layer.site, layer.site.node.graph
    assert isinstance(graph, ir.Graph)
    layer.inputs = list(site.node.inputs)
    scheme = site.node.metadata_props[SCHEME_KEY]
    parts = [(slice(start, start + layer.size), scheme) for start in range(0, site.rows, layer.size)]
    _write(layer, [site.node], parts)
    if site.transpose is not None and not site.transpose.outputs[0].uses():
        graph.remove(site.transpose, safe=True)
    if not site.weight.uses() and not site.weight.is_graph_output():
        del graph.initializers[site.weight.name or ""]


def _join(layer: CutLayer) -> list[tuple[str, list[str]]]:
    site, heads, stale = layer.site, layer.heads, layer.added
    names = [node.metadata_props[SITE_KEY] for node in heads]
    schemes = [node.metadata_props.get(SCHEME_KEY, "") for node in heads]
    runs = [list(run) for _, run in groupby(range(len(names)), key=lambda head: schemes[head])]
    parts = [(slice(run[0] * layer.size, (run[-1] + 1) * layer.size), schemes[run[0]]) for run in runs]
    _write(layer, [layer.nodes[-1], *heads], parts)
    for value in stale:
        if value.graph is not None and not value.uses():
            del value.graph.initializers[value.name or ""]
    made = layer.heads if len(runs) > 1 else layer.nodes[-1:]
    found = (node.metadata_props.get(SITE_KEY, site.name) for node in made)
    return [(name, [names[head] for head in run]) for name, run in zip(found, runs, strict=True)]


def _write(layer: CutLayer, old: Sequence[ir.Node], parts: Sequence[tuple[slice, str]]) -> None:
    """Compute the layer in parts, some rows with a scheme each, in the place of `old`, the first of which ends it."""
    graph = old[0].graph
    assert isinstance(graph, ir.Graph)
    layer.added = []
    if len(parts) == 1:
        nodes = _whole(layer, graph)
    else:
        nodes = [_part(layer, graph, rows) for rows, _ in parts]
    for node, (_, scheme) in zip(nodes[-len(parts) :], parts, strict=True):
        if scheme:
            node.metadata_props[SCHEME_KEY] = scheme
    if len(parts) > 1:
        outputs = [node.outputs[0] for node in nodes]
        nodes.append(make_node(graph, "Concat", outputs, {"axis": -1}, layer.site.node, _PASS))
    replace_nodes(graph, old, nodes, nodes[-1].outputs[0])
    layer.nodes = nodes


def _whole(layer: CutLayer, graph: ir.Graph) -> list[ir.Node]:
    """The node that was there at first, and the Transpose in front of it if that is gone."""
    site, nodes, inputs = layer.site, [], list(layer.inputs)
    if site.weight.graph is None:
        graph.register_initializer(site.weight)
    if site.transpose is not None and site.transpose.graph is None:
        attributes = dict(site.transpose.attributes)
        nodes.append(make_node(graph, "Transpose", [site.weight], attributes, site.transpose, _PASS))
        inputs[1] = nodes[0].outputs[0]
    node = make_node(graph, site.node.op_type, inputs, dict(site.node.attributes), site.node, _PASS)
    node.name = site.node.name
    node.metadata_props[SITE_KEY] = site.node.metadata_props[SITE_KEY]
    return [*nodes, node]


def _part(layer: CutLayer, graph: ir.Graph, rows: slice) -> ir.Node:
    """The node that computes some rows."""
    site, inputs = layer.site, list(layer.inputs)
    inputs[1] = _rows(layer, graph, rows)
    if len(inputs) > 2 and inputs[2] is not None:
        inputs[2] = _bias(layer, graph, inputs[2], rows)
    first, last = rows.start // layer.size, rows.stop // layer.size - 1
    suffix = f"head_{first}" if first == last else f"heads_{first}_{last}"
    attributes = dict(site.node.attributes)
    node = make_node(graph, site.node.op_type, inputs, attributes, site.node, _PASS, suffix=suffix)
    node.metadata_props[SITE_KEY] = f"{site.name}.{suffix}"
    return node


def _rows(layer: CutLayer, graph: ir.Graph, rows: slice) -> ir.Value:
    """An initializer with some rows of the weight, as the node reads it."""
    site = layer.site
    base = site.weight.const_value
    assert base is not None
    layout = "KN" if site.node.op_type == "MatMul" else site.layout
    tensor = RowsTensor(base, (site.layout, layout), rows, site.columns)
    tensor.name = unique_name(graph, f"{site.weight.name}_{rows.start}_{rows.stop}")
    value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    layer.added.append(value)
    return value


def _bias(layer: CutLayer, graph: ir.Graph, bias: ir.Value, rows: slice) -> ir.Value:
    """What is added to some rows."""
    if (dims_of(bias) or [1])[-1] == 1:
        return bias
    array = np.ascontiguousarray(constant_array(bias)[..., rows])
    value = add_constant(graph, f"{bias.name}_{rows.start}_{rows.stop}", array)
    layer.added.append(value)
    return value
