"""Where activations are quantized, so that the target really runs integer operators and nothing is quantized in vain.

A node is *integer* when all activations it reads are codes. Sites (Conv, MatMul, Gemm with a quantized weight) and
products of two activations are integer because the scheme says so. Other operators follow their neighbours: what would
have to be decoded before it and encoded again behind it is integer itself, if the target has a kernel.

* ONNX Runtime's convolution becomes an integer kernel only when its result is quantized too. A Relu or Clip behind it
  is absorbed by that quantization, so the range is measured behind the Relu.
* A product that keeps its result float saves a rounding; its result is quantized only for integer readers. Where floats
  are read of it too, these are decoded: there is no integer kernel that gives both.
* Scaling and shifting by one value costs nothing where the quantization behind it can absorb it (see `absorb_scales`),
  if the shift is a whole number of its steps. So is clipping to a hard sigmoid on codes. Both are noted as anchors.
* Operators that only move values (pooling by maximum, reshaping, concatenation) run on codes as they are, so that what
  goes in and what comes out has to share one scale.
* Softmax, normalization and Gelu stay float: the integer forms are slower or do not exist.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from qcompiler.absorbing import anchor_of, behind_scalars, swallowed
from qcompiler.graph import Site
from qcompiler.numerics.activation import ActivationSpec
from qcompiler.scheme import Activations
from qcompiler.targets import IntegerRules

__all__ = ["Placement", "place"]

# Absorbed by the quantization of what is in front of them, whose codes begin at zero.
_ABSORBED = {"Relu", "Clip"}


@dataclass
class Placement:
    """What is to be quantized.

    Attributes:
        specs: The values, in graph order, with their formats.
        readers: For each value the (node, input index) pairs that read its codes.
        forced: Values that everybody, the caller included, gets decoded from their codes.
        shared: Groups of values with one scale.
        constants: Float constants that integer nodes read, with their readers.
        anchors: Numbers that the scale of a value should divide, so that they are codes as zero is.
    """

    specs: dict[ir.Value, ActivationSpec] = field(default_factory=dict)
    readers: dict[ir.Value, list[tuple[ir.Node, int]]] = field(default_factory=dict)
    forced: set[ir.Value] = field(default_factory=set)
    shared: list[list[ir.Value]] = field(default_factory=list)
    constants: dict[ir.Value, list[tuple[ir.Node, int]]] = field(default_factory=dict)
    anchors: dict[ir.Value, float] = field(default_factory=dict)


def place(
    graph: ir.Graph,
    sites: Mapping[Site, Activations],
    products: Iterable[ir.Node],
    scheme: Activations,
    rules: IntegerRules,
) -> Placement:
    """Decide which values of the top graph are quantized.

    Args:
        graph: The top graph, in topological order.
        sites: Sites of this graph whose scheme has static integer activations, with these.
        products: MatMul nodes of two activations that are to be integer too.
        scheme: The resolved activation scheme of products; those of sites differ from it in width alone.
        rules: What the target's kernels are like.
    """
    seeds: dict[ir.Node, tuple[int, ...]] = {node: (0, 1) for node in products}
    seeds.update((site.node, (0,)) for site in sites)
    integer = _integer_nodes(graph, seeds, rules)
    placement = Placement()
    widths = {node: scheme.bits for node in products} | {site.node: each.bits for site, each in sites.items()}
    for node in graph:
        if node not in integer:
            continue
        for index, value in _activations(node, integer[node]):
            target = placement.readers if value.const_value is None else placement.constants
            target.setdefault(value, []).append((node, index))
        if rules.result_is_quantized(node):
            placement.forced.add(_result(node, rules))
    placement.forced.update(_read_both_ways(placement, seeds, rules))
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value in placement.readers or value in placement.forced:
            placement.readers.setdefault(value, [])
            width = min((widths[node] for node, _ in placement.readers[value] if node in widths), default=0)
            placement.specs[value] = _spec(value, placement, _of_width(scheme, width), rules)
    placement.shared = _shared(integer, placement, rules)
    for members in placement.shared:
        _unify(members, placement, _of_width(scheme, 0), rules)
    moved = {value for members in placement.shared for value in members}
    for value, spec in placement.specs.items():
        anchor = anchor_of(value, placement.readers[value]) if rules.followers and value not in moved else 0.0
        if anchor and not spec.symmetric:
            placement.anchors[value] = anchor
    return placement


def _of_width(scheme: Activations, bits: int) -> Activations:
    """The scheme with a number of bits; 0 stands for those of a value that no site reads."""
    found = replace(scheme, bits=bits or max(scheme.bits, 8))
    return replace(found, symmetric=True) if bits == 1 else found


def _read_both_ways(placement: Placement, seeds: Iterable[ir.Node], rules: IntegerRules) -> Iterator[ir.Value]:
    """Results of products that codes and floats are read of."""
    for node in seeds if rules.results else ():
        result = node.outputs[0]
        count = len(placement.readers.get(result, ()))
        if count and (count < len(result.uses()) or result.is_graph_output()):
            yield result


def _spec(value: ir.Value, placement: Placement, scheme: Activations, rules: IntegerRules) -> ActivationSpec:
    """The format: signed where the target wants it, and for the right operand of products, as weights are."""
    readers = placement.readers[value]
    right = bool(readers) and all(node.op_type == "MatMul" and index == 1 for node, index in readers)
    if right and value not in placement.forced and scheme.bits == 8 and not scheme.fp8:
        return ActivationSpec(8, signed=True, symmetric=True)
    if _starts_at_zero(value) and not rules.signed and not scheme.fp8 and scheme.bits > 1:
        return ActivationSpec(scheme.bits)  # a zero point at the end of the range lets the kernel absorb the Relu
    return scheme.spec(signed=rules.signed)


def _unify(members: list[ir.Value], placement: Placement, scheme: Activations, rules: IntegerRules) -> None:
    """Give values that share a scale one format, where one begins at zero that one's."""
    formats = dict.fromkeys(placement.specs[value] for value in members)
    if len(formats) > 1:
        width = min(spec.bits for spec in formats)
        first = next((placement.specs[value] for value in members if _starts_at_zero(value)), None)
        common = first or scheme.spec(signed=rules.signed)
        symmetric = common.symmetric or width == 1
        placement.specs.update(dict.fromkeys(members, replace(common, bits=width, symmetric=symmetric)))


