"""What ONNX Runtime made of a model's QuantizeLinear and DequantizeLinear, from the graph that it really runs.

ONNX Runtime fuses an operator between decoders and an encoder into an integer kernel, moves encoders along, and renames
some of what it touches. Each encoder or decoder that is left is therefore explained by its neighbours in the optimized
graph. Names (and ``NAME_token_7``, as the layout optimizer writes them) only say which of them the model has, and what
became of an operator that was meant to be integer.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import onnx

__all__ = ["IntegerAudit", "Unfused", "audit_integers", "oversight_remarks", "quantizes_values"]

_ENCODERS = {"DynamicQuantizeLinear", "QuantizeLinear"}
_CODERS = {*_ENCODERS, "DequantizeLinear"}
# Operators that are meant to be integer where they read decoded codes, and their float forms after fusion.
_HEAVY = {"Conv", "FusedConv", "FusedGemm", "FusedMatMul", "Gemm", "MatMul"}
_KERNELS = {"ConvInteger", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QAttention", "QGemm"}
# Operators that hand codes on.
_MOVES = {
    "Concat", "Flatten", "Gather", "Identity", "MaxPool", "Reshape", "Resize", "Slice", "Split", "Squeeze", "Transpose",
    "Unsqueeze",
}  # fmt: skip
_TOKEN = re.compile(r"_token_\d+$|/[A-Za-z]+/?$")
# Inputs of a DequantizeLinear with a zero point.
_WITH_ZERO = 3
_TRANSPARENT = {"Clip", "Relu"}


@dataclass(frozen=True)
class Unfused:
    """An encoder, a decoder or a float operator that ONNX Runtime runs beside the integer kernels.

    Attributes:
        node: Its name in the graph that runs.
        operator: QuantizeLinear, DequantizeLinear, or the operator that was meant to be integer.
        place: What is in front of it and behind it.
        reason: Why it is there.
        necessary: Whether it has to be; False for an oversight.
        remedy: What to do about it; empty where it has to be.
    """

    node: str
    operator: str
    place: str
    reason: str
    necessary: bool
    remedy: str = ""


@dataclass(frozen=True)
class IntegerAudit:
    """What became of the encoders and decoders.

    Attributes:
        written: QuantizeLinear, DequantizeLinear and DynamicQuantizeLinear in the model's file.
        fused: How many of these became (parts of) integer kernels, or were folded into constants.
        added: Encoders and decoders that ONNX Runtime put in, moving others.
        kernels: Integer operator -> number of nodes.
        reasons: Why the others are left -> how many, the most frequent first.
    """

    written: int
    fused: int
    added: int
    kernels: dict[str, int]
    reasons: dict[str, int]


def oversight_remarks(unfused: Iterable[Unfused]) -> list[str]:
    """A warning for each operator that was meant to be integer and runs in float; those of one cause have one."""
    alike: dict[tuple[str, str], list[str]] = {}
    for each in unfused:
        if each.operator not in _CODERS:
            alike.setdefault((each.reason, each.remedy), []).append(f"{each.operator} '{each.node}'")
    remarks = []
    for (reason, remedy), names in alike.items():
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        remarks.append(f"{names[0]}{more} {reason}; {remedy}")
    return remarks


def quantizes_values(model: onnx.ModelProto) -> bool:
    """Whether the model makes integers of anything at run time; 8-bit floats are none."""
    float8 = {tensor.name for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT8E4M3FN}
    encoders = (node for node in _nodes(model.graph) if node.op_type in _ENCODERS)
    return any(not float8.intersection(node.input) for node in encoders)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for item in node.attribute:
            for body in (*([item.g] if item.type == onnx.AttributeProto.GRAPH else ()), *item.graphs):
                yield from _nodes(body)


class _Graph:
    """Who makes and reads each value, bodies included."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(_nodes(model.graph))
        self.constants = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        self.inputs = {value.name for value in model.graph.input} - self.constants.keys()
        self.outputs = {value.name for value in model.graph.output}
        self.producer = {name: node for node in self.nodes for name in node.output if name}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def constant(self, name: str) -> bool:
        """Whether a value is an initializer or made by a Constant node."""
        made = self.producer.get(name)
        return name in self.constants or (made is not None and made.op_type == "Constant")

    def final_readers(self, name: str) -> Iterator[onnx.NodeProto]:
        """The readers of codes, behind operators that only move them."""
        for reader in self.readers.get(name, ()):
            if reader.op_type in _MOVES and reader.output:
                yield from self.final_readers(reader.output[0])
            else:
                yield reader

    def source(self, name: str) -> onnx.NodeProto | None:
        """What makes codes, in front of operators that only move them."""
        node = self.producer.get(name)
        while node is not None and node.op_type in _MOVES and node.input[0] in self.producer:
            node = self.producer[node.input[0]]
        return node


