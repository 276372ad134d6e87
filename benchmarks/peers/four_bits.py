"""4-bit weights of a language model: our efforts beside llm-compressor's GPTQ and auto-round, same rows, same machine.

    python -m benchmarks.peers.four_bits DIR [--only TEXT] [--save FILE.jsonl] [--iterations N] [--rows N]

DIR holds what `python -m benchmarks.zoo.smollm2 DIR` made. Groups of 64, symmetric and asymmetric; lookup table and
lm_head stay float. Each tool calibrates on the same rows of 512 tokens and runs as it comes, ours with verification; a
peer's dequantized weights are put into the float ONNX model to be measured: KL divergence from it and top-1 agreement
on 16 windows of other text. Time and peak anonymous memory are those of the whole command. Prints a Markdown table and
what our best is of auto-round, in KL and in time. Peers are installed into environments of their own.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.peers.environments import Cost, environment, run
from benchmarks.peers.gptq import HERE, ROWS, figures, llmcompressor, with_weights
from benchmarks.rows import collect, markdown, row_options
from benchmarks.run_all import FLOAT_ENDS, compile_command

ITERATIONS = 200  # auto-round's default
KINDS = ("sym", "asym")
BEST, AUTO_ROUND = "ours, best", "auto-round"


@dataclass(frozen=True)
class Result:
    """A row of the table; `kind` is "sym" or "asym"."""

    tool: str
    kind: str
    kl: float
    top1: float
    seconds: float
    peak_mb: float


def auto_round(bench: Path, work: Path, kind: str, rows: int, iterations: int) -> tuple[Cost, Path]:
    """auto-round's learned rounding; its weights are put into the float ONNX model to be measured."""
    weights = work / f"autoround-{kind}.npz"
    command = [environment("auto-round"), HERE / "autoround_worker.py", bench / "hf", bench / "brown_train.npy",
               str(rows), "64", kind, str(iterations), weights]  # fmt: skip
    cost = run(command, weights.with_suffix(".log"))
    return cost, with_weights(bench, weights)


def ours(bench: Path, work: Path, kind: str, rows: int, effort: str) -> tuple[Cost, Path]:
    """`qcompile` as a user types it, but for what is left float as the peers leave it."""
    out = work / f"ours-{effort}-{kind}.onnx"
    data = ("--calibration", bench / "brown_train.npy", "--samples", str(rows))
    options = [*FLOAT_ENDS, *data, "--effort", effort]
    source = bench / "onnx" / "model.onnx"
    return run(compile_command(source, f"w4a16-g64-{kind}", options, out), out.with_suffix(".log")), out


def ways(bench: Path, work: Path, rows: int, iterations: int) -> Iterator[tuple[str, Callable[[], Result]]]:
    """What each row is called, and how to get it; the slowest come last."""
    tools: dict[str, Callable[[str], tuple[Cost, Path]]] = {
        "ours, balanced": lambda kind: ours(bench, work, kind, rows, "balanced"),
        "llm-compressor, GPTQ": lambda kind: llmcompressor(bench, work, kind, rows),
        BEST: lambda kind: ours(bench, work, kind, rows, "best"),
        AUTO_ROUND: lambda kind: auto_round(bench, work, kind, rows, iterations),
    }

    def get(tool: str, kind: str) -> Result:
        cost, model = tools[tool](kind)
        return Result(tool, kind, **figures(bench, model), seconds=cost.seconds, peak_mb=cost.peak_mb)

    for tool in tools:
        for kind in KINDS:
            yield f"{tool} {kind}", partial(get, tool, kind)


def table(results: list[Result]) -> str:
    """The rows as Markdown."""
    rows = [[r.tool, r.kind, f"{r.kl:.4f}", f"{r.top1:.3f}", f"{r.seconds:.0f}", f"{r.peak_mb:.0f}"] for r in results]
    return markdown(["tool", "w4 g64", "KL, nats", "top-1", "seconds", "peak MB"], rows, 2)


def ratios(results: list[Result]) -> dict[str, dict[str, float]]:
    """Our best over auto-round, in KL and in time, for each kind that both were run for; below 1 is better than it."""
    found = {(r.tool, r.kind): r for r in results}
    return {
        kind: {
            "kl_ratio": round(found[BEST, kind].kl / found[AUTO_ROUND, kind].kl, 3),
            "time_ratio": round(found[BEST, kind].seconds / found[AUTO_ROUND, kind].seconds, 3),
        }
        for kind in KINDS
        if {(BEST, kind), (AUTO_ROUND, kind)} <= found.keys()
    }


def main() -> None:
    """Run the tools whose rows are asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path, metavar="DIR", help="made by benchmarks.zoo.smollm2")
    row_options(parser, "'auto-round sym'")
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="of auto-round (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=ROWS, help="of calibration text (default: %(default)s)")
    parser.add_argument("--work", type=Path, help="folder for outputs and logs, kept")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        results = collect(ways(args.bench, work, args.rows, args.iterations), args.only, args.save)
    print(table(results))
    for kind, found in ratios(results).items():
        print(json.dumps({"our best over auto-round": kind, **found}))


if __name__ == "__main__":
    main()
