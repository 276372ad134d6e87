"""CalibrationData: which rows are used, in which batches, and which are held out for verification.

Rows are chosen by number and read batch by batch, so that memory does not grow with the data. For N samples of R rows,
row ``floor(i R / N)`` is taken for each i, and the held-out rows are spread evenly over the others. Nothing here is
random but what is made up, which its seed determines.
"""

import hashlib
import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

import numpy as np

from qcompiler.calibration_inputs import ModelInputs, numpy_dtype, row_mask
from qcompiler.calibration_rows import Source
from qcompiler.calibration_sources import open_source
from qcompiler.errors import CalibrationError
from qcompiler.session import Feeds, InputSpec

__all__ = ["CalibrationData", "load_calibration", "made_up_data", "made_up_shape", "row_mask", "synthetic_data"]

# One row in this many is held out.
_HELD_OUT_SHARE = 8
_SYNTHETIC_SIZE = 64
_SYNTHETIC_ROWS = 32
# Ids that every vocabulary has, for a model whose vocabulary is not known.
_SMALL_VOCABULARY = 100


@dataclass(frozen=True, eq=False)
class CalibrationData:
    """Calibration and held-out feeds, made when they are asked for.

    Attributes:
        batches: Feeds to calibrate on, each with up to `batch_rows` rows; an item is built anew each time it is read.
        held_out: Feeds to verify on, of one row each, none of which is calibrated on (unless there is one row only).
        digest: SHA-256, in hex, of all these feeds in order: names, dtypes, shapes and values.
        description: What was taken from where, for the report.
        synthetic: Whether the model made it up itself.
        labels: int64, of the rows of all batches in order, where there are any.
    """

    batches: Sequence[Feeds]
    held_out: Sequence[Feeds]
    digest: str
    description: str
    synthetic: bool = False
    labels: np.ndarray | None = None

    @property
    def row_numbers(self) -> list[int] | None:
        """Which rows of the source the batches hold, in order; None where feeds were given."""
        return self.batches.numbers if isinstance(self.batches, _LazyFeeds) else None


class _LazyFeeds(Sequence[Feeds]):
    """Batches of a source's samples."""

    def __init__(self, source: Source, samples: np.ndarray, bounds: np.ndarray) -> None:
        """Samples int64 ``[n]`` in order, and where batches begin and end in them, int64 ``[batches, 2]``."""
        self._source, self._samples, self._bounds = source, samples, bounds

    def __len__(self) -> int:
        return len(self._bounds)

    @property
    def numbers(self) -> list[int]:
        """Which rows of the source these are, in order."""
        return [int(sample) for start, end in self._bounds for sample in self._samples[start:end]]

    @overload
    def __getitem__(self, index: int) -> Feeds: ...
    @overload
    def __getitem__(self, index: slice) -> "_LazyFeeds": ...
    def __getitem__(self, index: int | slice) -> "Feeds | _LazyFeeds":
        if isinstance(index, slice):
            return _LazyFeeds(self._source, self._samples, self._bounds[index])
        start, end = self._bounds[index]
        return self._source.feeds([int(sample) for sample in self._samples[start:end]])


def load_calibration(
    source: str | Path | Iterable[Mapping[str, np.ndarray]],
    inputs: Sequence[InputSpec],
    *,
    samples: int | None = None,
    tokenizer: str | Path | None = None,
    sequence_length: int = 512,
    batch_rows: int = 4,
    head_size: int | None = None,
    vocabulary: int | None = None,
) -> CalibrationData:
    """Open calibration data, choose rows, and check every chosen row against the model's inputs.

    - ``.npz``: one array for each input. The leading axis counts rows if every input's first dimension is dynamic or 1
      and the arrays agree on its size; otherwise the file is one sample.
    - A folder of ``.npz``: the same for each file, by name.
    - ``.npy``: token ids ``[rows, S]``; or, for a model with one input that is not token ids, that input.
    - ``.jsonl``: on each line a list of token ids, or an object with ``input_ids`` and, if wanted, ``attention_mask``.
    - Any other file: UTF-8 text. The tokenizer makes it one run of ids without special tokens, which is cut into rows;
      a shorter rest is dropped.
    - Python feeds: each is one sample, run as it is. A sequence is kept, anything else is written to a temporary file.

    Where ids are given, missing inputs that follow from them are filled in (see `calibration_inputs`). Token rows of
    unequal length are padded on the right if the model has an attention mask, and share no batch if it has none.

    Args:
        source: A path or an iterable of feeds.
        inputs: The graph inputs.
        samples: Rows to calibrate on; None, or more than there are, takes all that are not held out.
        tokenizer: tokenizer.json, or the folder that holds it, for text.
        sequence_length: Tokens of a row of text, where the model does not fix that number.
        batch_rows: The most rows of a batch.
        head_size: Size of an attention head, for key-value caches whose last dimension is symbolic.
        vocabulary: Number of token ids the model knows; None leaves the upper end unchecked.

    Raises:
        CalibrationError: The data is missing, empty, unreadable, or does not fit the inputs.
    """
    _check_positive(samples=samples, sequence_length=sequence_length, batch_rows=batch_rows)
    model = ModelInputs(inputs, head_size=head_size, vocabulary=vocabulary)
    rows = open_source(source, model, tokenizer, sequence_length)
    if not len(rows):
        raise CalibrationError(f"calibration data {rows.label} is empty; give at least one row")
    chosen, held = _choose(len(rows), samples)
    return _cut(rows, chosen, held, batch_rows, lambda: _describe(source, rows, chosen, held))


