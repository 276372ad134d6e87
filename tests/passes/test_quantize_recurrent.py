"""Every LSTM that the kernel takes computes what numpy makes of int8 weights and of states scaled at run time."""

import numpy as np
import pytest

from qcompiler.driver import compile_model
from qcompiler.session import saturates
from tests.builders import apply, context, normal, parse, run, serialized, text_of
from tests.integer_models import REACH

INPUT, HIDDEN, STEPS, ROWS = 24, 16, 5, 3
DYNAMIC = "w8a8-dynamic"


def lstm_model(*, directions=1, inputs="x, w, r, b, , h, c", attributes="", op="LSTM", body="", extra=None):
    kind = {1: "forward", 2: "bidirectional"}[directions]
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    states = f"float[{directions},B,{HIDDEN}]"
    results = "y, yh, yc" if op == "LSTM" else "y, yh"
    text = f"""g (float[S,B,{INPUT}] x, {states} h, {states} c) => (float[S,{directions},B,{HIDDEN}] y, {states} yh) {{
        {body}
        [rnn] {results} = {op} <hidden_size = {HIDDEN}, direction = "{kind}"{attributes}> ({inputs})
    }}"""
    weights = {
        "w": normal((directions, gates * HIDDEN, INPUT), 0, scale=0.3),
        "r": normal((directions, gates * HIDDEN, HIDDEN), 1, scale=0.3),
        "b": normal((directions, 2 * gates * HIDDEN), 2, scale=0.1),
    }
    return parse(text, weights | (extra or {}))


def feeds(directions=1, seed=5):
    return {
        "x": normal((STEPS, ROWS, INPUT), seed),
        "h": normal((directions, ROWS, HIDDEN), seed + 1, scale=0.3),
        "c": normal((directions, ROWS, HIDDEN), seed + 2, scale=0.3),
    }


def sigmoid(values):
    return 1 / (1 + np.exp(-values))


def dynamic(values):
    """What DynamicQuantizeLinear makes of a tensor, decoded."""
    low, high = min(values.min(), 0), max(values.max(), 0)
    scale = (high - low) / 255
    zero = np.clip(np.rint(-low / scale), 0, 255)
    return (np.clip(np.rint(values / scale) + zero, 0, 255) - zero) * scale


