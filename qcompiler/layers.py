"""Layers with constant weights, Conv, ConvTranspose and Gemm, and what passes that rescale them need to know."""

import numpy as np
import onnx_ir as ir

from qcompiler.graph import Site, constant_array
from qcompiler.lowering import add_constant, make_node

__all__ = [
    "bias_place",
    "channel_view",
    "clip_bounds",
    "constant_add",
    "is_constant",
    "label",
    "output_channels",
    "remove_bias",
    "store_constant",
]

_CONVOLUTIONS = ("Conv", "ConvTranspose")


def label(node: ir.Node) -> str:
    """What reports call a node."""
    return node.name or node.outputs[0].name or node.op_type


def is_constant(value: ir.Value | None) -> bool:
    """Whether an input is an initializer."""
    return value is not None and value.const_value is not None and value.is_initializer()


def constant_add(node: ir.Node) -> tuple[ir.Node, int] | None:
    """The Add of a constant that is the only reader of a node's result, and the number of its constant input."""
    result = node.outputs[0]
    uses = result.uses()
    if len(uses) != 1 or result.is_graph_output():
        return None
    reader, index = next(iter(uses))
    other = reader.inputs[1 - index] if reader.op_type == "Add" and reader.domain == "" else None
    return (reader, 1 - index) if is_constant(other) and reader.graph is node.graph else None


def bias_place(site: Site, pass_name: str) -> tuple[ir.Node, int]:
    """The node and the number of its input where a site's bias is, or goes; behind a MatMul an Add is made for it."""
    node = site.node
    if node.op_type != "MatMul":
        return node, 2
    found = constant_add(node)
    if found is not None:
        return found
    graph, result = node.graph, node.outputs[0]
    assert isinstance(graph, ir.Graph)
    bias = add_constant(graph, f"{site.weight.name}_bias", np.zeros(site.rows, site.dtype.numpy()))
    add = make_node(graph, "Add", [result, bias], {}, node, pass_name)
    output, name = add.outputs[0], result.name
    output.type, output.shape = result.type, result.shape
    result.replace_all_uses_with(output, replace_graph_outputs=True)
    # The Add is among the readers that were replaced.
    add.replace_input_with(0, result)
    graph.insert_after(node, add)
    result.name, output.name = output.name, name
    return add, 1


def remove_bias(add: ir.Node) -> None:
    """Take out an Add that `bias_place` made."""
    graph, output, result, bias = add.graph, add.outputs[0], *add.inputs[:2]
    assert isinstance(graph, ir.Graph)
    assert result is not None
    assert bias is not None
    name = output.name
    output.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(add, safe=True)
    graph.initializers.pop(bias.name or "", None)
    result.name = name


def output_channels(node: ir.Node) -> int:
    """The number of a layer's output channels."""
    weight = node.inputs[1]
    assert weight is not None and weight.const_value is not None
    first, second = weight.const_value.shape.numpy()[:2]
    if node.op_type == "Conv" or node.attributes.get_int("transB", 0) == 1:
        return int(first)
    return int(second) * node.attributes.get_int("group", 1)


def channel_view(node: ir.Node, weight: np.ndarray) -> np.ndarray:
    """A layer's contiguous weight as a view [groups, outputs, inputs, taps]; channels count through the groups."""
    if node.op_type in _CONVOLUTIONS:
        groups = node.attributes.get_int("group", 1)
        view = weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)
        return view if node.op_type == "Conv" else view.swapaxes(1, 2)
    view = weight.reshape(1, *weight.shape, 1)
    return view if node.attributes.get_int("transB", 0) == 1 else view.swapaxes(1, 2)


def store_constant(node: ir.Node, index: int, array: np.ndarray, reader: str = "") -> None:
    """Let a node's input be a constant; what others read too, or the caller gets, stays as it is for them.

    The copy that is made then is called after the old constant and `reader`, or the node.
    """
    old = node.inputs[index] if index < len(node.inputs) else None
    if old is not None and len(old.uses()) == 1 and not old.is_graph_output():
        old.const_value = ir.Tensor(array, name=old.name)
        old.shape = ir.Shape(array.shape)
        return
    graph, weight = node.graph, node.inputs[1]
    assert graph is not None and weight is not None
    name = f"{weight.name}_bias" if old is None else f"{old.name}_{reader or label(node)}"
    node.resize_inputs(max(index + 1, len(node.inputs)))
    node.replace_input_with(index, add_constant(graph, name, array))


def clip_bounds(node: ir.Node) -> tuple[float, float] | None:
    """The bounds of a Clip as far as they are constants, else None."""
    if node.op_type != "Clip":
        return None
    bounds = [node.attributes.get_float("min", -np.inf), node.attributes.get_float("max", np.inf)]
    for index, value in enumerate(node.inputs[1:3]):
        if value is not None and not is_constant(value):
            return None
        if value is not None:
            bounds[index] = float(constant_array(value).reshape(-1)[0])
    # Older exporters write the largest float for no bound.
    return bounds[0], bounds[1] if bounds[1] < np.finfo(np.float32).max else np.inf
