import json
import sys
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from benchmarks import budgets, encoder_weights, techniques
from benchmarks.peers import four_bits, gptq
from benchmarks.rows import collect, markdown
from benchmarks.zoo import minilm
from qcompiler import pipeline
from qcompiler.config import CompileConfig
from qcompiler.driver import compile_model
from qcompiler.passes.base import PassContext
from tests.builders import linear_model, normal, serialized
from tests.stored_models import make_model, value, weight, write

# --- rows -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    label: str
    figure: float


JOBS = [(name, lambda name=name: Row(name, len(name) / 4)) for name in ("rtn", "awq, rtn", "gptq")]


def test_rows_are_chosen_by_name_and_saved_one_by_one(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    assert collect(JOBS, "rtn", file) == [Row("rtn", 0.75), Row("awq, rtn", 2.0)]
    assert collect(JOBS, "gptq", file) == [Row("gptq", 1.0)]
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert lines == [
        {"label": "rtn", "figure": 0.75},
        {"label": "awq, rtn", "figure": 2.0},
        {"label": "gptq", "figure": 1.0},
    ]
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 3


def test_a_text_that_no_row_holds_is_an_error_that_names_the_rows():
    with pytest.raises(SystemExit, match="--only 'obq': no row is called so; rows: rtn; awq, rtn; gptq"):
        collect(JOBS, "obq", None)


def test_figures_are_aligned_to_the_right():
    assert markdown(["way", "KL"], [["rtn", "0.38"], ["gptq", "0.11"]], 1).splitlines() == [
        "| way | KL |",
        "|---|---:|",
        "| rtn | 0.38 |",
        "| gptq | 0.11 |",
    ]


# --- peers ----------------------------------------------------------------------------------------


def scoped(name, inputs, output, module):
    """A MatMul as torch exports that of a module."""
    node = helper.make_node("MatMul", inputs, [output], name=name)
    scopes = ["", "model", module, name]
    node.metadata_props.append(onnx.StringStringEntryProto(key="pkg.torch.onnx.name_scopes", value=str(scopes)))
    return node


def two_layers(folder):
    nodes = [scoped("a", ["x", "w"], "h", "model.model.up"), scoped("b", ["h", "v"], "y", "model.lm_head")]
    weights = [weight("w", (8, 6), 0), weight("v", (6, 4), 1)]
    return write(make_model(nodes, [value("x", (2, 8))], [value("y", (2, 4))], weights), folder / "model.onnx")


def test_a_peers_weights_take_the_place_of_the_float_ones(tmp_path):
    (tmp_path / "onnx").mkdir()
    source = two_layers(tmp_path / "onnx")
    np.savez(tmp_path / "peer.npz", **{"model.up": normal((6, 8), 2)})  # [N, K], as torch stores it
    out = gptq.with_weights(tmp_path, tmp_path / "peer.npz")
    assert out == tmp_path / "peer.onnx"
    x = normal((2, 8), 3)
    head = onnx.numpy_helper.to_array(onnx.load(source).graph.initializer[1])
    (found,) = ort.InferenceSession(out, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    np.testing.assert_allclose(found, x @ normal((6, 8), 2).T @ head, rtol=1e-5, atol=1e-6)


def test_a_peers_weight_that_the_model_lacks_is_not_dropped(tmp_path):
    (tmp_path / "onnx").mkdir()
    two_layers(tmp_path / "onnx")
    np.savez(tmp_path / "peer.npz", **{"model.down": normal((6, 8), 2)})
    with pytest.raises(AssertionError, match=r"no site is called model\.down"):
        gptq.with_weights(tmp_path, tmp_path / "peer.npz")


@pytest.mark.parametrize("kind", ["sym", "asym", "k_quant"])
def test_onnx_runtime_quantizes_all_layers_but_one_that_ends_the_graph(kind, tmp_path):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], name="a")]
    nodes.append(helper.make_node("MatMul", ["h", "v"], ["y"], name="b"))
    weights = [weight("w", (128, 64), 0), weight("v", (64, 32), 1)]
    source = make_model(nodes, [value("x", (2, 128))], [value("y", (2, 32))], weights)
    cost, out = gptq.ort(write(source, tmp_path / "model.onnx"), tmp_path, kind)
    found = onnx.load(out).graph.node
    assert [node.op_type for node in found] == ["MatMulNBits", "MatMul"]
    figures = {attribute.name: attribute.i for attribute in found[0].attribute}
    assert (figures["bits"], figures["block_size"], figures["K"], figures["N"]) == (4, 64, 128, 64)
    assert (len(found[0].input) > 3) == (kind != "sym")  # zero points
    assert cost.seconds > 0


def test_our_best_is_compared_with_auto_round_of_the_same_kind():
    def row(tool, kind, kl, seconds):
        return four_bits.Result(tool, kind, kl, 0.8, seconds, 900.0)

    rows = [row("auto-round", "sym", 0.08, 2000.0), row("ours, best", "sym", 0.06, 500.0)]
    rows += [row("ours, balanced", "asym", 0.1, 100.0), row("auto-round", "asym", 0.07, 2000.0)]
    assert four_bits.ratios(rows) == {"sym": {"kl_ratio": 0.75, "time_ratio": 0.25}}
    assert four_bits.ratios(rows[1:]) == {}
    assert four_bits.table(rows).splitlines()[2] == "| auto-round | sym | 0.0800 | 0.800 | 2000 | 900 |"