def made_up_data(
    make: Callable[[int], tuple[Source, str]], *, samples: int | None = None, batch_rows: int = 4
) -> CalibrationData:
    """Calibration data where the user has none.

    Args:
        make: Makes as many rows as it is told, and says how.
        samples: Rows to calibrate on; None: 32. For each eight of them one more is held out.
        batch_rows: The most rows of a batch.
    """
    count = samples or _SYNTHETIC_ROWS
    rows, how = make(count + max(1, count // _HELD_OUT_SHARE))
    chosen, held = _choose(len(rows), count)
    noun = f"row{'s' if count > 1 else ''}"

    def told() -> str:
        return f"{count} {noun}{rows.detail(chosen.tolist())} {how}, {len(held)} held out"

    return replace(_cut(rows, chosen, held, batch_rows, told), synthetic=True)


def _cut(
    rows: Source, chosen: np.ndarray, held: np.ndarray, batch_rows: int, describe: Callable[[], str]
) -> CalibrationData:
    """The rows that were chosen, in batches, and those that were held out; described once they have been checked."""
    limit = batch_rows if rows.limit is None else min(batch_rows, rows.limit)
    batches = _LazyFeeds(rows, chosen, _bounds(rows, chosen, limit))
    held_out = _LazyFeeds(rows, held, _bounds(rows, held, 1))
    return CalibrationData(batches, held_out, _digest(batches, held_out), describe())


def made_up_shape(spec: InputSpec) -> list[int]:
    """Sizes of an input where nothing is known: a dynamic first dimension becomes 1, any other 64."""
    sizes = [size if isinstance(size, int) else _SYNTHETIC_SIZE for size in spec.shape]
    return [1 if isinstance(size, str | None) else size for size in spec.shape[:1]] + sizes[1:]


def synthetic_data(
    inputs: Sequence[InputSpec],
    *,
    seed: int,
    rows: int = 2,
    vocabulary: int | None = None,
    head_size: int | None = None,
) -> CalibrationData:
    """Made-up feeds to verify on where the user gave no data; there is nothing to calibrate on.

    Args:
        inputs: The graph inputs; a dynamic first dimension becomes 1, any other 64.
        seed: Determines all values.
        rows: Number of feeds.
        vocabulary: Token ids are below this (100 where it is not known).
        head_size: Size of an attention head, for key-value caches whose last dimension is symbolic.

    Returns:
        Held-out feeds of random token ids with masks of ones, normal floats, integers of one, and true booleans.

    Raises:
        CalibrationError: An input that cannot be made up.
    """
    source = _RandomRows(ModelInputs(inputs, head_size=head_size, vocabulary=vocabulary), seed, rows)
    numbers = np.arange(rows)
    held_out = _LazyFeeds(source, numbers, _bounds(source, numbers, 1))
    return CalibrationData((), held_out, _digest((), held_out), f"no data, {rows} random rows held out")


class _RandomRows:
    """Samples of random values."""

    label = "made-up data"
    limit: int | None = 1

    def __init__(self, inputs: ModelInputs, seed: int, rows: int) -> None:
        self._inputs, self._seed, self._rows = inputs, seed, rows
        # A name that is somebody's first dimension stands for the batch wherever it appears.
        firsts = [spec.shape[0] for spec in inputs.specs.values() if spec.shape]
        self._sizes: dict[int | str | None, int] = {first: 1 for first in firsts if isinstance(first, str)}

    def __len__(self) -> int:
        return self._rows

    def key(self, index: int) -> Hashable:
        return index

    def feeds(self, indices: Sequence[int]) -> Feeds:
        generator = np.random.default_rng([self._seed, *indices])
        roles = self._inputs.roles
        # Roles follow from the ids; a model without ids gets arrays for all its inputs.
        follow = {name for name, role in roles.items() if role not in ("", "ids")} if self._inputs.ids else set()
        specs = [spec for name, spec in self._inputs.specs.items() if name not in follow]
        return self._inputs.complete({spec.name: self._array(spec, generator) for spec in specs}, self.label)

    def detail(self, indices: Sequence[int]) -> str:
        return ""

    def _array(self, spec: InputSpec, generator: np.random.Generator) -> np.ndarray:
        made_up = zip(spec.shape, made_up_shape(spec), strict=True)
        shape = [self._sizes.get(size, made) if isinstance(size, str) else made for size, made in made_up]
        dtype = numpy_dtype(spec)
        if spec is self._inputs.ids:
            return generator.integers(0, self._inputs.vocabulary or _SMALL_VOCABULARY, shape).astype(dtype)
        if dtype.kind in "iub":
            return np.ones(shape, dtype)
        return generator.standard_normal(shape, np.float32).astype(dtype)


def _check_positive(**settings: int | None) -> None:
    for name, number in settings.items():
        if number is not None and number < 1:
            raise CalibrationError(f"{name} is {number}, which leaves nothing to calibrate on; give at least 1")


def _choose(rows: int, samples: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the rows to calibrate on and of the held-out rows, int64, disjoint if there are two rows."""
    if rows == 1:
        return np.zeros(1, np.int64), np.zeros(1, np.int64)
    if samples is None or samples >= rows:
        held = _spread(max(1, rows // _HELD_OUT_SHARE), rows, 1)
        return _others(held, np.arange(rows - len(held))), held
    chosen = _spread(samples, rows, 0)
    rest = rows - samples
    return chosen, _others(chosen, _spread(min(max(1, samples // _HELD_OUT_SHARE), rest), rest, 1))


def _spread(count: int, rows: int, shift: int) -> np.ndarray:
    """`count` numbers below `rows` at equal distances, from 0 (`shift` 0) or amid `count` equal parts (`shift` 1)."""
    return (2 * np.arange(count, dtype=np.int64) + shift) * rows // (2 * count)


def _others(taken: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """The numbers that are not in the ascending `taken`, by their rank among themselves."""
    return ranks + np.searchsorted(taken - np.arange(len(taken)), ranks, side="right")


def _bounds(rows: Source, samples: np.ndarray, limit: int) -> np.ndarray:
    """Where batches of at most `limit` neighbours with equal keys begin and end, int64 ``[batches, 2]``."""
    starts: list[int] = []
    common: Hashable = None
    for position, sample in enumerate(samples):
        key = rows.key(int(sample))
        if not starts or position - starts[-1] == limit or key != common:
            starts.append(position)
            common = key
    return np.stack([starts, [*starts[1:], len(samples)]], axis=1).astype(np.int64)


def _digest(batches: Sequence[Feeds], held_out: Sequence[Feeds]) -> str:
    """SHA-256 of all feeds; building each of them once also checks each of them."""
    digest = hashlib.sha256()
    for part in (batches, held_out):
        digest.update(b"%d feeds\n" % len(part))
        for feeds in part:
            for name, array in sorted(feeds.items()):
                digest.update(json.dumps([name, array.dtype.name, array.shape]).encode())
                digest.update(array.tobytes())
    return digest.hexdigest()


def _describe(source: object, rows: Source, chosen: np.ndarray, held: np.ndarray) -> str:
    path = isinstance(source, str | Path)
    name = Path(str(source)).name if path else "Python"
    noun = ("row" if path else "feed") + ("" if len(chosen) == 1 else "s")
    used = f"{len(chosen)} {noun}{rows.detail(chosen.tolist())} from {name}"
    return f"{used}, which is also verified on" if len(rows) == 1 else f"{used}, {len(held)} held out"
