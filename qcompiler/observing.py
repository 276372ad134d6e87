"""Running a float model over calibration data and showing its activations, batch by batch, to collectors.

The part of the graph that the watched values depend on is cut into chunks in topological order, a session each, with
the weights fed from their mapped files. A batch goes through all chunks before the next one starts, and each activation
is reduced as soon as its chunk has run: memory depends on the size of a batch, and neither on the number of batches nor
on how many values are watched.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from qcompiler.calibration import row_mask
from qcompiler.errors import ModelError
from qcompiler.numerics.rows import token_rows
from qcompiler.readings import in_flight
from qcompiler.segments import Segment, chain_parts, read_values, segment_model
from qcompiler.session import Feeds, OrtRunner

__all__ = ["Chunks", "Collector", "observe"]

# Watched values in a chunk: few enough to be held together, many enough to keep sessions few.
_WATCHED = 12


class Collector(Protocol):
    """Reduces the values of one tensor to something small.

    `part` is called in threads and must not change the collector; `add` is called in the order of the batches, so that
    the result does not depend on the number of threads. A collector with a true attribute `whole` knows better than
    `token_rows` what the axes are, and is shown padding too.
    """

    def part(self, values: np.ndarray) -> Any:
        """One batch's share; `values` are lent, and have to be copied to be kept."""

    def add(self, part: Any) -> None:
        """Add a batch's share."""


def observe(
    model: ir.Model,
    collectors: Mapping[ir.Value, Sequence[Collector]],
    batches: Sequence[Feeds],
    *,
    provider: str = "CPUExecutionProvider",
    threads: int = 1,
    tick: Callable[[int, int], None] | None = None,
) -> None:
    """Show values to their collectors, batch after batch, without what belongs to padding tokens.

    Args:
        model: In topological order; it is not changed.
        collectors: For each watched value of the top graph (an input or a computed one) what reduces it.
        batches: Feeds of the whole model.
        provider: Execution provider.
        threads: Batches in flight; each is run by one thread.
        tick: Called with (batches done, batches).
    """
    watched = {value.name or "": list(found) for value, found in collectors.items()}
    if not watched or not len(batches):
        return
    chunks = Chunks(model, list(collectors), provider)

    def reduce(index: int) -> list[tuple[Collector, Any]]:
        mask, parts = row_mask(batches[index]), []
        for name, array in chunks.values(batches[index]):
            rows = token_rows(array, mask)
            for collector in watched[name]:
                parts.append((collector, collector.part(array if getattr(collector, "whole", False) else rows)))
        return parts

    # The first batch runs alone, since it makes the sessions.
    first = [reduce(0)]
    with ThreadPoolExecutor(threads) as pool:
        rest = in_flight(pool, reduce, range(1, len(batches)), threads)
        for done, parts in enumerate(chain(first, rest)):
            for collector, part in parts:
                collector.add(part)
            if tick is not None:
                tick(done + 1, len(batches))


class Chunks:
    """A model in pieces, with a session for each from the first batch on, which therefore has to run alone."""

    def __init__(self, model: ir.Model, wanted: list[ir.Value], provider: str) -> None:
        """Cut what the wanted values of the top graph depend on; the model, in topological order, is not changed."""
        self._model, self._provider = model, provider
        self._names = {value.name or "" for value in wanted}
        self._chunks = _plan(model, wanted)
        self._runners: list[OrtRunner] = []

    def values(self, feeds: Feeds) -> Iterator[tuple[str, np.ndarray]]:
        """Run a batch; yields each watched value, once, as soon as it is computed."""
        yield from ((name, array) for name, array in feeds.items() if name in self._names)
        boundary = dict(feeds)
        for index, chunk in enumerate(self._chunks):
            inputs = {name: boundary[name] for name in chunk.inputs}
            if index == len(self._runners):
                self._runners.append(self._runner(chunk, inputs))
            results = self._runners[index].run(inputs, self._fetched(chunk))
            boundary = {name: boundary[name] for name in chunk.carried if name in boundary}
            boundary.update((name, results[name]) for name in chunk.outputs)
            made = {output.name for node in chunk.nodes for output in node.outputs}
            yield from ((name, array) for name, array in results.items() if name in self._names and name in made)

    def _fetched(self, chunk: Segment) -> list[str]:
        made = [output.name or "" for node in chunk.nodes for output in node.outputs]
        return [name for name in made if name in self._names or name in chunk.outputs]

    def _runner(self, chunk: Segment, inputs: Feeds) -> OrtRunner:
        dtypes = {name: array.dtype for name, array in inputs.items()}
        outputs, chunk.outputs = chunk.outputs, self._fetched(chunk)
        proto, constants = segment_model(self._model, chunk, dtypes)
        chunk.outputs = outputs
        # Without an arena, since each session would keep the memory of its largest batch for itself.
        return OrtRunner(proto, provider=self._provider, threads=1, prepack=False, arena=False, constants=constants)


def _plan(model: ir.Model, wanted: list[ir.Value]) -> list[Segment]:
    """Cut what the wanted values depend on after every `_WATCHED` of them."""
    targets, needed = set(wanted), set(wanted)
    for node in reversed(model.graph):
        if any(output in needed for output in node.outputs):
            needed.update(read_values(node))
    missing = targets - {output for node in model.graph for output in node.outputs} - set(model.graph.inputs)
    if missing:
        raise ModelError(f"'{next(iter(missing)).name}' is not computed by the top graph and cannot be watched")
    chunks: list[list[ir.Node]] = [[]]
    watched = 0
    for node in model.graph:
        if not any(output in needed for output in node.outputs):
            continue
        if watched >= _WATCHED:
            chunks.append([])
            watched = 0
        chunks[-1].append(node)
        watched += sum(output in targets for output in node.outputs)
    return chain_parts(model, chunks) if chunks[0] else []
