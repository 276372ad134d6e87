"""Ranges of a model's activations: collectors, sweeps, and what each calibrator says about the values ORT computes."""

import tracemalloc

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler import ranges
from qcompiler.config import CALIBRATORS
from qcompiler.errors import CalibrationError, NumericsError, SchemeError
from qcompiler.numerics.activation import ActivationSpec
from qcompiler.numerics.ranges import Histogram, entropy_range, expected_error, mse_range, percentile_range
from qcompiler.ranges import HistogramOf, MinMax, MovingAverage, Range, calibrate
from tests.builders import decoder, normal, parse, run, token_batches, with_outputs

U8 = ActivationSpec()
S8 = ActivationSpec(signed=True, symmetric=True)
FP8 = ActivationSpec(fp8=True)
FLOAT_TEXT = "g (float[B,16] x) => (float[B,8] y) { h = MatMul(x, w) r = Relu(h) y = MatMul(r, v) }"


def small(kind="float"):
    dtype = {"float": "float32", "float16": "float16"}[kind]
    return parse(
        FLOAT_TEXT.replace("float[", f"{kind}["), {"w": normal((16, 8), 0, dtype), "v": normal((8, 8), 1, dtype)}
    )


def rows(count=4, size=50, seed=0, dtype="float32"):
    return [{"x": normal((size, 16), seed + i, dtype, 1 + i)} for i in range(count)]


def value_of(model, name):
    found = {value.name: value for value in model.graph.inputs}
    found.update((output.name, output) for node in model.graph for output in node.outputs)
    return found[name]


def measured(model, names, batches, calibrator="minmax", spec=U8, **options):
    """Ranges by name of the value."""
    found = calibrate({value_of(model, name): spec for name in names}, model, batches, calibrator=calibrator, **options)
    return {value.name: chosen for value, chosen in found.items()}


def computed(model, name, batches, kept=lambda feeds, value: value):
    """All values of a tensor, when the whole model runs, as float32."""
    source = with_outputs(model, [name])
    return np.concatenate(
        [
            kept(feeds, feeds[name] if name in feeds else run(source, feeds, outputs=[name])[0]).reshape(-1)
            for feeds in batches
        ]
    ).astype(np.float32)


def collect(collector, batches):
    for values in batches:
        collector.add(collector.part(values))
    return collector


# Collectors.


def test_min_max_is_the_union_of_the_batches_in_any_order():
    batches = [normal((5, 7), seed) for seed in range(6)]
    everything = np.concatenate(batches)
    wanted = Range(float(everything.min()), float(everything.max()), "minmax")
    assert collect(MinMax(), batches).range() == wanted
    assert collect(MinMax(), batches[::-1]).range() == wanted


def test_the_average_starts_with_the_first_batch_and_moves_by_the_momentum():
    batches = [np.array(pair, np.float32) for pair in ([-1, 4], [-3, 2], [-2, 8])]
    low, high = -1.0, 4.0
    for batch in batches[1:]:
        low, high = 0.75 * low + 0.25 * batch[0], 0.75 * high + 0.25 * batch[1]
    found = collect(MovingAverage(0.25), batches).range()
    assert found == Range(pytest.approx(low), pytest.approx(high), "average")
    assert collect(MovingAverage(), batches).range().high == pytest.approx(0.99 * (0.99 * 4 + 0.01 * 2) + 0.01 * 8)
    assert collect(MovingAverage(1.0), batches).range() == Range(-2, 8, "average")


def test_batches_make_the_histogram_of_everything_in_any_order():
    batches = [np.maximum(normal((n, 7), n), -0.5) * (normal((n, 7), n + 1) > 0) for n in (3, 50, 1, 400)]
    wanted = Histogram.of(np.concatenate(batches))
    for order in (batches, batches[::-1]):
        found = collect(HistogramOf(wanted.low, wanted.high), order).histogram()
        assert np.array_equal(found.counts, wanted.counts)
        assert (found.low, found.high, found.zeros) == (wanted.low, wanted.high, wanted.zeros)


def test_a_part_changes_nothing():
    histogram = HistogramOf(-3, 3)
    histogram.part(normal(100, 0, scale=0.5))
    assert not histogram.histogram().counts.any()
    least = MinMax()
    assert least.part(np.ones(3, np.float32)) == (1, 1)
    assert (least.low, least.high) == (np.inf, -np.inf)


def test_values_beyond_the_range_count_for_the_outer_bins():
    found = collect(HistogramOf(-1, 2), [np.array([-9, -2, 0, 2, 2.001, 1e30], np.float32)]).histogram()
    assert found.counts[[0, 1024, -1]].tolist() == [2, 1, 3]
    assert found.counts.sum() == 6


