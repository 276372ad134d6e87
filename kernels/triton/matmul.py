"""Y = A W^T + bias on a GPU, for every operator of `schemas`: one kernel for a row of activations, one for many.

Codes of a row are a stream of bits in which eight of them, an *octet*, are whole bytes. A group holds whole octets, so
that an octet has one scale, and a word that is loaded at once has all of its codes:

    matmul_row    a program multiplies one row of A with BLOCK_N rows of W, all in float32: reading W is what it costs
    matmul_tile   a program makes BLOCK_M x BLOCK_N of Y, decoding W once for all of its rows, on tensor cores: of
                  float16 with float16 factors, of float32 in three products of TF32 each, both summed up in float32

Rows past N (and M) are the last row again, and are not stored. Octets past the last of a row are not loaded; columns
past K count for nothing. Entries of tables are looked up where they are, whatever the starts say. Both kernels take the
same arguments whatever the operator is, so that one launcher serves all.
"""

import triton
import triton.language as tl

__all__ = ["ARGUMENTS", "matmul_row", "matmul_tile"]

# What the launcher passes, in this order, and Triton's names of the types; T is float32 or float16.
ARGUMENTS = {
    "a": "*T",  # [M, K]
    "b": "*u8",  # [N, octets of a row, bits]
    "scales": "*T",  # [N, groups]
    "values": "*T",  # tables [entries, ENTRY], or zero points of type T
    "zero_codes": "*u8",  # zero points of type uint8
    "starts": "*i32",  # [N] or [1], the first entry of each row's table
    "bias": "*T",  # [N] or [1]
    "y": "*T",  # [M, N]
    "M": "i32",
    "N": "i32",
    "K": "i32",
    "groups": "i32",  # of a row
    "octets": "i32",  # of a group
    "entries": "i32",  # of all tables
    "zeros_are_codes": "i32",  # whether zero points are of type uint8
    "zero_step": "i32",  # 1 where each group has a zero point, 0 where all share one
    "start_step": "i32",  # 1 where each row has a start
    "bias_step": "i32",  # 1 where each row has a bias
}


@triton.jit
def _codes(b, place, inside, BITS: tl.constexpr):
    """Codes int32 [N, O, 8] of the octets [N, O], whose places are counted from the start of the weight."""
    one = tl.arange(0, 8)[None, None, :]
    if BITS == 8:
        return tl.load(b + place[:, :, None] * 8 + one, mask=inside[:, :, None], other=0).to(tl.int32)
    if BITS == 1:
        word = tl.load(b + place, mask=inside, other=0).to(tl.int32)
    elif BITS == 2:
        word = tl.load(b.to(tl.pointer_type(tl.uint16)) + place, mask=inside, other=0).to(tl.int32)
    elif BITS == 3:
        low = tl.load(b + place * 3, mask=inside, other=0).to(tl.int32)
        middle = tl.load(b + place * 3 + 1, mask=inside, other=0).to(tl.int32)
        high = tl.load(b + place * 3 + 2, mask=inside, other=0).to(tl.int32)
        word = low | (middle << 8) | (high << 16)
    else:
        word = tl.load(b.to(tl.pointer_type(tl.int32)) + place, mask=inside, other=0)
    return (word[:, :, None] >> (one * BITS)) & ((1 << BITS) - 1)


