"""Activation functions and softmax."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from qcompiler.torch_graph.registry import MICROSOFT, Call, op


@op("Relu")
def _relu(_: Call, x: Tensor) -> Tensor:
    return torch.relu(x)


@op("Sigmoid")
def _sigmoid(_: Call, x: Tensor) -> Tensor:
    return torch.sigmoid(x)


@op("Tanh")
def _tanh(_: Call, x: Tensor) -> Tensor:
    return torch.tanh(x)


@op("Gelu")
def _gelu(call: Call, x: Tensor) -> Tensor:
    return functional.gelu(x, approximate=call.get("approximate", "none"))


@op("Gelu", domain=MICROSOFT, knows="")
def _gelu_contrib(_: Call, x: Tensor) -> Tensor:
    return functional.gelu(x)


@op("BiasGelu", domain=MICROSOFT, knows="")
def _bias_gelu(_: Call, x: Tensor, bias: Tensor) -> Tensor:
    return functional.gelu(x + bias)


@op("FastGelu", domain=MICROSOFT, knows="")
def _fast_gelu(_: Call, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.gelu(x if bias is None else x + bias, approximate="tanh")


@op("QuickGelu", domain=MICROSOFT, knows="alpha")
def _quick_gelu(call: Call, x: Tensor) -> Tensor:
    return x * torch.sigmoid(call.get("alpha", 1.702) * x)


@op("Swish")
def _swish(call: Call, x: Tensor) -> Tensor:
    return x * torch.sigmoid(call.get("alpha", 1.0) * x)


@op("Celu")
def _celu(call: Call, x: Tensor) -> Tensor:
    return functional.celu(x, call.get("alpha", 1.0))


@op("Elu")
def _elu(call: Call, x: Tensor) -> Tensor:
    return functional.elu(x, call.get("alpha", 1.0))


@op("Selu", since=6)
def _selu(call: Call, x: Tensor) -> Tensor:
    alpha, gamma = call.get("alpha", 1.67326319217681884765625), call.get("gamma", 1.05070102214813232421875)
    return gamma * functional.elu(x, alpha)


@op("LeakyRelu")
def _leaky_relu(call: Call, x: Tensor) -> Tensor:
    return functional.leaky_relu(x, call.get("alpha", 0.01))


@op("ThresholdedRelu")
def _thresholded_relu(call: Call, x: Tensor) -> Tensor:
    return torch.where(x > call.get("alpha", 1.0), x, torch.zeros_like(x))


@op("PRelu", since=7)
def _prelu(_: Call, x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


@op("HardSigmoid")
def _hard_sigmoid(call: Call, x: Tensor) -> Tensor:
    return (x * call.get("alpha", 0.2) + call.get("beta", 0.5)).clamp(0, 1)


@op("HardSwish")
def _hard_swish(_: Call, x: Tensor) -> Tensor:
    return functional.hardswish(x)


@op("Mish")
def _mish(_: Call, x: Tensor) -> Tensor:
    return functional.mish(x)


@op("Softplus")
def _softplus(_: Call, x: Tensor) -> Tensor:
    return functional.softplus(x, threshold=40)  # beyond it the two branches are equal in double precision


@op("Softsign")
def _softsign(_: Call, x: Tensor) -> Tensor:
    return functional.softsign(x)


@op("Shrink")
def _shrink(call: Call, x: Tensor) -> Tensor:
    bias, lambd = call.get("bias", 0.0), call.get("lambd", 0.5)
    zero = torch.zeros_like(x)
    shrunk = torch.where(x > lambd, x - bias, torch.where(x < -lambd, x + bias, zero))
    return shrunk.to(x.dtype)


@op("Softmax", since=13)
def _softmax(call: Call, x: Tensor) -> Tensor:
    return _probabilities(x, call.get("axis", -1))


def _probabilities(x: Tensor, axis: int) -> Tensor:
    if x.requires_grad:
        blind = (x == -math.inf).all(axis, keepdim=True)
        if bool(blind.any()):
            # Where everything is masked the result is NaN, as ONNX has it, and exporters put a Where behind it. Its
            # gradient must be zero: a NaN there would reach every parameter.
            return torch.softmax(x.masked_fill(blind, 0), axis).masked_fill(blind, math.nan)
    return torch.softmax(x, axis)


@op("LogSoftmax", since=13)
def _log_softmax(call: Call, x: Tensor) -> Tensor:
    return torch.log_softmax(x, call.get("axis", -1))


@op("Hardmax", since=13)
def _hardmax(call: Call, x: Tensor) -> Tensor:
    axis = call.get("axis", -1)
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1)


def _flat(call: Call, x: Tensor) -> Tensor:
    """Before version 13 the axes from `axis` on counted as one: [..., axis, ...] -> [-1, axis * ...]."""
    return x.flatten(call.get("axis", 1) % max(x.ndim, 1))


@op("Softmax", since=1)
def _softmax_flat(call: Call, x: Tensor) -> Tensor:
    return _probabilities(_flat(call, x), -1).reshape(x.shape)


@op("LogSoftmax", since=1)
def _log_softmax_flat(call: Call, x: Tensor) -> Tensor:
    return torch.log_softmax(_flat(call, x), -1).reshape(x.shape)


@op("Hardmax", since=1)
def _hardmax_flat(call: Call, x: Tensor) -> Tensor:
    flat = _flat(call, x)
    return torch.zeros_like(flat).scatter(-1, flat.argmax(-1, keepdim=True), 1).reshape(x.shape)
