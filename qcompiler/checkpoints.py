"""Checkpoints: what an interrupted compilation leaves for the next one, under keys that are hashes of content.

A key is the hash of everything that a result follows from (see `digest_of`, `code_version` and `waypoints`), so a
result that is found under its key is the one that would come out again. Nothing is ever invalid: what depends on
something that has changed has another key.

One file a key, ``KEY.checkpoint``: a line of magic, the length of a header, the header (JSON: name, dtype, shape and
place of each array), the arrays, and a hash of all of it. It is written under a hidden name and renamed, so that it is
there as a whole or not at all, whatever is stopped when. Several processes may share a folder: what they write under
one key is the same. There is no fsync: a stopped process loses nothing by that, and what a power failure tears counts
as missing.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import shutil
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from hashlib import blake2b
from itertools import count
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qcompiler.errors import OutputError

__all__ = ["ENDING", "Arrays", "Checkpoints", "Pace", "Periodic", "code_version", "digest_of"]

logger = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]

ENDING = ".checkpoint"
_MAGIC = b"qcompiler checkpoint 1\n"
_LENGTH = struct.Struct("<Q")
_HASH_BYTES = 20
# Arrays begin at multiples of this, as the kernels like it.
_ALIGNMENT = 64
_CHUNK = 1 << 24
# Distributions whose version may change a result.
_DISTRIBUTIONS = ("numpy", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "torch")
# Writing takes at most one part in this of the time.
_SHARE = 10


def digest_of(*parts: object) -> str:
    """The hash of values, in hex: of arrays, bytes, tuples and lists of these, and anything whose repr tells it all.

    Each is written with its kind and its length in front, so that no two lists of parts come to the same bytes.
    """
    found = blake2b(digest_size=_HASH_BYTES)
    for piece in _pieces(parts):
        found.update(piece)
    return found.hexdigest()


def _pieces(part: object) -> Iterator[bytes | memoryview]:
    if isinstance(part, list | tuple):
        yield b"list %d\n" % len(part)
        for item in part:
            yield from _pieces(item)
    elif isinstance(part, np.ndarray) and not part.dtype.hasobject:
        yield from _pieces(("array", _dtype_name(part.dtype), part.shape))
        yield _bytes_of(part)
    elif isinstance(part, bytes):
        yield b"bytes %d\n" % len(part)
        yield part
    else:
        text = repr(part.tolist() if isinstance(part, np.ndarray) else part).encode()
        yield b"%s %d\n" % (type(part).__name__.encode(), len(text))
        yield text


def _bytes_of(array: np.ndarray) -> memoryview:
    """The values as they lie in memory; a copy if they are not contiguous."""
    # As bytes first, since a memoryview knows no bfloat16.
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _dtype_name(dtype: np.dtype[Any]) -> str:
    # Those of ml_dtypes are void to numpy, and known by their name alone.
    return str(dtype.name if dtype.kind == "V" else dtype.str)


@cache
def code_version() -> str:
    """The hash of what the results of this process depend on beside their inputs: our sources, and what we run on."""
    found: list[object] = [platform.machine(), importlib.import_module("qcompiler").__version__]
    for package in ("qcompiler", "qcompiler.passes"):
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations or () if spec is not None else ():
            root = Path(folder)
            found += [(str(path.relative_to(root)), path.read_bytes()) for path in sorted(root.rglob("*.py"))]
    for distribution in _DISTRIBUTIONS:
        with suppress(importlib.metadata.PackageNotFoundError):
            found.append((distribution, importlib.metadata.version(distribution)))
    return digest_of(*found)


class Checkpoints:
    """A folder of results.

    Attributes:
        tally: For each label, how many sites came from here, and how many were looked for.
    """

    def __init__(self, folder: Path) -> None:
        """Make the folder if need be, and remove what stopped processes have begun to write in it.

        Raises:
            OutputError: The folder cannot be made, or cannot be written to.
        """
        self._folder = folder
        self._writable = True
        self._count = count()
        self.tally: dict[str, tuple[int, int]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            begun = self._begun()
            begun.write_bytes(b"")
            begun.unlink()
        except OSError as error:
            raise OutputError(
                f"{folder}: no folder for checkpoints ({error.strerror or error}); give --checkpoint a folder that "
                "you may write to, or drop it"
            ) from error
        for path in folder.glob(f".{_host()}-*.tmp"):
            if not _runs(path.name.removesuffix(".tmp").rpartition("-")[2]):
                path.unlink(missing_ok=True)

    def get(self, key: str) -> Arrays | None:
        """The arrays under a key, read-only and mapped from the file; None if there are none, or they are damaged."""
        path = self._path(key)
        try:
            found = _read(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s: a checkpoint that cannot be read (%s) and is made again", path, error)
            return None
        with suppress(OSError):
            os.utime(path)  # when it was used: see `caching`
        return found

    def put(self, key: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Store arrays; where that is impossible there is a warning, once, and nothing more is stored."""
        if not self._writable:
            return
        begun = self._begun()
        try:
            _write(begun, arrays)
            begun.replace(self._path(key))
        except OSError as error:
            self._writable = False
            with suppress(OSError):
                begun.unlink(missing_ok=True)
            logger.warning(
                "%s: cannot be written (%s); no more checkpoints are stored", self._path(key), error.strerror or error
            )

    def drop(self, key: str) -> None:
        """Forget a key; what was read from it stays usable."""
        with suppress(OSError):
            self._path(key).unlink(missing_ok=True)

    def remember(self, key: str, make: Callable[[], Arrays], label: str, sites: int) -> Arrays:
        """What is stored under a key, else what `make` gives, which is stored; `tally` counts `sites` for `label`."""
        found = self.get(key)
        recalled, looked_for = self.tally.get(label, (0, 0))
        self.tally[label] = (recalled + (sites if found is not None else 0), looked_for + sites)
        if found is None:
            found = make()
            self.put(key, found)
        return found

    def has_room_for(self, size: int) -> bool:
        """Whether that many bytes are a small part of what is free on the disk."""
        return size <= shutil.disk_usage(self._folder).free // 4

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}{ENDING}"

    def _begun(self) -> Path:
        """A hidden name for a file that this process is about to write."""
        return self._folder / f".{_host()}-{next(self._count)}-{os.getpid()}.tmp"


