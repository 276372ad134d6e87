"""4-bit weights on an encoder: our efforts and every technique, beside ONNX Runtime's own quantizers of weights.

    python -m benchmarks.encoder_weights [--only TEXT] [--save FILE.jsonl] [--algorithm TEXT...]

The encoder is MiniLM (`benchmarks.zoo.minilm`, opset 21), its 36 linear layers at 4 bits in groups of 64, asymmetric;
lookup tables stay float. Ours calibrate on 128 texts. Figures are of sentence embeddings of 500 other texts: 1 - cosine
to the float model's, the mean and the worst; SQNR in dB, which grows by 3 where the mean error is halved; the share of
1,000 verses that find their translation. Time and peak anonymous memory are those of the whole command, unverified.

    effort ...       ours: --effort fast, balanced or best
    onnxruntime ...  ONNX Runtime's round-to-nearest and k_quant, same layers and groups
    technique ...    ours: each --algorithm of `benchmarks.techniques` that is not for language models alone

Prints a Markdown table, and what the errors of our best are of those of round-to-nearest and k_quant.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.peers.environments import Cost, run
from benchmarks.peers.gptq import ort
from benchmarks.rows import collect, markdown, row_options
from benchmarks.run_all import compile_command
from benchmarks.techniques import SCHEME, TECHNIQUES
from benchmarks.zoo import minilm
from qcompiler.numerics.metrics import sqnr_db

BEST = "effort best"
BESIDE = ("effort fast", "onnxruntime rtn", "onnxruntime k_quant")  # what BEST is compared with
_KINDS = {"onnxruntime rtn": "asym", "onnxruntime k_quant": "k_quant"}


@dataclass(frozen=True)
class Result:
    """A row of the table; `error` and `worst` are 1 - cosine, the mean over texts and the largest."""

    way: str
    error: float
    worst: float
    sqnr_db: float
    retrieval: float
    mb: float
    seconds: float
    peak_mb: float


def ours(work: Path, options: tuple[str, ...]) -> tuple[Cost, Path]:
    """`qcompile` with lookup tables left float."""
    out = work / "ours.onnx"
    shared = ("--embedding", "float", "--calibration", minilm.calibration_folder(), "--no-verify")
    return run(compile_command(minilm.exported_minilm(), SCHEME, [*shared, *options], out), work / "log"), out


def measure(way: str, make: Callable[[], tuple[Cost, Path]]) -> Result:
    """Quantize the encoder in a way, and take its figures."""
    cost, model = make()
    expected, found = minilm.compared_embeddings(model)
    cosines = np.sum(expected * found, axis=1, dtype=np.float64)
    size = sum(file.stat().st_size for file in (model, model.with_name(f"{model.name}.data")) if file.exists())
    return Result(
        way,
        error=float(1 - cosines.mean()),
        worst=float(1 - cosines.min()),
        sqnr_db=sqnr_db(expected, found),
        retrieval=minilm.retrieval_accuracy(model),
        mb=size / 1e6,
        seconds=cost.seconds,
        peak_mb=cost.peak_mb,
    )


def ways(work: Path, algorithms: list[str]) -> Iterator[tuple[str, Callable[[], Result]]]:
    """What each row is called, and how to get it; `algorithms` are rows beyond those of `benchmarks.techniques`."""
    made: dict[str, Callable[[], tuple[Cost, Path]]] = {
        f"effort {effort}": partial(ours, work, ("--effort", effort)) for effort in ("fast", "balanced", "best")
    }
    made |= {way: partial(ort, minilm.exported_minilm(), work, kind) for way, kind in _KINDS.items()}
    named = [each.algorithm for each in TECHNIQUES if "distill" not in each.algorithm]
    made |= {f"technique {text}": partial(ours, work, ("--algorithm", text)) for text in (*named, *algorithms)}
    for way, make in made.items():
        yield way, partial(measure, way, make)


def table(results: list[Result]) -> str:
    """The rows as Markdown."""
    rows = []
    for r in results:
        errors = [f"{r.error:.5f}", f"{r.worst:.4f}", f"{r.sqnr_db:.2f}", f"{r.retrieval:.3f}"]
        rows.append([r.way, *errors, f"{r.mb:.1f}", f"{r.seconds:.0f}", f"{r.peak_mb:.0f}"])
    titles = ["way", "1 - cosine", "worst", "SQNR, dB", "retrieval", "MB", "seconds", "peak MB"]
    return markdown(titles, rows, 1)


def ratios(results: list[Result]) -> dict[str, float]:
    """The error of our best over that of each of `BESIDE`, where both are known; 0.5 is half."""
    errors = {r.way: r.error for r in results}
    known = [way for way in BESIDE if way in errors and BEST in errors]
    return {way: round(errors[BEST] / errors[way], 3) for way in known}


def main() -> None:
    """Measure the rows asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    row_options(parser, "effort, onnxruntime or drift")
    parser.add_argument("--algorithm", action="append", default=[], metavar="TEXT", help="one more row; repeatable")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        results = collect(ways(Path(work), args.algorithm), args.only, args.save)
    print(table(results))
    if ratios(results):
        print(json.dumps({"our best over": ratios(results)}))


if __name__ == "__main__":
    main()
