"""Low-rank factors beside quantized weights: what they compute, where they go, and that nothing gets worse."""

import numpy as np
import onnx
import pytest

from qcompiler import pipeline
from qcompiler.config import CompileConfig
from qcompiler.driver import compile_model
from qcompiler.errors import CalibrationError, SchemeError
from qcompiler.files.saver import save_model
from qcompiler.graph import constant_array, original_weight, read_weight, weight_error
from qcompiler.passes import load
from qcompiler.planning import plan_model
from qcompiler.propagation import propagate
from qcompiler.scheme import Scheme
from qcompiler.scheme_plan import Pattern, SchemePlan
from qcompiler.sites import find_sites
from tests.builders import (
    apply,
    context,
    decoder,
    decoder_groups,
    linear_model,
    normal,
    only,
    parse,
    quantized,
    run,
    serialized,
    site_named,
    text_of,
    the_site,
    token_batches,
    values_of,
)

K, N = 48, 24
W4 = "w4a16-g16-asym"
PLAN = SchemePlan(Scheme.parse(W4), None, Scheme.parse(W4))


def batches(shape=(40, K), count=3, seed=0, dtype="float32"):
    """Correlated rows of which some channels are loud; channels run along the last axis."""
    mixing = normal((shape[-1], shape[-1]), 77, scale=shape[-1] ** -0.5)
    mixing[:, ::6] *= 5
    return [{"x": (normal(shape, seed + i) @ mixing).astype(dtype)} for i in range(count)]


def images(shape=(2, 5, 4, K), **options):
    """The same with channels along axis 1."""
    return [{"x": np.moveaxis(feeds["x"], -1, 1).copy()} for feeds in batches(shape, **options)]


def initializers(model, *names):
    return [constant_array(model.graph.initializers[name]).astype(np.float32) for name in names]


def compensated(model, data, ctx=None, algorithm="rtn", **options):
    """The model with its sites quantized and factors beside them, and the records of the latter."""
    ctx = ctx or context(scheme=W4, batches=data)
    return apply("low_rank", quantized(model, ctx, algorithm), ctx, **options).records


# Operator, axis of the channels, graph and stored weight: every way to write a linear layer down.
WEIGHT = normal((N, K), 3, scale=0.2)
FORMS = {
    "MatMul": (f"(float[B,{K}] x) => (float[B,{N}] y) {{ [fc] y = MatMul(x, w) }}", WEIGHT.T),
    "MatMul and bias": (f"(float[B,{K}] x) => (float[B,{N}] y) {{ [fc] h = MatMul(x, w) y = Add(b, h) }}", WEIGHT.T),
    "MatMul of a Transpose": (
        f"(float[B,{K}] x) => (float[B,{N}] y) {{ t = Transpose <perm = [1, 0]> (w) [fc] y = MatMul(x, t) }}",
        WEIGHT,
    ),
    "MatMul of one matrix": (f"(float[B,S,{K}] x) => (float[B,S,{N}] y) {{ [fc] y = MatMul(x, w) }}", WEIGHT.T[None]),
    "Gemm": (f"(float[B,{K}] x) => (float[B,{N}] y) {{ [fc] y = Gemm <transB = 1> (x, w, b) }}", WEIGHT),
    "Gemm, turned": (f"(float[B,{K}] x) => (float[B,{N}] y) {{ [fc] y = Gemm(x, w) }}", WEIGHT.T),
    "Conv": (f"(float[B,{K},P] x) => (float[B,{N},P] y) {{ [fc] y = Conv(x, w, b) }}", WEIGHT[..., None]),
    "Conv of pictures": (
        f"(float[B,{K},H,W] x) => (float[B,{N},H,W] y) {{ [fc] y = Conv(x, w) }}",
        WEIGHT[..., None, None],
    ),
}