@triton.jit
def _weight(
    b, scales, values, zero_codes, starts, row, octet, groups, octets, entries, zeros_are_codes, zero_step, start_step,
    KIND: tl.constexpr, BITS: tl.constexpr, ENTRY: tl.constexpr,
):  # fmt: skip
    """Values float32 [N, O, 8 * ENTRY] of some octets [O] of rows [N] of the weight; 0 past the end of a row."""
    inside = (row[:, None] >= 0) & (octet < groups * octets)[None, :]
    place = row.to(tl.int64)[:, None] * (groups * octets) + octet[None, :]
    group = row.to(tl.int64)[:, None] * groups + (octet // octets)[None, :]
    scale = tl.load(scales + group, mask=inside, other=0).to(tl.float32)
    codes = _codes(b, place, inside, BITS)
    if KIND == "uniform":
        if zeros_are_codes:
            zero = tl.load(zero_codes + group * zero_step, mask=inside, other=0).to(tl.float32)
        else:
            zero = tl.load(values + group * zero_step, mask=inside, other=0).to(tl.float32)
        value = codes.to(tl.float32) - zero[:, :, None]
    elif KIND == "signs":
        value = (2 * codes - 1).to(tl.float32)
    else:
        entry = tl.load(starts + row * start_step)[:, None, None] + codes
        entry = tl.minimum(tl.maximum(entry, 0), entries - 1)
        if ENTRY == 1:
            value = tl.load(values + entry).to(tl.float32)
        else:
            column = tl.arange(0, ENTRY)[None, None, None, :]
            vectors = tl.load(values + entry[:, :, :, None] * ENTRY + column).to(tl.float32)
            value = tl.reshape(vectors, [codes.shape[0], codes.shape[1], 8 * ENTRY])
    return value * scale[:, :, None]


@triton.jit
def matmul_row(
    a, b, scales, values, zero_codes, starts, bias, y, M, N, K, groups, octets, entries, zeros_are_codes, zero_step,
    start_step, bias_step,
    KIND: tl.constexpr, BITS: tl.constexpr, ENTRY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Rows [BLOCK_N] of W times the row of A that the second number of a program names."""
    m = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1)
    x = a + m.to(tl.int64) * K
    total = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
    size = tl.zeros([BLOCK_O], tl.float32)
    for first in range(0, groups * octets, BLOCK_O):
        octet = first + tl.arange(0, BLOCK_O)
        w = _weight(
            b, scales, values, zero_codes, starts, row, octet, groups, octets, entries, zeros_are_codes, zero_step,
            start_step, KIND, BITS, ENTRY,
        )  # fmt: skip
        k = octet[:, None] * (8 * ENTRY) + tl.arange(0, 8 * ENTRY)[None, :]
        factor = tl.load(x + k, mask=k < K, other=0).to(tl.float32)
        if KIND == "signs":
            size += tl.sum(tl.abs(factor), axis=1)
            factor = tl.where(factor >= 0, 1.0, -1.0)
        product = tl.where((k < K)[None, :, :], w * factor[None, :, :], 0.0)
        total += tl.sum(product, axis=2)
    result = tl.sum(total, axis=1)
    if KIND == "signs":
        result = result * (tl.sum(size, axis=0) / K)
    result += tl.load(bias + row * bias_step).to(tl.float32)
    tl.store(y + m.to(tl.int64) * N + n, result.to(y.dtype.element_ty), mask=n < N)


@triton.jit
def matmul_tile(
    a, b, scales, values, zero_codes, starts, bias, y, M, N, K, groups, octets, entries, zeros_are_codes, zero_step,
    start_step, bias_step,
    KIND: tl.constexpr, BITS: tl.constexpr, ENTRY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Rows [BLOCK_M] of A times rows [BLOCK_N] of W."""
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1)
    x = a + tl.minimum(m, M - 1).to(tl.int64)[:, None] * K
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    size = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, groups * octets, BLOCK_O):
        octet = first + tl.arange(0, BLOCK_O)
        w = _weight(
            b, scales, values, zero_codes, starts, row, octet, groups, octets, entries, zeros_are_codes, zero_step,
            start_step, KIND, BITS, ENTRY,
        )  # fmt: skip
        k = first * (8 * ENTRY) + tl.arange(0, BLOCK_O * 8 * ENTRY)
        factor = tl.load(x + k[None, :], mask=(k < K)[None, :], other=0)
        if KIND == "signs":
            size += tl.sum(tl.abs(factor.to(tl.float32)), axis=1)
            factor = tl.where(factor >= 0, 1.0, -1.0).to(a.dtype.element_ty)
        w = tl.where((k < K)[None, :], tl.reshape(w, [BLOCK_N, BLOCK_O * 8 * ENTRY]), 0.0)
        total = tl.dot(factor, tl.trans(w.to(a.dtype.element_ty)), total, input_precision="tf32x3")
    if KIND == "signs":
        total = total * (size / K)[:, None]
    total += tl.load(bias + row * bias_step).to(tl.float32)[None, :]
    place = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
