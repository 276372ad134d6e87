"""Reductions, positions of extremes, sorting and running sums."""

from collections.abc import Callable

import torch
from torch import Tensor

from qcompiler.torch_graph.registry import Call, op, register

_Reducer = Callable[[Tensor, list[int], bool], Tensor]


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % max(x.ndim, 1) for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep, dtype=x.dtype)
    return x


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.sum(axes, keepdim=keep, dtype=x.dtype) if axes else x


def _mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if x.is_floating_point():
        return x.mean(axes, keepdim=keep) if axes else x
    return x.to(torch.float64).mean(axes, keepdim=keep).to(x.dtype) if axes else x


def _log_sum_exp(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    wide = x if x.is_floating_point() else x.to(torch.float64)
    return torch.logsumexp(wide, axes, keepdim=keep).to(x.dtype) if axes else x


def _norm(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if not x.is_floating_point():
        return _sum(x.to(torch.float64).square(), axes, keep).sqrt().to(x.dtype)
    # Its gradient at zero is zero, unlike that of a square root.
    return torch.linalg.vector_norm(x, 2, axes, keepdim=keep) if axes else x.abs()


def _extreme(x: Tensor, axes: list[int], keep: bool, largest: bool) -> Tensor:
    if not axes:
        return x
    if x.dtype == torch.bool:
        return _extreme(x.to(torch.uint8), axes, keep, largest).to(torch.bool)
    if any(x.shape[axis] == 0 for axis in axes):
        info = torch.finfo(x.dtype) if x.is_floating_point() else torch.iinfo(x.dtype)
        limit = float("inf") if x.is_floating_point() else info.max
        lowest = -limit if x.is_floating_point() else info.min
        shape = x.sum(axes, keepdim=keep).shape
        return x.new_full(shape, lowest if largest else limit)
    return (torch.amax if largest else torch.amin)(x, axes, keepdim=keep)


_REDUCERS: dict[str, _Reducer] = {
    "ReduceL1": lambda x, axes, keep: _sum(x.abs(), axes, keep),
    "ReduceL2": _norm,
    "ReduceLogSum": lambda x, axes, keep: _sum(x, axes, keep).log().to(x.dtype),
    "ReduceLogSumExp": _log_sum_exp,
    "ReduceMax": lambda x, axes, keep: _extreme(x, axes, keep, True),
    "ReduceMean": _mean,
    "ReduceMin": lambda x, axes, keep: _extreme(x, axes, keep, False),
    "ReduceProd": _product,
    "ReduceSum": _sum,
    "ReduceSumSquare": lambda x, axes, keep: _sum(x.square(), axes, keep),
}


def _over_input(reduce: _Reducer) -> Callable[..., Tensor]:
    """Axes are the second input."""

    def function(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
        chosen = [] if axes is None else axes.tolist()
        if not chosen and not call.get("noop_with_empty_axes", 0):
            chosen = list(range(x.ndim))
        return reduce(x, chosen, bool(call.get("keepdims", 1)))

    return function


def _over_attribute(reduce: _Reducer) -> Callable[..., Tensor]:
    """Axes are an attribute."""

    def function(call: Call, x: Tensor) -> Tensor:
        return reduce(x, call.get("axes") or list(range(x.ndim)), bool(call.get("keepdims", 1)))

    return function


for _name, _reduce in _REDUCERS.items():
    register(_over_attribute(_reduce), _name, since=1)
    register(_over_input(_reduce), _name, since=13 if _name == "ReduceSum" else 18)


def _argument(call: Call, x: Tensor, largest: bool) -> Tensor:
    axis, last = call.get("axis", 0), call.get("select_last_index", 0)
    searched = x.flip(axis) if last else x
    find = torch.argmax if largest else torch.argmin
    found = find(searched, axis, keepdim=bool(call.get("keepdims", 1)))
    return x.shape[axis] - 1 - found if last else found


@op("ArgMax")
def _arg_max(call: Call, x: Tensor) -> Tensor:
    return _argument(call, x, largest=True)


@op("ArgMin")
def _arg_min(call: Call, x: Tensor) -> Tensor:
    return _argument(call, x, largest=False)


def _top(x: Tensor, count: int, axis: int, largest: bool) -> tuple[Tensor, Tensor]:
    """The first `count` in order; of equals the one of lower index comes first, which torch.topk does not promise."""
    values, indices = torch.sort(x, dim=axis, descending=largest, stable=True)
    return values.narrow(axis, 0, count), indices.narrow(axis, 0, count)


@op("TopK", since=10)
def _top_k(call: Call, x: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    return _top(x, int(count), call.get("axis", -1), bool(call.get("largest", 1)))


@op("TopK", since=1)
def _top_k_attribute(call: Call, x: Tensor) -> tuple[Tensor, Tensor]:
    return _top(x, call.get("k"), call.get("axis", -1), largest=True)


def _running(call: Call, x: Tensor, axis: int, function: Callable[..., Tensor], first: int) -> Tensor:
    """Running sums or products; `exclusive` ones begin with `first` and leave out the element itself."""
    reverse = call.get("reverse", 0)
    if reverse:
        x = x.flip(axis)
    if call.get("exclusive", 0) and x.shape[axis]:
        start = torch.full_like(x.narrow(axis, 0, 1), first)
        x = torch.cat([start, x.narrow(axis, 0, x.shape[axis] - 1)], axis)
    result = function(x, axis, dtype=x.dtype)
    return result.flip(axis) if reverse else result


@op("CumSum")
def _cum_sum(call: Call, x: Tensor, axis: Tensor) -> Tensor:
    return _running(call, x, int(axis), torch.cumsum, 0)


@op("CumProd")
def _cum_prod(call: Call, x: Tensor, axis: Tensor) -> Tensor:
    return _running(call, x, int(axis), torch.cumprod, 1)
