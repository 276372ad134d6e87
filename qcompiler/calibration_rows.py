"""Calibration rows by number, read when they are asked for: token ids, arrays in files, Python feeds."""

import shutil
import tempfile
import weakref
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from qcompiler.calibration_inputs import ModelInputs, numpy_dtype
from qcompiler.errors import CalibrationError
from qcompiler.session import Feeds

__all__ = ["FeedRows", "Ragged", "Source", "Spool", "Stored", "StoredRows", "TokenRows", "array_rows", "as_feed"]


class Source(Protocol):
    """Samples by number."""

    label: str
    limit: int | None  # samples that a batch may hold; None: any number

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def key(self, index: int) -> Hashable:
        """Samples with equal keys can share a batch."""
        ...

    def feeds(self, indices: Sequence[int]) -> Feeds:
        """A batch of samples, with every input of the model, checked."""
        ...

    def detail(self, indices: Sequence[int]) -> str:
        """What to say of the samples after "rows": " of 512 tokens", " (attention_mask filled in)" or nothing."""
        ...


class Spool:
    """A folder of temporary files, made at the first use and removed with the object."""

    def __init__(self) -> None:
        """Nothing is created yet."""
        self._folder: Path | None = None
        self._files = 0

    def path(self) -> Path:
        """A path that is not in use yet."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="qcompiler-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._files += 1
        return self._folder / str(self._files)


@dataclass(frozen=True)
class Stored:
    """An array that lies uncompressed in a file; opened for each read, so that many files need no open handles."""

    path: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    fortran: bool = False

    def open(self) -> np.ndarray:
        """The array, mapped."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        order: Literal["C", "F"] = "F" if self.fortran else "C"
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape, order)


class Ragged:
    """Rows of different lengths, end to end in one array."""

    def __init__(self, flat: np.ndarray, ends: Sequence[int]) -> None:
        """Elements ``[n]``, and where in them each row ends."""
        self._flat, self._ends = flat, np.asarray([0, *ends], np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self._flat[self._ends[index] : self._ends[index + 1]]


class TokenRows:
    """Rows of token ids; every other input of the model is made from them."""

    def __init__(
        self,
        label: str,
        rows: np.ndarray | Ragged,
        masks: Ragged | None,
        inputs: ModelInputs,
        spool: Spool | None = None,
    ) -> None:
        """Group rows into samples.

        Args:
            label: The file, for messages.
            rows: Integers ``[rows, S]``, or rows of different lengths.
            masks: 1 where a token counts, in the shape of `rows`; None: every token counts.
            inputs: The model's inputs.
            spool: Keeps the files of `rows` alive.
        """
        spec = inputs.need_ids(label)
        self.label, self._rows, self._masks, self._inputs, self._spool = label, rows, masks, inputs, spool
        batch, self._width = spec.shape
        # A model whose batch is fixed takes that many rows as one sample.
        self._group = batch if isinstance(batch, int) else 1
        self.limit = 1 if isinstance(batch, int) else None
        if 0 < len(rows) < self._group:
            raise CalibrationError(
                f"{label} has {len(rows)} rows, but the model takes {self._group} at once; give more rows"
            )

    def __len__(self) -> int:
        return len(self._rows) // self._group

    def _lengths(self, index: int) -> list[int]:
        return [len(self._rows[row]) for row in range(index * self._group, (index + 1) * self._group)]

    def key(self, index: int) -> Hashable:
        """Everything can share a batch if a mask can hide padding, and rows of equal length otherwise."""
        return None if self._inputs.mask or isinstance(self._rows, np.ndarray) else max(self._lengths(index))

    def feeds(self, indices: Sequence[int]) -> Feeds:
        """Ids, masks and what follows from them; short rows are padded on the right with id 0 under a mask of 0."""
        where = _where(self.label, indices)
        numbers = [index * self._group + offset for index in indices for offset in range(self._group)]
        rows = [self._rows[number] for number in numbers]
        spec, mask_spec = self._inputs.need_ids(self.label), self._inputs.mask
        width = max(len(row) for row in rows)
        if mask_spec and isinstance(self._width, int):
            width = max(width, self._width)
        if mask_spec is None and any(len(row) != width for row in rows):
            raise CalibrationError(
                f"{where}: a batch of rows of different lengths needs an attention_mask input; cut them to one length"
            )
        ids = np.zeros((len(rows), width), rows[0].dtype)
        mask = np.zeros((len(rows), width), np.int64)
        for row, (number, values) in enumerate(zip(numbers, rows, strict=True)):
            ids[row, : len(values)] = values
            mask[row, : len(values)] = 1 if self._masks is None else self._masks[number]
        given = {spec.name: ids}
        if mask_spec:
            given[mask_spec.name] = mask.astype(numpy_dtype(mask_spec))
        return self._inputs.complete(given, where)

    def detail(self, indices: Sequence[int]) -> str:
        """The length of the rows."""
        if isinstance(self._rows, np.ndarray):
            return f" of {self._rows.shape[1]} tokens"
        lengths = [length for index in indices for length in self._lengths(index)]
        shortest, longest = min(lengths), max(lengths)
        return f" of {shortest} to {longest} tokens" if shortest < longest else f" of {longest} tokens"


class StoredRows:
    """Arrays in files, one for each input; a row is a sample where rows can be told apart, else the file is one."""

    def __init__(
        self,
        label: str,
        files: Mapping[str, Mapping[str, Stored]],
        inputs: ModelInputs,
        *,
        split: bool = True,
        spool: Spool | None = None,
    ) -> None:
        """Count the samples.

        Args:
            label: The file or folder, for messages.
            files: Arrays by input name, by the label of the file that holds them.
            inputs: The model's inputs.
            split: Whether the leading axis may count samples; False takes each file as it is.
            spool: Keeps temporary files alive.
        """
        self.label, self._labels, self._files = label, list(files), list(files.values())
        self._inputs, self._spool = inputs, spool
        for where, arrays in files.items():
            inputs.check_names(arrays, where)
        counts = [self._rows_of(arrays) if split else None for arrays in self._files]
        self._split = [count is not None for count in counts]
        self._ends = np.cumsum([1 if count is None else count for count in counts])
        self.limit = 1 if any(inputs.specs[name].shape[:1] == (1,) for name in self._files[0]) else None

    def _rows_of(self, arrays: Mapping[str, Stored]) -> int | None:
        """The leading size if every input can be cut along that axis and all arrays agree on it."""
        for name in arrays:
            shape = self._inputs.specs[name].shape
            if not shape or (isinstance(shape[0], int) and shape[0] != 1):
                return None
        sizes = {stored.shape[:1] for stored in arrays.values()}
        return next(iter(sizes))[0] if len(sizes) == 1 and () not in sizes else None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _locate(self, index: int) -> tuple[int, int]:
        file = int(np.searchsorted(self._ends, index, side="right"))
        return file, int(index) - (int(self._ends[file - 1]) if file else 0)

    def key(self, index: int) -> Hashable:
        """The shapes of the arrays without their leading axis; a file that is one sample shares with none."""
        file, _ = self._locate(index)
        if not self._split[file]:
            return index
        return tuple((name, stored.shape[1:]) for name, stored in sorted(self._files[file].items()))

    def feeds(self, indices: Sequence[int]) -> Feeds:
        """The rows, stacked."""
        rows = [self._sample(*self._locate(index)) for index in indices]
        stacked = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]} if len(rows) > 1 else rows[0]
        return self._inputs.fill(stacked, self.label)

    def _sample(self, file: int, row: int) -> Feeds:
        part = slice(row, row + 1) if self._split[file] else ...
        where = f"{self._labels[file]} (row {row})" if self._split[file] else self._labels[file]
        return self._inputs.fit({name: stored.open()[part] for name, stored in self._files[file].items()}, where)

    def detail(self, indices: Sequence[int]) -> str:
        """Which inputs the files leave out."""
        return _filled(self._inputs, self._files[self._locate(indices[0])[0]])


