"""Exporters' traces are dropped where a size is asked for; names stay."""

from qcompiler.config import CompileConfig
from qcompiler.passes import load
from qcompiler.sites import find_sites
from tests.builders import apply, linear_model, serialized

SCOPES = "pkg.torch.onnx.name_scopes"


def traced():
    model = linear_model()
    for node in model.graph:
        node.metadata_props.update(
            {"pkg.torch.onnx.stack_trace": "File x.py\n" * 50, "namespace": "a/b", "mine": "kept"}
        )
        node.metadata_props[SCOPES] = "['', 'layers.0.fc', 'linear']"
    return model


def test_traces_go_and_names_stay():
    model = traced()
    before = len(serialized(model))
    result = apply("drop_traces", model)
    assert result.modified
    assert [record.reason.endswith("dropped, which count for --max-size") for record in result.records] == [True]
    assert before - len(serialized(model)) > 500
    assert set(model.graph[0].metadata_props) == {"mine", SCOPES}
    assert find_sites(model)[0][0].name == "layers.0.fc"


def test_nothing_to_drop():
    result = apply("drop_traces", linear_model())
    assert not result.modified
    assert not result.records


def test_it_applies_where_a_size_is_asked_for():
    kind = load("drop_traces")
    assert kind.applies(CompileConfig(max_size=10**6))
    assert not kind.applies(CompileConfig())
    assert not kind.applies(CompileConfig(bits_per_weight=3.5))
