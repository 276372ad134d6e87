"""Gradients against finite differences in double precision, with respect to every float input."""

import numpy as np
import pytest

from tests.builders import normal, parse
from tests.torch_graph.common import to_torch, torch_graph
from tests.torch_graph.test_contrib import group_query, multi_head, one_node

pytestmark = pytest.mark.torch

# Nodes on inputs of these shapes; x0, x1, ... in this order, and the outputs they are summed over.
CASES = {
    "Add": ("y = Add(x0, x1)", [(2, 3), (3,)]),
    "AveragePool": (
        "y = AveragePool <kernel_shape = [3, 2], strides = [2, 1], pads = [1, 0, 1, 1]> (x0)",
        [(1, 2, 5, 4)],
    ),
    "BatchNormalization": (
        "v = Mul(x4, x4) y = BatchNormalization <epsilon = 0.1> (x0, x1, x2, x3, v)",
        [(2, 3, 4), (3,), (3,), (3,), (3,)],
    ),
    "Clip": ("y = Clip(x0, x1, x2)", [(3, 4), (), ()]),
    "Conv": (
        "y = Conv <strides = [2, 1], pads = [1, 0, 0, 2], dilations = [1, 2], group = 2> (x0, x1, x2)",
        [(2, 4, 5, 6), (6, 2, 3, 2), (6,)],
    ),
    "Conv1d": ('y = Conv <auto_pad = "SAME_UPPER"> (x0, x1)', [(1, 2, 7), (3, 2, 4)]),
    "ConvTranspose": (
        "y = ConvTranspose <strides = [2, 2], pads = [1, 0, 0, 1], output_padding = [1, 0]> (x0, x1, x2)",
        [(1, 3, 3, 4), (3, 2, 3, 2), (2,)],
    ),
    "Einsum": ('y = Einsum <equation = "bij,bjk->bik"> (x0, x1)', [(2, 3, 4), (2, 4, 2)]),
    "Erf": ("y = Erf(x0)", [(2, 3)]),
    "Expand": ("s = Constant <value_ints = [2, 3, 4]> () y = Expand(x0, s)", [(3, 1)]),
    "Gather": ("i = Constant <value = int64[2,2] {0, 2, -1, 0}> () y = Gather <axis = 1> (x0, i)", [(2, 3)]),
    "Gelu": ("y = Gelu(x0)", [(2, 3)]),
    "GeluTanh": ('y = Gelu <approximate = "tanh"> (x0)', [(2, 3)]),
    "Gemm": ("y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (x0, x1, x2)", [(3, 4), (2, 4), (2,)]),
    "GroupNormalization": ("y = GroupNormalization <num_groups = 2> (x0, x1, x2)", [(2, 4, 3), (4,), (4,)]),
    "InstanceNormalization": ("y = InstanceNormalization(x0, x1, x2)", [(2, 3, 4), (3,), (3,)]),
    "LRN": ("y = LRN <size = 3, alpha = 0.5> (x0)", [(1, 4, 2)]),
    "LSTM": ("y, h, c = LSTM <hidden_size = 3> (x0, x1, x2, x3)", [(2, 2, 4), (1, 12, 4), (1, 12, 3), (1, 24)]),
    "LayerNormalization": ("y, m, i = LayerNormalization(x0, x1, x2)", [(2, 3, 4), (4,), (4,)]),
    "LayerNormalizationPlain": ("y = LayerNormalization <axis = 1> (x0, x1)", [(2, 3, 4), (3, 4)]),
    "LpNormalization": ("y = LpNormalization(x0)", [(2, 3)]),
    "MatMul": ("y = MatMul(x0, x1)", [(2, 3, 4), (4, 5)]),
    "MaxPool": ("y = MaxPool <kernel_shape = [2], strides = [2], pads = [1, 0]> (x0)", [(1, 2, 5)]),
    "Pad": (
        'p = Constant <value_ints = [0, 2, 0, 1]> () y = Pad <mode = "reflect"> (x0, p)',
        [(2, 4)],
    ),
    "PRelu": ("y = PRelu(x0, x1)", [(3, 4), (4,)]),
    "Pow": ("a = Abs(x0) y = Pow(a, x1)", [(2, 3), (3,)]),
    "RMSNormalization": ("y = RMSNormalization(x0, x1)", [(2, 3, 4), (4,)]),
    "ReduceL2": ("y = ReduceL2(x0)", [(2, 3)]),
    "ReduceLogSumExp": ("y = ReduceLogSumExp <keepdims = 0> (x0)", [(2, 3)]),
    "Resize": (
        's = Constant <value_floats = [1.0, 1.0, 1.7]> () y = Resize <mode = "cubic"> (x0, , s)',
        [(1, 2, 5)],
    ),
    "ScatterND": ("i = Constant <value = int64[2,1] {2, 0}> () y = ScatterND(x0, i, x1)", [(3, 2), (2, 2)]),
    "Selu": ("y = Selu(x0)", [(3, 4)]),
    "Slice": (
        "s = Constant <value_ints = [3]> () e = Constant <value_ints = [-9]> () a = Constant <value_ints = [1]> ()"
        " t = Constant <value_ints = [-2]> () y = Slice(x0, s, e, a, t)",
        [(2, 4)],
    ),
    "Softmax": ("y = Softmax <axis = 1> (x0)", [(2, 3, 2)]),
    "Where": ("c = Less(x0, x1) y = Where(c, x0, x2)", [(2, 3), (2, 3), (3,)]),
}
CONTRIB = {
    "SimplifiedLayerNormalization": lambda: one_node(
        "SimplifiedLayerNormalization", [normal((2, 4), 0), normal(4, 1)], 1, domain=""
    ),
    "SkipLayerNormalization": lambda: one_node(
        "SkipLayerNormalization",
        [normal((2, 4), 0), normal((2, 4), 1), *(normal(4, seed) for seed in (2, 3, 4))],
        [True, False, False, True],
    ),
    "SkipSimplifiedLayerNormalization": lambda: one_node(
        "SkipSimplifiedLayerNormalization",
        [normal((2, 4), 0), normal((2, 4), 1), normal(4, 2)],
        [True, False, False, True],
    ),
    "QuickGelu": lambda: one_node("QuickGelu", [normal((2, 3), 0)], 1),
    "GroupQueryAttention": lambda: group_query(past=2, new=1, heads=2, kv_heads=1, size=4, rotary=1),
    "GroupQueryAttentionPrompt": lambda: group_query(
        past=0, new=3, heads=2, kv_heads=1, size=4, packed=True, rotary=1, softcap=2.0, local_window_size=2
    ),
    "MultiHeadAttention": lambda: multi_head("cross", bias=True, padding="mask"),
}


