#!/usr/bin/env python3
"""Compile the small language model of this folder to 4 bits and let both write, before and after.

The model has learnt English from the novels of Jane Austen alone, so it writes like her, more or less.
"""

import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from qcompiler.runtime import require_onnxruntime

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
OUTPUT = ROOT / "build" / "austen" / "model.w4a16.onnx"
CONTEXT = 256
PROMPTS = ("Elizabeth could not", "The next morning,")
WORDS = 40
TEMPERATURE = 0.7
SEED = 1813


class Writer:
    """A language model that continues text."""

    def __init__(self, path: Path, tokenizer: Tokenizer) -> None:
        """Load the model at `path`."""
        runtime = require_onnxruntime()
        self.session: Any = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.tokenizer = tokenizer

    def logits(self, ids: list[int]) -> np.ndarray:
        """Logits float32 [seq, vocab] after each of the token ids [seq]."""
        row = np.asarray([ids], np.int64)
        values = self.session.run(["logits"], {"input_ids": row, "attention_mask": np.ones_like(row)})
        return np.asarray(values[0][0])

    def write(self, prompt: str, temperature: float) -> str:
        """Continue `prompt`; at temperature 0 with the likeliest token each time, else with a random one.

        The random numbers depend on the seed and the position alone (Gumbel noise on the logits), so that two models
        that agree write the same.
        """
        random = np.random.default_rng(SEED)
        ids = list(self.tokenizer.encode(prompt).ids)
        start = len(ids)
        while len(self.tokenizer.decode(ids[start:]).split()) <= WORDS and len(ids) < CONTEXT:
            last = self.logits(ids)[-1]
            ids.append(int(np.argmax(last + temperature * random.gumbel(size=last.shape))))
        text = " ".join(self.tokenizer.decode(ids[start:]).split()[:WORDS])
        return f"{prompt} {text} ..."

    def perplexity(self, text: str) -> float:
        """Perplexity per token on `text`, in windows of CONTEXT tokens."""
        ids = self.tokenizer.encode(text).ids
        total, count = 0.0, 0
        for start in range(0, len(ids) - CONTEXT + 1, CONTEXT):
            window = ids[start : start + CONTEXT]
            logits = self.logits(window)[:-1].astype(np.float64)  # [CONTEXT - 1, vocab]
            logits -= logits.max(-1, keepdims=True)
            chosen = logits[np.arange(len(logits)), window[1:]] - np.log(np.exp(logits).sum(-1))
            total, count = total - float(chosen.sum()), count + len(chosen)
        return float(np.exp(total / count))


def compile_model(source: Path) -> None:
    """Run the command that compiles the model, and show it."""
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    options = ["--scheme", "w4a16", "--calibration", str(HERE / "calibration.txt")]
    options += ["--tokenizer", str(HERE / "tokenizer.json"), "--sequence-length", str(CONTEXT), "--force"]
    command = ["qcompile", str(source), "--output", str(OUTPUT), *options]
    shown = [word.removeprefix(f"{ROOT}/") for word in command]
    print("$", shlex.join(shown), flush=True)
    program = Path(sys.executable).with_name("qcompile")
    # The shown paths are relative to the root of the repository.
    finished = subprocess.run([str(program), *shown[1:]], cwd=ROOT, check=False)
    if finished.returncode:
        sys.exit(finished.returncode)


def main() -> None:
    """Compile, write, compare."""
    start = time.perf_counter()
    source = HERE / "model.onnx"
    compile_model(source)
    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    writers = {"float": Writer(source, tokenizer), "w4a16": Writer(OUTPUT, tokenizer)}
    for prompt in PROMPTS:
        for how, temperature in (("the likeliest words", 0.0), (f"temperature {TEMPERATURE}, one seed", TEMPERATURE)):
            print(f"\n{prompt} ...  ({how})")
            for name, writer in writers.items():
                print(f"  {name}: {writer.write(prompt, temperature)}")
    held_out = (HERE / "held_out.txt").read_text("utf-8")
    print("\nOn text that neither the training nor the calibration has seen:")
    for (name, writer), path in zip(writers.items(), (source, OUTPUT), strict=True):
        print(f"  {name}: perplexity {writer.perplexity(held_out):.2f}, {path.stat().st_size / 1e6:.1f} MB")
    print(f"\n{time.perf_counter() - start:.0f} s in all; the compiled model is {OUTPUT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
