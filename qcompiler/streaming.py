"""Streaming calibration data through the levels of a model: measure, let the caller quantize, advance.

Batches are the unit of work: each is run and multiplied by one thread, single-threaded inside, and sums are taken in
batch order, so the result does not depend on the number of threads.

The data are taken to a level when something is to be measured there, and not before: where the results of an
interrupted run are at hand nothing is run (see `waypoints`).
"""

import gc
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple, Protocol

import numpy as np
import onnx_ir as ir

from qcompiler.calibration import row_mask
from qcompiler.checkpoints import Checkpoints
from qcompiler.graph import Site
from qcompiler.readings import Batches, in_flight, manner, measure, readers, residual_of
from qcompiler.scratch import Scratch
from qcompiler.segments import Segment, Weights, constants_of, lent, segment_model
from qcompiler.session import Feeds, OrtRunner
from qcompiler.statistics import LayerFacts
from qcompiler.waypoints import Waypoints

__all__ = ["Reading", "Streaming", "TokenCounts"]

OnSites = Callable[[list[Site], LayerFacts], None]


class TokenCounts(Protocol):
    """What tells how much each token counts.

    Attributes:
        digest: Hash of what it follows from; empty where there is no folder of checkpoints.
    """

    digest: str

    def tokens(self, sites: Sequence[Site]) -> list[np.ndarray] | None:
        """What tokens count to sites that read the same, float32 ``[T]`` for each batch; None: all the same."""
        ...


class Reading:
    """What sites that read the same activation read.

    Attributes:
        digest: Hash of all that `facts` follow from; empty where there is no folder of checkpoints.
    """

    def __init__(self, digest: str, measure: Callable[[], LayerFacts]) -> None:
        """Measure when that is asked for."""
        self.digest, self._measure = digest, measure

    @cached_property
    def facts(self) -> LayerFacts:
        """The facts about the activation; only to be asked for while its level is at hand."""
        return self._measure()


OnReading = Callable[[list[Site], Reading], None]


@dataclass(frozen=True)
class Streaming:
    """How to stream.

    Attributes:
        provider: Execution provider that runs the float parts.
        threads: Batches in flight.
        sequential: Advance with the weights that the caller has just quantized, or with the float ones.
        max_memory: Bytes of activations past which batches wait on disk; None is unlimited.
        tick: Called with (levels done, levels).
        drift: Whether the float model runs beside the one that is being quantized, for `LayerFacts.drift`.
        checkpoints: Where `visit` stores how far the data have come; None stores nothing.
        guidance: What tells how much each token counts in what is measured; None counts all the same.
    """

    provider: str
    threads: int
    sequential: bool
    max_memory: int | None
    tick: Callable[[int, int], None]
    drift: bool = False
    checkpoints: Checkpoints | None = None
    guidance: TokenCounts | None = None

    def run(self, model: ir.Model, segments: Sequence[Segment], batches: Sequence[Feeds], on_sites: OnSites) -> None:
        """Go through the levels and measure everything.

        Args:
            model: The model that was cut; `on_sites` may change its weights.
            segments: From `plan_segments`.
            batches: Feeds of the whole model.
            on_sites: Called with the sites of a level that read the same activation, and the facts about it.
        """
        # Boundaries are of use only where nothing has to be measured on the way to them.
        everything = replace(self, checkpoints=None)
        everything.visit(model, segments, batches, lambda sites, reading: on_sites(sites, reading.facts))

    def visit(
        self, model: ir.Model, segments: Sequence[Segment], batches: Sequence[Feeds], on_reading: OnReading
    ) -> None:
        """Go through the levels and measure what is asked for; see `run`.

        Args:
            model: The model that was cut; `on_reading` may change its weights.
            segments: From `plan_segments`.
            batches: Feeds of the whole model.
            on_reading: Called with the sites of a level that read the same activation, and with what knows the facts
                about it. What was stored under a key made of the reading's digest can be used in the place of these.
        """
        with ThreadPoolExecutor(self.threads) as pool, Scratch(self.max_memory) as scratch:
            way = _Way(self, model, segments, batches, pool, scratch)
            try:
                for index, segment in enumerate(segments):
                    self.tick(index, len(segments))
                    for sites in readers(segment):
                        on_reading(sites, way.reading(sites, segment))
                    if index + 1 < len(segments):
                        way.leave(segment)
                way.waypoints.close()
            finally:
                way.ahead.close()
        self.tick(len(segments), len(segments))


class _Step(NamedTuple):
    """A segment to be run: the weights that each stream runs it with, and the key of the boundary behind it."""

    segment: Segment
    weights: list[Weights]
    place: str


