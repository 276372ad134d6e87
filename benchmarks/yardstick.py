"""How far a quantized language model is from the float one: KL divergence, top-1 agreement and perplexity.

    python benchmarks/yardstick.py MODEL.onnx... --bench DIR [--windows 16]

DIR is made by `python -m benchmarks.zoo.smollm2 DIR`, or holds at least onnx/model.onnx (the float model) and
brown_eval.npy (token ids [windows, seq] of held-out text). The first run writes the float model's log-probabilities to
DIR/reference.npy, float16 [windows, seq, vocab], 25 MB a window; later runs read it a few rows at a time. Models are
scored one after the other and one window at a time.

KL is the mean over tokens of KL(float || quantized) in nats, top-1 the share of tokens whose most likely successor is
the same. Figures are comparable for the same windows only.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROWS = 32
"""Positions whose vocabulary-wide rows are held as float32 at once."""
_CACHE_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
}


@dataclass(frozen=True)
class Score:
    """One model's figures.

    Attributes:
        model: path as given.
        kl: mean KL divergence from the float model, nats a token.
        top1: share of tokens with the float model's most likely successor, 0 to 1.
        ppl: perplexity of the model.
        ppl_float: perplexity of the float model on the same windows.
        mb: size of the model with its external data, 10^6 bytes.
        seconds: spent in the model, scoring excluded.
        windows: number of windows scored.
    """

    model: str
    kl: float
    top1: float
    ppl: float
    ppl_float: float
    mb: float
    seconds: float
    windows: int

    def __str__(self) -> str:
        """One line with units."""
        return (
            f"{self.model}: KL {self.kl:.4f} nats  top-1 {self.top1:.4f}  "
            f"ppl {self.ppl:.3f} (float {self.ppl_float:.3f})  "
            f"{self.mb:.1f} MB  {self.seconds:.1f} s  {self.windows} windows"
        )


class CausalLM:
    """An ONNX causal language model on the CPU provider; a key-value cache, if it has one, is fed empty."""

    def __init__(self, path: Path, custom_ops: Path | None = None, threads: int = 0) -> None:
        """Load a model.

        Args:
            path: the .onnx file; beside it genai_config.json where the cache's head size is symbolic.
            custom_ops: shared library of custom ops to register.
            threads: of the session; 0 lets ONNX Runtime choose.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        if custom_ops:
            options.register_custom_ops_library(str(custom_ops))
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._config = path.with_name("genai_config.json")

    def logits(self, tokens: np.ndarray, pieces: int = 1) -> np.ndarray:
        """Token ids [seq] -> logits [seq, vocab] in the model's own dtype.

        In several pieces, one run each, every piece attends to the cache of those before it.
        """
        outputs = [value.name for value in self._session.get_outputs()]
        cache: dict[str, np.ndarray] = {}
        logits, seen = [], 0
        for piece in np.array_split(tokens, pieces):
            feeds = {v.name: self._feed(v, piece[None], seen) for v in self._session.get_inputs()} | cache
            wanted = outputs if pieces > 1 else ["logits"]
            results = dict(zip(wanted, self._session.run(wanted, feeds), strict=True))
            logits.append(results.pop("logits")[0])
            cache = {name.replace("present", "past_key_values"): array for name, array in results.items()}
            seen += len(piece)
        return np.concatenate(logits) if pieces > 1 else logits[0]

    def _feed(self, value: Any, tokens: np.ndarray, seen: int) -> np.ndarray:
        """Return the array for one input of the model, for tokens [1, seq] behind `seen` others."""
        if value.name == "input_ids":
            return tokens
        if value.name == "attention_mask":
            return np.ones((1, seen + tokens.shape[1]), tokens.dtype)
        if value.name == "position_ids":
            return np.arange(seen, seen + tokens.shape[1])[None]
        _, heads, _, size = value.shape  # past keys or values [batch, heads, past, head size]
        if not isinstance(size, int):
            size = json.loads(self._config.read_text())["model"]["decoder"]["head_size"]
        return np.zeros((1, heads, 0, size), _CACHE_DTYPES[value.type])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logits [rows, vocab] -> natural log-probabilities float32 [rows, vocab]."""
    logits = logits.astype(np.float32)
    logits -= logits.max(-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return logits


def in_chunks(length: int) -> Iterator[slice]:
    """Yield slices of at most ROWS positions that cover range(length)."""
    return (slice(start, min(start + ROWS, length)) for start in range(0, length, ROWS))


def reference(bench: Path, tokens: np.ndarray) -> np.ndarray:
    """Return the float model's log-probabilities, memory-mapped float16 [windows, seq, vocab].

    They are computed, for tokens [windows, seq], if the file has fewer windows or is older than the float model.
    """
    model, file = bench / "onnx" / "model.onnx", bench / "reference.npy"
    if file.exists() and file.stat().st_mtime >= model.stat().st_mtime:
        cached = np.load(file, mmap_mode="r")
        if len(cached) >= len(tokens):
            return cached
    float_model = CausalLM(model)
    with tempfile.TemporaryDirectory(dir=bench, prefix=".reference-") as work:
        draft = Path(work) / file.name
        shape = (*tokens.shape, float_model.logits(tokens[0, :2]).shape[-1])
        store = np.lib.format.open_memmap(draft, "w+", np.float16, shape)
        for index, window in enumerate(tokens):
            logits = float_model.logits(window)
            for rows in in_chunks(len(window)):
                store[index, rows] = log_softmax(logits[rows])
        store.flush()
        draft.replace(file)
    return np.load(file, mmap_mode="r")


def compare(logits: np.ndarray, expected: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Score one window.

    Args:
        logits: of the candidate [seq, vocab].
        expected: float16 log-probabilities of the float model [seq, vocab].
        window: token ids [seq].

    Returns:
        float32 [4]: mean KL, top-1 agreement, negative log-likelihood of the candidate and of the float model. The
        likelihoods are means over the seq - 1 tokens that have a successor.
    """
    successor = np.append(window[1:], 0)
    columns = np.empty((4, len(window)), np.float32)
    for rows in in_chunks(len(window)):
        got, want = log_softmax(logits[rows]), expected[rows].astype(np.float32)
        index = np.arange(len(got)), successor[rows]
        columns[:, rows] = (
            (np.exp(want) * (want - got)).sum(-1),
            got.argmax(-1) == want.argmax(-1),
            -got[index],
            -want[index],
        )
    return np.concatenate([columns[:2].mean(-1), columns[2:, :-1].mean(-1)])


