"""Arrays that may leave memory: kept in RAM up to a budget, and in temporary files past it."""

import ctypes
import tempfile
from pathlib import Path

import numpy as np

__all__ = ["Scratch", "return_freed"]

# A file and its mapping take this much anyway.
_PAGE = 1 << 12
# Systems limit the mappings of a process (Linux: 65530); beyond this many files only large arrays get one.
_MANY_FILES, _LARGE = 16384, 1 << 20


def return_freed() -> None:
    """Give memory that has been freed back to the system, where it knows how; takes some 10 ms.

    PyTorch asks for aligned memory, of which glibc (before 2.38) finds little again that was freed: it grows on and on.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    trim(0)


class Scratch:
    """Keeps arrays; past `budget` bytes of live arrays new ones go to memory-mapped files in a temporary folder."""

    def __init__(self, budget: int | None, folder: Path | None = None) -> None:
        """Budget in bytes, None for unlimited; `folder` holds the temporary files (default: the system's)."""
        self._budget = budget
        self._parent = folder
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._count = 0
        # What `keep` returned: what memory it takes, or which file it is.
        self._kept: dict[int, int | Path] = {}
        self.live_bytes = 0
        self.spilled_bytes = 0

    def keep(self, array: np.ndarray) -> np.ndarray:
        """The same array, or a read-only mapping of a file with its contents."""
        smallest = _PAGE if len(self._kept) < _MANY_FILES else _LARGE
        if self._budget is None or self.live_bytes + array.nbytes <= self._budget or array.nbytes < smallest:
            self.live_bytes += array.nbytes
            self._kept[id(array)] = array.nbytes
            return array
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="qcompiler-", dir=self._parent)
        path = Path(self._folder.name) / str(self._count)
        self._count += 1
        self.spilled_bytes += array.nbytes
        array.tofile(path)
        # Not .npy, which does not know bfloat16.
        mapping = np.asarray(np.memmap(path, array.dtype, "r", shape=array.shape))
        self._kept[id(mapping)] = path
        return mapping

    def drop(self, array: np.ndarray) -> None:
        """Forget an array that `keep` returned, before its last reference goes; a file's space is freed at once.

        Any other array, such as the caller's feeds, is left alone.
        """
        kept = self._kept.pop(id(array), None)
        if isinstance(kept, Path):
            kept.unlink(missing_ok=True)
        elif kept is not None:
            self.live_bytes -= kept

    def __enter__(self) -> "Scratch":
        """Use as a context manager: leaving it removes the files."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the files."""
        if self._folder is not None:
            self._folder.cleanup()
