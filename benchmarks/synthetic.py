"""Data that a model makes itself, beside real data: how far ranges of activations and results are apart.

    python -m benchmarks.synthetic DIR [--only TEXT] [--save FILE.jsonl]

DIR holds what `python -m benchmarks.zoo.smollm2 DIR` made. Every model is compiled twice, with real calibration data
and with `--calibration synthetic`:

    digits              w8a8 --reduce-range; share of held-out pictures that get their label
    efficientnet-lite0  the same; share of crops that get the float model's class
    smollm2             w4a16-g64-asym with gptq, embedding and lm_head float; KL divergence on 16 windows of text

The first two are the unfolded forms of `benchmarks.zoo.digits` and `benchmarks.zoo.efficientnet`.

Ranges are those of all quantized activations in the reports; their difference is that of the widths, high - low, as a
share of the width on real data. Data is of 32 rows, but for the pictures that are made for EfficientNet: 16.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.peers.environments import run
from benchmarks.rows import collect, markdown, row_options
from benchmarks.run_all import FLOAT_ENDS, WINDOWS, compile_command
from benchmarks.yardstick import score
from benchmarks.zoo import digits, efficientnet

SYNTHETIC = "synthetic"
ROWS = 32
# Without VNNI 8-bit weights saturate sums of two products, which has nothing to do with data.
INTEGERS = ("w8a8", "--reduce-range")


@dataclass(frozen=True)
class Subject:
    """A model.

    Attributes:
        model: Returns the float model.
        data: Returns real calibration data.
        rows: How many rows to make; of real data 32 are taken.
        options: The scheme, then other options of the command.
        name: What is measured.
        figure: Measures it, of an .onnx path.
    """

    model: Callable[[], Path]
    data: Callable[[], Path]
    rows: int
    options: tuple[str, ...]
    name: str
    figure: Callable[[Path], float]


@dataclass(frozen=True)
class Result:
    """A row of the table: a figure with real data and with synthetic data, and how far ranges are apart."""

    model: str
    figure: str
    real: float
    synthetic: float
    mean_difference: float | None
    worst_difference: float | None
    real_seconds: float
    synthetic_seconds: float
    description: str


def subjects(bench: Path) -> dict[str, Subject]:
    """The models by name; `bench` is the folder of the language model."""
    language = ("w4a16-g64-asym", *FLOAT_ENDS, "--algorithm", "gptq")
    return {
        "digits": Subject(
            lambda: digits.exported_digits("unfolded"),
            lambda: digits.training_data()[0],
            ROWS,
            INTEGERS,
            "right labels",
            digits.accuracy,
        ),
        "efficientnet-lite0": Subject(
            lambda: efficientnet.exported_efficientnet(unfolded=True),
            efficientnet.calibration_folder,
            ROWS // 2,
            INTEGERS,
            "same class",
            efficientnet.picture_agreement,
        ),
        "smollm2": Subject(
            lambda: bench / "onnx" / "model.onnx",
            lambda: bench / "brown_train.npy",
            ROWS,
            language,
            "KL, nats",
            lambda model: score(model, bench, WINDOWS).kl,
        ),
    }


def measure(work: Path, name: str, subject: Subject) -> Result:
    """Compile a model both ways, and compare."""
    figures, seconds, reports = [], [], []
    for data, rows in ((subject.data(), ROWS), (SYNTHETIC, subject.rows)):
        out = work / "model.onnx"
        scheme, *more = subject.options
        options = [*more, "--calibration", data, "--samples", str(rows), "--no-verify"]
        cost = run(compile_command(subject.model(), scheme, options, out), work / "log")
        reports.append(json.loads(out.with_suffix(".report.json").read_text("utf-8")))
        figures.append(subject.figure(out))
        seconds.append(cost.seconds)
    apart = differences(*reports)
    summary = (float(np.mean(apart)), float(np.max(apart))) if apart else (None, None)
    return Result(name, subject.name, *figures, *summary, *seconds, reports[1]["calibration"]["description"])


def differences(real: Mapping[str, list], synthetic: Mapping[str, list]) -> list[float]:
    """How far the widths of ranges in two reports are apart, as shares of those of the first."""
    widths = [
        {row["value"]: row["high"] - row["low"] for row in report["activations"] if row["high"] is not None}
        for report in (real, synthetic)
    ]
    return [abs(widths[1][value] - width) / width for value, width in widths[0].items() if value in widths[1] and width]


def ways(bench: Path, work: Path) -> Iterator[tuple[str, Callable[[], Result]]]:
    """What each row is called, and how to get it."""
    for name, subject in subjects(bench).items():
        yield name, partial(measure, work, name, subject)


def table(results: list[Result]) -> str:
    """The rows as Markdown."""
    rows = []
    for r in results:
        apart = ["" if share is None else f"{100 * share:.1f} %" for share in (r.mean_difference, r.worst_difference)]
        figures = [f"{r.real:.4f}", f"{r.synthetic:.4f}"]
        rows.append([r.model, r.figure, *figures, *apart, f"{r.real_seconds:.0f}", f"{r.synthetic_seconds:.0f}"])
    titles = ["model", "figure", "real data", "synthetic", "ranges differ by", "at worst", "s, real", "s, synthetic"]
    return markdown(titles, rows, 2)


def main() -> None:
    """Measure the rows asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path, metavar="DIR", help="made by benchmarks.zoo.smollm2")
    row_options(parser, "efficientnet")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        results = collect(ways(args.bench, Path(work)), args.only, args.save)
    print(table(results))


if __name__ == "__main__":
    main()
