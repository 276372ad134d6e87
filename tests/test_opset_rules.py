"""The rules against ONNX Runtime: a model computes the same before and after, whatever its opset was."""

import functools
import os
from collections import Counter
from itertools import pairwise

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import defs

from qcompiler.opset_rules import RULES, CannotRaiseError, raise_node
from qcompiler.targets import MAX_OPSET, lacks_kernel
from tests.builders import apply, context, normal, parse, run, text_of

LOWEST_OPSET = 7  # that ONNX Runtime promises to run
X = normal((2, 6, 8, 10), 0)
SIGNATURE = "float[2,6,8,10] x"


def f32(*values):
    return np.array(values, np.float32)


def i64(*values):
    return np.array(values, np.int64)


def per_channel(seed):
    return np.abs(normal(6, seed))


NORM = {"s": per_channel(1), "b": per_channel(2), "m": per_channel(3), "v": per_channel(4)}
CELL = {"w": normal((1, 20, 10), 5, scale=0.3), "r": normal((1, 20, 5), 6, scale=0.3), "b": normal((1, 40), 7)}
GRID = {"q": np.tanh(normal((2, 5, 7, 2), 8))}
BOXES = {"r": f32(0, 0, 4, 4, 1, 1, 7, 6).reshape(2, 4), "i": i64(0, 1)}
REDUCTIONS = ["L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"]
POOL = "kernel_shape=[3,3], strides=[2,2], pads=[1,1,0,1]"

