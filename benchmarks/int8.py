"""Integer activations on small models, beside ONNX Runtime's own quantizers: accuracy, latency, what it took.

    python -m benchmarks.int8 [--only TEXT] [--repeat N] [--save FILE.jsonl]

Our schemes are compiled with the command and its defaults for calibration data. ONNX Runtime quantizes in four ways,
each after its own preparation:

    ort-static            QDQ around every operator that it knows, one scale a weight: the defaults
    ort-static-channel    one scale an output channel
    ort-static-linears    that around Conv, Gemm, MatMul and a Clip after them only: no attention mask is rounded
    ort-dynamic           weights ahead, activations as they come; no data

Latency is a ratio to the float model, taken in turns on two cores at most. Prints a Markdown table. `--only` selects
rows by their names, e.g. 'lite0 w8a8' or 'ort-dynamic'.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np

from benchmarks import yardstick
from benchmarks.peers.environments import Cost, run
from benchmarks.rows import collect, markdown, row_options
from benchmarks.zoo import efficientnet, minilm, vision_audio, whisper
from benchmarks.zoo.cache import root
from benchmarks.zoo.exports import write_feeds
from qcompiler.bench import bench

ORT = ("ort-static", "ort-static-channel", "ort-static-linears", "ort-dynamic")
STATIC, DYNAMIC = ("--scheme", "w8a8"), ("--scheme", "w8a8-dynamic")
_WORKER = Path(__file__).parent / "peers" / "ort_int8_worker.py"
_WINDOWS, _PREFILL = 16, 256


@dataclass(frozen=True)
class Subject:
    """A model to quantize.

    Attributes:
        model: Returns the float model.
        calibration: Returns a folder of .npz files, or token ids.
        feeds: Returns the inputs that latency is measured on.
        figures: By name, functions of an .onnx path.
        ours: The rest of our command, by the name of the row.
        theirs: Which of `ORT` are run beside.
    """

    model: Callable[[], Path]
    calibration: Callable[[], Path]
    feeds: Callable[[], dict[str, np.ndarray]]
    figures: Mapping[str, Callable[[Path], float]]
    ours: Mapping[str, Sequence[str]]
    theirs: Sequence[str] = ORT


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
    return minilm.feeds([old for old, _ in minilm.verses()[:8]])


def _crops() -> dict[str, np.ndarray]:
    return {"image": efficientnet.crops(efficientnet.MEASURED, 1, seed=0)}


def _lines() -> Path:
    return write_feeds(root() / "feeds-lines", vision_audio.line_feeds())


def _pages() -> Path:
    return write_feeds(root() / "feeds-pages", vision_audio.page_feeds())


def _first(folder: Path) -> dict[str, np.ndarray]:
    return dict(np.load(min(folder.glob("*.npz"))))


def _smollm2() -> Path:
    return root() / "smollm2"


def _kl(model: Path) -> float:
    return yardstick.score(model, _smollm2(), _WINDOWS).kl


def _tokens() -> dict[str, np.ndarray]:
    ids = np.load(_smollm2() / "brown_eval.npy")[:1, :_PREFILL].astype(np.int64)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def _speech(part: str) -> Subject:
    figures = {name: function for name, function in whisper.FIGURES.items() if name.startswith(part)}
    folder = partial(whisper.calibration_folder, part)
    ours = {"w8a8-dynamic": DYNAMIC, "w8a8-dynamic-tensor": ("--scheme", "w8a8-dynamic-tensor"), "w8a8": STATIC}
    return Subject(partial(whisper.exported_part, part), folder, lambda: _first(folder()), figures, ours)


def _ocr(figure: str, folder: Callable[[], Path]) -> Subject:
    figures = {figure: vision_audio.FIGURES[figure]}
    return Subject(
        lambda: vision_audio.packaged()[figure], folder, lambda: _first(folder()), figures, {"w8a8": STATIC}, ORT[:3]
    )


_MINILM = (minilm.calibration_folder, _verses, minilm.FIGURES, {"w8a8": STATIC, "w8a8-dynamic": DYNAMIC})
_FLOAT_ENDS = ("--embedding", "float", "--lm-head", "float", "--samples", "32")
_HEAD_TOO = ("--embedding", "float", "--lm-head", "w8a8-dynamic", "--samples", "32")
SUBJECTS = {
    "minilm-opset21": Subject(minilm.exported_minilm, *_MINILM),
    "minilm-opset14": Subject(lambda: minilm.exported_minilm("opset14"), *_MINILM),
    "efficientnet-lite0": Subject(
        efficientnet.exported_efficientnet,
        efficientnet.calibration_folder,
        _crops,
        efficientnet.FIGURES,
        {"w8a8": STATIC},
    ),
    "ocr-recognition": _ocr("character_error_rate", _lines),
    "ocr-detection": _ocr("text_mask_overlap", _pages),
    "whisper-encoder": _speech("encoder"),
    "whisper-decoder": _speech("decoder"),
    "smollm2": Subject(
        lambda: _smollm2() / "onnx" / "model.onnx",
        lambda: _smollm2() / "brown_train.npy",
        _tokens,
        {"kl": _kl},
        {
            "w8a8-dynamic": (*DYNAMIC, *_FLOAT_ENDS),
            "w8a8-dynamic-head-too": (*DYNAMIC, *_HEAD_TOO),
            "w8a8": (*STATIC, *_FLOAT_ENDS),
            "w8a8-unsmoothed": (*STATIC, *_FLOAT_ENDS, "--algorithm", "gptq"),
        },
        ("ort-dynamic",),
    ),
}


def quantize(model: Path, way: str, calibration: Path, out: Path, flags: Sequence[str] = ()) -> Cost:
    """Quantize a model in a process of its own.

    Args:
        model: The float model.
        way: One of `ORT`; anything else is ours.
        calibration: Folder of .npz files, each with the model's inputs by name, or token ids.
        out: Where the result goes; its log goes beside it.
        flags: Of our command.

    Returns:
        What the whole command took.
    """
    if way in ORT:
        command = [sys.executable, _WORKER, model, way.removeprefix("ort-"), calibration, out]
    else:
        ours = [sys.executable, "-m", "qcompiler", "compile", model, "--calibration", calibration, "-o", out]
        command = [*ours, "--no-verify", *flags]
    return run(command, out.with_suffix(".log"))


def measure(name: str, way: str, out: Path, repeat: int) -> Result:
    """Quantize a subject and take its figures."""
    subject = SUBJECTS[name]
    source = subject.model()
    cost = quantize(source, way, subject.calibration(), out, subject.ours.get(way, ()))
    latency = bench([source, out], subject.feeds(), repeat, threads=2)[1]
    figures = {figure: function(out) for figure, function in subject.figures.items()}
    size = sum(file.stat().st_size for file in (out, out.with_name(f"{out.name}.data")) if file.exists())
    return Result(name, way, figures, latency[1:], size / 1e6, cost)


def table(results: list[Result]) -> str:
    """The rows of models with the same figures, under a heading of their own."""
    tables = []
    for heading, alike in groupby(results, lambda r: list(r.figures)):
        rows = []
        for r in alike:
            values = [f"{value:.4f}" for value in r.figures.values()]
            ratio = "{:.2f} ({:.2f} to {:.2f})".format(*r.ratio)
            costs = [f"{r.mb:.1f}", f"{r.cost.seconds:.0f}", f"{r.cost.peak_mb:.0f}"]
            rows.append([r.model, r.way, *values, ratio, *costs])
        titles = ["model", "way", *(name.replace("_", " ") for name in heading)]
        tables.append(markdown([*titles, "latency ratio", "MB", "seconds", "peak MB"], rows, 2))
    return "\n\n".join(tables)


def main() -> None:
    """Measure the rows whose names hold the text asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    row_options(parser, "'lite0 w8a8'")
    parser.add_argument("--repeat", type=int, default=20, help="rounds in which latency is measured")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        todo = [
            (f"{name} {way}", partial(measure, name, way, Path(work) / f"{name}-{way}.onnx", args.repeat))
            for name, subject in SUBJECTS.items()
            for way in (*subject.ours, *subject.theirs)
        ]
        results = collect(todo, args.only, args.save)
    print(table(results))


if __name__ == "__main__":
    main()
