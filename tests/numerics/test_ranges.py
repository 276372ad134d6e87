"""Ranges from histograms, against ONNX Runtime's calibrators, naive loops, and the error measured on the values."""

import contextlib
import io
import itertools
import time

import numpy as np
import pytest

from qcompiler.numerics.activation import ActivationSpec, activation_grid, fake_quantize
from qcompiler.numerics.ranges import (
    BINS,
    Histogram,
    bin_counts,
    bin_edges,
    entropy_range,
    expected_error,
    mse_range,
    percentile_range,
)
from tests.builders import normal


def random(seed):
    return np.random.default_rng(seed)


def gelu(x):
    return x / 2 * (1 + np.tanh(0.797885 * (x + 0.044715 * x**3)))


DATA = {
    "normal": lambda: normal(60_000, 0),
    "laplace": lambda: random(1).laplace(3.0, 2.0, 50_000),
    "student": lambda: random(2).standard_t(3, 50_000),
    "cauchy": lambda: random(3).standard_cauchy(20_000),
    "uniform": lambda: random(4).uniform(-1, 1, 200_000),
    "relu": lambda: np.maximum(normal(50_000, 5), 0),
    "gelu": lambda: gelu(normal(50_000, 6, scale=2)),
    "sigmoid": lambda: 1 / (1 + np.exp(-normal(20_000, 7, scale=4))),
    "outliers": lambda: np.concatenate([normal(50_000, 8), [200.0, -50.0]]),
    "integers": lambda: random(9).integers(-9, 10, 5_000),
    "negative": lambda: -3 - random(10).random(1_000),
    "seven": lambda: normal(7, 11),
    "one": lambda: np.array([-3.0]),
    "tiny": lambda: normal(5_000, 12, scale=1e-20),
    "huge": lambda: normal(5_000, 13, scale=1e30),
    "zeros": lambda: np.zeros(10),
}
DATA = {name: (lambda make=make: np.asarray(make(), np.float32)) for name, make in DATA.items()}
SPECS = {
    "u8": ActivationSpec(),
    "s8": ActivationSpec(signed=True),
    "u8-sym": ActivationSpec(symmetric=True),
    "s8-sym": ActivationSpec(signed=True, symmetric=True),
    "u16": ActivationSpec(16),
    "s16-sym": ActivationSpec(16, signed=True, symmetric=True),
    "fp8": ActivationSpec(fp8=True),
}


def onnxruntime_range(values, method, percentile=99.99):
    """What ONNX Runtime's calibrators say about an array; they print."""
    from onnxruntime.quantization.calibrate import HistogramCollector

    collector = HistogramCollector(method, False, BINS, 128, percentile, "same")
    with contextlib.redirect_stdout(io.StringIO()):
        collector.collect({"x": values})
        low, high = collector.compute_collection_result()["x"][:2]
    return float(low), float(high)


def measured_error(values, low, high, spec):
    back = fake_quantize(values, *activation_grid(low, high, spec), spec)
    return float(np.mean((back.astype(np.float64) - values) ** 2))


# Histograms.


@pytest.mark.parametrize("name", DATA)
def test_a_histogram_is_numpys(name):
    values = DATA[name]()
    histogram = Histogram.of(values)
    limit = np.array(np.abs(values).max())
    counts, edges = np.histogram(values, BINS, range=(-limit, limit))
    assert np.array_equal(histogram.counts, counts)
    if limit:
        assert np.array_equal(histogram.edges, edges)
    assert histogram.counts.dtype == np.int64
    assert histogram.edges.dtype == edges.dtype == np.float32
    assert (histogram.low, histogram.high) == (values.min(), values.max())
    assert histogram.zeros == (values == 0).sum()


def test_values_on_the_edges_and_next_to_them_are_in_their_bins():
    for limit in (1.0, 3.7, 0.1, 1e-12, 5e29):
        edges = bin_edges(limit)
        values = np.concatenate(
            [edges, np.nextafter(edges[1:], np.float32(-np.inf)), np.nextafter(edges[:-1], edges[1:])]
        )
        counts = bin_counts(values, edges)
        assert np.array_equal(counts, np.histogram(values, edges)[0])
        assert (counts[:-1] == 3).all()


