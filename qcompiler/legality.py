"""What a model may contain at each stage, as code; run between passes.

* Always: every value that is read is an input, an initializer or computed by an earlier node; names are unique.
* Before LOWER: no operator of ours or of ONNX Runtime's quantized family has appeared that was not in the user's
  model (which may be one that was compiled before): a quantized weight is a QuantizedTensor and nothing else.
  Q/DQ pairs that round activations are no such operators.
* From CLEANUP on: no QuantizedTensor is left; all have been spelled out.
"""

from collections.abc import Collection
from typing import TYPE_CHECKING

import onnx_ir as ir

from qcompiler.errors import PassError
from qcompiler.graph import PASS_KEY
from qcompiler.kernels.schemas import OPERATORS
from qcompiler.quantized import QuantizedTensor

if TYPE_CHECKING:
    from qcompiler.passes.base import Stage

__all__ = ["check_legal", "lowered_nodes"]

_LOWERED = {"MatMulNBits", "GatherBlockQuantized", *OPERATORS}
_LOWER, _CLEANUP = 4, 5


def lowered_nodes(model: ir.Model) -> set[ir.Node]:
    """The nodes that a lowering pass made, in this compilation or an earlier one."""
    nodes = ir.traversal.RecursiveGraphIterator(model.graph)
    return {node for node in nodes if _is_lowered(node) and PASS_KEY in node.metadata_props}


def _is_lowered(node: ir.Node) -> bool:
    """Whether the node spells a weight out; a DequantizeLinear with one scale in all decodes an activation."""
    if node.op_type == "DequantizeLinear":
        codes, scale = node.inputs[0], node.inputs[1]
        constant = codes is not None and codes.const_value is not None
        return constant and scale is not None and scale.const_value is not None and scale.const_value.shape.rank() > 0
    return node.op_type in _LOWERED


def check_legal(model: ir.Model, stage: "Stage", culprit: str, given: Collection[ir.Node] = ()) -> None:
    """Raise PassError, naming the pass, if `model` is not legal after a pass of `stage`.

    Args:
        model: The model.
        stage: Where the pass belongs.
        culprit: Name of the pass.
        given: `lowered_nodes` of the model that the first pass got.
    """
    known = {value for value in (*model.graph.inputs, *model.graph.initializers.values())}
    _check_graph(model.graph, known, culprit)
    if stage < _LOWER:
        for node in lowered_nodes(model):
            if node not in given:
                raise PassError(f"{culprit}: made a {node.op_type} ('{node.name}') before the LOWER stage")
    if stage >= _CLEANUP:
        for graph in model.graphs():
            for value in graph.initializers.values():
                if isinstance(value.const_value, QuantizedTensor):
                    raise PassError(f"{culprit}: the quantized weight '{value.name}' was never lowered")


def _check_graph(graph: ir.Graph, known: set[ir.Value], culprit: str) -> None:
    names: set[str] = {value.name for value in known if value.name}
    for node in graph:
        for value in node.inputs:
            if value is not None and value not in known:
                raise PassError(
                    f"{culprit}: '{node.name}' ({node.op_type}) reads '{value.name}', which nothing computes before it"
                )
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                body = attribute.as_graph()
                _check_graph(body, known | set(body.inputs) | set(body.initializers.values()), culprit)
        for output in node.outputs:
            if output.name and output.name in names:
                raise PassError(f"{culprit}: two values are called '{output.name}'")
            names.add(output.name or "")
        known.update(node.outputs)
    for output in graph.outputs:
        if output not in known:
            raise PassError(f"{culprit}: nothing computes the output '{output.name}'")
