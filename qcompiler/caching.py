"""The user's cache: one folder of checkpoints that all compilations share, kept below a size.

What was used longest ago goes first. Processes may use it, and clean it up, at the same time: files appear whole under
names that are hashes of what they follow from, and what a process has opened stays readable to it when it is removed.
"""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from qcompiler.checkpoints import ENDING
from qcompiler.errors import OutputError

__all__ = ["DEFAULT_LIMIT", "Usage", "cache_folder", "prune", "usage"]

DEFAULT_LIMIT = 20 * 10**9
_VARIABLE = "QCOMPILER_CACHE"


@dataclass(frozen=True)
class Usage:
    """Some files of a cache.

    Attributes:
        files: How many.
        bytes: Of all of them.
    """

    files: int
    bytes: int


def cache_folder() -> Path:
    """Where the cache is: the environment variable QCOMPILER_CACHE, or where this system keeps a user's caches."""
    given = os.environ.get(_VARIABLE)
    return Path(given) if given else platformdirs.user_cache_path("qcompiler", appauthor=False)


def usage(folder: Path) -> Usage:
    """What the cache holds; nothing where there is none."""
    found = _entries(folder)
    return Usage(len(found), sum(size for _, size, _ in found))


def prune(folder: Path, limit: int) -> Usage:
    """Remove what was used longest ago until no more than `limit` bytes are left; returns what was removed.

    Raises:
        OutputError: Files cannot be removed.
    """
    entries = sorted(_entries(folder))
    left, removed, freed = sum(size for _, size, _ in entries), 0, 0
    for _, size, path in entries:
        if left <= limit:
            break
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"{path}: cannot be removed ({error.strerror or error}); check who owns it") from error
        left, removed, freed = left - size, removed + 1, freed + size
    return Usage(removed, freed)


def _entries(folder: Path) -> list[tuple[float, int, Path]]:
    """Time of the last use, size and path of each file."""
    found = []
    for path in folder.glob(f"*{ENDING}"):
        with suppress(FileNotFoundError):  # another process was faster
            status = path.stat()
            found.append((status.st_mtime, status.st_size, path))
    return found
