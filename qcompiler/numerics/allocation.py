"""Choosing one format for each of many weights so that all of them together fit a budget: a knapsack with classes."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

__all__ = ["Choice", "Swapped", "allocate", "cheapest", "efficient", "frontier", "swapped", "totals"]


@dataclass(frozen=True)
class Choice:
    """A way to store a weight.

    Attributes:
        size: What it takes of the budget, in any whole unit.
        loss: What it costs in accuracy; losses of different weights add up.
    """

    size: int
    loss: float


Units = Sequence[Sequence[Choice]]


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


def totals(units: Units, chosen: Sequence[int]) -> Choice:
    """Size and loss of a whole plan, the index of the choice of each unit."""
    picked = [choices[index] for choices, index in zip(units, chosen, strict=True)]
    return Choice(sum(choice.size for choice in picked), sum(choice.loss for choice in picked))


def allocate(units: Units, budget: int) -> list[int]:
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
    chosen, steps = _smallest_and_steps(units)
    room = budget - totals(units, chosen).size
    full = set()
    for step in steps:
        if step.unit in full:
            continue
        if step.size > room:
            full.add(step.unit)
            continue
        room -= step.size
        chosen[step.unit] = step.choice
    return _filled(units, chosen, room)


def cheapest(units: Units, loss: float) -> list[int]:
    """Choose for each unit so that the sum of sizes is small and the sum of losses at most `loss`.

    The steps of `allocate` are taken until that is reached; then what can be made smaller again is.

    Args:
        units: The choices of each unit; at least one.
        loss: The most that the losses may add up to.

    Returns:
        The index of the choice of each unit; those of least loss where even these exceed it.
    """
    chosen, steps = _smallest_and_steps(units)
    left = totals(units, chosen).loss
    for step in steps:
        if left <= loss:
            break
        chosen[step.unit] = step.choice
        left -= step.saved
    slack = loss - totals(units, chosen).loss
    while slack >= 0:
        best, freed = None, 0
        for unit, choices in enumerate(units):
            now = choices[chosen[unit]]
            for index, choice in enumerate(choices):
                if choice.loss - now.loss <= slack and now.size - choice.size > freed:
                    best, freed = (unit, index), now.size - choice.size
        if best is None:
            break
        unit, index = best
        slack -= units[unit][index].loss - units[unit][chosen[unit]].loss
        chosen[unit] = index
    return chosen


def frontier(units: Units, points: int) -> list[Choice]:
    """Size and loss of the best plans from the smallest to the most accurate one, in about equal ratios of size."""
    chosen, steps = _smallest_and_steps(units)
    start = totals(units, chosen)
    path = list(accumulate(steps, lambda at, step: Choice(at.size + step.size, at.loss - step.saved), initial=start))
    ratio = (path[-1].size / max(start.size, 1)) ** (1 / max(points - 1, 1))
    kept = [start]
    for at in path[1:-1]:
        if at.size >= ratio * kept[-1].size:
            kept.append(at)
    # Small differences of large sums: nothing is lost in the end but what rounding leaves.
    return [Choice(at.size, max(at.loss, 0.0)) for at in ([*kept, path[-1]] if len(path) > 1 else kept)]


@dataclass(frozen=True)
class Swapped:
    """What came of trying swaps.

    Attributes:
        chosen: The best plan that was measured.
        before: What the first plan measured.
        after: What the best one measured.
        runs: Plans measured, the first one included.
        kept: Swaps that lowered the measure.
    """

    chosen: list[int]
    before: float
    after: float
    runs: int
    kept: int


def swapped(
    units: Units, chosen: Sequence[int], budget: int, measure: Callable[[Sequence[int]], float], tries: int
) -> Swapped:
    """Try to better a plan by swaps: one unit gets another choice, and the rest is allocated anew around it.

    Losses are a model; a swap on which it is nearly neutral, though the losses on both sides are large, is where a
    small error of the model counts most. These are tried first. A swap is kept where `measure` falls.

    Args:
        units: The choices of each unit.
        chosen: The plan to better.
        budget: As for `allocate`.
        measure: What a plan really costs.
        tries: Swaps to measure at most.

    Returns:
        The best plan that was measured, so never a worse one than `chosen`.
    """
    best = list(chosen)
    before = after = measure(best)
    fixed: dict[int, int] = {}
    kept = runs = 0
    seen = {tuple(best)}
    for unit, index in _by_promise(units, best):
        if runs == tries:
            break
        if unit in fixed:
            continue
        wanted = {**fixed, unit: index}
        tried = allocate([[c[wanted[n]]] if n in wanted else c for n, c in enumerate(units)], budget)
        tried = [wanted.get(n, at) for n, at in enumerate(tried)]
        if tuple(tried) in seen or totals(units, tried).size > budget:
            continue
        seen.add(tuple(tried))
        runs += 1
        found = measure(tried)
        if found < after:
            best, after, fixed, kept = tried, found, wanted, kept + 1
    return Swapped(best, before, after, runs + 1, kept)


def _by_promise(units: Units, chosen: Sequence[int]) -> Iterable[tuple[int, int]]:
    """Other choices for a unit, those first that cost least, by the model, for the loss that they move."""
    # What a unit of size is worth: the loss of the next step that there is no room for.
    ahead = [
        step
        for step in _smallest_and_steps(units)[1]
        if units[step.unit][step.choice].size > units[step.unit][chosen[step.unit]].size
    ]
    worth = max((step.saved / step.size for step in ahead), default=0.0)
    found = []
    for unit, choices in enumerate(units):
        now, hull = choices[chosen[unit]], efficient(choices)
        place = hull.index(chosen[unit]) if chosen[unit] in hull else None
        near = hull if place is None else hull[max(0, place - 1) : place + 2]
        for index in near:
            moved = abs(choices[index].loss - now.loss)
            cost = choices[index].loss - now.loss + worth * (choices[index].size - now.size)
            if index != chosen[unit] and moved:
                found.append((cost / moved, unit, index))
    return [(unit, index) for _, unit, index in sorted(found)]


@dataclass(frozen=True)
class _Step:
    """A unit's move to the next choice on its hull: the size that it takes and the loss that it saves."""

    unit: int
    choice: int
    size: int
    saved: float


def _smallest_and_steps(units: Units) -> tuple[list[int], list[_Step]]:
    """The smallest plan, and all steps from there to the best one, those first that save most for their size."""
    hulls = [efficient(choices) for choices in units]
    steps = [
        _Step(unit, later, choices[later].size - choices[at].size, choices[at].loss - choices[later].loss)
        for unit, (choices, hull) in enumerate(zip(units, hulls, strict=True))
        for at, later in pairwise(hull)
    ]
    # Along a hull each step saves less than the one before, so that sorting keeps a unit's steps in order.
    return [hull[0] for hull in hulls], sorted(steps, key=lambda step: -step.saved / step.size)


def _gain(choices: Sequence[Choice], smaller: int, larger: int) -> float:
    """The loss that the larger choice saves for each unit of size."""
    return (choices[smaller].loss - choices[larger].loss) / (choices[larger].size - choices[smaller].size)


def _filled(units: Units, chosen: list[int], room: int) -> list[int]:
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
