"""What the taps of a convolution's kernel meet: sums of it, and rows of it as a linear layer would read them."""

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

__all__ = ["Geometry", "patch_rows", "tap_sums"]


@dataclass(frozen=True)
class Geometry:
    """Which inputs a convolution's kernel meets, per dimension.

    Attributes:
        kernel: Sizes.
        strides: Steps.
        dilations: Distances between the taps.
        pads: Zeros before and after, ``(begin, ..., end, ...)``.
        auto_pad: ``NOTSET``, ``VALID``, ``SAME_UPPER`` or ``SAME_LOWER``.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    auto_pad: str = "NOTSET"

    @classmethod
    def of(cls, node: ir.Node) -> "Geometry":
        """The geometry of a Conv whose weight is a constant."""
        weight = node.inputs[1]
        assert weight is not None and weight.const_value is not None
        kernel = tuple(int(size) for size in weight.const_value.shape.numpy()[2:])

        def ints(name: str, default: int, count: int) -> tuple[int, ...]:
            attribute = node.attributes.get(name)
            return (default,) * count if attribute is None else tuple(attribute.as_ints())

        rank = len(kernel)
        auto_pad = node.attributes.get_string("auto_pad", "NOTSET")
        pads = ints("pads", 0, 2 * rank) if auto_pad == "NOTSET" else (0,) * (2 * rank)
        return cls(kernel, ints("strides", 1, rank), ints("dilations", 1, rank), pads, auto_pad)

    def outputs(self, axis: int, size: int) -> tuple[int, int]:
        """The number of outputs along a dimension of `size` inputs, and of the zeros in front of these."""
        extent = (self.kernel[axis] - 1) * self.dilations[axis] + 1
        stride, begin, end = self.strides[axis], self.pads[axis], self.pads[axis + len(self.kernel)]
        if not self.auto_pad.startswith("SAME"):
            return (size + begin + end - extent) // stride + 1, begin
        count = -(-size // stride)
        zeros = max((count - 1) * stride + extent - size, 0)
        return count, zeros // 2 if self.auto_pad == "SAME_UPPER" else zeros - zeros // 2

    def spans(self, axis: int, size: int) -> tuple[int, list[slice]]:
        """The number of outputs along a dimension of `size` inputs, and the inputs that each tap meets."""
        count, begin = self.outputs(axis, size)
        stride = self.strides[axis]
        spans = []
        for tap in range(self.kernel[axis]):
            offset = tap * self.dilations[axis] - begin
            first, last = max(0, -(offset // stride)), min(count - 1, (size - 1 - offset) // stride)
            met = slice(first * stride + offset, last * stride + offset + 1, stride)
            spans.append(met if first <= last else slice(0))
        return count, spans


def tap_sums(values: np.ndarray, geometry: Geometry) -> tuple[np.ndarray, int]:
    """Sum what each tap of a kernel meets.

    Args:
        values: The convolution's input ``[B, C, ...]``.
        geometry: Of the convolution.

    Returns:
        float64 ``[C, taps]``, the taps in the order of the weight; and the number of outputs of a channel.
    """
    sums, count = values.sum(axis=0, dtype=np.float64), len(values)
    for axis, size in enumerate(values.shape[2:]):
        outputs, spans = geometry.spans(axis, size)
        count *= outputs
        # [C, d, ..., taps] -> [C, ..., taps, taps of d]
        sums = np.stack([sums[:, span].sum(axis=1) for span in spans], axis=-1)
    return sums.reshape(len(sums), -1), count


def patch_rows(values: np.ndarray, geometry: Geometry, groups: int, limit: int) -> np.ndarray:
    """What a convolution multiplies its weights with, a row for each output position.

    Args:
        values: The convolution's input ``[B, C, ...]``.
        geometry: Of the convolution.
        groups: Of its channels.
        limit: About as many rows at most, evenly spaced over the positions.

    Returns:
        float32 ``[groups, T, K]``, K being the C / groups channels times the taps in the order of the weight.
    """
    sizes, rank = values.shape[2:], len(geometry.kernel)
    counts = [geometry.outputs(axis, size)[0] for axis, size in enumerate(sizes)]
    step = max(1, math.ceil((len(values) * math.prod(counts) / limit) ** (1 / rank)))
    for axis, size in enumerate(sizes):
        begin, stride, dilation = geometry.outputs(axis, size)[1], geometry.strides[axis], geometry.dilations[axis]
        at = np.arange(0, counts[axis], step)[:, None] * stride  # [outputs, 1]
        at = at + np.arange(geometry.kernel[axis]) * dilation - begin  # [outputs, taps]
        # [B, C, outputs, taps, ..., d, ...] -> [B, C, outputs, taps, ..., outputs, taps, ...]; outside are zeros
        place = 2 + 2 * axis
        taken = np.take(values, np.minimum(np.maximum(at, 0), size - 1), axis=place)
        inside = ((at >= 0) & (at < size)).reshape(at.shape + (1,) * (taken.ndim - place - 2))
        values = np.where(inside, taken, np.float32(0))
    order = (0, *range(2, 2 + 2 * rank, 2), 1, *range(3, 2 + 2 * rank, 2))
    rows = values.transpose(order)  # [B, outputs..., C, taps...]
    channels = rows.shape[1 + rank]
    width = channels // groups * math.prod(geometry.kernel)
    grouped = rows.reshape(-1, groups, width).swapaxes(0, 1)  # [groups, T, K]
    return np.ascontiguousarray(grouped, np.float32)
