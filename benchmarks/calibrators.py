"""Our ranges of activations beside those of ONNX Runtime's calibrators, and the memory that calibration takes.

Both get the same data: activations as ONNX Runtime's calibrators see them when they run a real model, and made-up ones.
ONNX Runtime gets all of it in one call, since it blurs histograms when it merges those of several calls; ours gets it
batch by batch, as always. The two have to agree to the last bit, but for percentiles that leave nothing but one bin:
there ONNX Runtime's range ends before it begins, and ours where it begins.
"""

import contextlib
import io
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from benchmarks.int8 import SUBJECTS
from benchmarks.peers.environments import Cost, run
from qcompiler.numerics.ranges import BINS, Histogram, entropy_range, percentile_range
from qcompiler.ranges import HistogramOf, MinMax
from qcompiler.session import Feeds

__all__ = ["Memory", "Ranges", "memory", "ranges"]

# Percent, but 100: there our range is that of the data, and ONNX Runtime's that of its last but one edge.
PERCENTILES, LEVELS = (99.999, 99.99, 99.9, 99.0), 128
FEWER, MORE = 100, 10_000
# What more samples may take beside what is theirs: numbers of rows, and what the allocator holds back.
SLACK_MB = 32.0
# A subject; the operators whose inputs and outputs are calibrated (not MiniLM's Softmax: ONNX Runtime fails on the mask
# of -3.4e38); the size that its inputs' last axis is cut to.
_REAL = (("minilm-opset21", ("Gelu",), 24), ("ocr-recognition", ("HardSigmoid", "Softmax"), 320))
_FEEDS = 8
# A small network, so that what samples take shows: rows and columns of one, and layers.
_ROWS, _WIDTH, _LAYERS = 64, 64, 4
_SAMPLES_MB = MORE * _ROWS * _WIDTH * 4 / 1e6
_LIMIT_MB = 200
# Options, and the most that the larger compilation may take, given what the smaller one took. Rounding to nearest needs
# ranges alone. GPTQ keeps the activations between two levels for all samples, while it advances those of both.
_WAYS: Mapping[str, tuple[Sequence[str], Callable[[float], float]]] = {
    "rtn": (("--algorithm", "rtn"), lambda peak: peak + SLACK_MB),
    "default": ((), lambda peak: peak + 2 * _SAMPLES_MB + SLACK_MB),
    f"default, --max-memory {_LIMIT_MB}MB": (("--max-memory", f"{_LIMIT_MB}MB"), lambda peak: _LIMIT_MB + SLACK_MB),
}

Range = tuple[float, float]


@dataclass(frozen=True)
class Ranges:
    """A row of the fourth table.

    Attributes:
        data: What was calibrated on.
        method: The calibrator.
        values: How many tensors.
        equal: How many of these have the same range.
        mended: How many of these ONNX Runtime lets end before they begin, and ours end there.
        difference: The largest difference of an end, as a share of the range.
    """

    data: str
    method: str
    values: int
    equal: int
    mended: int
    difference: float

    @property
    def holds(self) -> bool:
        """Whether all are equal."""
        return self.values == self.equal > 0


@dataclass(frozen=True)
class Memory:
    """A row of the fifth table: the whole command with few and with many samples.

    Attributes:
        way: The command's options.
        seconds: Of the two.
        peak_mb: Peak anonymous memory of the two.
        most_mb: What the second may take.
    """

    way: str
    seconds: tuple[float, float]
    peak_mb: tuple[float, float]
    most_mb: float

    @property
    def holds(self) -> bool:
        """Whether memory grows no more with the samples than it has to."""
        return self.peak_mb[1] <= self.most_mb


def ranges(only: str) -> Iterator[Ranges]:
    """The rows of the fourth table whose names hold a text."""
    for data, operators, size in _REAL:
        if only in f"{data} calibrators":
            feeds = _cut(sorted(SUBJECTS[data].calibration().glob("*.npz"))[:_FEEDS], size)
            yield from _on_model(data, SUBJECTS[data].model(), operators, feeds)
    if only in "made-up calibrators":
        made_up = _made_up()
        for method, pick in _methods():
            if method != "minmax":
                theirs = {name: _collected(method, np.concatenate(arrays)) for name, arrays in made_up.items()}
                yield _row("made up", method, theirs, {name: pick(arrays) for name, arrays in made_up.items()})


def memory(only: str) -> Iterator[Memory]:
    """The rows of the fifth table whose names hold a text."""
    for way, (options, most) in _WAYS.items():
        if only in f"{way} memory":
            with tempfile.TemporaryDirectory() as work:
                fewer, more = (_compile(options, samples, Path(work)) for samples in (FEWER, MORE))
            peaks = fewer.peak_mb, more.peak_mb
            yield Memory(way, (fewer.seconds, more.seconds), peaks, most(fewer.peak_mb))


def _compile(options: Sequence[str], samples: int, work: Path) -> Cost:
    """Compile a small network on that many samples, each of 16 kB; what it took."""
    rng = np.random.default_rng(0)
    np.save(work / "samples.npy", rng.standard_normal((samples, _ROWS, _WIDTH), np.float32))
    weights = [
        numpy_helper.from_array(rng.standard_normal((_WIDTH, _WIDTH), np.float32) / 8, f"w{layer}")
        for layer in range(_LAYERS)
    ]
    nodes, value = [], "x"
    for layer, weight in enumerate(weights):
        nodes.append(helper.make_node("MatMul", [value, weight.name], [f"m{layer}"], name=f"layer{layer}"))
        nodes.append(helper.make_node("Relu", [f"m{layer}"], [value := f"r{layer}"]))
    ends = [helper.make_tensor_value_info(name, 1, ["N", _ROWS, _WIDTH]) for name in ("x", value)]
    graph = helper.make_graph(nodes, "network", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), work / "net.onnx")
    files = ("--calibration", work / "samples.npy", "-o", work / "out.onnx", work / "net.onnx")
    command = (sys.executable, "-m", "qcompiler", "compile", "--scheme", "w8a8", "--no-verify", "--force")
    return run([*command, *files, *options], work / "log")