def audit_integers(model: onnx.ModelProto, optimized: onnx.ModelProto) -> tuple[IntegerAudit, tuple[Unfused, ...]]:
    """Compare a compiled model with what ONNX Runtime made of it.

    Args:
        model: The model as written.
        optimized: The graph that ONNX Runtime runs, as `SessionOptions.optimized_model_filepath` saves it.

    Returns:
        Counts; and every encoder and decoder that is left, then every operator that should be integer and is float.
    """
    before, after = _Graph(model), _Graph(optimized)
    written = {node.name for node in before.nodes if node.op_type in _CODERS}
    left = [node for node in after.nodes if node.op_type in _CODERS]
    stayed = sum(node.name in written for node in left)
    count = sum(node.op_type in _CODERS for node in before.nodes)
    late = _meant_but_float(before, after)
    kernels = Counter(node.op_type for node in after.nodes if _is_kernel(node))
    unfused = [_explained(node, after, late) for node in left]
    reasons = dict(Counter(found.reason for found in unfused).most_common())
    audit = IntegerAudit(count, count - stayed, len(left) - stayed, dict(kernels.most_common()), reasons)
    unfused += [_oversight(node, meant, before) for node, meant in late.values()]
    return audit, (*unfused, *_meant_but_integer(before, after))


def _is_kernel(node: onnx.NodeProto) -> bool:
    return node.op_type in _KERNELS or node.op_type.startswith("QLinear")


def _meant_but_float(before: _Graph, after: _Graph) -> dict[str, tuple[onnx.NodeProto, onnx.NodeProto | None]]:
    """Heavy float nodes of the optimized graph that were to be integer, each with the node as it was written.

    By name or result where the node has kept one of them, and else because it reads what a decoder makes.
    """
    meant = {node.name: node for node in before.nodes if node.op_type in _HEAVY and _reads_codes(node, before)}
    results = {node.output[0]: node for node in meant.values()}
    found = {}
    for node in after.nodes:
        if node.op_type not in _HEAVY:
            continue
        origin = meant.get(node.name) or meant.get(_TOKEN.sub("", node.name)) or results.get(node.output[0])
        if origin is not None or _reads_codes(node, after):
            found[node.output[0]] = (node, origin)
    return found


def _meant_but_integer(before: _Graph, after: _Graph) -> Iterator[Unfused]:
    """Operators that were left float among integer ones, whose weights ONNX Runtime has quantized on its own."""
    kernels = {_TOKEN.sub("", node.name): node for node in after.nodes if _is_kernel(node)}
    for node in before.nodes:
        if node.op_type in _HEAVY and node.name in kernels and any(map(before.constant, node.input[1:2])):
            reason = (
                "was left float but runs on integers: ONNX Runtime quantizes its weight, with one scale for all of it"
            )
            place = f"runs as {kernels[node.name].op_type} '{kernels[node.name].name}'"
            remedy = "leave its neighbours float too"
            yield Unfused(node.name, node.op_type, place, reason, False, remedy)


def _reads_codes(node: onnx.NodeProto, graph: _Graph) -> bool:
    """Whether what a node multiplies by its weight is decoded from codes that are made at run time."""
    made = graph.producer.get(node.input[0])
    return made is not None and made.op_type == "DequantizeLinear" and not graph.constant(made.input[0])


def _explained(
    node: onnx.NodeProto, graph: _Graph, late: Mapping[str, tuple[onnx.NodeProto, onnx.NodeProto | None]]
) -> Unfused:
    """Why an encoder or decoder is left."""
    names = {found.name for found, _ in late.values()}
    source = graph.source(node.input[0])
    readers = _behind(node, graph)
    front = f"{source.op_type} '{source.name}'" if source is not None else f"'{node.input[0]}'"
    behind = ", ".join(f"{reader.op_type} '{reader.name}'" for reader in readers) or "the caller"
    place = f"between {front} and {behind}"
    behind_decoders = [far for near in readers if near.op_type == "DequantizeLinear" for far in _behind(near, graph)]
    around = [*readers, *behind_decoders, *([source] if source is not None else [])]
    which = next((each for each in around if each.name in names), None)
    if which is not None:
        remedy = f"see {which.op_type} '{which.name}'"
        return Unfused(node.name, node.op_type, place, "belongs to an operator that is not fused", False, remedy)
    reason = _encoder_reason(node, source, readers, graph) if node.op_type in _ENCODERS else ""
    reason = reason or _decoder_reason(node, source, readers, graph)
    return Unfused(node.name, node.op_type, place, reason, True)


