"""Rounding to nearest, site by site."""

import ml_dtypes
import numpy as np
import pytest

from qcompiler.errors import NumericsError, SchemeError
from qcompiler.graph import PASS_KEY, read_weight
from qcompiler.numerics.affine import clip_grid, min_max_grid, quantize
from qcompiler.numerics.formats import FORMATS
from qcompiler.passes import load
from qcompiler.sites import find_sites
from tests.builders import (
    Ticks,
    apply,
    context,
    decoder,
    linear_model,
    normal,
    parse,
    quantized,
    run,
    text_of,
    the_site,
)


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("form", ["sym", "asym"])
def test_codes_are_the_nearest_on_the_grid_of_the_scheme(bits, clip, form):
    model = linear_model(72, 24)
    weight = read_weight(the_site(model))
    ctx = context(scheme=f"w{bits}a16-g32-{form}")
    quantized(model, ctx, clip=clip)
    tensor = the_site(model).quantized
    spec = tensor.spec
    assert (spec.bits, spec.group_size, spec.symmetric, spec.signed_scale) == (bits, 32, form == "sym", True)
    grid = clip_grid(weight, spec) if clip else min_max_grid(weight, spec)
    assert np.array_equal(tensor.codes(), quantize(weight, grid, spec))
    assert np.array_equal(tensor.scale, grid.scale)
    if form == "asym":
        assert np.array_equal(tensor.zero_point, grid.zero_point)


@pytest.mark.parametrize("algorithm", ["rtn", "hqq"])
@pytest.mark.parametrize("form", ["sym", "asym"])
def test_three_bits_lie_between_two_and_four(algorithm, form):
    """A bit more halves the step, which is 6 dB; what is stored is that of 4 bits."""
    found = {}
    for bits in (2, 3, 4):
        model, ctx = linear_model(256, 24), context(scheme=f"w{bits}a16-g32-{form}")
        apply("assign_scheme", model, ctx)
        (record,) = apply(algorithm, model, ctx).records
        found[bits] = record.metrics
    assert found[2]["sqnr_db"] + 4 < found[3]["sqnr_db"] < found[4]["sqnr_db"] - 4
    assert found[2]["bits_per_weight"] < found[3]["bits_per_weight"] == found[4]["bits_per_weight"]


def test_the_graph_stays_and_the_record_says_what_was_done():
    """4 bits in groups of 32 of Gaussian weights: 20 dB, 4 + (32 + 4) / 32 bits each."""
    model = linear_model(64, 24, bias=True)
    before = text_of(model)
    apply("assign_scheme", model, context(scheme="w4a16-g32-asym"))
    result = apply("rtn", model, context(scheme="w4a16-g32-asym"))
    assert result.modified
    assert text_of(model) == before
    (record,) = result.records
    assert (record.site, record.action, record.spec, record.reason) == ("fc", "quantized", "w4a16-g32-asym", "")
    assert set(record.metrics) == {"sqnr_db", "bits_per_weight"}
    assert 19 < record.metrics["sqnr_db"] < 22
    assert record.metrics["bits_per_weight"] == 4 + 36 / 32
    assert the_site(model).node.metadata_props[PASS_KEY] == "rtn"


def test_the_half_quantized_model_computes_with_the_dequantized_weight():
    model = linear_model(64, 24, bias=True)
    x = normal((5, 64), 3)
    quantized(model, context(scheme="w4a16-g32-asym"))
    values = the_site(model).quantized.dequantized()
    (got,) = run(model, {"x": x})
    assert np.allclose(got, x @ values.T + normal(24, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scales_have_the_precision_of_the_activations(dtype):
    model = linear_model(64, 24, dtype=dtype)
    quantized(model, context(scheme="w4a16-g32-asym"))
    tensor = the_site(model).quantized
    kind = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    assert tensor.scale.dtype == kind
    weight = normal((64, 24), 0).astype(kind).astype(np.float32).T
    grid = min_max_grid(weight, tensor.spec)
    # The codes are those of the rounded scale.
    assert np.array_equal(tensor.codes(), quantize(weight, grid, tensor.spec))
    assert np.array_equal(tensor.scale.astype(np.float32), grid.scale)


def test_scales_are_negative_only_where_the_target_runs_them():
    for target, signed in (("cpu", True), ("cuda", True), ("portable", False), ("tensorrt", False)):
        model = linear_model(64, 24)
        quantized(model, context(scheme="w4a16-g32-sym", target=target))
        tensor = the_site(model).quantized
        assert (tensor.scale < 0).any() == signed
        assert (tensor.codes() == 0).any() == signed


def test_a_weight_that_two_sites_read_is_quantized_once():
    text = "g (float[B,64] x) => (float[B,64] y) { [a] h = MatMul(x, w) [b] y = MatMul(h, w) }"
    model = parse(text, {"w": normal((64, 64), 1)})
    apply("assign_scheme", model)
    result = apply("rtn", model)
    assert [record.site for record in result.records] == ["a"]
    first, second = find_sites(model)[0]
    assert first.quantized is second.quantized is not None


def test_what_is_quantized_or_not_assigned_is_left_alone():
    model = linear_model(64, 24)
    result = apply("rtn", model)
    assert (result.modified, result.records) == (False, ())
    assert the_site(model).quantized is None
    quantized(model)
    tensor = the_site(model).quantized
    result = apply("rtn", model)
    assert (result.modified, result.records) == (False, ())
    assert the_site(model).quantized is tensor


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_an_error_that_names_the_site(bad):
    weight = normal((64, 24), 1)
    weight[3, 5] = weight[60, 0] = bad
    model = parse("g (float[B,64] x) => (float[B,24] y) { [fc] y = MatMul(x, w) }", {"w": weight})
    apply("assign_scheme", model)
    with pytest.raises(
        NumericsError, match=r"the weight of 'fc' holds 2 values that are NaN or infinite; .* --ignore 'fc'"
    ):
        apply("rtn", model)


def test_threads_change_no_byte_and_progress_is_told():
    results = []
    for threads in (1, 2, 3):
        model = decoder(1, hidden=64, inner=96)
        ticks = Ticks()
        ctx = context(scheme="w4a16-g32-asym", threads=threads, progress_to=ticks)
        quantized(model, ctx, clip=True)
        tensors = [site.quantized for site in find_sites(model)[0]]
        results.append([(t.packed.tobytes(), t.scale.tobytes(), t.zero_point.tobytes()) for t in tensors])
        assert ticks.seen == [("rtn", done, 9) for done in range(9)]
    assert results[0] == results[1] == results[2]


def test_its_only_option_is_clip():
    assert str(load("rtn")(context(), {"clip": "true"})) == "rtn{clip=True}"
    assert str(load("rtn")(context())) == "rtn"
    with pytest.raises(SchemeError, match="pass rtn has no option 'group'; it has: clip"):
        load("rtn")(context(), {"group": "1"})
