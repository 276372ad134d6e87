"""QuantizedTensor: a weight that is codes, scales and zero points but still reads as the float weight of its node.

Because `numpy()` is the dequantized weight in the orientation and dtype that the node expects, a half-quantized model
is an ordinary float model: it serializes, runs anywhere, and needs no new opset. Only lowering passes look inside.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompiler.numerics.affine import Grid, WeightSpec, dequantize, storage_dtype
from qcompiler.numerics.codebooks import decode
from qcompiler.numerics.formats import float8_values
from qcompiler.numerics.packing import pack_codes, pack_rows, unpack_codes, unpack_stream

__all__ = ["Quantized", "QuantizedTensor"]


class QuantizedTensor(ir.LazyTensor):
    """Codes, scales and zero points of a weight of N rows (output channels) and K columns.

    Attributes:
        packed: uint8 ``[N, ceil(K * bits / 8)]`` from `pack_codes`, in the container's bits; the middle is the grid's,
            not the container's (see `packing.centred`). With tables from `pack_rows`, a code for every `spec.vector`
            columns.
        scale: ``[N, G]`` in the stored dtype.
        zero_point: uint8 ``[N, G]``, or None where the zero is the middle code.
        spec: The format.
        columns: K.
        layout: How the node stores the weight: see `graph.Site`.
        tables: What codes name the entries of, ``[C, E, d]`` in the stored dtype; None where codes are numbers.
    """

    __slots__ = ("columns", "layout", "packed", "scale", "spec", "tables", "zero_point")

    def __init__(
        self,
        codes: np.ndarray,
        grid: Grid,
        spec: WeightSpec,
        *,
        layout: str,
        dtype: ir.DataType,
        name: str | None = None,
        tables: np.ndarray | None = None,
    ) -> None:
        """Pack `codes` uint8 ``[N, K]`` on `grid`, or of `tables`; `dtype` is what `numpy()` returns."""
        self.packed = _packed(codes, spec)
        # Rounded as the file will hold it; where the model becomes float16 only later, float32 until then.
        scale = grid.scale.astype(storage_dtype(spec.scale_dtype))
        self.scale = scale.astype(np.float32) if dtype == ir.DataType.FLOAT else scale
        self.zero_point = None if spec.symmetric else grid.zero_point.astype(np.uint8)
        self.tables = None if tables is None else tables.astype(self.scale.dtype)
        self.spec, self.columns, self.layout = spec, codes.shape[1] * max(spec.vector, 1), layout
        shape = stored_shape(layout, len(codes), self.columns)
        super().__init__(self._evaluate_float, dtype, ir.Shape(shape), name=name)

    @property
    def rows(self) -> int:
        """N, the number of output channels (or of table rows)."""
        return len(self.packed)

    @property
    def grid(self) -> Grid:
        """Scales and zero points float32 ``[N, G]``; the middle code where none are stored."""
        scale = self.scale.astype(np.float32)
        zero = np.full_like(scale, self.spec.format.mid) if self.zero_point is None else self.zero_point
        return Grid(scale, zero.astype(np.float32))

    @property
    def signed(self) -> bool:
        """Whether codes may be stored less their middle; those of 8-bit floats are bits."""
        return self.spec.symmetric and not self.spec.fp8

    @property
    def stored_bytes(self) -> int:
        """Bytes of packed codes, scales and zero points together."""
        scale_bytes = self.rows * self.spec.scale_bytes(self.scale.shape[1])
        if self.tables is not None:
            return int(self.packed.nbytes + scale_bytes + self.tables.nbytes)
        width = self.spec.format.container
        zero_bytes = 0 if self.zero_point is None else self.rows * -(-self.zero_point.shape[1] * width // 8)
        return int(self.packed.nbytes + scale_bytes + zero_bytes)

    def codes(self) -> np.ndarray:
        """Codes uint8 ``[N, K]``, or ``[N, K / d]`` where they name entries of tables."""
        return _unpacked(self.packed, self.spec, self.columns)

    def dequantized(self) -> np.ndarray:
        """Values float32 ``[N, K]``."""
        if self.tables is not None:
            return decode(self.codes(), self.tables.astype(np.float32), self.scale.astype(np.float32), self.spec)
        zero: Any = self.zero_point
        if zero is None:
            zero = np.full(self.scale.shape, 0 if self.spec.fp8 else self.spec.format.mid, np.uint8)
        codes = float8_values(self.codes()) if self.spec.fp8 else self.codes()
        return dequantize(codes, self.scale, zero, self.spec.group_size)

    def _evaluate_float(self) -> ir.TensorProtocol:
        values = to_stored(self.dequantized(), self.layout).astype(self.dtype.numpy())
        return ir.Tensor(np.ascontiguousarray(values), name=self.name)


def _packed(codes: np.ndarray, spec: WeightSpec) -> np.ndarray:
    """Codes that name entries of tables have no container: they are a stream."""
    return pack_rows(codes, spec.code_bits) if spec.vector else pack_codes(codes, spec.bits)


def _unpacked(packed: np.ndarray, spec: WeightSpec, columns: int) -> np.ndarray:
    if spec.vector:
        return unpack_stream(packed, spec.code_bits, columns // spec.vector)
    return unpack_codes(packed, spec.bits, columns)


def stored_shape(layout: str, rows: int, columns: int) -> tuple[int, ...]:
    """Shape in which the model stores an [N, K] weight."""
    if layout.startswith("N:"):
        return (rows, *map(int, layout[2:].split(",")))
    return {"NK": (rows, columns), "KN": (columns, rows), "1KN": (1, columns, rows)}[layout]


def to_stored(weight: np.ndarray, layout: str) -> np.ndarray:
    """[N, K] -> the shape that the model stores; a view."""
    shape = stored_shape(layout, *weight.shape)
    stored: np.ndarray = (weight.T if layout in ("KN", "1KN") else weight).reshape(shape)
    return stored


def from_stored(weight: np.ndarray, layout: str) -> np.ndarray:
    """The shape that the model stores -> [N, K]; a view."""
    if layout in ("KN", "1KN"):
        return np.swapaxes(weight, -1, -2).reshape(weight.shape[:-3:-1])
    return np.reshape(weight, (len(weight), -1))


@dataclass(frozen=True)
class Quantized:
    """What a weight algorithm returns.

    Attributes:
        codes: uint8 ``[N, K]``, or ``[N, K / d]`` where they name entries of tables.
        grid: Scale and zero point ``[N, G]``.
        remark: For the record's reason.
        loss: Of each row, float64 ``[N]``, the error that the algorithm minimized; None if it minimized none.
        energy: What `loss` would be if all codes meant zero, float64 ``[N]``.
        tables: float32 ``[C, E, d]``, what codes name the entries of; None where they are numbers.
    """

    codes: np.ndarray
    grid: Grid
    remark: str = ""
    loss: np.ndarray | None = None
    energy: np.ndarray | None = None
    tables: np.ndarray | None = None

    def metrics(self, rows: slice) -> dict[str, float]:
        """Figures about some of the rows, for a record."""
        if self.loss is None or self.energy is None:
            return {}
        loss, energy = float(self.loss[rows].sum()), float(self.energy[rows].sum())
        return {"loss": loss, "relative_loss": loss / energy if energy else 0.0}

    @classmethod
    def stacked(cls, parts: "Sequence[Quantized]") -> "Quantized":
        """Results for parts of the rows of a weight, one below the other."""

        def joined(arrays: list[np.ndarray | None]) -> np.ndarray | None:
            known = [array for array in arrays if array is not None]
            return np.concatenate(known) if len(known) == len(arrays) else None

        codes = np.concatenate([part.codes for part in parts])
        scale, zero = (np.concatenate([getattr(part.grid, name) for part in parts]) for name in ("scale", "zero_point"))
        remark = "; ".join(dict.fromkeys(part.remark for part in parts if part.remark))
        loss, energy = joined([part.loss for part in parts]), joined([part.energy for part in parts])
        return cls(codes, Grid(scale, zero), remark, loss, energy)

    def arrays(self, spec: WeightSpec) -> dict[str, np.ndarray]:
        """All of it as arrays, for a checkpoint."""
        found = {"codes": _packed(self.codes, spec), "scale": self.grid.scale, "zero": self.grid.zero_point}
        if self.tables is not None:
            found["tables"] = self.tables
        found["remark"] = np.frombuffer(self.remark.encode(), np.uint8)
        if self.loss is not None and self.energy is not None:
            found.update(loss=self.loss, energy=self.energy)
        return found

    @classmethod
    def of(cls, arrays: dict[str, np.ndarray], spec: WeightSpec, columns: int) -> "Quantized":
        """The reverse of `arrays`."""
        codes = _unpacked(arrays["codes"], spec, columns)
        grid, remark = Grid(arrays["scale"], arrays["zero"]), arrays["remark"].tobytes().decode()
        return cls(codes, grid, remark, arrays.get("loss"), arrays.get("energy"), arrays.get("tables"))
