import contextlib
import io

import numpy as np
import onnx
import pytest

from benchmarks import calibrators, proofs
from benchmarks.recoding import unrounded, widened
from qcompiler.driver import compile_model
from qcompiler.files.saver import save_model
from tests.builders import normal, parse

# A hard swish that is scaled and shifted between two convolutions: its operators go into scales, and into a Clip of
# codes. Behind it a product with codes that are stored, and a Gemm whose bias is int32 codes.
NET = """g (float[B,8,6,6] x) => (float[B,4] y) {
    a = Conv <pads = [1, 1, 1, 1]> (x, w0, b0)
    h = HardSigmoid <alpha = 0.16666667> (a)
    m = Mul(a, h)
    n = Mul(m, gain)
    o = Add(n, shift)
    c = Conv <pads = [1, 1, 1, 1]> (o, w1, b1)
    r = Relu(c)
    p = Mul(r, field)
    d = Conv <pads = [1, 1, 1, 1]> (p, w1, b0)
    f = Flatten(d)
    y = Gemm <transB = 1> (f, w2, b2)
}"""
WEIGHTS = {
    "w0": normal((8, 8, 3, 3), 0, scale=0.3),
    "b0": normal(8, 1),
    "gain": np.float32(1.5),
    "shift": np.float32(-0.25),
    "w1": normal((8, 8, 3, 3), 2, scale=0.1),
    "b1": normal(8, 3),
    "field": normal((8, 6, 6), 4),
    "w2": normal((4, 288), 5, scale=0.06),
    "b2": normal(4, 6),
}
FEEDS = [{"x": normal((1, 8, 6, 6), 10 + index)} for index in range(16)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The float model, and the compiled one, as files."""
    folder = tmp_path_factory.mktemp("proofs")
    source, compiled = folder / "float.onnx", folder / "compiled.onnx"
    save_model(parse(NET, WEIGHTS), source, force=True)
    steps = ",".join(proofs._steps()).replace("smoothquant,", "")
    options = {"calibration": FEEDS, "calibrator": "minmax", "verify": False}
    compile_model(source, "w8a8", output=compiled, pipeline_text=steps, **options)
    return source, compiled


def operators(file):
    return [node.op_type for node in onnx.load(file).graph.node]


def test_without_its_codes_a_compiled_model_is_the_float_one(models, tmp_path):
    source, compiled = models
    out = tmp_path / "out.onnx"
    unrounded(compiled, source, out)
    assert {"QuantizeLinear", "DequantizeLinear"} <= set(operators(compiled))
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(operators(out))
    assert proofs.moved(proofs.sqnr(source, out, FEEDS)) < 1e-6


def test_operators_that_went_into_scales_come_back(models, tmp_path):
    source, compiled = models
    before = operators(compiled)
    assert "Clip" in before
    assert not {"HardSigmoid", "Add"} & set(before)
    unrounded(compiled, source, tmp_path / "out.onnx")
    assert {"Clip", "Add"} <= set(operators(tmp_path / "out.onnx"))


def test_16_bits_gain_48_db(models, tmp_path):
    source, compiled = models
    out = tmp_path / "out.onnx"
    widened(compiled, source, out)
    gain = proofs.sqnr(source, out, FEEDS) - proofs.sqnr(source, compiled, FEEDS)
    assert 44 < gain < 52
    types = {tensor.data_type for tensor in onnx.load(out).graph.initializer}
    narrow = {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
    assert not types & narrow


@pytest.mark.parametrize("recode", [unrounded, widened])
@pytest.mark.parametrize(
    ("name", "array", "message"),
    [("w1", WEIGHTS["w0"], "decode to something else"), ("other", WEIGHTS["w1"], "codes of nothing")],
)
def test_another_float_model_is_refused(models, tmp_path, recode, name, array, message):
    other = tmp_path / "other.onnx"
    model = parse(NET.replace("w1", name), {**{k: v for k, v in WEIGHTS.items() if k != "w1"}, name: array})
    save_model(model, other, force=True)
    with pytest.raises(LookupError, match=message):
        recode(models[1], other, tmp_path / "out.onnx")


def test_codes_that_something_else_reads_are_refused(models, tmp_path):
    proto = onnx.load(models[1])
    codes = next(node.output[0] for node in proto.graph.node if node.op_type == "QuantizeLinear")
    proto.graph.node.append(onnx.helper.make_node("Cast", [codes], ["z"], to=onnx.TensorProto.FLOAT))
    proto.graph.output.append(onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, None))
    onnx.save(proto, tmp_path / "cast.onnx")
    with pytest.raises(LookupError, match=r"Cast .* reads codes"):
        unrounded(tmp_path / "cast.onnx", models[0], tmp_path / "out.onnx")


# --- what is left unfused -------------------------------------------------------------------------

NEEDED = {"node": "a", "operator": "QuantizeLinear", "reason": "encodes a graph input", "necessary": True}
OVERSIGHT = {"node": "b", "operator": "Conv", "reason": "runs in float", "necessary": False}
AUDIT = {"written": 10, "fused": 9, "added": 1}


@pytest.mark.parametrize(
    ("unfused", "holds", "oversights"),
    [
        ([NEEDED, NEEDED], True, ()),
        ([NEEDED], False, ()),
        ([NEEDED, NEEDED, OVERSIGHT], False, ("Conv 'b' runs in float",)),
        ([NEEDED, {**NEEDED, "reason": ""}], False, ("QuantizeLinear 'a' ",)),
    ],
)
def test_everything_left_has_a_reason(unfused, holds, oversights):
    row = proofs.left("model", {"integers": AUDIT, "unfused": unfused})
    assert (row.holds, row.oversights) == (holds, oversights)


# --- calibrators ----------------------------------------------------------------------------------


def test_rows_that_differ_fail():
    theirs = {"a": (0.0, 1.0), "b": (-1.0, 3.0)}
    assert calibrators._row("data", "minmax", theirs, theirs).holds
    row = calibrators._row("data", "minmax", theirs, {**theirs, "b": (-1.0, 2.0)})
    assert (row.holds, row.equal, row.difference) == (False, 1, 0.25)
    assert not calibrators._row("data", "minmax", {}, {}).holds


def test_a_range_that_ends_before_it_begins_is_mended():
    theirs = {"a": (5.0, 4.9), "b": (0.0, 1.0)}
    row = calibrators._row("data", "percentile 99.9", theirs, {**theirs, "a": (5.0, 5.0)})
    assert (row.holds, row.mended) == (True, 1)
    assert not calibrators._row("data", "percentile 99.9", theirs, theirs).holds


def test_percentiles_of_made_up_data_are_those_of_onnxruntime():
    arrays = calibrators._made_up()["heavy tails"]
    method, pick = next(each for each in calibrators._methods() if each[0] == "percentile 99.9")
    assert pick(arrays) == calibrators._collected(method, np.concatenate(arrays))


def test_memory_that_grows_fails():
    assert calibrators.Memory("rtn", (1, 90), (200, 220), 232).holds
    assert not calibrators.Memory("rtn", (1, 90), (200, 300), 232).holds


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize("gain", [48, 12])
def test_a_proof_that_fails_is_an_exit_code(monkeypatch, gain):
    monkeypatch.setattr(proofs, "rows", lambda only: iter([proofs.Bits(only, 20.0, 20.0 + gain)]))
    monkeypatch.setattr("sys.argv", ["proofs", "--only", "small"])
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        if gain > 30:
            proofs.main()
        else:
            with pytest.raises(SystemExit, match="1"):
                proofs.main()
    cells = [cell.strip() for cell in printed.getvalue().splitlines()[-1].split("|")[1:-1]]
    assert cells == ["small", "20", str(20 + gain), str(gain), "holds" if gain > 30 else "FAILS"]


def test_steps_end_with_what_makes_operators():
    steps = proofs._steps()
    assert steps.index("insert_qdq") < steps.index("rtn") < steps.index("export_qdq")
    assert not {"gptq", "correct_bias"} & set(steps)
