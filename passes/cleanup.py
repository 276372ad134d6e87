"""Leave nothing behind that the compiled model does not need.

1. Nodes and initializers that nothing reads any more are removed (the float weights of lowered sites, their
   Transposes); an initializer that was listed among the graph's inputs leaves them too. The model's own inputs and
   outputs stay.
2. The marks of sites are removed from the nodes.
"""

import onnx_ir as ir

from qcompiler.graph import SCHEME_KEY, SITE_KEY
from qcompiler.passes.base import QuantPass, QuantPassResult, Stage

__all__ = ["Cleanup"]


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
            for key in (SCHEME_KEY, SITE_KEY):
                marked += node.metadata_props.pop(key, None) is not None
        return QuantPassResult(model, bool(removed or marked))


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
