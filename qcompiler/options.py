"""Options of passes: dataclasses whose fields are given as text."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qcompiler.errors import SchemeError

__all__ = ["NoOptions", "check_options", "parse_options"]


@dataclass(frozen=True)
class NoOptions:
    """A pass without options."""


def check_options(
    name: str,
    options: Any,
    *,
    least: Mapping[str, int] | None = None,
    shares: Sequence[str] = (),
    choices: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Raise SchemeError for values of a pass's options that mean nothing.

    Args:
        name: Of the pass.
        options: The dataclass.
        least: What numbers have to be at least.
        shares: Numbers between 0 and 1.
        choices: The values that texts can have.
    """
    for key, low in (least or {}).items():
        if not getattr(options, key) >= low:
            raise SchemeError(f"pass {name}: {key}={getattr(options, key)} has to be at least {low}")
    for key in shares:
        if not 0 <= getattr(options, key) <= 1:
            raise SchemeError(f"pass {name}: {key}={getattr(options, key):g} is not between 0 and 1")
    for key, known in (choices or {}).items():
        if getattr(options, key) not in known:
            raise SchemeError(
                f"pass {name}: {key}={getattr(options, key)} is unknown; choose one of {', '.join(known)}"
            )


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
