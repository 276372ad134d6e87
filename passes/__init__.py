"""The passes, one a file; the file's name is the pass's name.

Installed as `qcompiler.passes`.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING

from qcompiler.errors import SchemeError

if TYPE_CHECKING:
    from qcompiler.passes.base import QuantPass

__all__ = ["load", "names"]


def names() -> list[str]:
    """The names of all passes, sorted."""
    return sorted(info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("base"))


def load(name: str) -> "type[QuantPass]":
    """The pass class called `name`; raises SchemeError listing the known names."""
    if name not in names():
        raise SchemeError(f"no pass is called '{name}'; known passes: {', '.join(names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    (found,) = (cls for cls in vars(module).values() if isinstance(cls, type) and getattr(cls, "name", None) == name)
    return found
