"""Reading and writing at indices."""

import math

import torch
from torch import Tensor

from qcompiler.torch_graph.registry import Call, op


def _wrapped(indices: Tensor, size: int) -> Tensor:
    """int64 indices with negative ones counted from the end."""
    indices = indices.to(torch.int64)
    return torch.where(indices < 0, indices + size, indices)


def gather(x: Tensor, indices: Tensor, axis: int) -> Tensor:
    """Slices of x along an axis, in the shape of the indices."""
    axis %= x.ndim
    chosen = x.index_select(axis, _wrapped(indices, x.shape[axis]).reshape(-1))
    return chosen.reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


@op("Gather")
def _gather(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    return gather(x, indices, call.get("axis", 0))


@op("GatherElements")
def _gather_elements(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    axis = call.get("axis", 0)
    return torch.gather(x, axis, _wrapped(indices, x.shape[axis]))


def _rows(x: Tensor, indices: Tensor, batch: int = 0) -> tuple[Tensor, int]:
    """Indices [..., depth] -> the row numbers they mean where the indexed axes of x are one, and their number.

    The first `batch` axes are shared by x and indices, and the indexed axes follow them.
    """
    depth = indices.shape[-1]
    sizes = x.shape[: batch + depth]
    row = torch.zeros(indices.shape[:-1], dtype=torch.int64)
    for axis in range(batch):
        shape = [-1 if at == axis else 1 for at in range(indices.ndim - 1)]
        row = row * sizes[axis] + torch.arange(sizes[axis]).reshape(shape)
    for at in range(depth):
        row = row * sizes[batch + at] + _wrapped(indices[..., at], sizes[batch + at])
    return row, batch + depth


@op("GatherND")
def _gather_nd(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    row, axes = _rows(x, indices, call.get("batch_dims", 0))
    flat = x.reshape((math.prod(x.shape[:axes]), *x.shape[axes:]))
    return flat.index_select(0, row.reshape(-1)).reshape((*row.shape, *x.shape[axes:]))


_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _scattered(x: Tensor, axis: int, index: Tensor, updates: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return x.scatter(axis, index, updates)
    return x.scatter_reduce(axis, index, updates, _REDUCTIONS[reduction], include_self=True)


@op("ScatterElements", "Scatter")
def _scatter_elements(call: Call, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    axis = call.get("axis", 0)
    return _scattered(x, axis, _wrapped(indices, x.shape[axis]), updates, call.get("reduction", "none"))


@op("ScatterND")
def _scatter_nd(call: Call, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    row, axes = _rows(x, indices)
    width = math.prod(x.shape[axes:])
    flat = x.reshape(math.prod(x.shape[:axes]), width)
    index = row.reshape(-1, 1).expand(-1, width)
    return _scattered(flat, 0, index, updates.reshape(-1, width), call.get("reduction", "none")).reshape(x.shape)


def _sliced(x: Tensor, starts: list[int], ends: list[int], axes: list[int], steps: list[int]) -> Tensor:
    place = [slice(None)] * x.ndim
    backwards = []
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        chosen = range(*slice(start, end, step).indices(x.shape[axis]))
        if step < 0:  # torch slices forwards only
            backwards.append(axis % x.ndim)
            chosen = chosen[::-1]
        place[axis] = slice(chosen.start, max(chosen.stop, 0), chosen.step) if chosen else slice(0, 0)
    result = x[tuple(place)]
    return result.flip(backwards) if backwards else result


@op("Slice", since=10)
def _slice(
    _: Call, x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None
) -> Tensor:
    count = starts.numel()
    chosen = list(range(count)) if axes is None else axes.tolist()
    return _sliced(x, starts.tolist(), ends.tolist(), chosen, [1] * count if steps is None else steps.tolist())


@op("Slice", since=1)
def _slice_attributes(call: Call, x: Tensor) -> Tensor:
    starts = call.get("starts")
    return _sliced(x, starts, call.get("ends"), call.get("axes") or list(range(len(starts))), [1] * len(starts))


@op("NonZero")
def _non_zero(_: Call, x: Tensor) -> Tensor:
    return torch.nonzero(x).T.contiguous()


@op("Compress")
def _compress(call: Call, x: Tensor, condition: Tensor) -> Tensor:
    axis = call.get("axis")
    if axis is None:
        x, axis = x.reshape(-1), 0
    return x.index_select(axis, torch.nonzero(condition).reshape(-1))


@op("ReverseSequence")
def _reverse_sequence(call: Call, x: Tensor, lengths: Tensor) -> Tensor:
    batch, time = call.get("batch_axis", 1), call.get("time_axis", 0)
    place = torch.arange(x.shape[time])
    index = torch.where(place < lengths[:, None], lengths[:, None] - 1 - place, place)  # [batch, time]
    index = index if batch < time else index.T
    index = index.reshape([x.shape[axis] if axis in (batch, time) else 1 for axis in range(x.ndim)])
    return torch.gather(x, time, index.expand(x.shape))


@op("TensorScatter")
def _tensor_scatter(call: Call, past: Tensor, update: Tensor, start: Tensor | None = None) -> Tensor:
    axis = call.get("axis", -2) % past.ndim
    first = torch.zeros(past.shape[0], dtype=torch.int64) if start is None else start
    index = first[:, None] + torch.arange(update.shape[axis])  # [batch, new]
    if call.get("mode", "linear") == "circular":
        index = index % past.shape[axis]
    shape = [size if at in (0, axis) else 1 for at, size in enumerate(update.shape)]
    return past.scatter(axis, index.reshape(shape).expand(update.shape), update)
