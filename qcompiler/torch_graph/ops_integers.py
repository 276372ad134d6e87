"""Products of integers."""

import torch
from torch import Tensor

from qcompiler.torch_graph.dtypes import TORCH_DTYPES
from qcompiler.torch_graph.ops_convolution import convolve
from qcompiler.torch_graph.ops_quantization import along, encode
from qcompiler.torch_graph.registry import Call, op

# Products of 8-bit codes summed in double precision are exact up to 2**37 terms, and torch has fast kernels for them.
_EXACT = torch.float64


def _centred(codes: Tensor, zero_point: Tensor | None, axis: int) -> Tensor:
    """Codes less their zero point; one for each entry of `axis` if there are several."""
    values = codes.to(_EXACT)
    if zero_point is None:
        return values
    fitted = zero_point if zero_point.ndim > 1 else along(zero_point, codes, axis, 0)
    return values - fitted.to(_EXACT)


@op("MatMulInteger")
def _mat_mul_integer(
    _: Call, a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None
) -> Tensor:
    return torch.matmul(_centred(a, a_zero, -2), _centred(b, b_zero, -1)).to(torch.int32)


@op("ConvInteger")
def _conv_integer(
    call: Call, x: Tensor, weight: Tensor, x_zero: Tensor | None = None, weight_zero: Tensor | None = None
) -> Tensor:
    return convolve(call, _centred(x, x_zero, 1), _centred(weight, weight_zero, 0)).to(torch.int32)


def _requantized(total: Tensor, factor: Tensor, zero: Tensor) -> Tensor:
    kind = next(kind for kind, dtype in TORCH_DTYPES.items() if dtype == zero.dtype and kind.itemsize == 1)
    return encode(total * factor, zero, kind)


@op("QLinearMatMul")
def _q_linear_mat_mul(  # the operator has eight inputs
    _: Call,
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
) -> Tensor:
    total = torch.matmul(_centred(a, a_zero, -2), _centred(b, b_zero, -1))
    rows = a_scale if a_scale.ndim > 1 else along(a_scale, total, -2, 0)
    columns = b_scale if b_scale.ndim > 1 else along(b_scale, total, -1, 0)
    return _requantized(total, rows.to(_EXACT) * columns / y_scale, y_zero)


@op("QLinearConv")
def _q_linear_conv(
    call: Call,
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    total = convolve(call, _centred(x, x_zero, 1), _centred(weight, weight_zero, 0))
    if bias is not None:
        total = total + along(bias.to(_EXACT), total, 1, 0)
    return _requantized(total, x_scale.to(_EXACT) * along(weight_scale, total, 1, 0) / y_scale, y_zero)
