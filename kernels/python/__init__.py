"""Custom operators: their contracts, their meaning in numpy, and the library that runs them fast.

Installed as `qcompiler.kernels`. `register(options)` lets a session of ONNX Runtime use the library.
"""

from typing import Any

__all__ = ["register"]


def register(options: Any) -> None:
    """Register the operators with the options of an onnxruntime session; see `library.register`."""
    from qcompiler.kernels.library import register as register_library

    register_library(options)
