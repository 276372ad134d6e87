"""Block-quantized weights of ONNX Runtime; `numerics.packing` describes the layouts."""

import torch
from torch import Tensor

from qcompiler.torch_graph.dtypes import NARROW
from qcompiler.torch_graph.ops_indexing import gather
from qcompiler.torch_graph.registry import MICROSOFT, Call, op


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """uint8 [..., bytes] -> codes [..., bytes * 8 / bits], low bits first."""
    if bits == 8:
        return packed
    lanes = torch.arange(0, 8, bits, dtype=torch.uint8)
    return ((packed.unsqueeze(-1) >> lanes) & ((1 << bits) - 1)).flatten(-2)


def _mat_mul_refusal(call: Call) -> str:
    if call.has_input(4):
        return "g_idx is not implemented"
    return "" if call.get("bits", 4) in (2, 4, 8) else f"bits={call.get('bits')} is not implemented, only 2, 4, 8"


@op("MatMulNBits", domain=MICROSOFT, knows="K N bits block_size accuracy_level", refuses=_mat_mul_refusal)
def _mat_mul_nbits(
    call: Call,
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    _: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    # `accuracy_level` allows a kernel to round the activations to 8 bits; here they stay as they are.
    rows, columns = call.get("N"), call.get("K")
    bits, size = call.get("bits", 4), call.get("block_size")
    groups = -(-columns // size)
    scale = scale.reshape(rows, groups, 1)
    # A float tensor of codes may stand in the place of the packed ones.
    codes = packed if packed.is_floating_point() else _unpacked(packed.reshape(rows, -1), bits)
    values = codes.reshape(rows, groups, size).to(scale.dtype)
    if zero_point is None:
        zero: Tensor | int = 1 << (bits - 1)
    elif zero_point.is_floating_point():
        zero = zero_point.reshape(rows, groups, 1)
    else:
        zero = _unpacked(zero_point.reshape(rows, -1), bits)[:, :groups, None].to(scale.dtype)
    weight = ((values - zero) * scale).reshape(rows, -1)[:, :columns]  # [N, K]
    product = torch.matmul(x, weight.T.to(x.dtype))
    return product if bias is None else product + bias


@op("GatherBlockQuantized", domain=MICROSOFT, knows="gather_axis quantize_axis block_size bits")
def _gather_block_quantized(
    call: Call, data: Tensor, indices: Tensor, scale: Tensor, zero_point: Tensor | None = None
) -> Tensor:
    kind, bits = call.input_kind(0), call.get("bits", 4)
    narrow = kind in NARROW
    axis, quantized = call.get("gather_axis", 0), call.get("quantize_axis", 1) % data.ndim
    block = call.get("block_size", 128)
    middle = 0
    if not narrow:  # uint8 holds packed codes, their zero in the middle; floats may stand in their place
        middle = 1 << (bits - 1)
        data = data if data.is_floating_point() else _unpacked(data, bits)
        if zero_point is not None and not zero_point.is_floating_point():
            zero_point = _unpacked(zero_point, bits).narrow(-1, 0, scale.shape[-1])
    axis %= data.ndim
    chosen = gather(data, indices, axis)
    # Blocks run along `quantize_axis`, which is not the gathered one.
    shifted = quantized if quantized < axis else quantized + indices.ndim - 1
    factor = gather(scale, indices, axis).repeat_interleave(block, shifted).narrow(shifted, 0, chosen.shape[shifted])
    values = chosen.to(scale.dtype)
    if zero_point is None:
        return (values - middle) * factor
    zero = gather(zero_point, indices, axis).repeat_interleave(block, shifted)
    return (values - zero.narrow(shifted, 0, chosen.shape[shifted]).to(scale.dtype)) * factor
