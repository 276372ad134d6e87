"""Arithmetic, comparisons, logic and casts."""

import functools
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from qcompiler.torch_graph.dtypes import FLOAT8, NARROW, TORCH_DTYPES, narrow, to_float8
from qcompiler.torch_graph.registry import Call, op, register

# Unsigned types that torch stores but hardly computes with.
_STORED_ONLY = (torch.uint16, torch.uint32, torch.uint64)


def _widened(function: Callable[..., Tensor], keeps_type: bool = True) -> Callable[..., Tensor]:
    """The function on int64 where torch does not compute with the type of its first input; low bits are right."""

    @functools.wraps(function)
    def wrapped(call: Call, *inputs: Tensor | None) -> Tensor:
        first = next(value for value in inputs if value is not None)
        if first.dtype not in _STORED_ONLY:
            return function(call, *inputs)
        wide = (x.to(torch.int64) if x is not None and x.dtype in _STORED_ONLY else x for x in inputs)
        result = function(call, *wide)
        return result.to(first.dtype) if keeps_type else result

    return wrapped


_UNARY = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitwiseNot": torch.bitwise_not,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "Identity": lambda x: x,
    "Log": torch.log,
    "Neg": torch.neg,
    "Reciprocal": torch.reciprocal,
    "Round": torch.round,  # half to even
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
}
# Attributes of operators before version 7 (`axis`, `broadcast`) line shapes up in another way.
_BINARY = {
    "Add": torch.add,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "Mul": torch.mul,
    "Sub": torch.sub,
}
_COMPARE = {
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
}
_LOGIC = {"And": torch.logical_and, "Or": torch.logical_or, "Xor": torch.logical_xor}


def _plain(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function of a node without attributes."""
    return lambda _, *inputs: function(*inputs)


for _name, _function in _UNARY.items():
    register(_widened(_plain(_function)), _name)
for _name, _function in _BINARY.items():
    register(_widened(_plain(_function)), _name, since=7)
for _name, _function in _COMPARE.items():
    register(_widened(_plain(_function), keeps_type=False), _name, since=7)
for _name, _function in _LOGIC.items():
    register(_plain(_function), _name, since=7)
register(_plain(torch.logical_not), "Not")
register(_plain(torch.isnan), "IsNaN")


@op("Div", since=7)
def _div(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return _widened(_divide)(call, x, y)


def _divide(_: Call, x: Tensor, y: Tensor) -> Tensor:
    """Integers lose their fraction."""
    return torch.div(x, y) if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


@op("Mod")
def _mod(call: Call, x: Tensor, y: Tensor) -> Tensor:
    function = torch.fmod if call.get("fmod", 0) else torch.remainder
    return _widened(_plain(function))(call, x, y)


@op("Pow", since=7)
def _pow(call: Call, x: Tensor, y: Tensor) -> Tensor:
    """The result is of the base's type, whatever the exponent's."""
    if y.numel() == 1 and not y.requires_grad and x.is_floating_point() and y.ndim <= x.ndim:
        return torch.pow(x, y.item())  # the gradient of an exponent that is 2 needs no logarithm
    wide = (value.to(torch.int64) if value.dtype in _STORED_ONLY else value for value in (x, y))
    return torch.pow(*wide).to(x.dtype)


@op("BitShift")
def _bit_shift(call: Call, x: Tensor, y: Tensor) -> Tensor:
    shift = torch.bitwise_left_shift if call.get("direction") == "LEFT" else torch.bitwise_right_shift
    return _widened(_plain(shift))(call, x, y)


@op("Max", since=8)
def _max(call: Call, *inputs: Tensor) -> Tensor:
    return functools.reduce(functools.partial(_widened(_plain(torch.maximum)), call), inputs)


@op("Min", since=8)
def _min(call: Call, *inputs: Tensor) -> Tensor:
    return functools.reduce(functools.partial(_widened(_plain(torch.minimum)), call), inputs)


@op("Sum", since=8)
def _sum(_: Call, *inputs: Tensor) -> Tensor:
    return functools.reduce(torch.add, inputs)


@op("Mean", since=8)
def _mean(_: Call, *inputs: Tensor) -> Tensor:
    return functools.reduce(torch.add, inputs) / len(inputs)


@op("Clip", since=11)
def _clip(call: Call, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    return _widened(_limit)(call, x, low, high)


def _limit(_: Call, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    return x if low is None and high is None else torch.clamp(x, low, high)


@op("Clip", since=1)
def _clip_attributes(call: Call, x: Tensor) -> Tensor:
    low, high = call.get("min"), call.get("max")
    return x if low is None and high is None else x.clamp(low, high)


@op("Where")
def _where(_: Call, condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return torch.where(condition, x, y)


@op("IsInf")
def _is_inf(call: Call, x: Tensor) -> Tensor:
    up = torch.isposinf(x) if call.get("detect_positive", 1) else torch.zeros_like(x, dtype=torch.bool)
    return up | torch.isneginf(x) if call.get("detect_negative", 1) else up


@op("Dropout", since=1)
def _dropout_test(_: Call, x: Tensor) -> tuple[Tensor, Tensor]:
    return x, torch.ones_like(x, dtype=torch.bool)


@op("Dropout", since=12)
def _dropout(
    call: Call, x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if training is not None and bool(training) and (ratio is None or float(ratio) != 0):
        raise call.error("training_mode is on; only inference is implemented")
    return x, torch.ones_like(x, dtype=torch.bool)


def cast(x: Tensor, kind: ir.DataType, saturate: bool = True) -> Tensor:
    """Values as another type; where torch stores less exactly than ONNX, as ONNX has it.

    Args:
        x: Any type.
        kind: Target type.
        saturate: Whether 8-bit floats stop at their largest number in the place of overflowing.

    Returns:
        The tensor.
    """
    if kind in NARROW:
        return narrow(x, kind)
    if kind in FLOAT8:
        return to_float8(x, kind, saturate)
    dtype: Any = TORCH_DTYPES[kind]
    if dtype in _STORED_ONLY and x.is_floating_point():
        return x.to(torch.int64).to(dtype)
    return x.to(dtype)


def _cast_refusal(call: Call) -> str:
    kind = call.kind("to")
    return "" if kind in TORCH_DTYPES else f"casts to {kind.name} are not implemented"


@op("Cast", since=6, refuses=_cast_refusal)
def _cast(call: Call, x: Tensor) -> Tensor:
    return cast(x, call.kind("to"), bool(call.get("saturate", 1)))


@op("CastLike")
def _cast_like(call: Call, x: Tensor, like: Tensor) -> Tensor:
    kind = call.input_kind(1)
    if kind is None:
        kind = next(kind for kind, dtype in TORCH_DTYPES.items() if dtype == like.dtype and kind not in NARROW)
    return cast(x, kind, bool(call.get("saturate", 1)))
