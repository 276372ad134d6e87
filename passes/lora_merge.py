"""Merge low-rank adapters into the weights beside them, so that a model tuned with LoRA is quantized as one.

Hu et al. 2022, arXiv:2106.09685: ``y = W x + c B A x`` is ``(W + c B A) x``. Exporters leave an adapter that nobody
merged as two products, with a factor between, in front or behind, and an Add:

1. Add(site(x), branch(x)), in either order, where the branch is a product with A, one with B, and any multiplications
   or divisions by a positive constant. Both products are with constants and read what the site reads.
2. A weight that others read too is given to the site as a copy.

Left alone, with the reason: sites that are quantized already, branches of which others read a part, convolutions.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.absorbing import scalar_step
from qcompiler.graph import Site, read_weight
from qcompiler.lowering import add_constant
from qcompiler.passes.base import QuantPass, QuantPassResult, Stage
from qcompiler.quantized import to_stored
from qcompiler.records import SiteRecord
from qcompiler.sites import find_sites

__all__ = ["LoraMerge"]


@dataclass(frozen=True)
class _Adapter:
    """A branch: its products, the factor, the Add, and the nodes in order of flow."""

    inner: Site
    outer: Site
    factor: float
    add: ir.Node
    nodes: tuple[ir.Node, ...]


class LoraMerge(QuantPass):
    """Merges adapters."""

    name = "lora_merge"
    stage = Stage.TRANSFORM
    paper = "Hu et al. 2022, arXiv:2106.09685"

    def call(self, model: ir.Model) -> QuantPassResult:
        """Look at every Add."""
        sites = {site.node: site for site in find_sites(model)[0] if site.role != "embedding"}
        records = []
        for add in [node for node in model.graph if node.op_type == "Add" and node.domain == ""]:
            found = _find(add, sites)
            if found is None:
                continue
            site, adapter = found
            if site.quantized is not None:
                reason = "its adapter is not merged: the weight is quantized already"
                records.append(SiteRecord(site.name, "skipped", reason=reason))
                continue
            rank = _merge(site, adapter)
            records.append(SiteRecord(site.name, "rewritten", reason=f"an adapter of rank {rank} is merged"))
        return QuantPassResult(model, any(each.action == "rewritten" for each in records), tuple(records))


def _find(add: ir.Node, sites: dict[ir.Node, Site]) -> tuple[Site, _Adapter] | None:
    """The site and the adapter that an Add puts together."""
    for at in (0, 1):
        value, branch = add.inputs[at], add.inputs[1 - at]
        producer = value.producer() if value is not None else None
        site = sites.get(producer) if producer is not None else None
        if site is None or branch is None or not _only(value, add) or site.node.op_type != "MatMul":
            continue
        adapter = _branch(branch, add, site, sites)
        if adapter is not None:
            return site, adapter
    return None


def _branch(value: ir.Value, add: ir.Node, site: Site, sites: dict[ir.Node, Site]) -> _Adapter | None:
    """The adapter that a value comes from, if it reads what the site reads."""
    products: list[Site] = []
    nodes: list[ir.Node] = []
    factor, reader = 1.0, add
    while value is not site.input:
        node = value.producer()
        if node is None or not _only(value, reader) or node.graph is not add.graph:
            return None
        step = scalar_step(node)
        if node in sites and node.op_type == "MatMul" and len(products) < 2:
            products.append(sites[node])
            value = sites[node].input
        elif step is not None and not step[2]:
            factor *= step[1]
            value = step[0]
        else:
            return None
        nodes.append(node)
        reader = node
    if len(products) != 2 or products[1].rows >= min(site.rows, site.columns):
        return None
    return _Adapter(products[1], products[0], factor, add, tuple(nodes))


def _only(value: ir.Value | None, reader: ir.Node) -> bool:
    """Whether one node alone reads a value."""
    return value is not None and [use.node for use in value.uses()] == [reader] and not value.is_graph_output()


def _merge(site: Site, adapter: _Adapter) -> int:
    """Give the site the sum of both, and take the branch out; returns the rank."""
    inner, outer = (read_weight(each).astype(np.float64) for each in (adapter.inner, adapter.outer))
    merged = (read_weight(site) + adapter.factor * (outer @ inner)).astype(site.dtype.numpy())
    array = np.ascontiguousarray(to_stored(merged, site.layout))
    graph, weight, result = adapter.add.graph, site.weight, adapter.add.outputs[0]
    assert isinstance(graph, ir.Graph)
    if len(weight.uses()) == 1 and not weight.is_graph_output():
        weight.const_value = ir.tensor(array, name=weight.name)
    else:
        copy = add_constant(graph, f"{weight.name}_merged", array)
        reader = site.transpose if site.transpose is not None else site.node
        reader.replace_input_with(next(i for i, value in enumerate(reader.inputs) if value is weight), copy)
    output, name = site.node.outputs[0], result.name
    output.type, output.shape = result.type, result.shape
    result.replace_all_uses_with(output, replace_graph_outputs=True)
    graph.remove([adapter.add, *adapter.nodes], safe=True)
    output.name = name
    return adapter.inner.rows
