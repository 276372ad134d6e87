"""Pruned weights of an encoder: magnitudes, Optimal Brain Damage and Optimal Brain Surgeon, alone and with 4-bit codes.

    python -m benchmarks.pruning [--only TEXT] [--save FILE.jsonl]

The encoder is MiniLM (`benchmarks.zoo.minilm`, opset 21); half of the values of its 36 linear layers become zero, or
all but two of each four, calibrated on 128 texts. The loss is that of a layer's products as a share of their energy,
the mean over layers as each is pruned behind those before; figures of sentence embeddings are those of
`benchmarks.encoder_weights`. With 4-bit codes GPTQ rounds what is left. The exit code is 1 if the methods are not in
the order of what they know.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.peers.environments import run
from benchmarks.rows import collect, markdown, row_options
from benchmarks.run_all import compile_command
from benchmarks.zoo import minilm

# From the one that knows least to the one that knows most.
METHODS = ("magnitude", "obd", "obs")
SCHEMES = ("sparse50", "sparse2:4", "sparse2:4+w4a16-g64")


@dataclass(frozen=True)
class Result:
    """A row of the table; `loss` is the mean over layers, `error` 1 - cosine, the mean over texts."""

    scheme: str
    method: str
    zeros: float
    loss: float
    error: float
    retrieval: float
    mb: float
    seconds: float
    peak_mb: float


def measure(work: Path, scheme: str, method: str) -> Result:
    """Compile the encoder in a way, and take its figures."""
    out = work / "pruned.onnx"
    shared = ("--embedding", "float", "--calibration", minilm.calibration_folder(), "--no-verify")
    way = f"prune{{method={method}}}" + (",gptq" if "+" in scheme else "")
    command = compile_command(minilm.exported_minilm(), scheme, [*shared, "--algorithm", way], out)
    cost = run(command, work / "log")
    report = json.loads(out.with_suffix(".report.json").read_text("utf-8"))
    metrics = [row["metrics"] for row in report["sites"] if "zeros" in row["metrics"]]
    expected, found = minilm.compared_embeddings(out)
    size = sum(file.stat().st_size for file in (out, out.with_name(f"{out.name}.data")) if file.exists())
    return Result(
        scheme,
        method,
        zeros=float(np.mean([each["zeros"] for each in metrics])),
        loss=float(np.mean([each["pruning_loss"] for each in metrics])),
        error=float(1 - np.sum(expected * found, axis=1, dtype=np.float64).mean()),
        retrieval=minilm.retrieval_accuracy(out),
        mb=size / 1e6,
        seconds=cost.seconds,
        peak_mb=cost.peak_mb,
    )


def ways(work: Path) -> Iterator[tuple[str, Callable[[], Result]]]:
    """What each row is called, and how to get it."""
    for scheme in SCHEMES:
        for method in METHODS:
            yield f"{scheme} {method}", partial(measure, work, scheme, method)


def table(results: list[Result]) -> str:
    """The rows as Markdown."""
    rows = [
        [r.scheme, r.method, f"{r.zeros:.3f}", f"{r.loss:.4f}", f"{r.error:.4f}", f"{r.retrieval:.3f}", f"{r.mb:.1f}",
         f"{r.seconds:.0f}", f"{r.peak_mb:.0f}"]
        for r in results
    ]  # fmt: skip
    titles = ["scheme", "method", "zeros", "loss of layers", "1 - cosine", "retrieval", "MB", "seconds", "peak MB"]
    return markdown(titles, rows, 2)


def main() -> None:
    """Measure the rows asked for, print the table and what is out of order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    row_options(parser, "2:4 or obs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        results = collect(ways(Path(work)), args.only, args.save)
    print(table(results))
    wrong = False
    for scheme in SCHEMES:
        losses = [(r.loss, r.method) for r in results if r.scheme == scheme]
        if losses != sorted(losses, reverse=True):
            print(f"FAILS: {scheme}: losses are {losses}")
            wrong = True
    sys.exit(wrong)


if __name__ == "__main__":
    main()
