"""Formats chosen for a budget on the language model, beside one format for all: are budgets met, and is it worth it?

    python -m benchmarks.budgets DIR [--only TEXT] [--algorithm TEXT] [--work FOLDER] [--save FILE.jsonl]

DIR is made by `python -m benchmarks.zoo.smollm2 DIR`. The rows:

    uniform w4, w2     w4a16-g64-asym and w2a16-g32-asym for all linear layers; table and projection stay float
    linears 60 % ...   --bits-per-weight, in shares of the bits that uniform w4 stores, scales and zero points included
    2-bit bytes        --bits-per-weight, as many bits as uniform w2 stores
    all 86.5MB         --max-size, table and projection quantized too

Bits are counted in the files; KL divergence is on 16 windows of held-out text. The exit code is 1 if a budget is missed
by more than 1 % or exceeded, if the divergence does not fall from each share to the next larger one, or if a row costs
more than `MOST` says. A check whose rows were not run is left out.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx

from benchmarks.peers.environments import run
from benchmarks.run_all import FLOAT_ENDS, ROWS_OF_TEXT, WINDOWS, compile_command
from benchmarks.yardstick import score
from qcompiler.files.loader import load_model
from qcompiler.kernels.schemas import DOMAIN, operator
from qcompiler.sites import find_sites

W4, W2, ALL, SMALL = "uniform w4", "uniform w2", "all 86.5MB", "2-bit bytes"
SHARES = (60, 75, 90, 100, 120)
SIZE = 86_500_000
NEAR = 0.01
# What a row may cost: KL in nats, or a share of another row's.
MOST: dict[str, float | tuple[float, str]] = {"linears 100 %": (0.85, W4), ALL: 0.12, SMALL: 0.70}


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: What was asked for.
        asked: Bits a weight of the linear layers, or bytes of the files; None where no budget was given.
        got: Bits a weight of the linear layers.
        size: Bytes of the files.
        kl: From the float model, nats.
        top1: Share of tokens with the float model's most likely successor.
        planning: Seconds that the formats took to choose.
        seconds: Of the whole command.
        peak_mb: Peak anonymous memory of the whole command.
    """

    name: str
    asked: float | None
    got: float
    size: int
    kl: float
    top1: float
    planning: float
    seconds: float
    peak_mb: float

    @property
    def deviation(self) -> float | None:
        """What was got over what was asked for, less one."""
        if self.asked is None:
            return None
        return (self.size if self.name == ALL else self.got) / self.asked - 1


def linear_bits(source: Path, model: Path) -> float:
    """Stored bits a weight of the linear layers; what runs in no operator for codes counts as float."""
    sites = [site for site in find_sites(load_model(source))[0] if site.role == "linear"]
    shapes = {(site.rows, site.columns) for site in sites}
    graph = onnx.load(model, load_external_data=False).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    total, seen = 0, 0
    for node in graph.node:
        shape, operands = None, node.input[1:4]
        if node.op_type == "MatMulNBits":
            sizes = {attribute.name: attribute.i for attribute in node.attribute}
            shape = sizes["N"], sizes["K"]
        elif node.domain == DOMAIN:
            shape, operands = _own_shape(node, tensors, shapes), node.input[1:-1]  # the last one is the bias
        if shape in shapes:
            seen += shape[0] * shape[1]
            total += 8 * sum(_bytes(tensors[name]) for name in operands if name)
    weights = sum(site.rows * site.columns for site in sites)
    return (total + 32 * (weights - seen)) / weights


def _own_shape(
    node: onnx.NodeProto, tensors: Mapping[str, onnx.TensorProto], shapes: Iterable[tuple[int, int]]
) -> tuple[int, int] | None:
    """Which of some shapes the weight of one of our own operators has; its last group may be filled up."""
    rows, groups, size = tensors[node.input[1]].dims
    codebook = node.op_type.startswith("MatMulCodebook")
    width = tensors[node.input[2]].dims[1] if codebook else 1
    group = size * 8 // operator(node.op_type).bits * width
    return next((each for each in shapes if each[0] == rows and 0 <= groups * group - each[1] < group), None)


def _bytes(tensor: onnx.TensorProto) -> int:
    return math.prod(tensor.dims) * np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize


