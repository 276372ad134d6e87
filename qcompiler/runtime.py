"""The one place that imports ONNX Runtime, so that an installation that cannot work says what to do about it.

`onnxruntime`, `onnxruntime-gpu` and a few others install the same Python package. pip does not know that they exclude
each other: of two of them the one installed last overwrites the other, and removing either breaks what is left.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import sys
from typing import Any

from qcompiler.errors import KernelError

__all__ = ["installed_runtimes", "preload_cuda", "require_onnxruntime"]

# The distributions that install the package `onnxruntime`; the plainest first.
_DISTRIBUTIONS = (
    "onnxruntime",
    "onnxruntime-azure",
    "onnxruntime-cann",
    "onnxruntime-directml",
    "onnxruntime-migraphx",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
    "onnxruntime-rocm",
    "onnxruntime-silicon",
    "onnxruntime-training-cpu",
    "onnxruntime-training",
    "ort-nightly",
    "ort-nightly-gpu",
    "onnxruntime-gpu",
)
_CUDA_PROVIDERS = ("CUDAExecutionProvider", "TensorrtExecutionProvider")


def installed_runtimes() -> dict[str, str]:
    """Distribution name -> version of every ONNX Runtime that is installed, the plainest first."""
    found = {}
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@functools.cache
def require_onnxruntime() -> Any:
    """The module `onnxruntime`, checked once.

    Raises:
        KernelError: There is none, there are two on top of each other, or what is there does not load.
    """
    found = installed_runtimes()
    if len(found) > 1:
        listed = " and ".join(f"{name} {version}" for name, version in found.items())
        raise KernelError(
            f"{listed} are installed on top of each other, and either may be the one that runs; "
            f"keep one: pip uninstall -y {' '.join(found)} && pip install {list(found)[-1]}"
        )
    problem: Exception | str
    try:
        module = importlib.import_module("onnxruntime")
        if hasattr(module, "InferenceSession"):
            return module
        problem = "its package is empty"
    except ImportError as error:
        problem = error
    cause = problem if isinstance(problem, Exception) else None
    if not found:
        raise KernelError(
            "no ONNX Runtime is installed; install one: pip install 'onnx-qcompiler[cpu]', "
            "or 'onnx-qcompiler[gpu]' for CUDA, never both"
        ) from cause
    (name,) = found
    raise KernelError(
        f"{name} {found[name]} cannot be used: {problem}; if another ONNX Runtime was removed from beside it, "
        f"install it again: pip install --force-reinstall --no-deps {name}"
    ) from cause


def preload_cuda(provider: str) -> None:
    """Load the CUDA libraries that pip installed, which the linker does not find; does nothing for other providers."""
    module = require_onnxruntime()
    if provider in _CUDA_PROVIDERS and provider in module.get_available_providers():
        # ONNX Runtime prints what it misses, and stdout is for the result.
        with contextlib.redirect_stdout(sys.stderr):
            module.preload_dlls()
