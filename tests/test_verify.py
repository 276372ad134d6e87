import dataclasses
import math

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler import verify as verify_module
from qcompiler.errors import CalibrationError, KernelError, ModelError, PassError
from qcompiler.numerics.metrics import logits_divergence
from qcompiler.session import Executed, InputSpec, OrtRunner
from qcompiler.verify import verify
from qcompiler.verify_audit import count_operators, fusion_remarks
from qcompiler.verify_outputs import Closeness, producers_of_logits
from qcompiler.verify_rows import shorten
from tests import token_models as models
from tests.stored_models import externalize, make_model, names_in, value, write

CPU = "CPUExecutionProvider"


@pytest.fixture
def check(tmp_path):
    """Verify one model against another; both are written to files."""

    def run(output, held_out=None, reference=None, **options):
        source = write(models.float_model() if reference is None else reference, tmp_path / "float.onnx")
        path = tmp_path / "output.onnx"
        if isinstance(output, onnx.ModelProto):
            write(output, path)
        held_out = models.rows() if held_out is None else held_out
        return verify(source, path, held_out, **{"providers": (CPU,), "threads": 1, **options})

    return run


def run_plain(model, feeds):
    """What ONNX Runtime computes, by its own interface."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=[CPU])
    return session.run(None, {need.name: feeds[need.name] for need in session.get_inputs()})[0]


def naive_figures(reference, output, held_out):
    """SQNR in dB, mean KL in nats and top-1, a position at a time in float64; padding left out."""
    signal = noise = 0.0
    divergences, same = [], []
    for feeds in held_out:
        expected, found = run_plain(reference, feeds).astype(np.float64), run_plain(output, feeds).astype(np.float64)
        for position in np.flatnonzero(feeds["attention_mask"][0]):
            p, q = expected[0, position], found[0, position]
            signal += sum(x * x for x in p)
            noise += sum((x - y) ** 2 for x, y in zip(p, q, strict=True))
            log_p = p - p.max() - math.log(sum(math.exp(x - p.max()) for x in p))
            log_q = q - q.max() - math.log(sum(math.exp(x - q.max()) for x in q))
            divergences.append(sum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True)))
            same.append(int(np.argmax(p) == np.argmax(q)))
    return 10 * math.log10(signal / noise), sum(divergences) / len(divergences), sum(same) / len(same)


@pytest.mark.parametrize("padding", [0, 7])
def test_figures_are_those_of_a_naive_loop(check, padding):
    held_out = models.rows(2, length=80, padding=padding)
    found = check(models.block_model(), held_out)
    sqnr, kl, top1 = naive_figures(models.float_model(), models.block_model(), held_out)
    assert found.sqnr_db == pytest.approx(sqnr, abs=1e-3)
    assert found.kl == pytest.approx(kl, rel=1e-3)
    assert found.top1 == pytest.approx(top1)
    (logits,) = found.outputs
    assert (logits.name, logits.kind, logits.positions) == ("logits", "logits", 2 * (80 - padding))
    assert logits.kl_worst > logits.kl
    assert (found.rows, found.synthetic, found.remarks) == (2, False, ())
    assert found.seconds > 0
    assert found.peak_bytes > 0


def test_a_model_is_exact_compared_with_itself(check):
    found = check(models.float_model())
    assert (found.sqnr_db, found.kl, found.top1) == (math.inf, 0.0, 1.0)
    assert found.floor_failures(90.0, 0.0) == []


def test_optimizations_are_tried_off_and_on(check):
    found = check(models.block_model())
    assert [(run.provider, run.optimized) for run in found.runs] == [(CPU, False), (CPU, True)]
    assert all(run.close.kl < 0.02 for run in found.runs)
    assert found.short_positions == 64
    assert found.fused == {CPU: {"MatMulNBits": 2}}


def test_what_level_4_costs_is_measured_against_exact_compute(check, tmp_path):
    short = models.rows(1, length=64)
    output = models.block_model(level=4, head_level=4)
    cost = check(output, short).accuracy_level
    assert cost.nodes == 2
    _, exact, _ = naive_figures(models.float_model(), models.block_model(level=0, head_level=0), short)
    _, written, _ = naive_figures(models.float_model(), output, short)
    assert cost.exact.kl == pytest.approx(exact, rel=1e-3)
    assert cost.written.kl == pytest.approx(written, rel=1e-3)
    assert names_in(tmp_path) == ["float.onnx", "output.onnx"]
    assert (tmp_path / "output.onnx").read_bytes() == output.SerializeToString()


def test_level_4_is_not_looked_at_where_there_is_none_or_it_is_not_wanted(check):
    assert check(models.block_model(level=0, head_level=0)).accuracy_level is None
    assert check(models.block_model(), accuracy_levels=False).accuracy_level is None


def test_level_4_inside_a_branch_counts(check):
    node, constants = models.blocks("inner", np.eye(32, dtype=np.float32), 4, 4, source="x", result="y")
    first = helper.make_graph([node], "then", [], [value("y", ["b", 32])])
    second = helper.make_graph([helper.make_node("Neg", ["x"], ["z"])], "else", [], [value("z", ["b", 32])])
    chosen = helper.make_node("If", ["flag"], ["out"], name="if", then_branch=first, else_branch=second)
    inputs = [value("x", ["b", 32]), value("flag", [], TensorProto.BOOL)]
    output = make_model([chosen], inputs, [value("out", ["b", 32])], constants, opsets=(("", 21), ("com.microsoft", 1)))
    x = np.random.default_rng(0).standard_normal((2, 32)).astype(np.float32)
    found = check(output, [{"x": x, "flag": np.array(True)}], output)
    assert found.accuracy_level.nodes == 1
    assert found.fused == {CPU: {"MatMulNBits": 1}}


def test_external_data_is_found_by_the_model_and_by_its_variant(check, tmp_path):
    externalize(models.block_model(), tmp_path / "output.onnx")
    found = check(None)
    assert found.kl == pytest.approx(check(models.block_model()).kl, rel=1e-6)
    assert found.accuracy_level.nodes == 1


def test_the_float_model_may_be_bytes(check, tmp_path):
    write(models.block_model(), tmp_path / "output.onnx")
    reference = models.float_model().SerializeToString()
    found = verify(reference, tmp_path / "output.onnx", models.rows(), providers=(CPU,), threads=1)
    assert found.kl == pytest.approx(check(models.block_model()).kl)


@pytest.mark.parametrize("small", [True, False])
def test_a_large_float_model_is_not_copied(check, monkeypatch, small):
    monkeypatch.setattr(verify_module, "_COPIED_BYTES", 10**9 if small else 10)
    opened = []

    class Spy(OrtRunner):
        def __init__(self, *arguments, **options):
            opened.append((options["optimize"], options["prepack"]))
            super().__init__(*arguments, **options)

    monkeypatch.setattr(verify_module, "OrtRunner", Spy)
    assert check(models.block_model()).kl < 0.02
    assert opened[0] == (small, small)


def test_little_memory_means_one_short_row_without_prepacking(check):
    found = check(models.block_model(), max_memory=1)
    assert (found.rows, found.short_positions, found.accuracy_level) == (1, 64, None)
    assert "compared on 64 positions of one row only" in found.remarks[-1]
    (logits,) = found.outputs
    assert logits.positions == 64
    assert [run.optimized for run in found.runs] == [True]
    assert check(models.block_model(), max_memory=10**12).rows == 3


# Failures.


def replace_constant(model, name, change):
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    array = numpy_helper.to_array(tensor).copy()
    change(array)
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    return model


def poison(where, what):
    def change(array):
        array.reshape(-1)[where] = what

    return change


@pytest.mark.parametrize(("what", "word"), [(np.nan, "NaN or infinite"), (np.inf, "NaN or infinite"), (0.0, "zero")])
@pytest.mark.parametrize("external", [False, True])
def test_a_scale_that_can_be_none_is_an_error(check, tmp_path, what, word, external):
    model = replace_constant(models.block_model(), "head_scales", poison([3, 5], what))
    if external:
        externalize(model, tmp_path / "output.onnx")
    with pytest.raises(PassError, match=rf"2 of the 384 scales in 'head_scales' are {word}.*MatMulNBits 'head'"):
        check(None if external else model)


def test_scales_of_dequantize_linear_are_checked_too(check):
    model = replace_constant(models.dequantizing_model(), "up_s", poison([0], 0.0))
    with pytest.raises(PassError, match=r"1 of the 96 scales in 'up_s' are zero.*DequantizeLinear 'dq_up'"):
        check(model)


def test_scales_that_are_not_there_are_an_error(check, tmp_path):
    externalize(models.block_model(), tmp_path / "output.onnx")
    (tmp_path / "weights.data").write_bytes(b"")
    with pytest.raises(ModelError, match=r"scales 'up_scales' cannot be read from 'weights\.data'"):
        check(None)


def test_an_output_that_is_not_a_number_is_an_error(check):
    # The rows of 40 of the 128 tokens, so that the short row is sure to have some.
    model = replace_constant(models.block_model(), "table", poison(slice(0, 40 * models.WIDTH), np.nan))
    with pytest.raises(KernelError, match=r"output\.onnx on CPU.* optimizations off: output 'logits' holds \d+ values"):
        check(model)


def test_what_is_not_finite_in_the_float_model_is_left_out(check):
    poisoned = poison(slice(0, models.WIDTH), np.nan)
    reference = replace_constant(models.float_model(), "table", poisoned)
    output = replace_constant(models.block_model(), "table", poisoned)
    held_out = models.rows(2)
    lost = sum(int((feeds["input_ids"] == 0).sum()) for feeds in held_out)
    found = check(output, held_out, reference)
    assert lost
    assert found.outputs[0].positions == 160 - lost
    assert found.kl < 0.02
    assert f"{lost * models.VOCABULARY} values of the float model's output 'logits'" in found.remarks[-1]


def test_an_output_of_another_shape_is_an_error(check):
    model = models.block_model()
    model.graph.node.append(helper.make_node("Transpose", ["turned"], ["logits"], perm=[0, 2, 1], name="turn"))
    model.graph.node[3].output[0] = "turned"
    with pytest.raises(PassError, match=r"shape of output 'logits' is \[1, 128, 64\].*\[1, 64, 128\]"):
        check(model)


def test_a_missing_output_is_an_error(check):
    reference = models.float_model(extra_outputs=[value("active", ["batch", "sequence", models.HIDDEN])])
    with pytest.raises(PassError, match="the output 'active' of the float model is missing"):
        check(models.block_model(), reference=reference)


def test_a_model_that_does_not_load_is_an_error(check):
    model = models.block_model(bits=4)
    for item in model.graph.node[1].attribute:
        if item.name == "block_size":
            item.i = 7
    with pytest.raises(KernelError, match=r"cannot load 'output.onnx' on CPU.* with optimizations off"):
        check(model)


def test_an_unknown_provider_is_an_error(check):
    with pytest.raises(KernelError, match=r"provider NoneExecutionProvider is not in this ONNX Runtime; it has .*CPU"):
        check(models.block_model(), providers=("NoneExecutionProvider",))


def test_a_row_that_the_float_model_cannot_run_is_an_error(check):
    feeds = {**models.rows(1)[0], "input_ids": np.full((1, 80), models.VOCABULARY)}
    with pytest.raises(CalibrationError, match=r"cannot be run on input_ids \[1, 64\].*--calibration"):
        check(models.block_model(), [feeds])


def test_no_row_is_an_error(check):
    with pytest.raises(CalibrationError, match="no held-out row"):
        check(models.block_model(), [])


# The audit.


def test_dequantize_linear_that_is_not_fused_is_remarked(check):
    found = check(models.dequantizing_model(shared=True))
    assert found.fused[CPU]["DequantizeLinear"] == 2
    assert any("did not fuse dequantizes the weight of 2 MatMul" in remark for remark in found.remarks)
    assert any("'head', 'head2'" in remark for remark in found.remarks)


def test_int8_activations_that_onnx_runtime_adds_are_remarked(check):
    found = check(models.dequantizing_model())
    assert any("as MatMulNBits with int8 activations" in remark for remark in found.remarks)


def test_a_missing_exact_kernel_is_remarked(check):
    found = check(models.block_model(head_level=0))
    assert [remark for remark in found.remarks if "1 MatMulNBits of 2 or 8 bits dequantize" in remark]
    assert "'head'" in found.remarks[0]


def test_what_lands_on_the_cpu_is_remarked_and_counted_apart():
    cuda = "CUDAExecutionProvider"
    ran = [Executed("up", "MatMulNBits", cuda), Executed("head", "MatMulNBits", CPU), Executed("s", "Shape", CPU)]
    assert count_operators(ran, cuda) == {"MatMulNBits": 1, "MatMulNBits (CPU)": 1}
    (remark,) = fusion_remarks(models.block_model(head_level=0), ran, cuda)
    assert remark == f"under {cuda} the CPU runs 1 MatMulNBits, with copies to and fro"


def test_a_good_model_has_no_remark(check):
    assert check(models.block_model()).remarks == ()


# Outputs.


def outputs_model(change=0.0):
    """Logits, a hidden state, an integer, a probability and two caches, all from x [b, s, 8]."""
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((8, 120)).astype(np.float32)
    nodes = [
        helper.make_node("Add", ["x", "shift"], ["moved"]),
        helper.make_node("MatMul", ["moved", "wide"], ["scores"]),
        helper.make_node("Relu", ["moved"], ["hidden"]),
        helper.make_node("Softmax", ["scores"], ["shares"], axis=-1),
        helper.make_node("ArgMax", ["scores"], ["best"], axis=-1, keepdims=0),
        helper.make_node("Mul", ["moved", "moved"], ["present.0.key"]),
        helper.make_node("Neg", ["moved"], ["present.0.value"]),
    ]
    shapes = {"scores": ["b", "s", 120], "hidden": ["b", "s", 8], "shares": ["b", "s", 120]}
    shapes |= {"present.0.key": ["b", "s", 8], "present.0.value": ["b", "s", 8]}
    outputs = [value(name, shape) for name, shape in shapes.items()]
    outputs.append(value("best", ["b", "s"], TensorProto.INT64))
    constants = [
        numpy_helper.from_array(wide, "wide"),
        numpy_helper.from_array(np.full(1, change, np.float32), "shift"),
    ]
    return make_model(nodes, [value("x", ["b", "s", 8])], outputs, constants)


def test_figures_fit_what_an_output_is(check):
    x = np.random.default_rng(1).standard_normal((1, 6, 8)).astype(np.float32)
    found = check(outputs_model(0.01), [{"x": x}], outputs_model())
    kinds = {metrics.name: metrics.kind for metrics in found.outputs}
    assert kinds == {
        "scores": "logits",
        "hidden": "values",
        "shares": "probabilities",
        "best": "exact",
        "present* (2 outputs)": "cache",
    }
    figures = {metrics.name: metrics for metrics in found.outputs}
    assert figures["best"].equal is not None
    assert figures["best"].sqnr_db is None
    assert figures["shares"].kl == pytest.approx(figures["scores"].kl, rel=1e-3)
    hidden = figures["hidden"]
    assert hidden.kl is None
    assert hidden.max_abs_error == pytest.approx(0.01, abs=1e-6)
    change = np.maximum(x + np.float32(0.01), 0) - np.maximum(x, 0)
    expected = 10 * math.log10(float((np.maximum(x, 0) ** 2).sum() / (change**2).sum()))
    assert hidden.sqnr_db == pytest.approx(expected, abs=1e-3)
    neg, square = np.float32(0.01), (x + np.float32(0.01)) ** 2 - x**2
    caches = [(x**2).sum() / neg**2 / x.size, (x**4).sum() / (square**2).sum()]
    assert figures["present* (2 outputs)"].sqnr_db == pytest.approx(10 * math.log10(min(caches)), abs=1e-2)
    assert found.sqnr_db == min(m.sqnr_db for m in found.outputs if m.sqnr_db is not None)
    assert found.short_positions == 0


@pytest.mark.parametrize(
    ("name", "ends_in", "expected"),
    [
        ("output", "MatMul", True),
        ("output", "Softmax", True),
        ("image_embeds", "MatMul", False),
        ("last_hidden_state", "MatMul", False),
        ("output", "Bias", True),
        ("output", "Residual", False),
        ("output", "Tanh", False),
        ("output", "Input", False),
    ],
)
def test_logits_are_told_from_hidden_states(name, ends_in, expected):
    ends = {
        "MatMul": [helper.make_node("MatMul", ["x", "w"], [name])],
        "Softmax": [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Softmax", ["m"], [name])],
        "Bias": [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Add", ["b", "m"], [name])],
        "Residual": [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Add", ["x", "m"], [name])],
        "Tanh": [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Tanh", ["m"], [name])],
        "Input": [helper.make_node("Cast", ["x"], [name], to=TensorProto.FLOAT)],
    }
    constants = [numpy_helper.from_array(np.zeros((4, 4), np.float32), key) for key in "wb"]
    model = make_model(ends[ends_in], [value("x", ["n", 4])], [value(name, ["n", 4])], constants)
    producer = "Softmax" if ends_in == "Softmax" else "MatMul"
    assert producers_of_logits(model.graph) == ({name: producer} if expected else {})


def test_probabilities_give_the_divergence_of_their_logits():
    rng = np.random.default_rng(0)
    pair = [4 * rng.standard_normal((7, 11)) for _ in range(2)]
    shares = [np.exp(logits) / np.exp(logits).sum(-1, keepdims=True) for logits in pair]
    kl, same = logits_divergence(*shares, probabilities=True)
    np.testing.assert_allclose(kl, logits_divergence(*pair)[0], rtol=1e-9)
    np.testing.assert_array_equal(same, logits_divergence(*pair)[1])
    shares[1][:, 3] = 0
    assert np.isfinite(logits_divergence(*shares, probabilities=True)[0]).all()


# The short row.

IDS = InputSpec("input_ids", "int64", ("batch", "sequence"))
MASK = InputSpec("attention_mask", "int64", ("batch", "total"))
PAST = InputSpec("past_key_values.0.key", "float32", ("batch", 2, "past", 4))


def feeds_of(length=100, past=0, padding=0):
    mask = np.ones((1, length), np.int64)
    mask[:, :padding] = 0
    cache = np.zeros((1, 2, past, 4), np.float32)
    return {"input_ids": np.arange(length)[None], "attention_mask": mask, "past_key_values.0.key": cache}


def test_tokens_are_cut_to_their_first_positions():
    short = shorten(feeds_of(), [IDS, MASK, PAST], 64)
    assert {name: array.shape for name, array in short.items()} == {
        "input_ids": (1, 64),
        "attention_mask": (1, 64),
        "past_key_values.0.key": (1, 2, 0, 4),
    }
    np.testing.assert_array_equal(short["input_ids"][0], np.arange(64))


@pytest.mark.parametrize(
    ("feeds", "inputs"),
    [
        (feeds_of(64), [IDS, MASK, PAST]),
        (feeds_of(past=3), [IDS, MASK, PAST]),
        (feeds_of(padding=80), [IDS, MASK, PAST]),
        (feeds_of(), [dataclasses.replace(IDS, shape=("batch", 100)), MASK, PAST]),
        ({"x": np.zeros((1, 100), np.float32)}, [InputSpec("x", "float32", ("b", "n"))]),
        ({**feeds_of(), "x": np.zeros((1, 100), np.float32)}, [IDS, MASK, PAST, InputSpec("x", "float32", ("b", "n"))]),
    ],
    ids=["short already", "cache in use", "padded in front", "fixed length", "no tokens", "another input"],
)
def test_what_cannot_be_cut_stays(feeds, inputs):
    assert shorten(feeds, inputs, 64) is None


# Floors.


def test_floors_are_compared_with_the_worst_output(check):
    found = check(models.block_model())
    assert found.floor_failures(None, None) == []
    assert found.floor_failures(20.0, 0.05) == []
    low, high = found.floor_failures(30.0, 1e-4)
    assert low == f"SQNR of 'logits' is {found.sqnr_db:.2f} dB, below 30 dB"
    assert high == f"KL divergence is {found.kl:.4g} nats, above 0.0001 nats"


def test_a_floor_on_another_provider_counts(check):
    found = check(models.block_model())
    other = dataclasses.replace(found.runs[1], provider="OtherExecutionProvider", close=Closeness(5.0))
    found = dataclasses.replace(found, runs=(*found.runs, other))
    assert found.floor_failures(20.0, None) == ["SQNR on OtherExecutionProvider is 5.00 dB, below 20 dB"]


def test_a_floor_that_nothing_can_be_held_against_is_missed(check):
    found = dataclasses.replace(check(models.block_model()), sqnr_db=None, kl=None)
    assert [text.split(",")[0] for text in found.floor_failures(1.0, 1.0)] == [
        "no output is a float",
        "no output looks like logits",
    ]
