"""Inputs for the operators of `qcompiler.kernels`, and models of one of them."""

import itertools

import numpy as np
import onnx
from onnx import helper

from qcompiler.kernels.schemas import DOMAIN, OPERATORS, function_proto
from qcompiler.numerics.packing import pack_stream

OPSET = 21


def make_inputs(name, rows=(1,), N=24, K=136, group_size=32, dtype="float32", entry=1, zeros="each", seed=0):
    """All inputs of an operator: activations ``[*rows, K]``, codes that are anything, scales of both signs.

    `entry` is the number of columns that an entry of a codebook has; `zeros` are one for `each` group, `one` for all,
    or the `half` that makes one bit a sign.
    """
    random, bits = np.random.default_rng(seed), OPERATORS[name].bits
    groups = -(-K // group_size)
    codes = random.integers(0, 1 << bits, (N, -(-K // entry))).astype(np.uint8)
    stream = pack_stream(codes, bits, group_size // entry)
    activations = random.standard_normal((*rows, K)).astype(dtype)
    scales = (random.uniform(0.5, 1.5, (N, groups, 1)) * random.choice([-1, 1], (N, groups, 1))).astype(dtype)
    bias = random.standard_normal(N).astype(dtype) if seed % 2 == 0 else np.zeros(1, dtype)
    if "Codebook" in name:
        tables = 2
        codebook = random.standard_normal((tables << bits, entry)).astype(dtype)
        starts = (random.integers(0, tables, (N, 1, 1)) << bits).astype(np.int32)
        return [activations, stream, codebook, starts, scales, bias]
    if name == "MatMulSigns":
        return [activations, stream, scales, bias]
    shape = (N, groups, 1) if zeros == "each" else (1, 1, 1)
    zero_points = random.integers(0, 1 << bits, shape).astype(np.uint8)
    if zeros == "half":
        zero_points = np.full(shape, 0.5, dtype)
    return [activations, stream, scales, zero_points, bias]


def model_of(name, inputs, *, body=True, opset=OPSET, **attributes):
    """A model of one operator, with its body or without, whose input is A alone."""
    names = [each.name for each in OPERATORS[name].inputs]
    node = helper.make_node(name, names, ["Y"], domain=DOMAIN, **{**OPERATORS[name].attributes, **attributes})
    element = helper.np_dtype_to_tensor_dtype(inputs[0].dtype)
    rank = inputs[0].ndim
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("A", element, [f"d{i}" for i in range(rank - 1)] + [inputs[0].shape[-1]])],
        [helper.make_tensor_value_info("Y", element, [f"d{i}" for i in range(rank - 1)] + ["N"])],
        [onnx.numpy_helper.from_array(array, label) for array, label in zip(inputs[1:], names[1:], strict=True)],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    functions = [function_proto(name, opset)] if body else []
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)


def cases():
    """(operator, options of `make_inputs`): every operator, group size, and kind of zero points and entries."""
    for name, (N, K) in itertools.product(OPERATORS, ((24, 136), (5, 64), (33, 1000), (1, 7))):
        for group_size in (16, 32, 64, 128, 256):
            yield name, {"N": N, "K": K, "group_size": group_size, "entry": 1}
        yield name, {"N": N, "K": K, "group_size": -(-K // 64) * 64}
        if "Codebook" in name:
            for entry in (2, 4):
                yield name, {"N": N, "K": K, "group_size": 64, "entry": entry}
        elif name != "MatMulSigns":
            yield name, {"N": N, "K": K, "group_size": 64, "zeros": "one"}
            yield name, {"N": N, "K": K, "group_size": 64, "zeros": "half"}
