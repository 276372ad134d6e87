"""What descent lowers: how far answers are from those of the float model, or from labels.

A loss is called with two functions, since logits of a vocabulary are large: it asks for the float model's answers
first, keeps what it needs of them, and then for those of the model that learns.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from qcompiler.torch_graph.dtypes import from_numpy

__all__ = ["LOSSES", "Example", "Loss", "divergence", "token_rows"]

Answers = Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Example:
    """One batch.

    Attributes:
        feeds: What the model, or the block, reads.
        targets: What it should compute; empty where labels say so.
        mask: Which rows of that are tokens; None: all.
        labels: int64 ``[B]``, where there are any.
    """

    feeds: Mapping[str, np.ndarray]
    targets: Mapping[str, np.ndarray] = field(default_factory=dict)
    mask: np.ndarray | None = None
    labels: np.ndarray | None = None


@dataclass(frozen=True)
class Loss:
    """A loss.

    Attributes:
        function: Takes the answers of the model that learns, those of the float model, and the example; a scalar.
        taught: Whether it asks the float model.
        unit: For reports.
    """

    function: Callable[[Answers, Answers, Example], Tensor]
    taught: bool
    unit: str


def divergence(found: Answers, wanted: Answers, example: Example) -> Tensor:
    """KL(float || quantized) of logits ``[..., V]``, the mean over tokens, in nats; the sum over outputs."""
    goals = {name: functional.log_softmax(_rows(logits, example), -1) for name, logits in _floats(wanted())}
    results = found()
    return torch.stack(
        [_KlDivergence.apply(_rows(results[name], example), goals.pop(name)) for name in list(goals)]
    ).sum()


def squared_error(found: Answers, wanted: Answers, example: Example) -> Tensor:
    """Mean over tokens of the squared error of outputs, each relative to the squared target; the sum over outputs."""
    losses = []
    goals = dict(_floats(wanted()))
    results = found()
    for name, target in goals.items():
        rows, right = (token_rows(each.float(), example.mask) for each in (results[name], target))
        energy = right.square().mean(-1)
        # A token whose target is nearly zero counts no more than ten times what one in the middle counts.
        losses.append(((rows - right).square().mean(-1) / (energy + 0.1 * energy.median() + 1e-30)).mean())
    return torch.stack(losses).sum()


def cross_entropy(found: Answers, wanted: Answers, example: Example) -> Tensor:
    """Of the first output, logits ``[B, C]``, against labels ``[B]``."""
    del wanted
    _, logits = next(_floats(found()))
    return functional.cross_entropy(logits.float(), torch.from_numpy(example.labels))


def next_token(found: Answers, wanted: Answers, example: Example) -> Tensor:
    """Of the first output, logits ``[B, S, V]``, against the token ids that come next; padding is left out."""
    del wanted
    (ids,) = (array for array in example.feeds.values() if _token_ids(array))
    _, logits = next(_floats(found()))
    right = torch.from_numpy(np.asarray(ids[:, 1:], np.int64).copy())
    if example.mask is not None:
        right[~torch.from_numpy(np.asarray(example.mask[:, 1:], bool))] = -100
    return functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]).float(), right.reshape(-1))


LOSSES = {
    "kl": Loss(divergence, True, "nats"),
    "mse": Loss(squared_error, True, "relative squared error"),
    "labels": Loss(cross_entropy, False, "nats"),
    "next": Loss(next_token, False, "nats a token"),
}


def _token_ids(array: np.ndarray) -> bool:
    """Whether an input [B, S] holds token ids, and no mask or positions."""
    return bool(array.ndim == 2 and np.issubdtype(array.dtype, np.integer) and array.max() > array.shape[1])


def _floats(answers: Mapping[str, Tensor]) -> Any:
    return ((name, value) for name, value in answers.items() if value.is_floating_point())


def _rows(logits: Tensor, example: Example) -> Tensor:
    """[T, V] float32, padding left out."""
    return token_rows(logits, example.mask).reshape(-1, logits.shape[-1]).float()


def token_rows(values: Tensor, mask: np.ndarray | None) -> Tensor:
    """[B, S, ..., K] or [B * S, K] without padding; anything else as it is."""
    if mask is None:
        return values
    keep = from_numpy(mask)
    if values.ndim > 2 and values.shape[:2] == keep.shape:
        return values[keep]
    return values[keep.reshape(-1)] if values.ndim == 2 and len(values) == keep.numel() else values


class _KlDivergence(torch.autograd.Function):  # type: ignore[misc]
    """KL(p || q) for logits of q and logarithms of p, ``[T, V]``; its slope is (q - p) / T.

    What PyTorch would remember to differentiate it is several times the size of the logits.
    """

    @staticmethod
    def forward(context: Any, logits: Tensor, goals: Tensor) -> Tensor:
        """The mean over tokens; writes over `goals`."""
        found, wanted = functional.log_softmax(logits, -1), goals.exp()
        loss = torch.dot(wanted.flatten(), goals.sub_(found).flatten()) / len(goals)
        if context.needs_input_grad[0]:
            context.save_for_backward(found.exp_().sub_(wanted).div_(len(goals)))
        return loss

    @staticmethod
    def backward(context: Any, slope: Tensor) -> tuple[Tensor, None]:
        """The slope of the logits."""
        return context.saved_tensors[0] * slope, None
