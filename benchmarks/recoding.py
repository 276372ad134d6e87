"""Two variants of a model with 8-bit codes, to tell the noise of rounding from everything else that was done to it.

    unrounded   has no codes. An encoder and its decoder leave a value as it is; where their scales differ, because
                they do the work of operators around them, they become those operators again
    widened     has 16-bit codes, 256 for what is rounded to one code of 8 bits

Both are made of two files: the compiled model, in QDQ, and the float model as it was before its weights were quantized.
The weights of both are those of the latter, as they are or rounded to int16; biases stay float.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompiler import passes
from qcompiler.config import CompileConfig
from qcompiler.files.loader import load_model
from qcompiler.files.saver import save_model
from qcompiler.graph import constant_array
from qcompiler.lowering import add_constant, make_node
from qcompiler.numerics.activation import ActivationSpec, activation_grid, quantize_activation
from qcompiler.passes.base import PassContext

__all__ = ["unrounded", "widened"]

_MAKER = "recoding"
# Of a constant's own norm: how far its 8-bit codes may be from the float constant that they are said to be made of.
_ALIKE = 0.1
_INT16 = 32767
_STEPS = 256
# How the names of codes are made of the name of what they encode.
_SUFFIX = re.compile(r"(_vector(_\d+)?)?_codes(_\d+)?$")
Grid = tuple[float, int, np.dtype[Any]]


def unrounded(compiled: Path, folded: Path, out: Path) -> None:
    """Write a compiled model without its codes.

    Args:
        compiled: The model, in QDQ.
        folded: The float model that its weights were quantized in.
        out: Where it goes.

    Raises:
        LookupError: A constant's codes are of no constant of `folded`, or an operator reads codes that has no float
            form here.
    """
    recoder = _Recoder(compiled, folded)
    for node in recoder.nodes("DequantizeLinear"):
        if recoder.is_constant(node):
            recoder.become_identity(node, add_constant(recoder.graph, _name(node), recoder.original(node)))
        else:
            recoder.undo(node)
    recoder.save(out)


def widened(compiled: Path, folded: Path, out: Path) -> None:
    """Write a compiled model with 16-bit codes; takes and raises the same. The model has to be of opset 21."""
    recoder = _Recoder(compiled, folded)
    for node in recoder.nodes("Clip"):
        if recoder.reads_codes(node):
            recoder.widen_clip(node)
    for node in recoder.nodes("QuantizeLinear"):
        recoder.widen(node)
        dtype = node.inputs[2].dtype if node.inputs[2] is not None else None
        node.outputs[0].type = None if dtype is None else ir.TensorType(dtype)
    for node in recoder.nodes("DequantizeLinear"):
        if recoder.is_constant(node):
            recoder.widen_constant(node)
        else:
            recoder.widen(node)
    recoder.save(out)


class _Recoder:
    """A compiled model while it is rewritten."""

    def __init__(self, compiled: Path, folded: Path) -> None:
        self.model = load_model(compiled)
        self.graph = self.model.graph
        self._floats = {value.name: value for value in load_model(folded).graph.initializers.values()}
        for node in self.nodes("QuantizeLinear"):
            for reader in node.outputs[0].consumers():
                if reader.op_type not in ("Clip", "DequantizeLinear"):
                    raise LookupError(f"{reader.op_type} '{reader.name}' reads codes")

    def nodes(self, op_type: str) -> list[ir.Node]:
        """The nodes of an operator, as they are now."""
        return [node for node in self.graph if node.op_type == op_type and node.domain == ""]

    def save(self, out: Path) -> None:
        """Write the model without what nothing reads any more."""
        passes.load("cleanup")(PassContext(CompileConfig()))(self.model)
        save_model(self.model, out, force=True)

    def is_constant(self, decode: ir.Node) -> bool:
        """Whether a decoder's codes are stored."""
        return _input(decode, 0).const_value is not None

    def reads_codes(self, node: ir.Node) -> bool:
        """Whether what a node reads first comes from an encoder."""
        producer = _input(node, 0).producer()
        while producer is not None and producer.op_type == "Clip":
            producer = _input(producer, 0).producer()
        return producer is not None and producer.op_type == "QuantizeLinear"

    def original(self, decode: ir.Node) -> np.ndarray:
        """The float constant, float32, whose codes a decoder reads, in the decoder's layout."""
        codes = _input(decode, 0)
        decoded = _decoded(decode)
        found = self._floats.get(_SUFFIX.sub("", codes.name or ""))
        if found is None or found.const_value is None:
            raise LookupError(f"'{codes.name}' are codes of nothing that the float model holds")
        stored = constant_array(found).astype(np.float32)
        forms = [form for form in _layouts(stored) if form.shape == decoded.shape]
        distances = [float(np.linalg.norm(form - decoded)) for form in forms]
        if not forms or min(distances) > _ALIKE * float(np.linalg.norm(decoded)):
            raise LookupError(f"'{codes.name}' decode to something else than '{found.name}' of the float model")
        return np.ascontiguousarray(forms[int(np.argmin(distances))])

    def become_identity(self, node: ir.Node, value: ir.Value) -> None:
        """Let a node's readers have another value."""
        node.op_type = "Identity"
        node.attributes.clear()
        node.resize_inputs(1)
        node.replace_input_with(0, value)

    def undo(self, decode: ir.Node) -> None:
        """Make of a decoder what it does, with its encoder and any Clip of codes between them, but for rounding."""
        between: list[ir.Node] = []
        node = _input(decode, 0).producer()
        while node is not None and node.op_type == "Clip":
            between.append(node)
            node = _input(node, 0).producer()
        if node is None or node.op_type != "QuantizeLinear":
            raise LookupError(f"'{decode.name}' decodes what no encoder makes")
        value, (scale, zero, dtype), (last_scale, last_zero, _) = _input(node, 0), _grid(node), _grid(decode)
        if not between and (scale, zero) == (last_scale, last_zero):
            self.become_identity(decode, value)
            return
        # Codes as real numbers. Where both grids differ, saturation may stand for a Clip; what is rounded to a code is
        # within half a step of it.
        limits = np.iinfo(dtype)
        bounds = [tuple(_input(clip, index) for index in (1, 2)) for clip in reversed(between)]
        ends = [(float(constant_array(low)), float(constant_array(high))) for low, high in bounds]
        if not between and scale != last_scale and zero != last_zero:
            ends.append((limits.min - 0.5, limits.max + 0.5))
        for op_type, operands in (
            ("Div", (scale,)),
            ("Add", (zero,)),
            *(("Clip", end) for end in ends),
            ("Sub", (last_zero,)),
        ):
            value = self._before(decode, op_type, [value, *(self._number(decode, each) for each in operands)])
        decode.op_type = "Mul"
        decode.resize_inputs(2)
        decode.replace_input_with(0, value)
        decode.replace_input_with(1, self._number(decode, last_scale))

    def widen(self, node: ir.Node) -> None:
        """Give a node the 16-bit grid of the same range."""
        scale, zero, dtype = _grid(node)
        node.replace_input_with(1, self._number(node, scale / _STEPS))
        node.replace_input_with(2, add_constant(self.graph, f"{_name(node)}_zero", _wide(zero, dtype, node)))

    def widen_clip(self, clip: ir.Node) -> None:
        """Clip 16-bit codes, which only a detour by int32 can."""
        limits = [constant_array(_input(clip, index)) for index in (1, 2)]
        wide = [_wide(int(limit), limit.dtype, clip) for limit in limits]
        codes = self._before(clip, "Cast", [_input(clip, 0)], to=int(ir.DataType.INT32))
        bounds = [add_constant(self.graph, _name(clip), limit.astype(np.int32)) for limit in wide]
        cut = self._before(clip, "Clip", [codes, *bounds])
        clip.op_type = "Cast"
        clip.resize_inputs(1)
        clip.replace_input_with(0, cut)
        clip.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.from_numpy(wide[0].dtype)))
        clip.outputs[0].type = ir.TensorType(ir.DataType.from_numpy(wide[0].dtype))

    def widen_constant(self, decode: ir.Node) -> None:
        """Round a float constant to 16 bits: weights one scale a channel, others one for all; biases stay float."""
        values, stored = self.original(decode), constant_array(_input(decode, 0))
        name = _name(decode)
        if stored.dtype == np.int32:
            self.become_identity(decode, add_constant(self.graph, name, values))
            return
        scale = constant_array(_input(decode, 1))
        if scale.ndim:
            axis = decode.attributes.get_int("axis", 1)
            others = tuple(index for index in range(values.ndim) if index != axis % values.ndim)
            steps = np.abs(values).max(others, keepdims=True) / np.float32(_INT16)  # [1, ..., N, ..., 1]
            steps = np.where(steps > 0, steps, np.float32(1)).astype(np.float32)
            codes, scales = np.rint(values / steps).astype(np.int16), steps.reshape(-1)
            inputs = [add_constant(self.graph, name, array) for array in (codes, scales)]
        else:
            spec = ActivationSpec(16, signed=stored.dtype == np.int8)
            step, zero = activation_grid(float(values.min()), float(values.max()), spec)
            codes = quantize_activation(values, step, zero, spec)
            arrays = (codes, np.asarray(step, np.float32), np.asarray(zero, spec.dtype))
            inputs = [add_constant(self.graph, name, array) for array in arrays]
        decode.resize_inputs(len(inputs))
        for index, value in enumerate(inputs):
            decode.replace_input_with(index, value)

    def _before(self, node: ir.Node, op_type: str, inputs: list[ir.Value], **attributes: Any) -> ir.Value:
        made = make_node(self.graph, op_type, inputs, attributes, node, _MAKER)
        self.graph.insert_before(node, made)
        return made.outputs[0]

    def _number(self, node: ir.Node, number: float) -> ir.Value:
        return add_constant(self.graph, f"{_name(node)}_number", np.asarray(number, np.float32))


