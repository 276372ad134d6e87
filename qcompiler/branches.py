"""A branch of two small matrices beside a site: ``y = site(x) + outer (inner x)``."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.graph import Site
from qcompiler.lowering import add_constant, append_nodes, make_node
from qcompiler.quantized import to_stored

__all__ = ["Branch", "add_branch", "remove_branch"]


@dataclass(frozen=True)
class Branch:
    """The nodes of a branch, and the values of its matrices as the graph stores them.

    Attributes:
        products: The product with the inner matrix, then that with the outer one.
        add: Adds the branch to what the site computes.
        inner: ``[r, K]`` as the node reads it; of a MatMul ``[K, r]``.
        outer: ``[N, r]`` as the node reads it; of a MatMul ``[r, N]``.
    """

    products: tuple[ir.Node, ir.Node]
    add: ir.Node
    inner: ir.Value
    outer: ir.Value


def add_branch(
    site: Site, inner: np.ndarray, outer: np.ndarray, pass_name: str, label: str, end: ir.Node | None = None
) -> Branch:
    """Insert a branch.

    Args:
        site: MatMul, Gemm, or Conv with a kernel of one.
        inner: float ``[r, K]``.
        outer: float ``[N, r]``.
        pass_name: Who inserts it.
        label: What the new values are called after.
        end: The node whose result the branch is added to, if that is another than the site's.
    """
    node, graph, name = site.node, site.node.graph, site.weight.name
    assert isinstance(graph, ir.Graph)
    op_type, layout = "MatMul", "KN"
    if node.op_type == "Conv":
        op_type, layout = "Conv", "N:{}" + ",1" * site.layout.count(",")
    products: list[ir.Node] = []
    constants: list[ir.Value] = []
    value = site.input
    for factor, letter in ((inner, "A"), (outer, "B")):
        array = to_stored(factor, layout.format(factor.shape[1])).astype(site.dtype.numpy())
        constants.append(add_constant(graph, f"{name}_{label}_{letter}", np.ascontiguousarray(array)))
        products.append(_node(site, op_type, value, constants[-1], pass_name, letter))
        value = products[-1].outputs[0]
    graph.insert_before(node, products)
    end = end or node
    add = _node(site, "Add", end.outputs[0], value, pass_name, "add")
    append_nodes(graph, end, [add])
    return Branch((products[0], products[1]), add, constants[0], constants[1])


def remove_branch(branch: Branch) -> None:
    """Take a branch out again; its constants are left to whoever cleans up."""
    graph, result, kept = branch.add.graph, branch.add.outputs[0], branch.add.inputs[0]
    assert isinstance(graph, ir.Graph)
    assert kept is not None
    name = result.name
    result.replace_all_uses_with(kept, replace_graph_outputs=True)
    graph.remove([branch.add, *reversed(branch.products)], safe=True)
    for constant in (branch.inner, branch.outer):
        graph.initializers.pop(constant.name or "", None)
    kept.name = name


def _node(site: Site, op_type: str, left: ir.Value, right: ir.Value, pass_name: str, label: str) -> ir.Node:
    graph = site.node.graph
    assert isinstance(graph, ir.Graph)
    node = make_node(graph, op_type, [left, right], {}, site.node, pass_name, suffix=f"{pass_name}_{label}")
    node.outputs[0].type = ir.TensorType(site.dtype)
    return node