def naive(model, data):
    """The LSTM step by step in float64, with weights int8 per output and one scale for each activation at run time."""
    arrays = {n: v.const_value.numpy().astype(np.float64) for n, v in model.graph.initializers.items()}
    w, r = (np.rint(arrays[n][0] / s) * s for n in "wr" for s in [np.abs(arrays[n][0]).max(1, keepdims=True) / REACH])
    bias = arrays["b"][0, : 4 * HIDDEN] + arrays["b"][0, 4 * HIDDEN :]
    h, c = data["h"][0].astype(np.float64), data["c"][0].astype(np.float64)
    read = dynamic(data["x"].astype(np.float64)) @ w.T
    for step in read:
        i, o, f, g = np.split(step + dynamic(h) @ r.T + bias, 4, -1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
    return h


def error_db(want, got):
    return 10 * np.log10(np.square(want).sum() / np.square(want - got).sum())


def test_the_operator_computes_the_equation():
    model, data = lstm_model(), feeds()
    want, exact = naive(model, data), run(model, data)[1][0]
    result = apply("quantize_recurrent", model, context(scheme=DYNAMIC, reduce_range=saturates()))
    assert result.modified
    got = run(model, data)[1][0]
    assert error_db(want, got) > 50  # the kernel's activations are approximations
    assert 30 - 6 * saturates() < error_db(exact, got) < error_db(want, got)


def test_the_node_and_its_weights_before_and_after():
    model = lstm_model()
    given = {name: model.graph.initializers[name].const_value.numpy() for name in "wr"}
    (record,) = apply("quantize_recurrent", model, context(scheme=DYNAMIC)).records
    assert text_of(model) == [
        "y, yh, yc = DynamicQuantizeLSTM(x, rnn_W_codes, rnn_R_codes, b, , h, c, , "
        "rnn_W_scale, rnn_W_zero_point, rnn_R_scale, rnn_R_zero_point)"
    ]
    for name, weight in given.items():
        arrays = {part: model.graph.initializers[f"rnn_{name.upper()}_{part}"].const_value.numpy()
                  for part in ("codes", "scale", "zero_point")}  # fmt: skip
        scale = np.abs(weight).max(-1) / np.float32(127)
        np.testing.assert_allclose(arrays["scale"], scale, rtol=1e-6)
        assert np.array_equal(arrays["codes"], np.rint(weight / scale[..., None]).transpose(0, 2, 1))
        assert arrays["codes"].dtype == arrays["zero_point"].dtype == np.int8
        assert not arrays["zero_point"].any()
    assert (record.site, record.action, record.spec) == ("rnn", "quantized", "w8a8-dynamic-token-sym")
    assert record.metrics["sqnr_db"] == min(record.metrics["w_sqnr_db"], record.metrics["r_sqnr_db"]) > 38


FORMS = {
    "both directions": {"directions": 2},
    "no bias, no states": {"inputs": "x, w, r"},
    "lengths": {"inputs": "x, w, r, b, lengths, h, c", "extra": {"lengths": np.array([5, 2, 3], np.int32)}},
    "peepholes": {"inputs": "x, w, r, b, , h, c, p", "extra": {"p": normal((1, 3 * HIDDEN), 3, scale=0.3)}},
    "clipped, coupled gates": {"attributes": ", clip = 0.5, input_forget = 1"},
    "layout 0": {"attributes": ", layout = 0"},
    "other activations": {"attributes": ', activations = ["HardSigmoid", "Relu", "Tanh"]'},
    "weights of a file with moved gates": {
        "inputs": "x, w1, r, b, , h, c",
        "body": """w_i = Slice(whole, at0, at1, axis) w_rest = Slice(whole, at1, at4, axis)
            w0 = Concat <axis = 0> (w_i, w_rest) w1 = Unsqueeze(w0, axis)""",
        "extra": {"whole": normal((4 * HIDDEN, INPUT), 7, scale=0.3), "axis": np.array([0]), "at0": np.array([0]),
                  "at1": np.array([HIDDEN]), "at4": np.array([4 * HIDDEN])},
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_forms_that_the_kernel_takes(form):
    options = FORMS[form]
    model, data = lstm_model(**options), feeds(options.get("directions", 1))
    want = run(model, data)
    assert apply("quantize_recurrent", model, context(scheme=DYNAMIC, reduce_range=saturates())).modified
    apply("cleanup", model)
    assert [node.op_type for node in model.graph] == ["DynamicQuantizeLSTM"]
    for expected, got in zip(want, run(model, data), strict=True):
        assert error_db(expected, got) > 25 - 6 * saturates()  # 8 bits of weights and states


def test_bodies_of_control_flow():
    cell = f"LSTM <hidden_size = {HIDDEN}>"
    text = f"""g (bool p, float[S,B,{INPUT}] x) => (float[S,1,B,{HIDDEN}] y) {{
        y = If (p) <then_branch = yes () => (float[S,1,B,{HIDDEN}] s) {{ [rnn] s = {cell} (x, w, r) }},
            else_branch = no () => (float[S,1,B,{HIDDEN}] t) {{ [other] t = {cell} (x, v, q) }}>
    }}"""
    inner, recurrent = (1, 4 * HIDDEN, INPUT), (1, 4 * HIDDEN, HIDDEN)
    weights = {"w": inner, "yes.r": recurrent, "v": inner, "q": recurrent}
    model = parse(text, {name: normal(shape, 1, scale=0.3) for name, shape in weights.items()})
    x = feeds()["x"]
    want = [run(model, {"x": x, "p": np.array(p)})[0] for p in (True, False)]
    records = apply("quantize_recurrent", model, context(scheme=DYNAMIC, reduce_range=saturates())).records
    assert [record.site for record in records] == ["rnn", "other"]
    for p, expected in zip((True, False), want, strict=True):
        assert error_db(expected, run(model, {"x": x, "p": np.array(p)})[0]) > 30 - 6 * saturates()


REFUSED = {
    "layout": ({"attributes": ", layout = 1"}, {}, "an LSTM with layout = 1 has no integer kernel"),
    "computed weights": ({"inputs": "x, w1, r", "body": "w1 = Neg(w)"}, {},
                         "an LSTM whose weights are not constant has no integer kernel"),
    "target": ({}, {"target": "portable"},
               "ONNX Runtime has an integer LSTM for the CPU only; the target is portable"),
    "infinite": ({"inputs": "x, v, r", "extra": {"v": np.full((1, 4 * HIDDEN, INPUT), np.inf, np.float32)}}, {},
                 "its weights hold NaN or infinity"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_stays_float_has_a_reason(case):
    options, config, reason = REFUSED[case]
    model = lstm_model(**options)
    before = serialized(model)
    result = apply("quantize_recurrent", model, context(scheme=DYNAMIC, **config))
    assert not result.modified
    assert [(r.site, r.action, r.reason) for r in result.records] == [("rnn", "skipped", reason)]
    assert serialized(model) == before


@pytest.mark.parametrize("op", ["GRU", "RNN"])
def test_other_cells_are_left_alone(op):
    model = lstm_model(op=op, inputs="x, w, r")
    result = apply("quantize_recurrent", model, context(scheme=DYNAMIC, reduce_range=saturates()))
    assert (result.modified, result.records) == (False, ())


@pytest.mark.parametrize("scheme", ["w8a16", "w4a8"])
def test_other_schemes_leave_it_alone(scheme):
    model = lstm_model()
    assert not apply("quantize_recurrent", model, context(scheme=scheme)).modified


def test_seven_bits_on_request():
    model = lstm_model()
    apply("quantize_recurrent", model, context(scheme=DYNAMIC, reduce_range=True))
    codes = model.graph.initializers["rnn_W_codes"].const_value.numpy()
    assert np.abs(codes).max() == 63


def test_a_compilation(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(serialized(lstm_model()))
    data, exact = [feeds(seed=s) for s in range(9)], saturates()
    result = compile_model(path, DYNAMIC, output=tmp_path / "out.onnx", calibration=data, reduce_range=exact)
    (row,) = result.report.sites
    assert (row.action, row.reason) == ("quantized", "DynamicQuantizeLSTM, scaled at run time")
    assert result.report.verification.sqnr_db > 30 - 6 * saturates()
