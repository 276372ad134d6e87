"""The pass: what each method trains, that what is judged is what is written, checkpoints, and what is refused."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler import compile_model
from qcompiler.checkpoints import Checkpoints
from qcompiler.errors import CalibrationError, SchemeError
from qcompiler.scheme import Scheme
from qcompiler.scheme_plan import SchemePlan
from qcompiler.sites import find_sites
from tests.builders import apply, context, decoder, normal, parse, quantized, run, serialized, token_batches

pytestmark = pytest.mark.torch

STEPS = 40
CLASSES = 5


def network(activation="Relu(a)"):
    """Two convolutions and a classifier."""
    weights = {
        "w0": normal((8, 3, 3, 3), 0, scale=27**-0.5),
        "w1": normal((8, 8, 3, 3), 1, scale=72**-0.5),
        "m": normal((8, CLASSES), 2, scale=4.0),
        "b0": normal(8, 3, scale=0.2),
        "b1": normal(8, 4, scale=0.2),
        "c": normal(CLASSES, 5, scale=0.2),
    }
    body = (
        f"a = Conv <pads = [1, 1, 1, 1]>(x, w0, b0) r = {activation} b = Conv <pads = [1, 1, 1, 1]>(r, w1, b1) "
        "s = Relu(b) g = GlobalAveragePool(s) f = Flatten(g) y = Gemm(f, m, c)"
    )
    return parse(f"g (float[B,3,6,6] x) => (float[B,{CLASSES}] y) {{ {body} }}", weights, opset=18)


def images(count=10, rows=8, seed=50):
    return [{"x": normal((rows, 3, 6, 6), seed + at)} for at in range(count)]


def prepared(scheme, data, model=None, **options):
    """A model that is quantized and has Q/DQ pairs, and the context."""
    ctx = context(scheme=scheme, batches=data, **options)
    ctx.calibration.labels = None
    model = model or network()
    quantized(model, ctx)
    for name in ("raise_opset", "insert_qdq"):
        apply(name, model, ctx)
    return model, ctx


def trained(model, ctx, **options):
    """The records of training."""
    return apply(
        "tune", model, ctx, **{"steps": STEPS, "batch": 8, "rate": 0.02, "vector_rate": 0.002, **options}
    ).records


def losses(records):
    figures = next(record.metrics for record in records if "loss_after" in record.metrics)
    return figures["loss_before"], figures["loss_after"]


METHODS = [
    ("qat", "w3a3", "Tanh(a)"),
    ("lsq", "w2a2", "Relu(a)"),
    ("lsq", "w3a3", "Tanh(a)"),
    ("pact", "w2a2", "Relu(a)"),
    ("pact", "w2a2", "Tanh(a)"),
    ("twn", "w1.58a8-static", "Relu(a)"),
    ("ttq", "w8a8", "Relu(a)"),
    ("ttq", "w4a8-static", "Tanh(a)"),
    ("absmean", "w1.58a8-static", "Relu(a)"),
    ("binaryconnect", "w1.58a8-static", "Relu(a)"),
    ("binaryconnect-drawn", "w1.58a8-static", "Relu(a)"),
    ("bnn", "w1.58a1", "Tanh(a)"),
    ("xnor", "w1.58a1", "Tanh(a)"),
]


@pytest.mark.parametrize(("method", "scheme", "activation"), METHODS)
def test_every_method_lowers_the_loss_and_writes_what_it_judged(method, scheme, activation):
    """ONNX Runtime computes of the model what descent judged, to the last bits."""
    data = images()
    reference = network(activation)
    model, ctx = prepared(scheme, data, network(activation))
    before, after = losses(trained(model, ctx, method=method))
    assert after < (0.95 if method == "ttq" else 0.8) * before
    # The judged batches again, by ONNX Runtime and in double precision; the rows that were held out are unknown, so of
    # all batches the mean has to be close, and the model has to be better than the one that was not trained.
    untrained, _ = prepared(scheme, data, network(activation))
    if method != "ttq":  # three values are no match for the 8 bits that they are written in
        assert divergence(reference, model, data) < 0.8 * divergence(reference, untrained, data)


def divergence(reference, model, data):
    total = 0.0
    for feeds in data:
        p, q = (logits - np.log(np.exp(logits).sum(-1, keepdims=True))
                for logits in (run(each, feeds)[0].astype(np.float64) for each in (reference, model)))  # fmt: skip
        total += float((np.exp(p) * (p - q)).sum(-1).mean())
    return total / len(data)


@pytest.mark.parametrize(
    ("method", "scheme", "activation"),
    [*METHODS, ("lsq", "w8a8", "Relu(a)"), ("lsq", "w4a4-sym", "Tanh(a)"), ("pact", "w4a8-static", "Relu(a)")],
)
def test_the_model_computes_what_the_student_computes(method, scheme, activation):
    """Codes bit by bit, outputs to 1e-5: before and after the weights are spelled as codes."""
    import torch

    from qcompiler.tuning import LOSSES, METHODS, Adam, Example, Settings, Student, distill, put_back_all

    data = images(3)
    model, ctx = prepared(scheme, data, network(activation))
    sites = [site for site in find_sites(model)[0] if site.quantized is not None]
    student = Student.of(model, sites, [], METHODS[method], LOSSES["kl"], Adam, torch.float32, 0)
    targets = [student.answers(feeds) for feeds in data]
    np.testing.assert_allclose(targets[0]["y"], run(network(activation), data[0])[0], rtol=1e-5, atol=1e-5)
    examples = [Example(*each) for each in zip(data, targets, strict=True)]
    distill(student.stages, student.head, examples, examples, Settings(steps=12, rate=0.05, scale_rate=0.01))
    with torch.no_grad():
        (stage,) = student.stages
        values = {each.name: each.value() for each in stage.weights}
        expected = stage.graph.run({"x": torch.from_numpy(data[0]["x"])}, values)["y"].numpy()
    put_back_all(model, student.arrays(), sites, "tune")
    for site, weight in student.weights:
        assert np.array_equal(site.quantized.codes(), weight.codes)
        assert np.array_equal(site.quantized.numpy(), weight.value().numpy())
    np.testing.assert_allclose(run(model, data[0])[0], expected, rtol=1e-5, atol=1e-5)
    # The bias of an integer Gemm becomes codes in the scale of the product: half of that is all that may be lost.
    (gemm,) = (site for site in sites if site.node.op_type == "Gemm")
    product = gemm.quantized.scale.max() * np.abs(gemm.input.producer().inputs[1].const_value.numpy())
    for name in ("export_qdq", "cleanup"):
        apply(name, model, ctx)
    np.testing.assert_allclose(run(model, data[0])[0], expected, rtol=1e-5, atol=1e-5 + 0.5 * float(product))


def test_binary_methods_use_two_codes():
    for method in ("binaryconnect", "xnor"):
        model, ctx = prepared("w1.58a8-static", images())
        trained(model, ctx, method=method)
        for site in find_sites(model)[0]:
            assert set(np.unique(site.quantized.codes())) <= {1, 3}


def test_trained_ternary_weights_have_three_values_a_channel():
    model, ctx = prepared("w8a8", images())
    trained(model, ctx, method="ttq")
    for site in find_sites(model)[0]:
        for row in site.quantized.codes().astype(int) - 128:
            assert len(set(row) - {0}) <= 2
            assert max(abs(row)) == 127


def test_labels_are_learned():
    data = images(12)
    labels = np.concatenate([feeds["x"].mean((1, 2, 3)) > 0 for feeds in data]).astype(np.int64)
    model, ctx = prepared("w4a4", data)
    ctx.calibration.labels = labels
    records = trained(model, ctx, steps=80, rate=0.05, scale_rate=0.02)
    before, after = losses(records)
    assert after < 0.75 * before
    assert "nats" in records[0].reason


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_optimizers_and_schedules(optimizer, schedule):
    model, ctx = prepared("w2a2", images())
    rates = {"adamw": {"rate": 0.01}, "sgd": {"rate": 0.01, "scale_rate": 0.001, "vector_rate": 0.001, "decay": 0.001}}[
        optimizer
    ]
    before, after = losses(trained(model, ctx, optimizer=optimizer, schedule=schedule, accumulate=2, **rates))
    assert after < 0.9 * before


def test_a_language_model_learns_block_by_block():
    """The head stays as it is; its logits are what is judged."""
    data = token_batches(6, 4, 24, vocabulary=64, seed=3)
    plan = SchemePlan(Scheme.parse("w2a16-g16"), None, None)
    model, ctx = decoder(), context(plan=plan, batches=data)
    ctx.calibration.labels = None
    quantized(model, ctx, "gptq")
    records = apply("tune", model, ctx, steps=60, batch=2, rate=0.05).records
    before, after = losses(records)
    assert after < 0.8 * before
    next_token = apply("tune", model, ctx, steps=10, loss="next").records
    assert losses(next_token)[0] > 1  # nats a token, not a divergence


def test_the_best_look_is_kept():
    model, ctx = prepared("w4a4", images())
    wild = {"steps": 12, "rate": 0.2, "scale_rate": 0.05, "schedule": "constant"}
    watched = losses(trained(model, ctx, check=1, patience=0, **wild))
    model, ctx = prepared("w4a4", images())
    blind = losses(trained(model, ctx, **wild))
    assert watched[0] == blind[0]
    assert watched[1] < blind[1]


@pytest.mark.parametrize("scheme", ["w2a2", "w4a16-g16"])
def test_half_precision_learns_too(scheme):
    model, ctx = prepared(scheme, images())
    before, after = losses(trained(model, ctx, precision="bfloat16"))
    assert after < before


def test_what_does_not_help_is_not_kept():
    model, ctx = prepared("w8a8", images())
    before = serialized(model)
    records = trained(model, ctx, steps=3, rate=1.0, scale_rate=1.0, schedule="constant")
    assert {record.action for record in records} == {"skipped"}
    assert "did not lower the loss" in records[0].reason
    assert serialized(model) == before


@pytest.mark.parametrize("algorithm", ["gptq", "rtn"])
@pytest.mark.parametrize("method", ["qat", "lsq", "pact"])
@pytest.mark.parametrize("scheme", ["w2a2", "w3a8-static-sym"])
def test_training_begins_at_the_codes(method, algorithm, scheme):
    import torch

    from qcompiler.tuning import LOSSES, METHODS, Adam, Student

    data = [{"x": np.maximum(feeds["x"], 0)} for feeds in images(3)]  # correlated: GPTQ's codes are not the nearest
    model = network()
    ctx = context(scheme=scheme, batches=data)
    quantized(model, ctx, algorithm)
    for name in ("raise_opset", "insert_qdq"):
        apply(name, model, ctx)
    sites = [site for site in find_sites(model)[0] if site.quantized is not None]
    student = Student.of(model, sites, [], METHODS[method], LOSSES["kl"], Adam, torch.float32, 0)
    for site, weight in student.weights:
        assert np.array_equal(weight.codes, site.quantized.codes())
        assert np.array_equal(weight.value().numpy(), site.quantized.numpy())


@pytest.mark.parametrize("method", ["qat", "lsq"])
@pytest.mark.parametrize("scheme", ["w2a8-static-sym", "w3a16-g16-asym"])
def test_written_out_slopes_are_those_of_the_form(method, scheme):
    """For weights beyond the range of codes too, and scales of either sign."""
    import torch

    from qcompiler.tuning import LOSSES, METHODS, Adam, Student
    from qcompiler.tuning.learned import Learned

    model, _ = prepared(scheme, images(3))
    sites = [site for site in find_sites(model)[0] if site.quantized is not None]
    student = Student.of(model, sites, [], METHODS[method], LOSSES["kl"], Adam, torch.float32, 0)
    signs = set()
    for _, weight in student.weights:
        signs |= set(torch.sign(weight.first).flatten().tolist())
        weight.parameters["weight"].tensor.mul_(1.5)
        assert torch.equal(weight.open(), weight.form(weight._tensors(), training=True))
        slope = torch.from_numpy(normal(tuple(weight.value().shape), 9))
        found, expected = weight.slopes(slope.clone()), Learned.slopes(weight, slope)
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
    assert signs == ({-1.0, 1.0} if scheme.endswith("sym") and not scheme.endswith("asym") else {1.0})


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-static"])
def test_scales_are_absorbed_after_training(tmp_path, scheme):
    """What teaches runs without quantizers, so each has to decode what it encodes."""
    weights = {"w": normal((32, 32), 0, scale=0.2), "v": normal((32, 16), 1, scale=0.2), "s": np.float32(0.3)}
    body = "a = MatMul(x, w) b = Mul(a, s) r = Relu(b) y = MatMul(r, v)"
    path = tmp_path / "model.onnx"
    model = parse(f"g (float[B,32] x) => (float[B,16] y) {{ {body} }}", weights, opset=18)
    path.write_bytes(serialized(model))
    feeds = [{"x": normal((16, 32), seed)} for seed in range(8)]
    made = compile_model(
        path, scheme, calibration=feeds, output=tmp_path / "out.onnx", verify=False,
        algorithms=("rtn", "tune{method=qat,steps=1,rate=0,vector_rate=0,scale_rate=0,loss=mse,batch=16}"),
    )  # fmt: skip
    order = [row.name for row in made.report.passes]
    assert order.index("tune") < order.index("absorb_scales")
    (before,) = {record.metrics["loss_before"] for record in made.report.sites if "loss_before" in record.metrics}
    x = np.concatenate([each["x"] for each in feeds])
    exact, found = (run(each, {"x": x})[0] for each in (model, ir.load(tmp_path / "out.onnx")))
    expected = np.square(found - exact).mean() / np.square(exact).mean()
    assert before == pytest.approx(expected, rel=0.5)


class Stop(Exception):  # noqa: N818
    """Ends descent."""


RATES = {"rate": 0.005, "scale_rate": 0.01}


def run_of(folder, monkeypatch, stop=None, seed=0, method="lsq"):
    """Steps that were done, and the model's bytes; `stop` ends the run in that step."""
    from qcompiler.passes import tune
    from qcompiler.tuning import distillation

    monkeypatch.setattr(tune, "_SECONDS", 0.0)
    monkeypatch.setattr("qcompiler.checkpoints._SHARE", 0)
    done, descend = [], distillation._descend

    def counted(*arguments):
        if stop is not None and len(done) == stop:
            raise Stop
        done.append(1)
        return descend(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(distillation, "_descend", counted)
        scheme = "w1.58a8-static" if method.startswith("binary") else "w2a2"
        model, ctx = prepared(scheme, images(), seed=seed)
        store = None if folder is None else Checkpoints(folder)
        try:
            records = trained(model, replace(ctx, checkpoints=store), steps=6, method=method, check=2, **RATES)
        except Stop:
            return len(done), None
    assert any(record.action == "quantized" for record in records)
    return len(done), serialized(model)


@pytest.mark.parametrize("method", ["lsq", "pact", "binaryconnect-drawn"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch, method):
    count, expected = run_of(None, monkeypatch, method=method)
    assert count == 6
    assert run_of(None, monkeypatch, method=method)[1] == expected
    assert run_of(None, monkeypatch, method=method, seed=1)[1] != expected
    for stop in (1, 3, 5):
        folder = tmp_path / str(stop)
        assert run_of(folder, monkeypatch, stop, method=method) == (stop, None)
        assert run_of(folder, monkeypatch, method=method) == (6 - stop, expected)
        assert run_of(folder, monkeypatch, method=method) == (0, expected)


def test_minutes_become_a_number_of_steps():
    model, ctx = prepared("w4a4", images())
    trained(model, ctx, minutes=0.01)
    text = ctx.settled["tune"]
    assert "minutes" not in text
    steps = int(text.split("steps=")[1].split(",")[0].rstrip("}"))
    assert steps >= 1
    first = serialized(model)
    model, ctx = prepared("w4a4", images())
    trained(model, ctx, steps=steps)
    assert serialized(model) == first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "method=magic is unknown; choose one of qat, lsq"),
        ({"steps": 0}, "steps=0 has to be at least 1"),
        ({"rate": 2.0}, "rate=2 is not between 0 and 1"),
        ({"optimizer": "lion"}, "optimizer=lion is unknown; choose one of adamw, sgd"),
        ({"minutes": -1.0}, "minutes=-1 has to be positive"),
    ],
)
def test_what_means_nothing_is_refused(options, message):
    with pytest.raises(SchemeError, match=message):
        apply("tune", network(), context(scheme="w4a4", batches=images()), **options)


def test_data_that_does_not_do_is_refused():
    model, ctx = prepared("w4a4", images(2))
    with pytest.raises(CalibrationError, match="more than 2 batches of calibration data"):
        trained(model, ctx)
    with pytest.raises(CalibrationError, match="loss=labels needs labels"):
        trained(model, ctx, loss="labels")


def test_sites_that_are_not_trained_say_why():
    model, ctx = prepared("w4a4", images())
    records = apply("tune", model, ctx, method="xnor").records
    assert {record.action for record in records} == {"skipped"}
    assert all("give it a scheme w1.58" in record.reason for record in records)
