"""Bit packing and the memory layouts of ONNX Runtime's block-quantized operators.

A code takes the bits of its format's container, 3-bit codes those of 4-bit ones. Where `bits` below counts bytes, it is
the container's width.

MatMulNBits (com.microsoft) reads, for a weight of N rows and K columns in blocks of `block_size`:

* ``B``           uint8 ``[N, ceil(K / block_size), block_size * bits / 8]``, low bits first; the ragged last block is
  padded;
* ``scales``      ``[N, ceil(K / block_size)]`` of the activation's dtype;
* ``zero_points`` uint8 ``[N, ceil(ceil(K / block_size) * bits / 8)]``, each row packed on its own, low bits first.

GatherBlockQuantized with uint8 data reads the same bytes as ``[N, K * bits / 8]``. Without zero points both take the
middle of the container for zero, 8 at 4 bits: see `centred`.

DequantizeLinear reads integer tensors: codes ``[K, N]`` for a MatMul, unsigned with zero points or signed without. ONNX
packs integers below a byte in row-major order, low bits first; a row may begin within a byte.

The operators of `qcompiler.kernels` read a stream of bits for each group, just as many as its codes have: see
`pack_stream`.
"""

import numpy as np

from qcompiler.numerics.formats import int_format

__all__ = [
    "centred",
    "integer_codes",
    "pack_codes",
    "pack_matmul_nbits",
    "pack_rows",
    "pack_stream",
    "transpose_packed",
    "unpack_codes",
    "unpack_stream",
]

# Columns that `transpose_packed` turns at a time: whole bytes at any width, and few enough to stay in the cache.
_COLUMNS = 128


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes low bits first along the last axis, padding the last byte with zero bits.

    Args:
        codes: uint8 ``[..., K]`` with values below ``2**bits``.
        bits: 2, 3, 4 or 8.

    Returns:
        uint8 ``[..., ceil(K * bits / 8)]``; 3-bit codes take 4 bits.
    """
    fmt = int_format(bits)
    per_byte = fmt.codes_per_byte
    if per_byte == 1:
        return np.ascontiguousarray(codes)
    ragged = -codes.shape[-1] % per_byte
    if ragged:
        codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, ragged)])
    packed: np.ndarray = codes[..., 0::per_byte].copy()  # [..., K / per_byte]
    for lane in range(1, per_byte):
        packed |= codes[..., lane::per_byte] << (lane * fmt.container)
    return packed


def unpack_codes(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Invert `pack_codes`.

    Args:
        packed: uint8 ``[..., ceil(count * bits / 8)]``.
        bits: 2, 3, 4 or 8.
        count: Number of codes in a row, K.

    Returns:
        uint8 ``[..., count]``.
    """
    fmt = int_format(bits)
    if fmt.codes_per_byte == 1:
        return packed[..., :count]
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * fmt.codes_per_byte), np.uint8)
    for lane in range(fmt.codes_per_byte):
        np.bitwise_and(packed >> (lane * fmt.container), fmt.qmax, out=codes[..., lane :: fmt.codes_per_byte])
    return codes[..., :count]


def centred(packed: np.ndarray, bits: int) -> np.ndarray:
    """Move packed codes of a symmetric grid so that their middle is that of the container.

    Args:
        packed: uint8 ``[..., ceil(K * bits / 8)]`` from `pack_codes`.
        bits: Width of the codes: 2, 3, 4 or 8.

    Returns:
        uint8, the same shape, packed codes of the container's width; `packed` itself where the middles are the same.
    """
    fmt = int_format(bits)
    if not fmt.shift:
        return packed
    # No code reaches the end of its container so, and none is carried into the next: one addition moves all of a byte.
    every = sum(fmt.shift << (lane * fmt.container) for lane in range(fmt.codes_per_byte))
    moved: np.ndarray = packed + np.uint8(every)
    return moved


