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
from functools import cached_property
from typing import NamedTuple, TypeVar

import numpy as np
import onnx_ir as ir

from qcompiler.calibration import row_mask
from qcompiler.checkpoints import Checkpoints
from qcompiler.convolution import Geometry, patch_rows
from qcompiler.errors import ModelError
from qcompiler.graph import Site, input_feature_axis
from qcompiler.numerics.rows import feature_rows
from qcompiler.scratch import Scratch
from qcompiler.segments import Segment, Weights, constants_of, lent, segment_model
from qcompiler.session import Feeds, OrtRunner
from qcompiler.statistics import Hessian, LayerFacts
from qcompiler.waypoints import Waypoints

__all__ = ["Reading", "Streaming", "in_flight"]

# Output positions of a convolution that are taken of a batch; neighbouring ones tell nearly the same.
_MOST_PATCHES = 8192
# One batch of so many tells how much of a drift is to be believed.
_PARTS = 8
_In = TypeVar("_In")
_Out = TypeVar("_Out")
OnSites = Callable[[list[Site], LayerFacts], None]


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
    """

    provider: str
    threads: int
    sequential: bool
    max_memory: int | None
    tick: Callable[[int, int], None]
    drift: bool = False
    checkpoints: Checkpoints | None = None

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
            for index, segment in enumerate(segments):
                self.tick(index, len(segments))
                for sites in _readers(segment):
                    on_reading(sites, way.reading(sites[0]))
                if index + 1 < len(segments):
                    way.leave(segment)
            way.waypoints.close()
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
        self.waypoints = Waypoints(how.checkpoints, model, batches, how.provider, len(self._streams))

    def reading(self, site: Site) -> Reading:
        """What a site of the level at hand reads, measured once the data are here."""
        how = _geometry(site), _groups(site), input_feature_axis(site), site.columns
        return Reading(self.waypoints.values([site.input.name or ""], "reading", how), lambda: self._measured(site))

    def leave(self, segment: Segment) -> None:
        """Go on to the next level; the data follow when something is to be measured."""
        now = constants_of(segment.nodes)
        floats = {value: self._floats.get(value, tensor) for value, tensor in now.items()}  # nodes may be new
        weights = [now if self._how.sequential else floats, floats][: len(self._streams)]
        self._steps.append(_Step(segment, weights, self.waypoints.leave(segment, weights)))

    def _measured(self, site: Site) -> LayerFacts:
        self._arrive()
        boundary, *beside = self._streams
        return _measure(site, boundary, beside[0] if beside else [], self._masks, self._pool, self._how.threads)

    def _arrive(self) -> None:
        """Bring the data to the level at hand, from the last boundary that is stored or from where they are."""
        behind, stored = self.waypoints.resume([step.place for step in self._steps])
        if stored:
            for array in (array for stream in self._streams for feeds in stream for array in feeds.values()):
                self._scratch.drop(array)
            self._streams = stored
        for segment, weights, place in self._steps[behind:]:
            for stream, lends in zip(self._streams, weights, strict=True):
                with lent(lends):  # A session holds the weights that it was made with.
                    runner = self._runner(segment, stream[0])
                _advance(runner, segment, stream, self._scratch, self._pool, self._how.threads)
                del runner
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


def _readers(segment: Segment) -> list[list[Site]]:
    """The segment's sites grouped by the activation they read and how they read it, in order."""
    readers: dict[tuple[object, ...], list[Site]] = {}
    for site in segment.sites:
        how = (Geometry.of(site.node), site) if _groups(site) > 1 else _geometry(site) or input_feature_axis(site)
        readers.setdefault((site.input, how), []).append(site)
    return list(readers.values())


def _geometry(site: Site) -> Geometry | None:
    """How a convolution meets its input; None for a linear layer."""
    return Geometry.of(site.node) if site.not_linear else None


def _groups(site: Site) -> int:
    return site.node.attributes.get_int("group", 1) if site.not_linear else 1


def _measure(
    site: Site,
    boundary: list[Feeds],
    beside: list[Feeds],
    masks: list[np.ndarray | None],
    pool: ThreadPoolExecutor,
    threads: int,
) -> LayerFacts:
    """The facts about the activation that a site reads, summed over the batches in their order."""
    name = site.input.name or ""
    geometry, groups = _geometry(site), _groups(site)
    sums = _Sums(site, groups, drift=bool(beside) and groups == 1)
    # The shares of these batches are in `held_out` as well.
    judge = _Sums(site, groups, drift=True) if sums.drift is not None and len(boundary) >= _PARTS else None
    first_judge = len(boundary) - len(boundary) // _PARTS

    def rows(batch: int, feeds: Feeds) -> np.ndarray:
        if name not in feeds:
            raise ModelError(f"the activation '{name}' of '{site.name}' is not computed by the graph before it")
        if geometry is None:
            return feature_rows(feeds[name], input_feature_axis(site), masks[batch])
        patches = patch_rows(feeds[name], geometry, groups, _MOST_PATCHES)
        return np.asarray(patches[0]) if groups == 1 else patches

    def product(batch: int) -> tuple[np.ndarray, int, np.ndarray | None]:
        found = rows(batch, boundary[batch])
        share = None if sums.drift is None else (rows(batch, beside[batch]) - found).astype(np.float32).T @ found
        return *sums.hessian.product(found), share

    for batch, parts in enumerate(in_flight(pool, product, range(len(boundary)), threads)):
        sums.add(*parts)
        if judge is not None and batch >= first_judge:
            judge.add(*parts)
    facts = sums.hessian.facts(site.name, sums.drift)
    return facts if judge is None else replace(facts, held_out=judge.hessian.facts(site.name, judge.drift))


class _Sums:
    """Sums over batches."""

    def __init__(self, site: Site, groups: int, *, drift: bool) -> None:
        self.hessian = Hessian(site.columns, groups)
        self.drift = np.zeros((site.columns, site.columns)) if drift else None

    def add(self, part: np.ndarray, tokens: int, share: np.ndarray | None) -> None:
        self.hessian.add(part, tokens)
        if self.drift is not None and share is not None:
            self.drift += share


def in_flight(
    pool: ThreadPoolExecutor, function: Callable[[_In], _Out], items: Iterable[_In], limit: int
) -> Iterator[_Out]:
    """Map in threads, results in order, at most `limit` of them computed ahead of the reader."""
    waiting: deque[Future[_Out]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= limit:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _advance(
    runner: OrtRunner | None,
    segment: Segment,
    boundary: list[Feeds],
    scratch: Scratch,
    pool: ThreadPoolExecutor,
    threads: int,
) -> None:
    """Replace each batch's boundary by the next one, batch by batch, so that few batches are held twice."""

    def run(batch: int) -> Feeds:
        if runner is None:
            return {}
        results = runner.run({name: boundary[batch][name] for name in segment.inputs}, segment.outputs)
        # Copied, since a result keeps all memory of the session alive that made it.
        return {name: array.copy() for name, array in results.items()}

    for batch, results in enumerate(in_flight(pool, run, range(len(boundary)), threads)):
        feeds = boundary[batch]
        following = {name: feeds[name] for name in segment.carried if name in feeds}
        for name, array in feeds.items():
            if name not in following:
                scratch.drop(array)
        following.update((name, scratch.keep(array)) for name, array in results.items())
        boundary[batch] = following
