"""Our own operators on a language model: each format with the library of operators and without it, and prompts of w4a8.

    python -m benchmarks.operators DIR [--only TEXT] [--save FILE.jsonl]

DIR holds what `python -m benchmarks.zoo.smollm2 DIR` made. The model is compiled in each format (GPTQ on 8 rows of
text, lookup table and lm_head float) and the one file is run in two processes: with the library registered, where
kernels run, and without, where bodies do. Of each: KL divergence from the float model on 16 windows of text, seconds to
load, peak anonymous memory of loading and scoring, milliseconds for the 256 tokens of a window and for one token. Where
kernels round activations to 8 bits (w4a8) and bodies do not, divergences differ by what that costs; where signs of
activations are all that is left (w1a1), a last bit that differs turns signs over, and divergences of what has become
noise differ by a part of themselves.

The last row compiles w4a8, the projection to the vocabulary included, for MatMulNBits too, and runs the same 256 tokens
through both in turns in one process; as floats the projection alone would take a third of the time of either. The
exit code is 1 if KL differs by more than 0.001 where both compute exactly, by more than 10 % where they count signs, or
if prompts take more than 0.55.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.peers.environments import run
from benchmarks.rows import collect, conclude, markdown, row_options
from benchmarks.run_all import compile_command
from benchmarks.yardstick import CausalLM, score
from qcompiler.kernels.library import library_path

WINDOWS, ROUNDS = 16, 12
# What --scheme says, and --custom-ops.
FORMATS = (
    ("w3a16-g64-asym", "always"),
    ("w3a16-g64-lut", "always"),
    ("w4a16-g64-lut", "always"),
    ("w2a16-g64-vq2", "always"),
    ("w2a16-g64-vq4", "always"),
    ("w1a16-g64", "always"),
    ("w1a1-g64", "always"),
    ("w4a8-g64-asym", "prefer"),
)
PROMPT = "w4a8 prompt"
MOST_DIFFERENCE, SIGNS_DIFFERENCE, MOST_TIME = 1e-3, 0.1, 0.55


@dataclass(frozen=True)
class Result:
    """A row: with the library or without, or the ratio of prompts; times in milliseconds but for `load`, in seconds."""

    scheme: str
    library: str
    mb: float
    kl: float
    load: float
    peak_mb: float
    prompt_ms: float
    token_ms: float


def compiled(bench: Path, work: Path, scheme: str, custom_ops: str, *, lm_head: str = "float") -> Path:
    """The model in a format; made once."""
    out = work / f"{scheme}-{custom_ops}-{lm_head}" / "model.onnx"
    if not out.exists():
        out.parent.mkdir()
        data = ("--calibration", bench / "brown_train.npy", "--samples", "8", "--no-verify", "--algorithm", "gptq")
        options = ["--embedding", "float", "--lm-head", lm_head, *data, "--custom-ops", custom_ops]
        run(compile_command(bench / "onnx" / "model.onnx", scheme, options, out), work / "log")
    return out


def milliseconds(model: CausalLM, tokens: np.ndarray, rounds: int) -> float:
    """The median time of some tokens, once it has run."""
    taken = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        model.logits(tokens)
        taken.append(time.perf_counter() - started)
    return 1e3 * statistics.median(taken[1:])


def worker(bench: Path, model: Path, library: Path | None) -> None:
    """Load, time and score a model, and print what was found as JSON."""
    started = time.perf_counter()
    loaded = CausalLM(model, library)
    load = time.perf_counter() - started
    window = np.load(bench / "brown_eval.npy")[0][:256]
    prompt, token = milliseconds(loaded, window, 3), milliseconds(loaded, window[:1], ROUNDS)
    del loaded
    found = score(model, bench, WINDOWS, library)
    print(json.dumps({"kl": found.kl, "mb": found.mb, "load": load, "prompt_ms": prompt, "token_ms": token}))


def measure(bench: Path, work: Path, scheme: str, custom_ops: str, *, with_library: bool) -> Result:
    """A format with the library or without."""
    model, log = compiled(bench, work, scheme, custom_ops), work / "worker"
    library = library_path() if with_library else None
    command = [sys.executable, "-m", "benchmarks.operators", bench, "--worker", model, str(library or "")]
    cost = run(command, log)
    found = json.loads(log.read_text().splitlines()[-1])
    return Result(scheme, "library" if with_library else "bodies", peak_mb=cost.peak_mb, **found)


def prompts(bench: Path, work: Path) -> Result:
    """Prompts through MatMul4Bits as a share of the time that they take through MatMulNBits."""
    scheme = FORMATS[-1][0]
    paths = [compiled(bench, work, scheme, way, lm_head=scheme) for way in ("prefer", "never")]
    models = [CausalLM(path, library_path()) for path in paths]
    window = np.load(bench / "brown_eval.npy")[0][:256]
    taken: list[list[float]] = [[], []]
    for turn in range(ROUNDS + 2):
        for which in ((0, 1), (1, 0))[turn % 2]:
            started = time.perf_counter()
            models[which].logits(window)
            if turn >= 2:
                taken[which].append(time.perf_counter() - started)
    ratio = statistics.median(mine / other for mine, other in zip(*taken, strict=True))
    tokens = [milliseconds(model, window[:1], ROUNDS) for model in models]
    kl = [score(path, bench, WINDOWS, library_path()).kl for path in paths]
    return Result(PROMPT, "ratio to MatMulNBits", 0.0, kl[0] - kl[1], 0.0, 0.0, ratio, tokens[0] / tokens[1])


def ways(bench: Path, work: Path) -> Iterator[tuple[str, partial[Result]]]:
    """What each row is called, and how to get it."""
    for scheme, custom_ops in FORMATS:
        for with_library in (True, False):
            yield scheme, partial(measure, bench, work, scheme, custom_ops, with_library=with_library)
    yield PROMPT, partial(prompts, bench, work)


def table(results: list[Result]) -> str:
    """The rows as Markdown."""
    rows = [
        [r.scheme, r.library, f"{r.mb:.1f}", f"{r.kl:.4f}", f"{r.load:.2f}", f"{r.peak_mb:.0f}", f"{r.prompt_ms:.0f}",
         f"{r.token_ms:.1f}"]
        if r.scheme != PROMPT
        else [r.scheme, r.library, "", f"{r.kl:+.4f}", "", "", f"{r.prompt_ms:.2f}", f"{r.token_ms:.2f}"]
        for r in results
    ]  # fmt: skip
    titles = ["scheme", "runs", "MB", "KL, nats", "load, s", "peak MB", "256 tokens, ms", "one token, ms"]
    return markdown(titles, rows, 2)


def failures(results: list[Result]) -> Iterator[str]:
    """What is not as it should be."""
    for r in results:
        if r.scheme == PROMPT and r.prompt_ms > MOST_TIME:
            yield f"prompts take {r.prompt_ms:.2f} of MatMulNBits' time; at most {MOST_TIME} is wanted"
    pairs = {scheme: [r.kl for r in results if r.scheme == scheme] for scheme, way in FORMATS if way == "always"}
    for scheme, kl in pairs.items():
        most = SIGNS_DIFFERENCE * max(kl, default=0) if scheme.startswith("w1a1") else MOST_DIFFERENCE
        if len(kl) == 2 and abs(kl[0] - kl[1]) > most:
            yield f"{scheme}: KL {kl[0]:.4f} with the library and {kl[1]:.4f} without"


def main() -> None:
    """Measure the rows asked for, print the table and what fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path, metavar="DIR", help="made by benchmarks.zoo.smollm2")
    row_options(parser, "w3a16 or prompt")
    parser.add_argument("--worker", nargs=2, metavar=("MODEL", "LIBRARY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        model, library = args.worker
        return worker(args.bench, Path(model), Path(library) if library else None)
    if library_path() is None:
        sys.exit("the library of operators is not built; python -m qcompiler.kernels.build makes it")
    with tempfile.TemporaryDirectory() as work:
        results = collect(ways(args.bench, Path(work)), args.only, args.save)
    conclude(table(results), failures(results))


if __name__ == "__main__":
    main()
