"""Nodes whose gradients are checked: attention, rotary embeddings and quantized weights."""

import ml_dtypes
import numpy as np

from tests.builders import normal
from tests.torch_graph.gradient_cases import case, uniform

# Queries, keys and values: of one head, of 4 that share 2, of 2 that share one, and in two rows of 4 that share 2.
SINGLE = ((1, 1, 3, 2), (1, 1, 4, 2), (1, 1, 4, 2))
GROUPED = ((1, 4, 2, 2), (1, 2, 3, 2), (1, 2, 3, 2))
SHARED = ((1, 2, 2, 2), (1, 1, 3, 2), (1, 1, 3, 2))
FLAT = ((2, 2, 4), (2, 3, 2), (2, 3, 2))
HEADS = "q_num_heads = 4, kv_num_heads = 2"
PAST = ((1, 1, 2, 2), (1, 1, 2, 2))
SEEN = [[[[True, False, True, True], [True, True, False, False], [False, True, True, True]]]]


def attention(attributes, shapes, inputs="x0, x1, x2", outputs="y", **options):
    return case(f"{outputs} = Attention {attributes} ({inputs})", *shapes, **options)


ATTENTION = {
    "Attention": [
        attention("", SINGLE),
        attention("<is_causal = 1>", SINGLE),
        attention("<left_window_size = 1, right_window_size = 0>", SINGLE, opset=24),
        attention("<scale = 0.3, softcap = 1.5>", GROUPED),
        attention(f"<{HEADS}, is_causal = 1>", FLAT),
        attention("", SINGLE, "x0, x1, x2, seen", seen=SEEN),
        attention("", SINGLE, "x0, x1, x2, seen", seen=[[False] * 4, [True] * 4, [True, False, True, False]]),
        attention("", (*SHARED, (1, 1, 2, 3)), "x0, x1, x2, x3"),
        attention("", (*SHARED, (2, 2)), "x0, x1, x2, x3"),  # keys beyond the mask are left out
        attention(
            "<is_causal = 1>", (*SHARED, (2, 5), *PAST), "x0, x1, x2, x3, x4, x5", "y, present_key, present_value"
        ),
        *(
            attention(
                f"<qk_matmul_output_mode = {mode}, softcap = 2.0>",
                (*SHARED, (2, 3)),
                "x0, x1, x2, x3",
                "y, , , shown",
            )
            for mode in range(4)
        ),
        attention(f"<{HEADS}>", FLAT, "x0, x1, x2, , , , lengths", lengths=[3, 2], opset=24),
        attention("<softmax_precision = 11>", SINGLE),
        # The attribute asks for float32; what is lost to it divided by the step is the error of a difference.
        attention("<softmax_precision = 1>", SINGLE, eps=1e-2, tolerance=1e-3),
    ],
    "com.microsoft.MultiHeadAttention": [
        case("y = com.microsoft.MultiHeadAttention <num_heads = 2> (x0, x1, x2)", (1, 3, 4), (1, 2, 4), (1, 2, 6)),
        case(
            "y, k, v = com.microsoft.MultiHeadAttention <num_heads = 2, unidirectional = 1, scale = 0.4>"
            " (x0, x1, x2, x3, , x4, x5, x6)",
            *((1, 2, 4), (1, 2, 4), (1, 2, 4), (12,), (1, 2, 2, 4), (1, 2, 2, 2), (1, 2, 2, 2)),
        ),
        case(
            "y = com.microsoft.MultiHeadAttention <num_heads = 2> (x0, x1, x2, , hidden, x3)",
            *((2, 2, 4), (2, 3, 4), (2, 3, 4), (1, 1, 2, 3)),
            hidden=np.array([[1, 1, 1], [1, 0, 1]], np.int32),
        ),
        case(
            "y = com.microsoft.MultiHeadAttention <num_heads = 2, mask_filter_value = -3.0> (x0, x1, x2, , lengths)",
            *((2, 2, 4), (2, 2, 3, 2), (2, 2, 3, 2)),
            lengths=np.array([3, 1], np.int32),
        ),
        case("y = com.microsoft.MultiHeadAttention <num_heads = 2> (x0)", (1, 3, 2, 3, 2)),
        case("y = com.microsoft.MultiHeadAttention <num_heads = 2> (x0, x1)", (1, 2, 4), (1, 3, 2, 2, 2)),
    ],
}


