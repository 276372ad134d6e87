"""How channels move when a tensor is reshaped.

*Channels* of a value are an int array that broadcasts against it, aligned on the right as numpy does: the number of the
channel that each element belongs to, -1 for none. An axis of size one says that the channel does not depend on it.
"""

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.foldings.sizes import Dim, dims_of

__all__ = ["BlockedError", "from_right", "reshaped"]


class BlockedError(Exception):
    """Factors cannot pass; the message says where and why."""


def from_right(axis: int, value: ir.Value | None) -> int:
    """The axis counted from the right (-1 is the last); raises BlockedError where the rank is not known."""
    if axis < 0:
        return axis
    dims = dims_of(value)
    if dims is None:
        raise BlockedError(f"the rank of '{value.name if value else ''}' is not known")
    return axis - len(dims)


def reshaped(channels: np.ndarray, before: list[Dim] | None, after: Sequence[Dim], name: str) -> np.ndarray:
    """Channels of a reshaped value.

    Sizes are compared from the right until all channels are accounted for. Sizes that are not known may differ in
    name only: an unknown size on one side stands for one on the other, or for what is needed to have as many sizes left
    on both sides.

    Args:
        channels: Of the value before.
        before: Its sizes.
        after: The sizes wanted, each a positive number, a symbol or None.
        name: Of the Reshape, for the message.

    Returns:
        Channels of the value after.

    Raises:
        BlockedError: The sizes do not say where the channels go.
    """
    known = before is not None
    if before is None:
        before = list[Dim]([None]) * channels.ndim
    ids: np.ndarray = channels.reshape((1,) * (len(before) - channels.ndim) + channels.shape)
    after = [None if size == 0 else size for size in after]
    old: list[Dim] = [size if size > 1 else dim for size, dim in zip(ids.shape, before, strict=True)]
    left, right = len(old), len(after)
    shape: list[int] = []  # of the result, from the right
    expanded = [1] * len(old)  # what the channels are broadcast to before the reshape
    while any(size > 1 for size in ids.shape[:left]):
        start, end = left - 1, right - 1
        if end < 0:
            raise BlockedError(f"what '{name}' does to the channels is not known")
        a, b = old[start], after[end]
        if (a == b and a is not None) or (known and not isinstance(a, int) and not isinstance(b, int)):
            if isinstance(a, str) and isinstance(b, str) and a != b:
                raise BlockedError(f"'{name}' turns a size {a} into {b} between the channels")
            expanded[start] = ids.shape[start]
            shape.append(ids.shape[start])
            left, right = start, end
            continue
        start, sizes = _matched(old, after, left, right, known, name)
        if any(size > 1 for size in ids.shape[start:left]):
            expanded[start:left] = [size for size in old[start:left] if isinstance(size, int)]
            shape += reversed(sizes)
        else:
            shape += [1] * len(sizes)
        left, right = start, right - len(sizes)
    return np.asarray(np.broadcast_to(ids, expanded)[(0,) * left].reshape(shape[::-1]))


def _matched(
    old: Sequence[Dim], after: Sequence[Dim], left: int, right: int, known: bool, name: str
) -> tuple[int, list[int]]:
    """The shortest runs of sizes before `left` and `right` with equal products: where the first begins, the second."""
    start, end = left - 1, right - 1
    while True:
        run, sizes = old[start:left], after[end:right]
        unknown = sum(not isinstance(size, int) for size in sizes)
        if any(not isinstance(size, int) for size in run) or unknown > 1:
            break
        total = math.prod(size for size in run if isinstance(size, int))
        given = math.prod(size for size in sizes if isinstance(size, int))
        if total % given == 0 and (known and start == end if unknown else total == given):
            return start, [size if isinstance(size, int) else total // given for size in sizes]
        if start and (start > end if unknown else total < given):
            start -= 1
        elif end and not unknown and total > given:
            end -= 1
        else:
            break
    raise BlockedError(f"the sizes of '{name}' do not say where the channels go")
