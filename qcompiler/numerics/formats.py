"""The table of integer code formats; everything that depends on the number of bits asks here."""

from dataclasses import dataclass

from qcompiler.errors import NumericsError

__all__ = ["FORMATS", "IntFormat", "int_format"]


@dataclass(frozen=True)
class IntFormat:
    """Unsigned codes of a fixed width; a symmetric grid puts its zero at `mid`.

    Attributes:
        name: What reports print.
        bits: Width of one code.
        sqnr_floor_db: SQNR in dB that min-max groups of 32 standard normal values reach at least; tests assert it.
    """

    name: str
    bits: int
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
    def codes_per_byte(self) -> int:
        """How many codes one byte holds; formats that straddle bytes are not packed this way."""
        return 8 // self.bits


FORMATS: dict[int, IntFormat] = {
    row.bits: row
    for row in (
        IntFormat("int2", 2, 5.0),
        IntFormat("int4", 4, 19.0),
        IntFormat("int8", 8, 43.0),
    )
}


def int_format(bits: int) -> IntFormat:
    """Return the format of `bits` bits, or raise NumericsError naming the known widths."""
    try:
        return FORMATS[bits]
    except KeyError:
        raise NumericsError(f"no {bits}-bit code format; known widths: {', '.join(map(str, FORMATS))}") from None
