"""The short row on which a model is run in every way there is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qcompiler.calibration import row_mask
from qcompiler.calibration_inputs import ModelInputs
from qcompiler.errors import CalibrationError, KernelError
from qcompiler.session import Feeds, InputSpec, OrtRunner

__all__ = ["Sample", "short_row", "shorten"]

_SHORT = 64


@dataclass(frozen=True)
class Sample:
    """The short row.

    Attributes:
        feeds: What is fed.
        expected: What the float model makes of it.
        mask: bool ``[B, S]``, False for padding; None if there is none.
        positions: Its positions; 0 if it is a row as it came.
    """

    feeds: Feeds
    expected: Feeds
    mask: np.ndarray | None
    positions: int


def shorten(feeds: Feeds, inputs: Sequence[InputSpec], length: int = _SHORT) -> Feeds | None:
    """The first positions of a row of tokens.

    Args:
        feeds: One row.
        inputs: The graph inputs.
        length: Positions to keep.

    Returns:
        Feeds of `length` tokens each; None where the row is no longer than that, has padding or a cache in use, where
        its length is fixed, or where it is not made of tokens.
    """
    model = ModelInputs(inputs)
    if model.ids is None or model.ids.name not in feeds:
        return None
    shape = feeds[model.ids.name].shape
    short: Feeds = {}
    for name, array in feeds.items():
        role = model.roles.get(name)
        if role == "cache" and array.shape[2] == 0:
            short[name] = array
        elif role in ("ids", "mask", "positions", "types") and array.shape == shape:
            if isinstance(model.specs[name].shape[1], int) or (role == "mask" and not array[:, :length].all()):
                return None
            short[name] = np.ascontiguousarray(array[:, :length])
        else:
            return None
    return short if shape[1] > length else None


def short_row(reference: OrtRunner, row: Feeds) -> Sample:
    """Shorten a row if that can be done and run the float model on it; raises CalibrationError if it cannot be run."""
    short = shorten(row, reference.inputs)
    feeds = row if short is None else short
    # Copies: the arrays of a run keep all memory of their session.
    try:
        expected = {name: array.copy() for name, array in reference.run(feeds).items()}
    except KernelError as error:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
        raise CalibrationError(
            f"the float model cannot be run on {shapes}: {error}; give data that fits (--calibration), or --no-verify"
        ) from error
    return Sample(feeds, expected, row_mask(feeds), 0 if short is None else _SHORT)