def _host() -> str:
    return digest_of(platform.node())[:8]


def _runs(process: str) -> bool:
    """Whether a process of this machine is running."""
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except OSError:
        pass
    return True


def _write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a checkpoint file, array by array."""
    places: dict[str, tuple[str, tuple[int, ...], int]] = {}
    end = 0
    for name, array in arrays.items():
        start = end + -end % _ALIGNMENT
        places[name] = (_dtype_name(array.dtype), array.shape, start)
        end = start + array.nbytes
    header = json.dumps(places).encode()
    header += b" " * (-(len(_MAGIC) + _LENGTH.size + len(header)) % _ALIGNMENT)
    hashed = blake2b(digest_size=_HASH_BYTES)
    with path.open("wb") as file:

        def write(piece: bytes | memoryview) -> None:
            hashed.update(piece)
            file.write(piece)

        write(_MAGIC + _LENGTH.pack(len(header)) + header)
        end = 0
        for name, array in arrays.items():
            write(bytes(places[name][2] - end))
            write(_bytes_of(array))
            end = places[name][2] + array.nbytes
        file.write(hashed.digest())


def _read(path: Path) -> Arrays:
    """The arrays of a checkpoint file; raises ValueError where it is not what was written."""
    if not path.stat().st_size:
        raise ValueError("it is empty")
    data = np.memmap(path, np.uint8, "r")
    content, told = data[:-_HASH_BYTES], data[-_HASH_BYTES:].tobytes()
    hashed = blake2b(digest_size=_HASH_BYTES)
    for start in range(0, len(content), _CHUNK):
        hashed.update(content[start : start + _CHUNK].data)
    if hashed.digest() != told or content[: len(_MAGIC)].tobytes() != _MAGIC:
        raise ValueError("its hash is another one")
    start = len(_MAGIC) + _LENGTH.size
    (length,) = _LENGTH.unpack(content[len(_MAGIC) : start].tobytes())
    values = content[start + length :]
    found: Arrays = {}
    for name, (dtype_name, shape, place) in json.loads(content[start : start + length].tobytes()).items():
        dtype = np.dtype(getattr(ml_dtypes, dtype_name, dtype_name))
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        found[name] = np.asarray(values[place : place + size].view(dtype).reshape(shape))
    return found


class Pace:
    """Says when it is time to store again: every so many seconds, and less often where storing itself takes long."""

    def __init__(self, seconds: float) -> None:
        """Begin to count."""
        self._seconds = self._wait = seconds
        self._last = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time."""
        return time.monotonic() - self._last >= self._wait

    def stored(self, began: float) -> None:
        """Count from now; storing began at that moment of `time.monotonic`."""
        self._last = time.monotonic()
        self._wait = max(self._seconds, _SHARE * (self._last - began))


class Periodic:
    """The state of one long computation, replaced as it goes on."""

    def __init__(self, store: Checkpoints, key: str, seconds: float) -> None:
        """Store under `key`, about every `seconds`."""
        self._store, self._key, self._pace = store, key, Pace(seconds)

    def load(self) -> Arrays | None:
        """The state that an interrupted run has left."""
        return self._store.get(self._key)

    def offer(self, state: Callable[[], Arrays]) -> None:
        """Store the state if it is time."""
        if self._pace.due:
            began = time.monotonic()
            self._store.put(self._key, state())
            self._pace.stored(began)

    def drop(self) -> None:
        """Forget the state."""
        self._store.drop(self._key)
