"""Files that appear all together or not at all: written to a hidden folder, then moved to their places."""

import errno
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType

from qcompiler.errors import OutputError

__all__ = ["OutputFile", "OutputTransaction", "check_output"]

logger = logging.getLogger(__name__)

_CHUNK = 1 << 24
_REMEDIES = {
    errno.ENOENT: "create the folder first",
    errno.ENOTDIR: "a file is where a folder is needed; choose another output path",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a folder that is not read-only",
    errno.ENOSPC: "free some space or choose another disk",
    errno.EDQUOT: "free some of your quota or choose another disk",
    errno.EFBIG: "raise the limit on file size ('ulimit -f') or choose another disk",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EISDIR: "choose the name of a file",
}


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Turn the operating system's errors into ones that name the output and a remedy."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "check the disk or choose another output path")
        what = error.strerror or type(error).__name__
        if error.errno == errno.ENOSPC:
            with suppress(OSError):
                what += f", {shutil.disk_usage(path.parent).free / 1e6:.1f} MB free"
        raise OutputError(f"{path}: cannot be written ({what}); {remedy}") from error


def check_output(path: Path, *, force: bool, protect: Iterable[Path] = ()) -> None:
    """Find out before the work what would stop its result from being written.

    Args:
        path: The file to be written.
        force: Whether an existing one may be replaced.
        protect: Files that must not be replaced even so: the input.

    Raises:
        OutputError: The output exists, is an input, or its folder is missing or cannot be written to.
    """
    check_replaceable(path, force=force, protect=protect)
    check_folder(path.parent, path)


def check_replaceable(path: Path, *, force: bool, protect: Iterable[Path]) -> None:
    """Raise OutputError if something is at `path` that must stay; see `check_output`."""
    with _reported(path):
        if path.is_dir():
            raise OutputError(f"{path}: is a folder; give the name of a file in it")
        for source in protect:
            if path.exists() and source.exists() and path.samefile(source):
                raise OutputError(
                    f"{path}: is the input itself, which is never overwritten; choose another output path"
                )
        if os.path.lexists(path) and not force:
            raise OutputError(f"{path}: exists already; add --force to overwrite it, or choose another output path")


def check_folder(folder: Path, path: Path) -> None:
    """Raise OutputError if `folder`, in which `path` is to be made, is missing, no folder, or not to be written to."""
    with _reported(path):
        if not folder.exists():
            raise OutputError(f"{path}: its folder '{folder}' does not exist; create it first (mkdir -p '{folder}')")
        if not folder.is_dir():
            raise OutputError(f"{path}: '{folder}' is a file, not a folder; choose another output path")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OutputError(f"{path}: its folder '{folder}' is not writable; choose a folder that you may write to")


class OutputFile:
    """A file being written, which can be read back."""

    def __init__(self, final: Path, temporary: Path) -> None:
        """Create `temporary`; errors speak of `final`."""
        self._final = final
        with _reported(final):
            self._descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self.position = 0

    def write(self, data: bytes | memoryview) -> None:
        """Write all of `data` at `position`."""
        view = memoryview(data).cast("B")
        with _reported(self._final):
            while view:
                written = os.pwrite(self._descriptor, view[:_CHUNK], self.position)
                self.position += written
                view = view[written:]

    def align(self, alignment: int) -> None:
        """Move `position` up to a multiple of `alignment`; what is skipped reads as zeros."""
        self.position += -self.position % alignment

    def read(self, offset: int, count: int) -> bytes:
        """Bytes that were written before."""
        with _reported(self._final):
            return os.pread(self._descriptor, count, offset)

    def close(self, *, keep: bool = True) -> None:
        """Close the file; if it is kept, its bytes are on the disk afterwards."""
        if self._descriptor < 0:
            return
        descriptor, self._descriptor = self._descriptor, -1
        with _reported(self._final):
            try:
                if keep:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)


class OutputTransaction:
    """Creates files that get their place when `commit` is called, and vanish if it is not.

    Until then they lie in a hidden folder beside it under the names they will have: what one of them says about another
    holds there too, so that a model can be tried before it replaces an older one. `commit` moves them in the order in
    which they were created, the last one replacing what it overwrites in one step: create the file that refers to the
    others last.
    """

    def __init__(self, folder: Path, *, force: bool = False, protect: Iterable[Path] = ()) -> None:
        """Start a transaction.

        Args:
            folder: Where the files go; `commit` makes it if only its parent is there.
            force: Whether existing files may be replaced.
            protect: Files that must not be replaced even so: the input.
        """
        self._folder = folder
        self._force = force
        self._protect = tuple(protect)
        self._stage: Path | None = None
        self._files: dict[Path, OutputFile] = {}

    def __enter__(self) -> "OutputTransaction":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for file in self._files.values():
            with suppress(OutputError):
                file.close(keep=False)
        if self._stage is not None:
            shutil.rmtree(self._stage, ignore_errors=True)

    def create(self, path: Path) -> OutputFile:
        """Begin the file that is to become `path`, somewhere in the folder."""
        check_replaceable(path, force=self._force, protect=self._protect)
        staged = self.staged(path)
        with _reported(path):
            staged.parent.mkdir(parents=True, exist_ok=True)
        self._files[path] = OutputFile(path, staged)
        return self._files[path]

    def staged(self, path: Path) -> Path:
        """Where the file that is to become `path` lies until `commit`."""
        if self._stage is None:
            beside = self._folder if self._folder.is_dir() else self._folder.parent
            check_folder(beside, path)
            self._stage = beside / f".{path.name[:200]}.{secrets.token_hex(4)}.tmp"
            with _reported(path):
                self._stage.mkdir()
        return self._stage / path.relative_to(self._folder)

    def seal(self) -> list[Path]:
        """End writing: all bytes are on the disk, and other programs may read the files where they are now.

        Returns:
            Where the files lie until `commit`, in the order in which they were created.
        """
        for file in self._files.values():
            file.close()
        return [self.staged(path) for path in self._files]

    def commit(self) -> list[Path]:
        """Give every file its place, or none.

        Returns:
            The files, in the order in which they were created.
        """
        staged = self.seal()
        with ExitStack() as undo:
            for number, (source, path) in enumerate(zip(staged, self._files, strict=True)):
                check_replaceable(path, force=self._force, protect=self._protect)
                with _reported(path):
                    self._make_folders(path.parent, undo)
                    if number == len(staged) - 1:
                        source.replace(path)
                        continue
                    if os.path.lexists(path):
                        self._move(path, source.with_name(f"{source.name}.old"), undo)
                    self._move(source, path, undo)
            undo.pop_all()
        return list(self._files)

    def _make_folders(self, folder: Path, undo: ExitStack) -> None:
        if not folder.is_dir():
            self._make_folders(folder.parent, undo)
            undo.callback(self._undo, folder.rmdir)
            folder.mkdir()

    def _move(self, source: Path, target: Path, undo: ExitStack) -> None:
        """Rename a file such that `undo` gives it its old name."""

        def back() -> None:
            if not os.path.lexists(source):
                target.replace(source)

        undo.callback(self._undo, back)
        source.replace(target)

    def _undo(self, action: Callable[[], None]) -> None:
        """Take one step back; if that fails too, keep everything that might be the only copy."""
        try:
            action()
        except OSError as error:
            logger.error("%s; what was written, and what it replaced, is in '%s'", error, self._stage)
            self._stage = None
