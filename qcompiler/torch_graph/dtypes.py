"""Tensors between onnx_ir and torch; torch has no integers below a byte, they live in int8 and uint8."""

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qcompiler.errors import KernelError

__all__ = ["FLOAT8", "NARROW", "TORCH_DTYPES", "as_numpy", "from_numpy", "narrow", "to_float8", "to_torch"]

_D = ir.DataType
FLOAT8 = {
    _D.FLOAT8E4M3FN: torch.float8_e4m3fn,
    _D.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    _D.FLOAT8E5M2: torch.float8_e5m2,
    _D.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
}
# The least magnitude that rounds to more than the largest number, of the types that have no infinity.
_FLOAT8_OVERFLOW = {
    _D.FLOAT8E4M3FN: float(np.nextafter(np.float32(464), np.float32(465))),  # 464 itself lies half-way, to even
    _D.FLOAT8E4M3FNUZ: 248.0,
    _D.FLOAT8E5M2FNUZ: 61440.0,
}
# Integers that are held in a wider torch type: (bits, signed).
NARROW = {_D.INT4: (4, True), _D.UINT4: (4, False)}
if hasattr(_D, "INT2"):  # onnx_ir before 0.1.13 does not know them
    NARROW |= {_D.INT2: (2, True), _D.UINT2: (2, False)}
TORCH_DTYPES: dict[ir.DataType, Any] = {
    _D.FLOAT: torch.float32,
    _D.DOUBLE: torch.float64,
    _D.FLOAT16: torch.float16,
    _D.BFLOAT16: torch.bfloat16,
    _D.BOOL: torch.bool,
    _D.INT8: torch.int8,
    _D.INT16: torch.int16,
    _D.INT32: torch.int32,
    _D.INT64: torch.int64,
    _D.UINT8: torch.uint8,
    _D.UINT16: torch.uint16,
    _D.UINT32: torch.uint32,
    _D.UINT64: torch.uint64,
    **FLOAT8,
    **{kind: torch.int8 if signed else torch.uint8 for kind, (_, signed) in NARROW.items()},
}


class _Writable:
    """Shows a read-only array as a writable one, since torch warns of what it might write to; nothing here writes."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array  # owns the memory
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def from_numpy(array: np.ndarray, dtype: ir.DataType | None = None) -> Tensor:
    """A tensor of the array's memory where torch can use it as it lies, of a copy where it cannot.

    Args:
        array: Any numeric array, the types of ml_dtypes included.
        dtype: What the array holds, where its own dtype does not tell.

    Returns:
        The tensor; integers below a byte become int8 or uint8.

    Raises:
        KernelError: The type has no counterpart in torch.
    """
    kind = dtype or _D.from_numpy(array.dtype)
    if kind not in TORCH_DTYPES:
        raise KernelError(f"tensors of {kind.name} cannot be held by PyTorch")
    if kind in NARROW:
        return torch.from_numpy(np.array(array, np.int8 if NARROW[kind][1] else np.uint8))
    array = np.require(array, requirements=("C_CONTIGUOUS", "ALIGNED"))
    if kind == _D.BFLOAT16 or kind in FLOAT8:
        array = array.view(np.int16 if kind == _D.BFLOAT16 else np.uint8)
    if not array.flags.writeable:
        array = np.asarray(_Writable(array)) if array.size else array.copy()
    return torch.from_numpy(array).view(TORCH_DTYPES[kind])


def to_torch(tensor: ir.TensorProtocol) -> Tensor:
    """The values of an onnx_ir tensor."""
    return from_numpy(np.asarray(tensor.numpy()), tensor.dtype)


def as_numpy(values: Tensor) -> np.ndarray:
    """A tensor as an array, of its memory where that is possible; numpy has no bfloat16, which becomes float32."""
    return np.asarray((values.float() if values.dtype == torch.bfloat16 else values).contiguous().cpu().numpy())


def narrow(values: Tensor, kind: ir.DataType) -> Tensor:
    """Whole numbers as an integer type below a byte holds them: its low bits count."""
    bits, signed = NARROW[kind]
    low = values.to(torch.int32) & ((1 << bits) - 1)
    if signed:
        low = low - ((low >> (bits - 1)) << bits)
    return low.to(TORCH_DTYPES[kind])


def to_float8(values: Tensor, kind: ir.DataType, saturate: bool) -> Tensor:
    """Values as 8-bit floats; what is too large becomes the largest one, or else infinite or not a number."""
    dtype = FLOAT8[kind]
    wide = values.to(torch.float32)
    if saturate:
        largest = torch.finfo(dtype).max
        return wide.clamp(-largest, largest).to(dtype)
    if kind in _FLOAT8_OVERFLOW:  # torch itself may stop at the largest number
        wide = wide.masked_fill(wide.abs() >= _FLOAT8_OVERFLOW[kind], float("nan"))
    return wide.to(dtype)
