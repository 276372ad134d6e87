"""The contract of each operator of the domain `ai.qcompiler`: inputs, types, shapes, meaning, and its body in ONNX.

All of them multiply activations by a weight that is stored in few bits, ``Y = A W^T + bias``:

    A ``[.., K]``   W ``[N, K]``   bias ``[N]`` or ``[1]``   Y ``[.., N]``

A row of W lies in G groups of g columns, the last of which may be filled up: what is stored past column K is not read.
Codes lie in planes (see `numerics.packing.pack_planes`): uint8 ``[N, G, g * width / 8]``.

    MatMul1Bit     W = (code - zero) * scale, code 0 or 1; zero 0.5 makes it plus and minus half a scale
    MatMul2Bits    the same with codes of 2 bits; ternary weights are codes 1, 2, 3 with zero 2
    MatMul3Bits    the same with codes of 3 bits, in two planes
    MatMul4Bits    the same with codes of 4 bits
    MatMulCodebook8, MatMulCodebook16, MatMulCodebook256
                   W = codebook[start + code] * scale, each code standing for d columns
    MatMulSigns    both factors are signs: W is plus and minus scale, A is taken for sign(A) * mean|A|, the mean over
                   each row (XNOR-Net, Rastegari et al. 2016, arXiv:1603.05279)

An operator has a *body*, a function of standard operators that computes the same: a model that carries it runs on any
ONNX Runtime, and where our library is registered its kernels run in the place of the body. With ``accuracy_level = 4``
a kernel may round activations to 8 bits, one scale for each row and group; a body computes exactly.

Nothing here depends on onnx but `function_proto`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcompiler.errors import KernelError
from qcompiler.numerics.packing import PLANES

if TYPE_CHECKING:
    import onnx

__all__ = ["BODY_OPSET", "DOMAIN", "OPERATORS", "VERSION", "Operand", "Operator", "function_proto", "operator"]

DOMAIN = "ai.qcompiler"
VERSION = 1
# The first opset whose standard operators the bodies use (BitwiseAnd).
BODY_OPSET = 18


@dataclass(frozen=True)
class Operand:
    """An input or output.

    Attributes:
        name: In the body too.
        types: numpy names of the element types; ``T`` is that of A, float32 or float16.
        shape: With the letters of this file.
        meaning: What it holds.
    """

    name: str
    types: tuple[str, ...]
    shape: str
    meaning: str


@dataclass(frozen=True)
class Operator:
    """An operator's contract.

    Attributes:
        name: Its type in a graph.
        bits: Width of a code; PLANES says in how many inputs the codes lie.
        inputs: All are always there.
        output: The product.
        attributes: Integers, with their defaults.
        doc: What it computes.
        body: The function's text between braces, in ONNX's textual form.
    """

    name: str
    bits: int
    inputs: tuple[Operand, ...]
    output: Operand
    attributes: Mapping[str, int]
    doc: str
    body: str


_FLOATS = ("float32", "float16")
_OUTPUT = Operand("Y", ("T",), "[.., N]", "the product")
_BIAS = Operand("bias", ("T",), "[N] or [1]", "what is added; [1] of zero where there is nothing to add")
_SCALES = Operand("scales", ("T",), "[N, G, 1]", "of each group")
_ZEROS = Operand("zero_points", ("uint8", "T"), "[N, G, 1] or [1, 1, 1]", "the code that means zero")


def _codes(bits: int) -> tuple[Operand, ...]:
    widths = PLANES[bits]
    names = ("B",) if len(widths) == 1 else ("B_low", "B_high")
    return tuple(
        Operand(
            name, ("uint8",), f"[N, G, g * {width} / 8]" if width < 8 else "[N, G, g]", f"{width} bits of each code"
        )
        for name, width in zip(names, widths, strict=True)
    )


def _tail(activations: str = "A") -> str:
    """Text that multiplies `activations` with the groups of values [N, G, g]."""
    return f"""
    rows = Constant <value_ints = [0, -1]> ()
    padded = Reshape (groups, rows)
    begin = Constant <value_ints = [0]> ()
    axis = Constant <value_ints = [1]> ()
    columns = Shape <start = -1> (A)
    weight = Slice (padded, begin, columns, axis)
    turned = Transpose <perm = [1, 0]> (weight)
    product = MatMul ({activations}, turned)
    Y = Add (product, bias)"""


def _decoding(bits: int) -> str:
    """Text that makes `codes` uint8 [N, G, g] of the planes."""
    lines = ["last = Constant <value_ints = [-1]> ()", "grouped = Constant <value_ints = [0, 0, -1]> ()"]
    parts, shift = [], 0
    for plane, width in zip(_codes(bits), PLANES[bits], strict=True):
        name, lanes = plane.name, 8 // width
        part = f"codes_{name}" if len(PLANES[bits]) > 1 else "codes"
        if width == 8:
            lines.append(f"{part} = Identity ({name})")
        else:
            places = ", ".join(str(lane * width) for lane in range(lanes))
            lines += [
                f"places_{name} = Constant <value = uint8[{lanes}] {{{places}}}> ()",
                f"mask_{name} = Constant <value = uint8[1] {{{(1 << width) - 1}}}> ()",
                f"wide_{name} = Unsqueeze ({name}, last)",
                f'moved_{name} = BitShift <direction = "RIGHT"> (wide_{name}, places_{name})',
                f"each_{name} = BitwiseAnd (moved_{name}, mask_{name})",
                f"{part} = Reshape (each_{name}, grouped)",
            ]
        if shift:
            lines += [
                f"weight_{name} = Constant <value = uint8[1] {{{shift}}}> ()",
                f'high_{name} = BitShift <direction = "LEFT"> ({part}, weight_{name})',
            ]
            part = f"high_{name}"
        parts.append(part)
        shift += width
    if len(parts) > 1:
        lines.append(f"codes = BitwiseOr ({', '.join(parts)})")
    return "\n    ".join(lines)


def _uniform(bits: int) -> Operator:
    """Codes on a uniform grid."""
    body = f"""
    {_decoding(bits)}
    values = CastLike (codes, scales)
    zeros = CastLike (zero_points, scales)
    centred = Sub (values, zeros)
    groups = Mul (centred, scales){_tail()}"""
    doc = f"Y = A W^T + bias with W = (code - zero point) * scale, {bits} bits a code."
    inputs = (Operand("A", _FLOATS, "[.., K]", "activations"), *_codes(bits), _SCALES, _ZEROS, _BIAS)
    name = f"MatMul{bits}Bit" + ("s" if bits > 1 else "")
    return Operator(name, bits, inputs, _OUTPUT, {"accuracy_level": 0}, doc, body)


def _codebook(bits: int) -> Operator:
    """Codes that stand for entries of a table."""
    body = f"""
    {_decoding(bits)}
    numbers = Cast <to = 6> (codes)
    entries = Add (numbers, starts)
    vectors = Gather <axis = 0> (codebook, entries)
    values = Reshape (vectors, grouped)
    groups = Mul (values, scales){_tail()}"""
    doc = f"Y = A W^T + bias with W = codebook[start + code] * scale, {1 << bits} entries in a table."
    inputs = (
        Operand("A", _FLOATS, "[.., K]", "activations"),
        *_codes(bits),
        Operand("codebook", ("T",), f"[C * {1 << bits}, d]", "C tables, d columns for each entry: 1, 2 or 4"),
        Operand("starts", ("int32",), "[N, 1, 1] or [1, 1, 1]", "the first entry of the table of each row"),
        _SCALES,
        _BIAS,
    )
    return Operator(f"MatMulCodebook{1 << bits}", bits, inputs, _OUTPUT, {}, doc, body)


def _signs() -> Operator:
    """Signs times signs."""
    body = f"""
    {_decoding(1)}
    set = Cast <to = 9> (codes)
    opposite = Neg (scales)
    groups = Where (set, scales, opposite)
    nothing = Constant <value = float {{0}}> ()
    zero = CastLike (nothing, A)
    positive = GreaterOrEqual (A, zero)
    magnitudes = Abs (A)
    axes = Constant <value_ints = [-1]> ()
    size = ReduceMean <keepdims = 1> (magnitudes, axes)
    reverse = Neg (size)
    signs = Where (positive, size, reverse){_tail("signs")}"""
    inputs = (Operand("A", _FLOATS, "[.., K]", "activations"), *_codes(1), _SCALES, _BIAS)
    doc = "Y = mean|A| * sign(A) W^T + bias with W = +scale where a bit is set and -scale elsewhere; sign(0) = 1."
    return Operator("MatMulSigns", 1, inputs, _OUTPUT, {}, doc, body)


OPERATORS: dict[str, Operator] = {
    each.name: each for each in (*map(_uniform, (1, 2, 3, 4)), *map(_codebook, (3, 4, 8)), _signs())
}


def operator(name: str) -> Operator:
    """The operator of that name; raises KernelError that lists those there are."""
    if name not in OPERATORS:
        raise KernelError(f"{DOMAIN} has no operator {name}; it has {', '.join(OPERATORS)}")
    return OPERATORS[name]


def function_proto(name: str, opset: int) -> "onnx.FunctionProto":
    """The body of an operator as a function that a model of this opset can carry.

    Raises:
        KernelError: There is no such operator, or the opset is older than what the bodies use.
    """
    import onnx.parser

    contract = operator(name)
    if opset < BODY_OPSET:
        raise KernelError(f"the body of {name} needs opset {BODY_OPSET}, and the model has {opset}")
    inputs = ", ".join(each.name for each in contract.inputs)
    text = f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]> {name} ({inputs}) => (Y) {{{contract.body}\n}}'
    function = onnx.parser.parse_function(text)
    function.doc_string = contract.doc
    for attribute, default in contract.attributes.items():
        function.attribute_proto.append(onnx.helper.make_attribute(attribute, default))
    return function
