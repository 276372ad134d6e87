"""Rotations that spread loud channels over all, merged into the weights before they are quantized.

Ashkboos et al. 2024, "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", arXiv:2404.00456, sections 3 and 4 (stage
1a and 1b), and Liu et al. 2024, "SpinQuant", arXiv:2405.16406, whose names are used here. For orthogonal R the model
computes the same from X R with W R in the place of W:

1. R1 rotates a residual stream: the lookup table and the layers that add to it write X R, the layers that read it have
   the gain of their normalization moved into their weights, and then read X R. A normalization by the mean square is
   the same for X R; one that subtracts the mean gets an R that keeps the vector of ones.
2. A lookup table that is also the weight of another layer cannot be rotated for one of them alone. It stays as it is,
   and what is read from it, or multiplied with it, is rotated as the model runs: two products with [d, d] (`r1=auto`);
   or the layer gets a table of its own (`r1=untie`).
3. R2 rotates the values of an attention in each of its heads: the rows of the value projection, and the columns of
   what reads the result.

R is a Hadamard matrix with random signs where one is known, else a random orthogonal matrix. Refused, with a record:
streams that something other than a linear layer writes or reads (a normalization behind a layer, an output of the
graph), and values that are cached from run to run, unless `caches` says that only the model itself reads them.

Rounding to nearest gets worse by it where weights alone are quantized (SmolLM2-135M, w4a16-g64-asym: a KL divergence
of 0.72 in the place of 0.38); GPTQ gets a little better (0.111 in the place of 0.115).

What is not done: the rotations that run with the model (R3 behind the rotary embedding, R4 before the down projection),
and learning R.

Shapes: W ``[N, K]``; R1 ``[d, d]``; R2 ``[heads, D, D]``. The arithmetic is float64, rounded once.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompiler.errors import SchemeError
from qcompiler.foldings import find_foldings
from qcompiler.foldings.shapes import BlockedError
from qcompiler.graph import Site, constant_array
from qcompiler.lowering import add_constant, append_nodes, make_node
from qcompiler.numerics.hadamard import orthogonal, random_hadamard
from qcompiler.passes.base import QuantPass, QuantPassResult, Stage
from qcompiler.records import SiteRecord
from qcompiler.rotation import (
    Changes,
    Gain,
    Mix,
    Reader,
    Stream,
    find_streams,
    linear_heads,
    mix_heads,
    reads_attention,
)
from qcompiler.sites import find_sites

__all__ = ["Rotate"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """Options of `rotate`."""

    r1: str = field(
        default="auto",
        metadata={
            "help": "rotate residual streams: auto (at run time where a table is tied), untie (copy it) or never"
        },
    )
    r2: bool = field(default=True, metadata={"help": "rotate the values of attentions in each head"})
    caches: bool = field(default=False, metadata={"help": "let the values that a model caches between runs be rotated"})

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if self.r1 not in ("auto", "untie", "never"):
            raise SchemeError(f"pass rotate: r1={self.r1} is unknown; choose auto, untie or never")


@dataclass(eq=False)
class _Online:
    """A stream's matrix, and where it has to be multiplied with as the model runs."""

    stream: Stream
    matrix: np.ndarray
    tables: list[Site]
    readers: list[Reader]


