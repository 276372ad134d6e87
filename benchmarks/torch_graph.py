"""Graphs run by PyTorch: which operators pass the standard's own tests, and whole models beside ONNX Runtime.

    python -m benchmarks.torch_graph [bench] [--only TEXT]

`bench` is the folder that `python -m benchmarks.zoo.smollm2 bench` has made, by default the one in the zoo. Prints two
Markdown tables: operators with the number of node tests of the ONNX package that each passes (a test counts for every
operator in it), and for each model the largest relative error of an output (norm of the difference over the norm of
ONNX Runtime's output, its optimizations switched off), with the seconds of a first run in PyTorch. Exit code 1 if an
error is above 1e-4. Run it from the repository's root; it needs the extras `dev`, `cpu` and `real`.
"""

import argparse
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.zoo import efficientnet, minilm, vision_audio, whisper
from benchmarks.zoo.cache import root
from qcompiler.files.loader import load_model
from qcompiler.session import OrtRunner

BOUND = 1e-4
_TOKENS = 64


@dataclass(frozen=True)
class Subject:
    """A model, and inputs to run it on."""

    model: Callable[[], Path]
    feeds: Callable[[Path], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Result:
    """What one model gave; `error` is the largest of its outputs'."""

    model: str
    nodes: int
    operators: int
    error: float
    seconds: float


def _tokens(bench: Path, _: Path) -> dict[str, np.ndarray]:
    ids = np.load(bench / "brown_eval.npy")[:1, :_TOKENS].astype(np.int64)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def _prompt(bench: Path, model: Path) -> dict[str, np.ndarray]:
    """Tokens in front of an empty cache."""
    feeds = _tokens(bench, model)
    for value in load_model(model).graph.inputs:
        if value.name is not None and value.name.startswith("past_"):
            assert value.shape is not None
            shape = [1, value.shape[1], 0, 64]
            feeds[value.name] = np.zeros(shape, np.float32)
    return feeds


def _first(folder: Callable[[], Path], _: Path) -> dict[str, np.ndarray]:
    return dict(np.load(min(folder().glob("*.npz"))))


def subjects(bench: Path) -> dict[str, Subject]:
    """The models by name."""
    return {
        "smollm2": Subject(lambda: bench / "onnx" / "model.onnx", partial(_tokens, bench)),
        "smollm2-genai": Subject(lambda: bench / "genai" / "model.onnx", partial(_prompt, bench)),
        **{
            f"minilm-{form}": Subject(
                partial(minilm.exported_minilm, form), lambda _: minilm.feeds([old for old, _ in minilm.verses()[:8]])
            )
            for form in minilm.FORMS
        },
        **{
            f"whisper-{part}": Subject(
                partial(whisper.exported_part, part), partial(_first, partial(whisper.calibration_folder, part))
            )
            for part in ("encoder", "decoder")
        },
        "efficientnet-lite0": Subject(
            efficientnet.exported_efficientnet, partial(_first, efficientnet.calibration_folder)
        ),
        "ocr-recognition": Subject(
            lambda: vision_audio.packaged()["character_error_rate"], lambda _: vision_audio.line_feeds(1)[0]
        ),
        "ocr-detection": Subject(
            lambda: vision_audio.packaged()["text_mask_overlap"], lambda _: vision_audio.page_feeds(1)[0]
        ),
        "speech-detection": Subject(
            lambda: vision_audio.packaged()["speech_fraction"], lambda _: vision_audio.frame_feeds(1)[0]
        ),
    }


def measure(name: str, subject: Subject) -> Result:
    """Run a model once in PyTorch and once in ONNX Runtime."""
    import torch

    from qcompiler.torch_graph import TorchGraph
    from qcompiler.torch_graph.dtypes import from_numpy

    path = subject.model()
    model = load_model(path)
    feeds = subject.feeds(path)
    graph = TorchGraph.from_model(model)
    given = {key: from_numpy(array) for key, array in feeds.items()}
    start = time.perf_counter()
    with torch.no_grad():
        results = graph.run(given)
    seconds = time.perf_counter() - start
    errors = []
    with OrtRunner(path, threads=1, optimize=False, prepack=False) as runner:
        for key, expected in runner.run(feeds).items():
            difference = results[key].to(torch.float64).numpy() - expected
            errors.append(float(np.linalg.norm(difference) / max(float(np.linalg.norm(expected)), 1e-30)))
    kinds = {(node.domain, node.op_type) for node in model.graph}
    return Result(name, len(model.graph), len(kinds), max(errors), seconds)


def node_tests() -> Counter[str]:
    """Operator -> node tests that it is part of and that pass."""
    from onnx.backend.test.loader import load_model_tests

    from qcompiler.torch_graph import supported_ops
    from tests.torch_graph.test_backend_nodes import REFUSED, check, is_claimed, operators

    claimed = {name for name, _ in supported_ops()[""]}
    with warnings.catch_warnings():  # some compute with infinities on purpose
        warnings.simplefilter("ignore")
        cases = [case for case in load_model_tests(kind="node") if is_claimed(case, claimed)]
    passed = Counter(dict.fromkeys(claimed, 0))
    for case in cases:
        if case.name not in REFUSED:
            check(case)
            passed.update(name for _, name in operators(case.model.graph))
    return passed


def main() -> int:
    """Print both tables; 1 if a model is beyond the bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path, nargs="?", default=root() / "smollm2", help="folder of the language model")
    parser.add_argument("--only", default="", metavar="TEXT", help="models whose names hold this, and no node tests")
    args = parser.parse_args()
    if not args.only:
        print("| operator | node tests passed |\n|---|---:|")
        for name, count in sorted(node_tests().items()):
            print(f"| {name} | {count} |")
    print("\n| model | nodes | operators | largest relative error | seconds |\n|---|---:|---:|---:|---:|")
    worst = 0.0
    for name, subject in subjects(args.bench).items():
        if args.only in name:
            found = measure(name, subject)
            worst = max(worst, found.error)
            cells = [found.model, found.nodes, found.operators, f"{found.error:.1e}", f"{found.seconds:.2f}"]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    return int(worst > BOUND)


if __name__ == "__main__":
    sys.exit(main())
