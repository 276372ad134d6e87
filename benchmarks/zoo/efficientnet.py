"""EfficientNet-Lite0, a classifier of pictures out of depthwise convolutions and ReLU6, beside its float form.

| figure | meaning | float model |
|---|---|---|
| `picture_agreement` | share of 200 crops of photographs that get the float model's class | 1 |
| `logit_sqnr` | SQNR of the 1,000 logits of these crops, in dB | infinite |

Depthwise channels differ in size by orders of magnitude, so that one scale for a whole weight loses most of them. There
are too few labelled pictures at hand to tell accuracy on ImageNet.

Two forms of the same weights, with dynamic batch, opset 18:

    folded      as exporters leave it: 49 Conv with their BatchNormalization and padding folded in, Clip between them
    unfolded    the same with 49 BatchNormalization and 17 Pad nodes of their own

image [batch, 3, 224, 224] float32 in RGB order, (pixel - 127) / 128 -> logits [batch, 1000] float32. Every figure is a
function of the path of an .onnx file:

    python -m benchmarks.zoo.efficientnet                                  all, of both float exports
    python -m benchmarks.zoo.efficientnet logit_sqnr MODEL.onnx...

Needs onnxruntime and Pillow, and to export torch, onnxscript and efficientnet-lite-pytorch.
"""

from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.zoo.cache import root
from benchmarks.zoo.exports import command_line, exported, write_feeds
from benchmarks.zoo.packages import fetch
from benchmarks.zoo.vision_audio import open_session
from qcompiler.numerics.metrics import error_sums, top1_agreement

if TYPE_CHECKING:
    from PIL import Image

FORMS = ("folded", "unfolded")
SIZE = 224
CROPS, BATCH = 200, 20
SMALLEST = 0.25  # share of a picture's area that a crop has at least
MEASURED = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "coins.png", "gravel.png", "page.png",
            "retina.jpg", "clock_motion.png", "grass.png")  # fmt: skip
CALIBRATION = ("rocket.jpg", "motorcycle_right.png", "hubble_deep_field.jpg", "ihc.png", "camera.png", "brick.png",
               "moon.png", "text.png", "cell.png", "horse.png")  # fmt: skip


def exported_efficientnet(*, unfolded: bool = False) -> Path:
    """Return the float model, with or without BatchNormalization nodes; exporting takes 20 seconds the first time."""
    return exported("benchmarks.zoo.efficientnet", FORMS[unfolded])


def export(form: str, file: Path) -> None:
    """Write a form of the model to a file."""
    import torch
    from efficientnet_lite_pytorch import EfficientNet
    from onnx_ir.passes.common import RemoveUnusedNodesPass
    from onnxscript.optimizer import fold_constants

    (weights,) = fetch("efficientnet-lite0").glob("*/models/*.pth")
    model = EfficientNet.from_name("efficientnet-lite0").eval()
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    made = torch.onnx.export(
        model,
        (torch.zeros(2, 3, SIZE, SIZE),),
        dynamo=True,
        opset_version=18,
        optimize=form == "folded",
        verbose=False,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes={"inputs": {0: torch.export.Dim("batch", min=1, max=256)}},
    )
    if form == "unfolded":  # what the optimizer does but for its rewriting rules, which fold BatchNormalization and Pad
        fold_constants(made.model)
        RemoveUnusedNodesPass()(made.model)
    made.save(str(file), external_data=False)


# --- pictures -------------------------------------------------------------------------------------


def random_crop(picture: "Image.Image", rng: np.random.Generator) -> np.ndarray:
    """Return a square part of a picture, flipped or not, as the model wants it: float32 [3, SIZE, SIZE].

    Its area is `SMALLEST` to 1 of that of the largest square.
    """
    from PIL import Image

    side = min(picture.size) * np.sqrt(rng.uniform(SMALLEST, 1))
    left, top = (rng.uniform(0, length - side) for length in picture.size)
    box = (left, top, left + side, top + side)
    crop = picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)
    pixels = (np.asarray(crop, np.float32) - 127) / 128  # [height, width, 3]
    return np.asarray(pixels[:, :: 1 if rng.random() < 0.5 else -1].transpose(2, 0, 1), np.float32)


def crops(names: Sequence[str], count: int, seed: int) -> np.ndarray:
    """Return random crops of scikit-image's pictures, taken in turns: float32 [count, 3, SIZE, SIZE]."""
    from PIL import Image

    folder = fetch("pictures") / "skimage" / "data"
    pictures = [Image.open(folder / name).convert("RGB") for name in names]
    rng = np.random.default_rng(seed)
    return np.stack([random_crop(pictures[index % len(pictures)], rng) for index in range(count)])


def calibration_feeds(count: int = 64) -> Iterator[dict[str, np.ndarray]]:
    """Yield inputs to calibrate on, a crop each, of pictures that no figure uses."""
    for crop in crops(CALIBRATION, count, seed=1):
        yield {"image": crop[None]}


def calibration_folder() -> Path:
    """Return a folder of .npz files with the inputs to calibrate on."""
    return write_feeds(root() / "feeds-pictures", calibration_feeds())


# --- figures --------------------------------------------------------------------------------------


def logits(model: Path, count: int = CROPS) -> np.ndarray:
    """Return a model's logits of the measured crops, float32 [count, 1000]."""
    session = open_session(model)
    pictures = crops(MEASURED, count, seed=0)
    return np.concatenate([session.run(None, {"image": pictures[i : i + BATCH]})[0] for i in range(0, count, BATCH)])


@cache
def float_logits() -> np.ndarray:
    """Return the logits of the float model as exporters leave it."""
    return logits(exported_efficientnet())


def agreement_and_sqnr(model: Path, reference: Path | None = None) -> tuple[float, float]:
    """Return the share of crops that two models put into the same class, and the SQNR of the logits in dB.

    Args:
        model: an .onnx file.
        reference: another one; None takes the float model.
    """
    return _agreement_and_sqnr(model, model.stat().st_mtime_ns, reference)


@lru_cache(maxsize=1)
def _agreement_and_sqnr(model: Path, _changed: int, reference: Path | None) -> tuple[float, float]:
    expected = logits(reference) if reference else float_logits()
    found = logits(model)
    return float(top1_agreement(expected, found).mean()), error_sums(expected, found).sqnr_db


def picture_agreement(model: Path) -> float:
    """Return the share of crops that get the float model's class."""
    return agreement_and_sqnr(model)[0]


def logit_sqnr(model: Path) -> float:
    """Return the SQNR of a model's logits against the float model's, in dB."""
    return agreement_and_sqnr(model)[1]


FIGURES = {f.__name__: f for f in (picture_agreement, logit_sqnr)}


if __name__ == "__main__":
    command_line(__doc__, FIGURES, FORMS, lambda form: exported_efficientnet(unfolded=form == "unfolded"), export)