def score(
    model: Path, bench: Path, windows: int = 16, custom_ops: Path | None = None, threads: int = 0, pieces: int = 1
) -> Score:
    """Compare a model with the float model of a bench folder.

    Args:
        model: the .onnx file.
        bench: folder with onnx/model.onnx and brown_eval.npy.
        windows: how many windows of brown_eval.npy to score, from the first.
        custom_ops: shared library of custom ops that the model needs.
        threads: of the session; 0 lets ONNX Runtime choose.
        pieces: runs that a window is cut into; those behind the first attend to the cache.

    Returns:
        The model's figures.
    """
    tokens = np.load(bench / "brown_eval.npy")[:windows]  # [windows, seq]
    expected = reference(bench, tokens)
    candidate = CausalLM(model, custom_ops, threads)
    results, seconds = [], 0.0
    for window, want in zip(tokens, expected, strict=False):  # the cache may hold more windows
        start = time.perf_counter()
        logits = candidate.logits(window, pieces)
        seconds += time.perf_counter() - start
        results.append(compare(logits, want, window))
    kl, top1, nll, nll_float = np.mean(results, 0, np.float64).tolist()
    files = (file for file in model.absolute().parent.iterdir() if file.name.startswith(model.name))
    return Score(
        model=str(model),
        kl=kl,
        top1=top1,
        ppl=math.exp(nll),
        ppl_float=math.exp(nll_float),
        mb=sum(file.stat().st_size for file in files) / 1e6,
        seconds=seconds,
        windows=len(tokens),
    )


def main() -> None:
    """Print a line of figures for each model on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL.onnx")
    parser.add_argument("--bench", type=Path, required=True, metavar="DIR", help="made by benchmarks.zoo.smollm2")
    parser.add_argument("--windows", type=int, default=16, help="windows of evaluation text (default: %(default)s)")
    parser.add_argument("--custom-ops", type=Path, metavar="LIBRARY", help="shared library of custom ops to register")
    parser.add_argument("--threads", type=int, default=0, help="threads of the session (default: one a core)")
    parser.add_argument(
        "--pieces", type=int, default=1, help="runs a window is cut into, each using the cache (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, one object a line")
    args = parser.parse_args()
    for model in args.models:
        figures = score(model, args.bench, args.windows, args.custom_ops, args.threads, args.pieces)
        print(json.dumps(asdict(figures)) if args.json else figures, flush=True)


if __name__ == "__main__":
    main()
