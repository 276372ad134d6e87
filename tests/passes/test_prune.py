"""The pass `prune`, and what algorithms for weights make of pruned weights; the mathematics is in test_pruning."""

import numpy as np
import onnx
import pytest

from qcompiler.config import CompileConfig
from qcompiler.driver import compile_model
from qcompiler.errors import SchemeError
from qcompiler.files.loader import load_model
from qcompiler.graph import SCHEME_KEY, SPARSE_KEY, read_weight
from qcompiler.numerics.affine import WeightSpec, dequantize, min_max_grid
from qcompiler.numerics.second_order import damped, descend, row_losses, sweep, upper_factor
from qcompiler.passes import load
from qcompiler.scheme import Scheme
from qcompiler.scheme_plan import SchemePlan
from qcompiler.sites import find_sites
from tests.builders import (
    apply,
    context,
    correlated,
    decoder,
    linear_model,
    normal,
    parse,
    run,
    serialized,
    site_named,
    the_site,
    token_batches,
)


def pruned(model, scheme, batches=None, lm_head=None, **options):
    """The context, and the records of the pass."""
    plan = SchemePlan(Scheme.parse(scheme), None, lm_head)
    ctx = context(plan=plan, batches=batches)
    apply("canonicalize", model, ctx)
    apply("assign_scheme", model, ctx)
    return ctx, apply("prune", model, ctx, **options)