def form(name):
    """A model of one linear layer, and data for it."""
    text, weight = FORMS[name]
    constants = {"w": np.ascontiguousarray(weight)} | ({"b": normal(N, 4)} if "b)" in text or "(b" in text else {})
    rank = {"Conv": 3, "Conv of pictures": 4, "MatMul of one matrix": 3}.get(name, 2)
    shape = {2: (40, K), 3: (2, 9, K), 4: (2, 5, 4, K)}[rank]
    return parse(f"g {text}", constants), (images if name.startswith("Conv") else batches)(shape)


@pytest.mark.parametrize("name", FORMS)
def test_the_layer_computes_q_x_and_b_a_x(name):
    model, data = form(name)
    (record,) = compensated(model, data, rank=3)
    assert (record.action, record.reason) == ("quantized", "factors of rank 3")
    site = site_named(model, "fc")
    outer, inner = site.quantized.meta["factors"][site.node]
    assert (outer.shape, inner.shape) == ((N, 3), (3, K))
    reference, _ = form(name)
    weight = reference.graph.initializers["w"]
    layout = np.swapaxes if site.layout.endswith("KN") else lambda array, *axes: array
    changed = layout((read_weight(site) + outer @ inner), 0, 1).reshape(weight.shape.numpy())
    constants = {key: constant_array(value) for key, value in reference.graph.initializers.items()}
    (wanted,) = run(parse(f"g {FORMS[name][0]}", constants | {"w": np.ascontiguousarray(changed)}), data[0])
    (got,) = run(model, data[0])
    assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("name", FORMS)
def test_of_full_rank_the_float_model_is_back(name):
    model, data = form(name)
    (wanted,) = run(model, data[0])
    (record,) = compensated(model, data, rank=N)
    (got,) = run(model, data[0])
    assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert record.metrics["relative_loss"] < 1e-10
    assert record.metrics["sqnr_db"] > 100


def test_of_full_rank_a_decoder_is_the_float_model():
    model, data = decoder(), token_batches(3)
    (wanted,) = run(model, data[0])
    ctx = context(plan=PLAN, batches=data)
    compensated(model, data, ctx, "gptq", rank=512, sites="re:.")
    (got,) = run(model, data[0])
    assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_nodes_have_names_that_say_what_they_are():
    model = linear_model(K, N, bias=True)
    compensated(model, batches(), rank=2)
    assert text_of(model) == [
        "fc_low_rank_A_output = MatMul(x, w_low_rank_A)",
        "fc_low_rank_B_output = MatMul(fc_low_rank_A_output, w_low_rank_B)",
        "h_before_low_rank = MatMul(x, w)",
        "y_before_Add = Add(h_before_low_rank, b)",
        "y = Add(y_before_Add, fc_low_rank_B_output)",
    ]
    assert [node.name for node in model.graph] == ["fc_low_rank_A", "fc_low_rank_B", "fc", "add", "fc_low_rank_add"]
    assert {node.metadata_props.get("qcompiler.pass") for node in model.graph} == {"low_rank", "rtn", None}
    inner, outer = initializers(model, "w_low_rank_A", "w_low_rank_B")
    assert (inner.shape, outer.shape) == ((K, 2), (2, N))


def test_a_bias_that_is_added_only_much_later_stays_behind_the_factors():
    """It is computed at a later level than the product, where the activation is gone."""
    text = f"""g (float[B,{K}] x) => (float[B,{N}] y) {{ [a] h = MatMul(x, wa) [b] s = MatMul(x, wb) sb = Add(s, bias)
        [c] t = MatMul(h, wc) z = Add(t, sb) [d] y = MatMul(z, wd) }}"""
    weights = {name: normal((K, K), seed, scale=0.2) for seed, name in enumerate(("wa", "wb", "wc"))}
    weights |= {"wd": normal((K, N), 5), "bias": normal(K, 6)}
    model, data = parse(text, weights), batches()
    (wanted,) = run(model, data[0])
    compensated(model, data, rank=K)
    (got,) = run(model, data[0])
    assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()
    nodes = text_of(model)
    assert "s = Add(s_before_Add, b_low_rank_B_output)" in nodes
    assert "sb = Add(s, bias)" in nodes


