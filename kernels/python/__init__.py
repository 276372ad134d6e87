"""Custom operators: their contracts, their meaning in numpy, and the library that runs them fast.

Installed as `qcompiler.kernels`. `register(options)` lets a session of ONNX Runtime use the library.
"""

import warnings
from typing import Any

__all__ = ["register"]


def register(options: Any) -> None:
    """Register the operators with the options of an onnxruntime session; see `library.register`.

    Warns where ONNX Runtime has a CUDA provider that the library has no kernels for, or no driver to run them with.
    """
    from qcompiler.kernels import library
    from qcompiler.runtime import require_onnxruntime

    path = library.register(options)
    if "CUDAExecutionProvider" in require_onnxruntime().get_available_providers():
        problem = library.cuda_problem(path)
        if problem:
            remedy = "" if library.cuda_targets(path) else "; python -m qcompiler.kernels.build --cuda builds them"
            warnings.warn(f"{path}: {problem}{remedy}; operators of ai.qcompiler run on the CPU", stacklevel=2)
