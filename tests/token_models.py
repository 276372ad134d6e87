"""A small model of tokens, in float and with block-quantized weights, for the tests of verification and timing."""

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from qcompiler.numerics.affine import Grid, WeightSpec, min_max_grid, quantize
from qcompiler.numerics.packing import pack_codes, pack_matmul_nbits
from tests.stored_models import make_model

VOCABULARY, WIDTH, HIDDEN = 128, 64, 96
SHAPE = ["batch", "sequence"]


def weights(seed=0):
    """table [V, D], up [D, H], head [H, V]."""
    rng = np.random.default_rng(seed)
    shapes = {"table": (VOCABULARY, WIDTH), "up": (WIDTH, HIDDEN), "head": (HIDDEN, VOCABULARY)}
    return {name: rng.standard_normal(shape).astype(np.float32) * 0.3 for name, shape in shapes.items()}


def _model(nodes, initializers, outputs=("logits",), mask=True, shape=SHAPE, extra_outputs=()):
    names = ["input_ids", *(["attention_mask"] if mask else [])]
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name in names]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [*shape, VOCABULARY]) for name in outputs]
    opsets = (("", 21), ("com.microsoft", 1))
    return make_model(nodes, inputs, [*results, *extra_outputs], initializers, opsets=opsets)


def _body(up, head):
    """Gather, `up`, Relu, `head`; the two are nodes that read "embedded" and "active"."""
    return [
        helper.make_node("Gather", ["table", "input_ids"], ["embedded"], name="embed"),
        up,
        helper.make_node("Relu", ["hidden"], ["active"], name="relu"),
        head,
    ]


def float_model(**options):
    up = helper.make_node("MatMul", ["embedded", "up"], ["hidden"], name="up")
    head = helper.make_node("MatMul", ["active", "head"], ["logits"], name="head")
    constants = [numpy_helper.from_array(array, name) for name, array in weights().items()]
    return _model(_body(up, head), constants, **options)


def blocks(name, weight, bits, level, *, source, result, block=32):
    """MatMulNBits for a weight [K, N], and its constants."""
    columns, rows = weight.shape
    spec = WeightSpec(bits, block, symmetric=False)
    grid = min_max_grid(np.ascontiguousarray(weight.T), spec)
    codes = quantize(np.ascontiguousarray(weight.T), grid, spec)
    packed = pack_matmul_nbits(pack_codes(codes, bits), bits, columns, block, spec.format.mid)
    constants = {
        f"{name}_codes": packed,
        f"{name}_scales": grid.scale,
        f"{name}_zeros": pack_codes(grid.zero_point.astype(np.uint8), bits),
    }
    node = helper.make_node(
        "MatMulNBits", [source, *constants], [result], name=name, domain="com.microsoft",
        K=columns, N=rows, bits=bits, block_size=block, accuracy_level=level,
    )  # fmt: skip
    return node, [numpy_helper.from_array(array, key) for key, array in constants.items()]


def block_model(*, bits=4, head_bits=8, level=0, head_level=4, **options):
    """The same with MatMulNBits."""
    arrays = weights()
    up, up_constants = blocks("up", arrays["up"], bits, level, source="embedded", result="hidden")
    head, head_constants = blocks("head", arrays["head"], head_bits, head_level, source="active", result="logits")
    table = numpy_helper.from_array(arrays["table"], "table")
    return _model(_body(up, head), [table, *up_constants, *head_constants], **options)


def dequantizing_model(*, shared=False):
    """The same with int8 weights behind DequantizeLinear, one scale for each output channel.

    `shared` lets a second MatMul read the last one, which keeps ONNX Runtime from fusing it.
    """
    arrays = weights()
    constants = [numpy_helper.from_array(arrays["table"], "table")]
    nodes = []
    for name in ("up", "head"):
        grid = Grid(np.abs(arrays[name]).max(0) / np.float32(127), np.zeros(1, np.float32))
        codes = np.rint(arrays[name] / grid.scale).astype(np.int8)
        constants += [numpy_helper.from_array(codes, f"{name}_q"), numpy_helper.from_array(grid.scale, f"{name}_s")]
        nodes.append(
            helper.make_node("DequantizeLinear", [f"{name}_q", f"{name}_s"], [name], name=f"dq_{name}", axis=1)
        )
    up = helper.make_node("MatMul", ["embedded", "up"], ["hidden"], name="up")
    head = helper.make_node("MatMul", ["active", "head"], ["logits"], name="head")
    nodes = [*nodes, *_body(up, head)]
    if shared:
        nodes[-1].output[0] = "half"
        nodes.append(helper.make_node("Neg", ["active"], ["negative"], name="neg"))
        nodes.append(helper.make_node("MatMul", ["negative", "head"], ["other"], name="head2"))
        nodes.append(helper.make_node("Sub", ["half", "other"], ["double"], name="sub"))
        nodes.append(helper.make_node("Mul", ["double", "one_half"], ["logits"], name="mul"))
        constants.append(numpy_helper.from_array(np.array(0.5, np.float32), "one_half"))
    return _model(nodes, constants)


def rows(count=3, length=80, seed=1, padding=0):
    """Feeds of one row each, the last `padding` positions masked."""
    rng = np.random.default_rng(seed)
    feeds = []
    for _ in range(count):
        mask = np.ones((1, length), np.int64)
        mask[:, length - padding :] = 0
        feeds.append({"input_ids": rng.integers(0, VOCABULARY, (1, length)), "attention_mask": mask})
    return feeds