def by_decomposition(error, x, rank):
    """The least loss that factors leave, in float64: the singular values of E X^T that are left out, squared."""
    return float(np.square(np.linalg.svd(error.astype(np.float64) @ x.T, compute_uv=False)[rank:]).sum())


@pytest.mark.parametrize("algorithm", ["rtn", "gptq", "hqq"])
def test_each_site_is_left_with_the_least_loss_on_what_it_reads_in_the_end(algorithm):
    """That is, behind layers that are compensated themselves. Padding would not count."""
    model, data = decoder(), token_batches(4, padded=False)
    records = compensated(model, data, context(plan=PLAN, batches=data), algorithm, rank=3)
    assert [record.site for record in records] == [name for group in decoder_groups()[:-1] for name in group]
    for record in records:
        site = site_named(model, record.site)
        x = values_of(model, site.input.name, data)
        energy = np.square(x @ original_weight(site).T.astype(np.float64)).sum()
        error = original_weight(site) - read_weight(site)
        assert np.square(x @ weight_error(site).T).sum() == pytest.approx(record.metrics["loss"], rel=1e-3)
        assert record.metrics["loss"] == pytest.approx(by_decomposition(error, x, 3), rel=1e-3)
        assert record.metrics["relative_loss"] == pytest.approx(record.metrics["loss"] / energy, rel=1e-3)
        assert np.square(x @ error.T).sum() == pytest.approx(record.metrics["loss_without_factors"], rel=1e-3)
        assert record.metrics["loss"] < 0.9 * record.metrics["loss_without_factors"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("rank", [1, 5])
def test_the_loss_never_grows_however_factors_are_stored(dtype, rank):
    import ml_dtypes

    kind = {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)
    for seed in range(6):
        model, data = linear_model(K, N, dtype=dtype, seed=seed), batches(seed=seed, dtype="float32")
        data = [{"x": feeds["x"].astype(kind)} for feeds in data]
        if dtype == "bfloat16":  # what ONNX Runtime's CPU provider cannot run is measured by hand
            ctx = context(scheme=W4, batches=data)
            site = the_site(quantized(model, ctx))
            x = np.concatenate([feeds["x"].astype(np.float64) for feeds in data])
            record = _compensate_by_hand(load("low_rank")(ctx, {"rank": str(rank)}), model, site, x)
        else:
            (record,) = compensated(model, data, rank=rank)
        assert record.action == "quantized"
        assert record.metrics["loss"] < record.metrics["loss_without_factors"]


def _compensate_by_hand(step, model, site, x):
    from qcompiler.segments import Segment
    from qcompiler.statistics import LayerFacts

    record, insert = step._compensate(site, LayerFacts(x.T @ x, len(x)), [Segment([site], list(model.graph))])
    insert()
    return record


def test_bits_include_the_factors():
    before = quantized(linear_model(64, N), context(scheme=W4))
    (record,) = compensated(linear_model(64, N), batches((40, 64)), rank=4)
    stored = 8 * the_site(before).quantized.stored_bytes + 32 * 4 * (64 + N)
    assert record.metrics["bits_per_weight"] == pytest.approx(stored / (64 * N))


def test_what_is_to_be_compensated_can_be_named():
    for sites, wanted in {
        "l0_down": ["l0_down"],
        "l1_o|l0_down": ["l0_down", "l1_o"],
        "re:down|_o$": ["l0_o", "l0_down", "l1_o", "l1_down"],
        "head": ["head"],
    }.items():
        data = token_batches(2)
        records = compensated(decoder(), data, context(plan=PLAN, batches=data), sites=sites)
        assert [record.site for record in records if record.action == "quantized"] == wanted


def test_a_pattern_that_selects_nothing_quantized_is_an_error():
    data = token_batches(1)
    plan = SchemePlan(Scheme.parse(W4), None, Scheme.parse(W4), ignore=(Pattern("l0_q"),))
    ctx = context(plan=plan, batches=data)
    model = quantized(decoder(), ctx)
    for sites in ("re:downn", "l0_down|nothing", "l0_q"):
        with pytest.raises(SchemeError, match=f"'{sites.split('|')[-1]}' selects no site that is quantized; list"):
            apply("low_rank", model, ctx, sites=sites)


def test_what_gets_no_factors_is_recorded_with_the_reason():
    plan = SchemePlan(Scheme.parse(W4), Scheme.parse("w8a16-g32"), None)
    data = token_batches(2)
    model = quantized(decoder(), context(plan=plan, batches=data))
    (record,) = apply("low_rank", model, context(plan=plan), sites="embed").records
    assert (record.action, record.reason) == ("skipped", "no factors: a lookup table computes no product")
    text = f"""g (float[B,{K}] x, bool c) => (float[B,{N}] y) {{
        [if] y = If (c) <then_branch = then () => (float[B,{N}] t) {{ [inner] t = MatMul(x, w) }},
                         else_branch = other () => (float[B,{N}] e) {{ [else] e = MatMul(x, v) }}> }}"""
    model = quantized(parse(text, {"w": normal((K, N), 1), "v": normal((K, N), 2)}), context(scheme=W4))
    result = apply("low_rank", model, context(scheme=W4))
    assert {record.reason for record in result.records} == {
        "no factors: inside the body of if, where nothing is measured"
    }
    assert not result.modified
    ctx = context(scheme="w8a8-dynamic-token")
    (record,) = apply("low_rank", quantized(linear_model(K, N), ctx), ctx).records
    assert record.reason == "no factors: its activations are quantized, and factors would read the float ones"


def test_what_has_no_error_is_left_alone():
    codes = np.random.default_rng(1).integers(0, 16, (N, K)).astype(np.float32)
    codes[:, ::16], codes[:, 1::16] = 0, 15
    model = parse(f"g (float[B,{K}] x) => (float[B,{N}] y) {{ [fc] y = MatMul(x, w) }}", {"w": codes.T.copy()})
    ctx = context(scheme=W4, batches=batches())
    before = serialized(quantized(model, ctx))
    result = apply("low_rank", model, ctx)
    (record,) = result.records
    assert (record.action, record.reason) == ("skipped", "no factors: there is no error to make up for")
    assert not result.modified
    assert serialized(model) == before


def test_what_nothing_reaches_is_left_alone():
    """Activations that are zero have a loss of zero, whatever the weights."""
    (record,) = compensated(linear_model(K, N), [{"x": np.zeros((4, K), np.float32)}])
    assert (record.action, record.metrics["loss"]) == ("skipped", 0.0)


def test_sites_that_share_a_weight_have_factors_of_their_own():
    text = f"""g (float[B,{K}] x, float[B,{K}] z) => (float[B,{N}] y, float[B,{N}] u) {{
        [one] y = MatMul(x, w) [two] u = MatMul(z, w) }}"""
    data = [feeds | {"z": other["x"][:, ::-1].copy()} for feeds, other in zip(batches(), batches(seed=9), strict=True)]
    model, reference = (parse(text, {"w": normal((K, N), 1)}) for _ in range(2))
    records = compensated(model, data, rank=4)
    assert [record.site for record in records] == ["one", "two"]
    one, two = (site_named(model, name) for name in ("one", "two"))
    assert one.quantized is two.quantized
    for site, name, output in ((one, "x", "y"), (two, "z", "u")):
        x = np.concatenate([feeds[name] for feeds in data]).astype(np.float64)
        error = original_weight(site) - read_weight(site)
        assert np.square(x @ weight_error(site).T).sum() == pytest.approx(by_decomposition(error, x, 4), rel=1e-3)
        (got,), (wanted,) = (run(each, data[0], outputs=[output]) for each in (model, reference))
        x = data[0][name]
        assert np.square(got - wanted).sum() == pytest.approx(np.square(x @ weight_error(site).T).sum(), rel=1e-2)


def test_the_second_time_there_are_factors_already():
    ctx, model = context(scheme=W4, batches=batches()), linear_model(K, N)
    compensated(model, None, ctx, rank=2)
    before = serialized(model)
    result = apply("low_rank", model, ctx, rank=2)
    assert [(record.site, record.reason) for record in result.records] == [("fc", "no factors: it has some already")]
    assert not result.modified
    assert serialized(model) == before


def test_biases_are_corrected_for_what_is_left():
    """The mean output error is zero with factors as it is without."""
    model, data = linear_model(K, N, bias=True), [{"x": feeds["x"] + 2} for feeds in batches()]
    ctx = context(scheme="w2a16-g16-asym", batches=data)
    wanted = np.concatenate([run(model, feeds)[0] for feeds in data])
    compensated(model, data, ctx, rank=2)
    uncorrected = np.concatenate([run(model, feeds)[0] for feeds in data])
    (record,) = apply("correct_bias", model, ctx).records
    assert (record.site, record.reason) == ("fc", "bias corrected")
    corrected = np.concatenate([run(model, feeds)[0] for feeds in data])
    assert np.abs((corrected - wanted).mean(0)).max() < 1e-3 * np.abs((uncorrected - wanted).mean(0)).max()


def test_the_result_does_not_depend_on_threads():
    data, found = token_batches(4), []
    for threads in (1, 3):
        model = decoder()
        compensated(model, data, context(plan=PLAN, batches=data, threads=threads), rank=4)
        found.append(serialized(model))
    assert found[0] == found[1]


def test_without_sequential_the_model_is_measured_as_it_was():
    """The second of two layers then has factors for what it read before the first got any."""
    text = f"g (float[B,{K}] x) => (float[B,{N}] y) {{ [one] h = MatMul(x, w) [two] y = MatMul(h, v) }}"
    weights, data = {"w": normal((K, K), 1, scale=0.2), "v": normal((K, N), 2)}, batches()
    for sequential in (True, False):
        model = parse(text, weights)
        ctx = context(scheme="w2a16-g16-asym", batches=data, sequential=sequential)
        before = quantized(parse(text, weights), ctx)
        _, record = compensated(model, data, ctx, rank=8)
        site = site_named(model, "two")
        for each, same in ((model, sequential), (before, not sequential)):
            loss = np.square(values_of(each, "h", data) @ weight_error(site).T).sum()
            assert (loss == pytest.approx(record.metrics["loss"], rel=1e-3)) == same


@pytest.mark.parametrize("output_format", ["matmulnbits", "qdq"])
@pytest.mark.parametrize("float16", [False, True])
def test_a_compiled_model_runs_its_codes_in_the_same_kernels(tmp_path, output_format, float16):
    """Of each site MatMulNBits is fused, with its bias; noise is attributed to it, and the report counts its bits."""
    source, output, data = tmp_path / "float.onnx", tmp_path / "out.onnx", batches((2, 20, 64))
    text = """g (float[B,S,64] x) => (float[B,S,32] y) {
        [up] h = MatMul(x, wu) hb = Add(h, bu) a = Relu(hb) [down] d = MatMul(a, wd) y = Softmax(d) }"""
    weights = {"wu": normal((64, 96), 1, scale=0.2), "bu": normal(96, 2), "wd": normal((96, 32), 3, scale=0.2)}
    save_model(parse(text, weights), source, force=True)
    result = compile_model(
        source, W4, calibration=data, output=output, output_format=output_format, float16=float16,
        algorithms=("gptq,low_rank{rank=4,sites=re:.}",),
    )  # fmt: skip
    verification = result.report.verification
    assert verification.outputs[0].sqnr_db > 15
    assert verification.fused["CPUExecutionProvider"]["MatMulNBits"] == 2
    assert not [remark for remark in verification.remarks if "did not fuse" in remark]
    constants = {tensor.name: tensor for tensor in onnx.load(output).graph.initializer}
    kind = onnx.TensorProto.FLOAT16 if float16 else onnx.TensorProto.FLOAT
    factors = [tensor for name, tensor in constants.items() if "_low_rank_" in name]
    assert [tensor.data_type for tensor in factors] == [kind] * 4
    rows = {row.site: row for row in result.report.sites}
    assert rows["up"].bits_per_weight == pytest.approx(4 + 20 / 16 + 32 / (1 + float16) * 4 * 160 / (64 * 96), abs=1.1)
    assert rows["down"].action == "quantized"
    assert rows["down"].form.startswith("MatMulNBits" if output_format == "matmulnbits" else "DequantizeLinear")
    assert "factors of rank 4" in rows["down"].reason
    found = {layer.name: layer for layer in propagate(parse(text, weights), result.model, data).layers}
    assert found["up"].quantized
    assert found["down"].quantized
    assert {found["up"].output, found["down"].output} == {"hb", "d"}


def test_factors_lessen_the_error_of_a_compiled_model_on_other_data(tmp_path):
    source, held_out = tmp_path / "float.onnx", batches(seed=50)
    save_model(linear_model(K, N), source, force=True)
    (wanted,) = run(linear_model(K, N), held_out[0])
    errors = []
    for algorithms in ("gptq", "gptq,low_rank{rank=6}"):
        result = compile_model(source, "w2a16-g16-asym", calibration=batches(), algorithms=(algorithms,), verify=False)
        errors.append(np.square(run(result.model, held_out[0])[0] - wanted).sum())
    assert errors[1] < 0.7 * errors[0]


def test_a_plan_counts_the_factors(tmp_path):
    source = tmp_path / "float.onnx"
    save_model(decoder(), source, force=True)
    algorithms = ("gptq", "gptq,low_rank{rank=8}", "gptq,low_rank{rank=8,sites=l0_down|head}")
    configs = [CompileConfig(plan=PLAN, calibration=[{}], algorithms=(each,)) for each in algorithms]
    plain, default, named = (plan_model(source, config) for config in configs)
    assert default.bytes_after - plain.bytes_after == 4 * 8 * 2 * (4 * (32 + 32) + 3 * (32 + 48))
    assert named.bytes_after - plain.bytes_after == 4 * 8 * ((48 + 32) + (32 + 512))
    names = [one.name for one, other in zip(plain.sites, named.sites, strict=True) if one != other]
    assert names == ["l0_down", "head"]


def test_it_comes_after_the_codes_and_before_what_depends_on_them():
    ctx = context(plan=SchemePlan(Scheme.parse("w8a8")), kv_cache="kv8", algorithms=("low_rank,correct_bias,obq",))
    names = [step.name for step in pipeline.build(ctx.config, ctx)]
    places = [names.index(name) for name in ("obq", "low_rank", "correct_bias", "insert_qdq", "quantize_kv_cache")]
    assert places == sorted(places)


def test_what_cannot_be_done_is_an_error_that_says_so():
    ctx = context(scheme=W4, batches=batches())
    model = linear_model(K, N)
    apply("assign_scheme", model, ctx)
    with pytest.raises(SchemeError, match="'fc' is not quantized yet; name what chooses its codes: gptq,low_rank"):
        apply("low_rank", model, ctx)
    apply("rtn", model, ctx)
    with pytest.raises(CalibrationError, match="low_rank needs calibration data"):
        apply("low_rank", model, context(scheme=W4))
    with pytest.raises(SchemeError, match="rank=0 has to be at least 1"):
        load("low_rank")(ctx, {"rank": "0"})
    for budget in ({"bits_per_weight": 4.0}, {"max_size": 10**6}):
        with pytest.raises(SchemeError, match="factors that --bits-per-weight and --max-size do not count; drop"):
            load("low_rank")(context(**budget), {})


def test_options_as_text():
    text = "low_rank{rank=8,sites=re:down_proj|o_proj}"
    (step,) = pipeline.build(context().config, context(), text=text)
    assert str(step) == text
    assert [pattern.text for pattern in step.options.patterns] == ["re:down_proj|o_proj"]
    assert only(apply("low_rank", quantized(linear_model(K, N), context(scheme=W4)), context(
        scheme=W4, batches=batches())), "quantized") == ["fc"]  # fmt: skip
    assert not find_sites(linear_model(K, N))[0][0].quantized
