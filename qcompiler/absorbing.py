"""What quantization swallows: scaling and shifting by single values, and clipping to a hard sigmoid.

``QuantizeLinear(c * x + b, s, z)`` is ``QuantizeLinear(x, s / c, z + b / s)`` for c > 0, if b / s is a whole number;
`place` asks for scales that make it one. A hard sigmoid of codes is a Clip of them that is decoded with another scale,
if the codes have one for the place where it leaves zero.
"""

import math

import onnx_ir as ir

from qcompiler.graph import constant_scalar

__all__ = ["anchor_of", "behind_scalars", "hard_sigmoid", "scalar_step", "swallowed"]

_ENDS = ("Relu", "Clip")


def scalar_step(node: ir.Node) -> tuple[ir.Value, float, float] | None:
    """What a node does to one input by single values: (input, scale > 0, shift); None if it does anything else."""
    if node.domain != "" or node.op_type not in ("Mul", "Add", "Sub", "Div"):
        return None
    left, right = node.inputs
    at_right = constant_scalar(right, left)
    constant = constant_scalar(left, right) if at_right is None else at_right
    value = right if at_right is None else left
    if value is None or value.const_value is not None or constant is None or not math.isfinite(constant):
        return None
    if node.op_type == "Add":
        return value, 1.0, constant
    if node.op_type == "Sub" and at_right is not None:
        return value, 1.0, -constant
    if node.op_type == "Mul" and constant > 0:
        return value, constant, 0.0
    return (value, 1 / constant, 0.0) if node.op_type == "Div" and at_right is not None and constant > 0 else None


def swallowed(node: ir.Node | None) -> ir.Value | None:
    """The input of a node that scales or shifts it for all its readers, so that its quantization can; or None."""
    step = scalar_step(node) if node is not None else None
    if node is None or step is None or len(step[0].uses()) != 1 or step[0].is_graph_output():
        return None
    producer = step[0].producer()
    # A shift would move the zero point, and with it a Relu in front of it out of the codes' end.
    if producer is None or producer.op_type in _ENDS or producer.graph is not node.graph:
        return None
    return step[0]


def behind_scalars(value: ir.Value) -> ir.Value:
    """What a value is after the scalars that only it is read by."""
    while len(uses := list(value.uses())) == 1 and swallowed(uses[0].node) is value:
        value = uses[0].node.outputs[0]
    return value


def anchor_of(value: ir.Value, readers: list[tuple[ir.Node, int]]) -> float:
    """The number that has to be a code for a value's quantization to swallow what is around it; 0 if any scale will do.

    Args:
        value: What is quantized.
        readers: The nodes, with input indices, that read its codes.
    """
    total, factor = 0.0, 1.0
    current = value
    while (node := current.producer()) is not None and swallowed(node) is not None:
        step = scalar_step(node)
        assert step is not None
        current, total, factor = step[0], total + factor * step[2], factor * step[1]
    if total:
        return total
    for node, _ in readers:
        if node.op_type == "HardSigmoid":
            alpha, beta = hard_sigmoid(node)
            return -beta / alpha if alpha > 0 else 0.0
    return 0.0


def hard_sigmoid(node: ir.Node) -> tuple[float, float]:
    """Alpha and beta of a HardSigmoid."""
    return node.attributes.get_float("alpha", 0.2), node.attributes.get_float("beta", 0.5)
