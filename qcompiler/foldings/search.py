"""Where factors of an activation's channels can come from: the operators before it that can absorb them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompiler.foldings.rules import carriers, constant_read, constant_size, label, pass_through
from qcompiler.foldings.shapes import BlockedError
from qcompiler.graph import Site

__all__ = ["Plan", "Sites", "Source", "columns_of", "find_plan", "find_sources", "followed", "weight_problem"]

# Linear sites by node.
Sites = Mapping[ir.Node, Site]
# Constants to divide: where they are read, and the channels of their elements.
_Constants = list[tuple[ir.Node, int, np.ndarray]]
# Operators between an activation and what absorbs its factors: far more than any model has.
_LONGEST_PATH = 40
_DOMAINS = {"", "ai.onnx", "com.microsoft"}
# Normalizations: the inputs that hold gamma and beta.
_NORMS: dict[str, tuple[int, int | None]] = {
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1, None),
    "SimplifiedLayerNormalization": (1, None),
    "SkipLayerNormalization": (2, 3),
    "SkipSimplifiedLayerNormalization": (2, None),
}


@dataclass
class Source:
    """An operator that can divide the channels of its first result.

    Attributes:
        node: The operator.
        channels: The number of each channel, in the shape that broadcasts to the result.
        constants: (node, input, channels of its elements) of the constants that are divided for that.
        site: The linear layer, if it is one.
    """

    node: ir.Node
    channels: np.ndarray
    constants: _Constants = field(default_factory=list)
    site: Site | None = None


@dataclass
class Plan:
    """What has to be rescaled together.

    Attributes:
        kind: See `foldings.Folding`.
        source: The node that absorbs the factors.
        columns: int ``[K]``, the source's channel that each of the readers' columns belongs to.
        constants: (node, input, channels of its elements) of constants to divide.
        rows: The site whose rows are divided, with their channels ``[N]``, or None.
        readers: The sites whose columns are multiplied.
        caches: Names of inputs and outputs of the model that are divided too.
    """

    kind: str
    source: ir.Node
    columns: np.ndarray
    constants: _Constants
    rows: tuple[Site, np.ndarray] | None
    readers: list[Site]
    caches: list[str]


def find_plan(site: Site, sites: Sites, *, caches: bool) -> Plan | str:
    """How factors of the site's activation can be absorbed, or why they cannot: the first reason that was met."""
    reason = ""
    for found in find_sources(site.input, sites, []):
        try:
            if isinstance(found, str):
                raise BlockedError(found)
            source, path = found
            columns = columns_of(site, followed(source, path, site.input))
            plan = _spread(source, np.unique(columns), sites, caches)
            plan.kind = _kind(source, path)
            return plan
        except BlockedError as blocked:
            reason = reason or str(blocked)
    return reason


def weight_problem(site: Site) -> str:
    """Why the site's weight cannot be rescaled; empty if it can."""
    if site.quantized is not None:
        return f"the weight of '{site.name}' is quantized already"
    readers = list(site.weight.consumers())
    for between in [node for node in readers if node.op_type == "Transpose"]:
        readers += between.outputs[0].consumers()
    for node in readers:
        if node.op_type == "Gather":
            return f"the weight of '{site.name}' is tied with the lookup table '{node.name or node.outputs[0].name}'"
    return ""


def _kind(source: Source, path: list[tuple[ir.Node, int]]) -> str:
    if source.site is None:
        return "gain" if source.node.op_type == "Mul" else "norm"
    ops = {node.op_type for node, _ in path}
    if ops & {"MatMul", "Attention", "MultiHeadAttention", "GroupQueryAttention"}:
        return "attention"
    gated = any(node.op_type == "Mul" and constant_read(node, 1 - index) is None for node, index in path)
    return "gated" if gated else "linear"


def find_sources(
    value: ir.Value, sites: Sites, path: list[tuple[ir.Node, int]]
) -> Iterator[tuple[Source, list[tuple[ir.Node, int]]] | str]:
    """What may absorb factors of a value, each with the way from there: (node, input that is read)."""
    node = value.producer()
    if node is None or len(path) > _LONGEST_PATH:
        yield f"nothing before '{value.name}' can take the factors"
        return
    if node in sites or (node.op_type in _NORMS and node.domain in _DOMAINS):
        if value is not node.outputs[0]:
            yield f"'{value.name}' is not the normalized result of {label(node)}"
            return
        try:
            yield (_linear_source(sites[node]) if node in sites else _norm_source(node)), path
        except BlockedError as blocked:
            yield str(blocked)
        return
    if node.op_type == "Mul" and node.domain in ("", "ai.onnx"):
        for index in (0, 1):
            place = constant_read(node, index)
            if place is not None and constant_size(place) > 1:
                channels = _numbered(place)
                yield Source(node, channels, [(*place, channels)]), path
    ways = list(carriers(node))
    if not ways:
        yield f"'{value.name}' comes out of {label(node)}, which does not let factors pass"
    for index in ways:
        inner = node.inputs[index]
        if inner is not None:
            yield from find_sources(inner, sites, [(node, index), *path])


