"""The scheme grammar: ``w4a16-g64-asym`` and the plan that says which site gets which scheme.

    scheme   = alias | "w" BITS "a16" *( "-" option )
    option   = "g" SIZE | "channel" | "sym" | "asym"

What a scheme leaves open is filled in by the target (`Scheme.resolve`), so that the same text means the form that each
target runs fast.
"""

import re
from dataclasses import dataclass, field, replace

from qcompiler.errors import SchemeError
from qcompiler.numerics.affine import WeightSpec
from qcompiler.numerics.formats import FORMATS

__all__ = ["ALIASES", "GROUP_SIZES", "Pattern", "Scheme", "SchemePlan", "parse_optional_scheme"]

GROUP_SIZES = (16, 32, 64, 128, 256)
ALIASES = {
    "int2": "w2a16",
    "int4": "w4a16",
    "int8": "w8a16",
    "w4a16_asym": "w4a16-asym",
    "q4": "w4a16-g32-sym",
    "q8": "w8a16-g32-sym",
}
_WIDTH = re.compile(r"w(\d+(?:\.\d+)?)a(\d+)")
_GRAMMAR = (
    "w{2,4,8}a16 followed by any of -g16 -g32 -g64 -g128 -g256 | -channel, -sym | -asym (for example w4a16-g64-asym)"
)


@dataclass(frozen=True)
class Scheme:
    """One scheme as written; None marks what the target decides.

    Attributes:
        bits: Weight bits.
        group_size: Columns that share a scale; 0 means one scale for each output channel.
        symmetric: Whether the zero is the middle code.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool | None = None

    @classmethod
    def parse(cls, text: str) -> "Scheme":
        """Read a scheme; raises SchemeError saying what was expected."""
        head, *options = ALIASES.get(text.strip().lower(), text.strip().lower()).split("-")
        width = _WIDTH.fullmatch(head)
        if not width:
            raise SchemeError(f"scheme '{text}': '{head}' is not understood; expected {_GRAMMAR}, or {_aliases()}")
        if width[2] != "16":
            raise SchemeError(f"scheme '{text}': activations of {width[2]} bits are not available; expected {_GRAMMAR}")
        if not width[1].isdigit() or int(width[1]) not in FORMATS:
            known = ", ".join(map(str, FORMATS))
            raise SchemeError(f"scheme '{text}': weights of {width[1]} bits are not available; known widths: {known}")
        scheme = cls(int(width[1]))
        for option in options:
            scheme = scheme._with(option, text)
        return scheme

    def _with(self, option: str, text: str) -> "Scheme":
        if option in ("sym", "asym"):
            if self.symmetric is not None:
                raise SchemeError(f"scheme '{text}' says twice whether it is symmetric; keep one of -sym and -asym")
            return replace(self, symmetric=option == "sym")
        size = re.fullmatch(r"g(\d+)", option)
        if size or option == "channel":
            if self.group_size is not None:
                raise SchemeError(f"scheme '{text}' gives two granularities; keep one of -gSIZE and -channel")
            if size and int(size[1]) not in GROUP_SIZES:
                sizes = ", ".join(map(str, GROUP_SIZES))
                raise SchemeError(f"scheme '{text}': group size {size[1]} has no kernel; known sizes: {sizes}")
            return replace(self, group_size=int(size[1]) if size else 0)
        raise SchemeError(f"scheme '{text}': option '-{option}' is not understood; expected {_GRAMMAR}")

    def resolve(self, target: str) -> "Scheme":
        """Fill in what was left open with what `target` runs fast: see `docs/schemes.md`."""
        group_size, symmetric = (32, True) if target == "cuda" else (64, False)
        return replace(
            self,
            group_size=group_size if self.group_size is None else self.group_size,
            symmetric=symmetric if self.symmetric is None else self.symmetric,
        )

    def spec(self, columns: int, scale_dtype: str, *, signed_scale: bool = True) -> WeightSpec:
        """The WeightSpec of a weight with `columns` columns (K); the scheme must be resolved."""
        if self.group_size is None or self.symmetric is None:
            raise SchemeError(f"scheme '{self}' has to be resolved for a target first")
        return WeightSpec(self.bits, self.group_size or columns, self.symmetric, signed_scale, scale_dtype)

    def __str__(self) -> str:
        """Canonical text; parsing it gives the scheme back."""
        text = f"w{self.bits}a16"
        if self.group_size is not None:
            text += f"-g{self.group_size}" if self.group_size else "-channel"
        if self.symmetric is not None:
            text += "-sym" if self.symmetric else "-asym"
        return text


def _aliases() -> str:
    return "an alias (" + ", ".join(ALIASES) + ")"


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
        scheme = {"linear": self.default, "embedding": self.embedding, "lm_head": self.lm_head}[role]
        option = "--scheme" if role == "linear" else "--" + role.replace("_", "-")
        return scheme, f"left float ({option} float)" if scheme is None else ""

    def unmatched(self, all_names: list[tuple[str, ...]]) -> list[str]:
        """Patterns that select nothing: almost always a misspelling."""
        patterns = [*self.ignore, *self.only, *(pattern for pattern, _ in self.overrides)]
        return [p.text for p in patterns if not any(p.matches(names) for names in all_names)]