def check_gradients(graph, feeds):
    """Finite differences of all outputs with respect to every float input."""
    import torch

    given = {name: to_torch(array) for name, array in feeds.items()}
    names = [name for name, tensor in given.items() if tensor.is_floating_point() and tensor.numel()]
    inputs = [given[name].to(torch.float64).requires_grad_() for name in names]
    fixed = {name: tensor.to(torch.float64) if tensor.is_floating_point() else tensor for name, tensor in given.items()}

    def function(*values):
        results = graph.run(fixed | dict(zip(names, values, strict=True)))
        return tuple(results[name] for name in graph.outputs if results[name].is_floating_point())

    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_standard_operators(name):
    text, shapes = CASES[name]
    inputs = ", ".join(f"double[{','.join(map(str, shape))}] x{i}" for i, shape in enumerate(shapes))
    graph = torch_graph(parse(f"g ({inputs}) => (double y) {{ {text} }}", opset=23))
    feeds = {f"x{i}": normal(shape, i, "float64") for i, shape in enumerate(shapes)}
    if name == "Clip":
        feeds |= {"x1": np.array(-0.4), "x2": np.array(0.6)}
    check_gradients(graph, feeds)


@pytest.mark.parametrize("name", CONTRIB)
def test_contrib_operators(name):
    model, feeds = CONTRIB[name]()
    check_gradients(torch_graph(model), feeds)


def test_dequantized_weights_have_gradients_of_scales_and_of_codes_in_the_place_of_integers():
    model = parse(
        "g (double[3,4] x) => (double[3,2] y) { w = DequantizeLinear(codes, scale, zero) y = MatMul(x, w) }",
        {
            "codes": np.arange(-4, 4, dtype=np.int8).reshape(4, 2),
            "scale": np.array([0.1, 0.2]),
            "zero": np.array([1, -1], np.int8),
        },
    )
    graph = torch_graph(model)
    soft = np.arange(-4, 4, dtype=np.float64).reshape(4, 2)
    check_gradients(graph, {"x": normal((3, 4), 0, "float64"), "codes": soft, "scale": np.array([0.1, 0.2])})


def test_codes_of_mat_mul_nbits_can_be_soft():
    import torch

    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (2, 1, 32)).astype(np.uint8)
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    scale = np.array([[0.1], [0.2]])
    model, feeds = one_node(
        "MatMulNBits", [normal((2, 32), 0, "float64"), packed, scale], 1, K=32, N=2, bits=4, block_size=32
    )
    graph = torch_graph(model)
    given = {name: to_torch(array) for name, array in feeds.items()}
    soft = graph.run(given, {"x1": to_torch(codes).to(torch.float64)})
    torch.testing.assert_close(soft["y0"], graph.run(given)["y0"])
    check_gradients(graph, {**feeds, "x1": codes.astype(np.float64)})