def _numbered(place: tuple[ir.Node, int]) -> np.ndarray:
    """The elements of a constant, numbered."""
    value = place[0].inputs[place[1]]
    assert value is not None and value.const_value is not None
    return np.arange(constant_size(place)).reshape([int(size) for size in value.const_value.shape.numpy()])


def _norm_source(node: ir.Node) -> Source:
    gamma, beta = _NORMS[node.op_type]
    place = constant_read(node, gamma)
    if place is None or constant_size(place) < 2:
        raise BlockedError(f"the weight of {label(node)} is not a constant with an element for each channel")
    channels = _numbered(place)
    constants = [(*place, channels)]
    if beta is not None and beta < len(node.inputs) and node.inputs[beta] is not None:
        place = constant_read(node, beta)
        if place is None:
            raise BlockedError(f"the bias of {label(node)} is not a constant")
        constants.append((*place, channels))
    return Source(node, channels, constants)


def _linear_source(site: Site) -> Source:
    problem = weight_problem(site)
    if problem:
        raise BlockedError(problem)
    rank = site.weight.const_value.shape.rank() if site.weight.const_value is not None else 0
    channels = np.arange(site.rows)
    constants: _Constants = []
    if len(site.node.inputs) > 2 and site.node.inputs[2] is not None:
        place = constant_read(site.node, 2)
        if place is None:
            raise BlockedError(f"the bias of '{site.name}' is not a constant")
        constants.append((*place, channels))
    trailing = (1,) * (rank - 2) if site.node.op_type == "Conv" else ()
    return Source(site.node, channels.reshape(-1, *trailing), constants, site)


def followed(source: Source, path: list[tuple[ir.Node, int]], end: ir.Value) -> np.ndarray:
    """The source's channels in `end`, the value that the path leads to."""
    channels = source.channels
    ends = [node.inputs[index] for node, index in path[1:]] + ([end] if path else [])
    for (node, index), value in zip(path, ends, strict=True):
        outputs = pass_through(node, index, channels).outputs
        if value not in outputs:
            raise BlockedError(f"{label(node)} does not let factors pass")
        channels = outputs[value]
    return channels


def columns_of(site: Site, channels: np.ndarray) -> np.ndarray:
    """The channel of each column of a site that reads a value with these channels."""
    rank = site.weight.const_value.shape.rank() if site.weight.const_value is not None else 2
    axis = 1 - rank if site.node.op_type == "Conv" else -1
    ids: np.ndarray = channels.reshape((1,) * max(-axis - channels.ndim, 0) + channels.shape)
    if ids.size != ids.shape[axis] or ids.shape[axis] not in (1, site.columns):
        raise BlockedError(f"'{site.name}' does not read the channels one after the other")
    if (ids < 0).any():
        raise BlockedError(f"'{site.name}' reads channels that cannot be scaled")
    return np.broadcast_to(ids.reshape(-1), (site.columns,))


def _spread(source: Source, needed: np.ndarray, sites: Sites, caches: bool) -> Plan:
    """Follow the needed channels to all readers."""

    def only(channels: np.ndarray) -> np.ndarray:
        return np.where(np.isin(channels, needed), channels, -1)

    constants = [(node, index, only(channels)) for node, index, channels in source.constants]
    rows = (source.site, only(source.channels.reshape(-1))) if source.site is not None else None
    plan = Plan("", source.node, np.empty(0, int), constants, rows, [], [])
    scaled = {source.node.outputs[0]: only(source.channels)}
    todo = list(scaled)
    while todo:
        value = todo.pop()
        if value.is_graph_output():
            raise BlockedError(f"'{value.name}' is an output of the graph")
        for node, index in value.uses():
            site = sites.get(node)
            if site is not None and index == 0:
                _add_reader(plan, site, columns_of(site, scaled[value]))
                continue
            try:
                passed = pass_through(node, index, scaled[value])
                if passed.misused is not None and (passed.misused >= 0).any():
                    raise BlockedError(f"{label(node)} needs some of the channels for something else")
                if any(output in scaled for output in passed.outputs):
                    raise BlockedError(f"{label(node)} reads it on both sides")
            except BlockedError as blocked:
                raise BlockedError(f"'{value.name}' has another reader: {blocked}") from None
            scaled.update(passed.outputs)
            todo += passed.outputs
            plan.constants += passed.constants
            plan.caches += [_cache(cache, node, caches) for cache in passed.caches]
    return plan


def _add_reader(plan: Plan, site: Site, columns: np.ndarray) -> None:
    problem = weight_problem(site)
    if problem:
        raise BlockedError(problem)
    if plan.readers and not np.array_equal(columns, plan.columns):
        raise BlockedError(f"'{site.name}' reads the channels in another order than '{plan.readers[0].name}'")
    plan.columns = columns
    plan.readers.append(site)


def _cache(value: ir.Value, node: ir.Node, allowed: bool) -> str:
    """The name of a cache that may be scaled: an input that only its attention reads, or an output nobody reads."""
    lone_input = value.is_graph_input() and list(value.consumers()) == [node] and len(value.uses()) == 1
    if not allowed:
        raise BlockedError(f"the cache '{value.name}' would hold scaled values")
    if not lone_input and not (value.is_graph_output() and not value.uses()):
        raise BlockedError(f"the cache '{value.name}' is used by more than {label(node)}")
    return value.name or ""