def test_empty_batches_add_nothing():
    empty, some = np.zeros((0, 4), np.float32), normal(9, 0)
    for make in (MinMax, MovingAverage):
        assert collect(make(), [empty, some, empty]).range() == collect(make(), [some]).range()
    assert collect(HistogramOf(-9, 9), [empty, some]).histogram().counts.sum() == 9


@pytest.mark.parametrize("make", [MinMax, MovingAverage])
def test_a_value_that_is_always_empty_has_no_range(make):
    collector = collect(make(name="boxes"), [np.zeros((0, 4), np.float32)])
    with pytest.raises(NumericsError, match=r"'boxes' holds no value .* --ignore"):
        collector.range()


MAKERS = [
    lambda: MinMax("mlp.down"),
    lambda: MovingAverage(name="mlp.down"),
    lambda: HistogramOf(-1, 1, "mlp.down"),
]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("make", MAKERS)
def test_values_that_are_not_finite_are_an_error_that_names_the_value(make, bad, dtype):
    import ml_dtypes  # noqa: F401 - makes bfloat16 known to numpy

    values = np.array([0.5, bad, 0.1], np.float32).astype(dtype)
    with pytest.raises(NumericsError, match=r"'mlp.down' holds NaN or infinity .*check the data.* --ignore"):
        make().part(values)


@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool"])
@pytest.mark.parametrize("make", MAKERS)
def test_integers_and_booleans_are_refused(make, dtype):
    with pytest.raises(NumericsError, match=rf"'mlp.down' is {dtype}, and only floating-point values"):
        make().part(np.ones(3, dtype))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_floats_are_taken_as_float32(dtype):
    import ml_dtypes  # noqa: F401 - makes bfloat16 known to numpy

    values = normal((40, 5), 3).astype(dtype)
    wanted = values.astype(np.float32)
    low, high = MinMax().part(values)
    assert (low, high) == (wanted.min(), wanted.max())
    assert np.array_equal(HistogramOf(low, high).part(values)[0], Histogram.of(wanted).counts)


# Models.


def test_the_names_are_those_of_the_configuration():
    assert set(ranges._CALIBRATORS) == set(CALIBRATORS)


@pytest.mark.parametrize("calibrator", CALIBRATORS)
@pytest.mark.parametrize("spec", [U8, S8])
def test_each_calibrator_on_inputs_and_computed_values(calibrator, spec):
    model, batches = small(), rows()
    found = measured(model, ["x", "h", "r"], batches, calibrator, spec)
    for name, chosen in found.items():
        values = computed(model, name, batches)
        histogram = Histogram.of(values)
        wanted = {
            "minmax": (histogram.low, histogram.high),
            "percentile": percentile_range(histogram, 99.99),
            "mse": mse_range(histogram, spec),
            "entropy": entropy_range(histogram),
        }
        if calibrator == "average":
            parts = np.split(values, len(batches))
            wanted["average"] = tuple(vars(collect(MovingAverage(), parts))[end] for end in ("low", "high"))
        assert chosen.method in wanted
        assert (chosen.low, chosen.high) == wanted[chosen.method]
        if calibrator == "auto":
            errors = {method: expected_error(histogram, *ends, spec) for method, ends in wanted.items()}
            assert errors[chosen.method] == min(errors.values())
        else:
            assert chosen.method == calibrator


def test_auto_clips_heavy_tails_and_keeps_uniform_data():
    model = small()
    flat = np.random.default_rng(0).uniform(-1, 1, (4, 500, 16)).astype(np.float32)
    found = measured(model, ["x"], [{"x": each} for each in flat], "auto")["x"]
    assert (found.low, found.high) == pytest.approx((-1, 1), abs=0.002)
    heavy = np.random.default_rng(0).standard_t(3, (4, 500, 16)).astype(np.float32)
    found = measured(model, ["x"], [{"x": each} for each in heavy], "auto")["x"]
    assert found.method == "mse"
    assert heavy.min() < found.low < found.high < heavy.max()


def test_the_percentile_can_be_chosen():
    model, batches = small(), rows()
    found = measured(model, ["h"], batches, "percentile", percentile=90)["h"]
    assert (found.low, found.high) == percentile_range(Histogram.of(computed(model, "h", batches)), 90)
    assert found.high < measured(model, ["h"], batches, "percentile")["h"].high
    whole = measured(model, ["h"], batches)["h"]
    assert measured(model, ["h"], batches, "percentile", percentile=100)["h"] == Range(
        whole.low, whole.high, "percentile"
    )


@pytest.mark.parametrize("calibrator", CALIBRATORS)
def test_8_bit_floats_keep_the_largest_magnitude_both_ways(calibrator):
    model, batches, ticks = small(), rows(), []
    values = {value_of(model, "h"): FP8}
    (found,) = calibrate(values, model, batches, calibrator=calibrator, tick=lambda *at: ticks.append(at)).values()
    limit = float(np.abs(computed(model, "h", batches)).max())
    assert found == Range(-limit, limit, "minmax")
    assert ticks == [(done, 4) for done in (1, 2, 3, 4)], "no second sweep is needed"


