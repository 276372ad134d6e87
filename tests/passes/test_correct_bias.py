"""The mean error of each output channel on the calibration data is zero; ONNX Runtime runs both models."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.errors import CalibrationError
from qcompiler.graph import PASS_KEY
from qcompiler.passes import load
from qcompiler.sites import find_sites
from tests.builders import (
    Ticks,
    apply,
    context,
    decoder,
    normal,
    only,
    parse,
    quantized,
    run,
    serialized,
    site_named,
    text_of,
    token_batches,
    with_outputs,
)
from tests.test_convolution import CONVOLUTIONS

COARSE = "w2a16-g16-asym"  # an error of some size


def feeds_of(*shapes, dtype="float32"):
    """Batches whose channels have means of their own, so that errors have one too."""
    means = normal(shapes[0][1:2] + (1,) * (len(shapes[0]) - 2), 50)
    return [{"x": (normal(shape, 20 + i) + 2 * means).astype(dtype)} for i, shape in enumerate(shapes)]


def channel_means(model, batches, name="y", axis=-1):
    """The mean of a value over everything but its channels, and the root of its mean square."""
    source = with_outputs(model, [name]) if isinstance(model, ir.Model) else model
    rows = []
    for feeds in batches:
        values = np.moveaxis(run(source, feeds, outputs=[name])[0], axis, -1).astype(np.float64)
        rows.append(values.reshape(-1, values.shape[-1]))
    rows = np.concatenate(rows)
    return rows.mean(axis=0), np.sqrt((rows**2).mean())


def coarse(model, batches, scheme=COARSE, **options):
    """The context with which the model was quantized, ready for the pass."""
    ctx = context(scheme=scheme, batches=batches, **options)
    quantized(model, ctx)
    return ctx


LINEAR = {
    "matmul and add": ("h = MatMul(x, w) y = Add(h, b)", ["h = MatMul(x, w)", "y = Add(h, b)"]),
    "add from the left": ("h = MatMul(x, w) y = Add(b, h)", ["h = MatMul(x, w)", "y = Add(b, h)"]),
    "an add of one value": ("h = MatMul(x, w) y = Add(h, one)", ["h = MatMul(x, w)", "y = Add(h, one)"]),
    "gemm": ("y = Gemm(x, w, b)", ["y = Gemm(x, w, b)"]),
    "transposed gemm": ("y = Gemm <transB = 1> (x, t, b)", ["y = Gemm(x, t, b)"]),
    "gemm with a row": ("y = Gemm(x, w, row)", ["y = Gemm(x, w, row)"]),
    "gemm without bias": ("y = Gemm(x, w)", ["y = Gemm(x, w, w_bias)"]),
    "a transposed weight": (
        "v = Transpose(t) h = MatMul(x, v) y = Add(h, b)", ["v = Transpose(t)", "h = MatMul(x, v)", "y = Add(h, b)"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LINEAR)
def test_a_linear_layer_has_no_mean_error(case):
    text, after = LINEAR[case]
    weight = normal((32, 24), 1)
    constants = {"w": weight, "t": weight.T.copy(), "b": normal(24, 2), "row": normal((1, 24), 2)}
    constants["one"] = np.array([0.5], np.float32)
    used = {name: array for name, array in constants.items() if f"{name})" in text or f"{name}," in text}
    model = parse(f"g (float[B,32] x) => (float[B,24] y) {{ [fc] {text} }}".replace("[fc] v =", "v ="), used)
    batches = feeds_of((3, 32), (5, 32))
    want, size = channel_means(model, batches)
    ctx = coarse(model, batches)
    before = channel_means(model, batches)[0] - want
    result = apply("correct_bias", model, ctx)
    assert result.modified
    assert text_of(model) == after
    assert np.abs(before).max() > 1e-2 * size
    assert np.abs(channel_means(model, batches)[0] - want).max() < 1e-5 * size
    (record,) = result.records
    assert (record.action, record.spec, record.reason) == ("quantized", COARSE, "bias corrected")
    assert record.metrics["mean_error"] == pytest.approx(np.sqrt((before**2).mean()), rel=1e-4)
    plain = want - (0 if case == "gemm without bias" else used.get("b", used.get("row", used.get("one"))).reshape(-1))
    relative = np.linalg.norm(before) / np.linalg.norm(plain)
    assert record.metrics["relative_mean_error"] == pytest.approx(relative, rel=1e-4)
    again = apply("correct_bias", model, ctx)
    assert not again.modified
    assert again.records[0].reason == "bias not corrected: its float weight is gone, or it was corrected before"


def images(rank):
    sizes = (9, 7, 5)[: rank - 2]
    return feeds_of((2, 4, *sizes), (1, 4, *(size + 1 for size in sizes)))


def conv_model(attributes, shape, *, bias, kind="float"):
    dims = ",".join("BCHWD"[: len(shape)])
    text = f"g ({kind}[{dims}] x) => ({kind} y) {{ [conv] y = Conv {attributes} (x, w{', b' if bias else ''}) }}"
    dtype = "float16" if kind == "float16" else "float32"
    return parse(text, {"w": normal(shape, 1, dtype), **({"b": normal(shape[0], 2, dtype)} if bias else {})})


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_a_convolution_has_no_mean_error(case, bias):
    attributes, shape = CONVOLUTIONS[case]
    model = conv_model(attributes, shape, bias=bias)
    batches = images(len(shape))
    want, size = channel_means(model, batches, axis=1)
    ctx = coarse(model, batches, "w8a8-static", target="portable")
    before = np.abs(channel_means(model, batches, axis=1)[0] - want).max()
    result = apply("correct_bias", model, ctx)
    assert only(result, "quantized") == ["conv"]
    assert text_of(model) == [f"y = Conv(x, w, {'b' if bias else 'w_bias'})"]
    after = np.abs(channel_means(model, batches, axis=1)[0] - want).max()
    assert after < 1e-6 * size
    assert before > 10 * after


def test_padding_tokens_do_not_count():
    """The decoder has no biases, so they are inserted; their errors are averaged over real tokens alone."""
    model, batches = decoder(1), token_batches(3)
    ctx = coarse(model, batches)
    weight = site_named(model, "l0_q").quantized.meta["original"].numpy()
    result = apply("correct_bias", model, ctx, insert=True)
    assert only(result, "skipped") == []
    names = [site.name for site in find_sites(model)[0] if site.role != "embedding"]
    assert sorted(only(result, "quantized")) == sorted(names)
    site = site_named(model, "l0_q")
    x, q = site.input.name, site.node.outputs[0].consumers()[0].outputs[0].name
    source, errors = with_outputs(model, [x, q]), []
    for feeds in batches:
        read, made = run(source, feeds, outputs=[x, q])
        errors.append((made - read @ weight)[feeds["attention_mask"] == 1])
    assert np.abs(np.concatenate(errors).mean(axis=0)).max() < 1e-5


def test_without_insert_a_matmul_needs_an_add_of_its_own():
    reason = "bias not corrected: no constant Add is the only reader of its result; insert=true makes one"
    for text in (
        "y = MatMul(x, w)",
        "h = MatMul(x, w) y = Add(h, x)",
        "h = MatMul(x, w) i = Add(h, b) j = Relu(h) y = Add(i, j)",
        "h = MatMul(x, w) y = Mul(h, b)",
    ):
        weights = {"w": normal((32, 32), 1), "b": normal(32, 2)}
        model = parse(f"g (float[B,32] x) => (float[B,32] y) {{ [fc] {text} }}", weights)
        batches = feeds_of((3, 32), (5, 32))
        ctx = coarse(model, batches)
        before = text_of(model)
        result = apply("correct_bias", model, ctx)
        assert not result.modified
        assert text_of(model) == before
        (record,) = result.records
        assert (record.site, record.action, record.reason) == ("fc", "skipped", reason)


def test_an_inserted_bias_serves_all_readers():
    text = "g (float[B,32] x) => (float[B,32] y, float[B,32] z) { [fc] y = MatMul(x, w) z = Relu(y) }"
    model = parse(text, {"w": normal((32, 32), 1)})
    batches = feeds_of((3, 32), (5, 32))
    want, size = channel_means(model, batches)
    ctx = coarse(model, batches)
    apply("correct_bias", model, ctx, insert=True)
    assert text_of(model) == [
        "fc_Add_output = MatMul(x, w)",
        "y = Add(fc_Add_output, w_bias)",
        "z = Relu(y)",
    ]
    assert model.graph[1].metadata_props[PASS_KEY] == "correct_bias"
    assert [output.name for output in model.graph.outputs] == ["y", "z"]
    assert np.abs(channel_means(model, batches)[0] - want).max() < 1e-5 * size


def chain():
    text = """g (float[B,32] x) => (float[B,32] y) {
        [a] h = Gemm(x, u, b) i = Relu(h) [b] j = Gemm(i, v, b) k = Relu(j) [c] y = Gemm(k, w, b) }"""
    return parse(text, {**{name: normal((32, 32), i, scale=0.2) for i, name in enumerate("uvw")}, "b": normal(32, 9)})


def test_later_sites_are_measured_behind_quantized_ones_and_a_shared_bias_is_untied():
    batches = feeds_of((30, 32), (50, 32))
    worst = {}
    for rounds in (1, 3):
        model = chain()
        ctx = coarse(model, batches)
        errors = {s.name: s.quantized.meta["original"].numpy() - s.quantized.numpy() for s in find_sites(model)[0]}
        apply("correct_bias", model, ctx, rounds=rounds)
        assert text_of(model)[0] == "h = Gemm(x, u, b_a)"
        for site in find_sites(model)[0]:
            source = with_outputs(model, [site.input.name])
            x = np.concatenate([run(source, feeds, outputs=[site.input.name])[0] for feeds in batches])
            plain = (x @ errors[site.name]).mean(axis=0)
            error = plain + normal(32, 9) - site.node.inputs[2].const_value.numpy()
            worst[rounds, site.name] = np.abs(error).max()
            assert worst[rounds, site.name] < 0.5 * np.abs(plain).max()
    # After one round the first site is exact, after as many rounds as there are levels all of them are.
    assert worst[1, "a"] < 1e-5 < worst[1, "c"]
    assert max(worst[3, name] for name in "abc") < 1e-5


def test_the_weight_of_two_sites_is_corrected_for_each():
    text = """g (float[B,32] x) => (float[B,32] y) {
        [a] h = MatMul(x, w) i = Add(h, b) j = Relu(i) [b] k = MatMul(j, w) y = Add(k, b) }"""
    model = parse(text, {"w": normal((32, 32), 1), "b": normal(32, 2)})
    batches = feeds_of((3, 32), (5, 32))
    ctx = coarse(model, batches)
    result = apply("correct_bias", model, ctx)
    assert only(result, "quantized") == ["a", "b"]
    first, second = (model.graph.initializers[name].const_value.numpy() for name in ("b_a", "b"))
    assert np.abs(first - second).max() > 1e-2


def test_half_precision():
    batches = feeds_of((2, 4, 9, 7), (1, 4, 9, 7), dtype="float16")
    model = conv_model("<pads = [1, 1, 1, 1]>", (6, 4, 3, 3), bias=False, kind="float16")
    want, size = channel_means(model, batches, axis=1)
    ctx = coarse(model, batches, "w8a8-static", target="portable")
    assert apply("correct_bias", model, ctx).modified
    assert model.graph.initializers["w_bias"].dtype == ir.DataType.FLOAT16
    # The bias and each output are rounded to 11 bits.
    assert np.abs(channel_means(model, batches, axis=1)[0] - want).max() < 1e-3 * size


def test_a_computed_bias_a_lookup_and_a_body_are_skipped():
    text = """g (int64[B] i, bool p) => (float[B,64] y, float[B,64] z) {
        [embed] h = Gather(t, i) c = Relu(b) [fc] y = Gemm(h, w, c)
        z = If (p) <then_branch = yes () => (float[B,64] s) { [inner] s = Gemm(h, v, b) },
            else_branch = no () => (float[B,64] r) { r = Relu(h) }>
    }"""
    weights = {"t": normal((256, 64), 3), "w": normal((64, 64), 1), "v": normal((64, 64), 4), "b": normal(64, 2)}
    model = parse(text, weights)
    batches = [{"i": np.arange(5), "p": np.array(True)}]
    result = apply("correct_bias", model, coarse(model, batches))
    assert not result.modified
    assert {record.site: record.reason.removeprefix("bias not corrected: ") for record in result.records} == {
        "embed": "a lookup table has no bias",
        "fc": "its bias is computed",
        "inner": "inside the body of If, where nothing is measured",
    }


def test_a_weight_on_its_grid_needs_no_correction():
    weight = np.resize(np.arange(16, dtype=np.float32) - 8, (32, 32))
    model = parse("g (float[B,32] x) => (float[B,32] y) { [fc] y = Gemm(x, w) }", {"w": weight})
    result = apply("correct_bias", model, coarse(model, feeds_of((3, 32)), "w4a16-g16-asym"))
    assert not result.modified
    assert [record.reason for record in result.records] == ["bias not corrected: its mean output error is zero"]


def test_without_quantized_sites_nothing_is_measured():
    result = apply("correct_bias", conv_model("", (6, 4, 1, 1), bias=True), context())
    assert (result.modified, result.records) == (False, ())


def test_calibration_data_is_needed():
    model = parse("g (float[B,32] x) => (float[B,32] y) { [fc] y = Gemm(x, w) }", {"w": normal((32, 32), 1)})
    quantized(model, context())
    for ctx in (context(), context(batches=[])):
        with pytest.raises(CalibrationError, match="correct_bias needs calibration data; give --calibration PATH"):
            apply("correct_bias", model, ctx)


def test_threads_change_no_byte_and_progress_is_told():
    results = []
    for threads in (1, 3):
        model, ticks = chain(), Ticks()
        batches = feeds_of((3, 32), (5, 32), (4, 32), (2, 32))
        ctx = coarse(model, batches, threads=threads, progress_to=ticks)
        apply("correct_bias", model, ctx)
        results.append(serialized(model))
        assert ticks.seen[-1] == ("correct_bias", 4, 4)
    assert results[0] == results[1]


def test_its_options():
    kind = load("correct_bias")
    assert str(kind(context(), {"insert": "true", "rounds": "2"})) == "correct_bias{insert=True,rounds=2}"
    assert not kind.applies(context(scheme="w8a8").config)
