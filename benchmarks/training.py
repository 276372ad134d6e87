"""Training a quantized model against quantizing it: pictures of digits and photographs, an encoder, a language model.

    python -m benchmarks.training [--only TEXT] [--save FILE.jsonl] [--threads N] [--bench DIR]

    digits      a residual network of 12,000 weights (`benchmarks.zoo.digits`), taught with 1,100 pictures by its float
                form; accuracy on 597 others, and as the error the divergence from the float form, both as the mean of
                three seeds. All layers have one format. Weights of two and three values, and signs of activations in
                the network made for them.
    pictures    EfficientNet-Lite0 (`benchmarks.zoo.efficientnet`), taught with random crops of ten photographs by its
                float form; agreement with it on 200 crops of ten others.
    sentences   MiniLM (`benchmarks.zoo.minilm`), taught with 512 texts by its float form; the accuracy of a linear
                probe of film reviews, and 1 - cosine of embeddings, as the error.
    text        SmolLM2 at 2 bits, where DIR is given that `python -m benchmarks.zoo.smollm2 DIR` made: the best that
                data alone give, and trained for 20 minutes behind that; top-1 agreement with float, and as the error KL
                on 16 windows of other text.

Every row is a command, `qcompile` or `qcompiler tune`. The exit code is 1 if below 4 bits LSQ has a larger error than
PACT, or either than quantizing alone, or if LSQ at 4 bits is more than a point behind float on digits, or leaves text
more than 60 % of the error.
"""

import argparse
import json
import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.peers.environments import run
from benchmarks.rows import collect, conclude, markdown, row_options
from benchmarks.run_all import ROWS_OF_TEXT, WINDOWS
from benchmarks.yardstick import score
from benchmarks.zoo import digits, efficientnet, minilm
from benchmarks.zoo.cache import publish, root

WIDTHS = ("w8a8", "w4a4", "w3a3", "w2a2")
METHODS = ("qat", "pact", "lsq")
# Of two and three values: the scheme, the network that it goes with, and the rate, which is in units of the scale.
DISCRETE = (
    ("binaryconnect", "w1.58a8-static", "folded"),
    ("binaryconnect-drawn", "w1.58a8-static", "folded"),
    ("twn", "w1.58a8-static", "folded"),
    ("absmean", "w1.58a8-static", "folded"),
    ("bnn", "w1.58a1", "signed"),
    ("xnor", "w1.58a1", "signed"),
)
CROPS = 512


@dataclass(frozen=True)
class Result:
    """A row: what share is right (labels, or the float model's class), the error, bytes of weights, and the cost."""

    task: str
    scheme: str
    method: str
    right: float
    error: float
    kb: float
    seconds: float
    peak_mb: float


@dataclass(frozen=True)
class Task:
    """A model with its data and figures.

    Attributes:
        name: For the table.
        model: The float model.
        data: Options that name the data.
        training: Options of `tune`.
        figures: The share that is right, and the error, of an .onnx file.
        seeds: How often a model is trained; figures are means.
    """

    name: str
    model: Callable[[], Path]
    data: Callable[[], list[str | Path]]
    training: tuple[str, ...]
    figures: Callable[[Path], tuple[float, float]]
    seeds: int = 1


def _crops() -> Path:
    """A file of random crops to learn from."""
    import numpy as np

    file = root() / f"crops-{CROPS}" / "image.npy"
    if not file.exists():
        with publish(file.parent) as draft:
            draft.mkdir()
            np.save(draft / "image.npy", efficientnet.crops(efficientnet.CALIBRATION, CROPS, seed=2))
    return file


def _agreement(model: Path) -> tuple[float, float]:
    share, sqnr = efficientnet.agreement_and_sqnr(model)
    return share, 10 ** (-sqnr / 10)


def _digits(form: str) -> Task:
    return Task(
        "digits" if form == "folded" else f"digits, {form}",
        partial(digits.exported_digits, form),
        lambda: ["--calibration", digits.training_data()[0], "--samples", "1100"],
        ("--steps", "2000", "--batch", "64"),
        lambda model: (digits.accuracy(model), digits.divergence(model, form)),
        seeds=3,
    )


DIGITS, SIGNED = _digits("folded"), _digits("signed")
PICTURES = Task(
    "pictures",
    efficientnet.exported_efficientnet,
    lambda: ["--calibration", _crops(), "--samples", "64"],
    ("--steps", "120", "--batch", "16", "--rows", str(CROPS)),
    _agreement,
)
SENTENCES = Task(
    "sentences",
    minilm.exported_minilm,
    lambda: ["--calibration", minilm.training_folder(), "--samples", "128", "--embedding", "float"],
    ("--steps", "150", "--batch", "16", "--rows", "512"),
    lambda model: (minilm.sentiment_accuracy(model), 1 - minilm.embedding_cosine(model)),
)


