"""Gradients against finite differences in double precision, of every operator that has one.

The cases are in gradient_cases*.py; EXEMPT says why the other operators have no gradient to check. The slope is the
true one everywhere but in roundings to a smaller float, which pass the gradient on as it is.
"""

import numpy as np
import onnx
import pytest

from tests.builders import normal, parse
from tests.torch_graph import gradient_cases, gradient_cases_language, gradient_cases_layers, gradient_cases_shapes
from tests.torch_graph.common import to_torch, torch_graph
from tests.torch_graph.test_contrib import one_node

pytestmark = pytest.mark.torch

TABLES = [
    table
    for module in (gradient_cases, gradient_cases_language, gradient_cases_layers, gradient_cases_shapes)
    for table in module.TABLES
]
CASES = {name: cases for table in TABLES for name, cases in table.items()}
REASONS = {
    "the result is boolean": "And Equal Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual Not Or Xor",
    "integers in, integers out": "BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor ConvInteger MatMulInteger",
    "the result is rounded to codes": "QLinearConv QLinearMatMul QuantizeLinear",
    "the result is positions": "ArgMax ArgMin NonZero",
    "the result is a shape": "Shape Size",
    "no value of an input is read but as a shape": "Constant ConstantOfShape EyeLike",
    "a step function; nothing is claimed": "Ceil Floor Hardmax Round Sign",
}
# Names of inputs in the cases, and of what is computed from them alone.
LEARNED = {"x0", "x1", "x2", "x3", "x4", "x5", "x6", "x7", "h"}
EXEMPT = {name: reason for reason, names in REASONS.items() for name in names.split()}


def build(case):
    """The model of a case, and its feeds."""
    kinds = (f"double[{','.join(map(str, x.shape))}] x{i}" for i, x in enumerate(case.inputs))
    model = parse(f"g ({', '.join(kinds)}) => () {{ {case.text} }}", case.fixed, opset=case.opset)
    model.graph.outputs[:] = [value for value in model.graph.node(-1).outputs if value.name]
    return model, {f"x{i}": x for i, x in enumerate(case.inputs)}


def check_gradients(graph, feeds, eps=1e-6, tolerance=1e-5):
    """Finite differences of all float outputs with respect to every float input; none of either may be cut off."""
    import torch

    given = {name: to_torch(array) for name, array in feeds.items()}
    names = [name for name, tensor in given.items() if tensor.is_floating_point() and tensor.numel()]
    inputs = [given[name].to(torch.float64).requires_grad_() for name in names]

    def function(*values):
        results = graph.run(given | dict(zip(names, values, strict=True)))
        return tuple(results[name] for name in graph.outputs if results[name].is_floating_point())

    results = function(*inputs)
    assert all(result.requires_grad for result in results)
    weights = [to_torch(normal(result.shape, 99 + i, "float64")) for i, result in enumerate(results)]
    slopes = torch.autograd.grad(results, inputs, weights, allow_unused=True)
    assert all(slope is not None and slope.any() for slope in slopes)
    assert torch.autograd.gradcheck(
        function, inputs, eps=eps, atol=tolerance / 10, rtol=tolerance, check_undefined_grad=False
    )


@pytest.mark.parametrize("name", CASES)
def test_operators(name):
    for case in CASES[name]:
        model, feeds = build(case)
        try:
            check_gradients(torch_graph(model), feeds, case.eps, case.tolerance)
        except Exception as error:
            raise AssertionError(f"{case.text}, version {case.opset}: {error}") from error


def qualified(node):
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


@pytest.fixture(scope="module")
def checked():
    """Operator -> its nodes in the cases, each with its version."""
    return {
        name: [
            (node, 1 if node.domain else case.opset)
            for case in cases
            for node in build(case)[0].graph
            if qualified(node) == name
        ]
        for name, cases in CASES.items()
    }


def test_every_operator_is_checked_or_has_a_reason_not_to_be(checked):
    from qcompiler.torch_graph import supported_ops

    table = {
        f"{domain}.{name}" if domain else name: set(versions)
        for domain, operators in supported_ops().items()
        for name, versions in operators
    }
    assert sum(map(len, TABLES)) == len(CASES)
    assert not CASES.keys() & EXEMPT.keys()
    assert sorted([*CASES, *EXEMPT]) == sorted(table)
    for name, nodes in checked.items():  # every meaning that an operator has had, too
        assert {max(since for since in table[name] if since <= version) for _, version in nodes} == table[name], name


def differentiable(op_type):
    """Which inputs the standard calls differentiable; none of an operator that it does not know."""
    try:
        schema = onnx.defs.get_schema(op_type)
    except onnx.defs.SchemaError:  # ONNX Runtime's, or newer than the onnx installed
        return set()
    wanted = onnx.defs.OpSchema.DifferentiationCategory.Differentiable
    return {i for i, value in enumerate(schema.inputs) if value.differentiation_category == wanted}


def test_every_input_is_checked_that_the_standard_calls_differentiable(checked):
    for name, nodes in checked.items():
        inputs = {i for node, _ in nodes for i, value in enumerate(node.inputs) if value and value.name in LEARNED}
        assert differentiable(name) <= inputs, name
    # The standard says so of Hardmax too, which is a step function.
    assert [name for name in EXEMPT if differentiable(name)] == ["Hardmax"]