@pytest.mark.parametrize("limit", [1e-45, 1e-40, 3e-33, 1e-30, 2e38, float(np.finfo(np.float32).max)])
def test_the_smallest_and_the_largest_numbers_there_are(limit):
    """Where float32 has no number between two edges, or none for the width of all bins together."""
    limit = float(np.float32(limit))
    values = np.array([-limit, -limit / 2, 0, limit / 2, limit], np.float32)
    histogram = Histogram.of(values)
    assert np.isfinite(histogram.edges).all()
    assert histogram.edges[BINS // 2] == 0
    assert histogram.counts.sum() == 5
    for low, high in (
        percentile_range(histogram, 99),
        entropy_range(histogram),
        mse_range(histogram, ActivationSpec()),
    ):
        assert -limit <= low <= 0 <= high <= limit
    assert np.isfinite(expected_error(histogram, -limit, limit, ActivationSpec()))


def test_the_shape_and_the_layout_of_values_do_not_matter():
    values = normal((40, 50, 60), 1)
    wanted = Histogram.of(values.reshape(-1)).counts
    assert np.array_equal(Histogram.of(values).counts, wanted)
    assert np.array_equal(Histogram.of(values.transpose(2, 0, 1)).counts, wanted)
    assert not bin_counts(values[:0], bin_edges(1.0)).any()


# Percentiles.


@pytest.mark.parametrize("percentile", [99.999, 99.99, 99.9, 90, 50, 0])
@pytest.mark.parametrize("name", [name for name in DATA if name != "one"])
def test_percentiles_are_those_of_onnxruntime(name, percentile):
    values = DATA[name]()
    assert percentile_range(Histogram.of(values), percentile) == onnxruntime_range(values, "percentile", percentile)


@pytest.mark.parametrize("name", DATA)
def test_a_percentile_of_100_is_the_whole_range(name):
    values = DATA[name]()
    assert percentile_range(Histogram.of(values), 100) == (values.min(), values.max())


def test_a_percentile_is_within_a_bin_of_the_values_own():
    values = DATA["laplace"]()[:49_991]
    histogram = Histogram.of(values)
    width = float(histogram.edges[1] - histogram.edges[0])
    for percentile in (99, 99.9):
        exact = np.percentile(values, [(100 - percentile) / 2, (100 + percentile) / 2], method="inverted_cdf")
        assert np.allclose(percentile_range(histogram, percentile), exact, rtol=0, atol=width)


def test_a_range_does_not_end_before_it_begins():
    """ONNX Runtime takes the left edge of the only bin for the upper end, which is below the only value."""
    values = np.full(100, 5, np.float32)
    low, high = onnxruntime_range(values, "percentile")
    assert low > high
    assert percentile_range(Histogram.of(values), 99.99) == (5, 5)


# Entropy.


# Each takes ONNX Runtime a second or more.
@pytest.mark.parametrize("name", ["student", "cauchy", "relu", "gelu", "outliers", "integers", "negative", "seven"])
def test_entropy_is_that_of_onnxruntime(name):
    values = DATA[name]()
    assert entropy_range(Histogram.of(values)) == onnxruntime_range(values, "entropy")


def naive_divergences(counts, levels):
    """KL(P || Q) in nats of each candidate, narrow ones first, written out as loops in float64."""
    found, middle = [], len(counts) // 2
    for half in range(levels // 2, middle + 1):
        start, end = middle - half, min(middle + half + 1, len(counts))
        inside = [int(count) for count in counts[start:end]]
        p, q, merged = list(inside), [0] * len(inside), len(inside) // levels
        p[0] += int(counts[:start].sum())
        p[-1] += int(counts[end:].sum())
        for level in range(levels):
            at = range(level * merged, (level + 1) * merged)
            mass = sum(inside[at.start : None if level == levels - 1 else at.stop])
            filled = sum(p[i] != 0 for i in at)
            for i in at:
                q[i] = mass // filled if filled else 0
        if not any(q):
            found.append(np.inf)
            continue
        smooth = []
        for counted in (p, q):
            empty = sum(c == 0 for c in counted)
            taken = 1e-4 * empty / (len(counted) - empty)
            raised = np.array([c - taken if c else 1e-4 for c in counted])
            smooth.append(raised / raised.sum())
        found.append(float(np.sum(smooth[0] * np.log(smooth[0] / smooth[1]))))
    return np.array(found)


@pytest.mark.parametrize(("bins", "levels"), [(64, 8), (64, 7), (96, 16), (32, 31), (32, 2), (16, 16)])
@pytest.mark.parametrize("name", ["normal", "cauchy", "relu", "seven"])
def test_entropy_is_the_least_divergence_of_a_naive_loop(name, bins, levels):
    values = DATA[name]()
    histogram = Histogram.of(values, bins)
    divergences = naive_divergences(histogram.counts, levels)
    halves = np.arange(levels // 2, bins // 2 + 1)
    # Float32 sums tell divergences apart down to a millionth.
    best = halves[divergences <= divergences.min() + 2e-6]
    ends = [float(histogram.edges[min(bins // 2 + half + 1, bins)]) for half in best]
    low, high = entropy_range(histogram, levels)
    assert high in [min(end, histogram.high) for end in ends]
    assert low >= histogram.low


def test_entropy_leaves_uniform_data_alone():
    values = DATA["uniform"]()
    assert entropy_range(Histogram.of(values)) == (values.min(), values.max())


def test_entropy_cuts_outliers():
    low, high = entropy_range(Histogram.of(DATA["outliers"]()))
    assert -50 < low < -3.5
    assert 3.5 < high < 200


def test_too_few_bins_for_the_levels_are_the_whole_range():
    values = DATA["normal"]()
    assert entropy_range(Histogram.of(values, 32)) == (values.min(), values.max())


# Squared error.


@pytest.mark.parametrize("share", [1, 0.6, 0.2])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["normal", "laplace", "relu", "gelu", "sigmoid", "student", "negative"])
def test_the_expected_error_is_the_measured_one(name, spec, share):
    """Within 5 percent: values are spread over 2048 bins, an eighth to a quarter of a step of 8 bits each."""
    values = DATA[name]()
    histogram, low, high = Histogram.of(values), share * float(values.min()), share * float(values.max())
    measured = measured_error(values, low, high, SPECS[spec])
    assert expected_error(histogram, low, high, SPECS[spec]) == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("low", "high"), [(-1.0, 2.0), (-0.3, 0.1), (0.0, 0.5), (-3.0, 0.0), (-5.0, 9.0)])
def test_the_expected_error_is_that_of_values_spread_over_their_bins(low, high, spec):
    histogram = Histogram(np.array([5, 0, 1, 7, 0, 2, 3, 11], np.int64), -1.5, 2.0, zeros=0)
    edges = np.array([-1.5, -1.5, -1.0, -0.5, 0, 0.5, 1, 1.5, 2])
    parts = [np.linspace(a, b, 40_001)[:-1] + (b - a) / 80_002 for a, b in itertools.pairwise(edges) if b > a]
    errors = [measured_error(part.astype(np.float32), low, high, SPECS[spec]) for part in parts]
    counts = histogram.counts[1:]
    # The first bin is a point: the data begin where it ends.
    point = measured_error(np.array([-1.5], np.float32), low, high, SPECS[spec])
    wanted = (counts @ np.array(errors) + histogram.counts[0] * point) / histogram.counts.sum()
    assert expected_error(histogram, low, high, SPECS[spec]) == pytest.approx(
        wanted, rel=2e-2 if "16" in spec else 2e-3
    )


def test_zeros_have_no_error():
    values = np.concatenate([np.zeros(30_000), random(1).uniform(0, 1, 10_000)]).astype(np.float32)
    histogram, spec = Histogram.of(values), ActivationSpec()
    assert expected_error(histogram, 0, 1, spec) == pytest.approx(measured_error(values, 0, 1, spec), rel=0.02)
    assert expected_error(Histogram.of(values[:30_000]), 0, 1, spec) == 0


def test_a_twelfth_of_a_squared_step_is_the_error_of_uniform_data():
    values = DATA["uniform"]()
    scale, _ = activation_grid(-1, 1, ActivationSpec())
    assert expected_error(Histogram.of(values), -1, 1, ActivationSpec()) == pytest.approx(
        float(scale) ** 2 / 12, rel=0.02
    )


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", DATA)
def test_one_candidate_is_the_whole_range(name, spec):
    values = DATA[name]()
    histogram = Histogram.of(values)
    wanted = (-histogram.limit, histogram.limit) if SPECS[spec].fp8 else (values.min(), values.max())
    assert mse_range(histogram, SPECS[spec], candidates=1) == wanted


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", DATA)
def test_the_error_never_grows_and_the_range_stays_within_the_data(name, spec):
    values = DATA[name]()
    histogram = Histogram.of(values)
    low, high = mse_range(histogram, SPECS[spec])
    whole = expected_error(histogram, float(values.min()), float(values.max()), SPECS[spec])
    assert low <= high
    assert expected_error(histogram, low, high, SPECS[spec]) <= whole
    if not SPECS[spec].fp8:
        assert min(values.min(), 0) <= low
        assert high <= max(values.max(), 0)


@pytest.mark.parametrize("spec", ["u8", "s8-sym"])
@pytest.mark.parametrize("name", ["normal", "laplace", "student", "outliers", "relu", "gelu"])
def test_the_range_is_as_good_as_the_best_of_all_pairs(name, spec):
    """Every pair of 24 shares of both ends, by the error measured on the values."""
    values, spec = DATA[name]()[-8_000:], SPECS[spec]
    low, high = mse_range(Histogram.of(values), spec)
    shares = 0.02 ** (np.arange(24) / 23)
    pairs = itertools.product(float(values.min()) * shares, float(values.max()) * shares)
    best = min(measured_error(values, *pair, spec) for pair in set(pairs))
    assert measured_error(values, low, high, spec) <= 1.03 * best


def test_one_end_is_shrunk_alone_where_only_it_has_outliers():
    values = np.concatenate([normal(500_000, 3), [np.float32(10)]])
    low, high = mse_range(Histogram.of(values), ActivationSpec())
    assert high / 10 < 0.6
    assert low / values.min() > 0.8
    low, high = mse_range(Histogram.of(values), ActivationSpec(symmetric=True))
    assert low / values.min() == pytest.approx(high / 10)


def test_16_bits_clip_almost_nothing():
    values = DATA["normal"]()
    low, high = mse_range(Histogram.of(values), ActivationSpec(16))
    assert low < 0.9 * values.min()
    assert high > 0.9 * values.max()


def test_nothing_counted_is_the_range_as_it_is():
    histogram = Histogram(np.zeros(BINS, np.int64), -1.0, 2.0)
    assert percentile_range(histogram, 99.9) == entropy_range(histogram) == (-1, 2)
    assert mse_range(histogram, ActivationSpec()) == (-1, 2)
    assert expected_error(histogram, -1, 2, ActivationSpec()) == 0


# Speed, in processor time, which others on the machine stretch less than time on the clock; the best of some runs.


def seconds(function, runs=7):
    def once():
        start = time.process_time()
        function()
        return time.process_time() - start

    return min(once() for _ in range(runs))


@pytest.mark.parametrize("pick", [entropy_range, lambda histogram: mse_range(histogram, ActivationSpec())])
def test_a_range_takes_milliseconds(pick):
    """30 ms where nothing else runs; the bound leaves room for a busy machine."""
    histogram = Histogram.of(DATA["student"]())
    assert seconds(lambda: pick(histogram)) < 0.1


@pytest.mark.parametrize("name", ["normal", "relu"])
def test_counting_is_faster_than_numpys_histogram(name):
    values = np.tile(DATA[name](), 20)
    limit = float(np.abs(values).max())
    edges = bin_edges(limit)
    ours, numpys = (
        seconds(lambda: bin_counts(values, edges), 5),
        seconds(lambda: np.histogram(values, BINS, range=(-limit, limit)), 5),
    )
    assert ours < numpys
