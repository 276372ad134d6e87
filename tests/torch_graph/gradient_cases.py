"""Nodes whose gradients are checked: arithmetic, activations, casts, reductions and matrix products."""

from typing import NamedTuple

import numpy as np

from tests.builders import normal


class Case(NamedTuple):
    """Nodes in the text form of ONNX.

    Attributes:
        text: The nodes; the outputs of the last one are the outputs.
        inputs: Values of x0, x1, ..., with respect to all of which the gradients are checked.
        fixed: Initializers by name, which get no gradient.
        opset: Version of the standard.
        eps: Step of the finite differences.
        tolerance: Relative one, and a tenth of it absolute.
    """

    text: str
    inputs: tuple[np.ndarray, ...]
    fixed: dict[str, np.ndarray]
    opset: int
    eps: float
    tolerance: float


def case(text, *inputs, opset=23, eps=1e-6, tolerance=1e-5, **fixed):
    """A case; an input is an array, or the shape of one with standard normal values."""
    values = (
        x if isinstance(x, np.ndarray) else np.asarray(normal(x, seed, "float64")) for seed, x in enumerate(inputs)
    )
    return Case(text, tuple(values), {name: np.asarray(x) for name, x in fixed.items()}, opset, eps, tolerance)


def uniform(shape, seed, low, high):
    return np.random.default_rng(seed).uniform(low, high, shape)


