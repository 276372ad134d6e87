"""Small graphs whose activations are quantized, and what runs them."""

import re

import numpy as np

from qcompiler.numerics.metrics import sqnr_db
from qcompiler.session import OrtRunner, saturates
from tests.builders import apply, context, normal, parse, quantized, run, serialized

CONV = "Conv <pads = [1, 1, 1, 1]>"
IMAGE = ("float[B,8,6,6] x", "float[B,8,6,6] y")
ROWS = ("float[B,8] x", "float[B,8] y")
TOKENS = ("float[B,T,8] x", "float[B,T,8] y")
SHAPES = {IMAGE: (2, 8, 6, 6), ROWS: (12, 8), TOKENS: (2, 6, 8)}
# Codes of 8-bit weights each way, see `integers`.
REACH = 63 if saturates() else 127
PASSES = ("raise_opset", "insert_qdq", "insert_dynamic", "export_qdq", "cleanup")

WEIGHTS = {
    **{f"w{i}": normal((8, 8, 3, 3), i, scale=72**-0.5) for i in range(4)},
    "wide": normal((8, 16, 3, 3), 9, scale=144**-0.5),
    **{f"m{i}": normal((8, 8), 70 + i, scale=8**-0.5) for i in range(4)},
    **{f"b{i}": normal(8, 50 + i, scale=0.1) for i in range(4)},
    "zero": np.float32(0),
    "six": np.float32(6),
    "one": np.float32(1),
    "less": np.float32(-1),
    "gains": normal((8, 1, 1), 5),
    "ones": np.ones(8, np.float32),
    "double": np.array([1, 1, 2, 2], np.float32),
    "flat": np.array([0, 8, -1], np.int64),
    "image": np.array([0, 8, 6, 6], np.int64),
    "axes": np.array([2, 3], np.int64),
    "axis2": np.array([2], np.int64),
    "start": np.array([0], np.int64),
    "end": np.array([4], np.int64),
}


def graph(body, kind=IMAGE, *, outputs="", dtype="float32", **options):
    """A model of nodes on an image, rows or tokens; weights are taken from WEIGHTS by name."""
    names = set(re.findall(r"\w+", body))
    weights = {name: array for name, array in WEIGHTS.items() if name in names}
    head = f"g ({kind[0]}) => ({outputs or kind[1]})"
    if dtype == "float16":
        head = head.replace("float[", "float16[")
        weights = {n: a.astype(np.float16) if a.dtype == np.float32 else a for n, a in weights.items()}
    return parse(f"{head} {{ {body} }}", weights, **options)


def batches(kind=IMAGE, count=6, *, dtype="float32", seed=100):
    return [{"x": normal(SHAPES[kind], seed + i, dtype)} for i in range(count)]


def integers(model, data, scheme="w8a8", algorithm="rtn", /, **options):
    """The model compiled by the passes that quantize activations; the records of those.

    Where pairs of products saturate, weights have 7 bits: what is compared would not be the same otherwise.
    """
    options.setdefault("reduce_range", saturates())
    ctx = context(scheme=scheme, batches=data, **options)
    quantized(model, ctx, algorithm)
    records = []
    for name in PASSES:
        records += apply(name, model, ctx).records
    return records


def executed(model, feeds):
    """Outputs, and the operators that ONNX Runtime makes of the graph, without those that only move or convert."""
    source = model if isinstance(model, bytes) else serialized(model)
    with OrtRunner(source, threads=1, record=True) as runner:
        outputs = [array.copy() for array in runner.run(feeds).values()]
        operators = sorted(node.op_type for node in runner.executed())
    moved = ("QuantizeLinear", "DequantizeLinear", "Transpose", "Reshape", "ReorderInput", "ReorderOutput")
    return outputs, [op_type for op_type in operators if op_type not in moved]


def check(model, reference, feeds, floor, close=50):
    """The operators that run; asserts an SQNR on every output, and that optimizations change next to nothing.

    A sum that lies between two codes may go to either: in a result of a few hundred codes that leaves more than 50 dB.
    """
    plain = run(model, feeds)
    outputs, operators = executed(model, feeds)
    for expected, found, same in zip(reference, outputs, plain, strict=True):
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype
        bits_lost = 1 if saturates() else 0
        assert sqnr_db(expected.astype(np.float32), found.astype(np.float32)) >= floor - 6 * bits_lost
        change = sqnr_db(same.astype(np.float32), found.astype(np.float32))
        assert change >= close, f"{change} dB between without and with optimizations:\n{same}\n{found}"
    return operators