@pytest.mark.parametrize("calibrator", ["minmax", "percentile", "mse", "entropy", "auto"])
def test_neither_threads_nor_the_order_of_the_batches_matter(calibrator):
    model, batches = small(), rows(9, 20)
    names = ["x", "h", "r", "y"]
    wanted = measured(model, names, batches, calibrator)
    assert measured(model, names, batches, calibrator, threads=3) == wanted
    assert measured(model, names, batches[::-1], calibrator) == wanted


def test_the_average_does_not_depend_on_threads():
    model, batches = small(), rows(9, 20)
    assert measured(model, ["h"], batches, "average", threads=3) == measured(model, ["h"], batches, "average")


@pytest.mark.parametrize("calibrator", ["minmax", "average", "percentile", "mse"])
def test_padding_is_left_out(calibrator):
    model, batches = decoder(layers=1), token_batches()
    # Padding is a token of its own, whose embedding is far larger than that of the others.
    table = model.graph.initializers["table"].const_value.numpy().copy()
    table[511] *= 1000
    model.graph.initializers["table"].const_value = ir.tensor(table, name="table")
    for feeds in batches:
        feeds["input_ids"] = np.where(feeds["attention_mask"] == 1, feeds["input_ids"] % 511, 511)
    values = computed(model, "h0", batches, lambda feeds, value: value[feeds["attention_mask"] == 1])
    found = measured(model, ["h0"], batches, calibrator)["h0"]
    assert values.min() <= found.low < found.high <= values.max() < 10
    assert found.high > 0.5 * values.max()


def test_half_precision_models_are_measured_in_float32():
    model, batches = small("float16"), rows(dtype="float16")
    for calibrator in ("minmax", "auto"):
        values = computed(model, "h", batches)
        found = measured(model, ["h"], batches, calibrator)["h"]
        assert values.min() <= found.low < found.high <= values.max()


def test_what_is_not_finite_is_an_error_that_names_the_value():
    model, batches = small(), rows()
    batches[2]["x"][3, 4] = np.nan
    for threads in (1, 3):
        with pytest.raises(NumericsError, match=r"'[xhr]' holds NaN or infinity"):
            measured(model, ["x", "h", "r"], batches, "entropy", threads=threads)


def test_integers_are_an_error_that_names_the_value():
    model = decoder(layers=1)
    with pytest.raises(NumericsError, match=r"'input_ids' is int64"):
        measured(model, ["input_ids"], token_batches())


def test_progress_is_told_over_both_sweeps():
    model, batches, ticks = small(), rows(3), []
    measured(model, ["h"], batches, "mse", tick=lambda *at: ticks.append(at))
    assert ticks == [(done, 6) for done in range(1, 7)]
    ticks.clear()
    measured(model, ["h"], batches, "average", tick=lambda *at: ticks.append(at))
    assert ticks == [(done, 3) for done in range(1, 4)]


def test_nothing_wanted_is_nothing_found():
    assert calibrate({}, small(), [], calibrator="auto") == {}


def test_no_batches_unknown_names_and_impossible_percentiles_are_errors():
    model = small()
    with pytest.raises(CalibrationError, match=r"no batches .* give calibration data"):
        measured(model, ["h"], [])
    with pytest.raises(SchemeError, match=r"calibrator best is unknown; choose one of auto, average, minmax"):
        measured(model, ["h"], rows(), "best")
    with pytest.raises(SchemeError, match=r"percentile 101 .* choose 0 to 100"):
        measured(model, ["h"], rows(), "percentile", percentile=101)


class _Made(list):
    """The same batch time and again, made when it is read."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index >= self.count:
            raise IndexError(index)
        return {"x": normal((4, 16), index % 10)}


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_number_of_batches(count):
    def peak(count):
        model = small()
        tracemalloc.start()
        try:
            found = measured(model, ["x", "h"], _Made(count), "percentile", threads=2)
            return found, tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(2)  # imports and caches
    (few, little), (many, much) = peak(20), peak(count)
    assert few == many
    assert much < little + 100_000


def test_collectors_keep_nothing_of_10_000_batches():
    collectors = [MinMax(), MovingAverage(), HistogramOf(-9, 9)]
    batches = [normal((4, 16), seed) for seed in range(10)]
    parts = [[collector.part(values) for values in batches] for collector in collectors]
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for index in range(10_000):
            for collector, found in zip(collectors, parts, strict=True):
                collector.add(found[index % 10])
        assert tracemalloc.get_traced_memory()[0] < before + 10_000
    finally:
        tracemalloc.stop()
    assert collectors[2].histogram().counts.sum() == 640_000
