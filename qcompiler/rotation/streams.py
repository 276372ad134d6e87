"""The activations that an orthogonal matrix R can rotate as one: a residual stream, with all that writes and reads it.

A stream is closed under additions. What writes it is a linear layer, a lookup table or a constant; what reads it is a
linear layer, directly or behind a normalization. A normalization by the root of the mean square does not notice R:
(x R) / |x R| = (x / |x|) R. One that subtracts the mean first does not notice an R that keeps the vector of ones. The
gain behind it has to move into the layers that read the result, which therefore have to be its only readers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompiler.foldings.rules import constant_read, label
from qcompiler.foldings.shapes import BlockedError
from qcompiler.foldings.sizes import dims_of, note_sizes
from qcompiler.graph import Site, constant_array, walk
from qcompiler.rotation.operators import (
    is_square,
    keeps_channels,
    norm_inputs,
    one_value,
    reduces_channels,
    shares_factor,
)
from qcompiler.sites import find_sites

__all__ = ["Gain", "Reader", "Stream", "find_streams"]

_SUMS = ("Add", "Sub", "Sum")
_SIZES = ("Shape", "Size")
_MOVES = {"Reshape", "Transpose", "Split", "Slice", "Squeeze", "Unsqueeze", "Cast", "Identity"}
# A shift divided by its gain may not be this much larger: it would drown what is normalized.
_LARGEST_SHIFT = 1e4


@dataclass(frozen=True, eq=False)
class Gain:
    """What multiplies the channels of a normalized activation.

    Attributes:
        node: The normalization, or the Mul.
        place: Where the constant is read.
        values: float64 ``[d]``.
    """

    node: ir.Node
    place: tuple[ir.Node, int]
    values: np.ndarray


@dataclass(frozen=True, eq=False)
class Reader:
    """A linear layer that reads a stream, with the gain in front of it."""

    site: Site
    gain: Gain | None


@dataclass(eq=False)
class Stream:
    """Values that can be rotated together.

    Attributes:
        name: Of the first normalization.
        size: d.
        values: The rotated values.
        tables: The lookup tables whose rows begin it.
        writers: The linear layers that add to it.
        readers: The linear layers that read it.
        gains: What goes into the readers, and becomes one.
        constants: (node, input, gain) of constants that are added, behind a gain or not.
        keep_ones: Whether R has to keep the vector of ones.
        residual: Whether computed values are added in it.
        reason: Why it cannot be rotated; empty if it can.
    """

    name: str
    size: int = 0
    values: set[ir.Value] = field(default_factory=set)
    tables: list[Site] = field(default_factory=list)
    writers: list[Site] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)
    gains: list[Gain] = field(default_factory=list)
    constants: list[tuple[ir.Node, int, Gain | None]] = field(default_factory=list)
    keep_ones: bool = False
    residual: bool = False
    reason: str = ""


def find_streams(model: ir.Model) -> list[Stream]:
    """The streams in front of all normalizations, in graph order.

    A normalization of what a layer has just computed, as that of queries and keys, is left out where it is no stream.

    Args:
        model: Its nodes in topological order.
    """
    note_sizes(model)
    sites = {site.node: site for site in find_sites(model)[0] if site.role != "embedding"}
    found: list[Stream] = []
    for node, nested in walk(model.graph):
        seed = None if nested else _normalized(node)
        if seed is None or any(seed in stream.values for stream in found):
            continue
        search = _Search(Stream(node.name or node.outputs[0].name or node.op_type), sites)
        stream = search.run(seed)
        if stream.residual or not stream.reason or not _inside_layer(seed, sites):
            found.append(stream)
    return found


def _normalized(node: ir.Node) -> ir.Value | None:
    """What a node normalizes, if it is a normalization or begins one that is spelled out."""
    if norm_inputs(node) is not None:
        return node.inputs[0]
    value = node.inputs[0] if node.inputs else None
    if value is None:
        return None
    return value if is_square(node, value) or reduces_channels(node) == "norm" else None


def _inside_layer(value: ir.Value, sites: Mapping[ir.Node, Site]) -> bool:
    """Whether a value is the result of a linear layer, perhaps in another shape."""
    node = value.producer()
    while node is not None and node not in sites and node.op_type in _MOVES and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node in sites


class _Search:
    """Follows a stream from one of its values to all others, forwards and backwards."""

    def __init__(self, stream: Stream, sites: Mapping[ir.Node, Site]) -> None:
        self._stream, self._sites = stream, sites
        self._todo: list[tuple[ir.Value, Gain | None]] = []
        self._gained: dict[ir.Value, Gain] = {}

    def run(self, seed: ir.Value) -> Stream:
        """The stream; where it cannot be rotated, as much of it as there is, with the first reason met."""
        stream = self._stream
        self._join(seed)
        while self._todo:
            value, gain = self._todo.pop(0)
            for step in [(None, 0), *value.uses()]:
                try:
                    self._step(value, gain, *step)
                except BlockedError as blocked:
                    stream.reason = stream.reason or str(blocked)
            if value.is_graph_output():
                stream.reason = stream.reason or f"'{value.name}' is an output of the graph"
        if not stream.reason:
            try:
                self._check()
            except BlockedError as blocked:
                stream.reason = str(blocked)
        return stream

    def _step(self, value: ir.Value, gain: Gain | None, node: ir.Node | None, index: int) -> None:
        """Follow one use of a value, or (without a node) what computes it."""
        if node is None:
            if gain is None:
                self._backward(value)
        elif gain is None:
            self._forward(node, index, value)
        else:
            self._behind_gain(node, index, gain)

    def _join(self, value: ir.Value | None, gain: Gain | None = None) -> None:
        if value is None or value in self._gained or (gain is None and value in self._stream.values):
            return
        if gain is None:
            self._stream.values.add(value)
        else:
            self._gained[value] = gain
        self._todo.append((value, gain))

    def _operand(self, node: ir.Node, index: int) -> None:
        """Something that is added to the stream: a constant, or what is in it too."""
        place = constant_read(node, index)
        if place is not None:
            self._stream.constants.append((*place, None))
        else:
            self._join(node.inputs[index])

    def _backward(self, value: ir.Value) -> None:
        """What computes a value of the stream has to be able to rotate it."""
        node, stream = value.producer(), self._stream
        if node is None:
            raise BlockedError(f"'{value.name}' is an input of the graph, which nothing can rotate")
        if node in self._sites:
            stream.writers.append(self._linear(node))
        elif (table := _table(node)) is not None:
            stream.tables.append(table)
        elif node.op_type in _SUMS:
            self._sum(node)
        elif node.op_type in ("Mul", "Div"):
            index = next((i for i in (0, 1) if shares_factor(node, i)), None)
            if index is None:
                raise BlockedError(f"'{value.name}' comes out of {label(node)}, which is no linear layer")
            self._join(node.inputs[index])
        elif keeps_channels(node, 0):
            for index in range(len(node.inputs) if node.op_type == "Concat" else 1):
                self._operand(node, index)
        elif norm_inputs(node) is not None:
            if value is not node.outputs[-1] or len(node.outputs) < 4:
                raise BlockedError(f"{label(node)} normalizes what is added to the stream")
            self._skip(node)
        else:
            raise BlockedError(f"'{value.name}' comes out of {label(node)}, which is no linear layer")

    def _sum(self, node: ir.Node) -> None:
        """An addition: all its operands are in the stream, but for one number for each token."""
        pair = (0, 1) if len(node.inputs) == 2 else ()
        shifts = [i for i in pair if constant_read(node, i) is None and one_value(node.inputs[i], node.inputs[1 - i])]
        others = [i for i in range(len(node.inputs)) if i not in shifts]
        self._stream.keep_ones |= bool(shifts)
        self._stream.residual |= sum(constant_read(node, i) is None for i in others) > 1
        for index in others:
            self._operand(node, index)
        self._join(node.outputs[0])

    def _skip(self, node: ir.Node) -> None:
        """The sum of a normalization that adds first."""
        found = norm_inputs(node)
        assert found is not None
        for index in (0, 1, found[3]):
            if index is not None:
                self._operand(node, index)
        self._stream.residual = True
        if len(node.outputs) > 3:
            self._join(node.outputs[3])

    def _forward(self, node: ir.Node, index: int, value: ir.Value) -> None:
        """What reads a value of the stream has to be able to take it rotated."""
        found = norm_inputs(node)
        if node in self._sites and index == 0:
            self._stream.readers.append(Reader(self._linear(node), None))
        elif node.op_type in _SUMS:
            self._sum(node)
        elif found is not None and index <= ("Skip" in node.op_type):
            self._norm(node, *found)
        elif is_square(node, value) or reduces_channels(node) == "norm" or node.op_type in _SIZES:
            pass
        elif reduces_channels(node) == "mean":
            self._stream.keep_ones = True
        elif node.op_type in ("Mul", "Div") and shares_factor(node, index):
            self._join(node.outputs[0])
        elif node.op_type == "Mul" and constant_read(node, 1 - index) is not None:
            self._gain(node, 1 - index, node.outputs[0])
        elif keeps_channels(node, index):
            if node.op_type == "Concat":
                for other in range(len(node.inputs)):
                    self._operand(node, other)
            self._join(node.outputs[0])
        else:
            raise BlockedError(f"{label(node)} reads '{value.name}' and is no linear layer")

    def _norm(self, node: ir.Node, centred: bool, gamma: int, beta: int | None, bias: int | None) -> None:
        del bias
        axis = node.attributes.get_int("axis", -1)
        rank = node.inputs[0].shape.rank() if node.inputs[0] is not None and node.inputs[0].shape is not None else 0
        if axis not in (-1, rank - 1):
            raise BlockedError(f"{label(node)} does not normalize over the last axis alone")
        if any(output.uses() or output.is_graph_output() for output in node.outputs[1:3]):
            raise BlockedError(f"the statistics of {label(node)} are read")
        self._stream.keep_ones |= centred
        if "Skip" in node.op_type:
            self._skip(node)
        gain = self._gain(node, gamma, node.outputs[0])
        if beta is not None:
            self._shift(node, beta, gain)

    def _gain(self, node: ir.Node, index: int, result: ir.Value) -> Gain:
        place = constant_read(node, index)
        if place is None:
            raise BlockedError(f"the gain of {label(node)} is not a constant")
        known = next((gain for gain in self._stream.gains if gain.node is node), None)
        if known is not None:
            return known
        value = place[0].inputs[place[1]]
        assert value is not None
        array = constant_array(value)
        if array.size != array.shape[-1] or array.size < 2:
            raise BlockedError(f"the gain of {label(node)} does not have a number for each channel")
        gain = Gain(node, place, array.reshape(-1).astype(np.float64))
        self._stream.gains.append(gain)
        self._join(result, gain)
        return gain

    def _shift(self, node: ir.Node, index: int, gain: Gain) -> None:
        place = constant_read(node, index)
        if place is None:
            raise BlockedError(f"{label(node)} adds what is not a constant behind a normalization")
        if all(known[:2] != place for known in self._stream.constants):
            self._stream.constants.append((*place, gain))

    def _behind_gain(self, node: ir.Node, index: int, gain: Gain) -> None:
        """What reads a normalized value has to be able to take the gain."""
        value = node.inputs[index]
        assert value is not None
        if node in self._sites and index == 0:
            self._stream.readers.append(Reader(self._linear(node), gain))
        elif node.op_type in ("Add", "Sub") and constant_read(node, 1 - index) is not None:
            if node.op_type == "Sub" and index:
                raise BlockedError(f"{label(node)} subtracts '{value.name}'")
            self._shift(node, 1 - index, gain)
            self._join(node.outputs[0], gain)
        elif (node.op_type in ("Mul", "Div") and shares_factor(node, index)) or (
            node.op_type != "Concat" and keeps_channels(node, index)
        ):
            self._join(node.outputs[0], gain)
        elif node.op_type not in _SIZES:
            raise BlockedError(f"{label(node)} reads '{value.name}' behind {label(gain.node)} and is no linear layer")

    def _linear(self, node: ir.Node) -> Site:
        """The site of a node whose weight can be rotated."""
        site = self._sites[node]
        if node.op_type not in ("MatMul", "Gemm"):
            raise BlockedError(f"{label(node)} is a convolution")
        if site.nested:
            raise BlockedError(f"'{site.name}' is inside the body of {site.nested}")
        if site.quantized is not None:
            raise BlockedError(f"the weight of '{site.name}' is quantized already")
        return site

    def _check(self) -> None:
        """That all agree on the size, and that the constants can be rotated."""
        stream = self._stream
        stream.writers, stream.readers = list(dict.fromkeys(stream.writers)), list(dict.fromkeys(stream.readers))
        sizes = {site.name: site.rows for site in stream.writers}
        sizes.update({site.name: site.columns for site in stream.tables})
        sizes.update({reader.site.name: reader.site.columns for reader in stream.readers})
        sizes.update({label(gain.node): len(gain.values) for gain in stream.gains})
        stream.size = next(iter(sizes.values()), 0)
        for name, size in sizes.items():
            if size != stream.size:
                raise BlockedError(f"'{name}' has {size} channels where others have {stream.size}")
        if not (stream.writers or stream.tables) or not stream.readers:
            raise BlockedError("no linear layer reads it" if not stream.readers else "no linear layer writes it")
        for site in stream.writers:
            if site.node.op_type == "Gemm" and len(site.node.inputs) > 2 and site.node.inputs[2] is not None:
                place = constant_read(site.node, 2)
                if place is None:
                    raise BlockedError(f"the bias of '{site.name}' is not a constant")
                stream.constants.append((*place, None))
        stream.constants = list(dict.fromkeys(stream.constants))
        for node, index, gain in stream.constants:
            self._check_constant(node, index, gain)

    def _check_constant(self, node: ir.Node, index: int, gain: Gain | None) -> None:
        value = node.inputs[index]
        assert value is not None
        array = constant_array(value)
        if array.ndim and array.shape[-1] not in (1, self._stream.size):
            raise BlockedError(f"'{value.name}' does not have a number for each of {self._stream.size} channels")
        if gain is not None:
            shift = np.abs(np.broadcast_to(array, (*array.shape[:-1], self._stream.size)).astype(np.float64))
            lost = shift > _LARGEST_SHIFT * np.abs(gain.values)
            if lost.any():
                raise BlockedError(f"'{value.name}' shifts channels that the gain of {label(gain.node)} silences")


def _table(node: ir.Node) -> Site | None:
    """The site of a lookup of rows of a constant [V, d], however small."""
    if node.op_type not in ("Gather", "GatherND") or node.domain not in ("", "ai.onnx"):
        return None
    table = node.inputs[0]
    if node.op_type == "GatherND":
        places = dims_of(node.inputs[1])
        if node.attributes.get_int("batch_dims", 0) or not places or places[-1] != 1:
            return None
    between = table.producer() if table is not None else None
    if between is not None:
        if between.op_type != "Transpose" or tuple(between.attributes.get_ints("perm", (1, 0))) != (1, 0):
            return None
        table = between.inputs[0]
    if table is None or table.const_value is None or not table.is_initializer():
        return None
    shape = [int(size) for size in table.const_value.shape.numpy()]
    if node.attributes.get_int("axis", 0) != 0 or len(shape) != 2 or not table.const_value.dtype.is_floating_point():
        return None
    if between is None:
        return Site(node.name or table.name or "", node, table, "NK", shape[0], shape[1], role="embedding")
    return Site(node.name or table.name or "", node, table, "KN", shape[1], shape[0], "embedding", between)
