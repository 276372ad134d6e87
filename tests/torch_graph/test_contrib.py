"""ONNX Runtime's own operators, against ONNX Runtime on random inputs."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from tests.builders import normal
from tests.torch_graph.common import assert_same, run_ort, run_torch

pytestmark = pytest.mark.torch
MICROSOFT = "com.microsoft"


def one_node(op_type, inputs, outputs, *, domain=MICROSOFT, constants=(), **attributes):
    """A model of one node, and its feeds.

    Args:
        op_type: The operator.
        inputs: One array or None for each input, in order.
        outputs: How many outputs, or one flag for each.
        domain: Of the operator.
        constants: Indices of inputs that are initializers.
        attributes: Of the node; those that are None are left out.
    """
    names = ["" if array is None else f"x{i}" for i, array in enumerate(inputs)]
    wanted = [True] * outputs if isinstance(outputs, int) else outputs
    results = [f"y{i}" if flag else "" for i, flag in enumerate(wanted)]
    given = {name: array for name, array in zip(names, inputs, strict=True) if name}
    attributes = {name: value for name, value in attributes.items() if value is not None}
    node = helper.make_node(op_type, names, results, "node", domain=domain, **attributes)
    fixed = {f"x{i}" for i in constants}
    graph = helper.make_graph(
        [node],
        "g",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in given.items()
            if name not in fixed
        ],
        [onnx.ValueInfoProto(name=name) for name in results if name],
        [
            helper.make_tensor(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape, array.tobytes(), True)
            for name, array in given.items()
            if name in fixed
        ],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, ir_version=10, opset_imports=imports)
    return ir.serde.deserialize_model(model), {name: array for name, array in given.items() if name not in fixed}


@pytest.mark.parametrize(
    ("op_type", "count", "attributes"),
    [
        ("Gelu", 1, {}),
        ("FastGelu", 1, {}),
        ("FastGelu", 2, {}),
        ("BiasGelu", 2, {}),
        ("QuickGelu", 1, {}),
        ("QuickGelu", 1, {"alpha": 1.5}),
    ],
)
@pytest.mark.parametrize("shape", [(2, 3, 8), (5, 8)])
def test_activations(op_type, count, attributes, shape):
    inputs = [normal(shape, 0, scale=3), normal(8, 1)][:count]
    assert_same(*one_node(op_type, inputs, 1, **attributes))


@pytest.mark.parametrize("shape", [(2, 3, 8), (5, 8)])
@pytest.mark.parametrize("epsilon", [None, 1e-2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shift", [False, True])
def test_skip_layer_normalization(shape, epsilon, bias, shift):
    rest = [normal(8, 3) if shift else None, normal(8, 4) if bias else None]
    inputs = [normal(shape, 0), normal(shape, 1), normal(8, 2), *rest]
    assert_same(*one_node("SkipLayerNormalization", inputs, [True, False, False, True], epsilon=epsilon))


@pytest.mark.parametrize("shape", [(2, 3, 8), (5, 8)])
@pytest.mark.parametrize("bias", [False, True])
def test_skip_simplified_layer_normalization(shape, bias):
    inputs = [normal(shape, 0), normal(shape, 1), normal(8, 2), *([normal(8, 3)] if bias else [])]
    model, feeds = one_node("SkipSimplifiedLayerNormalization", inputs, [True, False, False, True], epsilon=1e-5)
    assert_same(model, feeds)


@pytest.mark.parametrize("axis", [-1, 1])
def test_simplified_layer_normalization(axis):
    scale = normal((3, 8)[2 - (-axis if axis < 0 else 2) :] if axis > 0 else 8, 1)
    inputs = [normal((2, 3, 8), 0), scale]
    assert_same(*one_node("SimplifiedLayerNormalization", inputs, 1, domain="", axis=axis, epsilon=1e-3))


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("form", ["flat", "heads", "partial"])
def test_rotary_embedding(interleaved, offset, form):
    batch, length, heads, size = 2, 5, 3, 8
    width = 4 if form == "partial" else size
    x = normal((batch, heads, length, size) if form == "heads" else (batch, length, heads * size), 0)
    angles = normal((16, width // 2), 1)
    positions = np.array([3]) if offset else np.array([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]])
    partial = {"num_heads": heads, "rotary_embedding_dim": width} if form == "partial" else {}
    inputs = [x, positions, np.cos(angles), np.sin(angles)]
    assert_same(*one_node("RotaryEmbedding", inputs, 1, interleaved=interleaved, **partial))


def group_query(*, past, new, heads=4, kv_heads=2, size=16, packed=False, rotary=0, lengths=None, **attributes):
    """A GroupQueryAttention; `lengths` are the tokens of each of two rows, the new ones included."""
    # ONNX Runtime takes several new tokens behind a past for one row only.
    batch, total = 1 if past and new > 1 else 2, past + new
    q, k, v = (normal((batch, new, n * size), seed) for seed, n in ((0, heads), (1, kv_heads), (2, kv_heads)))
    angles = normal((32, size // 2), 3)
    caches = [normal((batch, kv_heads, past, size), seed) for seed in (4, 5)]
    seen = np.array([total] * batch if lengths is None else lengths, np.int32) - 1
    inputs = [
        *([np.concatenate([q, k, v], -1), None, None] if packed else [q, k, v]),
        *caches,
        seen,
        np.array(total, np.int32),
        *([np.cos(angles), np.sin(angles)] if rotary else []),
    ]
    return one_node(
        "GroupQueryAttention", inputs, 3, num_heads=heads, kv_num_heads=kv_heads, do_rotary=rotary, **attributes
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("past", "new"), [(0, 5), (4, 1), (3, 4), (0, 1)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rotary": 1},
        {"rotary": 1, "rotary_interleaved": 1, "scale": 0.3},
        {"local_window_size": 3},
        {"softcap": 2.0},
        {"heads": 2, "kv_heads": 2},
        {"heads": 6, "kv_heads": 1},
    ],
)
def test_group_query_attention(packed, past, new, options):
    assert_same(*group_query(past=past, new=new, packed=packed, **options))


def test_group_query_attention_of_a_padded_prompt():
    """Rows shorter than the prompt: what lies behind their last token means nothing."""
    model, feeds = group_query(past=0, new=5, rotary=1, lengths=[3, 5])
    ours, theirs = run_torch(model, feeds), run_ort(model, feeds)
    for row, length in enumerate((3, 5)):
        np.testing.assert_allclose(ours["y0"][row, :length], theirs["y0"][row, :length], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(ours["y1"][row, :, :length], theirs["y1"][row, :, :length], rtol=1e-5, atol=1e-5)


def test_group_query_attention_of_rows_of_different_lengths():
    model, feeds = group_query(past=4, new=1, rotary=1, lengths=[3, 5])
    ours, theirs = run_torch(model, feeds), run_ort(model, feeds)
    np.testing.assert_allclose(ours["y0"], theirs["y0"], rtol=1e-5, atol=1e-5)
    for row, length in enumerate((3, 5)):
        np.testing.assert_allclose(ours["y1"][row, :, :length], theirs["y1"][row, :, :length], rtol=1e-5, atol=1e-5)


def multi_head(form, *, past=0, bias=False, padding=None, attention_bias=False, **attributes):
    batch, heads, queries, size = 2, 2, 4, 6
    keys = 3 if form == "cross" else queries
    width = heads * size
    q, k, v = (normal((batch, n, width), seed) for seed, n in ((0, queries), (1, keys), (2, keys)))
    split = [x.reshape(batch, -1, heads, size) for x in (q, k, v)]
    if form == "heads":
        parts = [q, *(x.swapaxes(1, 2) for x in split[1:])]
    elif form.startswith("packed"):
        parts = [np.stack(split, 3), None, None] if form == "packed" else [q, np.stack(split[1:], 3), None]
    else:
        parts = [q, k, v]
    total = keys + past
    masks = {
        "lengths": np.array([total, total - 2], np.int32),
        "mask": np.array([[1] * total, [1] * (total - 1) + [0]], np.int32),
    }
    caches = [normal((batch, heads, past, size), seed) for seed in (4, 5)] if past else []
    inputs = [
        *parts,
        normal(3 * width, 6) if bias else None,
        masks[padding] if padding else None,
        normal((batch, heads, queries, total), 7) if attention_bias else None,
        *caches,
    ]
    while inputs[-1] is None:
        inputs.pop()
    return one_node("MultiHeadAttention", inputs, 3 if past else 1, num_heads=heads, **attributes)


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("plain", {}),
        ("plain", {"bias": True, "scale": 0.2}),
        ("plain", {"padding": "lengths"}),
        ("plain", {"padding": "mask", "mask_filter_value": -100.0}),
        ("plain", {"attention_bias": True}),
        ("plain", {"unidirectional": 1}),
        ("plain", {"past": 3}),
        ("plain", {"past": 3, "bias": True, "attention_bias": True}),
        ("cross", {"bias": True}),
        ("cross", {"padding": "mask"}),
        ("heads", {}),
    ],
)
def test_multi_head_attention(form, options):
    assert_same(*multi_head(form, **options))


@pytest.mark.parametrize("form", ["packed", "packed_kv"])
def test_multi_head_attention_of_packed_inputs(form):
    """ONNX Runtime has no kernel for them on the CPU; what they mean it computes in the plain form."""
    ours = run_torch(*multi_head(form))
    np.testing.assert_allclose(ours["y0"], run_ort(*multi_head("plain"))["y0"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("bits", "zero"),
    # ONNX Runtime has no kernel for 8 bits with a float zero.
    [(bits, zero) for bits in (2, 4, 8) for zero in ("none", "packed", "float") if (bits, zero) != (8, "float")],
)
@pytest.mark.parametrize(("columns", "block", "bias"), [(64, 32, False), (80, 16, True), (96, 64, False)])
def test_mat_mul_nbits(bits, zero, columns, block, bias):
    rng = np.random.default_rng(bits)
    rows, groups = 6, -(-columns // block)
    packed = rng.integers(0, 256, (rows, groups, block * bits // 8)).astype(np.uint8)
    scale = rng.uniform(0.01, 0.1, (rows, groups)).astype(np.float32)
    zeros = {
        "none": None,
        "packed": rng.integers(0, 256, (rows, -(-groups * bits // 8))).astype(np.uint8),
        "float": rng.uniform(0, 2**bits, (rows, groups)).astype(np.float32),
    }[zero]
    inputs = [normal((3, columns), 0), packed, scale, zeros, None, normal(rows, 1) if bias else None]
    while inputs[-1] is None:
        inputs.pop()
    options = {"K": columns, "N": rows, "bits": bits, "block_size": block}
    assert_same(*one_node("MatMulNBits", inputs, 1, **options), tolerance=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("columns", [64, 96])
def test_gather_block_quantized_of_bytes(bits, zero, columns):
    rng = np.random.default_rng(bits)
    rows, block = 9, 32
    groups = columns // block
    data = rng.integers(0, 256, (rows, columns * bits // 8)).astype(np.uint8)
    scale = rng.uniform(0.01, 0.1, (rows, groups)).astype(np.float32)
    zeros = rng.integers(0, 256, (rows, -(-groups * bits // 8))).astype(np.uint8) if zero else None
    inputs = [data, np.array([[1, 8, -1], [0, 0, 3]]), scale, *([zeros] if zero else [])]
    options = {"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
    assert_same(*one_node("GatherBlockQuantized", inputs, 1, constants=(0, 2, 3), **options))


@pytest.mark.parametrize("attributes", [{}, {"transA": 1, "alpha": 0.5}, {"transB": 1}, {"transA": 1, "transB": 1}])
def test_fused_mat_mul(attributes):
    a = normal((2, 5, 4) if attributes.get("transA") else (2, 4, 5), 0)
    b = normal((2, 3, 5) if attributes.get("transB") else (2, 5, 3), 1)
    assert_same(*one_node("FusedMatMul", [a, b], 1, **attributes))


@pytest.mark.parametrize(
    ("op_type", "count", "attributes", "reason"),
    [
        ("MatMulNBits", 5, {"K": 32, "N": 4, "block_size": 32}, "g_idx is not implemented"),
        ("MatMulNBits", 3, {"K": 32, "N": 4, "block_size": 32, "bits": 3}, "bits=3 is not implemented, only 2, 4, 8"),
        ("FusedMatMul", 2, {"transBatchA": 1}, "transBatchA=1 is not implemented, only 0"),
        ("GroupQueryAttention", 12, {"num_heads": 2, "kv_num_heads": 2}, "head_sink is not implemented"),
        ("GroupQueryAttention", 7, {"num_heads": 2, "kv_num_heads": 2, "smooth_softmax": 1}, "smooth_softmax is not"),
        ("Gelu", 1, {"fast": 1}, "attribute fast is not implemented"),
    ],
)
def test_what_is_not_implemented_is_refused(op_type, count, attributes, reason):
    from qcompiler.torch_graph import unsupported

    model, _ = one_node(op_type, [normal(2, 0)] * count, 1, **attributes)
    (problem,) = unsupported(list(model.graph), model.opset_imports)
    assert problem.startswith(f"com.microsoft.{op_type} 'node' at version 1: {reason}")
