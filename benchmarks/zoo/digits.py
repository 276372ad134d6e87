"""A small residual network for scikit-learn's handwritten digits, trained here: labelled data for training methods.

| figure | meaning | float model |
|---|---|---|
| `accuracy` | share of 597 held-out pictures of 8 by 8 pixels that get their label | 0.985 |

Three forms, all with dynamic batch, opset 18:

    folded      8 Conv with their BatchNormalization folded in, Relu between them, and a Gemm
    unfolded    the same with 8 BatchNormalization of their own
    signed      another network of the same layers, with Clip to [-1, 1] for Relu, for activations of one bit

image [batch, 1, 8, 8] float32 between 0 and 1 -> logits [batch, 10] float32. Training takes 20 seconds a network.

    python -m benchmarks.zoo.digits                      all figures, of all float exports
    python -m benchmarks.zoo.digits accuracy MODEL.onnx...

Needs onnxruntime, and to export torch and onnxscript.
"""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.zoo.cache import publish, root
from benchmarks.zoo.exports import command_line, exported
from benchmarks.zoo.packages import fetch
from benchmarks.zoo.vision_audio import open_session
from qcompiler.numerics.metrics import kl_divergence

if TYPE_CHECKING:
    from torch import nn

FORMS = ("folded", "unfolded", "signed")
TRAINING = 1200
_EPOCHS, _BATCH = 30, 32


@cache
def pictures() -> tuple[np.ndarray, np.ndarray]:
    """All pictures, float32 ``[1797, 1, 8, 8]``, and labels, int64 ``[1797]``, in an order that a seed draws."""
    rows = np.loadtxt(next(fetch("digits").glob("sklearn/datasets/data/digits.csv.gz")), delimiter=",")
    rows = rows[np.random.default_rng(0).permutation(len(rows))]
    return rows[:, :-1].reshape(-1, 1, 8, 8).astype(np.float32) / 16, rows[:, -1].astype(np.int64)


def training_data() -> tuple[Path, Path]:
    """Files of the pictures to learn from, a row each, and of their labels."""
    folder = root() / "digits-rows"
    if not folder.exists():
        with publish(folder) as draft:
            draft.mkdir()
            np.save(draft / "image.npy", pictures()[0][:TRAINING])
            np.save(draft / "labels.npy", pictures()[1][:TRAINING])
    return folder / "image.npy", folder / "labels.npy"


def exported_digits(form: str = "folded") -> Path:
    """Return the float model in one of its forms."""
    return exported("benchmarks.zoo.digits", form)


def accuracy(model: Path) -> float:
    """Share of the held-out pictures that get their label."""
    images, labels = pictures()
    (logits,) = open_session(model).run(None, {"image": images[TRAINING:]})
    return float(np.mean(logits.argmax(-1) == labels[TRAINING:]))


def divergence(model: Path, form: str = "folded") -> float:
    """KL of the held-out pictures' classes from those of the float model, the mean, in nats."""
    images = pictures()[0][TRAINING:]
    logits = [open_session(each).run(None, {"image": images})[0] for each in (exported_digits(form), model)]
    return float(kl_divergence(*logits).mean())


def network(*, signed: bool) -> "nn.Module":
    """The network, not trained."""
    import torch
    from torch import nn

    activation = nn.Hardtanh if signed else nn.ReLU

    class Residual(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.first, self.second = layer(channels, channels), layer(channels, channels)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.second(self.first(x))

    def layer(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
        conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), activation())

    body = [layer(1, 8), Residual(8), layer(8, 16, 2), Residual(16), layer(16, 16, 2), layer(16, 16)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def train(*, signed: bool) -> "nn.Module":
    """The network, trained on the labels with shifts by one pixel."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    torch.set_num_threads(1)  # the same weights on every machine of a kind
    images, labels = (torch.from_numpy(array[:TRAINING]) for array in pictures())
    model = network(signed=signed)
    steps = _EPOCHS * -(-TRAINING // _BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in range(_EPOCHS):
        for rows in torch.randperm(TRAINING).split(_BATCH):
            moved = torch.roll(images[rows], tuple(torch.randint(-1, 2, (2,)).tolist()), (2, 3))
            loss = nn.functional.cross_entropy(model(moved), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def export(form: str, file: Path) -> None:
    """Write a form of the model to a file."""
    import torch
    from onnx_ir.passes.common import RemoveUnusedNodesPass
    from onnxscript.optimizer import fold_constants

    made = torch.onnx.export(
        train(signed=form == "signed"),
        (torch.zeros(2, 1, 8, 8),),
        dynamo=True,
        opset_version=18,
        optimize=form != "unfolded",
        verbose=False,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes={"input": {0: torch.export.Dim("batch", min=1, max=2048)}},
    )
    if form == "unfolded":  # what the optimizer does but for its rewriting rules, which fold BatchNormalization
        fold_constants(made.model)
        RemoveUnusedNodesPass()(made.model)
    made.save(str(file), external_data=False)


FIGURES = {"accuracy": accuracy}

if __name__ == "__main__":
    command_line(__doc__, FIGURES, FORMS, exported_digits, export)
