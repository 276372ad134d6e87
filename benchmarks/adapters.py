"""A language model in 4 bits learns to write like Jane Austen: adapters beside its weights (QLoRA), biases (BitFit).

    python -m benchmarks.adapters DIR [--only TEXT] [--save FILE.jsonl] [--steps N]

DIR holds what `python -m benchmarks.zoo.smollm2 DIR` made. The text is that of `examples/austen`: 85 kB to learn from,
44 kB to judge by, in rows of 256 tokens. Each row of the table is a command, `qcompile` or `qcompiler tune --loss
next`; the adapters are a file for ONNX Runtime's LoraAdapter, which is loaded, and the model without it has to be the
quantized one. The exit code is 1 if QLoRA lowers perplexity by less than a tenth or takes more than 2 GB, if BitFit
does not lower it or trains more than 0.2 % of the parameters, or if the adapter does not switch the model. Scales of
NF4 are quantized too; it needs the library of our operators (`python -m qcompiler.kernels.build`).
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.environments import run
from benchmarks.rows import collect, conclude, markdown, row_options
from benchmarks.run_all import FLOAT_ENDS
from benchmarks.zoo.vision_audio import open_session

LENGTH = 256
EXAMPLE = Path(__file__).parent.parent / "examples" / "austen"
# Name, scheme, method, and options of the pass.
WAYS = (
    ("quantized", "w4a16-g64-asym", "", ""),
    ("QLoRA", "w4a16-g64-asym", "qlora", "export=adapter,rank=16"),
    ("BitFit", "w4a16-g64-asym", "bitfit", ""),
    ("quantized", "w4a16-g64-nf4", "", ""),
    ("QLoRA", "w4a16-g64-nf4", "qlora", "export=adapter,rank=16"),
)


@dataclass(frozen=True)
class Result:
    """A row: perplexity on the held-out text, without the adapter too, and what was trained at what cost."""

    name: str
    scheme: str
    perplexity: float
    without: float
    trained: int
    seconds: float
    peak_mb: float


def rows_of(bench: Path, name: str) -> np.ndarray:
    """A text of the example as token ids, int64 [rows, LENGTH]."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(bench / "hf" / "tokenizer.json")).encode((EXAMPLE / name).read_text("utf-8")).ids
    count = len(ids) // LENGTH
    return np.array(ids[: count * LENGTH], np.int64).reshape(count, LENGTH)


def perplexity(model: Path, rows: np.ndarray, adapter: Path | None = None) -> float:
    """Of the next token, with an adapter or without."""
    import onnxruntime as ort

    session, options = open_session(model), ort.RunOptions()
    if adapter is not None:
        loaded = ort.LoraAdapter()
        loaded.Load(str(adapter))
        options.add_active_adapter(loaded)
    names = [value.name for value in session.get_inputs() if "lora" not in value.name]
    total, count = 0.0, 0
    for row in rows:
        ids = row[None]
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        given["position_ids"] = np.arange(LENGTH, dtype=np.int64)[None]
        logits = session.run(None, {name: given[name] for name in names}, options)[0][0, :-1].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        chosen = logits[np.arange(LENGTH - 1), row[1:]] - np.log(np.exp(logits).sum(-1))
        total, count = total - float(chosen.sum()), count + LENGTH - 1
    return math.exp(total / count)


def measure(bench: Path, way: tuple[str, str, str, str], steps: int) -> Result:
    """Make a model in a way, and judge it."""
    name, scheme, method, more = way
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        np.save(folder / "train.npy", rows_of(bench, "calibration.txt"))
        out = folder / "model.onnx"
        data = [
            "--calibration",
            folder / "train.npy",
            "--no-verify",
            "--algorithm",
            "codebook,double_quantize" if "nf4" in scheme else "gptq",
        ]
        training = ["--method", method, "--loss", "next", "--steps", str(steps), "--batch", "2"]
        training += ["--options", more] if more else []
        command = [sys.executable, "-m", "qcompiler", *(["tune", *training] if method else ["compile"])]
        source = bench / "onnx" / "model.onnx"
        cost = run([*command, source, "--scheme", scheme, *FLOAT_ENDS, *data, "-o", out], folder / "log")
        held_out, adapter = rows_of(bench, "held_out.txt"), out.with_suffix(".onnx_adapter")
        without = perplexity(out, held_out)
        found = perplexity(out, held_out, adapter) if adapter.exists() else without
        return Result(name, scheme, found, without, _trained(out, method), cost.seconds, cost.peak_mb)


def _trained(model: Path, method: str) -> int:
    """How many numbers were trained: those of the adapters, or biases of products."""
    import onnx

    graph = onnx.load(model, load_external_data=False).graph
    if method == "qlora":
        return sum(math.prod(each.dims) for each in graph.initializer if "_lora_" in each.name)
    biases = {node.input[5] for node in graph.node if node.op_type == "MatMulNBits" and len(node.input) > 5}
    return sum(math.prod(each.dims) for each in graph.initializer if each.name in biases) if method else 0


def _parameters(model: Path) -> int:
    """How many numbers the float model has."""
    import onnx

    graph = onnx.load(model, load_external_data=False).graph
    return sum(math.prod(each.dims) for each in graph.initializer if each.data_type == onnx.TensorProto.FLOAT)


def table(results: list[Result]) -> str:
    """The rows as Markdown."""
    rows = [
        [r.name, r.scheme, f"{r.perplexity:.2f}", f"{r.without:.2f}", f"{r.trained:,}", f"{r.seconds:.0f}",
         f"{r.peak_mb:.0f}"]
        for r in results
    ]  # fmt: skip
    return markdown(["way", "scheme", "perplexity", "without adapter", "trained", "seconds", "peak MB"], rows, 2)


def failures(results: list[Result], parameters: int) -> Iterator[str]:
    """What is not as it should be."""
    start = {r.scheme: r.perplexity for r in results if r.name == "quantized"}
    for r in (each for each in results if each.scheme in start):
        gain = 1 - r.perplexity / start[r.scheme]
        if r.name == "QLoRA" and (gain < 0.1 or r.peak_mb > 2000):
            yield f"QLoRA, {r.scheme}: {gain:.1%} less perplexity (10 %), {r.peak_mb:.0f} MB (2000)"
        if r.name == "QLoRA" and abs(r.without / start[r.scheme] - 1) > 1e-3:
            yield f"QLoRA, {r.scheme}: without its adapter the model has {r.without:.2f}, not {start[r.scheme]:.2f}"
        if r.name == "BitFit" and (gain <= 0 or r.trained > 0.002 * parameters):
            yield f"BitFit, {r.scheme}: {gain:.1%} less perplexity, {r.trained:,} of {parameters:,} parameters"


def ways(bench: Path, steps: int) -> Iterator[tuple[str, Callable[[], Result]]]:
    """What each row is called, and how to get it."""
    for way in WAYS:
        yield f"{way[0]} {way[1]}", partial(measure, bench, way, steps)


def main() -> None:
    """Measure the rows asked for, print the table and what fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path, metavar="DIR", help="made by benchmarks.zoo.smollm2")
    row_options(parser, "QLoRA or nf4")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="of training (default: %(default)s)")
    args = parser.parse_args()
    results = collect(ways(args.bench, args.steps), args.only, args.save)
    conclude(table(results), failures(results, _parameters(args.bench / "onnx" / "model.onnx")))


if __name__ == "__main__":
    main()