def rotary(domain, inputs, x, caches, attributes="", **fixed):
    cosines, sines = np.cos(normal(caches, 1, "float64")), np.sin(normal(caches, 2, "float64"))
    return case(
        f"y = {domain}RotaryEmbedding {attributes} ({inputs})", normal(x, 0, "float64"), cosines, sines, **fixed
    )


NEIGHBOURS = "interleaved = 1"
ROTARY = {
    "RotaryEmbedding": [
        rotary("", "x0, x1, x2", (2, 2, 3, 4), (2, 3, 2)),
        rotary("", "x0, x1, x2, p", (1, 2, 3, 4), (5, 2), f"<{NEIGHBOURS}>", p=[[4, 0, 4]]),
        rotary("", "x0, x1, x2, p", (1, 2, 12), (4, 1), "<num_heads = 2, rotary_embedding_dim = 2>", p=[[1, 3]]),
    ],
    "com.microsoft.RotaryEmbedding": [
        rotary("com.microsoft.", "x0, p, x1, x2", (1, 2, 3, 4), (5, 2), p=[[4, 0, 4]]),
        rotary("com.microsoft.", "x0, p, x1, x2", (2, 2, 8), (5, 2), f"<{NEIGHBOURS}>", p=[3]),
        rotary(
            "com.microsoft.",
            "x0, p, x1, x2",
            (1, 2, 12),
            (4, 1),
            "<num_heads = 2, rotary_embedding_dim = 2>",
            p=[[1, 3]],
        ),
    ],
}


def group_query(attributes, inputs, *shapes, total, lengths=None):
    """Four queries share two keys; `lengths` are the keys of each row."""
    text = f"y, k, v = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2{attributes}> ({inputs})"
    rows = np.array([total] if lengths is None else lengths, np.int32)
    return case(text, *shapes, rows=rows - 1, total=np.array(total, np.int32))


PROMPT = ((1, 3, 8), (1, 3, 4), (1, 3, 4))
TOKEN = ((2, 1, 8), (2, 1, 4), (2, 1, 4), (2, 2, 2, 2), (2, 2, 2, 2))
CHUNK = ((1, 2, 8), (1, 2, 4), (1, 2, 4), (1, 2, 2, 2), (1, 2, 2, 2))
GROUP_QUERY = {
    "com.microsoft.GroupQueryAttention": [
        group_query("", "x0, x1, x2, , , rows, total", *PROMPT, total=3),
        group_query(", do_rotary = 1", "x0, , , , , rows, total, x1, x2", (1, 3, 16), (4, 1), (4, 1), total=3),
        group_query(
            ", do_rotary = 1, rotary_interleaved = 1",
            "x0, x1, x2, x3, x4, rows, total, x5, x6",
            *TOKEN,
            (4, 1),
            (4, 1),
            total=3,
            lengths=[3, 2],
        ),
        group_query(", softcap = 1.5, scale = 0.4", "x0, x1, x2, x3, x4, rows, total", *CHUNK, total=4),
        group_query(", local_window_size = 2", "x0, x1, x2, , , rows, total", *PROMPT, total=3),
        group_query("", "x0, x1, x2, , , rows, total, , , , x3", *PROMPT, (1, 1, 3, 3), total=3),
    ],
}

INT8 = np.array([[-128, -3, 0], [5, 127, 44]], np.int8)
FOUR_BITS = np.arange(12).reshape(3, 4)


def dequantize(attributes, codes, scale, zero=None):
    """A scale is what gets a gradient; the codes do where floats stand in their place."""
    fixed = {"codes": codes} if zero is None else {"codes": codes, "zero": zero}
    inputs = "codes, x0" if zero is None else "codes, x0, zero"
    return case(f"y = DequantizeLinear {attributes} ({inputs})", scale, **fixed)


