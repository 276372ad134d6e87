"""Nodes whose gradients are checked: convolutions, pooling, normalizations and recurrent layers."""

import numpy as np

from tests.builders import normal
from tests.torch_graph.gradient_cases import case, spread, uniform

CONVOLUTIONS = {
    "Conv": [
        case(
            "y = Conv <strides = [2, 1], pads = [1, 0, 0, 2], dilations = [1, 2], group = 2> (x0, x1, x2)",
            (2, 4, 4, 3),
            (4, 2, 3, 2),
            (4,),
        ),
        case("y = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x0, x1)", (1, 2, 3, 4), (2, 2, 3, 3)),
        case("y = Conv <group = 3, dilations = [2]> (x0, x1, x2)", (2, 3, 5), (3, 1, 2), (3,)),
        case('y = Conv <auto_pad = "SAME_UPPER"> (x0, x1)', (1, 2, 5), (3, 2, 4)),
        case('y = Conv <auto_pad = "SAME_LOWER", strides = [2]> (x0, x1)', (1, 1, 6), (2, 1, 3)),
        case('y = Conv <auto_pad = "VALID"> (x0, x1)', (1, 1, 2, 3, 2), (2, 1, 2, 2, 1)),
    ],
    "ConvTranspose": [
        case(
            "y = ConvTranspose <strides = [2, 2], pads = [1, 0, 0, 1], output_padding = [1, 0]> (x0, x1, x2)",
            (1, 3, 2, 3),
            (3, 2, 3, 2),
            (2,),
        ),
        case("y = ConvTranspose <group = 2, dilations = [2]> (x0, x1, x2)", (1, 4, 3), (4, 1, 2), (2,)),
        case('y = ConvTranspose <auto_pad = "SAME_UPPER", strides = [2]> (x0, x1)', (1, 1, 3), (1, 2, 3)),
        case("y = ConvTranspose <output_shape = [6], strides = [2]> (x0, x1)", (1, 2, 3), (2, 1, 3)),
        case("y = ConvTranspose(x0, x1)", (1, 1, 2, 1, 2), (1, 2, 2, 2, 1)),
    ],
}


def pooling(op_type, lead=""):
    """The windows that every kind of pooling knows: padded ones, dilated ones, and those that reach over the end."""
    lead = f"{lead}, " if lead else ""
    return [
        case(
            f"y = {op_type} <{lead}kernel_shape = [3, 2], strides = [2, 1], pads = [1, 0, 1, 1]> (x0)",
            spread((1, 2, 4, 3), 0),
        ),
        case(f"y = {op_type} <{lead}kernel_shape = [2], dilations = [2]> (x0)", spread((2, 1, 5), 1)),
        case(f"y = {op_type} <{lead}kernel_shape = [3], strides = [2], ceil_mode = 1> (x0)", spread((1, 2, 6), 2)),
        case(f"y = {op_type} <{lead}kernel_shape = [1], strides = [2], ceil_mode = 1> (x0)", spread((1, 2, 4), 2)),
        case(f'y = {op_type} <{lead}kernel_shape = [2, 2], auto_pad = "SAME_LOWER"> (x0)', spread((1, 1, 3, 2), 3)),
        case(f"y = {op_type} <{lead}kernel_shape = [2, 1, 2]> (x0)", spread((1, 1, 2, 2, 3), 4)),
    ]


def everything(op_type, attributes=""):
    """Pooling over all places at once."""
    return [case(f"y = {op_type} {attributes} (x0)", spread(shape, 0)) for shape in ((2, 2, 3), (1, 2, 2, 2, 2))]


