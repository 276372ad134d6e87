"""Made again from its recipe a model has the same bytes; where that cannot be, the error says why."""

import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from qcompiler import compile_model
from qcompiler.cli import main
from qcompiler.config import CompileConfig
from qcompiler.errors import CalibrationError, ModelError, SchemeError
from qcompiler.reproducing import reproduce
from qcompiler.scheme import Scheme
from qcompiler.scheme_plan import Pattern, SchemePlan
from tests.builders import decoder, serialized

CONFIGS = [
    CompileConfig(),
    CompileConfig(plan=SchemePlan(Scheme.parse("w8a8-dynamic"), None, None), float16=True, seed=3),
    CompileConfig(
        plan=SchemePlan(
            Scheme.parse("w4a16-g32-sym"),
            overrides=((Pattern("re:a=b"), Scheme.parse("w8a16")), (Pattern("x"), None)),
            ignore=(Pattern("y"),),
            only=(Pattern("re:z"),),
        ),
        algorithms=("awq", "gptq{drift=0.5}"),
        output_format="qdq",
        max_size=10**6,
        custom_ops="never",
        calibration="synthetic",
    ),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_recipe_says_it_all(config):
    recipe = json.loads(json.dumps(config.recipe()))
    assert CompileConfig.from_recipe(recipe).recipe() == config.recipe()


@pytest.mark.parametrize("recipe", [{"scheme": "w4a16", "magic": 1}, {"scheme": "w5a16"}])
def test_other_recipes_are_refused(recipe):
    with pytest.raises(SchemeError):
        CompileConfig.from_recipe(recipe)


@pytest.fixture
def made(tmp_path):
    """A float model, its data and what was made of both."""
    source, data, out = tmp_path / "in.onnx", tmp_path / "rows.npy", tmp_path / "out" / "m.onnx"
    onnx.save(serialized(decoder()), source)
    np.save(data, np.random.default_rng(0).integers(1, 512, (8, 16)))
    out.parent.mkdir()
    return source, data, out


@pytest.mark.parametrize("options", [{}, {"scheme": "w4a16-g16", "effort": "best"}, {"scheme": "w8a8"}])
def test_the_bytes_come_out_again(made, options):
    source, data, out = made
    scheme = options.pop("scheme", "w4a16-g16-asym")
    compile_model(source, scheme, calibration=data, output=out, verify=False, **options)
    found = reproduce(out, source, calibration=data, threads=1)
    assert found[0] == ("m.onnx", out.stat().st_size)


def test_data_files_are_compared_too(made):
    source, data, out = made
    proto = onnx.load(source)
    onnx.save(proto, source, save_as_external_data=True, location="in.data", size_threshold=0)
    compile_model(source, "w4a16-g16-asym", calibration=data, output=out, verify=False)
    found = reproduce(out, source, calibration=data)
    assert {name for name, _ in found} == {path.name for path in out.parent.iterdir() if "report" not in path.name}
    assert len(found) > 1
    weights = out.parent / found[1][0]
    stored = bytearray(weights.read_bytes())
    stored[-1] ^= 1
    weights.write_bytes(stored)
    with pytest.raises(ModelError, match=f"byte {len(stored) - 1} is another"):
        reproduce(out, source, calibration=data)


def test_other_data_are_noticed(made, tmp_path):
    source, data, out = made
    compile_model(source, "w4a16-g16-asym", calibration=data, output=out, verify=False)
    with pytest.raises(CalibrationError, match="--calibration"):
        reproduce(out, source)
    other = tmp_path / "other.npy"
    np.save(other, np.load(data)[::-1])
    with pytest.raises(CalibrationError, match="other data"):
        reproduce(out, source, calibration=other)


def test_the_command_says_what_it_found(made):
    source, data, out = made
    compile_model(source, "w4a16-g16-asym", calibration=data, output=out, verify=False)
    arguments = ["reproduce", str(out), str(source), "--calibration", str(data), "-q"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0
    assert f"{out.stat().st_size:,} bytes, all of them equal" in done.stdout
    for target, message in ((source, "no recipe"), (out, "is another")):
        if target is out:
            model = onnx.load(out)
            model.graph.doc_string = "x"  # as many bytes would be luck
            onnx.save(model, out)
        done = CliRunner().invoke(main, ["reproduce", str(target), *arguments[2:]])
        assert done.exit_code == 1
        assert message in done.stderr or "bytes, made again" in done.stderr


def test_a_recipe_that_is_none_is_refused(made):
    source, data, out = made
    compile_model(source, "w4a16-g16-asym", calibration=data, output=out, verify=False)
    for text in ("[]", "{}", "{", '{"scheme": 7}'):
        model = onnx.load(out)
        for prop in model.metadata_props:
            if prop.key == "qcompiler.recipe":
                prop.value = text
        onnx.save(model, out)
        with pytest.raises(ModelError, match="is not understood"):
            reproduce(out, source, calibration=data)