# Opset, nodes that compute y from x [2, 6, 8, 10], weights. What changed its form:
CASES: list[tuple[int, str, dict[str, np.ndarray]]] = [
    (8, "y = BatchNormalization <spatial=1, epsilon=0.01> (x, s, b, m, v)", NORM),
    (13, "y = BatchNormalization (x, s, b, m, v)", NORM),
    (7, "y = Clip <min=-0.5, max=0.7> (x)", {}),
    (10, "y = Clip <max=0.7> (x)", {}),
    (10, "y = Clip (x)", {}),
    (17, "t = Reshape (x, s) u = DFT (t) y = Reshape (u, z)", {"s": i64(12, 8, 10, 1), "z": i64(2, 6, 8, 20)}),
    (17, "t = Reshape (x, s) y = DFT <axis=2, onesided=1> (t)", {"s": i64(12, 8, 10, 1)}),
    (8, "y = Dropout <ratio=0.3> (x)", {}),
    (11, "y, mask = Dropout (x)", {}),
    (16, "y = GridSample (x, q)", GRID),
    (16, 'y = GridSample <mode="bilinear", align_corners=1> (x, q)', GRID),
    (19, 'y = GridSample <mode="bicubic"> (x, q)', GRID),
    (19, 'y = GridSample <mode="nearest"> (x, q)', GRID),
    (18, "y = GroupNormalization <num_groups=3> (x, s, b)", {"s": f32(1, 2, 3), "b": f32(0.1, 0.2, 0.3)}),
    (10, "y = Pad <pads=[0,0,1,2,0,0,2,1], value=1.5> (x)", {}),
    (7, 'y = Pad <mode="reflect", pads=[0,0,1,2,0,0,2,1]> (x)', {}),
    (10, "y = Resize (x, s)", {"s": f32(1, 1, 1.3, 2.7)}),
    (10, "y = Resize (x, s)", {"s": f32(1, 1, 0.6, 0.35)}),
    (10, 'y = Resize <mode="linear"> (x, s)', {"s": f32(1, 1, 0.6, 1.7)}),
    (11, "y = Resize (x, e, e, z)", {"e": f32(), "z": i64(2, 6, 5, 17)}),
    (12, 'y = Resize <mode="cubic"> (x, e, s)', {"e": f32(), "s": f32(1, 1, 1.3, 2.7)}),
    (17, 'y = Resize <mode="linear", coordinate_transformation_mode="align_corners"> (x, , , z)',
     {"z": i64(2, 6, 5, 17)}),
    (10, "y = RoiAlign <output_height=3, output_width=3, sampling_ratio=2> (x, r, i)", BOXES),
    (10, "y = Scatter <axis=1> (x, i, u)", {"i": i64(0, 3).reshape(1, 2, 1, 1), "u": f32(1, 2).reshape(1, 2, 1, 1)}),
    (9, "y = Slice <starts=[1,-3], ends=[5,1000], axes=[1,3]> (x)", {}),
    (7, "y = Slice <starts=[0,1], ends=[1,4]> (x)", {}),
    (7, "y, b, c = Split <axis=1, split=[1,2,3]> (x)", {}),
    (12, "y, b, c = Split <axis=1> (x)", {}),
    (17, "y, b, c = Split <axis=1> (x)", {}),
    (17, "y, b, c = Split <axis=1> (x, s)", {"s": i64(1, 2, 3)}),
    (12, "u = Unsqueeze <axes=[0,3]> (x) y = Squeeze <axes=[0]> (u)", {}),
    (7, "u = Unsqueeze <axes=[0,3]> (x) y = Squeeze (u)", {}),
    (9, "y, i = TopK <k=3, axis=2> (x)", {}),
    (8, "y = Upsample <scales=[1.0,1.0,2.0,3.0]> (x)", {}),
    (9, 'y = Upsample <mode="linear"> (x, s)', {"s": f32(1, 1, 2, 1.5)}),
    *[(12, f"y = {op} {axis} (x)", {}) for op in ("Hardmax", "LogSoftmax", "Softmax") for axis in
      ("", "<axis=0>", "<axis=2>", "<axis=3>", "<axis=-1>", "<axis=-2>")],
    (10, "h = Reshape (x, s) y = Softmax <axis=2> (h)", {"s": i64(12, -1, 4)}),
    *[(opset, f"a = Abs (x) y = Reduce{name} <axes=[1,3], keepdims=0> (a)", {})
      for name in REDUCTIONS for opset in (7, 12)],
    *[(17, f"a = Abs (x) y = Reduce{name} (a)", {}) for name in REDUCTIONS if name != "Sum"],
    # What was only widened, or gained what may be left out.
    *[(opset, f"y = AveragePool <{POOL}, count_include_pad={i}> (x)", {}) for i in (0, 1) for opset in (7, 18)],
    (18, f"y = AveragePool <{POOL}, ceil_mode=1> (x)", {}),
    (7, f"y = MaxPool <{POOL}> (x)", {}),
    (8, f"z, i = MaxPool <{POOL}> (x) y = Cast <to=1> (i)", {}),
    (17, f"y = LpPool <{POOL}, p=3> (x)", {}),
    (8, "y = ConvTranspose <strides=[2,2]> (x, w)", {"w": normal((6, 2, 3, 3), 9)}),
    (8, "y = Conv <group=2> (x, w)", {"w": normal((4, 3, 3, 3), 9)}),
    (7, "y = InstanceNormalization (x, s, b)", {"s": NORM["s"], "b": NORM["b"]}),
    (8, "y = LRN <size=3> (x)", {}),
    (9, "y = MeanVarianceNormalization (x)", {}),
    (17, "y = LayerNormalization (x, g)", {"g": normal(10, 9)}),
    (8, "t = Reshape (x, s) y = DepthToSpace <blocksize=2> (t)", {"s": i64(2, 12, 4, 10)}),
    (7, "f = Flatten <axis=3> (x) y = Gemm <transB=1, alpha=0.5> (f, w, c)", {"w": normal((4, 10), 9), "c": f32(1)}),
    (7, "i = ArgMax <axis=2> (x) y = Cast <to=1> (i)", {}),
    (10, "q = QuantizeLinear (x, s, z) y = DequantizeLinear (q, s, z)", {"s": np.float32(0.1), "z": np.uint8(12)}),
    (13, "q = QuantizeLinear (x, s, z) y = DequantizeLinear (q, s, z)", {"s": NORM["s"], "z": np.zeros(6, "u1")}),
    (9, "c = Cast <to=7> (x) a = Abs (c) y = OneHot <axis=1> (a, d, v)", {"d": i64(4), "v": f32(0, 1)}),
    (11, "y = CumSum <reverse=1> (x, a)", {"a": np.int64(2)}),
    (9, "z = Sub (x, x) c = Greater (x, z) y = Where (c, x, z)", {}),
    (10, "y = Mod <fmod=1> (x, c)", {"c": f32(0.3)}),
    (7, "a = Abs (x) y = Pow (a, c)", {"c": f32(1.7)}),
    (11, "y = ScatterND (x, i, u)", {"i": np.array([[0, 1], [1, 2]]), "u": normal((2, 8, 10), 9)}),
    (11, "y = GatherND (x, i)", {"i": np.array([[0, 1], [1, 2]])}),
    (12, "s = Shape (x) y = Cast <to=1> (s)", {}),
    (9, "s = Shape (x) c = ConstantOfShape (s) y = Add (c, x)", {}),
    (10, "i = IsInf (x) y = Cast <to=1> (i)", {}),
    (11, "f = Flatten <axis=0> (x) r = Floor (f) y, a, b, c = Unique (r)", {}),
    (7, "a = Selu (x) b = PRelu (a, s) c = LeakyRelu (b) d = HardSigmoid (c) y = Softplus (d)", {"s": f32(0.2)}),
]  # fmt: skip


