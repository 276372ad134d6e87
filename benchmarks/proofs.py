"""Proofs on real models that static 8-bit activations lose what rounding loses, and nothing else.

    python -m benchmarks.proofs [--only TEXT] [--save FILE.jsonl]

Five tables, each with a check in every row; the exit code is 1 if one fails.

    folding      What is done to the float model changes nothing: its outputs move by 1e-5 of their norm at most, right
                 before anything is quantized, and in the compiled model with its codes taken out again.
    bits         16-bit codes in the place of 8-bit ones, for the same ranges at the same places, raise the SQNR of the
                 outputs by 30 dB at least. Where a range were too small, or a value were encoded that cannot be, they
                 would not.
    unfused      Every encoder and decoder that ONNX Runtime left beside its integer kernels has a reason.
    calibrators  Ranges of activations, and of made-up data, are those that ONNX Runtime's calibrators find.
    memory       A compilation with 10,000 samples holds no more than one with 100, but for what GPTQ works on.

The first two are about the default passes, but for GPTQ and the correction of biases, which make up for rounding and so
are no folding. Activations get the range of all their values, measured before the weights are rounded, to nearest, so
that it is that of 16-bit weights too. Lookup tables stay float. The operators run one by one, without graph
optimizations, on rows that were calibrated on. `unfused` is about models compiled with the command's defaults.

`--only` selects rows by model and proof, e.g. 'minilm' or 'ocr-recognition bits'. Dumps of SmolLM2 take 8 GB of disk.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.calibrators import FEWER, MORE, Memory, Ranges, memory, ranges
from benchmarks.int8 import SUBJECTS, quantize
from benchmarks.recoding import unrounded, widened
from qcompiler import passes, pipeline
from qcompiler.calibration import row_mask
from qcompiler.config import CompileConfig
from qcompiler.feeding import calibration_data
from qcompiler.files.loader import load_model
from qcompiler.passes.base import PassContext, Stage
from qcompiler.scheme import Scheme
from qcompiler.scheme_plan import SchemePlan
from qcompiler.session import Feeds, OrtRunner
from qcompiler.verify_outputs import Comparison

LARGEST_MOVE, LEAST_GAIN = 1e-5, 30.0
_SCHEME, _OPSET, _BATCHES = "w8a8", 21, 3
MODELS = tuple(name for name, subject in SUBJECTS.items() if _SCHEME in subject.ours)


@dataclass(frozen=True)
class Folding:
    """A row of the first table; differences are shares of the float outputs' norm, of the worst output.

    Attributes:
        model: A name from `MODELS`.
        passes: What ran before the weights were quantized.
        folded: The difference of the model right before that.
        undone: The difference of the compiled model without its codes.
        first: The pass that moved the outputs too far, if one did.
    """

    model: str
    passes: int
    folded: float
    undone: float
    first: str

    @property
    def holds(self) -> bool:
        """Whether nothing moved."""
        return max(self.folded, self.undone) <= LARGEST_MOVE


@dataclass(frozen=True)
class Bits:
    """A row of the second table: SQNR in dB of the worst output."""

    model: str
    narrow: float
    wide: float

    @property
    def holds(self) -> bool:
        """Whether 16 bits gain what they should."""
        return self.wide - self.narrow >= LEAST_GAIN


@dataclass(frozen=True)
class Left:
    """A row of the third table.

    Attributes:
        model: A name from `MODELS`.
        written: Encoders and decoders in the file.
        fused: How many of these became parts of integer kernels.
        added: How many ONNX Runtime put in.
        reasons: Operator and reason of those that are left -> how many.
        oversights: What should not be there, in words.
    """

    model: str
    written: int
    fused: int
    added: int
    reasons: dict[str, int]
    oversights: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether everything that is left is counted and has to be there."""
        return not self.oversights and sum(self.reasons.values()) == self.written - self.fused + self.added


Row = Folding | Bits | Left | Ranges | Memory


