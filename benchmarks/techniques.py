"""Every technique for 4-bit weights, alone and added to others: what each is worth to a language model, and its price.

    python -m benchmarks.techniques DIR [--only TEXT] [--save FILE.jsonl] [--scheme SCHEME] [--algorithm TEXT...]

DIR holds what `python -m benchmarks.zoo.smollm2 DIR` made. Each row is `qcompile` with the row's --algorithm on 32 rows
of calibration text, lookup table and lm_head float: KL divergence from the float model and top-1 agreement on 16
windows of other text, time and peak anonymous memory of the whole command without verification. The recipes behind
--effort hold what earned its place here. All rows take hours; --only selects by label or algorithm, and --algorithm
adds a row.
"""

import argparse
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.peers.environments import run
from benchmarks.rows import collect, markdown, row_options
from benchmarks.run_all import FLOAT_ENDS, ROWS_OF_TEXT, WINDOWS, compile_command
from benchmarks.yardstick import score

SCHEME = "w4a16-g64-asym"


@dataclass(frozen=True)
class Technique:
    """A row: what it is called, and the option --algorithm."""

    label: str
    algorithm: str

    @property
    def name(self) -> str:
        """What `--only` looks at."""
        return f"{self.label}: {self.algorithm}"


TECHNIQUES = (
    Technique("round to nearest", "rtn"),
    Technique("clipped grids", "rtn{clip=true}"),
    Technique("half-quadratic grids", "hqq"),
    Technique("scaled columns", "awq,rtn"),
    Technique("scaled columns, clipped grids", "awq{clip=true},rtn{clip=true}"),
    Technique("scaled columns and rows", "awq{duo=true},rtn"),
    Technique("smoothed channels", "smoothquant{alpha=0.5},rtn"),
    Technique("rotations", "rotate,rtn"),
    Technique("second order", "gptq"),
    Technique("second order, min-max grids", "gptq{clip=false}"),
    Technique("second order, columns in order", "gptq{act_order=false}"),
    Technique("second order, refined", "gptq{refine=2}"),
    Technique("second order, half the drift", "gptq{drift=0.5}"),
    Technique("second order, all drift", "gptq{drift=1}"),
    Technique("learned rounding", "learned_rounding"),
    Technique("scaled columns, second order", "awq,gptq"),
    Technique("rotations, second order", "rotate,gptq"),
    Technique("rotations of heads, second order", "rotate{r1=never},gptq"),
    Technique("rotations, second order, drift", "rotate,gptq{drift=0.5}"),
    Technique("scaled columns, second order, drift", "awq,gptq{drift=0.5}"),
    Technique("second order, drift, refined", "gptq{drift=0.5,refine=2}"),
    Technique("second order, guided by the answer", "gptq{guided=true}"),
    Technique("second order, guided, drift", "gptq{drift=0.8,guided=true}"),
    Technique("scaled columns, second order, guided, drift", "awq,gptq{drift=0.8,guided=true}"),
    Technique("the same with more damping", "awq,gptq{drift=0.8,guided=true,percdamp=0.2}"),
    Technique("rotations, second order, guided, drift", "rotate,gptq{drift=0.8,guided=true}"),
    Technique("the same, refined", "awq,gptq{drift=0.8,guided=true,percdamp=0.2,refine=1}"),
    Technique("columns in order", "reorder,rtn"),
    Technique("columns in order, second order", "reorder,gptq"),
    Technique("columns in order at no cost, second order", "reorder{gather=false},gptq"),
    Technique(
        "columns scaled and in order at no cost, second order, guided, drift, refined",
        "awq,reorder{gather=false},gptq{drift=0.8,guided=true,percdamp=0.2,refine=1}",
    ),
    Technique(
        "columns scaled and in order, second order, guided, drift, refined",
        "awq,reorder,gptq{drift=0.8,guided=true,percdamp=0.2,refine=1}",
    ),
    Technique("second order, learned", "gptq,learned_rounding"),
    Technique("second order, drift, learned", "gptq{drift=0.5},learned_rounding"),
    Technique("second order, distilled", "gptq,learned_rounding{distill=100}"),
    Technique("second order, drift, distilled", "gptq{drift=0.5},learned_rounding{distill=100}"),
    Technique("rotations, second order, drift, distilled", "rotate,gptq{drift=0.5},learned_rounding{distill=100}"),
)


@dataclass(frozen=True)
class Result:
    """A row of the table."""

    label: str
    algorithm: str
    scheme: str
    kl: float
    top1: float
    seconds: float
    peak_mb: float


def measure(bench: Path, work: Path, technique: Technique, scheme: str) -> Result:
    """Compile the language model in a way, and score it."""
    out = work / "model.onnx"
    data = ("--calibration", bench / "brown_train.npy", *ROWS_OF_TEXT)
    options = [*FLOAT_ENDS, *data, "--no-verify", "--algorithm", technique.algorithm]
    cost = run(compile_command(bench / "onnx" / "model.onnx", scheme, options, out), work / "log")
    found = score(out, bench, WINDOWS)
    named = technique.label, technique.algorithm, scheme
    return Result(*named, found.kl, found.top1, cost.seconds, cost.peak_mb)


def table(results: list[Result]) -> str:
    """The rows as Markdown."""
    rows = [
        [r.label, f"`{r.algorithm}`", f"{r.kl:.4f}", f"{r.top1:.3f}", f"{r.seconds:.0f}", f"{r.peak_mb:.0f}"]
        for r in results
    ]
    return markdown(["technique", "`--algorithm`", "KL, nats", "top-1", "seconds", "peak MB"], rows, 2)


def main() -> None:
    """Measure the rows asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path, metavar="DIR", help="made by benchmarks.zoo.smollm2")
    row_options(parser, "rtn or drift")
    parser.add_argument("--scheme", default=SCHEME, help="of the linear layers (default: %(default)s)")
    parser.add_argument("--algorithm", action="append", default=[], metavar="TEXT", help="one more row; repeatable")
    args = parser.parse_args()
    techniques = [*TECHNIQUES, *(Technique("asked for", text) for text in args.algorithm)]
    with tempfile.TemporaryDirectory() as work:
        todo = [(each.name, partial(measure, args.bench, Path(work), each, args.scheme)) for each in techniques]
        results = collect(todo, args.only, args.save)
    print(table(results))


if __name__ == "__main__":
    main()
