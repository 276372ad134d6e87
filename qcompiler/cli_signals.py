"""What becomes of a command that is told to end."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Terminated", "tidy_termination"]


class Terminated(KeyboardInterrupt):
    """SIGTERM: to end as Ctrl-C makes a command end, leaving nothing behind."""


@contextmanager
def tidy_termination() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that temporary files are removed; a second one ends the process at once."""
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return

    def terminate(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