def array_rows(label: str, name: str, samples: np.ndarray, inputs: ModelInputs) -> StoredRows:
    """Samples of the only input, ``[samples, rows of a sample, ...]``, written to temporary files."""
    spool = Spool()
    path = spool.path()
    samples.tofile(path)
    size = samples[0].nbytes
    files = {
        f"{label} (row {index})": {name: Stored(path, index * size, samples.dtype, samples.shape[1:])}
        for index in range(len(samples))
    }
    return StoredRows(label, files, inputs, spool=spool)


class FeedRows:
    """A Python sequence of feeds; each is one sample, run as it is."""

    limit: int | None = 1

    def __init__(self, feeds: Sequence[Mapping[str, np.ndarray]], inputs: ModelInputs) -> None:
        """Keep the sequence; its items are read when they are needed."""
        self.label, self._feeds, self._inputs = "the calibration data", feeds, inputs

    def __len__(self) -> int:
        return len(self._feeds)

    def key(self, index: int) -> Hashable:
        """No two feeds share a batch."""
        return index

    def feeds(self, indices: Sequence[int]) -> Feeds:
        """One feed."""
        (index,) = indices
        return self._inputs.complete(as_feed(self._feeds[index], int(index)), _where(self.label, indices))

    def detail(self, indices: Sequence[int]) -> str:
        """Which inputs the feeds leave out."""
        return _filled(self._inputs, self._feeds[indices[0]])


def as_feed(item: Any, index: int) -> Feeds:
    """Item `index` of an iterable as a dict of arrays.

    Raises:
        CalibrationError: It is something else.
    """
    if not isinstance(item, Mapping):
        raise CalibrationError(
            f"item {index} of the calibration data is a {type(item).__name__}; make it a dict input name -> array"
        )
    return {str(name): np.asarray(array) for name, array in item.items()}


def _filled(inputs: ModelInputs, given: Mapping[str, Any]) -> str:
    names = inputs.filled_in(given)
    return f" ({', '.join(names)} filled in)" if names else ""


def _where(label: str, indices: Sequence[int]) -> str:
    numbers = [str(int(index)) for index in indices]
    more = ", ..." if len(numbers) > 4 else ""
    return f"{label} (row{'s' if len(numbers) > 1 else ''} {', '.join(numbers[:4])}{more})"
