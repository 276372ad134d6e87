"""QuantizeLinear and its relatives: rounding is half to even, and integers saturate.

A decoder takes codes of any type, so that a float tensor of soft codes can stand in their place and get a gradient.
"""

import onnx_ir as ir
import torch
from torch import Tensor

from qcompiler.torch_graph.dtypes import FLOAT8, NARROW, TORCH_DTYPES, to_float8
from qcompiler.torch_graph.registry import Call, op

__all__ = ["along", "encode", "integer_limits"]


def integer_limits(kind: ir.DataType) -> tuple[int, int]:
    """The lowest and the highest number of an integer type."""
    if kind in NARROW:
        bits, signed = NARROW[kind]
        return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    info = torch.iinfo(TORCH_DTYPES[kind])
    return info.min, info.max


def along(parameter: Tensor, x: Tensor, axis: int, block_size: int) -> Tensor:
    """A scale or zero point in a shape that fits x: one for all, for each entry of `axis`, or for each block of it."""
    if parameter.numel() == 1 and parameter.ndim <= 1:
        return parameter.reshape(())
    axis %= x.ndim
    if block_size:
        return parameter.repeat_interleave(block_size, axis).narrow(axis, 0, x.shape[axis])
    return parameter.reshape([-1 if at == axis else 1 for at in range(x.ndim)])


def encode(scaled: Tensor, zero_point: Tensor | None, kind: ir.DataType, saturate: bool = True) -> Tensor:
    """Codes of values that are divided by their scale already."""
    if kind in FLOAT8:
        return to_float8(scaled, kind, saturate)
    codes = torch.round(scaled)
    if zero_point is not None:
        codes = codes + zero_point.to(codes.dtype)
    return codes.clamp(*integer_limits(kind)).to(torch.int32).to(TORCH_DTYPES[kind])


def _refusal(call: Call) -> str:
    """QuantizeLinear and DequantizeLinear: types and precisions that are not implemented."""
    for name in ("output_dtype", "precision"):
        if call.get(name) and call.kind(name) not in TORCH_DTYPES:
            return f"{name}={call.kind(name).name} is not implemented"
    return ""


def _code_kind(call: Call, zero_point: Tensor | None) -> ir.DataType:
    if call.get("output_dtype"):
        return call.kind("output_dtype")
    if zero_point is None:
        return ir.DataType.UINT8
    declared = call.input_kind(2)
    if declared in NARROW:
        return declared
    return next(kind for kind, dtype in TORCH_DTYPES.items() if dtype == zero_point.dtype and kind not in NARROW)


@op("QuantizeLinear", refuses=_refusal)
def _quantize_linear(call: Call, x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    axis, block_size = call.get("axis", 1), call.get("block_size", 0)
    kind = _code_kind(call, zero_point)
    precision = call.dtype("precision", torch.float32 if scale.dtype != torch.float64 else scale.dtype)
    fitted = along(scale, x, axis, block_size)
    zero = None if zero_point is None else along(zero_point, x, axis, block_size)
    return encode(x.to(precision) / fitted.to(precision), zero, kind, bool(call.get("saturate", 1)))


@op("DequantizeLinear", refuses=_refusal)
def _dequantize_linear(call: Call, codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    axis, block_size = call.get("axis", 1), call.get("block_size", 0)
    wide = torch.promote_types(scale.dtype, torch.float32)
    values = codes.to(wide)
    if zero_point is not None and zero_point.dtype not in FLOAT8.values():
        values = values - along(zero_point.to(wide), codes, axis, block_size)
    return (values * along(scale, codes, axis, block_size).to(wide)).to(call.dtype("output_dtype", scale.dtype))


@op("DynamicQuantizeLinear")
def _dynamic_quantize_linear(_: Call, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.round((-low / scale).clamp(0, 255)).to(torch.uint8)
    return encode(x / scale, zero, ir.DataType.UINT8), scale, zero