@functools.cache
def newest_opset():
    """The newest that the ONNX Runtime at hand knows."""

    def known(opset):
        try:
            run(parse("g (float[1] x) => (float[1] y) { y = Neg (x) }", opset=opset), {"x": X[0, 0, 0, :1]})
        except Exception:
            return False
        return True

    return next((opset for opset in range(MAX_OPSET, 24, -1) if known(opset)), 21)


def raised(opset, target, text, weights, **options):
    """The raised model, and what the unraised one computes."""
    model, feeds = parse(text, weights, opset=opset, ir_version=8), options.pop("feeds", {"x": X})
    expected = run(model, feeds)
    result = apply("raise_opset", model, context(opset=target))
    assert result.modified
    assert model.opset_imports[""] == target
    return model, expected, feeds


def assert_same(model, expected, feeds):
    model.ir_version = 10
    for before, after in zip(expected, run(model, feeds), strict=True):
        assert before.shape == after.shape
        np.testing.assert_allclose(after, before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("opset", "nodes", "weights"), CASES, ids=[f"{nodes} at {o}" for o, nodes, _ in CASES])
def test_a_raised_model_computes_the_same(opset, nodes, weights):
    for target in (11, 13, 18, 21, newest_opset()):
        if target > opset and not ("RoiAlign" in nodes and target > 21):
            model, *rest = raised(opset, target, f"g ({SIGNATURE}) => (float[] y) {{ {nodes} }}", weights)
            assert_same(model, *rest)


@pytest.mark.parametrize("op", ["GRU", "LSTM", "RNN"])
def test_recurrent_cells_compute_the_same(op):
    gates = {"GRU": 3, "LSTM": 4, "RNN": 1}[op]
    weights = {"w": CELL["w"][:, : 5 * gates], "r": CELL["r"][:, : 5 * gates], "b": CELL["b"][:, : 10 * gates]}
    text = f"g (float[4,3,10] x) => (float[] y) {{ y = {op} <hidden_size=5> (x, w, r, b) }}"
    assert_same(*raised(7, 21, text, weights, feeds={"x": normal((4, 3, 10), 3)}))


def test_a_clip_whose_type_is_unknown_takes_it_from_its_data():
    text = f"g ({SIGNATURE}) => (float[] y) {{ h = Relu (x) k = Clip <min=-1.0, max=0.5> (h) y = Neg (k) }}"
    model, expected, feeds = raised(10, 21, text, {})
    assert [node.op_type for node in model.graph] == ["Relu", "CastLike", "CastLike", "Clip", "Neg"]
    assert_same(model, expected, feeds)
    model = parse(text, opset=10, ir_version=8)
    with pytest.raises(CannotRaiseError, match="type of its input is not known"):
        raise_node(model.graph[1], 10, 13)


def test_a_softmax_over_several_axes_is_flattened():
    text = f"g ({SIGNATURE}) => (float[2,6,8,10] y) {{ [probs] y = Softmax <axis=2> (x) }}"
    model, *_ = raised(12, 13, text, {})
    assert text_of(model) == [
        "probs_Shape_output = Shape(x)",
        "probs_Flatten_output = Flatten(x)",
        "probs_Softmax_output = Softmax(probs_Flatten_output)",
        "y = Reshape(probs_Softmax_output, probs_Shape_output)",
    ]


def test_a_softmax_over_the_last_axis_says_so():
    text = f"g ({SIGNATURE}) => (float[2,6,8,10] y) {{ y = Softmax <axis=3> (x) }}"
    model, *_ = raised(12, 13, text, {})
    assert text_of(model) == ["y = Softmax(x)"]
    assert model.graph[0].attributes["axis"].as_int() == -1


def test_half_precision_bounds_stay_half_precision():
    text = "g (float16[3] x) => (float16[3] y) { y = Clip <min=-0.5, max=0.7> (x) }"
    model, expected, feeds = raised(10, 21, text, {}, feeds={"x": np.array([-1, 0.1, 1], np.float16)})
    assert {value.const_value.dtype for value in model.graph.initializers.values()} == {ir.DataType.FLOAT16}
    assert_same(model, expected, feeds)


