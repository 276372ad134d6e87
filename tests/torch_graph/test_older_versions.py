"""Meanings that operators had in older versions of the standard, against ONNX Runtime."""

import re

import numpy as np
import pytest

from tests.builders import normal, parse
from tests.torch_graph.common import assert_same

pytestmark = pytest.mark.torch

# Version, nodes, shape of x.
CASES = [
    (12, "y = Softmax <axis = 1> (x)", (2, 3, 4)),
    (12, "y = Softmax (x)", (2, 3, 4)),
    (12, "y = LogSoftmax <axis = 2> (x)", (2, 3, 4)),
    (12, "y = Hardmax <axis = 1> (x)", (2, 3, 4)),
    (10, "y = Clip <min = -0.5, max = 0.25> (x)", (2, 3)),
    (10, "y = Clip <max = 0.25> (x)", (2, 3)),
    (10, "y = Dropout <ratio = 0.5> (x)", (2, 3)),
    (12, "y = Squeeze <axes = [0, 2]> (x)", (1, 3, 1, 2)),
    (12, "y = Squeeze (x)", (1, 3, 1, 2)),
    (12, "y = Unsqueeze <axes = [0, 3]> (x)", (3, 2)),
    (9, "y = Slice <starts = [1, -3], ends = [9, -1], axes = [0, 2]> (x)", (3, 2, 5)),
    (9, "y, i = TopK <k = 2, axis = 1> (x)", (3, 5)),
    (12, "y, z = Split <axis = 1, split = [2, 3]> (x)", (3, 5)),
    (12, "y, z = Split <axis = 0> (x)", (4, 5)),
    (10, 'y = Pad <mode = "reflect", pads = [0, 1, 2, 0, 2, 1]> (x)', (2, 3, 4)),
    (10, "y = Pad <value = 1.5, pads = [0, 1, -1, 0, 2, 1]> (x)", (2, 3, 4)),
    (10, "s = Constant <value = float[4] {1.0, 1.0, 2.0, 1.5}> () y = Resize (x, s)", (1, 2, 3, 4)),
    (10, 's = Constant <value = float[4] {1.0, 1.0, 2.0, 0.6}> () y = Resize <mode = "linear"> (x, s)', (1, 2, 3, 4)),
    (9, 's = Constant <value = float[4] {1.0, 1.0, 2.0, 3.0}> () y = Upsample <mode = "linear"> (x, s)', (1, 2, 3, 4)),
    (8, 'y = Upsample <mode = "nearest", scales = [1.0, 1.0, 2.0, 1.5]> (x)', (1, 2, 3, 4)),
    (17, "y = ReduceMean <axes = [-1], keepdims = 0> (x)", (2, 3, 4)),
    (17, "y = ReduceMax <axes = [0, 2]> (x)", (2, 3, 4)),
    (12, "y = ReduceSum <axes = [1]> (x)", (2, 3, 4)),
    (12, "y = ReduceL2 (x)", (2, 3, 4)),
    (12, "y = ReduceProd <axes = [0, 1]> (x)", (2, 3, 4)),
    (9, "i = Constant <value = int64[2,2] {0, 2, 1, 0}> () y = Scatter <axis = 1> (x, i, u)", (2, 3)),
    (20, "y = GroupNormalization <num_groups = 2> (x, g, b)", (2, 4, 3, 3)),
    (13, "y = BatchNormalization (x, g, b, m, v)", (2, 4, 3)),
    (21, "y = GlobalLpPool <p = 3> (x)", (2, 3, 4, 5)),
    (21, "y = MaxPool <kernel_shape = [3, 2], strides = [2, 2], ceil_mode = 1> (x)", (1, 2, 6, 5)),
    (
        21,
        "y = AveragePool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 0, 1, 0], ceil_mode = 1> (x)",
        (1, 2, 6, 6),
    ),
    (
        21,
        "y = AveragePool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1], count_include_pad = 1> (x)",
        (1, 2, 6, 6),
    ),
]


@pytest.mark.parametrize(("opset", "text", "shape"), CASES)
def test_older_versions(opset, text, shape):
    channels = 2 if "GroupNorm" in text else 4
    weights = {
        "g": normal(channels, 1),
        "b": normal(channels, 2),
        "m": normal(channels, 3),
        "v": np.square(normal(channels, 4)) + 0.5,
        "u": normal((2, 2), 5),
    }
    read = text[text.rindex("(") :]
    used = {name: array for name, array in weights.items() if re.search(rf"\b{name}\b", read)}
    size = ",".join(map(str, shape))
    model = parse(f"g (float[{size}] x) => (float y) {{ {text} }}", used, opset=opset, ir_version=7)
    model.graph.outputs[:] = model.graph.node(-1).outputs
    for value in model.graph.outputs:
        value.type = value.shape = None
    assert_same(model, {"x": normal(shape, 0)})


def test_what_is_too_old_or_too_new_is_refused():
    from qcompiler.torch_graph import unsupported

    old = parse("g (float[2,3] x) => (float[2,3] y) { y = Add <axis = 0> (x, x) }", opset=6, ir_version=4)
    (problem,) = unsupported(list(old.graph), old.opset_imports)
    assert problem == "ai.onnx.Add 'y' at version 6: version 6 of its domain is older than 7, the first one implemented"


def test_an_operator_that_changed_since_is_refused(monkeypatch):
    from qcompiler.torch_graph import registry, unsupported

    model = parse("g (float[2,3] x) => (float[2,3] y) { y = Abs(x) }")
    assert not unsupported(list(model.graph), model.opset_imports)
    monkeypatch.setattr(registry, "_last_change", lambda *_: registry.NEWEST_OPSET + 1)
    (problem,) = unsupported(list(model.graph), model.opset_imports)
    assert "its meaning changed at version 29; implemented up to 28" in problem
