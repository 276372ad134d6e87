"""What is not part of the core and may be missing."""

from importlib.util import find_spec

from qcompiler.errors import PassError

__all__ = ["require_torch"]


def require_torch(what: str, otherwise: str) -> None:
    """Say what is missing before anything is measured.

    Args:
        what: What needs it.
        otherwise: What the user may do without.

    Raises:
        PassError: PyTorch is not installed.
    """
    if find_spec("torch") is None:
        raise PassError(
            f"{what} needs the package torch, which is not installed; pip install 'onnx-qcompiler[torch]', {otherwise}"
        )