def measure(bench: Path, work: Path, name: str, asked: float | None, options: Sequence[str], scheme: str) -> Row:
    """Compile in a process of its own and score."""
    source, output = bench / "onnx" / "model.onnx", work / f"{name.replace(' ', '-').replace('%', 'percent')}.onnx"
    data = ("--calibration", bench / "brown_train.npy", *ROWS_OF_TEXT)
    cost = run(compile_command(source, scheme, [*data, *options, "--no-verify"], output), output.with_suffix(".log"))
    report = json.loads(output.with_name(f"{output.stem}.report.json").read_text("utf-8"))
    planning = sum(done["seconds"] for done in report["passes"] if done["name"] == "mixed_precision")
    found = score(output, bench, WINDOWS)
    bits = linear_bits(source, output)
    return Row(name, asked, bits, report["bytes"]["files"], found.kl, found.top1, planning, cost.seconds, cost.peak_mb)


def rows(bench: Path, work: Path, only: str, algorithm: Sequence[str]) -> list[Row]:
    """Run what was asked for; a row whose budget is another one's needs that one too."""
    found: dict[str, Row] = {}

    def add(name: str, scheme: str, options: Sequence[str], asked: float | None = None) -> Row:
        if name not in found:
            found[name] = measure(bench, work, name, asked, [*options, *algorithm], scheme)
            print(found[name], file=sys.stderr, flush=True)
        return found[name]

    def uniform(name: str) -> Row:
        return add(name, {W4: "w4a16-g64-asym", W2: "w2a16-g32-asym"}[name], FLOAT_ENDS)

    for name in (W4, W2):
        if only in name:
            uniform(name)
    for share in SHARES:
        if only in (name := f"linears {share} %"):
            bits = uniform(W4).got * share / 100
            add(name, "w4a16-g64-asym", [*FLOAT_ENDS, "--bits-per-weight", f"{bits:.5f}"], bits)
    if only in SMALL:
        bits = uniform(W2).got
        add(SMALL, "w4a16-g64-asym", [*FLOAT_ENDS, "--bits-per-weight", f"{bits:.5f}"], bits)
    if only in ALL:
        add(ALL, "w4a16-g64-asym", ["--max-size", str(SIZE)], SIZE)
    return list(found.values())


def failures(found: Sequence[Row]) -> list[str]:
    """What does not hold, in words."""
    by_name = {row.name: row for row in found}
    wrong = [
        f"{row.name}: {100 * row.deviation:+.2f} % of the budget"
        for row in found
        if row.deviation is not None and not -NEAR <= row.deviation <= 0
    ]
    shares = [by_name[name] for share in SHARES if (name := f"linears {share} %") in by_name]
    wrong += [
        f"KL of {more.name} is {more.kl:.4f}, that of {less.name} {less.kl:.4f}"
        for less, more in pairwise(shares)
        if more.kl >= less.kl
    ]
    for name, most in MOST.items():
        share, other = most if isinstance(most, tuple) else (most, "")
        if name in by_name and (not other or other in by_name):
            limit = share * (by_name[other].kl if other else 1)
            if by_name[name].kl > limit:
                wrong.append(f"KL of {name} is {by_name[name].kl:.4f}, more than {limit:.4f}")
    return wrong


def table(found: Sequence[Row]) -> str:
    """The rows in Markdown."""
    titles = ("budget", "asked", "bits/weight", "off", "MB", "KL", "top-1", "planning s", "seconds", "peak MB")
    lines = ["| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]
    for r in found:
        asked = "" if r.asked is None else f"{r.asked / 1e6:.1f} MB" if r.name == ALL else f"{r.asked:.3f}"
        off = "" if r.deviation is None else f"{100 * r.deviation:+.2f} %"
        cells = [r.name, asked, f"{r.got:.3f}", off, f"{r.size / 1e6:.1f}", f"{r.kl:.4f}", f"{100 * r.top1:.1f} %"]
        cells += [f"{r.planning:.0f}" if r.planning else "", f"{r.seconds:.0f}", f"{r.peak_mb:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure the rows whose names hold the text asked for, print the table and what fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path)
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose names hold this, e.g. '100 %%'")
    parser.add_argument("--algorithm", metavar="TEXT", help="of all rows (default: the command's)")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="for outputs and logs, kept")
    parser.add_argument("--save", type=Path, metavar="FILE", help="append each row to this file as a line of JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        found = rows(args.bench, work, args.only, ("--algorithm", args.algorithm) if args.algorithm else ())
    if args.save:
        with args.save.open("a", encoding="utf-8") as lines:
            lines.writelines(json.dumps(asdict(row)) + "\n" for row in found)
    print(table(found))
    wrong = failures(found)
    for failure in wrong:
        print(f"FAILS: {failure}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
