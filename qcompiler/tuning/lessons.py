"""What a model is taught with: calibration rows put together to batches, with the float model's answers or labels."""

from collections.abc import Callable, Mapping, Sequence
from typing import overload

import numpy as np

from qcompiler.calibration import row_mask
from qcompiler.scratch import Scratch
from qcompiler.session import Feeds
from qcompiler.tuning.losses import Example

__all__ = ["Lessons", "row_batches"]

Teacher = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


def row_batches(rows: Sequence[Feeds], size: int, seed: int) -> list[list[int]]:
    """Numbers of rows that go together: of one shape, drawn at random, `size` at a time; what is left over last."""
    alike: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for at in np.random.default_rng(seed).permutation(len(rows)):
        alike.setdefault(tuple(array.shape for array in rows[at].values()), []).append(int(at))
    return [numbers[start : start + size] for numbers in alike.values() for start in range(0, len(numbers), size)]


class Lessons(Sequence[Example]):
    """Batches as descent takes them; the float model is asked when one is looked at, and its answers are kept."""

    def __init__(
        self,
        rows: Sequence[Feeds],
        batches: Sequence[Sequence[int]],
        labels: np.ndarray | None,
        teacher: Teacher | None,
        scratch: Scratch,
    ) -> None:
        """Rows, which of them go together, labels int64 of all rows, and what answers, where answers are wanted."""
        self._rows, self._batches, self._labels = rows, batches, labels
        self._teacher, self._scratch = teacher, scratch
        self._targets: dict[int, dict[str, np.ndarray]] = {}

    def __len__(self) -> int:
        """Batches."""
        return len(self._batches)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "Lessons": ...
    def __getitem__(self, index: "int | slice") -> "Example | Lessons":
        """A batch, or some of them."""
        if isinstance(index, slice):
            return Lessons(self._rows, self._batches[index], self._labels, self._teacher, self._scratch)
        chosen = [self._rows[row] for row in self._batches[index]]
        feeds = chosen[0]
        if len(chosen) > 1:
            feeds = {name: np.concatenate([row[name] for row in chosen]) for name in feeds}
        labels = None if self._labels is None else self._labels[list(self._batches[index])]
        return Example(feeds, self._answers(index, feeds), row_mask(feeds), labels)

    def _answers(self, index: int, feeds: Feeds) -> Mapping[str, np.ndarray]:
        if self._teacher is None:
            return {}
        if index not in self._targets:
            answers = self._teacher(feeds)
            self._targets[index] = {name: self._scratch.keep(array) for name, array in answers.items()}
        return self._targets[index]
