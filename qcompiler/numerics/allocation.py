"""Choosing one format for each of many weights so that all of them together fit a budget: a knapsack with classes."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Choice", "allocate", "efficient"]


@dataclass(frozen=True)
class Choice:
    """A way to store a weight.

    Attributes:
        size: What it takes of the budget, in any whole unit.
        loss: What it costs in accuracy; losses of different weights add up.
    """

    size: int
    loss: float


def efficient(choices: Sequence[Choice]) -> list[int]:
    """The choices on the lower convex hull of loss over size, as indices, the smallest first.

    Anything else is worse than a mixture of two that are on it.
    """
    hull: list[int] = []
    for index in sorted(range(len(choices)), key=lambda i: (choices[i].size, choices[i].loss)):
        if hull and choices[index].loss >= choices[hull[-1]].loss:
            continue
        while len(hull) > 1 and _gain(choices, hull[-2], hull[-1]) <= _gain(choices, hull[-1], index):
            hull.pop()
        hull.append(index)
    return hull


def allocate(units: Sequence[Sequence[Choice]], budget: int) -> list[int]:
    """Choose for each unit so that the sum of losses is small and the sum of sizes at most `budget`.

    Steps along each unit's hull are taken in the order of the loss that they save for their size, which is the optimum
    of the relaxed problem; one that does not fit any more is passed over, and what room is left goes to any other
    choice that fits. So the sum of losses is at most one step away from the optimum.

    Args:
        units: The choices of each unit; at least one.
        budget: In the unit of the sizes.

    Returns:
        The index of the choice of each unit; the smallest choices where even these exceed the budget.
    """
    hulls = [efficient(choices) for choices in units]
    place = [0] * len(units)
    room = budget - sum(choices[hull[0]].size for choices, hull in zip(units, hulls, strict=True))
    waiting: list[tuple[float, int]] = []

    def offer(unit: int) -> None:
        hull, at = hulls[unit], place[unit]
        if at + 1 < len(hull):
            heapq.heappush(waiting, (-_gain(units[unit], hull[at], hull[at + 1]), unit))

    for unit in range(len(units)):
        offer(unit)
    while waiting:
        _, unit = heapq.heappop(waiting)
        hull, at = hulls[unit], place[unit]
        step = units[unit][hull[at + 1]].size - units[unit][hull[at]].size
        if step <= room:
            room -= step
            place[unit] += 1
            offer(unit)
    chosen = [hull[at] for hull, at in zip(hulls, place, strict=True)]
    return _filled(units, chosen, room)


def _gain(choices: Sequence[Choice], smaller: int, larger: int) -> float:
    """The loss that the larger choice saves for each unit of size."""
    return (choices[smaller].loss - choices[larger].loss) / (choices[larger].size - choices[smaller].size)


def _filled(units: Sequence[Sequence[Choice]], chosen: list[int], room: int) -> list[int]:
    """The choice with what room is left spent where it saves most."""
    while True:
        best, saved = None, 0.0
        for unit, choices in enumerate(units):
            now = choices[chosen[unit]]
            for index, choice in enumerate(choices):
                if choice.size - now.size <= room and now.loss - choice.loss > saved:
                    best, saved = (unit, index), now.loss - choice.loss
        if best is None:
            return chosen
        unit, index = best
        room -= units[unit][index].size - units[unit][chosen[unit]].size
        chosen[unit] = index