POOLING = {
    "MaxPool": [
        *pooling("MaxPool"),
        case("y, i = MaxPool <kernel_shape = [2, 2], pads = [1, 0, 0, 1]> (x0)", spread((1, 2, 3, 2), 5)),
        case("y, i = MaxPool <kernel_shape = [2, 2], storage_order = 1> (x0)", spread((1, 1, 3, 3), 6)),
    ],
    "AveragePool": [
        *pooling("AveragePool"),
        *pooling("AveragePool", "count_include_pad = 1"),
        case(
            "y = AveragePool <kernel_shape = [3], strides = [2], pads = [1, 1], ceil_mode = 1, count_include_pad = 1>"
            " (x0)",
            (1, 1, 6),
        ),
    ],
    "LpPool": [*pooling("LpPool"), *pooling("LpPool", "p = 1"), *pooling("LpPool", "p = 3")],
    "GlobalAveragePool": everything("GlobalAveragePool"),
    "GlobalMaxPool": everything("GlobalMaxPool"),
    "GlobalLpPool": [
        *everything("GlobalLpPool"),
        *everything("GlobalLpPool", "<p = 1>"),
        *everything("GlobalLpPool", "<p = 3>"),
    ],
}

VARIANCE = uniform(3, 9, 0.3, 2)

NORMALIZATIONS = {
    "BatchNormalization": [
        case("y = BatchNormalization <epsilon = 0.1> (x0, x1, x2, x3, x4)", (2, 3, 2), (3,), (3,), (3,), VARIANCE),
        case("y = BatchNormalization(x0, x1, x2, x3, x4)", (2, 3, 2, 2), (3,), (3,), (3,), VARIANCE),
        case("y = BatchNormalization(x0, x1, x2, x3, x4)", (2, 3), (3,), (3,), (3,), VARIANCE),
        case("y = BatchNormalization(x0, x1, x2, x3, x4)", (1, 3, 2), (3,), (3,), (3,), VARIANCE, opset=13),
    ],
    "InstanceNormalization": [
        case("y = InstanceNormalization(x0, x1, x2)", (2, 2, 4), (2,), (2,)),
        case("y = InstanceNormalization <epsilon = 0.1> (x0, x1, x2)", (1, 2, 2, 3), (2,), (2,)),
    ],
    "LayerNormalization": [
        case("y = LayerNormalization(x0, x1, x2)", (2, 2, 4), (4,), (4,)),
        case("y = LayerNormalization <axis = 1> (x0, x1)", (2, 3, 2), (3, 2)),
        case("y, mean, inverse = LayerNormalization <epsilon = 0.1> (x0, x1, x2)", (2, 2, 4), (4,), (4,)),
        case("y = LayerNormalization <axis = -2> (x0, x1, x2)", (2, 3, 2), (2,), (3, 1)),
        case("y = LayerNormalization <stash_type = 11> (x0, x1, x2)", (2, 4), (1,), (4,)),
    ],
    "RMSNormalization": [
        case("y = RMSNormalization(x0, x1)", (2, 2, 4), (4,)),
        case("y = RMSNormalization <axis = 1, epsilon = 0.1> (x0, x1)", (2, 3, 2), (2,)),
    ],
    "GroupNormalization": [
        case("y = GroupNormalization <num_groups = 2> (x0, x1, x2)", (2, 4, 3), (4,), (4,)),
        case("y = GroupNormalization <num_groups = 1, epsilon = 0.1> (x0, x1, x2)", (1, 2, 2, 2), (2,), (2,)),
        case("y = GroupNormalization <num_groups = 2> (x0, x1, x2)", (2, 4, 3), (2,), (2,), opset=20),
    ],
    "LpNormalization": [
        case("y = LpNormalization(x0)", (2, 3)),
        case("y = LpNormalization <axis = 0, p = 1> (x0)", spread((3, 2), 0)),
    ],
    "MeanVarianceNormalization": [
        case("y = MeanVarianceNormalization(x0)", (2, 2, 2, 2)),
        case("y = MeanVarianceNormalization <axes = [1]> (x0)", (2, 4)),
    ],
    "LRN": [
        case("y = LRN <size = 3, alpha = 0.5> (x0)", (1, 4, 2)),
        case("y = LRN <size = 2, alpha = 1.0, beta = 0.5, bias = 2.0> (x0)", (2, 3, 1, 2)),
    ],
    **{
        f"{domain}SimplifiedLayerNormalization": [
            case(f"y = {domain}SimplifiedLayerNormalization(x0, x1)", (2, 2, 4), (4,)),
            case(f"y, inverse = {domain}SimplifiedLayerNormalization <axis = 1> (x0, x1)", (2, 2, 3), (2, 3)),
        ]
        for domain in ("", "com.microsoft.")
    },
    "com.microsoft.SkipLayerNormalization": [
        case("y = com.microsoft.SkipLayerNormalization(x0, x1, x2)", (2, 4), (2, 4), (4,)),
        case("y = com.microsoft.SkipLayerNormalization(x0, x1, x2, , x3)", (2, 4), (2, 4), (4,), (4,)),
        case(
            "y, mean, inverse, total = com.microsoft.SkipLayerNormalization <epsilon = 0.1> (x0, x1, x2, x3, x4)",
            (2, 2, 3),
            (2, 2, 3),
            (3,),
            (3,),
            (3,),
        ),
    ],
    "com.microsoft.SkipSimplifiedLayerNormalization": [
        case("y = com.microsoft.SkipSimplifiedLayerNormalization(x0, x1, x2)", (2, 4), (2, 4), (4,)),
        case(
            "y, , inverse, total = com.microsoft.SkipSimplifiedLayerNormalization(x0, x1, x2, x3)",
            (2, 2, 3),
            (2, 2, 3),
            (3,),
            (3,),
        ),
    ],
}


