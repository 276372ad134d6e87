"""Bring the model into the form in which sites are found.

1. Model-local functions are inlined (a function that no node calls is dropped with them), but for the bodies of our
   own operators: a model that was compiled already keeps them.
2. Constant nodes become initializers of the same name, in every subgraph, unless they are a graph output.
3. Identity and no-op Cast nodes between an initializer and its readers are bypassed.

Left alone: everything else. Gemm, MatMul, Transpose of a weight and convolutions with a kernel of one are recognized
as they stand (see `graph.find_sites`), so what stays float leaves the compiler as it came.
"""

import onnx_ir as ir
import onnx_ir.passes.common as common

from qcompiler.kernels.schemas import DOMAIN
from qcompiler.passes.base import QuantPass, QuantPassResult, Stage
from qcompiler.records import SiteRecord

__all__ = ["Canonicalize"]


class Canonicalize(QuantPass):
    """Inlines functions and lifts constants."""

    name = "canonicalize"
    stage = Stage.CANONICALIZE

    @classmethod
    def applies(cls, config: object) -> bool:
        """Always."""
        del config
        return True

    def call(self, model: ir.Model) -> QuantPassResult:
        """Run the cases in order."""
        records = []
        ours = {key: function for key, function in model.functions.items() if function.domain == DOMAIN}
        for key in ours:
            del model.functions[key]
        functions = len(model.functions)
        if functions:
            common.InlinePass()(model)
            model.functions.clear()
            records.append(SiteRecord("model", "rewritten", reason=f"{functions} local functions inlined"))
        model.functions.update(ours)
        lifted = common.LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=0)(model).modified
        bypassed = sum(_bypass(node) for node in list(ir.traversal.RecursiveGraphIterator(model.graph)))
        return QuantPassResult(model, bool(functions or lifted or bypassed), tuple(records))


def _bypass(node: ir.Node) -> bool:
    """Let the readers of an Identity or no-op Cast of an initializer read the initializer."""
    source = node.inputs[0] if node.inputs else None
    if node.op_type not in ("Identity", "Cast") or node.domain != "" or source is None or source.const_value is None:
        return False
    if node.op_type == "Cast" and node.attributes["to"].as_int() != int(source.const_value.dtype):
        return False
    output = node.outputs[0]
    if output.is_graph_output() or node.graph is None:
        return False
    output.replace_all_uses_with(source)
    node.graph.remove(node, safe=True)
    return True
