"""The table of integer code formats, and 8-bit floats; everything that depends on the number of bits asks here."""

from dataclasses import dataclass

import numpy as np

from qcompiler.errors import NumericsError

__all__ = ["FLOAT8_MAX", "FORMATS", "IntFormat", "float8_bits", "float8_values", "int_format"]

# The largest finite E4M3 number.
FLOAT8_MAX = 448.0


@dataclass(frozen=True)
class IntFormat:
    """Unsigned codes of a fixed width; a symmetric grid puts its zero at `mid`.

    Attributes:
        name: What reports print.
        bits: Width of one code: what the grid has.
        container: Width that one code takes where it is stored; more than `bits` where no kernel reads codes so narrow.
        sqnr_floor_db: SQNR in dB that min-max groups of 32 standard normal values reach at least; tests assert it.
    """

    name: str
    bits: int
    container: int
    sqnr_floor_db: float

    @property
    def qmax(self) -> int:
        """Largest code; the smallest is 0."""
        return (1 << self.bits) - 1

    @property
    def mid(self) -> int:
        """The code that means zero on a symmetric grid, and where zero points are absent."""
        return 1 << (self.bits - 1)

    @property
    def shift(self) -> int:
        """How far `mid` is below the middle of the container, which kernels take for zero where they get no others."""
        return (1 << (self.container - 1)) - self.mid

    @property
    def codes_per_byte(self) -> int:
        """How many codes one byte holds; formats that straddle bytes are not packed this way."""
        return 8 // self.container


FORMATS: dict[int, IntFormat] = {
    row.bits: row
    for row in (
        IntFormat("int2", 2, 2, 5.0),
        IntFormat("int3", 3, 4, 13.0),  # ONNX Runtime has kernels for 2, 4 and 8 bits
        IntFormat("int4", 4, 4, 19.0),
        IntFormat("int8", 8, 8, 43.0),
    )
}


def int_format(bits: int) -> IntFormat:
    """Return the format of `bits` bits, or raise NumericsError naming the known widths."""
    try:
        return FORMATS[bits]
    except KeyError:
        raise NumericsError(f"no {bits}-bit code format; known widths: {', '.join(map(str, FORMATS))}") from None


def float8_bits(values: np.ndarray) -> np.ndarray:
    """The bits, uint8, of the E4M3 numbers nearest to values (half to even); what is beyond 448 becomes 448."""
    import ml_dtypes

    limited = np.minimum(np.maximum(values, np.float32(-FLOAT8_MAX)), np.float32(FLOAT8_MAX))
    return np.asarray(limited, ml_dtypes.float8_e4m3fn).view(np.uint8)


def float8_values(bits: np.ndarray) -> np.ndarray:
    """The numbers, float32, that the bits of E4M3 numbers mean."""
    import ml_dtypes

    return np.asarray(bits.view(ml_dtypes.float8_e4m3fn), np.float32)