def test_each_tool_runs_with_the_same_rows(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(four_bits, "run", lambda command, log: ran.append([str(part) for part in command]))
    monkeypatch.setattr(four_bits, "environment", lambda name: f"python of {name}")
    monkeypatch.setattr(four_bits, "with_weights", lambda bench, weights: weights)
    four_bits.ours(tmp_path, tmp_path, "sym", 16, "best")
    four_bits.auto_round(tmp_path, tmp_path, "asym", 16, 50)
    ours, theirs = ran
    assert ours[0] == sys.executable
    assert ours[ours.index("--samples") + 1] == "16"
    assert ours[ours.index("--scheme") + 1] == "w4a16-g64-sym"
    assert ours[ours.index("--calibration") + 1] == theirs[3] == str(tmp_path / "brown_train.npy")
    assert [ours[ours.index(end) + 1] for end in ("--embedding", "--lm-head")] == ["float", "float"]
    assert theirs[0] == "python of auto-round"
    assert theirs[4:8] == ["16", "64", "asym", "50"]


# --- techniques -----------------------------------------------------------------------------------


@pytest.mark.parametrize("technique", techniques.TECHNIQUES, ids=lambda technique: technique.algorithm)
def test_techniques_are_algorithms_with_options_that_exist(technique):
    named = pipeline.parse(technique.algorithm)
    config = CompileConfig(algorithms=tuple(f"{name}{{{_options(given)}}}" for name, given in named))
    built = {step.name: step for step in pipeline.build(config, PassContext(config))}
    for name, given in named:
        options = {option: str(getattr(built[name].options, option)).lower() for option in given}
        assert {option: text.removesuffix(".0") for option, text in options.items()} == given


def _options(given):
    return ",".join(f"{option}={text}" for option, text in given.items())


def test_no_technique_is_there_twice():
    for field in ("label", "algorithm"):
        found = [getattr(technique, field) for technique in techniques.TECHNIQUES]
        assert len(set(found)) == len(found)


# --- the encoder ----------------------------------------------------------------------------------


def test_an_encoders_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(minilm, "exported_minilm", lambda: tmp_path / "model.onnx")
    rows = [name for name, _ in encoder_weights.ways(tmp_path, ["gptq{percdamp=0.1}"])]
    assert {encoder_weights.BEST, *encoder_weights.BESIDE} <= set(rows)
    assert "technique gptq,learned_rounding" in rows
    assert rows[-1] == "technique gptq{percdamp=0.1}"
    assert not [name for name in rows if "distill" in name]  # there are no answers to distil from
    assert len(set(rows)) == len(rows)


def test_the_error_of_embeddings_is_measured(tmp_path, monkeypatch):
    model = tmp_path / "model.onnx"
    model.write_bytes(bytes(2000))
    turned = np.array([[0.6, 0.8], [1, 0]], np.float32)
    embeddings = np.array([[1, 0], [1, 0]], np.float32), turned
    monkeypatch.setattr(minilm, "compared_embeddings", lambda path: embeddings)
    monkeypatch.setattr(minilm, "retrieval_accuracy", lambda path: 0.5)
    cost = encoder_weights.Cost(2.0, 300.0)
    found = encoder_weights.measure("effort best", lambda: (cost, model))
    assert found.error == pytest.approx(0.2)
    assert found.worst == pytest.approx(0.4)
    assert found.sqnr_db == pytest.approx(10 * np.log10(2 / (0.4**2 + 0.8**2)))
    assert (found.retrieval, found.mb, found.seconds, found.peak_mb) == (0.5, 0.002, 2.0, 300.0)
    line = encoder_weights.table([found]).splitlines()[2]
    assert line == "| effort best | 0.20000 | 0.4000 | 3.98 | 0.500 | 0.0 | 2 | 300 |"


def test_our_best_is_compared_with_rounding_to_nearest_and_k_quant():
    def row(way, error):
        return encoder_weights.Result(way, error, 0.1, 20.0, 0.9, 14.0, 1.0, 100.0)

    rows = [row("effort fast", 0.004), row("onnxruntime k_quant", 0.003), row("effort best", 0.0015)]
    assert encoder_weights.ratios(rows) == {"effort fast": 0.375, "onnxruntime k_quant": 0.5}
    assert encoder_weights.ratios(rows[:2]) == {}


# --- budgets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["w4a16-g64-asym", "w3a16-g64-asym", "w4a16-g64-lut", "w2a16-g32-vq2"])
def test_bits_are_counted_in_every_operator(tmp_path, scheme):
    """72 columns are two groups of 64 of which the second is filled up."""
    source, output = tmp_path / "model.onnx", tmp_path / "out.onnx"
    source.write_bytes(serialized(linear_model(72, 96)))
    compile_model(source, scheme, custom_ops="always", output=output, verify=False)
    graph = onnx.load(output).graph
    (node,) = graph.node
    kept = {tensor.name: tensor for tensor in graph.initializer}
    own = [kept[name] for name in node.input[1:] if name and not name.endswith("_bias")]
    stored = sum(numpy_helper.to_array(tensor).nbytes for tensor in own)
    assert budgets.linear_bits(source, output) == pytest.approx(8 * stored / (72 * 96))
