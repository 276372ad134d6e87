"""Shapes, and tensors made of nothing but shapes and constants."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qcompiler.torch_graph.registry import Call, op


@op("Shape")
def _shape(call: Call, x: Tensor) -> Tensor:
    return torch.tensor(list(x.shape)[call.get("start", 0) : call.get("end")], dtype=torch.int64)


@op("Size")
def _size(_: Call, x: Tensor) -> Tensor:
    return torch.tensor(x.numel())


@op("Reshape", since=5)
def _reshape(call: Call, x: Tensor, shape: Tensor) -> Tensor:
    sizes = shape.tolist()
    if not call.get("allowzero", 0):
        sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    if x.numel() == 0 and -1 in sizes:  # torch finds that ambiguous; ONNX divides what is left
        rest = math.prod(size for size in sizes if size != -1)
        sizes = [(x.numel() // rest if rest else 0) if size == -1 else size for size in sizes]
    return x.reshape(sizes)


@op("Flatten")
def _flatten(call: Call, x: Tensor) -> Tensor:
    axis = call.get("axis", 1)
    rows = math.prod(x.shape[:axis])
    return x.reshape(rows, math.prod(x.shape[axis:]))


def _squeezed(x: Tensor, axes: list[int] | None) -> Tensor:
    if axes is None:
        return x.squeeze()
    gone = {axis % max(x.ndim, 1) for axis in axes}
    for axis in gone:
        if x.shape[axis] != 1:
            raise ValueError(f"axis {axis} has {x.shape[axis]} entries and cannot be squeezed")
    return x.reshape([size for axis, size in enumerate(x.shape) if axis not in gone])


@op("Squeeze", since=13)
def _squeeze(_: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    return _squeezed(x, None if axes is None else axes.tolist())


@op("Squeeze", since=1)
def _squeeze_attribute(call: Call, x: Tensor) -> Tensor:
    return _squeezed(x, call.get("axes"))


def _unsqueezed(x: Tensor, axes: list[int]) -> Tensor:
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


@op("Unsqueeze", since=13)
def _unsqueeze(_: Call, x: Tensor, axes: Tensor) -> Tensor:
    return _unsqueezed(x, axes.reshape(-1).tolist())


@op("Unsqueeze", since=1)
def _unsqueeze_attribute(call: Call, x: Tensor) -> Tensor:
    return _unsqueezed(x, call.get("axes"))


@op("Transpose")
def _transpose(call: Call, x: Tensor) -> Tensor:
    return x.permute(call.get("perm") or list(range(x.ndim))[::-1])


@op("Concat", since=4)
def _concat(call: Call, *inputs: Tensor) -> Tensor:
    if all(value.ndim == 1 for value in inputs):  # torch.cat lets an empty vector meet anything
        return torch.cat(inputs)
    return torch.cat([value for value in inputs if value.shape != (0,)], call.get("axis"))


def _parts(x: Tensor, sizes: list[int] | None, count: int, axis: int) -> tuple[Tensor, ...]:
    """The sizes given, or `count` equal parts of which the last may be smaller."""
    whole = x.shape[axis]
    if sizes is None:
        most = -(-whole // count)
        sizes = [max(min(most, whole - start * most), 0) for start in range(count)]
    return tuple(torch.split(x, sizes, axis))


@op("Split", since=13)
def _split(call: Call, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    count = call.get("num_outputs", len(call.node.outputs))
    return _parts(x, None if sizes is None else sizes.tolist(), count, call.get("axis", 0))


@op("Split", since=2)
def _split_attribute(call: Call, x: Tensor) -> tuple[Tensor, ...]:
    return _parts(x, call.get("split"), len(call.node.outputs), call.get("axis", 0))


@op("Expand")
def _expand(_: Call, x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, shape.tolist()))


@op("Tile", since=6)
def _tile(_: Call, x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat(repeats.tolist())


@op("Range")
def _range(_: Call, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    count = max(math.ceil((limit.item() - start.item()) / delta.item()), 0)
    return (start + torch.arange(count, dtype=torch.int64) * delta).to(start.dtype)


@op("Constant")
def _constant(call: Call) -> Tensor:
    if call.get("value") is not None:
        return call.get("value")
    for name, dtype in (("value_float", torch.float32), ("value_floats", torch.float32), ("value_int", torch.int64)):
        if call.get(name) is not None:
            return torch.tensor(call.get(name), dtype=dtype)
    if call.get("value_ints") is not None:
        return torch.tensor(call.get("value_ints"), dtype=torch.int64)
    raise call.error("only dense numeric constants are implemented")


@op("ConstantOfShape")
def _constant_of_shape(call: Call, shape: Tensor) -> Tensor:
    value = call.get("value")
    sizes = shape.tolist()
    return torch.zeros(sizes) if value is None else value.reshape([1] * len(sizes)).expand(sizes).contiguous()


@op("EyeLike")
def _eye_like(call: Call, x: Tensor) -> Tensor:
    rows, columns = x.shape
    diagonal = torch.arange(columns) - torch.arange(rows)[:, None] == call.get("k", 0)
    return diagonal.to(call.dtype("dtype", x.dtype))


@op("Trilu")
def _trilu(call: Call, x: Tensor, k: Tensor | None = None) -> Tensor:
    offset = 0 if k is None else int(k)
    return torch.triu(x, offset) if call.get("upper", 1) else torch.tril(x, offset)


@op("DepthToSpace")
def _depth_to_space(call: Call, x: Tensor) -> Tensor:
    b, (n, c, h, w) = call.get("blocksize"), x.shape
    if call.get("mode", "DCR") == "CRD":
        split = x.reshape(n, c // (b * b), b, b, h, w).permute(0, 1, 4, 2, 5, 3)  # [n, c, h, b, w, b]
    else:
        split = x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2)
    return split.reshape(n, c // (b * b), h * b, w * b)


@op("SpaceToDepth")
def _space_to_depth(call: Call, x: Tensor) -> Tensor:
    b, (n, c, h, w) = call.get("blocksize"), x.shape
    order = (0, 1, 3, 5, 2, 4) if call.get("mode", "DCR") == "CRD" else (0, 3, 5, 1, 2, 4)
    split = x.reshape(n, c, h // b, b, w // b, b).permute(order)
    return split.reshape(n, c * b * b, h // b, w // b)


def _source_indices(size: int, before: int, after: int, mode: str) -> Tensor:
    """For each place along a padded axis, the place that it is copied from."""
    index = torch.arange(-before, size + after)
    if mode == "edge":
        return index.clamp(0, size - 1)
    if mode == "wrap":
        return index % size
    period = max(2 * (size - 1), 1)
    index = index % period
    return torch.where(index < size, index, period - index)


def _padded(x: Tensor, pads: list[int], axes: list[int], mode: str, value: Any) -> Tensor:
    """Pad `axes` by `pads`, all beginnings before all ends; negative pads cut off."""
    count = len(axes)
    by_axis = {axis % max(x.ndim, 1): (pads[i], pads[count + i]) for i, axis in enumerate(axes)}
    if mode != "constant":
        for axis, (before, after) in by_axis.items():
            x = x.index_select(axis, _source_indices(x.shape[axis], before, after, mode))
        return x
    if x.is_floating_point():
        spelled = [side for axis in range(x.ndim - 1, -1, -1) for side in by_axis.get(axis, (0, 0))]
        return functional.pad(x, spelled, value=float(value))
    shape, place = list(x.shape), [slice(None)] * x.ndim
    for axis, (before, after) in by_axis.items():
        x = x.narrow(axis, max(-before, 0), x.shape[axis] - max(-before, 0) - max(-after, 0))
        shape[axis] = x.shape[axis] + max(before, 0) + max(after, 0)
        place[axis] = slice(max(before, 0), max(before, 0) + x.shape[axis])
    result = x.new_full(shape, value)
    result[tuple(place)] = x
    return result


@op("Pad", since=11)
def _pad(call: Call, x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None) -> Tensor:
    chosen = list(range(x.ndim)) if axes is None else axes.tolist()
    fill, mode = 0 if value is None else value.item(), call.get("mode", "constant")
    result = _padded(x, pads.tolist(), chosen, mode, fill)
    if value is None or not value.requires_grad or mode != "constant":
        return result
    inside = _padded(torch.ones_like(x, dtype=torch.bool), pads.tolist(), chosen, mode, False)
    return torch.where(inside, result, value.reshape(()))  # the same numbers, as a function of the value


@op("Pad", since=2)
def _pad_attributes(call: Call, x: Tensor) -> Tensor:
    axes = list(range(x.ndim))
    return _padded(x, call.get("pads"), axes, call.get("mode", "constant"), call.get("value", 0.0))


@op("CenterCropPad")
def _center_crop_pad(call: Call, x: Tensor, shape: Tensor) -> Tensor:
    axes = call.get("axes") or list(range(x.ndim))
    # What is cut off or added in front is the smaller half.
    more = [size - x.shape[axis] for axis, size in zip(axes, shape.tolist(), strict=True)]
    before = [-(-extra // 2) if extra < 0 else extra // 2 for extra in more]
    return _padded(x, before + [extra - b for extra, b in zip(more, before, strict=True)], axes, "constant", 0)


@op("OneHot")
def _one_hot(call: Call, indices: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    count, axis = int(depth), call.get("axis", -1)
    places = torch.arange(count)
    wanted = indices.to(torch.int64).unsqueeze(axis if axis >= 0 else axis + indices.ndim + 1)
    places = places.reshape([-1 if at == axis % (indices.ndim + 1) else 1 for at in range(indices.ndim + 1)])
    # An index beyond the depth, either way, leaves its row off.
    inside = (wanted >= -count) & (wanted < count)
    hit = (torch.where(wanted < 0, wanted + count, wanted) == places) & inside
    return torch.where(hit, values[1], values[0])