REFUSED = [
    (8, "y = BatchNormalization <spatial=0> (x, s, b, m, v)", NORM, "spatial = 0 no longer exists"),
    (13, "y, m1, v1, m2, v2 = BatchNormalization (x, s, b, m, v) z = Add (m1, m2)", NORM, "training mode"),
    (9, "y, mask = Dropout (x) z = Add (mask, x)", {}, "its mask is read"),
    (10, "s = Shape (x) f = Cast <to=1> (s) y = Resize (x, f)", {}, "its scales, .* are not constant"),
    (10, "y = Resize (x, s)", {"s": f32(1, 1, 0.5, 2)}, "shrinks one axis and stretches another"),
    (12, 'y = Resize <coordinate_transformation_mode="tf_half_pixel_for_nn"> (x, e, s)',
     {"e": f32(), "s": f32(1, 1, 2, 2)}, "tf_half_pixel_for_nn no longer exists"),
    (18, "h = Reshape (x, x) y = GroupNormalization <num_groups=3> (h, s, b)", NORM, "channels is not known"),
    (8, "y = Scan <num_scan_inputs=1, body = b (float[8,10] i) => (float[8,10] o) { o = Neg (i) }> (, x)", {},
     "sequence lengths"),
    (9, "y = Relu <axis=3> (x)", {}, "attribute 'axis' no longer exists"),
    (12, "y = Relu (x, x)", {}, "other inputs or outputs"),
]  # fmt: skip


@pytest.mark.parametrize(("opset", "nodes", "weights", "why"), REFUSED)
def test_what_has_no_later_form_is_refused_with_the_reason(opset, nodes, weights, why):
    model = parse(f"g ({SIGNATURE}) => (float[] y) {{ {nodes} }}", weights, opset=opset, ir_version=8)
    with pytest.raises(CannotRaiseError, match=why):
        _ = [raise_node(node, opset, 25) for node in list(model.graph)]


def changes():
    """Operators and versions whose definition is not a mere extension of the one before, by the `onnx` package."""
    history = {}
    for schema in defs.get_all_schemas_with_history():
        if schema.domain == "":
            history.setdefault(schema.name, []).append(schema)
    for name, schemas in sorted(history.items()):
        schemas.sort(key=lambda schema: schema.since_version)
        for old, new in pairwise(schemas):
            if LOWEST_OPSET < new.since_version <= MAX_OPSET and not extends(new, old):
                yield name, new.since_version


def extends(new, old):
    def default(attribute):
        return attribute.default_value.SerializeToString()

    kept = all(
        name in new.attributes and default(new.attributes[name]) == default(attribute)
        for name, attribute in old.attributes.items()
    )
    added = all(not new.attributes[name].required for name in set(new.attributes) - set(old.attributes))
    same = [i.name for i in new.inputs][: len(old.inputs)] == [i.name for i in old.inputs]
    optional = new.min_input <= old.min_input
    return kept and added and same and optional and len(new.outputs) >= len(old.outputs) and not new.deprecated


def test_there_is_a_rule_for_every_changed_definition():
    missing = set(changes()) - set(RULES)
    assert missing == set()


def test_every_rule_belongs_to_a_new_definition():
    for op_type, version in RULES:
        assert defs.get_schema(op_type, version, "").since_version == version


def test_operators_said_to_lack_a_kernel_lack_it():
    text = f"g ({SIGNATURE}) => (float[] y) {{ y = GlobalLpPool (x) }}"
    run(parse(text, opset=21), {"x": X})
    assert lacks_kernel("GlobalLpPool", 22)
    assert not lacks_kernel("GlobalLpPool", 21)
    with pytest.raises(Exception, match="GlobalLpPool"):
        run(parse(text, opset=22), {"x": X})


def stored_models():
    """Models that come with the `onnx` package, most of opset 6 to 9, exported by PyTorch."""
    folder = os.path.join(os.path.dirname(onnx.__file__), "backend", "test", "data")
    for kind in ("pytorch-operator", "pytorch-converted"):
        for name in sorted(os.listdir(os.path.join(folder, kind))) if os.path.isdir(os.path.join(folder, kind)) else ():
            yield os.path.join(folder, kind, name, "model.onnx")


def test_stored_models_compute_the_same():
    done = Counter()
    for path in list(stored_models())[::3]:
        proto = onnx.load(path)
        model = ir.serde.deserialize_model(proto)
        inputs = [value for value in model.graph.inputs if not value.is_initializer()]
        feeds = {value.name: normal(value.shape.numpy(), 1) for value in inputs}
        try:
            expected = run(proto.SerializeToString(), feeds)
        except Exception:
            done["not run by ONNX Runtime"] += 1
            continue
        apply("canonicalize", model)
        done["modified"] += apply("raise_opset", model, context(opset=21)).modified
        assert_same(model, expected, feeds)
    assert not done or done["modified"] > 20