class _Rounded:
    """A subject compiled with its weights rounded to nearest, and with what it was after each pass."""

    def __init__(self, name: str, work: Path) -> None:
        subject, self.work = SUBJECTS[name], work
        self.name, self.source, self.compiled = name, subject.model(), work / "compiled.onnx"
        options = subject.ours[_SCHEME]
        flags = ["--pipeline", ",".join(_steps()), "--calibrator", "minmax", "--opset", str(_OPSET)]
        flags += ["--embedding", "float", "--lm-head", "float", "--dump-dir", str(work / "passes")]
        quantize(self.source, _SCHEME, subject.calibration(), self.compiled, (*options, *flags))
        dumps = sorted((work / "passes").glob("*.onnx"))
        folding = [file for file in dumps if passes.load(_pass_name(file)).stage < Stage.QUANTIZE]
        self.after_each, self.folded = folding, folding[-1]
        samples = int(options[options.index("--samples") + 1]) if "--samples" in options else None
        data = calibration_data(
            load_model(self.source), CompileConfig(calibration=subject.calibration(), samples=samples)
        )
        assert data is not None
        self.feeds = list(data.batches[:: max(1, len(data.batches) // _BATCHES)])[:_BATCHES]

    def sqnr(self, model: Path) -> float:
        """SQNR in dB of a model's worst output, both models run operator by operator."""
        return sqnr(self.source, model, self.feeds)


def _steps() -> list[str]:
    """The default passes, those left out that make up for rounding, and weights rounded once ranges are measured."""
    plan = SchemePlan(Scheme.parse(_SCHEME), embedding=None, lm_head=None)
    config = CompileConfig(plan=plan, opset=_OPSET, calibrator="minmax")
    usual = pipeline.default_algorithms(config, calibrated=True)
    kept = [algorithm for algorithm in usual if passes.load(algorithm).stage < Stage.QUANTIZE]
    config = replace(config, algorithms=tuple(kept))
    steps = pipeline.build(config, PassContext(config))
    lowering = next(index for index, step in enumerate(steps) if step.stage > Stage.QUANTIZE)
    return [*map(str, steps[:lowering]), "rtn", *map(str, steps[lowering:])]


def _pass_name(dump: Path) -> str:
    return dump.stem.partition("-")[2]


def sqnr(reference: Path, model: Path, feeds: Sequence[Feeds]) -> float:
    """SQNR in dB of the worst of a model's outputs, without padding; neither model is optimized or fused."""
    comparison = Comparison(model.name, {})
    with OrtRunner(reference, optimize=False) as expected, OrtRunner(model, optimize=False) as found:
        for feed in feeds:
            comparison.add(expected.run(feed), found.run(feed), row_mask(feed))
    result = comparison.closeness().sqnr_db
    assert result is not None
    return result


def moved(db: float) -> float:
    """The norm of a difference over that of the signal, of an SQNR in dB."""
    return float(10 ** (-db / 20))


def folding(rounded: _Rounded) -> Folding:
    """Compare a subject with the float model before its weights are quantized, and after taking its codes out."""
    bare = rounded.work / "unrounded.onnx"
    unrounded(rounded.compiled, rounded.folded, bare)
    folded, undone, first = moved(rounded.sqnr(rounded.folded)), moved(rounded.sqnr(bare)), ""
    if folded > LARGEST_MOVE:
        first = next(_pass_name(file) for file in rounded.after_each if moved(rounded.sqnr(file)) > LARGEST_MOVE)
    return Folding(rounded.name, len(rounded.after_each), folded, undone, first)


def bits(rounded: _Rounded) -> Bits:
    """Compare 8 with 16 bits."""
    wide = rounded.work / "widened.onnx"
    widened(rounded.compiled, rounded.folded, wide)
    return Bits(rounded.name, rounded.sqnr(rounded.compiled), rounded.sqnr(wide))


def unfused(name: str, work: Path) -> Left:
    """Compile a subject as the command does, and read from its report what is left."""
    subject, out = SUBJECTS[name], work / "model.onnx"
    quantize(subject.model(), _SCHEME, subject.calibration(), out, (*subject.ours[_SCHEME], "--verify"))
    report = json.loads(out.with_name("model.report.json").read_text(encoding="utf-8"))
    return left(name, report["verification"])


def left(name: str, verification: dict[str, Any]) -> Left:
    """A row of the third table, from the verification's part of a report."""
    audit, found = verification["integers"], verification["unfused"]
    needed = [each for each in found if each["necessary"] and each["reason"]]
    reasons = Counter(f"{each['operator']} {each['reason']}" for each in needed)
    others = [f"{each['operator']} '{each['node']}' {each['reason']}" for each in found if each not in needed]
    return Left(name, audit["written"], audit["fused"], audit["added"], dict(reasons.most_common()), tuple(others))


def rows(only: str) -> Iterator[Row]:
    """The rows whose names hold a text."""
    for name in MODELS:
        wanted = [proof for proof in (folding, bits) if only in f"{name} {proof.__name__}"]
        with tempfile.TemporaryDirectory() as work:
            rounded = _Rounded(name, Path(work)) if wanted else None
            for proof in wanted:
                assert rounded is not None
                yield proof(rounded)
    for name in MODELS:
        if only in f"{name} unfused":
            with tempfile.TemporaryDirectory() as work:
                yield unfused(name, Path(work))
    yield from ranges(only)
    yield from memory(only)


def table(titles: Sequence[str], found: Sequence[Sequence[object]]) -> str:
    """A Markdown table; figures, which stand right, begin with the first column that holds one."""
    texts = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in found]
    marks = ["---:" if isinstance(cell, float | int) else "---" for cell in found[0]]
    return "\n".join("| " + " | ".join(row) + " |" for row in (titles, marks, *texts))


def _verdict(row: Row) -> str:
    return "holds" if row.holds else "FAILS"


def tables(found: Sequence[Row]) -> Iterator[str]:
    """The tables that have a row."""
    titles: Sequence[str]
    if some := [row for row in found if isinstance(row, Folding)]:
        titles = ("model", "passes", "moved by folding", "in the compiled model, codes undone", "limit 1e-05", "by")
        yield table(titles, [(r.model, r.passes, r.folded, r.undone, _verdict(r), r.first) for r in some])
    if more := [row for row in found if isinstance(row, Bits)]:
        titles = ("model", "8 bits, dB", "16 bits, dB", "gain, dB", "at least 30")
        yield table(titles, [(r.model, r.narrow, r.wide, r.wide - r.narrow, _verdict(r)) for r in more])
    if kept := [row for row in found if isinstance(row, Left)]:
        titles = ("model", "encoders and decoders", "fused", "put in", "left", "oversights", "none")
        figures = [(r, sum(r.reasons.values()), len(r.oversights)) for r in kept]
        yield table(titles, [(r.model, r.written, r.fused, r.added, n, m, _verdict(r)) for r, n, m in figures])
        reasons = [(r.model, count, reason) for r in kept for reason, count in r.reasons.items()]
        yield table(
            ("model", "left", "reason"), [*reasons, *((r.model, 1, text) for r in kept for text in r.oversights)]
        )
    if limits := [row for row in found if isinstance(row, Ranges)]:
        titles = ("data", "calibrator", "values", "equal ranges", "of these mended", "largest difference", "")
        yield table(
            titles, [(r.data, r.method, r.values, r.equal, r.mended, r.difference, _verdict(r)) for r in limits]
        )
    if costs := [row for row in found if isinstance(row, Memory)]:
        counts = [f"{count:,} samples" for count in (FEWER, MORE)]
        titles = ("options", *(f"{count}, {unit}" for unit in ("s", "peak MB") for count in counts), "at most", "")
        yield table(titles, [(r.way, *r.seconds, *map(round, (*r.peak_mb, r.most_mb)), _verdict(r)) for r in costs])


def main() -> None:
    """Prove the rows whose names hold the text asked for, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose names hold this, e.g. 'ocr' or 'bits'")
    parser.add_argument("--save", type=Path, metavar="FILE", help="append each row to this file as a line of JSON")
    args = parser.parse_args()
    found = []
    for row in rows(args.only):
        found.append(row)
        print(row, file=sys.stderr, flush=True)
        if args.save:
            line = {"proof": type(row).__name__.lower(), **asdict(row), "holds": row.holds}
            with args.save.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(line) + "\n")
    print("\n\n".join(tables(found)))
    if not all(row.holds for row in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
