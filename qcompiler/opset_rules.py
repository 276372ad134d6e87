"""How a node of one standard opset is written in a later one: a rule for each operator that changed its form.

A version that is not in `RULES` only allowed more types, or added inputs and attributes that may be left out. That the
table is complete is checked against the operator definitions of the `onnx` package (`_check_form`, and the tests).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx.defs
import onnx_ir as ir

from qcompiler.graph import PASS_KEY, constant_array
from qcompiler.lowering import add_constant, make_node, replace_nodes

__all__ = ["RULES", "CannotRaiseError", "raise_node"]

_PASS = "raise_opset"
# Rewrites a node; the second argument is the final opset.
Rule = Callable[[ir.Node, int], None]


class CannotRaiseError(Exception):
    """Why a node cannot be written in the later opset."""


def raise_node(node: ir.Node, current: int, target: int) -> bool:
    """Bring a node of the standard domain from opset `current` to `target`, version by version.

    Nodes and values that are not replaced keep their names; no weight is read. Bodies of control flow are not entered.

    Returns:
        Whether the node had to be rewritten.

    Raises:
        CannotRaiseError: No rule can do it; the node may be half rewritten then.
    """
    before = _form(node)
    for version in range(current + 1, target + 1):
        rule = RULES.get((node.op_type, version))
        if rule is not None:
            rule(node, target)
    _check_form(node, current, target)
    changed = _form(node) != before
    if changed:
        node.metadata_props[PASS_KEY] = _PASS
    return changed


def _form(node: ir.Node) -> tuple[Any, ...]:
    return node.op_type, dict(node.attributes), node.inputs, len(node.outputs)


def _check_form(node: ir.Node, current: int, target: int) -> None:
    """Raise CannotRaiseError if a node whose operator was defined anew does not have the form of the new definition."""
    try:
        schema = onnx.defs.get_schema(node.op_type, target, "")
    except onnx.defs.SchemaError:
        return  # an operator that ONNX Runtime keeps in the standard domain
    if schema.since_version <= current:
        return
    unknown = sorted(set(node.attributes) - set(schema.attributes))
    if schema.deprecated:
        raise CannotRaiseError("the operator no longer exists")
    if unknown:
        raise CannotRaiseError(f"its attribute '{unknown[0]}' no longer exists")
    if not schema.min_input <= len(node.inputs) <= schema.max_input or len(node.outputs) > schema.max_output:
        raise CannotRaiseError("it has other inputs or outputs there")


def _constant(node: ir.Node, name: str, array: np.ndarray) -> ir.Value:
    assert isinstance(node.graph, ir.Graph)
    return add_constant(node.graph, f"{node.name or node.op_type}_{name}", array)


def _new(node: ir.Node, op_type: str, inputs: list[ir.Value | None], **attributes: int) -> ir.Node:
    assert isinstance(node.graph, ir.Graph)
    return make_node(node.graph, op_type, inputs, attributes, node, _PASS)


def _set_input(node: ir.Node, index: int, value: ir.Value | None) -> None:
    node.resize_inputs(max(index + 1, len(node.inputs)))
    node.replace_input_with(index, value)


def _set_text(node: ir.Node, name: str, text: str) -> None:
    node.attributes[name] = ir.AttrString(name, text)


def _present(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


# Rules that are made.


def _to_input(name: str, index: int, dtype: str, *, scalar: bool = False, default: int | None = None) -> Rule:
    """The attribute becomes the constant input `index`; nothing happens where there is neither it nor a default."""

    def rule(node: ir.Node, target: int) -> None:
        del target
        attribute = node.attributes.pop(name, None)
        held = default if attribute is None else attribute.value
        if held is not None:
            array = np.array(held, dtype)
            _set_input(node, index, _constant(node, name, array if scalar else array.reshape(-1)))

    return rule


def _to_input_like_data(name: str, index: int) -> Rule:
    """The float attribute becomes the constant input `index`, a scalar of the type of the data."""

    def rule(node: ir.Node, target: int) -> None:
        attribute, data = node.attributes.pop(name, None), node.inputs[0]
        if attribute is None or data is None:
            return
        dtype = data.dtype or node.outputs[0].dtype
        value = _constant(node, name, np.array(attribute.as_float(), (dtype or ir.DataType.FLOAT).numpy()))
        if dtype is None:
            if target < 15:
                raise CannotRaiseError("the type of its input is not known; run ONNX shape inference on the model")
            cast = _new(node, "CastLike", [value, data])
            node.prepend(cast)
            value = cast.outputs[0]
        _set_input(node, index, value)

    return rule


def _all(*rules: Rule) -> Rule:
    def rule(node: ir.Node, target: int) -> None:
        for part in rules:
            part(node, target)

    return rule


def _renamed(op_type: str) -> Rule:
    def rule(node: ir.Node, target: int) -> None:
        del target
        node.op_type = op_type

    return rule


def _refused(why: str) -> Rule:
    def rule(node: ir.Node, target: int) -> None:
        raise CannotRaiseError(why)

    return rule


def _without(name: str, neutral: int) -> Rule:
    """An attribute that is gone; a node can only lose it where it says what holds without it."""

    def rule(node: ir.Node, target: int) -> None:
        del target
        attribute = node.attributes.pop(name, None)
        if attribute is not None and attribute.value != neutral:
            raise CannotRaiseError(f"{name} = {attribute.value} no longer exists")

    return rule


def _one_output(why: str) -> Rule:
    """Outputs but the first changed their meaning; a node can only lose them where nothing reads them."""

    def rule(node: ir.Node, target: int) -> None:
        del target
        if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
            raise CannotRaiseError(why)
        node.resize_outputs(1)

    return rule


# Rules of one operator.


def _softmax(node: ir.Node, target: int) -> None:
    """Until opset 12 all axes from `axis` (1) on were normalized as one, since then `axis` (-1) alone is."""
    del target
    data, graph = node.inputs[0], node.graph
    assert data is not None and isinstance(graph, ir.Graph)
    axis = node.attributes.get_int("axis", 1)
    node.attributes["axis"] = ir.AttrInt64("axis", -1)
    if axis == -1 or (data.shape is not None and axis == data.shape.rank() - 1):
        return
    shape, flat = _new(node, "Shape", [data]), _new(node, "Flatten", [data], axis=axis)
    inner = _new(node, node.op_type, [flat.outputs[0]], axis=-1)
    outer = _new(node, "Reshape", [inner.outputs[0], shape.outputs[0]])
    replace_nodes(graph, [node], [shape, flat, inner, outer], outer.outputs[0])


def _resize(node: ir.Node, target: int) -> None:
    """Opset 10 knew one way: asymmetric, and the nearest value is the floor when stretching, the ceiling if not."""
    del target
    scales = node.inputs[1]
    if node.attributes.get_string("mode", "nearest") == "nearest":
        if scales is None or scales.const_value is None:
            raise CannotRaiseError("its scales, which decide how the nearest value is found, are not constant")
        values = constant_array(scales)
        if values.min() < 1 < values.max():
            raise CannotRaiseError("it shrinks one axis and stretches another")
        _set_text(node, "nearest_mode", "ceil" if values.min() < 1 else "floor")
    _set_text(node, "coordinate_transformation_mode", "asymmetric")
    _set_input(node, 1, _constant(node, "roi", np.zeros(0, np.float32)))
    _set_input(node, 2, scales)


def _resize_optional(node: ir.Node, target: int) -> None:
    """Since opset 13 an input that does not count is left out; it was an empty constant."""
    del target
    if node.attributes.get_string("coordinate_transformation_mode", "") == "tf_half_pixel_for_nn":
        raise CannotRaiseError("coordinate_transformation_mode = tf_half_pixel_for_nn no longer exists")
    for index in (1, 2):
        value = _present(node, index)
        if value is not None and value.const_value is not None and value.const_value.size == 0:
            node.replace_input_with(index, None)


def _split(node: ir.Node, target: int) -> None:
    """Since opset 18 equal parts are counted."""
    del target
    if _present(node, 1) is None:
        node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))


def _grid_sample(node: ir.Node, target: int) -> None:
    del target
    mode = node.attributes.get_string("mode", "bilinear")
    _set_text(node, "mode", {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode))


def _roi_align(node: ir.Node, target: int) -> None:
    del target
    _set_text(node, "coordinate_transformation_mode", "output_half_pixel")


def _group_norm(node: ir.Node, target: int) -> None:
    """Since opset 21 scale and bias have one value a channel, not one a group."""
    del target
    data, groups = node.inputs[0], node.attributes["num_groups"].as_int()
    channels = data.shape[1] if data is not None and data.shape is not None else None
    if not isinstance(channels, int):
        raise CannotRaiseError("its number of channels is not known")
    column, flat = _constant(node, "column", np.array([-1, 1])), _constant(node, "flat", np.array([-1]))
    spread = _constant(node, "spread", np.array([1, channels // groups]))
    for index in (1, 2):
        steps = [_new(node, "Reshape", [node.inputs[index], column])]
        steps.append(_new(node, "Expand", [steps[-1].outputs[0], spread]))
        steps.append(_new(node, "Reshape", [steps[-1].outputs[0], flat]))
        node.prepend(steps)
        node.replace_input_with(index, steps[-1].outputs[0])


_AXES = _to_input("axes", 1, "int64")

RULES: dict[tuple[str, int], Rule] = {
    ("BatchNormalization", 9): _without("spatial", 1),
    ("BatchNormalization", 14): _one_output("it is in training mode"),
    ("Clip", 11): _all(_to_input_like_data("min", 1), _to_input_like_data("max", 2)),
    ("DFT", 20): _to_input("axis", 2, "int64", scalar=True, default=1),
    ("Dropout", 10): _one_output("its mask is read"),
    ("Dropout", 12): _to_input("ratio", 1, "float32", scalar=True),
    ("GridSample", 20): _grid_sample,
    ("GroupNormalization", 21): _group_norm,
    ("Hardmax", 13): _softmax,
    ("LogSoftmax", 13): _softmax,
    ("Pad", 11): _all(_to_input("pads", 1, "int64"), _to_input_like_data("value", 2)),
    ("ReduceSum", 13): _AXES,
    ("Resize", 11): _resize,
    ("Resize", 13): _resize_optional,
    ("RoiAlign", 16): _roi_align,
    ("Scan", 9): _refused("its sequence lengths and directions are gone"),
    ("Scatter", 11): _renamed("ScatterElements"),
    ("Slice", 10): _all(*(_to_input(name, i, "int64") for i, name in enumerate(("starts", "ends", "axes"), 1))),
    ("Softmax", 13): _softmax,
    ("Split", 13): _to_input("split", 1, "int64"),
    ("Split", 18): _split,
    ("Squeeze", 13): _AXES,
    ("TopK", 10): _to_input("k", 1, "int64"),
    ("Unsqueeze", 13): _AXES,
    ("Upsample", 9): _to_input("scales", 1, "float32"),
    ("Upsample", 10): _renamed("Resize"),
    **{
        (f"Reduce{name}", 18): _AXES
        for name in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
    },
}
