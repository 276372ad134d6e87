"""ONNX Runtime's int8 quantizers on small models: what is left of the figures, how fast they run, what it took.

    python -m benchmarks.peers.ort_int8 [--only TEXT] [--repeat N] [--save FILE.jsonl]

Four ways, each after ONNX Runtime's own preparation:

    static            QDQ around every operator that it knows, one scale a weight: the defaults
    static-channel    one scale an output channel
    static-linears    that around Conv, Gemm, MatMul and a Clip after them only, so that no attention mask is rounded
    dynamic           weights ahead, activations as they come; no data

Latency is a ratio to the float model, taken in turns on two cores at most. Prints a Markdown table.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.peers.environments import Cost, run
from benchmarks.zoo import efficientnet, minilm
from qcompiler.bench import bench

WAYS = ("static", "static-channel", "static-linears", "dynamic")
_WORKER = Path(__file__).with_name("ort_int8_worker.py")


@dataclass(frozen=True)
class Subject:
    """A model to quantize.

    Attributes:
        model: Returns the float model.
        calibration: Returns a folder of .npz files.
        feeds: Returns the inputs that latency is measured on.
        figures: By name, functions of an .onnx path.
    """

    model: Callable[[], Path]
    calibration: Callable[[], Path]
    feeds: Callable[[], dict[str, np.ndarray]]
    figures: Mapping[str, Callable[[Path], float]]


@dataclass(frozen=True)
class Result:
    """A row of the table; `ratio` is the latency over the float model's, with its quartiles."""

    model: str
    way: str
    figures: dict[str, float]
    ratio: tuple[float, float, float]
    mb: float
    cost: Cost


def _verses() -> dict[str, np.ndarray]:
    return minilm.feeds([old for old, _ in minilm.verses()[:16]])


def _crops() -> dict[str, np.ndarray]:
    return {"image": efficientnet.crops(efficientnet.MEASURED, 4, seed=0)}


_MINILM = (minilm.calibration_folder, _verses, minilm.FIGURES)
_LITE0 = (efficientnet.calibration_folder, _crops, efficientnet.FIGURES)
SUBJECTS = {
    "minilm-opset21": Subject(minilm.exported_minilm, *_MINILM),
    "minilm-opset14": Subject(lambda: minilm.exported_minilm("opset14"), *_MINILM),
    "efficientnet-lite0": Subject(efficientnet.exported_efficientnet, *_LITE0),
}


def quantize(model: Path, way: str, calibration: Path, out: Path) -> Cost:
    """Quantize a model in a process of its own.

    Args:
        model: The float model.
        way: One of `WAYS`.
        calibration: Folder of .npz files, each with the model's inputs by name.
        out: Where the result goes; its log goes beside it.

    Returns:
        What the whole command took.
    """
    return run([sys.executable, _WORKER, model, way, calibration, out], out.with_suffix(".log"))


def measure(name: str, way: str, out: Path, repeat: int) -> Result:
    """Quantize a subject and take its figures."""
    subject = SUBJECTS[name]
    source = subject.model()
    cost = quantize(source, way, subject.calibration(), out)
    latency = bench([source, out], subject.feeds(), repeat, threads=2)[1]
    figures = {figure: function(out) for figure, function in subject.figures.items()}
    return Result(name, way, figures, latency[1:], out.stat().st_size / 1e6, cost)


def table(results: list[Result]) -> str:
    """The rows of models with the same figures, under a heading of their own."""
    lines: list[str] = []
    heading: list[str] = []
    for r in results:
        if list(r.figures) != heading:
            heading = list(r.figures)
            titles = ["model", "way", *(name.replace("_", " ") for name in heading)]
            lines += ["", "| " + " | ".join([*titles, "latency ratio", "MB", "seconds", "peak MB"]) + " |"]
            lines.append("|---|---|" + "---:|" * (len(heading) + 4))
        values = [f"{value:.4f}" for value in r.figures.values()]
        ratio = "{:.2f} ({:.2f} to {:.2f})".format(*r.ratio)
        costs = [f"{r.mb:.1f}", f"{r.cost.seconds:.0f}", f"{r.cost.peak_mb:.0f}"]
        lines.append("| " + " | ".join([r.model, r.way, *values, ratio, *costs]) + " |")
    return "\n".join(lines[1:])


def main() -> None:
    """Measure the rows whose names hold the text asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose names hold this, e.g. 'lite0 dynamic'")
    parser.add_argument("--repeat", type=int, default=20, help="rounds in which latency is measured")
    parser.add_argument("--save", type=Path, metavar="FILE", help="append each row to this file as a line of JSON")
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as work:
        for name in SUBJECTS:
            for way in WAYS:
                if args.only not in f"{name} {way}":
                    continue
                results.append(measure(name, way, Path(work) / f"{name}-{way}.onnx", args.repeat))
                print(results[-1], file=sys.stderr, flush=True)
                if args.save:
                    with args.save.open("a", encoding="utf-8") as lines:
                        lines.write(json.dumps(asdict(results[-1])) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