def _starts_at_zero(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type in _ABSORBED


def _activations(node: ir.Node, indices: tuple[int, ...]) -> Iterator[tuple[int, ir.Value]]:
    """The inputs of an integer node that are codes."""
    for index, value in enumerate(node.inputs):
        if value is not None and (not indices or index in indices):
            yield index, value


def _result(node: ir.Node, rules: IntegerRules) -> ir.Value:
    """What comes out of a node once the Relu or Clip, or the scalars, behind it are absorbed.

    What only moves values absorbs nothing.
    """
    output = node.outputs[0]
    if rules.followers and not rules.moves(node) and (scaled := behind_scalars(output)) is not output:
        return scaled
    while not output.is_graph_output() and not rules.moves(node):
        uses = list(output.uses())
        if (
            len(uses) != 1
            or uses[0].idx
            or uses[0].node.op_type not in _ABSORBED
            or uses[0].node.graph is not node.graph
        ):
            break
        if uses[0].node.op_type == "Clip" and not _clips_at_zero(uses[0].node):
            break
        output = uses[0].node.outputs[0]
    return output


def _clips_at_zero(node: ir.Node) -> bool:
    """Whether a Clip's lower bound is the constant zero."""
    attribute = node.attributes.get("min")
    if attribute is not None:
        return attribute.as_float() == 0
    low = node.inputs[1] if len(node.inputs) > 1 else None
    return low is not None and low.const_value is not None and not low.const_value.numpy().any()


def _integer_nodes(
    graph: ir.Graph, seeds: dict[ir.Node, tuple[int, ...]], rules: IntegerRules
) -> dict[ir.Node, tuple[int, ...]]:
    """Every integer node with the inputs that are codes: the seeds, and what lies between them."""
    chosen: dict[ir.Node, tuple[int, ...]] = {}
    for node in graph:
        follows = rules.follows(node) if swallowed(node) is None else None
        if node in seeds:
            chosen[node] = seeds[node]
        elif follows is not None:
            chosen[node] = follows
    while True:
        wrong = [node for node in chosen if node not in seeds and not _belongs(node, chosen, rules)]
        if not wrong:
            return chosen
        for node in wrong:
            del chosen[node]


def _belongs(node: ir.Node, chosen: dict[ir.Node, tuple[int, ...]], rules: IntegerRules) -> bool:
    """Whether a node gets codes from one of its neighbours and gives codes to another."""
    inputs = [value for _, value in _activations(node, chosen[node]) if value.const_value is None]
    gets = any(_comes_as_codes(value, chosen, rules) for value in inputs)
    result = _result(node, rules)
    gives = rules.shrinks(node) or any(
        user in chosen and (not chosen[user] or index in chosen[user]) for user, index in result.uses()
    )
    return gets and gives


def _comes_as_codes(value: ir.Value, chosen: dict[ir.Node, tuple[int, ...]], rules: IntegerRules) -> bool:
    producer = value.producer()
    while producer is not None and producer not in chosen:
        source = producer.inputs[0] if producer.op_type in _ABSORBED else swallowed(producer)
        producer = source.producer() if source is not None else None
    return producer is not None and rules.result_is_quantized(producer) and _result(producer, rules) is value


def _shared(integer: dict[ir.Node, tuple[int, ...]], placement: Placement, rules: IntegerRules) -> list[list[ir.Value]]:
    """Groups of values that operators which only move values make share a scale, each in graph order.

    A Concat can have a scale for each input. It has to where what a Relu cut off meets what is not cut off: around all
    of them the codes would not begin at zero any more, and the Relu would not be absorbed.
    """
    group: dict[ir.Value, list[ir.Value]] = {value: [value] for value in placement.specs}
    moving = [node for node in integer if rules.moves(node)]
    for node in sorted(moving, key=lambda node: node.op_type == "Concat"):
        read = [value for _, value in _activations(node, integer[node]) if value in group]
        ends = {any(_starts_at_zero(member) for member in group[value]) for value in read}
        if len(ends) > 1 or node.outputs[0] not in group:
            continue
        first = group[node.outputs[0]]
        for value in read:
            second = group[value]
            if first is not second:
                first.extend(second)
                group.update((member, first) for member in second)
    order = {value: at for at, value in enumerate(placement.specs)}
    found = {id(members): sorted(members, key=order.__getitem__) for members in group.values() if len(members) > 1}
    return list(found.values())
