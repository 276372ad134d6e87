"""onnx-qcompiler: a float ONNX model in, a quantized one and a report on it out.

The names below are loaded when they are first used, so that importing the package costs nothing.
"""

import importlib

TYPE_CHECKING = False  # true to type checkers; importing it from `typing` would double the time this takes
if TYPE_CHECKING:
    from qcompiler.config import CompileConfig
    from qcompiler.driver import compile_model
    from qcompiler.scheme import Scheme

__all__ = ["CompileConfig", "Scheme", "__version__", "compile_model"]

__version__ = "0.1.0"

_HOME = {
    "CompileConfig": "qcompiler.config",
    "Scheme": "qcompiler.scheme",
    "compile_model": "qcompiler.driver",
}


def __getattr__(name: str) -> object:
    """Load a public name from the module that defines it."""
    if name not in _HOME:
        raise AttributeError(f"module 'qcompiler' has no attribute '{name}'; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted({*globals(), *_HOME})
