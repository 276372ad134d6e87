"""The plan that says which site gets which scheme."""

import re
from dataclasses import dataclass, field

from qcompiler.errors import SchemeError
from qcompiler.scheme import Scheme

__all__ = ["Pattern", "SchemePlan", "parse_optional_scheme"]


def parse_optional_scheme(text: str) -> Scheme | None:
    """A scheme, or None for the word ``float``."""
    return None if text.strip().lower() == "float" else Scheme.parse(text)


@dataclass(frozen=True)
class Pattern:
    """Selects sites by name: ``re:`` and a regular expression, searched anywhere in the name, or the exact name."""

    text: str

    def __post_init__(self) -> None:
        if self.text.startswith("re:"):
            try:
                re.compile(self.text[3:])
            except re.error as error:
                raise SchemeError(f"pattern '{self.text}': {error}; quote or escape special characters") from error

    def matches(self, names: tuple[str, ...]) -> bool:
        """Whether any of a site's names is meant."""
        if self.text.startswith("re:"):
            return any(re.search(self.text[3:], name) for name in names)
        return self.text in names


@dataclass(frozen=True)
class SchemePlan:
    """Which scheme each kind of site gets; None leaves it float.

    Attributes:
        default: For linear sites.
        embedding: For lookup tables (Gather).
        lm_head: For the projection onto the vocabulary.
        overrides: (pattern, scheme), the last match wins, over everything else but `ignore` and `only`.
        ignore: Sites left float.
        only: Where given, all other sites are left float.
    """

    default: Scheme | None
    embedding: Scheme | None = field(default_factory=lambda: Scheme(8))
    lm_head: Scheme | None = field(default_factory=lambda: Scheme(8))
    overrides: tuple[tuple[Pattern, Scheme | None], ...] = ()
    ignore: tuple[Pattern, ...] = ()
    only: tuple[Pattern, ...] = ()

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """Every scheme that the plan names."""
        named = (self.default, self.embedding, self.lm_head, *(scheme for _, scheme in self.overrides))
        return tuple(scheme for scheme in named if scheme is not None)

    def scheme_for(self, role: str, names: tuple[str, ...]) -> tuple[Scheme | None, str]:
        """The scheme of a site, or None with the reason why it stays float."""
        for pattern in self.ignore:
            if pattern.matches(names):
                return None, f"ignored (--ignore {pattern.text})"
        if self.only and not any(pattern.matches(names) for pattern in self.only):
            return None, "not among --only"
        for pattern, scheme in reversed(self.overrides):
            if pattern.matches(names):
                return scheme, f"left float (--set {pattern.text}=float)" if scheme is None else ""
        scheme = {"embedding": self.embedding, "lm_head": self.lm_head}.get(role, self.default)
        option = "--scheme" if role in ("linear", "conv") else "--" + role.replace("_", "-")
        return scheme, f"left float ({option} float)" if scheme is None else ""

    def unmatched(self, all_names: list[tuple[str, ...]]) -> list[str]:
        """Patterns that select nothing: almost always a misspelling."""
        patterns = [*self.ignore, *self.only, *(pattern for pattern, _ in self.overrides)]
        return [p.text for p in patterns if not any(p.matches(names) for names in all_names)]
