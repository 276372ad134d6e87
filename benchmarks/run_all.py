"""Compile real models in several ways and print the figures as Markdown tables.

    python -m benchmarks.run_all DIR [--only TEXT] [--peers] [--verify] [--save FILE.jsonl]

DIR is made by `python -m benchmarks.zoo.smollm2 DIR`. The first table is about a language model: KL divergence from the
float model and top-1 agreement with it on 16 windows of held-out text, size of the files, and time and peak anonymous
memory of the whole command. The second is about small models and what they are for. ONNX Runtime's own quantizer is
among the rows; `--peers` adds llm-compressor, which is installed into an environment of its own.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.peers.environments import Cost, run
from benchmarks.peers.gptq import llmcompressor, ort
from benchmarks.rows import collect, markdown, row_options
from benchmarks.yardstick import score
from benchmarks.zoo import vision_audio

WINDOWS = 16
FLOAT_ENDS = ("--embedding", "float", "--lm-head", "float")
ROWS_OF_TEXT = ("--samples", "32")


@dataclass(frozen=True)
class Way:
    """A way to compile the language model.

    Attributes:
        scheme: What is printed, and the option --scheme up to its first space.
        options: Further options.
        calibrated: Whether text is given; then the algorithm is GPTQ.
        folder: Whether the folder for onnxruntime-genai is compiled, instead of the torch export.
    """

    scheme: str
    options: tuple[str, ...] = FLOAT_ENDS
    calibrated: bool = False
    folder: bool = False


WAYS = (
    Way("w8a16-g64, exact compute", (*FLOAT_ENDS, "--accuracy-level", "0")),
    Way("w8a16-g64"),
    Way("w4a16-g64-asym"),
    Way("w4a16-g64-sym", calibrated=True),
    Way("w4a16-g64-asym", calibrated=True),
    Way("w4a16-g32-asym", calibrated=True),
    Way("w4a16-g64-asym, genai folder, embedding and projection w8a16", (), calibrated=True, folder=True),
    Way("w2a16-g32-asym", calibrated=True),
)


@dataclass(frozen=True)
class Result:
    """A row of the first table."""

    tool: str
    scheme: str
    kl: float
    top1: float
    mb: float | None
    seconds: float
    peak_mb: float


@dataclass(frozen=True)
class SmallResult:
    """A row of the second table."""

    model: str
    scheme: str
    figure: str
    float_value: float
    value: float
    float_mb: float
    mb: float


def compile_command(model: Path, scheme: str, options: Iterable[str | Path], output: Path) -> list[str | Path]:
    """`qcompile` as it is typed."""
    command = [sys.executable, "-m", "qcompiler", "compile", model, "--scheme", scheme]
    return [*command, *options, "--force", "-o", output]


def ours(bench: Path, work: Path, way: Way, more: tuple[str, ...]) -> Result:
    """Compile the language model and score it."""
    source = bench / "genai" if way.folder else bench / "onnx" / "model.onnx"
    output = work / "ours" if way.folder else work / "ours.onnx"
    data = ("--calibration", bench / "brown_train.npy", *ROWS_OF_TEXT) if way.calibrated else ()
    scheme = way.scheme.partition(",")[0]
    cost = run(compile_command(source, scheme, [*way.options, *data, *more], output), work / "log")
    model = output / "model.onnx" if way.folder else output
    return scored(f"qcompile, {'GPTQ' if way.calibrated else 'RTN'}", way.scheme, bench, model, cost)


def scored(tool: str, scheme: str, bench: Path, model: Path, cost: Cost) -> Result:
    """A row of a model that took `cost` to make."""
    found = score(model, bench, WINDOWS)
    return Result(tool, scheme, found.kl, found.top1, found.mb, cost.seconds, cost.peak_mb)


def language_model(bench: Path, work: Path, more: tuple[str, ...]) -> Iterator[tuple[str, Callable[[], Result]]]:
    """What each row is called, and how to get it."""

    def ort_row() -> Result:
        cost, model = ort(bench / "onnx" / "model.onnx", work, "asym")
        return scored("ONNX Runtime, RTN", "w4 g64 asym", bench, model, cost)

    yield "onnxruntime w4 rtn", ort_row
    for way in WAYS:
        yield f"{way.scheme} {'gptq' if way.calibrated else 'rtn'}", lambda way=way: ours(bench, work, way, more)


def peer_row(bench: Path, work: Path) -> Result:
    """llm-compressor's GPTQ; its weights are put into the float model to be scored, whose size says nothing."""
    cost, model = llmcompressor(bench, work, "sym")
    return replace(scored("llm-compressor, GPTQ", "w4 g64 sym", bench, model, cost), mb=None)