class Rotate(QuantPass):
    """R1 and R2 of SpinQuant, drawn rather than learned."""

    name = "rotate"
    stage = Stage.TRANSFORM
    paper = "Ashkboos et al. 2024, arXiv:2404.00456"
    Options = Options

    def call(self, model: ir.Model) -> QuantPassResult:
        """Find everything that can be rotated, then change all weights at once."""
        generator = np.random.default_rng(self.context.config.seed)
        changes, records, online = Changes(), list[SiteRecord](), list[_Online]()
        for stream in find_streams(model) if self.options.r1 != "never" else []:
            if stream.reason:
                records.append(SiteRecord(stream.name, "skipped", reason=f"stream not rotated: {stream.reason}"))
            else:
                record, at_run_time = self._rotate_stream(stream, changes, generator)
                records.append(record)
                online.append(at_run_time)
        if self.options.r2:
            records += self._rotate_values(model, changes, generator)
        untied = changes.commit()
        for place in online:
            self._insert(place)
        if untied:
            records.append(SiteRecord("model", "rewritten", reason=f"with a weight of their own: {', '.join(untied)}"))
        modified = any(record.action == "rewritten" for record in records)
        logger.info("rotate: %d of %d rotations made", sum(r.action == "rewritten" for r in records), len(records))
        return QuantPassResult(model, modified, tuple(records))

    def _rotate_stream(
        self, stream: Stream, changes: Changes, generator: np.random.Generator
    ) -> tuple[SiteRecord, _Online]:
        """Note what becomes of the constants around a stream; returns what is left to be done at run time."""
        if stream.keep_ones:
            matrix, known = orthogonal(stream.size, generator, keep_ones=True), False
        else:
            matrix, known = random_hadamard(stream.size, generator)
        mix = Mix(np.arange(stream.size)[None], matrix[None])
        tied = self.options.r1 == "auto"
        late = _Online(
            stream,
            matrix,
            [table for table in stream.tables if tied and _is_tied(table, stream.tables)],
            [reader for reader in stream.readers if tied and _reads_table(reader.site)],
        )
        for site in stream.writers:
            changes.rows(site, mix)
        for site in stream.tables:
            if site not in late.tables:
                changes.columns(site, mix)
        for reader in stream.readers:
            if reader not in late.readers:
                changes.columns(reader.site, mix, reader.gain.values if reader.gain is not None else None)
        for gain in stream.gains:
            changes.constant(gain.place, np.ones_like(_array(gain.place), np.float64))
        for node, index, factor in stream.constants:
            changes.constant((node, index), _rotated(_array((node, index)), factor, matrix))
        return self._stream_record(stream, known, late), late

    def _stream_record(self, stream: Stream, known: bool, late: _Online) -> SiteRecord:
        kind = "a Hadamard matrix" if known else "an orthogonal matrix that keeps means" if stream.keep_ones else ""
        parts = [
            f"stream of {stream.size} channels rotated by {kind or 'an orthogonal matrix'}",
            f"{len(stream.tables)} tables, {len(stream.writers)} writers, {len(stream.gains)} gains, "
            f"{len(stream.readers)} readers",
        ]
        names = [site.name for site in (*late.tables, *(reader.site for reader in late.readers))]
        if names:
            parts.append(f"at run time for the tied {', '.join(names)}")
        return SiteRecord(stream.name, "rewritten", reason="; ".join(parts))

    def _insert(self, late: _Online) -> None:
        """Multiply with the matrix behind tied tables, and with its transpose in front of what is tied to them."""
        first = next((site for site in (*late.tables, *(reader.site for reader in late.readers))), None)
        if first is None:
            return
        graph = first.node.graph
        assert isinstance(graph, ir.Graph)
        matrix = add_constant(graph, f"{late.stream.name}_rotation", late.matrix.astype(first.dtype.numpy()))
        for table in late.tables:
            node = make_node(graph, "MatMul", [table.node.outputs[0], matrix], {}, table.node, self.name)
            append_nodes(graph, table.node, [node])
        for reader in late.readers:
            self._rotate_back(graph, reader, matrix)

    def _rotate_back(self, graph: ir.Graph, reader: Reader, matrix: ir.Value) -> None:
        """Give a reader of the stream what it read before, and the gain that was taken out of the normalization."""
        site = reader.site
        back = make_node(graph, "Transpose", [matrix], {"perm": [1, 0]}, site.node, self.name)
        product = make_node(graph, "MatMul", [site.input, back.outputs[0]], {}, site.node, self.name)
        made = [back, product]
        if reader.gain is not None:
            values = reader.gain.values.astype(site.dtype.numpy())
            gain = add_constant(graph, f"{site.name}_gain", values)
            made.append(make_node(graph, "Mul", [product.outputs[0], gain], {}, site.node, self.name))
        graph.insert_before(site.node, made)
        for node in made[1:]:
            node.outputs[0].shape, node.outputs[0].type = site.input.shape, site.input.type
        site.node.replace_input_with(0, made[-1].outputs[0])

    def _rotate_values(self, model: ir.Model, changes: Changes, generator: np.random.Generator) -> Iterable[SiteRecord]:
        sites = [site for site in find_sites(model)[0] if site.role in ("linear", "lm_head")]
        for folding in find_foldings(model, sites, caches=self.options.caches):
            if folding.kind != "attention" and (folding.legal or not reads_attention(folding.value)):
                continue
            name = folding.sites[0].name
            try:
                plan = linear_heads(folding)
            except BlockedError as blocked:
                yield SiteRecord(name, "skipped", reason=f"values not rotated: {blocked}")
                continue
            groups, size = plan.heads.shape
            known = False
            drawn = []
            for _ in range(groups):
                matrix, known = random_hadamard(size, generator)
                drawn.append(matrix)
            mix_heads(plan, np.array(drawn), changes)
            kind = "Hadamard" if known else "orthogonal"
            parts = [f"values of '{plan.source.name}' rotated in {groups} heads by {kind} matrices of order {size}"]
            parts += [f"the cache {cache} is rotated" for cache in folding.caches]
            yield SiteRecord(name, "rewritten", reason="; ".join(parts))


def _rotated(array: np.ndarray, gain: Gain | None, matrix: np.ndarray) -> np.ndarray:
    """A constant that is added to a stream, or behind a gain, once the stream is rotated and the gain is gone."""
    full = np.broadcast_to(array, (*array.shape[:-1], len(matrix))).astype(np.float64)
    if gain is not None:
        full = np.divide(full, gain.values, out=np.zeros_like(full), where=gain.values != 0)
    return np.asarray(full @ matrix)


def _array(place: tuple[ir.Node, int]) -> np.ndarray:
    value = place[0].inputs[place[1]]
    assert value is not None
    return constant_array(value)


def _users(weight: ir.Value) -> list[ir.Node]:
    """The nodes that read a weight, directly or through a Transpose."""
    users: list[ir.Node] = []
    for node in weight.consumers():
        users += node.outputs[0].consumers() if node.op_type == "Transpose" else [node]
    return users


def _is_tied(table: Site, tables: Iterable[Site]) -> bool:
    """Whether something beside the lookups of one stream reads a table."""
    nodes = {other.node for other in tables}
    return table.weight.is_graph_output() or any(user not in nodes for user in _users(table.weight))


def _reads_table(site: Site) -> bool:
    """Whether the weight of a layer is a lookup table too."""
    return any(user.op_type in ("Gather", "GatherND") for user in _users(site.weight))
