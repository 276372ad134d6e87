"""Packed codes against loops over single bits, and the memory that packing does not copy."""

import numpy as np
import pytest

from qcompiler.errors import NumericsError
from qcompiler.numerics.formats import FORMATS, int_format
from qcompiler.numerics.packing import (
    centred,
    integer_codes,
    pack_codes,
    pack_matmul_nbits,
    transpose_packed,
    unpack_codes,
)

BITS = pytest.mark.parametrize("bits", FORMATS)
STORED = {2: 2, 3: 4, 4: 4, 8: 8}  # bits that a code takes
# Around the 1, 2 and 4 codes of a byte, and around blocks of 16 and 32.
COLUMNS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 101)


def some_codes(shape, bits, seed=0):
    return np.random.default_rng(seed).integers(0, 1 << bits, shape).astype(np.uint8)


def pack_bit_by_bit(codes, width):
    """One row: bit b of code k is bit (k * width + b) of the row, counted from the low end of byte 0."""
    packed = [0] * -(-len(codes) * width // 8)
    for k, code in enumerate(codes):
        for b in range(width):
            place = k * width + b
            packed[place // 8] |= ((int(code) >> b) & 1) << (place % 8)
    return packed


@BITS
@pytest.mark.parametrize("columns", COLUMNS)
def test_packing_is_low_bits_first_and_padded_with_zero_bits(bits, columns):
    codes = some_codes((3, columns), bits)
    packed = pack_codes(codes, bits)
    assert packed.dtype == np.uint8
    assert packed.tolist() == [pack_bit_by_bit(row, STORED[bits]) for row in codes]
    assert np.array_equal(unpack_codes(packed, bits, columns), codes)


@BITS
def test_every_code_survives_in_every_place(bits):
    codes = np.array([np.roll(np.arange(1 << bits, dtype=np.uint8), shift) for shift in range(8)])
    assert np.array_equal(unpack_codes(pack_codes(codes, bits), bits, 1 << bits), codes)


@BITS
@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 3, 5), (0, 5)])
def test_only_the_last_axis_is_packed(bits, shape):
    codes = some_codes(shape, bits)
    packed = pack_codes(codes, bits)
    assert packed.shape == (*shape[:-1], -(-5 * STORED[bits] // 8))
    assert np.array_equal(unpack_codes(packed, bits, 5), codes)


@BITS
def test_packing_takes_views_and_leaves_its_input_alone(bits):
    base = some_codes((9, 4), bits)
    before = base.copy()
    packed = pack_codes(base.T, bits)
    assert packed.flags.c_contiguous
    assert packed.tolist() == [pack_bit_by_bit(row, STORED[bits]) for row in before.T]
    assert np.array_equal(base, before)


@BITS
@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("columns", [1, 16, 31, 33, 64, 97])
def test_blocks_are_whole_and_filled_with_the_pad_code(bits, block_size, columns):
    codes = some_codes((3, columns), bits)
    pad = FORMATS[bits].mid
    blob = pack_matmul_nbits(pack_codes(codes, bits), bits, columns, block_size, pad)
    blocks = -(-columns // block_size)
    assert blob.shape == (3, blocks, block_size * STORED[bits] // 8)
    for n in range(3):
        row = [*codes[n], *[pad] * (blocks * block_size - columns)]
        for block in range(blocks):
            part = row[block * block_size : (block + 1) * block_size]
            assert blob[n, block].tolist() == pack_bit_by_bit(part, STORED[bits])


@BITS
def test_whole_blocks_are_a_view_of_the_packed_codes(bits):
    packed = pack_codes(some_codes((3, 64), bits), bits)
    assert np.shares_memory(pack_matmul_nbits(packed, bits, 64, 32, 0), packed)


@BITS
@pytest.mark.parametrize("columns", [1, 2, 7, 64])
def test_centred_codes_have_their_middle_where_the_container_has_its(bits, columns):
    codes = some_codes((3, columns), bits)
    packed, width = pack_codes(codes, bits), STORED[bits]
    moved = centred(packed, bits)
    assert np.array_equal(unpack_codes(moved, width, columns), codes - (1 << (bits - 1)) + (1 << (width - 1)))
    assert (moved is packed) == (bits == width)
    assert np.array_equal(unpack_codes(packed, bits, columns), codes)


def test_centring_carries_nothing_from_one_code_into_the_next():
    every = np.array([[low | high << 4 for high in range(8) for low in range(8)]], np.uint8)
    assert centred(every, 3).tolist() == [[low + 4 | high + 4 << 4 for high in range(8) for low in range(8)]]


@pytest.mark.parametrize(("bits", "width"), [(2, 2), (2, 4), (3, 4), (4, 4), (8, 8)])
def test_signed_integers_are_codes_without_their_middle(bits, width):
    codes = np.arange(1 << bits, dtype=np.uint8)
    assert np.array_equal(integer_codes(codes, bits, signed=False, width=width), codes)
    signed = integer_codes(codes, bits, signed=True, width=width)
    half = 1 << (width - 1)
    values = [int(value) - (1 << width if value >= half else 0) for value in signed]
    assert values == [int(code) - FORMATS[bits].mid for code in codes]


@BITS
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5), (4, 130), (5, 131), (2, 257)])
@pytest.mark.parametrize("signed", [False, True])
def test_transposed_codes_are_packed_without_gaps_between_rows(bits, rows, columns, signed):
    codes = some_codes((rows, columns), bits)
    width = STORED[bits]
    turned = integer_codes(codes.T, bits, signed=signed, width=width).reshape(-1)
    result = transpose_packed(pack_codes(codes, bits), bits, columns, signed=signed, width=width)
    assert result.tolist() == pack_bit_by_bit(turned, width)


@pytest.mark.parametrize("bits", [0, 1, 5, 6, 7, 16])
def test_an_unknown_width_is_refused_with_the_known_ones(bits):
    with pytest.raises(NumericsError, match=f"no {bits}-bit code format; known widths: 2, 3, 4, 8"):
        int_format(bits)
    with pytest.raises(NumericsError):
        pack_codes(np.zeros((1, 8), np.uint8), bits)


def test_the_table_of_formats_says_what_the_widths_imply():
    for bits, fmt in FORMATS.items():
        assert fmt.bits == bits
        assert (fmt.qmax, fmt.mid) == (2**bits - 1, 2 ** (bits - 1))
        assert fmt.container == STORED[bits]
        assert fmt.codes_per_byte * fmt.container == 8
        assert fmt.shift + fmt.mid == FORMATS[fmt.container].mid
        assert fmt.name == f"int{bits}"
