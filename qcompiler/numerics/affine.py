"""Affine integer grids: how a float weight becomes codes, a scale and a zero point, and back.

A weight is float32 ``[N, K]``; its groups are `group_size` consecutive columns of one row, the last one possibly
ragged,
``G = ceil(K / group_size)``. A code c of a group stands for ``(c - zero_point) * scale``. Rounding is half to even.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from qcompiler.errors import NumericsError
from qcompiler.numerics.double_scales import double_rounded
from qcompiler.numerics.formats import FLOAT8_MAX, IntFormat, float8_bits, float8_values, int_format

__all__ = [
    "Grid",
    "WeightSpec",
    "clip_grid",
    "dequantize",
    "min_max_grid",
    "quantize",
    "round_between",
    "round_to_grid",
    "storage_dtype",
    "stored_scale",
]

# Elements a block of rows holds: its temporaries stay in a core's L2 cache.
_BLOCK = 1 << 15
# Below this a scale loses its precision to denormal numbers, and its reciprocal is infinite.
_SMALLEST_SCALE = {"float16": 6.2e-5, "bfloat16": 1.2e-38, "float32": 1.2e-38}


@dataclass(frozen=True)
class WeightSpec:
    """How one weight is quantized, with nothing left to decide.

    Attributes:
        bits: Code width.
        group_size: Columns that share a scale; at least K means one group a row (per channel).
        symmetric: Zero is the middle code and no zero points are stored. The scale is signed so that the value of
            largest magnitude lands exactly on the extreme code (full range).
        signed_scale: With `symmetric`: allow negative scales. Without it codes are restricted to ``[1, qmax]``
            around the middle, the form that runtimes without negative scales need.
        scale_dtype: numpy name of the dtype the scale is stored in: float32, float16 or bfloat16.
        head_size: Consecutive rows (output channels) that share their scales; 0 gives each its own.
        reduced: With `symmetric`: use half of the codes, so that pairs of 8-bit products fit 16 bits on processors
            that add them there (x86 before VNNI).
        fp8: Codes are the bits of 8-bit floats (E4M3) in the place of integers.
        stream: Codes are stored in just as many bits, and zero points in bytes: the form of our own operators.
        vector: Columns of a row that share a code where codes name entries of learned tables (see `codebooks`), which
            are symmetric and a stream; 0 where codes are numbers.
        known: With `vector` 1: the name of the table where it is known and not learned (``nf4``).
        sparse: What is zero stays zero.
        double: Scales are codes of 8 bits times a step for each row (see `double_scales`).
    """

    bits: int
    group_size: int
    symmetric: bool
    signed_scale: bool = True
    scale_dtype: str = "float32"
    head_size: int = 0
    reduced: bool = False
    fp8: bool = False
    stream: bool = False
    vector: int = 0
    known: str = ""
    sparse: bool = False
    double: bool = False

    @property
    def code_bits(self) -> int:
        """Width of a code."""
        return self.bits * max(self.vector, 1)

    @property
    def entries(self) -> int:
        """How many values a code can have: the entries of a table."""
        return 1 << self.code_bits

    @property
    def signs(self) -> bool:
        """Whether weights are plus and minus a scale: a table of two entries that are known."""
        return self.vector == 1 and self.bits == 1

    @property
    def format(self) -> IntFormat:
        """The code format."""
        return int_format(self.bits)

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest code that is used."""
        if self.symmetric and not self.signed_scale:
            reach = self.format.mid // (2 if self.reduced else 1) - 1
            return self.format.mid - reach, self.format.mid + reach
        return 0, self.format.qmax

    def groups(self, columns: int) -> int:
        """Number of groups G in a row of `columns` values."""
        return -(-columns // self.group_size)

    def stored_bits(self, columns: int) -> float:
        """Bits per weight with scales and zero points included, as they lie in the file; tables are not."""
        scales = 8 * self.scale_bytes(self.groups(columns)) / columns
        if self.vector:
            return self.bits + scales
        width, zero = (self.bits, 8) if self.stream else (self.format.container, self.format.container)
        return width + scales + (0 if self.symmetric else zero * self.groups(columns) / columns)

    def scale_bytes(self, groups: int) -> int:
        """Bytes of the scales of a row."""
        itemsize = storage_dtype(self.scale_dtype).itemsize
        return groups + itemsize if self.double else groups * itemsize


@dataclass(frozen=True)
class Grid:
    """The representable values of a weight's groups.

    Attributes:
        scale: float32 ``[N, G]``, already rounded to the stored dtype.
        zero_point: float32 ``[N, G]`` of whole numbers (exact, and fast to compute with).
    """

    scale: np.ndarray
    zero_point: np.ndarray


def storage_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype called `name`, bfloat16 included."""
    if name == "bfloat16":
        import ml_dtypes

        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(name)


def stored_scale(scale: np.ndarray, spec: WeightSpec) -> np.ndarray:
    """Round scales to what the file will hold, keeping them away from zero and denormals.

    Those of whole rows, where `spec.double` says that they have a step in common.
    """
    smallest = np.float32(_SMALLEST_SCALE[spec.scale_dtype])
    scale = np.where(np.abs(scale) < smallest, np.copysign(smallest, scale), scale)
    if spec.scale_dtype != "float32":
        scale = scale.astype(storage_dtype(spec.scale_dtype))
    scale = scale.astype(np.float32)
    return double_rounded(scale) if spec.double else scale


def _grouped(weight: np.ndarray, group_size: int) -> np.ndarray:
    """[N, K] -> [N, G, group_size], zeros in the ragged end (zero is on every grid and adds no error)."""
    rows, columns = weight.shape
    ragged = -columns % group_size
    if ragged:
        weight = np.pad(weight, ((0, 0), (0, ragged)))
    return weight.reshape(rows, -1, group_size)


def _joined(groups: np.ndarray, heads: int) -> np.ndarray:
    """[N, G, group_size] -> [N / heads, G, heads * group_size]: what shares a scale, in one row."""
    rows, count, size = groups.shape
    joined: np.ndarray = groups.reshape(-1, heads, count, size).swapaxes(1, 2)
    return joined.reshape(rows // heads, count, heads * size)


def _whole_heads(rows: int, spec: WeightSpec) -> int:
    """Rows that share a scale, at least 1; raises NumericsError where the weight does not consist of whole heads."""
    heads = spec.head_size or 1
    if rows % heads:
        raise NumericsError(f"{rows} output channels are not whole heads of {heads}; use a scale for each channel")
    return heads


def _range_grid(low: np.ndarray, high: np.ndarray, spec: WeightSpec) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of groups that span [low, high] (low <= 0 <= high), any shape, float32."""
    fmt = spec.format
    if spec.fp8:
        scale = np.maximum(-low, high) / np.float32(FLOAT8_MAX)
        scale = stored_scale(np.where(scale == 0, np.float32(1), scale), spec)
        return scale, np.zeros_like(scale)
    if spec.symmetric:
        if spec.signed_scale:
            # The extreme value gets code 0, the one code that has no mirror image.
            extreme = np.where(-low > high, low, high)
            scale = extreme / np.float32(-fmt.mid)
        else:
            scale = np.maximum(-low, high) / np.float32(spec.limits[1] - fmt.mid)
        scale = stored_scale(np.where(scale == 0, np.float32(1), scale), spec)
        return scale, np.full_like(scale, fmt.mid)
    scale = (high - low) / np.float32(fmt.qmax)
    scale = stored_scale(np.where(scale == 0, np.float32(1), scale), spec)
    return scale, np.clip(np.rint(-low / scale), 0, fmt.qmax)


def _row_blocks(function: Callable[[slice], None], rows: int, columns: int, threads: int, heads: int = 1) -> None:
    """Call `function` on slices of whole heads of rows, in `threads` threads; heads do not depend on one another."""
    step = max(1, _BLOCK // max(columns * heads, 1)) * heads
    parts = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    if threads <= 1 or len(parts) == 1:
        for part in parts:
            function(part)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(function, parts))


def min_max_grid(weight: np.ndarray, spec: WeightSpec, threads: int = 1) -> Grid:
    """The grid that just spans each group's values and zero.

    Args:
        weight: float32 ``[N, K]``.
        spec: Target format.
        threads: Threads to use; the result does not depend on it.

    Returns:
        Scale and zero point ``[N, G]``.
    """
    rows, columns = weight.shape
    heads = _whole_heads(rows, spec)
    scale = np.empty((rows, spec.groups(columns)), np.float32)
    zero_point = np.empty_like(scale)

    def block(part: slice) -> None:
        units = _joined(_grouped(weight[part], spec.group_size), heads)
        low, high = np.minimum(units.min(-1), 0), np.maximum(units.max(-1), 0)
        scale[part], zero_point[part] = (np.repeat(each, heads, 0) for each in _range_grid(low, high, spec))

    _row_blocks(block, rows, columns, threads, heads)
    return Grid(scale, zero_point)


def clip_grid(
    weight: np.ndarray, spec: WeightSpec, importance: np.ndarray | None = None, *, lowest: float = 0.2, threads: int = 1
) -> Grid:
    """The min-max grid shrunk, group by group, to the least weighted squared rounding error.

    Minimizes ``sum_k importance_k (w_k - q_k)^2`` over the fraction p of the range that is kept: a coarse search over
    p = 1, 0.95, ... `lowest`, then a fine one (step 0.01) around the best. p = 1 is among the candidates, so the result
    is never worse than min-max. With importance = diag(H) this is the "importance matrix" of llama.cpp and
    llm-compressor.

    Args:
        weight: float32 ``[N, K]``.
        spec: Target format.
        importance: float32 ``[K]``, or ``[N, K]`` where it differs from row to row, nonnegative; None weighs all
            columns alike.
        lowest: Smallest fraction of the range that is tried.
        threads: Threads to use; the result does not depend on it.

    Returns:
        Scale and zero point ``[N, G]``.
    """
    rows, columns = weight.shape
    heads = _whole_heads(rows, spec)
    scale = np.empty((rows, spec.groups(columns)), np.float32)
    zero_point = np.empty_like(scale)
    heed = np.ones(columns, np.float32) if importance is None else importance.astype(np.float32)
    # Scaled so that squared errors of tiny weights stay normal numbers; where a whole group is unheeded all count
    # alike.
    heed = _grouped(np.atleast_2d(heed) / max(float(heed.mean()), 1e-30), spec.group_size)  # [N or 1, G, group_size]
    heed[heed.sum(-1) == 0] = 1

    heed = _joined(heed, heads) if len(heed) > 1 else np.tile(heed, heads)

    def block(part: slice) -> None:
        units = _joined(_grouped(weight[part], spec.group_size), heads)
        own = heed[part.start // heads : part.stop // heads] if len(heed) > 1 else heed
        found = _search_clip(units, own, spec, lowest)
        scale[part], zero_point[part] = (np.repeat(each, heads, 0) for each in found)

    _row_blocks(block, rows, columns, threads, heads)
    return Grid(scale, zero_point)


def _search_clip(
    groups: np.ndarray, heed: np.ndarray, spec: WeightSpec, lowest: float
) -> tuple[np.ndarray, np.ndarray]:
    """Best scale and zero point [N, G] of groups [N, G, group_size]; heed [N or 1, G, group_size]."""
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    best_scale, best_zero = _range_grid(low, high, spec)
    best_loss = _rounding_loss(groups, heed, best_scale, best_zero, spec)
    best_keep = np.ones_like(best_scale)
    coarse = [np.float32(p) for p in np.arange(0.95, lowest - 1e-6, -0.05)]
    fine = [np.float32(step / 100) for step in (-4, -3, -2, -1, 1, 2, 3, 4)]
    for candidates, relative in ((coarse, False), (fine, True)):
        centre = best_keep.copy()
        for candidate in candidates:
            keep = np.minimum(centre + candidate, 1) if relative else np.full_like(centre, candidate)
            scale, zero = _range_grid(low * keep, high * keep, spec)
            loss = _rounding_loss(groups, heed, scale, zero, spec)
            better = loss < best_loss
            for best, new in ((best_loss, loss), (best_scale, scale), (best_zero, zero), (best_keep, keep)):
                np.copyto(best, new, where=better)
    return best_scale, best_zero


def _rounding_loss(
    groups: np.ndarray, heed: np.ndarray, scale: np.ndarray, zero: np.ndarray, spec: WeightSpec
) -> np.ndarray:
    """Weighted squared error [N, G] of rounding groups [N, G, group_size] to a grid."""
    error = groups * (1 / scale)[..., None]
    if spec.fp8:
        error = float8_values(float8_bits(error))
    else:
        np.rint(error, out=error)
        first, last = spec.limits
        np.maximum(error, (first - zero)[..., None], out=error)
        np.minimum(error, (last - zero)[..., None], out=error)
    error *= scale[..., None]
    error -= groups
    with np.errstate(over="ignore", invalid="ignore"):  # an error beyond 1e19 is infinitely bad
        np.square(error, out=error)
        shared = len(heed) == 1
        loss: np.ndarray = np.einsum("ngk,gk->ng" if shared else "ngk,ngk->ng", error, heed[0] if shared else heed)
    return loss


def round_to_grid(values: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, spec: WeightSpec) -> np.ndarray:
    """Codes of values, as whole float32 numbers; shapes broadcast. Rounds before the zero point is added."""
    return round_between(values, scale, zero_point, *spec.limits)


def round_between(
    values: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, low: float | np.ndarray, high: float | np.ndarray
) -> np.ndarray:
    """The same between a smallest and a largest code, which may differ from value to value."""
    codes: np.ndarray = np.rint(values / scale)
    codes += zero_point
    np.clip(codes, low, high, out=codes)
    return codes


def quantize(weight: np.ndarray, grid: Grid, spec: WeightSpec, threads: int = 1) -> np.ndarray:
    """Round a weight to the nearest codes of its grid; the codes of 8-bit floats are their bits.

    Args:
        weight: float32 ``[N, K]``.
        grid: Scale and zero point ``[N, G]``.
        spec: Target format.
        threads: Threads to use; the result does not depend on it.

    Returns:
        Codes uint8 ``[N, K]``.
    """
    rows, columns = weight.shape
    codes = np.empty((rows, columns), np.uint8)

    def block(part: slice) -> None:
        groups = _grouped(weight[part], spec.group_size)
        scale, zero = grid.scale[part, :, None], grid.zero_point[part, :, None]
        rounded = float8_bits(groups / scale) if spec.fp8 else round_to_grid(groups, scale, zero, spec)
        codes[part] = rounded.reshape(len(groups), -1)[:, :columns]

    _row_blocks(block, rows, columns, threads)
    return codes


def dequantize(codes: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, group_size: int) -> np.ndarray:
    """Values of codes: ``(code - zero_point) * scale``.

    Args:
        codes: uint8 ``[N, K]``, or the numbers that the codes of 8-bit floats mean.
        scale: ``[N, G]``, any float dtype.
        zero_point: ``[N, G]``, whole numbers of any dtype.
        group_size: Columns in a group.

    Returns:
        float32 ``[N, K]``.
    """
    rows, columns = codes.shape
    values = np.empty((rows, columns), np.float32)
    whole = columns // group_size * group_size
    scale, zero_point = scale.astype(np.float32), zero_point.astype(np.float32)
    groups = whole // group_size
    view = values[:, :whole].reshape(rows, groups, group_size)
    np.subtract(codes[:, :whole].reshape(view.shape), zero_point[:, :groups, None], out=view)
    view *= scale[:, :groups, None]
    if whole < columns:
        values[:, whole:] = (codes[:, whole:] - zero_point[:, groups:]) * scale[:, groups:]
    return values