def spread(shape, seed):
    """Values in random order, each 0.1 from the next and none nearer to zero than 0.05."""
    size = int(np.prod(shape))
    return (np.random.default_rng(seed).permutation(size).reshape(shape) - size // 2) * 0.1 + 0.05


# Both sides of every kink of the activations, none nearer than 0.05, and what their exponentials must stand.
WIDE = np.array([[-60.0, -3.3, -1.4, -0.7, -0.2], [0.2, 0.6, 1.3, 3.2, 60.0]])


def unary(op_type, x):
    return [case(f"y = {op_type}(x0)", x)]


def binary(op_type, *, low=-2.0):
    """Shapes that broadcast either way; one tensor as both inputs."""
    shapes = [((2, 3), (2, 3)), ((2, 3), (3,)), ((2, 1, 3), (4, 1)), ((), (2, 2)), ((1, 2), ())]
    cases = [case(f"y = {op_type}(x0, x1)", a, uniform(b, 7, low, 2)) for a, b in shapes]
    return [*cases, case(f"h = {op_type}(x0, x0) y = {op_type}(h, x0)", uniform((2, 2), 8, 0.5, 2))]


def several(op_type):
    """Any number of inputs that broadcast."""
    return [
        case(f"y = {op_type}(x0)", (2, 3)),
        case(f"y = {op_type}(x0, x1)", (2, 3), (3,)),
        case(f"y = {op_type}(x0, x1, x2)", (2, 1, 3), (4, 1), (1, 3)),
    ]


ELEMENTWISE = {
    "Abs": unary("Abs", WIDE),
    "Acos": unary("Acos", uniform((2, 3), 0, -0.9, 0.9)),
    "Acosh": unary("Acosh", uniform((2, 3), 0, 1.1, 5)),
    "Add": binary("Add"),
    "Asin": unary("Asin", uniform((2, 3), 0, -0.9, 0.9)),
    "Asinh": unary("Asinh", WIDE),
    "Atan": unary("Atan", WIDE),
    "Atanh": unary("Atanh", uniform((2, 3), 0, -0.9, 0.9)),
    "Cos": unary("Cos", WIDE),
    "Cosh": unary("Cosh", normal((2, 3), 0, "float64")),
    "Div": binary("Div", low=0.5),
    "Erf": unary("Erf", WIDE),
    "Exp": unary("Exp", normal((2, 3), 0, "float64")),
    "Identity": unary("Identity", WIDE),
    "Log": unary("Log", uniform((2, 3), 0, 0.1, 3)),
    "Max": several("Max"),
    "Mean": several("Mean"),
    "Min": several("Min"),
    # The standard allows floats with fmod = 1 alone.
    "Mod": [
        case("y = Mod <fmod = 1> (x0, x1)", np.array([[7.3, -7.3], [4.4, -4.4]]), np.array([3.1, -2.7])),
        case("y = Mod <fmod = 1> (x0, x1)", np.array([5.2, -0.4]), np.array([[1.7], [-3.3]])),
    ],
    "Mul": binary("Mul"),
    "Neg": unary("Neg", WIDE),
    "Pow": [
        case("y = Pow(x0, x1)", uniform((2, 3), 0, 0.2, 2), (3,)),
        case("y = Pow(x0, x1)", uniform((), 0, 0.2, 2), (2, 2)),
        case("y = Pow(x0, x1)", uniform((2, 2), 0, 0.2, 2), np.array(1.5)),
        # Bases without a logarithm; of the exponents those that nothing learns.
        case("y = Pow(x0, two)", np.array([-1.5, 0.0, 0.7]), two=2.0),
        case("y = Pow(x0, powers)", np.array([[-1.5], [0.0], [0.7]]), powers=[1.0, 2.0, 3.0]),
        case("y = Pow(x0, powers)", np.array([[-1.5], [0.7]]), powers=np.array([-1, 0, 2])),
    ],
    "Reciprocal": unary("Reciprocal", WIDE),
    "Sin": unary("Sin", WIDE),
    "Sinh": unary("Sinh", normal((2, 3), 0, "float64")),
    "Sqrt": unary("Sqrt", uniform((2, 3), 0, 0.1, 3)),
    "Sub": binary("Sub"),
    "Sum": several("Sum"),
    "Tan": unary("Tan", uniform((2, 3), 0, -1.3, 1.3)),
    "Clip": [
        case("y = Clip(x0, x1, x2)", WIDE, np.array(-0.5), np.array(0.9)),
        case("y = Clip(x0, x1)", WIDE, np.array(-0.5)),
        case("y = Clip(x0, , x1)", WIDE, np.array(0.9)),
        case("y = Clip(x0)", WIDE),
        case("y = Clip(x, low, x0)", np.array(-0.5), x=WIDE, low=0.9),  # the upper limit wins
        case("y = Clip <min = -0.5, max = 0.9> (x0)", WIDE, opset=10),
        case("y = Clip <max = 0.9> (x0)", WIDE, opset=10),
    ],
    "Where": [
        case("y = Where(c, x0, x1)", (2, 3), (3,), c=[[True], [False]]),
        case("y = Where(c, x0, x1)", (), (2, 1), c=[True, False, True]),
    ],
    "Dropout": [
        case("y, mask = Dropout(x0)", (2, 3)),
        case("y = Dropout(x0, ratio, off)", (2, 3), ratio=0.5, off=False),
        case("y, mask = Dropout <ratio = 0.5> (x0)", (2, 3), opset=10),
    ],
    # Rounding to a smaller type is given the slope 1 (see test_gradients.py); at values and with a step that the type
    # holds exactly, that is the true one.
    "Cast": [
        case("y = Cast <to = 11> (x0)", (2, 3)),
        case("h = Cast <to = 1> (x0) y = Cast <to = 11> (h)", np.array([-2.5, 0.0, 0.75]), eps=2**-8),
        case("h = Cast <to = 10> (x0) y = Cast <to = 11> (h)", np.array([-2.5, 0.0, 0.75]), eps=2**-6),
        case("h = Cast <to = 16> (x0) y = Cast <to = 11> (h)", np.array([-2.5, 0.0, 0.75]), eps=2**-3),
    ],
    "CastLike": [
        case("y = CastLike(x0, like)", (2, 3), like=0.0),
        case("h = CastLike(x0, like) y = Cast <to = 11> (h)", np.array([-2.5, 0.75]), eps=2**-8, like=np.float32(0)),
    ],
}

ACTIVATIONS = {
    **{op_type: unary(op_type, WIDE) for op_type in ("HardSwish", "Mish", "Relu", "Sigmoid", "Softplus", "Softsign")},
    "Tanh": unary("Tanh", WIDE),
    "Celu": [case("y = Celu <alpha = 0.7> (x0)", WIDE), case("y = Celu(x0)", WIDE)],
    "Elu": [case("y = Elu <alpha = 1.3> (x0)", WIDE), case("y = Elu(x0)", WIDE)],
    "Gelu": [case("y = Gelu(x0)", WIDE), case('y = Gelu <approximate = "tanh"> (x0)', WIDE)],
    "HardSigmoid": [case("y = HardSigmoid <alpha = 0.3, beta = 0.4> (x0)", WIDE), case("y = HardSigmoid(x0)", WIDE)],
    "LeakyRelu": [case("y = LeakyRelu <alpha = 0.2> (x0)", WIDE), case("y = LeakyRelu(x0)", WIDE)],
    "PRelu": [
        case("y = PRelu(x0, x1)", WIDE, (5,)),
        case("y = PRelu(x0, x1)", spread((2, 3, 2), 0), (3, 1)),
        case("y = PRelu(x0, x1)", WIDE, (1,)),
    ],
    "Selu": [case("y = Selu <alpha = 1.2, gamma = 0.8> (x0)", WIDE), case("y = Selu(x0)", WIDE)],
    "Shrink": [case("y = Shrink <bias = 0.3, lambd = 0.5> (x0)", WIDE), case("y = Shrink(x0)", WIDE)],
    "Swish": [case("y = Swish <alpha = 1.7> (x0)", WIDE), case("y = Swish(x0)", WIDE)],
    "ThresholdedRelu": [case("y = ThresholdedRelu <alpha = 0.5> (x0)", WIDE), case("y = ThresholdedRelu(x0)", WIDE)],
    **{
        op_type: [
            case(f"y = {op_type}(x0)", (2, 3)),
            case(f"y = {op_type} <axis = 1> (x0)", (2, 3, 2)),
            case(f"y = {op_type} <axis = 0> (x0)", WIDE),
            case(f"y = {op_type}(x0)", (2, 2, 2), opset=12),  # the axes behind the first count as one
            case(f"y = {op_type} <axis = 2> (x0)", (2, 2, 3), opset=11),
        ]
        for op_type in ("LogSoftmax", "Softmax")
    },
    "com.microsoft.Gelu": unary("com.microsoft.Gelu", WIDE),
    "com.microsoft.BiasGelu": [case("y = com.microsoft.BiasGelu(x0, x1)", (2, 2, 3), (3,))],
    "com.microsoft.FastGelu": [
        case("y = com.microsoft.FastGelu(x0)", WIDE),
        case("y = com.microsoft.FastGelu(x0, x1)", (2, 2, 3), (3,)),
    ],
    "com.microsoft.QuickGelu": [
        case("y = com.microsoft.QuickGelu(x0)", WIDE),
        case("y = com.microsoft.QuickGelu <alpha = 1.2> (x0)", WIDE),
    ],
}


def reduction(op_type, x=None):
    """Some axes, all axes, and none at all; as an input and, before, as an attribute."""
    x = spread((2, 3, 2), 0) if x is None else x
    older = 12 if op_type == "ReduceSum" else 17
    return [
        case(f"y = {op_type}(x0, axes)", x, axes=[1]),
        case(f"y = {op_type} <keepdims = 0> (x0, axes)", x, axes=[-1, 0]),
        case(f"y = {op_type} <keepdims = 0> (x0)", x),
        case(f"y = {op_type} <noop_with_empty_axes = 1> (x0)", x),
        case(f"y = {op_type} <axes = [0, -1]> (x0)", x, opset=older),
        case(f"y = {op_type} <axes = [1], keepdims = 0> (x0)", x, opset=older),
        case(f"y = {op_type}(x0)", x, opset=older),
    ]


ZEROS = np.array([[0.0, 1.5, -0.7], [0.0, 2.0, 0.0], [0.4, -1.1, 0.8]])  # a product's gradient must not divide by it

REDUCTIONS = {
    "ReduceL1": reduction("ReduceL1"),
    "ReduceL2": reduction("ReduceL2"),
    "ReduceLogSum": reduction("ReduceLogSum", uniform((2, 3, 2), 0, 0.2, 2)),
    "ReduceLogSumExp": [*reduction("ReduceLogSumExp"), case("y = ReduceLogSumExp(x0, axes)", 20 * WIDE, axes=[1])],
    "ReduceMax": reduction("ReduceMax"),
    "ReduceMean": reduction("ReduceMean"),
    "ReduceMin": reduction("ReduceMin"),
    "ReduceProd": [*reduction("ReduceProd"), case("y = ReduceProd(x0, axes)", ZEROS, axes=[1])],
    "ReduceSum": reduction("ReduceSum"),
    "ReduceSumSquare": reduction("ReduceSumSquare"),
    "CumSum": [
        case("y = CumSum(x0, axis)", (2, 3), axis=1),
        case("y = CumSum <exclusive = 1> (x0, axis)", (3, 2), axis=0),
        case("y = CumSum <reverse = 1> (x0, axis)", (2, 3), axis=-1),
        case("y = CumSum <reverse = 1, exclusive = 1> (x0, axis)", (2, 3), axis=1),
    ],
    "CumProd": [
        case("y = CumProd(x0, axis)", ZEROS, axis=1),
        case("y = CumProd <exclusive = 1> (x0, axis)", ZEROS, axis=0),
        case("y = CumProd <reverse = 1> (x0, axis)", ZEROS, axis=-1),
        case("y = CumProd <reverse = 1, exclusive = 1> (x0, axis)", (2, 3), axis=1),
    ],
    "TopK": [
        case("y, i = TopK(x0, k)", spread((2, 5), 0), k=[3]),
        case("y, i = TopK <axis = 0, largest = 0> (x0, k)", spread((4, 2), 1), k=[2]),
        case("y, i = TopK <axis = 1, k = 2> (x0)", spread((2, 4), 2), opset=9),
    ],
}

MATRICES = {
    "MatMul": [
        case("y = MatMul(x0, x1)", (3, 4), (4, 2)),
        case("y = MatMul(x0, x1)", (2, 1, 2, 3), (2, 3, 2)),
        case("y = MatMul(x0, x1)", (2, 2, 3), (3, 2)),
        case("y = MatMul(x0, x1)", (3,), (3, 2)),
        case("y = MatMul(x0, x1)", (2, 2, 3), (3,)),
        case("y = MatMul(x0, x1)", (3,), (3,)),
    ],
    "Gemm": [
        case("y = Gemm(x0, x1)", (3, 4), (4, 2)),
        case("y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (x0, x1, x2)", (3, 4), (2, 4), (2,)),
        case("y = Gemm <transA = 1> (x0, x1, x2)", (4, 3), (4, 2), (3, 1)),
        case("y = Gemm <transA = 1, transB = 1, beta = -0.5> (x0, x1, x2)", (2, 3), (4, 2), ()),
    ],
    "Einsum": [
        case('y = Einsum <equation = "bij,bjk->bik"> (x0, x1)', (2, 2, 3), (2, 3, 2)),
        case('y = Einsum <equation = "...ij,...jk"> (x0, x1)', (2, 1, 2, 3), (2, 3, 2)),
        case('y = Einsum <equation = "ij,jk,k->i"> (x0, x1, x2)', (2, 3), (3, 2), (2,)),
        case('y = Einsum <equation = "bii->bi"> (x0)', (2, 3, 3)),
        case('y = Einsum <equation = "ij->"> (x0)', (2, 3)),
    ],
    "Det": [
        case("y = Det(x0)", (3, 3)),
        case("y = Det(x0)", (2, 2, 2)),
        # Singular ones; in a batch with one that is not, and with one whose gradient is zero.
        case("y = Det(x0)", np.array([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [0.5, -1.0, 2.0]])),
        case("y = Det(x0)", np.array([[[1.0, 2.0], [2.0, 4.0]], [[1.0, -2.0], [0.5, 3.0]], [[0.0, 0.0], [0.0, 0.0]]])),
        case("y = Det(x0)", np.array([[0.0]])),
    ],
    "com.microsoft.FusedMatMul": [
        case("y = com.microsoft.FusedMatMul(x0, x1)", (2, 2, 3), (2, 3, 2)),
        case("y = com.microsoft.FusedMatMul <transA = 1, alpha = 0.5> (x0, x1)", (2, 3, 2), (3, 2)),
        case("y = com.microsoft.FusedMatMul <transB = 1> (x0, x1)", (3, 2), (2, 4, 2)),
        case("y = com.microsoft.FusedMatMul <transA = 1, transB = 1, alpha = -2.0> (x0, x1)", (3, 2), (2, 3)),
    ],
}

TABLES = (ELEMENTWISE, ACTIVATIONS, REDUCTIONS, MATRICES)