def _cut(files: Sequence[Path], size: int) -> list[Feeds]:
    """Feeds of one shape: those that are long enough, cut along their last axis."""
    feeds = [dict(np.load(file)) for file in files]
    return [
        {name: array[..., :size] for name, array in feed.items()}
        for feed in feeds
        if min(array.shape[-1] for array in feed.values()) >= size
    ]


def _methods() -> Iterator[tuple[str, Callable[[Sequence[np.ndarray]], Range]]]:
    """Our calibrators that ONNX Runtime has too, as functions of a tensor's batches."""
    yield "minmax", _ends
    for percent in PERCENTILES:
        yield f"percentile {percent}", partial(_percentile, percent)
    yield "entropy", lambda arrays: entropy_range(_histogram(arrays), LEVELS)


def _percentile(percent: float, arrays: Sequence[np.ndarray]) -> Range:
    return percentile_range(_histogram(arrays), percent)


def _ends(arrays: Sequence[np.ndarray]) -> Range:
    """The smallest and the largest value."""
    collector = MinMax()
    for array in arrays:
        collector.add(collector.part(array))
    found = collector.range()
    return found.low, found.high


def _histogram(arrays: Sequence[np.ndarray]) -> Histogram:
    """Of all batches."""
    collector = HistogramOf(*_ends(arrays))
    for array in arrays:
        collector.add(collector.part(array))
    return collector.histogram()


def _on_model(data: str, model: Path, operators: Sequence[str], feeds: Sequence[Feeds]) -> Iterator[Ranges]:
    """The rows about what some operators of a model read and write."""
    with tempfile.TemporaryDirectory() as work:
        place = Path(work) / "augmented.onnx"
        # The outputs of this one are the values themselves.
        session = _calibrater("entropy", model, operators, place).infer_session
        names = [value.name for value in session.get_outputs()]
        runs = [dict(zip(names, session.run(None, feed), strict=True)) for feed in feeds]
        for method, pick in _methods():
            calibrater = _calibrater(method, model, operators, place)
            with contextlib.redirect_stdout(io.StringIO()):
                calibrater.collect_data(_Reader(feeds))
                found = calibrater.compute_data().data
            ends = {name: [float(np.squeeze(end)) for end in each.range_value] for name, each in found.items()}
            theirs = {name: (low, high) for name, (low, high) in ends.items()}
            yield _row(data, method, theirs, {name: pick([each[name] for each in runs]) for name in theirs})


def _calibrater(method: str, model: Path, operators: Sequence[str], place: Path) -> Any:
    """ONNX Runtime's calibrator of a model, ready to run."""
    from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator

    name, _, percent = method.partition(" ")
    kind = {"minmax": CalibrationMethod.MinMax, "percentile": CalibrationMethod.Percentile}
    options: dict[str, Any] = {"symmetric": False, "num_bins": BINS, "num_quantized_bins": LEVELS}
    options |= {"percentile": float(percent)} if percent else {}
    return create_calibrator(
        model, operators, str(place), kind.get(name, CalibrationMethod.Entropy), extra_options=options
    )


class _Reader:
    """Feeds one after the other, as ONNX Runtime's calibrators ask for them."""

    def __init__(self, feeds: Sequence[Feeds]) -> None:
        """Start at the first."""
        self._feeds = iter(feeds)

    def get_next(self) -> Feeds | None:
        """Return the next feed, None after the last one."""
        return next(self._feeds, None)


def _collected(method: str, values: np.ndarray) -> Range:
    """The range that ONNX Runtime's histograms give for an array."""
    from onnxruntime.quantization.calibrate import HistogramCollector

    name, _, percent = method.partition(" ")
    collector = HistogramCollector(name, False, BINS, LEVELS, float(percent or 100), "same")
    with contextlib.redirect_stdout(io.StringIO()):
        collector.collect({"x": values})
        low, high = collector.compute_collection_result()["x"][:2]
    return float(low), float(high)


def _row(data: str, method: str, theirs: Mapping[str, Range], ours: Mapping[str, Range]) -> Ranges:
    wanted = {name: (low, max(low, high)) for name, (low, high) in theirs.items()}
    equal = [name for name in wanted if ours[name] == wanted[name]]
    mended = sum(wanted[name] != theirs[name] for name in equal)
    widths = {name: (high - low) or 1.0 for name, (low, high) in wanted.items()}
    shares = [abs(a - b) / widths[name] for name in wanted for a, b in zip(ours[name], wanted[name], strict=True)]
    return Ranges(data, method, len(wanted), len(equal), mended, max(shares, default=0.0))


def _made_up() -> dict[str, list[np.ndarray]]:
    """Distributions of many kinds, each in batches of unlike size."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(60_000)
    arrays = {
        "normal": normal,
        "relu": np.maximum(normal, 0),
        "gelu": normal * (1 + np.tanh(0.797885 * (normal + 0.044715 * normal**3))) / 2,
        "sigmoid": 1 / (1 + np.exp(-4 * normal)),
        "heavy tails": rng.standard_t(3, 60_000),
        "outliers": np.concatenate([normal, [200.0, -50.0]]),
        "uniform": rng.uniform(-1, 1, 60_000),
        "far from zero": 3 + rng.random(5_000),
    }
    sizes = (1, 1_000, 4_000)
    return {name: np.split(array.astype(np.float32), sizes) for name, array in arrays.items()}