def mat_mul_bits(bits, *, zero, bias=False, K=24, block=16):
    """Two rows of blocks of which the last is not full."""
    rng = np.random.default_rng(bits)
    groups = -(-K // block)
    shapes = [normal((1, K), 0, "float64"), uniform((2, groups), 1, 0.1, 0.3)]
    fixed = {"codes": rng.integers(0, 256, (2, groups, block * bits // 8)).astype(np.uint8)}
    if zero == "packed":
        fixed["zero"] = rng.integers(0, 256, (2, -(-groups * bits // 8))).astype(np.uint8)
    if zero == "float":
        shapes.append(uniform((2, groups), 2, 0, 2**bits - 1))
    names = {"none": "", "packed": "zero", "float": "x2"}
    last = f", , x{len(shapes)}" if bias else ""
    if bias:
        shapes.append(normal(2, 3, "float64"))
    text = f"<K = {K}, N = 2, bits = {bits}, block_size = {block}> (x0, codes, x1, {names[zero]}{last})"
    return case(f"y = com.microsoft.MatMulNBits {text.replace(', )', ')')}", *shapes, **fixed)


def gather_block(attributes, data, scale, **fixed):
    names = "data, i, x0" + (", zero" if "zero" in fixed else "")
    text = f"y = com.microsoft.GatherBlockQuantized <block_size = 16, {attributes}> ({names})"
    return case(text, uniform(scale, 0, 0.1, 0.3), data=data, **fixed)


def random_bytes(shape, seed):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


QUANTIZED = {
    "DequantizeLinear": [
        dequantize("", INT8, np.array(0.3)),
        dequantize("", INT8, uniform(3, 0, 0.1, 0.5), np.array([1, -2, 3], np.int8)),
        dequantize("<axis = 0>", INT8.view(np.uint8), uniform(2, 0, 0.1, 0.5), np.array([9, 128], np.uint8)),
        dequantize(
            "<axis = 1, block_size = 2>",
            FOUR_BITS.astype(ml_dtypes.uint4),
            uniform((3, 2), 0, 0.1, 0.5),
            np.array([[8, 7], [0, 15], [3, 4]]).astype(ml_dtypes.uint4),
        ),
        dequantize("<axis = 0, block_size = 2>", (FOUR_BITS - 8).astype(ml_dtypes.int4), uniform((2, 4), 0, 0.1, 0.5)),
        dequantize("", np.array([1.5, -0.25]).astype(ml_dtypes.float8_e4m3fn), np.array(0.3)),
        dequantize("<output_dtype = 11>", INT8.astype(np.int32), np.array(0.3)),
        case("y = DequantizeLinear(x0, x1, zero)", (2, 3), uniform(3, 0, 0.1, 0.5), zero=np.zeros(3, np.int8)),
    ],
    # Of its outputs the scale alone has a slope.
    "DynamicQuantizeLinear": [
        case("y, scale, zero = DynamicQuantizeLinear(x0)", np.array([[-1.5, 0.3], [2.0, 0.7]])),
        case("y, scale, zero = DynamicQuantizeLinear(x0)", np.array([0.4, 1.7])),
        case("y, scale, zero = DynamicQuantizeLinear(x0)", np.array([-0.4, -1.7])),
    ],
    "com.microsoft.MatMulNBits": [
        *(mat_mul_bits(bits, zero=zero) for bits in (2, 4, 8) for zero in ("none", "packed", "float")),
        mat_mul_bits(4, zero="none", bias=True, K=16),
        mat_mul_bits(4, zero="packed", bias=True),
    ],
    "com.microsoft.GatherBlockQuantized": [
        gather_block("quantize_axis = 1", random_bytes((4, 16), 0), (4, 2), i=[[1, 0], [-1, 1]]),
        gather_block(
            "quantize_axis = 1, bits = 8", random_bytes((3, 20), 0), (3, 2), i=[2, 0], zero=random_bytes((3, 2), 1)
        ),
        gather_block("quantize_axis = -1", random_bytes((3, 10), 0), (3, 2), i=[2, 0], zero=random_bytes((3, 1), 1)),
        gather_block(
            "gather_axis = 1, quantize_axis = 0",
            (np.arange(40).reshape(20, 2) % 16).astype(ml_dtypes.uint4),
            (2, 2),
            i=[1, 1, 0],
            zero=np.array([[1, 2], [3, 4]]).astype(ml_dtypes.uint4),
        ),
    ],
}

TABLES = (ATTENTION, ROTARY, GROUP_QUERY, QUANTIZED)
