"""Normalizations, those of ONNX Runtime included."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qcompiler.torch_graph.registry import MICROSOFT, Call, op


@op("BatchNormalization", since=14, only={"training_mode": (0,)})
@op("BatchNormalization", since=9)
def _batch_normalization(call: Call, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    # Spelled out: torch's own gives no gradient to the mean and the variance.
    shape = (-1, *[1] * (x.ndim - 2))
    factor = scale * torch.rsqrt(variance + call.get("epsilon", 1e-5))
    shift = bias - mean * factor
    return (x * factor.reshape(shape) + shift.reshape(shape)).to(x.dtype)


@op("InstanceNormalization", since=6)
def _instance_normalization(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return functional.instance_norm(x, weight=scale, bias=bias, eps=call.get("epsilon", 1e-5))


def _wide(call: Call, x: Tensor) -> Tensor:
    """The input in the type in which statistics are taken: float32 at least, unless the node says otherwise."""
    return x if call.get("stash_type", 1) != 1 or x.dtype == torch.float64 else x.to(torch.float32)


def layer_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Normalized x with its mean and inverse deviation."""
    axis, epsilon = call.get("axis", -1) % x.ndim, call.get("epsilon", 1e-5)
    axes, wide = list(range(axis, x.ndim)), _wide(call, x)
    mean = wide.mean(axes, keepdim=True)
    inverse = torch.rsqrt((wide - mean).square().mean(axes, keepdim=True) + epsilon)
    result = ((wide - mean) * inverse).to(x.dtype) * scale
    return (result if bias is None else result + bias), mean, inverse


@op("LayerNormalization")
def _layer_normalization(call: Call, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Any:
    shape = list(x.shape[call.get("axis", -1) % x.ndim :])
    plain = x.dtype in (torch.float32, torch.float64) and list(scale.shape) == shape and not call.wants(1)
    if plain and not call.wants(2) and (bias is None or bias.shape == scale.shape):
        return functional.layer_norm(x, shape, scale, bias, call.get("epsilon", 1e-5))
    return layer_norm(call, x, scale, bias)


def rms_norm(call: Call, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Each x over its root mean square, with the inverse of that."""
    axis, wide = call.get("axis", -1) % x.ndim, _wide(call, x)
    mean = wide.square().mean(list(range(axis, x.ndim)), keepdim=True)
    inverse = torch.rsqrt(mean + call.get("epsilon", 1e-5))
    return (wide * inverse).to(x.dtype) * scale, inverse


@op("RMSNormalization")
def _rms_normalization(call: Call, x: Tensor, scale: Tensor) -> Tensor:
    return rms_norm(call, x, scale)[0]


# ONNX Runtime knows it in either domain.
@op("SimplifiedLayerNormalization", knows="axis epsilon stash_type")
@op("SimplifiedLayerNormalization", domain=MICROSOFT, knows="axis epsilon stash_type")
def _simplified_layer_normalization(call: Call, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return rms_norm(call, x, scale)


@op("SkipLayerNormalization", domain=MICROSOFT, knows="epsilon")
def _skip_layer_normalization(
    call: Call, x: Tensor, skip: Tensor, scale: Tensor, shift: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, ...]:
    total = x + skip if bias is None else x + skip + bias
    return *layer_norm(call, total, scale, shift), total


@op("SkipSimplifiedLayerNormalization", domain=MICROSOFT, knows="epsilon")
def _skip_simplified_layer_normalization(
    call: Call, x: Tensor, skip: Tensor, scale: Tensor, bias: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    total = x + skip if bias is None else x + skip + bias
    result, inverse = rms_norm(call, total, scale)
    return result, None, inverse, total


def _group_normalized(call: Call, x: Tensor) -> Tensor:
    """The input [N, C, ...] with each of `num_groups` groups of channels normalized."""
    wide = _wide(call, x)
    groups = wide.reshape(x.shape[0], call.get("num_groups"), -1)
    return functional.layer_norm(groups, groups.shape[2:], eps=call.get("epsilon", 1e-5)).reshape(x.shape).to(x.dtype)


@op("GroupNormalization", since=21)
def _group_normalization(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    shape = (-1, *[1] * (x.ndim - 2))
    return _group_normalized(call, x) * scale.reshape(shape) + bias.reshape(shape)


@op("GroupNormalization", since=18)
def _group_normalization_by_group(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    each = x.shape[1] // call.get("num_groups")
    return _group_normalization(call, x, scale.repeat_interleave(each), bias.repeat_interleave(each))


@op("LpNormalization")
def _lp_normalization(call: Call, x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, call.get("p", 2), call.get("axis", -1), keepdim=True)
    return torch.where(norm == 0, torch.zeros_like(x), x / torch.where(norm == 0, 1, norm))


@op("MeanVarianceNormalization", since=9)
def _mean_variance_normalization(call: Call, x: Tensor) -> Tensor:
    axes = call.get("axes", [0, 2, 3])
    centred = x - x.mean(axes, keepdim=True)
    count = math.prod(x.shape[axis] for axis in axes)
    # A norm, since the gradient of a root at zero is infinite, and constant input is no reason for NaN.
    return centred / (torch.linalg.vector_norm(centred, 2, axes, keepdim=True) / math.sqrt(count) + 1e-9)


@op("LRN")
def _lrn(call: Call, x: Tensor) -> Tensor:
    size = call.get("size")
    below = (size - 1) // 2
    pads = [0, 0] * (x.ndim - 2) + [below, size - 1 - below]
    total = functional.pad(x.square(), pads).unfold(1, size, 1).sum(-1)
    base = call.get("bias", 1.0) + call.get("alpha", 1e-4) / size * total
    return x / base.pow(call.get("beta", 0.75))