def small_models(work: Path) -> Iterator[tuple[str, Callable[[], SmallResult]]]:
    """The same for the second table."""
    lines = work / "lines"
    models = vision_audio.packaged()
    ways = [
        ("character_error_rate", "w8a16", ()),
        ("character_error_rate", "w4a16", ()),
        ("character_error_rate", "w4a16, 32 lines of data", ("--calibration", lines)),
        ("text_mask_overlap", "w8a16", ()),
        ("text_mask_overlap", "w4a16", ()),
        ("speech_fraction", "w8a16", ()),
    ]

    def row(figure: str, scheme: str, options: tuple[str | Path, ...]) -> SmallResult:
        if options and not lines.exists():
            lines.mkdir()
            for index, arrays in enumerate(vision_audio.line_feeds()):
                np.savez(lines / f"{index:03}.npz", **arrays)
        source, output, measure = models[figure], work / "small.onnx", vision_audio.FIGURES[figure]
        run(compile_command(source, scheme.partition(",")[0], options, output), work / "log")
        sizes = source.stat().st_size / 1e6, output.stat().st_size / 1e6
        return SmallResult(source.stem, scheme, figure, measure(source), measure(output), *sizes)

    for way in ways:
        yield " ".join(way[:2]), lambda way=way: row(*way)


def table(results: list[Result]) -> str:
    """The first table."""
    rows = []
    for r in results:
        megabytes = "" if r.mb is None else f"{r.mb:.0f}"
        costs = [megabytes, f"{r.seconds:.0f}", f"{r.peak_mb:.0f}"]
        rows.append([r.tool, r.scheme, f"{r.kl:.4f}", f"{r.top1:.3f}", *costs])
    return markdown(["tool", "scheme", "KL, nats", "top-1", "MB", "seconds", "peak MB"], rows, 2)


def small_table(results: list[SmallResult]) -> str:
    """The second table."""
    rows = []
    for r in results:
        figures = [f"{r.float_value:.4f}", f"{r.value:.4f}", f"{r.float_mb:.1f} -> {r.mb:.1f}"]
        rows.append([r.model, r.scheme, r.figure.replace("_", " "), *figures])
    return markdown(["model", "scheme", "figure", "float", "compiled", "MB"], rows, 3)


def main() -> None:
    """Get the rows whose names hold the text asked for, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path, metavar="DIR", help="made by benchmarks.zoo.smollm2")
    row_options(parser, "w4 or gptq")
    parser.add_argument("--peers", action="store_true", help="also llm-compressor")
    parser.add_argument("--verify", action="store_true", help="let qcompile verify, as it does unless told otherwise")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        todo: list[tuple[str, Callable[[], Result | SmallResult]]] = [
            *language_model(args.bench, work, () if args.verify else ("--no-verify",)),
            *small_models(work),
        ]
        todo += [("llm-compressor gptq", lambda: peer_row(args.bench, work))] if args.peers else []
        rows = collect(todo, args.only, args.save)
    results = [row for row in rows if isinstance(row, Result)]
    small = [row for row in rows if isinstance(row, SmallResult)]
    if results:
        print(table(results), end="\n\n")
    if small:
        print(small_table(small))


if __name__ == "__main__":
    main()
