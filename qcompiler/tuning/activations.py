"""Quantized activations in training: fake quantizers in the place of QuantizeLinear, Clip and DequantizeLinear.

QuantizeLinear gives the values of its codes at once, and the Clip and the DequantizeLinear behind it pass them on. For
signs (see `numerics.activation`) QuantizeLinear gives the signs, and DequantizeLinear multiplies them by the scale.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qcompiler.graph import constant_array
from qcompiler.tuning import binary, lsq, pact, qat
from qcompiler.tuning.directions import Direction
from qcompiler.tuning.learned import Learned, Parameter

__all__ = ["LearnedScale", "Quantizer", "Switch", "find_quantizers", "quantizer_functions"]

# No scale becomes smaller than this share of where it began.
_SMALLEST = 0.05


@dataclass(frozen=True)
class Quantizer:
    """What quantizes one activation.

    Attributes:
        encode: QuantizeLinear.
        clip: The Clip of its codes, if they are narrower than their type.
        decodes: DequantizeLinear, one for each reader.
        scale: The value that holds the scale of what is decoded.
        low: The lowest code, counted from the zero point.
        high: The highest.
    """

    encode: ir.Node
    clip: ir.Node | None
    decodes: tuple[ir.Node, ...]
    scale: ir.Value
    low: int
    high: int

    @property
    def signs(self) -> bool:
        """Whether codes are signs: divided by another scale than they are multiplied by."""
        return self.encode.inputs[1] is not self.scale


@dataclass
class Switch:
    """Whether activations are quantized: what teaches has to run without."""

    on: bool = True


class LearnedScale(Learned):
    """The scale of an activation, a scalar."""

    def __init__(self, name: str, scale: float, direction: Callable[[], Direction]) -> None:
        """Begin at the calibrated scale."""
        super().__init__(name, {"step": Parameter(torch.tensor(scale), scale, kind="scale")}, direction)

    def form(self, parameters: Mapping[str, Tensor], *, training: bool) -> Tensor:
        """The scale."""
        del training
        return parameters["step"]

    def settle(self) -> None:
        """Scales stay positive."""
        step = self.parameters["step"]
        step.tensor.clamp_(min=_SMALLEST * float(step.unit))


def find_quantizers(nodes: Iterable[ir.Node]) -> list[Quantizer]:
    """Everything among the nodes that makes codes of an activation with one constant scale, and its readers."""
    return [found for node in nodes if node.op_type == "QuantizeLinear" for found in _quantizer(node)]


def _quantizer(encode: ir.Node) -> Iterator[Quantizer]:
    """The quantizer that begins at a node, if there is one."""
    parameters = _constants(encode, 2)
    if len(parameters) < 2 or any(array.size != 1 for array in parameters):
        return
    zero = parameters[1]
    if not np.issubdtype(zero.dtype, np.integer):
        return
    limits = np.iinfo(zero.dtype)
    low, high, codes, clip = int(limits.min), int(limits.max), encode.outputs[0], None
    readers = [use.node for use in codes.uses()]
    if len(readers) == 1 and readers[0].op_type == "Clip":
        clip, codes = readers[0], readers[0].outputs[0]
        low, high = (int(array) for array in _constants(clip, 2))
        readers = [use.node for use in codes.uses()]
    if readers and all(node.op_type == "DequantizeLinear" for node in readers) and not codes.is_graph_output():
        scale = readers[0].inputs[1]
        assert scale is not None
        yield Quantizer(encode, clip, tuple(readers), scale, low - int(zero), high - int(zero))


def _constants(node: ir.Node, count: int) -> list[np.ndarray]:
    """The inputs of a node behind its first that are constants, up to a number of them."""
    return [constant_array(value) for value in node.inputs[1 : 1 + count] if value is not None and value.const_value]


def quantizer_functions(
    quantizers: Iterable[Quantizer], method: str, switch: Switch
) -> dict[ir.Node, Callable[..., Any]]:
    """What stands in the place of the nodes of quantizers; see `TorchGraph`.

    Args:
        quantizers: Those of the graph.
        method: "lsq", "pact", or "qat": how gradients go through them.
        switch: Turns them on and off.
    """
    functions: dict[ir.Node, Callable[..., Any]] = {}
    for each in quantizers:
        functions[each.encode] = _encoder(each, method, switch)
        if each.clip is not None:
            functions[each.clip] = lambda call, codes, *limits: codes
        for node in each.decodes:
            functions[node] = _sign_decoder(switch) if each.signs else lambda call, values, *grid: values
    return functions


def _encoder(each: Quantizer, method: str, switch: Switch) -> Callable[..., Tensor]:
    low, high = each.low, each.high

    def encode(call: Any, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        del call, zero
        if not switch.on:
            return x
        if each.signs:
            codes = torch.clamp(torch.round(x.detach() / scale), low, high)
            return qat.passing(codes, binary.sign_activations(x))
        scale = scale.to(x.dtype)
        if method == "lsq":
            return lsq.learned_step(x, scale, low, high, lsq.gradient_scale(max(x[0].numel(), 1), high))
        if method == "pact":
            return pact.clipped(x, scale, low, high)
        return qat.fake_quantize(x, scale, torch.zeros_like(scale), low, high)

    return encode


def _sign_decoder(switch: Switch) -> Callable[..., Tensor]:
    def decode(call: Any, signs: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        del call, zero
        return signs * scale if switch.on else signs

    return decode