def test_codes_of_dequantize_linear_can_be_soft():
    model = parse(
        "g (double[3,4] x) => (double[3,2] y) { w = DequantizeLinear(codes, scale, zero) y = MatMul(x, w) }",
        {
            "codes": np.arange(-4, 4, dtype=np.int8).reshape(4, 2),
            "scale": np.array([0.1, 0.2]),
            "zero": np.array([1, -1], np.int8),
        },
    )
    soft = np.arange(-4, 4, dtype=np.float64).reshape(4, 2)
    check_gradients(
        torch_graph(model), {"x": normal((3, 4), 0, "float64"), "codes": soft, "scale": np.array([0.1, 0.2])}
    )


@pytest.mark.parametrize("zero", ["none", "packed", "soft"])
def test_codes_of_mat_mul_nbits_can_be_soft(zero):
    packed, codes = packed_codes((2, 32))
    zeros = {"none": None, "packed": packed[:, :1], "soft": np.array([[3.5], [9.0]])}[zero]
    inputs = [normal((2, 32), 0, "float64"), packed, np.array([[0.1], [0.2]])]
    inputs += [] if zeros is None else [zeros]
    model, feeds = one_node("MatMulNBits", inputs, 1, K=32, N=2, bits=4, block_size=32)
    check_soft(model, feeds, "x1", codes)


@pytest.mark.parametrize("zero", [False, True])
def test_codes_of_gather_block_quantized_can_be_soft(zero):
    packed, codes = packed_codes((3, 16))
    inputs = [packed, np.array([2, 0, 2]), np.array([[0.1], [0.2], [0.3]])]
    inputs += [packed[:, :1]] if zero else []
    model, feeds = one_node("GatherBlockQuantized", inputs, 1, quantize_axis=1, block_size=16)
    check_soft(model, feeds, "x0", codes)


def packed_codes(shape):
    """Random 4-bit codes, packed along the last axis and as they are."""
    codes = np.random.default_rng(0).integers(0, 16, shape).astype(np.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, codes


def check_soft(model, feeds, name, codes):
    """The codes as floats in the place of the packed ones mean the same, and have a gradient."""
    import torch

    graph = torch_graph(model)
    given = {key: to_torch(array) for key, array in feeds.items()}
    soft = graph.run(given | {name: to_torch(codes).to(torch.float64)})
    torch.testing.assert_close(soft["y0"], graph.run(given)["y0"])
    check_gradients(graph, {**feeds, name: codes.astype(np.float64)})


@pytest.mark.parametrize(
    "text",
    [
        "h = Cast <to = 1> (x) y = Cast <to = 11> (h)",
        "h = Cast <to = 10> (x) y = Cast <to = 11> (h)",
        "h = Cast <to = 16> (x) y = Cast <to = 11> (h)",
        "h = Cast <to = 17> (x) y = Cast <to = 11> (h)",
        "h = CastLike(x, like) y = CastLike(h, x)",
        "h = QuantizeLinear <output_dtype = 17> (x, one) y = DequantizeLinear(h, one)",
    ],
)
def test_rounding_to_a_smaller_float_has_the_slope_one(text):
    """The function is a staircase; its slope is taken to be that of the line through it.

    The gradient passes through the smaller type too and is rounded to it.
    """
    import torch

    constants = {"like": np.array(0, np.float16), "one": np.array(1.0)}
    model = parse(f"g (double[6] x) => (double y) {{ {text} }}", constants, opset=23)
    x = to_torch(normal(6, 0, "float64")).requires_grad_()
    (y,) = torch_graph(model).run({"x": x}).values()
    assert (y != x).any()
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert slope.tolist() == [1] * 6


@pytest.mark.parametrize(
    ("opset", "text", "expected"),
    [
        (22, "y = LpPool <kernel_shape = [2], strides = [2]> (x)", [0, 0, 1.2, 1.6]),
        (22, "h = Slice(x, begin, end, axis) y = GlobalLpPool(h)", [0, 0, 0, 0]),
        (22, "h = Slice(x, begin, end, axis) y = ReduceL2(h)", [0, 0, 0, 0]),
        (22, "h = Slice(x, begin, end, axis) y = LpNormalization(h)", [0, 0, 0, 0]),
        (22, "h = Slice(x, begin, end, axis) y = MeanVarianceNormalization <axes = [2]> (h)", [-5e8, 5e8, 0, 0]),
        (11, "h = Add(x, mask) p = Softmax <axis = 2> (h) bad = IsNaN(p) y = Where(bad, x, p)", [1, 2, 3, 4]),
    ],
)
def test_gradients_are_finite_where_a_root_or_a_quotient_has_none(opset, text, expected):
    """Windows of zeros, as a Relu leaves them, constant rows, and rows without a key."""
    import torch

    constants = {
        "begin": np.array([0]),
        "end": np.array([2]),
        "axis": np.array([2]),
        "mask": np.full(4, -np.inf),
    }
    model = parse(f"g (double[1,1,4] x) => (double y) {{ {text} }}", constants, opset=opset, ir_version=7)
    x = torch.tensor([[[0.0, 0.0, 3.0, 4.0]]], dtype=torch.float64, requires_grad=True)
    (y,) = torch_graph(model).run({"x": x}).values()
    (slope,) = torch.autograd.grad(y, x, torch.arange(1, y.numel() + 1, dtype=torch.float64).reshape(y.shape))
    np.testing.assert_allclose(slope.flatten(), expected, rtol=1e-6)
