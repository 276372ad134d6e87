"""The scheme grammar.

    scheme   = alias | [ SPARSE "+" ] "w" BITS "a" WIDTH *( "-" option ) | SPARSE
    SPARSE   = "sparse" PERCENT | "sparse" KEPT ":" OF (values of weights become zero: a share, or all but KEPT of OF)
    BITS     = "1" | "2" | "3" | "4" | "8" | "1.58" (ternary: minus one, zero and one times a scale)
    WIDTH    = "16" (activations stay float) | "8" | "16int" | "4" | "3" | "2" (calibrated codes so narrow)
             | "1" (with "w1": signs times signs; with "w1.58": calibrated signs)
    option   = "g" SIZE | "channel" | "head" SIZE | "sym" | "asym" | "static" | "dynamic" | "tensor" | "token" | "fp8"
             | "lut" | "vq2" | "vq4" (codes name entries of learned tables, each for 1, 2 or 4 columns)
             | "nf4" (codes of 4 bits name quantiles of the normal distribution)

What a scheme leaves open is filled in by the target (`Scheme.resolve`), so that the same text means the form that each
target runs fast. With integer activations weights are symmetric, and "sym" and "asym" speak of the activations. In the
block form (weights of 2 to 4 bits and activations of 8, or a group size) the kernel quantizes activations itself, and
"sym" and "asym" speak of the weights; with "static" or "dynamic" such weights have integer operators too. Tables have
8, 16 or 256 entries: BITS times columns is 3, 4 or 8. Without a table "w1" is signs times a scale.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

from qcompiler.errors import NumericsError, SchemeError
from qcompiler.numerics.activation import ActivationSpec
from qcompiler.numerics.affine import WeightSpec
from qcompiler.numerics.formats import FORMATS, int_format
from qcompiler.numerics.pruning import Sparsity

__all__ = ["ALIASES", "GROUP_SIZES", "Activations", "Scheme"]

GROUP_SIZES = (16, 32, 64, 128, 256)
ALIASES = {
    "int2": "w2a16",
    "int4": "w4a16",
    "int8": "w8a16",
    "w4a16_asym": "w4a16-asym",
    "q4": "w4a16-g32-sym",
    "q8": "w8a16-g32-sym",
}
_TERNARY = "1.58"  # the logarithm of three
_SPARSE = re.compile(r"sparse([^+]*)(?:\+(.*))?")
_WIDTH = re.compile(r"w(\d+(?:\.\d+)?)a(16int|\d+)")
_GRAMMAR = (
    "w1a1, w{1,1.58,2,3,4,8}a16 or w{1.58,2,3,4}a8 followed by any of -g16 -g32 -g64 -g128 -g256 | -channel, "
    "-sym | -asym, -lut | -nf4 | -vq2 | -vq4 (for example w4a16-g64-asym), or w8a8 followed by any of -channel | "
    "-headSIZE, -static | -dynamic, -tensor | -token, -sym | -asym, -fp8 (for example w8a8-dynamic-token), or "
    "w8a16int, or w{1.58,2,3,4,8}a{4,3,2}, or w1.58a1, or w{1.58,2,3,4}a8-static with -sym | -asym, or sparse50 or "
    "sparse2:4 alone or in front of one of these (sparse2:4+w4a16)"
)
_TWICE = {
    "granularity": "gives two granularities; keep one of -gSIZE and -channel",
    "symmetric": "says twice whether it is symmetric; keep one of -sym and -asym",
    "dynamic": "says twice when activations are quantized; keep one of -static and -dynamic",
    "shared": "gives two granularities of activations; keep one of -tensor and -token",
    "fp8": "says -fp8 twice",
    "vector": "gives two kinds of tables; keep one of -lut, -nf4, -vq2 and -vq4",
}
# What only speaks of activations that the graph quantizes.
_OF_CODES = ("dynamic", "shared", "fp8")
_WORDS: dict[str, tuple[str, Any]] = {
    "sym": ("symmetric", True),
    "asym": ("symmetric", False),
    "static": ("dynamic", False),
    "dynamic": ("dynamic", True),
    "tensor": ("shared", "tensor"),
    "token": ("shared", "token"),
    "channel": ("granularity", ("g", 0)),
    "fp8": ("fp8", True),
    "lut": ("vector", 1),
    "vq2": ("vector", 2),
    "vq4": ("vector", 4),
    "nf4": ("vector", "nf4"),
}
_TABLES = {value: f"-{word}" for word, (kind, value) in _WORDS.items() if kind == "vector"}
# Widths of codes that name entries of tables.
_CODE_BITS = (3, 4, 8)
# Widths of activations whose codes lie in bytes.
_NARROW = ("1", "2", "3", "4")


@dataclass(frozen=True)
class Activations:
    """How what a site reads is quantized; None marks what is still open.

    Attributes:
        bits: 8 or 16, or 1 to 4 in bytes; in blocks 1 stands for signs times the mean magnitude of each token, with
            weights of 1 bit.
        dynamic: Whether scales are computed at run time.
        granularity: What shares a scale: ``tensor``, ``token``, or ``block`` (a token's values within one block of the
            weight: the kernel does it inside).
        symmetric: Whether zero is the middle code.
        fp8: 8-bit floats (E4M3) in the place of integers.
    """

    bits: int = 8
    dynamic: bool | None = None
    granularity: str | None = None
    symmetric: bool | None = None
    fp8: bool = False

    def spec(self, *, signed: bool = False) -> ActivationSpec:
        """The number format; the scheme must be resolved."""
        return ActivationSpec(self.bits, signed, bool(self.symmetric), self.fp8)


@dataclass(frozen=True)
class Scheme:
    """One scheme as written; None marks what the target decides.

    Attributes:
        bits: Weight bits; 0 keeps weights float, in schemes that only prune.
        group_size: Columns that share a scale; 0 means one scale for each output channel.
        symmetric: Whether the zero is the middle code.
        activations: How activations are quantized; None keeps them float.
        head_size: Output channels that share a scale; 0 gives each its own.
        ternary: Of the codes of 2 bits only the three around zero are used; symmetric.
        vector: Columns that share a code, where codes name entries of tables; 0 where codes are numbers.
        known: The name of the table where it is known and not learned.
        sparsity: How many values become zero, or None.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool | None = None
    activations: Activations | None = None
    head_size: int = 0
    ternary: bool = False
    vector: int = 0
    known: str = ""
    sparsity: Sparsity | None = None

    @property
    def dense(self) -> "Scheme | None":
        """The scheme without its sparsity; None where it only prunes."""
        return replace(self, sparsity=None) if self.bits else None

    @property
    def needs_operators(self) -> bool:
        """Whether ONNX Runtime has no kernel for such codes."""
        return bool(self.vector) or (bool(self.bits) and int_format(self.bits).container != self.bits)

    @property
    def spelled_out(self) -> bool:
        """Whether the graph quantizes the activations, so that an integer (or 8-bit float) operator runs the site."""
        return self.activations is not None and self.activations.granularity != "block"

    @classmethod
    def parse(cls, text: str) -> "Scheme":
        """Read a scheme; raises SchemeError saying what was expected."""
        sparse = _SPARSE.fullmatch(text.strip().lower())
        if sparse:
            return cls._of_zeros(sparse[1], sparse[2], text)
        head, *options = ALIASES.get(text.strip().lower(), text.strip().lower()).split("-")
        width = _WIDTH.fullmatch(head)
        if not width:
            raise SchemeError(f"scheme '{text}': '{head}' is not understood; expected {_GRAMMAR}, or {_aliases()}")
        narrow = width[2] in _NARROW and width[1] != "1"
        if width[2] not in ("16", "8", "16int") and not narrow and width[0] != "w1a1":
            raise SchemeError(f"scheme '{text}': activations of {width[2]} bits are not available; expected {_GRAMMAR}")
        ternary = width[1] == _TERNARY
        tables = any(_WORDS.get(option, ("",))[0] == "vector" for option in options) or width[1] == "1"
        if not ternary and width[1] not in ("1", *map(str, FORMATS)):
            known = ", ".join(("1", _TERNARY, *map(str, FORMATS)))
            raise SchemeError(f"scheme '{text}': weights of {width[1]} bits are not available; known widths: {known}")
        given: dict[str, Any] = {}
        for option in options:
            kind, value = _option(option, text)
            if kind in given:
                raise SchemeError(f"scheme '{text}' {_TWICE[kind]}")
            given[kind] = value
        if tables:
            return cls._of_tables(width[1], width[2], given, text)
        made = cls._made(2 if ternary else int(width[1]), width[2], given, text)
        if ternary and made.symmetric is False:
            raise SchemeError(f"scheme '{text}': ternary weights are symmetric; drop -asym, or use w2a16-asym")
        return replace(made, ternary=True, symmetric=True) if ternary else made

    @classmethod
    def _of_zeros(cls, share: str, dense: str | None, text: str) -> "Scheme":
        """A scheme some of whose values are zero; ``w4`` is short for ``w4a16``."""
        try:
            sparsity = Sparsity.parse(share)
        except NumericsError as error:
            raise SchemeError(f"scheme '{text}': {error}") from error
        if dense is None:
            return cls(0, 0, True, sparsity=sparsity)
        made = cls.parse(dense + "a16" if re.fullmatch(r"w[\d.]+", dense) else dense)
        if made.vector or made.sparsity:
            raise SchemeError(f"scheme '{text}': pruned weights need a code for zero; tables and signs have none")
        return replace(made, sparsity=sparsity)

    @classmethod
    def _of_tables(cls, bits: str, width: str, given: dict[str, Any], text: str) -> "Scheme":
        """A scheme whose codes name entries of tables."""
        if bits == "1" and "vector" not in given:  # the two entries of its table are known
            given["vector"] = 1
        vector, others = given.pop("vector"), given.keys() - {"granularity"}
        known, vector = (vector, 1) if isinstance(vector, str) else ("", vector)
        if known and bits != "4":
            raise SchemeError(f"scheme '{text}': {known} is a table for 4 bits; write w4a16-{known}")
        unit, size = given.get("granularity", ("g", None))
        signs = (bits, vector, width) == ("1", 1, "1")
        if others or unit != "g" or not (width == "16" or signs) or bits == _TERNARY:
            raise SchemeError(
                f"scheme '{text}': tables and weights of 1 bit go with float activations and a group size or -channel "
                "alone, for example w4a16-lut-g64 and w1a16-g64"
            )
        if int(bits) * vector not in _CODE_BITS and (int(bits), vector) != (1, 1):
            raise SchemeError(
                f"scheme '{text}': {bits} bits for each of {vector} columns are a code of {int(bits) * vector}; "
                f"kernels know codes of {', '.join(map(str, _CODE_BITS))} bits"
            )
        if size and size < 8 * vector:
            raise SchemeError(f"scheme '{text}': a group has at least 8 codes; give -g{8 * vector} or more")
        activations = Activations(1, dynamic=True, granularity="block") if signs else None
        return cls(int(bits), size, True, activations, vector=vector, known=known)

    @classmethod
    def _made(cls, bits: int, width: str, given: dict[str, Any], text: str) -> "Scheme":
        """The scheme of options; raises SchemeError for those that do not go together."""
        unit, size = given.get("granularity", ("g", None))
        integers = any(given.get(kind) is not None for kind in ("dynamic", "shared"))
        block = width == "8" and not integers and (bits != 8 or bool(size and unit == "g"))
        if width == "16" or block:
            extra = [w for w, (kind, value) in _WORDS.items() if kind in _OF_CODES and given.get(kind) == value]
            if extra or unit == "head":
                what = "a group size: its kernel quantizes activations itself" if block else "float activations"
                wrong = "head" if unit == "head" else extra[0]
                raise SchemeError(f"scheme '{text}': -{wrong} does not go with {what}; expected {_GRAMMAR}")
            activations = Activations(granularity="block", dynamic=True) if block else None
            return cls(bits, size, given.get("symmetric"), activations)
        if width == "16int" and (bits != 8 or given.get("fp8")):
            raise SchemeError(f"scheme '{text}': 16-bit integer activations go with 8-bit integer weights (w8a16int)")
        if given.get("fp8") and (bits != 8 or width != "8"):
            raise SchemeError(f"scheme '{text}': 8-bit floats are w8a8-fp8")
        if size and unit == "g":
            raise SchemeError(
                f"scheme '{text}': integer operators have one scale for each output channel; drop -g{size}"
            )
        shared, dynamic, symmetric = given.get("shared"), given.get("dynamic"), given.get("symmetric")
        if width in _NARROW:
            return cls._narrow(bits, int(width), given, text)
        if shared == "token" and dynamic is False:
            raise SchemeError(f"scheme '{text}': a scale for each token is computed at run time; write -dynamic-token")
        if dynamic and width == "16int":
            raise SchemeError(f"scheme '{text}': 16-bit activations are calibrated; write w8a16int")
        if dynamic and symmetric is not None and symmetric != (shared != "tensor"):
            raise SchemeError(
                f"scheme '{text}': at run time zero points are computed for -tensor and absent for -token"
            )
        if given.get("fp8") and (dynamic or symmetric is False):
            raise SchemeError(f"scheme '{text}': 8-bit floats are static and have no zero points; write w8a8-fp8")
        activations = Activations(
            16 if width == "16int" else 8, dynamic or shared == "token" or dynamic, shared, symmetric
        )
        activations = replace(activations, fp8=bool(given.get("fp8")))
        return cls(bits, 0, True, activations, size if unit == "head" else 0)

    @classmethod
    def _narrow(cls, bits: int, width: int, given: dict[str, Any], text: str) -> "Scheme":
        """A scheme with activations of less than 8 bits."""
        if given.get("dynamic") or given.get("shared") == "token":
            raise SchemeError(f"scheme '{text}': activations of {width} bits are calibrated; drop -dynamic and -token")
        if width == 1 and given.get("symmetric") is False:
            raise SchemeError(f"scheme '{text}': signs have no zero point; drop -asym")
        symmetric = True if width == 1 else given.get("symmetric")
        unit, size = given.get("granularity", ("g", None))
        activations = Activations(width, dynamic=False, granularity="tensor", symmetric=symmetric)
        return cls(bits, 0, True, activations, size if unit == "head" else 0)

    def resolve(self, target: str) -> "Scheme":
        """Fill in what was left open with what `target` runs fast: see `docs/schemes.md`."""
        if not self.bits:
            return self
        if self.activations is not None and self.spelled_out:
            a = self.activations
            dynamic = bool(a.dynamic)
            granularity = a.granularity or ("token" if dynamic else "tensor")
            # TensorRT and 8-bit floats have no zero points; a token's scale is computed without one.
            zeroless = a.fp8 or granularity == "token" or target == "tensorrt"
            symmetric = zeroless if a.symmetric is None else a.symmetric
            resolved = replace(a, dynamic=dynamic, granularity=granularity, symmetric=symmetric)
            return replace(self, activations=resolved)
        group_size, symmetric = (32, True) if target == "cuda" else (64, False)
        return replace(
            self,
            group_size=group_size if self.group_size is None else self.group_size,
            symmetric=symmetric if self.symmetric is None else self.symmetric,
        )

    def spec(
        self,
        columns: int,
        scale_dtype: str,
        *,
        signed_scale: bool = True,
        reduced: bool = False,
        stream: bool = False,
    ) -> WeightSpec:
        """The WeightSpec of a weight with `columns` columns (K); the scheme must be resolved."""
        if self.group_size is None or self.symmetric is None:
            raise SchemeError(f"scheme '{self}' has to be resolved for a target first")
        if self.activations is not None and self.spelled_out:
            # ONNX Runtime's integer kernels take a scale's sign as it is; 8 bits do without, for those of others.
            signed = self.bits < 8 and not self.ternary
            reduced &= self.bits == 8
            fp8 = self.activations.fp8
            return WeightSpec(self.bits, columns, True, signed, scale_dtype, self.head_size, reduced, fp8)
        stream = stream or bool(self.vector)
        group_size = self.group_size or (-(-columns // 64) * 64 if stream else columns)
        signed = signed_scale and not self.ternary  # without the sign of a scale the lowest code is left out
        made = WeightSpec(self.bits, group_size, self.symmetric, signed, scale_dtype, stream=stream)
        return replace(made, vector=self.vector, known=self.known)

    def __str__(self) -> str:
        """Canonical text; parsing it gives the scheme back."""
        if self.sparsity is not None:
            return f"sparse{self.sparsity}" + (f"+{self.dense}" if self.bits else "")
        a = self.activations
        text = f"w{_TERNARY if self.ternary else self.bits}a" + (
            "16" if a is None else "16int" if a.bits == 16 else str(a.bits)
        )
        if self.head_size:
            text += f"-head{self.head_size}"
        elif self.group_size is not None and not self.spelled_out:
            text += f"-g{self.group_size}" if self.group_size else "-channel"
        if self.vector:
            return text + ("" if self.bits == 1 and self.vector == 1 else _TABLES[self.known or self.vector])
        symmetric = self.symmetric
        if a is not None and self.spelled_out:
            symmetric = a.symmetric
            text += "" if a.dynamic is None else "-dynamic" if a.dynamic else "-static"
            text += f"-{a.granularity}" if a.granularity else ""
        if symmetric is not None:
            text += "-sym" if symmetric else "-asym"
        return text + ("-fp8" if a is not None and a.fp8 else "")


def _option(option: str, text: str) -> tuple[str, Any]:
    """What an option of a scheme says: (kind, value)."""
    if option in _WORDS:
        return _WORDS[option]
    size = re.fullmatch(r"(g|head)(\d+)", option)
    if not size or (size[1] == "head" and not int(size[2])):
        raise SchemeError(f"scheme '{text}': option '-{option}' is not understood; expected {_GRAMMAR}")
    if size[1] == "g" and int(size[2]) not in GROUP_SIZES:
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise SchemeError(f"scheme '{text}': group size {size[2]} has no kernel; known sizes: {sizes}")
    return "granularity", (size[1], int(size[2]))


def _aliases() -> str:
    return "an alias (" + ", ".join(ALIASES) + ")"
