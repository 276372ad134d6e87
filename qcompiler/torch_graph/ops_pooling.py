"""Pooling over windows and over everything."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from qcompiler.torch_graph.ops_convolution import same_pads, spread
from qcompiler.torch_graph.registry import Call, op


@dataclass(frozen=True)
class _Windows:
    """The windows of a pooling node; `pads` cover exactly what they reach, negative where they stop short.

    Attributes:
        kernel: Size along each spatial axis.
        strides: Steps.
        dilations: Distances of the taps.
        pads: Beginnings, then ends.
        declared: The pads of the node, without what rounding the output size up adds.
    """

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    pads: list[int]
    declared: list[int]

    def of(self, x: Tensor, fill: float, pads: list[int] | None = None) -> Tensor:
        """Windows of x: [N, C, ...] -> a view [N, C, outputs..., taps...] of the padded tensor."""
        x = functional.pad(x, spread(self.pads if pads is None else pads), value=fill)
        for axis, (k, s, d) in enumerate(zip(self.kernel, self.strides, self.dilations, strict=True), 2):
            x = x.unfold(axis, (k - 1) * d + 1, s)[..., ::d]
        return x

    @property
    def taps(self) -> list[int]:
        """The axes of `of` that run over a window."""
        return list(range(-len(self.kernel), 0))


def _windows(call: Call, x: Tensor) -> _Windows:
    kernel, size = call.get("kernel_shape"), list(x.shape[2:])
    axes = len(kernel)
    strides, dilations = call.get("strides", [1] * axes), call.get("dilations", [1] * axes)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    pads = same_pads(call, size, reach, strides)
    ends = []
    for axis, (n, r, s) in enumerate(zip(size, reach, strides, strict=True)):
        room = n + pads[axis] + pads[axes + axis] - r
        count = (-(-room // s) if call.get("ceil_mode", 0) else room // s) + 1
        if (count - 1) * s >= n + pads[axis]:
            count -= 1  # a window that begins behind the input is none
        ends.append((count - 1) * s + r - n - pads[axis])
    return _Windows(kernel, strides, dilations, pads[:axes] + ends, pads)


@op("MaxPool")
def _max_pool(call: Call, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    windows = _windows(call, x)
    axes = len(windows.kernel)
    wide = x if x.is_floating_point() else x.to(torch.float32)
    padded = functional.pad(wide, spread(windows.pads), value=-math.inf)
    pool = getattr(functional, f"max_pool{axes}d")
    options = {"stride": windows.strides, "dilation": windows.dilations}
    if not call.wants(1):
        return pool(padded, windows.kernel, **options).to(x.dtype)
    values, index = pool(padded, windows.kernel, return_indices=True, **options)
    # The index within a padded plane -> that within the whole input.
    places: list[Tensor] = []
    for axis in range(axes - 1, -1, -1):
        places.insert(0, index % padded.shape[2 + axis] - windows.pads[axis])
        index = index // padded.shape[2 + axis]
    order = range(axes) if call.get("storage_order", 0) == 0 else range(axes - 1, -1, -1)
    flat = torch.arange(x.shape[0] * x.shape[1]).reshape(*x.shape[:2], *[1] * axes)
    for axis in order:
        flat = flat * x.shape[2 + axis] + places[axis]
    return values.to(x.dtype), flat


@op("AveragePool")
def _average_pool(call: Call, x: Tensor) -> Tensor:
    windows = _windows(call, x)
    total = windows.of(x, 0).sum(windows.taps)
    ones = x.new_ones(1, 1, *x.shape[2:])
    if call.get("count_include_pad", 0):
        # Declared pads count, what rounding the output size up adds does not.
        ones = functional.pad(ones, spread(windows.declared), value=1)
        axes = len(windows.kernel)
        rest = [exact - own for exact, own in zip(windows.pads[axes:], windows.declared[axes:], strict=True)]
        counted = windows.of(ones, 0, [0] * axes + rest)
    else:
        counted = windows.of(ones, 0)
    return total / counted.sum(windows.taps)


@op("LpPool", since=2)
def _lp_pool(call: Call, x: Tensor) -> Tensor:
    windows = _windows(call, x)
    # The gradient of a norm at zero is zero, unlike that of a root.
    return torch.linalg.vector_norm(windows.of(x, 0), call.get("p", 2), windows.taps)


@op("GlobalAveragePool")
def _global_average_pool(_: Call, x: Tensor) -> Tensor:
    return x.mean(list(range(2, x.ndim)), keepdim=True) if x.ndim > 2 else x


@op("GlobalMaxPool")
def _global_max_pool(_: Call, x: Tensor) -> Tensor:
    return x.amax(list(range(2, x.ndim)), keepdim=True) if x.ndim > 2 else x


@op("GlobalLpPool", since=2)
def _global_lp_pool(call: Call, x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, call.get("p", 2), list(range(2, x.ndim)), keepdim=True)
