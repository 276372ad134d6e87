"""What normalizations tell of activations is so where channels are unrelated; `--calibration norms`."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from qcompiler import compile_model
from qcompiler.cli import qcompile
from qcompiler.errors import CalibrationError, SchemeError
from qcompiler.norm_prior import norm_priors
from qcompiler.sites import find_sites
from tests.builders import context, decoder, normal, parse, quantized, run, serialized, with_outputs
from tests.test_foldings import HEAD, NORMS, K, N, linear_readers, weights


def priors(model):
    return norm_priors(model, find_sites(model)[0])


@pytest.mark.parametrize("name", NORMS)
def test_it_is_what_unrelated_channels_have(name):
    model = NORMS[name]()
    found = priors(model)
    assert {site.name for site in found} == {"a", "b"}
    prior = next(iter(found.values())).hessian
    x = normal((40, 500, K), 7)
    if name == "SkipLayerNormalization":  # adds a bias before it normalizes, and x twice
        x -= normal(K, 9) / 2
    (n,) = run(with_outputs(model, ["n"]), {"x": x})[-1:]
    rows = n.reshape(-1, K).astype(np.float64)
    measured = rows.T @ rows / len(rows)
    # What is normalized has one degree of freedom less, or two: channels are related by 1 / K.
    assert np.abs(prior - measured).max() < 0.15 * np.abs(measured).max()
    assert np.allclose(np.diagonal(prior), np.diagonal(measured), rtol=0.1)


OTHERS = {
    "a gain of what is not normalized": "n = Mul(x, gamma)",
    "a nonlinearity between": "m = LayerNormalization(x, gamma, beta) n = Relu(m)",
    "a product with what is computed": "m = LayerNormalization(x, gamma, beta) n = Mul(m, x)",
    "a sum with what is computed": "m = LayerNormalization(x, gamma, beta) n = Add(m, x)",
    "subtracted": "m = LayerNormalization(x, gamma, beta) n = Sub(beta, m)",
}


@pytest.mark.parametrize("name", OTHERS)
def test_nothing_is_known(name):
    used = ["wa", "wb", "gamma", *(["beta"] if "beta" in OTHERS[name] else [])]
    assert priors(parse(f"{HEAD} {{ {OTHERS[name]} {linear_readers()} }}", weights(*used))) == {}


def test_moves_carry_it():
    text = "m = LayerNormalization(x, gamma, beta) c = Cast <to = 1> (m) n = Reshape(c, flat) [a] y = MatMul(n, wa)"
    model = parse(
        f"g (float[B,S,{K}] x) => (float[T,{N}] y) {{ {text} }}",
        weights("gamma", "beta", "wa", flat=np.array([-1, K])),
    )
    (facts,) = priors(model).values()
    gamma, beta = weights("gamma", "beta").values()
    assert np.allclose(facts.hessian, np.diag(gamma.astype(float) ** 2) + np.outer(beta.astype(float), beta))


def error_of(algorithm, **options):
    """Squared error of both products behind a normalization of loud and quiet channels, on unrelated channels."""
    gains = np.exp(normal(K, 5, scale=1.5))
    model = parse(
        f"{HEAD} {{ [norm] n = LayerNormalization(x, gamma, beta) {linear_readers()} }}",
        {**weights("wa", "wb"), "gamma": gains, "beta": normal(K, 6, scale=2.0)},
    )
    original = {site.name: site.weight.const_value.numpy().copy() for site in find_sites(model)[0]}
    (n,) = run(with_outputs(model, ["n"]), {"x": normal((4, 500, K), 8)})[-1:]
    quantized(model, context(scheme="w3a16-g16", **options), algorithm)
    changes = [site.quantized.dequantized() - original[site.name].T for site in find_sites(model)[0]]
    return sum(float(np.square(n.reshape(-1, K) @ change.T).sum()) for change in changes)


def test_it_is_worth_something():
    assert error_of("gptq", calibration="norms") < 0.8 * error_of("rtn")


def saved(model, path):
    path.write_bytes(serialized(model))
    return path


@pytest.mark.parametrize("algorithm", ["", "gptq{guided=true}", "obq"])
def test_compiled_without_data(algorithm, tmp_path):
    path, options = saved(decoder(), tmp_path / "model.onnx"), {"threads": 1, "calibration": "norms"}
    if algorithm:
        options["algorithms"] = (algorithm,)
    result = compile_model(path, "w4a16-g32", output=tmp_path / "out.onnx", **options)
    recipe = json.loads(result.model.metadata_props["qcompiler.recipe"])
    assert recipe["calibration"] == "norms"
    reasons = {record.site: record.reason for record in result.report.sites if record.action == "quantized"}
    assert reasons["l0_down"].startswith("nothing known of its activation")
    compile_model(path, "w4a16-g32", output=tmp_path / "again.onnx", **options)
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()


def test_what_needs_data_says_so(tmp_path):
    path = saved(decoder(), tmp_path / "model.onnx")
    with pytest.raises(CalibrationError, match="give --calibration PATH"):
        compile_model(path, "w8a8", output=tmp_path / "out.onnx", calibration="norms")
    with pytest.raises(CalibrationError, match="awq needs calibration data"):
        compile_model(path, "w4a16", output=tmp_path / "out.onnx", calibration="norms", algorithms=("awq", "rtn"))
    with pytest.raises(SchemeError, match="best learns from data"):
        compile_model(path, "w4a16", output=tmp_path / "out.onnx", calibration="norms", effort="best")
    assert not (tmp_path / "out.onnx").exists()


def test_a_file_of_that_name_is_not_passed_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(decoder(), tmp_path / "model.onnx")
    (tmp_path / "norms").write_text("a text")
    result = CliRunner().invoke(
        qcompile, ["model.onnx", "-o", "out.onnx", "--scheme", "w4a16", "--calibration", "norms"]
    )
    assert result.exit_code != 0
    assert "there is a file called so too" in result.output
