"""Resize: along each axis in turn, an output is a weighted sum of a few inputs (its taps)."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcompiler.torch_graph.registry import Call, op


@dataclass(frozen=True)
class _Axis:
    """One axis that is resized: its sizes, the exact scale, how places are rounded, and the part that is looked at."""

    size: int
    resized: int
    scale: float
    rounding: str
    roi: tuple[float, float] = (0.0, 1.0)


def _positions(axis: _Axis, mode: str) -> Tensor:
    """Where each output lies on the input axis, float64."""
    out = torch.arange(axis.resized, dtype=torch.float64)
    length = axis.scale * axis.size
    if mode == "asymmetric":
        return out / axis.scale
    if mode == "align_corners":
        return out * (axis.size - 1) / (length - 1) if length != 1 else torch.zeros_like(out)
    if mode == "tf_crop_and_resize":
        start, end = axis.roi
        if axis.resized > 1:
            return start * (axis.size - 1) + out * (end - start) * (axis.size - 1) / (length - 1)
        return torch.full_like(out, 0.5 * (start + end) * (axis.size - 1))
    if mode == "pytorch_half_pixel" and length <= 1:
        return torch.full_like(out, -0.5)
    if mode == "half_pixel_symmetric":
        # The output is cut to a whole size, half of what is lost on either side.
        adjustment = axis.resized / length
        return axis.size / 2 * (1 - adjustment) + (out + 0.5) / axis.scale - 0.5
    return (out + 0.5) / axis.scale - 0.5


def _nearest(position: Tensor, mode: str) -> Tensor:
    if mode == "floor":
        return torch.floor(position)
    if mode == "ceil":
        return torch.ceil(position)
    prefers_floor = mode == "round_prefer_floor"
    return torch.ceil(position - 0.5) if prefers_floor else torch.floor(position + 0.5)


def _triangle(distance: Tensor) -> Tensor:
    return (1 - distance.abs()).clamp(min=0)


def _cubic(distance: Tensor, a: float) -> Tensor:
    """Keys 1981, eq. 15, with the free parameter a."""
    d = distance.abs()
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return torch.where(d <= 1, near, torch.where(d < 2, far, torch.zeros_like(d)))


def _taps(call: Call, axis: _Axis, position: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and weights [taps, outputs] of the inputs of each output."""
    mode = call.get("mode", "nearest")
    if mode == "nearest":
        index = _nearest(position, axis.rounding)
        return index[None], torch.ones_like(index)[None]
    half = 2 if mode == "cubic" else 1
    # A smaller output is filtered: the window widens as the picture shrinks.
    stretch = min(axis.scale, 1.0) if call.get("antialias", 0) else 1.0
    reach = math.ceil(half / stretch)
    index = torch.floor(position) + torch.arange(1 - reach, reach + 1, dtype=torch.float64)[:, None]
    distance = (index - position) * stretch
    weights = _cubic(distance, call.get("cubic_coeff_a", -0.75)) if mode == "cubic" else _triangle(distance)
    if call.get("exclude_outside", 0) or stretch < 1:
        inside = (index >= 0) & (index < axis.size)
        if call.get("exclude_outside", 0):
            weights = weights * inside
        weights = weights / weights.sum(0)
    return index, weights


def _resized(call: Call, x: Tensor, at: int, axis: _Axis, transformation: str) -> Tensor:
    position = _positions(axis, transformation)
    index, weights = _taps(call, axis, position)
    index = index.clamp(0, axis.size - 1).to(torch.int64)
    shape = [-1 if other == at else 1 for other in range(x.ndim)]
    if call.get("mode", "nearest") == "nearest":
        result = x.index_select(at, index[0])
    else:
        wide = x if x.is_floating_point() else x.to(torch.float64)
        parts = (
            wide.index_select(at, taps) * factor.to(wide.dtype).reshape(shape)
            for taps, factor in zip(index, weights, strict=True)
        )
        result = sum(parts, torch.zeros((), dtype=wide.dtype))
    if transformation == "tf_crop_and_resize":
        outside = ((position < 0) | (position > axis.size - 1)).reshape(shape)
        result = torch.where(outside, call.get("extrapolation_value", 0.0), result).to(result.dtype)
    return result


def _scaled(call: Call, x: Tensor, axes: dict[int, _Axis], transformation: str) -> Tensor:
    result = x
    for at, axis in axes.items():
        if axis.size != axis.resized or axis.scale != 1 or transformation == "tf_crop_and_resize":
            result = _resized(call, result, at, axis, transformation)
    if x.is_floating_point() or result.dtype == x.dtype:
        return result
    info = torch.iinfo(x.dtype)
    return torch.round(result).clamp(info.min, info.max).to(x.dtype)


def _kept_aspect(call: Call, wanted: list[int], current: list[int]) -> tuple[list[int], list[float]]:
    """Sizes and scales for the sizes wanted, with the proportions kept if the node asks for it."""
    policy = call.get("keep_aspect_ratio_policy", "stretch")
    scales = [w / c for w, c in zip(wanted, current, strict=True)]
    if policy == "stretch":
        return wanted, scales
    scale = min(scales) if policy == "not_larger" else max(scales)
    return [math.floor(scale * c + 0.5) for c in current], [scale] * len(scales)


@op("Resize", since=11)
def _resize(
    call: Call, x: Tensor, roi: Tensor | None = None, scales: Tensor | None = None, sizes: Tensor | None = None
) -> Tensor:
    axes = [axis % x.ndim for axis in call.get("axes") or range(x.ndim)]
    current = [x.shape[axis] for axis in axes]
    if scales is not None and scales.numel():
        factors: list[float] = scales.tolist()
        resized = [math.floor(factor * size) for factor, size in zip(factors, current, strict=True)]
    else:
        wanted: Any = sizes
        resized, factors = _kept_aspect(call, wanted.tolist(), current)
    count = len(axes)
    part = roi.tolist() if roi is not None and roi.numel() else [0.0] * count + [1.0] * count
    rounding = call.get("nearest_mode", "round_prefer_floor")
    table = {
        axis: _Axis(current[i], resized[i], factors[i], rounding, (part[i], part[count + i]))
        for i, axis in enumerate(axes)
    }
    return _scaled(call, x, table, call.get("coordinate_transformation_mode", "half_pixel"))


@op("Resize", since=10)
@op("Upsample", since=9, until=9)
def _upsample(call: Call, x: Tensor, scales: Tensor) -> Tensor:
    return _by_scales(call, x, scales.tolist())


@op("Upsample", since=7)
def _upsample_attribute(call: Call, x: Tensor) -> Tensor:
    return _by_scales(call, x, call.get("scales"))


def _by_scales(call: Call, x: Tensor, scales: list[float]) -> Tensor:
    """The older form, which knows one way to place outputs and no way to round them but down."""
    axes = {
        at: _Axis(size, math.floor(size * scale), scale, "floor")
        for at, (size, scale) in enumerate(zip(x.shape, scales, strict=True))
    }
    return _scaled(call, x, axes, "asymmetric")
