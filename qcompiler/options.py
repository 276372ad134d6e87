"""Options of passes: dataclasses whose fields are given as text."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from qcompiler.errors import SchemeError

__all__ = ["NoOptions", "parse_options"]


@dataclass(frozen=True)
class NoOptions:
    """A pass without options."""


def parse_options(name: str, options: type, given: dict[str, str]) -> Any:
    """Build an options dataclass from text values, converting each to its default's type."""
    known = {f.name: f for f in dataclasses.fields(options)}
    values: dict[str, Any] = {}
    for key, text in given.items():
        if key not in known:
            raise SchemeError(f"pass {name} has no option '{key}'; it has: {', '.join(known) or 'none'}")
        kind: Any = type(known[key].default)
        try:
            values[key] = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError):
            raise SchemeError(f"pass {name}: option {key}={text} is not a {kind.__name__}") from None
    return options(**values)
