"""What sites read: facts about an activation, summed over batches in their order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from qcompiler.convolution import Geometry, patch_rows
from qcompiler.errors import ModelError
from qcompiler.graph import Site, input_feature_axis
from qcompiler.numerics.rows import feature_rows
from qcompiler.segments import Segment
from qcompiler.session import Feeds
from qcompiler.statistics import Hessian, LayerFacts

__all__ = ["Batches", "in_flight", "manner", "measure", "readers", "residual_of"]

# Output positions of a convolution that are taken of a batch; neighbouring ones tell nearly the same.
_MOST_PATCHES = 8192
# One batch of so many tells how much of a drift is to be believed.
_PARTS = 8
_SUMS = {"SkipLayerNormalization", "SkipSimplifiedLayerNormalization"}
_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True)
class Batches:
    """All batches at a level.

    Attributes:
        boundary: What each has there.
        beside: What each has in the float model; empty where that does not run beside.
        masks: Which tokens of each are no padding; None: all.
        counts: What each token counts, ``[T]`` for each batch; None if all count the same.
    """

    boundary: list[Feeds]
    beside: list[Feeds]
    masks: list[np.ndarray | None]
    counts: list[np.ndarray] | None = None


def readers(segment: Segment) -> list[list[Site]]:
    """The segment's sites grouped by the activation they read and how they read it, in order."""
    found: dict[tuple[object, ...], list[Site]] = {}
    for site in segment.sites:
        how = (Geometry.of(site.node), site) if _groups(site) > 1 else _geometry(site) or input_feature_axis(site)
        found.setdefault((site.input, how), []).append(site)
    return list(found.values())


def manner(site: Site) -> tuple[object, ...]:
    """All that it depends on how a site reads its activation."""
    return _geometry(site), _groups(site), input_feature_axis(site), site.columns


def residual_of(site: Site) -> ir.Value | None:
    """What the output of a site is added to, by an addition that reads nothing else, but for a bias before."""
    value = site.node.outputs[0]
    while len(users := value.consumers()) == 1 and not value.is_graph_output():
        (node,) = users
        if node.op_type == "Add":
            (other,) = [each for each in node.inputs if each is not value] or [None]
        elif node.op_type in _SUMS:
            other = node.inputs[1 - node.inputs.index(value)] if value in node.inputs[:2] else None
        else:
            return None
        if other is None or other.const_value is None or node.op_type != "Add":
            return other
        value = node.outputs[0]
    return None


def _geometry(site: Site) -> Geometry | None:
    """How a convolution meets its input; None for a linear layer."""
    return Geometry.of(site.node) if site.not_linear else None


def _groups(site: Site) -> int:
    return site.node.attributes.get_int("group", 1) if site.not_linear else 1


def measure(site: Site, at: Batches, residual: str | None, pool: ThreadPoolExecutor, threads: int) -> LayerFacts:
    """The facts about the activation that a site reads.

    Args:
        site: The site, or one of several that read it in the same manner.
        at: The batches.
        residual: Name of what the site's output is added to, if that is to be looked at.
        pool: Where batches are reduced.
        threads: How many at a time.
    """
    name = site.input.name or ""
    geometry, groups = _geometry(site), _groups(site)
    sums = _Sums(site, groups, drift=bool(at.beside) and groups == 1)
    # The shares of these batches are in `held_out` as well.
    judge = _Sums(site, groups, drift=True) if sums.drift is not None and len(at.boundary) >= _PARTS else None
    first_judge = len(at.boundary) - len(at.boundary) // _PARTS

    def weighed(batch: int, values: np.ndarray, axis: int) -> np.ndarray:
        found = feature_rows(values, axis, at.masks[batch])
        return found if at.counts is None else found * np.sqrt(at.counts[batch])[:, None]

    def rows(batch: int, feeds: Feeds) -> np.ndarray:
        if name not in feeds:
            raise ModelError(f"the activation '{name}' of '{site.name}' is not computed by the graph before it")
        if geometry is None:
            return weighed(batch, feeds[name], input_feature_axis(site))
        patches = patch_rows(feeds[name], geometry, groups, _MOST_PATCHES)
        return np.asarray(patches[0]) if groups == 1 else patches

    def product(batch: int) -> _Share:
        found = rows(batch, at.boundary[batch])
        square, tokens = sums.hessian.product(found)
        sizes = np.abs(found).sum(0, dtype=np.float64) if found.ndim == 2 else None
        if sums.drift is None:
            return _Share(square, tokens, sizes)
        drift = (rows(batch, at.beside[batch]) - found).astype(np.float32).T @ found
        if residual is None:
            return _Share(square, tokens, sizes, drift)
        exact, actual = (weighed(batch, feeds[batch][residual], -1) for feeds in (at.beside, at.boundary))
        return _Share(square, tokens, sizes, drift, (exact - actual).astype(np.float32).T @ found)

    for batch, part in enumerate(in_flight(pool, product, range(len(at.boundary)), threads)):
        sums.add(part)
        if judge is not None and batch >= first_judge:
            judge.add(part)
    facts = sums.facts(site.name)
    return facts if judge is None else replace(facts, held_out=judge.facts(site.name))


@dataclass(frozen=True)
class _Share:
    """One batch's share in `_Sums`."""

    square: np.ndarray
    tokens: int
    sizes: np.ndarray | None
    drift: np.ndarray | None = None
    residual: np.ndarray | None = None


class _Sums:
    """Sums over batches."""

    def __init__(self, site: Site, groups: int, *, drift: bool) -> None:
        self.hessian = Hessian(site.columns, groups)
        self.drift = np.zeros((site.columns, site.columns)) if drift else None
        self._residual: np.ndarray | None = None
        self._sizes = np.zeros(site.columns) if groups == 1 else None

    def add(self, share: _Share) -> None:
        self.hessian.add(share.square, share.tokens)
        if self.drift is not None and share.drift is not None:
            self.drift += share.drift
        if share.residual is not None:
            self._residual = share.residual + (0.0 if self._residual is None else self._residual)
        if self._sizes is not None and share.sizes is not None:
            self._sizes += share.sizes

    def facts(self, site: str) -> LayerFacts:
        facts = self.hessian.facts(site, self.drift)
        means = None if self._sizes is None else self._sizes / max(1, facts.tokens)
        return replace(facts, means=means, residual=self._residual)


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