def _behind(node: onnx.NodeProto, graph: _Graph) -> list[onnx.NodeProto]:
    return list(graph.final_readers(node.output[0]))


def _encoder_reason(
    node: onnx.NodeProto, source: onnx.NodeProto | None, readers: list[onnx.NodeProto], graph: _Graph
) -> str:
    if source is None and node.input[0] in graph.inputs:
        return "encodes a graph input"
    first = f"encodes the result of the float {source.op_type}" if source is not None else "encodes a value"
    if source is not None and _is_kernel(source):
        first = f"encodes the float result of {source.op_type}"
    if readers and all(reader.op_type == "DequantizeLinear" for reader in readers):
        return f"{first}, which is only decoded again"
    return f"{first} for {_kinds(readers)}"


def _decoder_reason(
    node: onnx.NodeProto, source: onnx.NodeProto | None, readers: list[onnx.NodeProto], graph: _Graph
) -> str:
    if graph.constant(node.input[0]):
        return f"decodes a constant on every run for {_kinds(readers)}"
    what = f"the codes of {source.op_type}" if source is not None else "codes"
    if node.output[0] in graph.outputs:
        return "decodes a graph output"
    return f"decodes {what} for the float {_kinds(readers)}"


def _kinds(nodes: Iterable[onnx.NodeProto]) -> str:
    return " and ".join(dict.fromkeys(node.op_type for node in nodes)) or "the caller"


def _oversight(node: onnx.NodeProto, origin: onnx.NodeProto | None, graph: _Graph) -> Unfused:
    """A heavy operator between decoders that ONNX Runtime left in float, and why, as far as the model says."""
    name = origin.name if origin is not None else _TOKEN.sub("", node.name)
    operator = origin.op_type if origin is not None else node.op_type
    reason = "reads codes but runs in float"
    if origin is not None and _is_half(origin, graph):
        why = "ONNX Runtime's CPU provider has no integer kernels of float16"
        reason = f"was meant to be integer and runs in float, since {why}"
        remedy = "compile the float32 model, with --float16 if the rest is to be float16"
        return Unfused(name, operator, f"runs as {node.op_type} '{node.name}'", reason, False, remedy)
    if origin is not None:
        reason = f"was meant to be integer and runs in float{_cause(origin, graph)}"
    remedy = f"leave it float with --ignore '{name}', which saves the decoding"
    return Unfused(name, operator, f"runs as {node.op_type} '{node.name}'", reason, False, remedy)


def _is_half(node: onnx.NodeProto, graph: _Graph) -> bool:
    """Whether a node reads codes that are decoded to float16."""
    decoder = graph.producer.get(node.input[0])
    scale = decoder.input[1] if decoder is not None and decoder.op_type == "DequantizeLinear" else ""
    return graph.constants.get(scale) == onnx.TensorProto.FLOAT16


def _cause(node: onnx.NodeProto, graph: _Graph) -> str:
    """What is known to keep an operator from becoming an integer kernel."""
    for name in node.input[:2]:
        decoder = graph.producer.get(name)
        if decoder is None or decoder.op_type != "DequantizeLinear":
            return f", since '{name}' is not decoded from codes"
        if node.op_type == "Gemm" and len(decoder.input) < _WITH_ZERO:
            return f", since the DequantizeLinear that makes '{name}' has no zero point, which QGemm needs"
    if node.op_type == "Conv":
        last = node
        while len(readers := graph.readers.get(last.output[0], [])) == 1 and readers[0].op_type in _TRANSPARENT:
            last = readers[0]
        others = [reader.op_type for reader in readers if reader.op_type not in _ENCODERS]
        if others or last.output[0] in graph.outputs:
            return f", since {others[0] if others else 'the caller'} reads its result before it is quantized"
    shared = [name for name in node.input[:2] if len(graph.readers.get(name, ())) > 1]
    if shared:
        return f", since '{shared[0]}' has other readers"
    return ""