def runs_of(weight, of):
    return (weight[:, : weight.shape[1] // of * of].reshape(len(weight), -1, of) != 0).sum(-1)


@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_without_data_magnitudes_decide(op, dtype):
    model = linear_model(64, 24, op=op, dtype=dtype)
    before = read_weight(the_site(model))
    _, result = pruned(model, "sparse50")
    after, site = read_weight(the_site(model)), the_site(model)
    assert site.node.metadata_props[SPARSE_KEY] == "50"
    assert SCHEME_KEY not in site.node.metadata_props
    kept = after != 0
    assert np.array_equal(after[kept], before[kept])
    assert kept.mean() == 0.5
    assert np.abs(before[kept]).min() >= np.abs(before[~kept]).max()
    (record,) = result.records
    assert (record.action, record.spec, record.reason) == ("pruned", "sparse50", "pruned by magnitude: no data")
    assert record.metrics["zeros"] == 0.5
    x = normal((3, 64), 1, dtype)
    np.testing.assert_allclose(run(model, {"x": x})[0], x @ after.T.astype(dtype), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("method", ["obs", "greedy", "obd", "magnitude"])
def test_runs_of_four_keep_two(method):
    model = decoder(layers=1)
    _, result = pruned(model, "sparse2:4", token_batches(), method=method)
    assert len(result.records) == 7
    for record in result.records:
        weight = read_weight(site_named(model, record.site))
        assert (runs_of(weight, 4) == 2).all()
        assert record.reason == f"pruned by {method}"
        assert 0 < record.metrics["pruning_loss"] < 1
        assert record.metrics["zeros"] == 0.5


def test_the_more_is_known_the_less_is_lost():
    """Over the layers of a decoder, each measured behind what is pruned before it."""
    means = []
    for method in ("greedy", "obs", "obd", "magnitude"):
        _, result = pruned(decoder(layers=2), "sparse50", token_batches(6, 4), method=method)
        means.append(np.mean([record.metrics["pruning_loss"] for record in result.records]))
    assert means == sorted(means), means


def test_the_groups_of_a_convolution_have_a_hessian_each():
    model = parse(
        "g (float[B,8,6] x) => (float[B,12,4] y) { [conv] y = Conv<group=2>(x, w) }", {"w": normal((12, 4, 3), 0)}
    )
    batches = [{"x": normal((4, 8, 6), seed)} for seed in range(4)]
    _, result = pruned(model, "sparse50", batches)
    (record,) = result.records
    weight = read_weight(the_site(model))
    assert (weight[:6] == 0).mean() == (weight[6:] == 0).mean() == 0.5
    assert 0 < record.metrics["pruning_loss"] < 0.5


@pytest.mark.parametrize("algorithm", ["rtn", "gptq", "hqq", "obq", "gptq{refine=1}", "gptq{drift=0.5}"])
@pytest.mark.parametrize("scheme", ["sparse2:4+w4a16-g16-asym", "sparse50+w4a16-g32-sym", "sparse50+w2a16-g16"])
def test_zeros_stay_whatever_rounds_the_rest(algorithm, scheme):
    model = decoder(layers=1)
    ctx, result = pruned(model, scheme, token_batches())
    zeros = {record.site: read_weight(site_named(model, record.site)) == 0 for record in result.records}
    name, _, text = algorithm.partition("{")
    options = dict(each.split("=") for each in text.rstrip("}").split(",") if each)
    found = [each for each in apply(name, model, ctx, **options).records if each.action == "quantized"]
    assert len(found) == len(zeros) == 7
    for record in found:
        assert record.spec == str(Scheme.parse(scheme).resolve("cpu"))
        weight = read_weight(site_named(model, record.site))
        assert not weight[zeros[record.site]].any()
        assert weight.any()


def test_rounding_is_made_up_for_around_the_zeros():
    """GPTQ that knows of them loses less than GPTQ whose codes are zeroed afterwards."""
    weight, spec = normal((8, 64), 0), WeightSpec(4, 32, False)
    rows = correlated(64, 1).astype(np.float64)
    matrix = damped(rows.T @ rows / len(rows), 0.05)
    weight[np.abs(weight) < np.median(np.abs(weight))] = 0
    zeros, grid, order = weight == 0, min_max_grid(weight, spec), np.arange(64)
    middle = grid.zero_point.repeat(32, axis=1)

    def loss(codes):
        error = weight - dequantize(codes, grid.scale, grid.zero_point, 32)
        return row_losses(error.astype(np.float64), matrix).sum()

    codes, told = sweep(weight, upper_factor(matrix), grid, spec, order, 16, zeros)
    assert np.array_equal(codes[zeros], middle[zeros])
    np.testing.assert_allclose(told.sum(), loss(codes), rtol=1e-4)
    plain, _ = sweep(weight, upper_factor(matrix), grid, spec, order)
    assert loss(codes) < loss(np.where(zeros, middle, plain).astype(np.uint8))
    better = descend(weight, codes, matrix.astype(np.float32), grid, spec, 16, zeros)
    assert np.array_equal(better[zeros], middle[zeros])
    assert loss(better) <= loss(codes)


def test_a_compiled_model_runs_and_is_described(tmp_path):
    onnx.save(onnx.load_from_string(serialized(decoder(layers=1))), tmp_path / "float.onnx")
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 512, (8, 16)))
    result = compile_model(
        tmp_path / "float.onnx",
        config=CompileConfig(plan=SchemePlan(Scheme.parse("sparse2:4+w4"), None, None)),
        calibration=tmp_path / "tokens.npy",
        output=tmp_path / "out.onnx",
    )
    model = onnx.load(tmp_path / "out.onnx")
    assert sum(node.op_type == "MatMulNBits" for node in model.graph.node) == 7
    assert not any(prop.key == SPARSE_KEY for node in model.graph.node for prop in node.metadata_props)
    assert "all but 2 of 4 of the values zero, groups of 64" in result.report.to_dict()["meaning"]
    assert result.report.to_dict()["recipe"]["scheme"] == "sparse2:4+w4a16"
    rows = [row for row in result.report.sites if row.action == "quantized"]
    assert {row.scheme for row in rows} == {"sparse2:4+w4a16-g64-asym"}
    assert all(row.metrics["zeros"] == 0.5 and row.reason.startswith("pruned by obs") for row in rows)


def test_a_model_that_is_only_pruned_is_written(tmp_path):
    onnx.save(onnx.load_from_string(serialized(decoder(layers=1))), tmp_path / "float.onnx")
    config = CompileConfig(plan=SchemePlan(Scheme.parse("sparse50"), None, None))
    result = compile_model(tmp_path / "float.onnx", config=config, output=tmp_path / "out.onnx")
    assert result.report.changed
    zeros = [
        read_weight(site) == 0 for site in find_sites(load_model(tmp_path / "out.onnx"))[0] if site.role == "linear"
    ]
    assert len(zeros) == 7
    assert all(each.mean() == 0.5 for each in zeros)
    assert {row.scheme for row in result.report.sites if row.metrics} == {"sparse50"}


def test_two_readers_of_a_weight_share_it_only_if_both_prune():
    model = decoder(layers=1)
    ctx = context(plan=SchemePlan(Scheme.parse("w4a16-g32"), Scheme.parse("w8a16-g32"), Scheme.parse("sparse50")))
    apply("assign_scheme", model, ctx)
    apply("prune", model, ctx)
    sites = {site.role: site for site in find_sites(model)[0]}
    assert SPARSE_KEY not in sites["embedding"].node.metadata_props
    assert (read_weight(sites["lm_head"]) == 0).mean() == 0.5
    assert (read_weight(sites["embedding"]) == 0).mean() < 0.1


@pytest.mark.parametrize(
    ("scheme", "problem"),
    [
        ("sparse", "'' is no sparsity; give a share in percent, such as 50, or runs, such as 2:4"),
        ("sparse4:4", "'4:4' is no sparsity"),
        ("sparse50+w5a16", "weights of 5 bits are not available"),
        ("sparse50+w4a16-lut", "pruned weights need a code for zero; tables and signs have none"),
        ("sparse50+w1a16", "pruned weights need a code for zero; tables and signs have none"),
        ("sparse50+sparse50", "pruned weights need a code for zero"),
    ],
)
def test_schemes_that_mean_nothing(scheme, problem):
    with pytest.raises(SchemeError, match=problem):
        Scheme.parse(scheme)


@pytest.mark.parametrize(
    "text", ["sparse50", "sparse2:4", "sparse12.5+w4a16-g32-sym", "sparse2:4+w8a8", "sparse50+w4a8"]
)
def test_schemes_round_trip(text):
    scheme = Scheme.parse(text)
    assert str(scheme) == text
    assert Scheme.parse(str(scheme.resolve("cpu"))) == scheme.resolve("cpu")


def test_options_that_mean_nothing():
    for options, problem in (
        ({"method": "luck"}, "method=luck is unknown; choose one of obs, greedy, obd, magnitude"),
        ({"percdamp": "2"}, "percdamp=2 is not between 0 and 1"),
    ):
        with pytest.raises(SchemeError, match=problem):
            load("prune")(context(), options)
    model = decoder(layers=1)
    with pytest.raises(SchemeError, match="K = 32 columns, more than 16, and the time grows with N K"):
        pruned(model, "sparse50", token_batches(), method="greedy", max_columns=16)


def test_pruned_weights_are_no_tables():
    model = linear_model(64, 32)
    plan = SchemePlan(Scheme.parse("sparse50+w4a16-g32"), None, None)
    ctx = context(plan=plan, custom_ops="always")
    apply("assign_scheme", model, ctx)
    from qcompiler.targets import site_refusal

    refusal = site_refusal(the_site(model), Scheme.parse("w4a16-g32-lut"), ctx.config)
    assert refusal == "pruned weights need a code for zero, and tables have none"
