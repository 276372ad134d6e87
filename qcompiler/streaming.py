"""Streaming calibration data through the levels of a model: measure, let the caller quantize, advance.

Batches are the unit of work: each is run and multiplied by one thread, single-threaded inside, and sums are taken in
batch order, so the result does not depend on the number of threads.
"""

import gc
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from qcompiler.calibration import row_mask
from qcompiler.convolution import Geometry, patch_rows
from qcompiler.errors import ModelError
from qcompiler.graph import Site, input_feature_axis
from qcompiler.numerics.rows import feature_rows
from qcompiler.scratch import Scratch
from qcompiler.segments import Segment, segment_model
from qcompiler.session import Feeds, OrtRunner
from qcompiler.statistics import Hessian, LayerFacts

__all__ = ["Streaming", "in_flight"]

# Output positions of a convolution that are taken of a batch; neighbouring ones tell nearly the same.
_MOST_PATCHES = 8192
# One batch of so many tells how much of a drift is to be believed.
_PARTS = 8
_In = TypeVar("_In")
_Out = TypeVar("_Out")
OnSites = Callable[[list[Site], LayerFacts], None]


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
    """

    provider: str
    threads: int
    sequential: bool
    max_memory: int | None
    tick: Callable[[int, int], None]
    drift: bool = False

    def run(self, model: ir.Model, segments: Sequence[Segment], batches: Sequence[Feeds], on_sites: OnSites) -> None:
        """Go through the levels.

        Args:
            model: The model that was cut; `on_sites` may change its weights.
            segments: From `plan_segments`.
            batches: Feeds of the whole model.
            on_sites: Called with the sites of a level that read the same activation, and the facts about it.
        """
        masks = [row_mask(feeds) for feeds in batches]
        with ThreadPoolExecutor(self.threads) as pool, Scratch(self.max_memory) as scratch:
            boundary = [{name: _kept(array, scratch) for name, array in feeds.items()} for feeds in batches]
            # The same in the float model, which differs where weights were quantized before.
            beside = [{name: _kept(array, scratch) for name, array in feeds.items()} for feeds in batches if self.drift]
            for index, segment in enumerate(segments):
                self.tick(index, len(segments))
                # A session holds the weights that it was made with.
                float_runner = self._runner(model, segment, boundary[0]) if beside or not self.sequential else None
                for reading in _readers(segment):
                    on_sites(reading, _measure(reading[0], boundary, beside, masks, pool, self.threads))
                if index + 1 < len(segments):
                    runner = self._runner(model, segment, boundary[0]) if self.sequential else float_runner
                    _advance(runner, segment, boundary, scratch, pool, self.threads)
                    del runner
                    _advance(float_runner, segment, beside, scratch, pool, self.threads)
                del float_runner
                gc.collect(0)
        self.tick(len(segments), len(segments))

    def _runner(self, model: ir.Model, segment: Segment, feeds: Feeds) -> OrtRunner | None:
        """A session that computes what later levels read, or None if that is nothing."""
        if not segment.outputs:
            return None
        dtypes = {name: feeds[name].dtype for name in segment.inputs}
        proto, constants = segment_model(model, segment, dtypes)
        return OrtRunner(proto, provider=self.provider, threads=1, prepack=False, constants=constants)


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