class _Way:
    """The data on their way through the levels: the boundary, and with `drift` that of the float model beside it."""

    def __init__(
        self,
        how: Streaming,
        model: ir.Model,
        segments: Sequence[Segment],
        batches: Sequence[Feeds],
        pool: ThreadPoolExecutor,
        scratch: Scratch,
    ) -> None:
        """Begin at the model's inputs."""
        self._how, self._model, self._pool, self._scratch = how, model, pool, scratch
        self._masks = [row_mask(feeds) for feeds in batches]
        self._streams = [
            [{name: _kept(array, scratch) for name, array in feeds.items()} for feeds in batches]
            for _ in range(2 if how.drift else 1)
        ]
        # What the float model has, which differs where weights were quantized before.
        self._floats = constants_of(node for segment in segments for node in segment.nodes)
        self._steps: list[_Step] = []
        self.ahead = _Ahead()
        self.waypoints = Waypoints(how.checkpoints, model, batches, how.provider, len(self._streams))

    def reading(self, sites: Sequence[Site], segment: Segment) -> Reading:
        """What sites of the level at hand, a segment, read, which is the same, measured once the data are here."""
        site, guidance = sites[0], self._how.guidance
        residual = self._residual(sites)
        guided = ([each.name for each in sites], guidance.digest) if guidance is not None else ()
        names = [site.input.name or "", *([residual] if residual else [])]
        digest = self.waypoints.values(names, "reading", manner(site), *guided)
        counts = guidance.tokens(sites) if guidance is not None else None
        return Reading(digest, lambda: self._measured(site, segment, residual, counts))

    def leave(self, segment: Segment) -> None:
        """Go on to the next level; the data follow when something is to be measured."""
        floats = self._float_weights(segment)
        weights = [constants_of(segment.nodes) if self._how.sequential else floats, floats][: len(self._streams)]
        self._steps.append(_Step(segment, weights, self.waypoints.leave(segment, weights)))

    def _float_weights(self, segment: Segment) -> Weights:
        # Nodes may be new.
        return {value: self._floats.get(value, tensor) for value, tensor in constants_of(segment.nodes).items()}

    def _residual(self, sites: Sequence[Site]) -> str | None:
        """Name of what the output of the only site is added to, where the float model knows of something better."""
        value = residual_of(sites[0]) if self._how.drift and len(sites) == 1 else None
        return value.name if value is not None else None

    def _measured(
        self, site: Site, segment: Segment, residual: str | None, counts: list[np.ndarray] | None
    ) -> LayerFacts:
        self._arrive()
        boundary, *others = self._streams
        beside = others[0] if others else []
        known = residual if boundary and residual in boundary[0] else None
        at = Batches(boundary, beside, self._masks, counts)
        facts = measure(site, at, known, self._pool, self._how.threads)
        # The float model need not wait for the weights that the caller makes of this; what it computes takes memory.
        if beside and self._how.max_memory is None and not self.ahead.of(segment):
            with lent(self._float_weights(segment)):
                runner = self._runner(segment, beside[0])
            if runner is not None:
                self.ahead.start(segment, partial(_run, runner, segment), beside)
        return facts

    def _arrive(self) -> None:
        """Bring the data to the level at hand, from the last boundary that is stored or from where they are."""
        behind, stored = self.waypoints.resume([step.place for step in self._steps])
        if stored:
            for array in (array for stream in self._streams for feeds in stream for array in feeds.values()):
                self._scratch.drop(array)
            self._streams = stored
        for segment, weights, place in self._steps[behind:]:
            for number, (stream, lends) in enumerate(zip(self._streams, weights, strict=True)):
                if number and self.ahead.of(segment):
                    _advance(segment, stream, self.ahead.results(), self._scratch)
                    continue
                with lent(lends):  # A session holds the weights that it was made with.
                    runner = self._runner(segment, stream[0])
                run = partial(_run, runner, segment)
                _advance(segment, stream, in_flight(self._pool, run, stream[:], self._how.threads), self._scratch)
                del run, runner
            self.waypoints.offer(place, self._streams)
            gc.collect(0)
        self._steps.clear()

    def _runner(self, segment: Segment, feeds: Feeds) -> OrtRunner | None:
        """A session that computes what later levels read, or None if that is nothing."""
        if not segment.outputs:
            return None
        dtypes = {name: feeds[name].dtype for name in segment.inputs}
        proto, constants = segment_model(self._model, segment, dtypes)
        return OrtRunner(proto, provider=self._how.provider, threads=1, prepack=False, constants=constants)


def _kept(array: np.ndarray, scratch: Scratch) -> np.ndarray:
    """An input of the model; one that is mapped from a file takes no memory."""
    base: object = array
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap):
            return array
        base = base.base
    return scratch.keep(array)


class _Ahead:
    """Runs one segment for all batches in a thread of its own."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._segment: Segment | None = None
        self._waiting: deque[Future[Feeds]] = deque()

    def of(self, segment: Segment) -> bool:
        """Whether it is the one that was started last."""
        return self._segment is segment

    def start(self, segment: Segment, run: Callable[[Feeds], Feeds], boundary: Iterable[Feeds]) -> None:
        """Begin, in the place of what was begun before."""
        self._stop()
        self._segment = segment
        self._waiting.extend(self._pool.submit(run, feeds) for feeds in boundary)

    def results(self) -> Iterator[Feeds]:
        """Once, batch after batch."""
        while self._waiting:
            yield self._waiting.popleft().result()

    def close(self) -> None:
        """End what is going on."""
        self._stop()
        self._pool.shutdown()

    def _stop(self) -> None:
        while self._waiting:
            self._waiting.popleft().cancel()


def _run(runner: OrtRunner | None, segment: Segment, feeds: Feeds) -> Feeds:
    """What a segment computes of a batch."""
    if runner is None:
        return {}
    results = runner.run({name: feeds[name] for name in segment.inputs}, segment.outputs)
    # Copied, since a result keeps all memory of the session alive that made it.
    return {name: array.copy() for name, array in results.items()}


def _advance(segment: Segment, boundary: list[Feeds], computed: Iterable[Feeds], scratch: Scratch) -> None:
    """Replace each batch's boundary by the next one, batch by batch, so that few batches are held twice."""
    for batch, results in enumerate(computed):
        feeds = boundary[batch]
        following = {name: feeds[name] for name in segment.carried if name in feeds}
        for name, array in feeds.items():
            if name not in following:
                scratch.drop(array)
        following.update((name, scratch.keep(array)) for name, array in results.items())
        boundary[batch] = following