def pack_matmul_nbits(packed: np.ndarray, bits: int, columns: int, block_size: int, pad_code: int) -> np.ndarray:
    """Lay packed codes out as MatMulNBits' input B.

    Args:
        packed: uint8 ``[N, ceil(K * bits / 8)]`` from `pack_codes`.
        bits: 2, 3, 4 or 8.
        columns: K.
        block_size: Codes in a block.
        pad_code: The code that fills a ragged last block; its value is never multiplied with anything but zeros.

    Returns:
        uint8 ``[N, ceil(K / block_size), block_size * bits / 8]``; a view of `packed` where no padding is needed.
    """
    blocks = -(-columns // block_size)
    blob = block_size // int_format(bits).codes_per_byte
    if blocks * block_size != columns:
        codes = unpack_codes(packed, bits, columns)
        fill = np.full((len(packed), blocks * block_size - columns), pad_code, np.uint8)
        packed = pack_codes(np.concatenate([codes, fill], axis=1), bits)
    return packed.reshape(len(packed), blocks, blob)


def integer_codes(codes: np.ndarray, bits: int, *, signed: bool, width: int) -> np.ndarray:
    """Codes as an ONNX integer type holds them: themselves, or two's complement of ``code - mid`` in a signed type.

    Args:
        codes: uint8, any shape.
        bits: Width of the codes: 2, 3, 4 or 8.
        signed: Whether the type is signed.
        width: Width of the type: 2, 4 or 8, at least `bits`.

    Returns:
        uint8, the same shape, values below ``2**width``.
    """
    if not signed:
        return codes
    shifted: np.ndarray = codes - np.uint8(int_format(bits).mid)
    shifted &= np.uint8(int_format(width).qmax)
    return shifted


def transpose_packed(packed: np.ndarray, bits: int, columns: int, *, signed: bool, width: int) -> np.ndarray:
    """Turn packed rows into the bytes of an ONNX integer tensor of shape ``[K, N]``.

    Args:
        packed: uint8 ``[N, ceil(K * bits / 8)]`` from `pack_codes`.
        bits: Width of the codes: 2, 3, 4 or 8.
        columns: K.
        signed: Whether the tensor's type is signed; its values are ``code - mid`` then.
        width: Width of the tensor's type: 2, 4 or 8, at least `bits`.

    Returns:
        uint8 ``[ceil(K * N * width / 8)]``.
    """
    rows, per_byte, out_per_byte = len(packed), int_format(bits).codes_per_byte, int_format(width).codes_per_byte
    result = np.empty(-(-columns * rows // out_per_byte), np.uint8)
    for start in range(0, columns, _COLUMNS):
        stop = min(start + _COLUMNS, columns)
        part = unpack_codes(packed[:, start // per_byte : -(-stop // per_byte)], bits, stop - start)
        turned = integer_codes(np.ascontiguousarray(part.T), bits, signed=signed, width=width)  # [columns, N]
        bytes_ = pack_codes(turned.reshape(-1), width)
        first = start * rows // out_per_byte
        result[first : first + len(bytes_)] = bytes_
    return result


def pack_stream(codes: np.ndarray, bits: int, group_size: int) -> np.ndarray:
    """Lay codes out as the operators of `qcompiler.kernels` read them.

    Bit b of code k of a group is bit ``k * bits + b`` of its bytes, counted from the low end of the first one. Eight
    codes take `bits` whole bytes.

    Args:
        codes: uint8 ``[N, K]`` with values below ``2**bits``.
        bits: 1 to 8.
        group_size: Codes of a group, a multiple of 8; a ragged last group is filled up with zeros.

    Returns:
        uint8 ``[N, G, group_size * bits / 8]``.
    """
    ragged = -codes.shape[1] % group_size
    eights = np.pad(codes, ((0, 0), (0, ragged))).reshape(len(codes), -1, 8)  # [N, K / 8, 8]
    words = np.zeros(eights.shape[:2], np.uint64)
    for place in range(8):
        words |= eights[..., place].astype(np.uint64) << np.uint64(place * bits)
    stream = np.empty((*words.shape, bits), np.uint8)
    for byte in range(bits):
        stream[..., byte] = words >> np.uint64(8 * byte)  # the low 8 bits are kept
    return stream.reshape(len(codes), -1, group_size * bits // 8)


def pack_rows(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes ``[N, K]`` of 1 to 8 bits as one stream a row, uint8 ``[N, ceil(K / 8) * bits]``; see `unpack_stream`."""
    return pack_stream(codes, bits, -(-codes.shape[1] // 8) * 8)[:, 0]


def unpack_stream(stream: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Reverse `pack_stream`.

    Args:
        stream: What it returned.
        bits: The width of a code.
        columns: K.

    Returns:
        uint8 ``[N, K]``.
    """
    eights = stream.reshape(len(stream), -1, bits)
    words = np.zeros(eights.shape[:2], np.uint64)
    for byte in range(bits):
        words |= eights[..., byte].astype(np.uint64) << np.uint64(8 * byte)
    codes = np.empty((*words.shape, 8), np.uint8)
    for place in range(8):
        codes[..., place] = (words >> np.uint64(place * bits)) & np.uint64((1 << bits) - 1)
    return codes.reshape(len(stream), -1)[:, :columns]