def recurrent(op_type, gates, outputs, attributes="", *, directions=1, rest=(), lengths=(2, 1), biased=True):
    """Two sequences of two steps, one feature and two hidden units.

    Args:
        op_type: The operator.
        gates: How many it has.
        outputs: Their names.
        attributes: Of the node.
        directions: 1 or 2.
        rest: Shapes of the inputs behind the lengths.
        lengths: Of the sequences, or None where both are whole.
        biased: Whether there is a bias.
    """
    weights = [(directions, gates * 2, 1), (directions, gates * 2, 2), *([(directions, gates * 4)] if biased else [])]
    fixed = {} if lengths is None else {"n": np.array(lengths, np.int32)}
    names = ["x0", "x1", "x2", "x3" if biased else "", "n" if fixed else "", *(f"x{4 + i}" for i in range(len(rest)))]
    while names[-1] == "":
        names.pop()
    text = f"{outputs} = {op_type} <hidden_size = 2{attributes}> ({', '.join(names)})"
    values = (normal(shape, seed, "float64", 0.7) for seed, shape in enumerate(((2, 2, 1), *weights, *rest)))
    return case(text, *values, **fixed)


def directed(op_type, gates, outputs, states, peepholes=0):
    """What all recurrent operators know: `states` to begin with, and for the LSTM peepholes [directions, 6]."""

    def rest(directions, shape):
        return [*[shape] * states, *[(directions, 6)] * peepholes]

    one, both = rest(1, (1, 2, 2)), rest(2, (2, 2, 2))
    return [
        recurrent(op_type, gates, outputs, lengths=None, biased=False),
        recurrent(op_type, gates, outputs, rest=one),
        recurrent(op_type, gates, outputs, ', direction = "reverse"', rest=one),
        recurrent(op_type, gates, outputs, ', direction = "bidirectional"', directions=2, rest=both),
        recurrent(op_type, gates, outputs, ", layout = 1, clip = 2.0", rest=rest(1, (2, 1, 2))),
    ]


ALL_ACTIVATIONS = ("Affine", "Elu", "HardSigmoid", "LeakyRelu", "Relu", "Sigmoid", "Softsign", "Tanh")

RECURRENT = {
    "RNN": [
        *directed("RNN", 1, "y, h", 1),
        *(recurrent("RNN", 1, "y, h", f', activations = ["{name}"]', lengths=None) for name in ALL_ACTIVATIONS),
    ],
    "GRU": [
        *directed("GRU", 3, "y, h", 1),
        recurrent("GRU", 3, "y, h", ", linear_before_reset = 1", lengths=None),
        recurrent("GRU", 3, "y, h", ', activations = ["HardSigmoid", "Softsign"]', lengths=None),
    ],
    "LSTM": [
        *directed("LSTM", 4, "y, h, c", 2, peepholes=1),
        recurrent("LSTM", 4, "y, h, c", ", input_forget = 1", lengths=None),
    ],
}

TABLES = (CONVOLUTIONS, POOLING, NORMALIZATIONS, RECURRENT)
