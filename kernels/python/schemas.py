"""The contract of each operator of the domain `ai.qcompiler`: inputs, types, shapes, meaning, and its body in ONNX.

All of them multiply activations by a weight that is stored in few bits, ``Y = A W^T + bias``:

    A ``[.., K]``   W ``[N, K]``   bias ``[N]`` or ``[1]``   Y ``[.., N]``

A row of W lies in G groups of g columns, the last of which may be filled up: what is stored past column K is not read.
The codes of a group are a stream of bits (see `numerics.packing.pack_stream`): B is uint8 ``[N, G, g * bits / 8]``.

    MatMul1Bit     W = (code - zero) * scale, code 0 or 1; zero 0.5 makes it plus and minus half a scale
    MatMul2Bits    the same with codes of 2 bits; ternary weights are codes 1, 2, 3 with zero 2
    MatMul3Bits    the same with codes of 3 bits
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
        bits: Width of a code.
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


_CODES = Operand("B", ("uint8",), "[N, G, g * bits / 8]", "a stream of codes for each group")


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
    """Text that makes `codes` uint8 [N, G, g] of the streams."""
    shape = "grouped = Constant <value_ints = [0, 0, -1]> ()"
    if bits == 8:
        return f"{shape}\n    codes = Identity (B)"
    kind, width = ("uint32", 24) if bits == 3 else ("uint8", 8)
    places = ", ".join(str(place) for place in range(0, width, bits))
    lines = [
        shape,
        "last = Constant <value_ints = [-1]> ()",
        f"places = Constant <value = {kind}[{width // bits}] {{{places}}}> ()",
        f"mask = Constant <value = {kind}[1] {{{(1 << bits) - 1}}}> ()",
    ]
    words = "B"
    if bits == 3:  # eight codes in three bytes
        lines += [
            "threes = Constant <value_ints = [0, 0, -1, 3]> ()",
            "sizes = Constant <value = int32[3] {1, 256, 65536}> ()",
            "bytes = Reshape (B, threes)",
            "numbers = Cast <to = 6> (bytes)",
            "sized = Mul (numbers, sizes)",
            "sums = ReduceSum <keepdims = 0> (sized, last)",
            "words = Cast <to = 12> (sums)",
        ]
        words = "words"
    lines += [
        f"wide = Unsqueeze ({words}, last)",
        'moved = BitShift <direction = "RIGHT"> (wide, places)',
        "each = BitwiseAnd (moved, mask)",
        "codes = Reshape (each, grouped)",
    ]
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
    inputs = (Operand("A", _FLOATS, "[.., K]", "activations"), _CODES, _SCALES, _ZEROS, _BIAS)
    name = f"MatMul{bits}Bit" + ("s" if bits > 1 else "")
    return Operator(name, bits, inputs, _OUTPUT, {"accuracy_level": 0}, doc, body)


def _codebook(bits: int) -> Operator:
    """Codes that stand for entries of a table."""
    body = f"""
    {_decoding(bits)}
    indices = Cast <to = 6> (codes)
    entries = Add (indices, starts)
    vectors = Gather <axis = 0> (codebook, entries)
    values = Reshape (vectors, grouped)
    groups = Mul (values, scales){_tail()}"""
    doc = f"Y = A W^T + bias with W = codebook[start + code] * scale, {1 << bits} entries in a table."
    inputs = (
        Operand("A", _FLOATS, "[.., K]", "activations"),
        _CODES,
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
    inputs = (Operand("A", _FLOATS, "[.., K]", "activations"), _CODES, _SCALES, _BIAS)
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
