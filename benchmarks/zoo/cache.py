"""Where the zoo keeps its files, and how a file or folder appears there in one step."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class ZooError(RuntimeError):
    """A model or data set cannot be fetched, built or measured."""


def root() -> Path:
    """Return the cache folder: the environment variable QCOMPILER_ZOO, or a folder under ~/.cache."""
    return Path(os.environ.get("QCOMPILER_ZOO") or "~/.cache/onnx-qcompiler/zoo").expanduser()


@contextmanager
def publish(destination: Path) -> Iterator[Path]:
    """Yield a path to write a file or folder to; when the block succeeds it becomes `destination`.

    A reader sees either nothing or the whole thing, also when the block fails or the process dies. Of two processes
    that publish the same folder the first wins and the other's copy is dropped, so both must write the same content.

    Args:
        destination: the final path; its parent is created.

    Yields:
        A path beside `destination` where nothing exists yet.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}-") as work:
        draft = Path(work) / destination.name
        yield draft
        try:
            draft.rename(destination)
        except OSError:  # a folder that exists is not replaced: another process was faster
            if not destination.exists():
                raise