def _name(node: ir.Node) -> str:
    return node.name or node.op_type


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _grid(node: ir.Node) -> Grid:
    """Scale, zero point and type of the codes that a node makes or reads, one scale for all."""
    scale, zero = (constant_array(_input(node, index)) for index in (1, 2))
    return float(scale), int(zero), zero.dtype


def _wide(code: int, dtype: np.dtype[Any], node: ir.Node) -> np.ndarray:
    """The 16-bit code amid those for an 8-bit one."""
    if dtype == np.uint8:
        return np.asarray(code * _STEPS + _STEPS // 2, np.uint16)
    if dtype == np.int8:
        return np.asarray(code * _STEPS, np.int16)
    raise LookupError(f"'{node.name}' has codes {dtype}, which have no wide form here")


def _decoded(decode: ir.Node) -> np.ndarray:
    """What a decoder makes of stored codes, float32."""
    codes, scale = (constant_array(_input(decode, index)) for index in (0, 1))
    zero: Any = constant_array(_input(decode, 2)) if len(decode.inputs) > 2 else np.zeros((), codes.dtype)
    if scale.ndim:
        shape = [1] * codes.ndim
        shape[decode.attributes.get_int("axis", 1) % codes.ndim] = -1
        scale, zero = scale.reshape(shape), zero.reshape(shape) if zero.ndim else zero
    return np.asarray((codes.astype(np.float32) - np.float32(1) * zero.astype(np.float32)) * scale, np.float32)


def _layouts(array: np.ndarray) -> Iterator[np.ndarray]:
    """The forms in which a constant may be stored again: without leading ones, and turned."""
    yield array
    while array.ndim and array.shape[0] == 1:
        array = array[0]
        yield array
    if array.ndim == 2:
        yield array.T