def _text(bench: Path) -> Task:
    def figures(model: Path) -> tuple[float, float]:
        found = score(model, bench, WINDOWS)
        return found.top1, found.kl

    return Task(
        "text",
        lambda: bench / "onnx" / "model.onnx",
        lambda: ["--calibration", bench / "brown_train.npy", *ROWS_OF_TEXT, "--embedding", "float", "--effort", "best"],
        ("--minutes", "20", "--rows", "512"),
        figures,
    )


def measure(task: Task, scheme: str, method: str, threads: int) -> Result:
    """Compile or tune models, and take the means of their figures; the float model for an empty scheme."""
    if not scheme:
        right, error = task.figures(task.model())
        return Result(task.name, "float", "", right, error, _weights(task.model()) / 1e3, 0.0, 0.0)
    made = [_made(task, scheme, method, threads, seed) for seed in range(task.seeds if method != "ptq" else 1)]
    means = [sum(values) / len(made) for values in zip(*made, strict=True)]
    return Result(task.name, scheme, method, *means)


def _made(task: Task, scheme: str, method: str, threads: int, seed: int) -> tuple[float, float, float, float, float]:
    """The figures of one model: what is right, the error, kB of weights, seconds and MB."""
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "model.onnx"
        ways = ["compile"] if method == "ptq" else ["tune", "--method", method, *task.training]
        common = ["--scheme", scheme, *task.data(), "--lm-head", "float", "--threads", str(threads), "--no-verify"]
        command = [sys.executable, "-m", "qcompiler", *ways, task.model(), *common, "--seed", str(seed), "-o", out]
        cost = run(command, Path(work) / "log")
        size = json.loads(out.with_suffix(".report.json").read_text("utf-8"))["bytes"]["after"]
        return *task.figures(out), size / 1e3, cost.seconds, cost.peak_mb


def _weights(model: Path) -> int:
    """Bytes of the weights of a float model."""
    import onnx

    return sum(4 * math.prod(each.dims) for each in onnx.load(model).graph.initializer)


def ways(threads: int, bench: Path | None) -> Iterator[tuple[str, Callable[[], Result]]]:
    """What each row is called, and how to get it."""
    every: list[tuple[Task, str, str]] = []
    for task in (DIGITS, PICTURES):
        every.append((task, "", ""))
        every += [(task, scheme, method) for scheme in WIDTHS for method in ("ptq", *METHODS)]
    every.append((SIGNED, "", ""))
    for method, scheme, form in DISCRETE:
        every.append((DIGITS if form == "folded" else SIGNED, scheme, method))
    every += [(DIGITS, "w1.58a8-static", "ptq"), (SIGNED, "w1.58a1", "ptq"), (SENTENCES, "", "")]
    every += [
        (SENTENCES, scheme, method) for scheme in ("w8a8", "w4a8", "w4a8-static") for method in ("ptq", "qat", "lsq")
    ]
    if bench is not None:
        every += [(_text(bench), "w2a16-g32-asym", method) for method in ("ptq", "lsq")]
    for task, scheme, method in every:
        yield f"{task.name} {scheme} {method}".strip(), partial(measure, task, scheme, method, threads)


def table(results: list[Result]) -> str:
    """The rows as Markdown."""
    rows = [
        [r.task, r.scheme, r.method, f"{100 * r.right:.1f} %", f"{r.error:.4f}", f"{r.kb:.0f}", f"{r.seconds:.0f}",
         f"{r.peak_mb:.0f}"]
        for r in results
    ]  # fmt: skip
    return markdown(["model", "scheme", "method", "right", "error", "weights kB", "seconds", "peak MB"], rows, 3)


def failures(results: list[Result]) -> Iterator[str]:
    """What is not in the order that it should be in."""
    # By the error, which is what training lowers: what is right of a few hundred pictures is uncertain by half a point.
    found = {(r.task, r.scheme, r.method): r.error for r in results}
    for (task, scheme, method), error in found.items():
        bits = re.fullmatch(r"w([23])a\1", scheme)
        better = {"ptq": "pact", "pact": "lsq"}.get(method)
        if bits and better and found.get((task, scheme, better), error) > error:
            yield f"{task} {scheme}: {better} is behind {method}"
    right = {(r.scheme, r.method): r.right for r in results if r.task == "digits"}
    lsq, exact = right.get(("w4a4", "lsq")), right.get(("float", ""))
    if lsq is not None and exact is not None and lsq < exact - 0.01:
        yield "digits w4a4 lsq: more than a point behind float"
    errors = {r.method: r.error for r in results if r.task == "text"}
    if {"ptq", "lsq"} <= errors.keys() and errors["lsq"] > 0.6 * errors["ptq"]:
        yield f"text: lsq leaves {errors['lsq'] / errors['ptq']:.0%} of the divergence (60 %)"


def main() -> None:
    """Measure the rows asked for, print the table and what is out of order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    row_options(parser, "digits or lsq")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of the compiler (default: all cores)")
    parser.add_argument(
        "--bench", type=Path, metavar="DIR", help="made by benchmarks.zoo.smollm2, for the rows of text"
    )
    args = parser.parse_args()
    results = collect(ways(args.threads, args.bench), args.only, args.save)
    conclude(table(results), failures(results))


if __name__ == "__main__":
    main()
