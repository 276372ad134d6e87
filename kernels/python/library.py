"""Finding, checking and registering the library of operators.

    options = onnxruntime.SessionOptions()
    qcompiler.kernels.register(options)

A program in C or C++ registers the same file: `RegisterCustomOpsLibrary_V2(options, path)`.
"""

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Any

from qcompiler.errors import KernelError

__all__ = [
    "FILE_NAME",
    "PLACE",
    "VARIABLE",
    "cuda_problem",
    "cuda_targets",
    "instruction_set",
    "library_path",
    "register",
    "signatures",
]

FILE_NAME = "libqcompiler_ops.so"
# Where `python -m qcompiler.kernels.build` puts it, and wheels carry it.
PLACE = Path(__file__).parent / "lib" / FILE_NAME
# Another file in its place.
VARIABLE = "QCOMPILER_OPS"


def library_path() -> Path | None:
    """The library, or None where it has not been built.

    Raises:
        KernelError: The environment variable names a file that is not there.
    """
    named = os.environ.get(VARIABLE)
    if named:
        if not Path(named).is_file():
            raise KernelError(f"{VARIABLE}={named}: there is no such file; name the library, or unset the variable")
        return Path(named)
    return PLACE if PLACE.is_file() else None


def register(options: Any, path: Path | None = None) -> Path:
    """Register the operators with the options of an onnxruntime session.

    Args:
        options: An `onnxruntime.SessionOptions`.
        path: The library; None finds it.

    Returns:
        The library that was registered.

    Raises:
        KernelError: The library has not been built, or does not fit this ONNX Runtime.
    """
    path = path or library_path()
    if path is None:
        raise KernelError(
            f"{FILE_NAME} has not been built; python -m qcompiler.kernels.build makes it. Models run without it too, "
            "through the bodies of the operators"
        )
    _require_version(path)
    try:
        options.register_custom_ops_library(str(path))
    except Exception as error:  # ONNX Runtime raises its own types, which are not to be named here
        raise KernelError(f"{path}: ONNX Runtime cannot register it: {error}") from error
    return path


def instruction_set(path: Path | None = None) -> str:
    """What the library's kernels use on this processor: generic, avx2, avx512 or amx."""
    return _said(path, "QcompilerIsa")


def cuda_targets(path: Path | None = None) -> str:
    """The processors that a library has kernels for CUDA for: ``sm_80 ... PTX``, or nothing."""
    return _said(path, "QcompilerCudaTargets")


def cuda_problem(path: Path | None = None) -> str:
    """Why a library can launch no kernel for CUDA in this process, or nothing."""
    return _said(path, "QcompilerCudaProblem")


def signatures(path: Path) -> list[str]:
    """A line for each operator and combination of element types in a library: ``NAME(type, ...) -> type``."""
    return _said(path, "QcompilerSignatures").splitlines()


def _said(path: Path | None, function: str) -> str:
    """What a function of a library that takes nothing returns."""
    path = path or library_path()
    if path is None:
        raise KernelError(f"{FILE_NAME} has not been built; python -m qcompiler.kernels.build makes it")
    said = getattr(_loaded(path), function)
    said.restype = ctypes.c_char_p
    return str(said().decode())


def _require_version(path: Path) -> None:
    """Refuse a library that was built for a newer API than ONNX Runtime has: it would find nothing there."""
    from qcompiler.runtime import require_onnxruntime

    version = require_onnxruntime().__version__
    built = int(_loaded(path).QcompilerApiVersion())
    here = int(version.split(".")[1])  # ONNX Runtime 1.N has version N of its API
    if built > here:
        raise KernelError(
            f"{path} was built for ONNX Runtime 1.{built}, and this one is {version}; build it again with older "
            "headers (python -m qcompiler.kernels.build --headers DIR), or install a newer onnxruntime"
        )


@cache
def _loaded(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelError(
            f"{path} cannot be loaded: {error}; python -m qcompiler.kernels.build makes it anew"
        ) from error
