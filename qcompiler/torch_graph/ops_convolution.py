"""Convolutions of any number of spatial axes, with ONNX's ways of padding."""

from torch import Tensor
from torch.nn import functional

from qcompiler.torch_graph.registry import Call, op

__all__ = ["convolve", "same_pads", "spread"]

# By the number of spatial axes. These, unlike `torch.convolution`, take part in PyTorch's mixed precision.
_FORWARD = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}


def spread(pads: list[int]) -> list[int]:
    """ONNX pads (all beginnings, then all ends) -> those of torch's pad (pairs, the last axis first)."""
    count = len(pads) // 2
    return [side for axis in range(count - 1, -1, -1) for side in (pads[axis], pads[count + axis])]


def same_pads(call: Call, size: list[int], reach: list[int], strides: list[int]) -> list[int]:
    """The pads that a node asks for, by `pads` or `auto_pad`.

    Args:
        call: The node.
        size: Of each spatial axis of the input.
        reach: Of the window along each axis, dilation included.
        strides: Of the window.

    Returns:
        All beginnings, then all ends.
    """
    mode = call.get("auto_pad", "NOTSET")
    if mode == "NOTSET":
        return list(call.get("pads") or [0] * (2 * len(size)))
    if mode == "VALID":
        return [0] * (2 * len(size))
    # As many outputs as strides begin in the input.
    total = [max((-(-n // s) - 1) * s + r - n, 0) for n, r, s in zip(size, reach, strides, strict=True)]
    low, high = [t // 2 for t in total], [t - t // 2 for t in total]
    return low + high if mode == "SAME_UPPER" else high + low


def convolve(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Cross-correlation of x [N, C, ...] and weight [M, C / group, ...]."""
    kernel = list(weight.shape[2:])
    axes = len(kernel)
    strides, dilations = call.get("strides", [1] * axes), call.get("dilations", [1] * axes)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    pads = same_pads(call, list(x.shape[2:]), reach, strides)
    if pads[:axes] == pads[axes:]:
        padding = pads[:axes]
    else:
        x, padding = functional.pad(x, spread(pads)), [0] * axes
    groups = call.get("group", 1)
    return _FORWARD[axes](x, weight, bias, strides, padding, dilations, groups)


@op("Conv")
def _conv(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return convolve(call, x, weight, bias)


@op("ConvTranspose")
def _conv_transpose(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    kernel, size = list(weight.shape[2:]), list(x.shape[2:])
    axes = len(kernel)
    strides, dilations = call.get("strides", [1] * axes), call.get("dilations", [1] * axes)
    extra = call.get("output_padding", [0] * axes)
    whole = [(n - 1) * s + (k - 1) * d + 1 for n, s, k, d in zip(size, strides, kernel, dilations, strict=True)]
    pads = _transposed_pads(call, [w + e for w, e in zip(whole, extra, strict=True)], size, strides)
    full = _TRANSPOSED[axes](x, weight, None, strides, 0, 0, call.get("group", 1), dilations)
    # Pads cut off what `output_padding` adds; a negative side of torch's pad cuts, a positive one adds zeros.
    ends = [e - p for e, p in zip(extra, pads[axes:], strict=True)]
    full = functional.pad(full, spread([-p for p in pads[:axes]] + ends))
    return full if bias is None else full + bias.reshape(-1, *[1] * axes)


def _transposed_pads(call: Call, whole: list[int], size: list[int], strides: list[int]) -> list[int]:
    """What is cut off the `whole` output: as the node says, or what its output shape leaves over."""
    mode, shape = call.get("auto_pad", "NOTSET"), call.get("output_shape")
    if shape is None and mode.startswith("SAME"):
        shape = [n * s for n, s in zip(size, strides, strict=True)]
    if shape is None:
        return call.get("pads", [0] * (2 * len(size))) if mode == "NOTSET" else [0] * (2 * len(size))
    total = [w - n for w, n in zip(whole, shape[-len(whole) :], strict=True)]
    low, high = [t // 2 for t in total], [t - t // 2 for t in total]
    return low + high if mode == "SAME_UPPER" else high + low
