"""The models, the data and the figures that cases name; everything is fetched or built when it is asked for."""

import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from benchmarks import genai_tokens, yardstick
from benchmarks.zoo import efficientnet, minilm, vision_audio, whisper
from benchmarks.zoo.cache import publish, root
from benchmarks.zoo.exports import write_feeds

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


MODELS: Mapping[str, Callable[[], Path]] = {
    "smollm2": lambda: bench() / "onnx" / "model.onnx",
    "smollm2-genai": lambda: bench() / "genai",
    "ocr-recognition": lambda: vision_audio.packaged()["character_error_rate"],
    "ocr-detection": lambda: vision_audio.packaged()["text_mask_overlap"],
    "silero-vad": lambda: vision_audio.packaged()["speech_fraction"],
    "minilm-int8": lambda: vision_audio.packaged()["embedding_agreement"],
    "minilm": minilm.exported_minilm,
    "minilm-opset14": lambda: minilm.exported_minilm("opset14"),
    "efficientnet-lite0": efficientnet.exported_efficientnet,
    "efficientnet-lite0-unfolded": lambda: efficientnet.exported_efficientnet(unfolded=True),
    "whisper-encoder": lambda: whisper.exported_part("encoder"),
    "whisper-decoder": lambda: whisper.exported_part("decoder"),
    "without-weights": _without_weights,
}

DATA: Mapping[str, Callable[[], Path]] = {
    "brown": lambda: bench() / "brown_train.npy",
    "lines": lambda: write_feeds(root() / "feeds-lines", vision_audio.line_feeds()),
    "pages": lambda: write_feeds(root() / "feeds-pages", vision_audio.page_feeds()),
    "frames": lambda: write_feeds(root() / "feeds-frames", vision_audio.frame_feeds()),
    "texts": minilm.calibration_folder,
    "pictures": efficientnet.calibration_folder,
    "speech": lambda: whisper.calibration_folder("encoder"),
    "transcripts": lambda: whisper.calibration_folder("decoder"),
}

# Of small models, at their tasks.
FIGURES: Mapping[str, Callable[[Path], float]] = {
    **vision_audio.FIGURES,
    **minilm.FIGURES,
    **efficientnet.FIGURES,
    **whisper.FIGURES,
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
    return FIGURES[name](model)
