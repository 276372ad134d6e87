"""`--calibration synthetic`, from the command and from Python."""

import importlib.util
import json

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler import compile_model
from qcompiler.config import CompileConfig
from qcompiler.errors import CalibrationError, PassError
from qcompiler.feeding import calibration_data
from tests.builders import Ticks, decoder, linear_model, normal, parse, serialized
from tests.synthetic.models import VOCABULARY, language_model, network, pictures


def data_of(model, **options):
    return calibration_data(model, CompileConfig(calibration="synthetic", threads=1, **options))


def text_data(model=None, **options):
    return data_of(model or language_model(), **{"samples": 8, "sequence_length": 12, **options})


def saved(model, path):
    path.write_bytes(serialized(model))
    return path


def test_text_has_the_rows_and_the_length_asked_for():
    data = text_data()
    ids = np.concatenate([feeds["input_ids"] for feeds in data.batches])
    assert ids.shape == (8, 12)
    assert len(data.held_out) == 1
    assert (data.held_out[0]["attention_mask"] == 1).all()
    assert data.synthetic
    assert data.description == (
        "8 rows of 12 tokens that the model wrote itself (texts of 12 tokens at temperature 1), 1 held out"
    )


def test_32_rows_are_made_unless_told_otherwise():
    data = text_data(samples=None)
    assert sum(len(feeds["input_ids"]) for feeds in data.batches) == 32
    assert len(data.held_out) == 4


def test_the_same_seed_makes_the_same_bytes():
    assert text_data().digest == text_data().digest != text_data(seed=1).digest


def test_forms_of_one_model_write_the_same():
    named = language_model(output="answers")
    cached = text_data(language_model(cache=True))
    assert [feeds["input_ids"].tolist() for feeds in cached.batches] == [
        feeds["input_ids"].tolist() for feeds in text_data(named).batches
    ]
    assert cached.batches[0]["past_key_values.0.key"].shape == (2, 2, 0, 16)


def test_a_model_of_fixed_shape_writes_rows_of_its_length():
    model = language_model()
    for value in model.graph.inputs:
        value.shape = ir.Shape((2, 16))
    data = text_data(model, samples=3)
    assert {feeds["input_ids"].shape for feeds in data.batches} == {(2, 16)}
    assert len(data.batches) == 3


def test_compiled_and_reported(tmp_path):
    path = saved(language_model(), tmp_path / "model.onnx")
    ticks = Ticks()
    options = {"samples": 4, "sequence_length": 12, "threads": 1}
    result = compile_model(
        path, "w4a16-g32", calibration="synthetic", output=tmp_path / "out.onnx", progress=ticks, **options
    )
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report["calibration"]["synthetic"]
    assert report["calibration"]["description"].startswith("4 rows of 12 tokens that the model wrote itself")
    assert report["recipe"]["calibration"] == "synthetic"
    assert json.loads(result.model.metadata_props["qcompiler.recipe"])["calibration"] == "synthetic"
    assert {"gptq"} <= {row["name"] for row in report["passes"]}
    assert ("writing text", 12, 12) in ticks.seen
    compile_model(path, "w4a16-g32", calibration="synthetic", output=tmp_path / "again.onnx", **options)
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()


@pytest.mark.torch
def test_a_network_gets_inputs_by_its_statistics(tmp_path, monkeypatch):
    from qcompiler.synthetic import zeroq

    monkeypatch.setattr(zeroq.Settings, "__init__", _brief(zeroq.Settings.__init__))
    path = saved(network(pictures(64)), tmp_path / "model.onnx")
    ticks = Ticks()
    result = compile_model(
        path, "w8a8", calibration="synthetic", samples=4, threads=1, output=tmp_path / "out.onnx", progress=ticks
    )
    described = result.report.calibration.description
    assert described.startswith("4 rows made to have the statistics of 3 batch normalizations (20 steps, loss")
    assert described.endswith("1 held out")
    assert result.report.calibration.batches[0]["image"].shape == (2, 3, 12, 12)
    assert ("making inputs", 20, 20) in ticks.seen
    assert result.report.verification.sqnr_db > 20


def _brief(init):
    def fewer(self, *args, **options):
        init(self, *args, **{"steps": 20, **options})

    return fewer


@pytest.mark.torch
def test_a_batch_of_fixed_size_is_one_sample(monkeypatch):
    from qcompiler.synthetic import zeroq

    monkeypatch.setattr(zeroq.Settings, "__init__", _brief(zeroq.Settings.__init__))
    data = data_of(network(pictures(64), batch=3), samples=2)
    assert [feeds["image"].shape for feeds in data.batches] == [(3, 3, 12, 12)] * 2


@pytest.mark.torch
def test_the_shape_of_what_is_dynamic_is_that_of_random_rows(monkeypatch):
    from qcompiler.synthetic import zeroq

    monkeypatch.setattr(zeroq.Settings, "__init__", _brief(zeroq.Settings.__init__))
    model = network(pictures(64))
    model.graph.inputs[0].shape = ir.Shape(("B", 3, "H", "W"))
    assert data_of(model, samples=1).batches[0]["image"].shape == (1, 3, 64, 64)


def refused(model, match, **options):
    with pytest.raises(CalibrationError, match=match):
        data_of(model, **options)


def test_what_keeps_nothing_of_its_data_is_refused():
    refused(linear_model(), r"BatchNormalization nodes, whose statistics .* this model has none .*--calibration")


def test_several_inputs_are_refused():
    text = "g (float[B,8] x, float[B,8] y) => (float[B,4] z) { s = Add(x, y) z = MatMul(s, w) }"
    refused(parse(text, {"w": normal((8, 4), 0)}), r"inputs are 'x' \(float32\), 'y' \(float32\)")


def test_a_model_that_looks_ahead_writes_no_text():
    refused(decoder(layers=1), "hangs on the tokens behind it")


def test_a_model_without_logits_writes_no_text():
    text = "g (int64[B,S] input_ids) => (float[B,S,32] hidden) { hidden = Gather(table, input_ids) }"
    refused(parse(text, {"table": normal((VOCABULARY, 32), 0)}), "an output with logits.*'hidden'")


def test_without_torch_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("qcompiler.extras.find_spec", lambda name: None)
    text = """g (float[B,3,8,8] x) => (float[B,4,8,8] y) {
        c = Conv <pads = [1, 1, 1, 1]> (x, w) y = BatchNormalization(c, s, s, s, s) }"""
    model = parse(text, {"w": normal((4, 3, 3, 3), 0), "s": np.ones(4, np.float32)})
    with pytest.raises(PassError, match=r"needs the package torch.*--calibration"):
        data_of(model)


def test_a_file_of_that_name_is_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "synthetic").write_text("text")
    monkeypatch.chdir(tmp_path)
    refused(language_model(), "a file called so too")
