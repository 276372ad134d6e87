"""The pass `hqq`: what it does with sites, options and records; the turns themselves are in test_half_quadratic."""

import numpy as np
import pytest

from qcompiler.errors import NumericsError, SchemeError
from qcompiler.graph import PASS_KEY, read_weight
from qcompiler.numerics.affine import clip_grid, min_max_grid, quantize
from qcompiler.numerics.half_quadratic import HalfQuadratic, half_quadratic_grid
from qcompiler.passes import load
from qcompiler.sites import find_sites
from tests.builders import Ticks, apply, context, decoder, linear_model, normal, parse, quantized, text_of, the_site


@pytest.mark.parametrize("form", ["sym", "asym"])
@pytest.mark.parametrize("clip", [False, True])
def test_codes_are_the_nearest_on_the_refined_grid(form, clip):
    model = linear_model(72, 24)
    weight = read_weight(the_site(model))
    quantized(model, context(scheme=f"w4a16-g32-{form}"), "hqq", clip=clip, norm=0.8, iterations=9)
    tensor = the_site(model).quantized
    spec = tensor.spec
    starts = [min_max_grid(weight, spec), *([clip_grid(weight, spec)] if clip else [])]
    grid = half_quadratic_grid(weight, spec, HalfQuadratic(norm=0.8, iterations=9), starts)
    assert np.array_equal(tensor.codes(), quantize(weight, grid, spec))
    assert np.array_equal(tensor.scale, grid.scale)
    assert not np.array_equal(grid.scale, starts[0].scale)


@pytest.mark.parametrize(
    "scheme", ["w4a16-g32-asym", "w4a16-g32-sym", "w3a16-g32-sym", "w2a16-g32-asym", "w8a16-g32-sym"]
)
def test_the_loss_is_what_it_says_and_less_than_that_of_rounding(scheme):
    results = {}
    for algorithm in ("rtn", "hqq"):
        model = linear_model(72, 24)
        weight = read_weight(the_site(model)).astype(np.float64)
        apply("assign_scheme", model, context(scheme=scheme))
        (record,) = apply(algorithm, model, context(scheme=scheme)).records
        error = np.abs(weight - the_site(model).quantized.dequantized()) ** 0.7
        results[algorithm] = error.sum(), record
    loss, record = results["hqq"]
    assert loss < results["rtn"][0]
    assert record.metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert record.metrics["relative_loss"] == pytest.approx(loss / (np.abs(weight) ** 0.7).sum(), rel=1e-5)
    assert (record.site, record.action, record.spec, record.reason) == ("fc", "quantized", scheme, "")
    assert the_site(model).node.metadata_props[PASS_KEY] == "hqq"


def test_without_the_scale_or_without_turns_it_is_rounding_to_nearest():
    reference = quantized(linear_model(64, 24), context(scheme="w4a16-g32-asym"))
    for options in ({"scale": False, "clip": False}, {"iterations": 0, "clip": False}):
        model = quantized(linear_model(64, 24), context(scheme="w4a16-g32-asym"), "hqq", **options)
        assert np.array_equal(the_site(model).quantized.codes(), the_site(reference).quantized.codes())


def test_floats_of_8_bits_are_rounded_to_nearest_and_it_says_so():
    model, ctx = linear_model(64, 24), context(scheme="w8a8-fp8", target="cuda")
    apply("assign_scheme", model, ctx)
    (record,) = apply("hqq", model, ctx).records
    assert record.reason == "8-bit floats are rounded to nearest"


def test_the_graph_stays_and_a_second_run_finds_nothing():
    model = linear_model(64, 24, bias=True)
    before = text_of(model)
    apply("assign_scheme", model, context())
    assert apply("hqq", model).modified
    assert text_of(model) == before
    again = apply("hqq", model)
    assert (again.modified, again.records) == (False, ())


def test_threads_change_no_byte_and_progress_is_told():
    results = []
    for threads in (1, 3):
        model = decoder(1, hidden=64, inner=96)
        ticks = Ticks()
        quantized(model, context(scheme="w4a16-g32-asym", threads=threads, progress_to=ticks), "hqq")
        tensors = [site.quantized for site in find_sites(model)[0]]
        results.append([(t.packed.tobytes(), t.scale.tobytes(), t.zero_point.tobytes()) for t in tensors])
        assert ticks.seen == [("hqq", done, 9) for done in range(9)]
    assert results[0] == results[1]


def test_a_weight_that_is_not_finite_is_an_error_that_names_the_site():
    weight = normal((64, 24), 1)
    weight[3, 5] = np.nan
    model = parse("g (float[B,64] x) => (float[B,24] y) { [fc] y = MatMul(x, w) }", {"w": weight})
    apply("assign_scheme", model)
    with pytest.raises(NumericsError, match="the weight of 'fc' holds 1 values"):
        apply("hqq", model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "0"}, "norm=0 is not above 0 and up to 1"),
        ({"norm": "2"}, "norm=2 is not above 0"),
        ({"norm": "nan"}, "norm=nan is not above 0"),
        ({"beta": "0"}, "beta=0 and kappa=1.01 are not"),
        ({"kappa": "0.5"}, "kappa=0.5 are not above 0 and at least 1"),
        ({"iterations": "-1"}, "iterations=-1 has to be at least 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(SchemeError, match=message):
        load("hqq")(context(), options)
