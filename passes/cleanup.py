"""Leave nothing behind that the compiled model does not need.

1. Nodes and initializers that nothing reads any more are removed (the float weights of lowered sites, their
   Transposes); an initializer that was listed among the graph's inputs leaves them too. The model's own inputs and
   outputs stay.
2. The marks of sites are removed from the nodes.
3. A lookup table whose codes are those of a product, in another shape, becomes a Flatten of these where the model is
   small enough to be one file, which would hold them twice. ONNX Runtime computes it once, when it loads the model. A
   file of external data holds them once in any case, and can be mapped. Before opset 9 Flatten has no integers.
"""

import numpy as np
import onnx_ir as ir

from qcompiler.graph import EXTERNAL_BYTES, SCHEME_KEY, SITE_KEY, SPARSE_KEY
from qcompiler.lowering import make_node
from qcompiler.passes.base import QuantPass, QuantPassResult, Stage

__all__ = ["Cleanup"]

_FLATTEN_INTEGERS = 9


class Cleanup(QuantPass):
    """Removes dead nodes, dead initializers and the compiler's marks."""

    name = "cleanup"
    stage = Stage.CLEANUP

    @classmethod
    def applies(cls, config: object) -> bool:
        """Always."""
        del config
        return True

    def call(self, model: ir.Model) -> QuantPassResult:
        """Run the cases in order."""
        removed = sum(_remove_dead(graph) for graph in reversed(list(model.graphs())))
        marked = 0
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            for key in (SCHEME_KEY, SITE_KEY, SPARSE_KEY):
                marked += node.metadata_props.pop(key, None) is not None
        shared = _share_tables(model, self.name) if model.opset_imports.get("", 0) >= _FLATTEN_INTEGERS else 0
        return QuantPassResult(model, bool(removed or marked or shared))


def _forget_bodies(node: ir.Node) -> None:
    """Let the bodies of a dead node read nothing, so that they keep nothing outside alive."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in ir.traversal.RecursiveGraphIterator(attribute.as_graph()):
                for index in range(len(inner.inputs)):
                    inner.replace_input_with(index, None)


def _remove_dead(graph: ir.Graph) -> int:
    """Remove what is not read, last node first; returns how many things went."""
    removed = 0
    for node in reversed(graph):
        if node.outputs and not any(output.uses() or output.is_graph_output() for output in node.outputs):
            _forget_bodies(node)
            graph.remove(node, safe=True)
            removed += 1
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
            removed += 1
            if value in graph.inputs:
                graph.inputs.remove(value)
    return removed


def _share_tables(model: ir.Model, pass_name: str) -> int:
    """Compute lookup tables from the codes of products that are the same bytes; returns how many."""
    graph = model.graph
    codes: dict[tuple[int, int], ir.Value] = {}
    tables: dict[ir.Value, ir.Node] = {}
    for node in ir.traversal.RecursiveGraphIterator(graph):
        if node.op_type == "MatMulNBits" and (value := node.inputs[1]) is not None and (place := _place(value)):
            codes[place] = value
        elif node.op_type == "GatherBlockQuantized" and (value := node.inputs[0]) is not None and _place(value):
            tables.setdefault(value, node)
    tied = {value: codes[place] for value in tables if (place := _place(value)) in codes and value.graph is graph}
    tied = {value: source for value, source in tied.items() if source.graph is graph and not value.is_graph_output()}
    stored = {id(value.const_value): value.const_value for g in model.graphs() for value in g.initializers.values()}
    repeated = sum(value.const_value.nbytes for value in tied if value.const_value is not None)
    if sum(tensor.nbytes for tensor in stored.values() if tensor is not None) - repeated > EXTERNAL_BYTES:
        return 0
    for value, source in tied.items():
        assert value.name is not None
        view = make_node(graph, "Flatten", [source], {"axis": 1}, tables[value], pass_name)
        graph.insert_before(graph[0], view)
        output = view.outputs[0]
        output.type, output.shape = value.type, value.shape
        value.replace_all_uses_with(output)
        del graph.initializers[value.name]
        output.name = value.name
    return len(tied)


def _place(value: ir.Value) -> tuple[int, int] | None:
    """Where the bytes of an initializer are in memory, and how many; None where they are not an array."""
    tensor = value.const_value
    if not isinstance(tensor, ir.Tensor) or not isinstance(tensor.raw, np.ndarray) or not tensor.nbytes:
        return None
    return tensor.raw.ctypes.data, tensor.nbytes
