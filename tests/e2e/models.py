"""The models, the data and the figures that cases name; everything is fetched or built when it is asked for."""

import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from benchmarks import genai_tokens, yardstick
from benchmarks.zoo import vision_audio
from benchmarks.zoo.cache import publish, root

_REPOSITORY = Path(__file__).parent.parent.parent
# Of the float model's answers, for `token_agreement`.
_ANSWER = 50


@cache
def bench() -> Path:
    """SmolLM2 as torch and as onnxruntime-genai export it, with its text; the first time takes 3 minutes."""
    folder = root() / "smollm2"
    # In a process of its own: the exporters warn about themselves, and a warning here is an error.
    subprocess.run([sys.executable, "-m", "benchmarks.zoo.smollm2", folder], check=True, cwd=_REPOSITORY)
    return folder


def _without_weights() -> Path:
    """A model in which nothing can be quantized."""
    path = root() / "without-weights.onnx"
    if not path.exists():
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 8]) for name in "xy"]
        graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", ends[:1], ends[1:])
        with publish(path) as draft:
            onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), draft)
    return path


def _as_files(name: str, feeds: Iterable[Mapping[str, np.ndarray]]) -> Path:
    """A folder of .npz files, one a feed."""
    folder = root() / f"feeds-{name}"
    if not folder.exists():
        with publish(folder) as draft:
            draft.mkdir()
            for index, arrays in enumerate(feeds):
                np.savez(draft / f"{index:03}.npz", **arrays)
    return folder


MODELS: Mapping[str, Callable[[], Path]] = {
    "smollm2": lambda: bench() / "onnx" / "model.onnx",
    "smollm2-genai": lambda: bench() / "genai",
    "ocr-recognition": lambda: vision_audio.packaged()["character_error_rate"],
    "ocr-detection": lambda: vision_audio.packaged()["text_mask_overlap"],
    "silero-vad": lambda: vision_audio.packaged()["speech_fraction"],
    "minilm-int8": lambda: vision_audio.packaged()["embedding_agreement"],
    "without-weights": _without_weights,
}

DATA: Mapping[str, Callable[[], Path]] = {
    "brown": lambda: bench() / "brown_train.npy",
    "lines": lambda: _as_files("lines", vision_audio.line_feeds()),
    "frames": lambda: _as_files("frames", vision_audio.frame_feeds()),
}


@cache
def _scores(model: Path, windows: int) -> yardstick.Score:
    return yardstick.score(model, bench(), windows)


@cache
def _answers() -> list[tuple[np.ndarray, list[int]]]:
    return genai_tokens.answers(genai_tokens.Deployed(MODELS["smollm2-genai"]()), _ANSWER)


def token_agreement(model: Path) -> float:
    """The share of the float model's tokens that a genai folder's model would choose too, through onnxruntime-genai."""
    return statistics.fmean(genai_tokens.token_agreement(genai_tokens.Deployed(model.parent), _answers()))


def figure(name: str, model: Path, windows: int) -> float:
    """A figure of a model, by name."""
    if name in ("kl", "top1"):
        return float(getattr(_scores(model, windows), name))
    return token_agreement(model) if name == "token_agreement" else _own_figure(name, model)


@cache
def _own_figure(name: str, model: Path) -> float:
    return vision_audio.FIGURES[name](model)
