"""Guidance: how much the model's answer hangs on each site's outputs, measured once and kept for who quantizes.

What is measured is in `tuning.fisher`. Here it is laid out for the batches that stream through the model, and held
small: G as correlations in float16, in files where that is much. See `streaming` and the pass `gptq`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import onnx_ir as ir

from qcompiler.blocks import answer_block, plan_blocks, single_rows
from qcompiler.calibration import row_mask
from qcompiler.checkpoints import Arrays
from qcompiler.graph import Site
from qcompiler.scratch import Scratch
from qcompiler.segments import Segment, constants_of
from qcompiler.session import Feeds
from qcompiler.sites import find_sites
from qcompiler.streaming import Streaming
from qcompiler.waypoints import Waypoints

__all__ = ["Guidance", "guidance"]

_LABEL = "guidance"
# Bytes in memory, where no limit is given: past that, files are used.
_HELD_BYTES = 1 << 26
# Of what tokens count, the part that is the same for all: few tokens would make up the Hessian without it.
_EVEN = 0.4


class Guidance:
    """What is known of the outputs of sites.

    Attributes:
        digest: Hash of what it follows from; empty where there is no folder of checkpoints.
        problem: Why nothing is known, or nothing.
    """

    def __init__(self, digest: str, sites: Sequence[Site], arrays: Arrays, problem: str = "") -> None:
        """`arrays` are of the sites, by their place."""
        self.digest, self._arrays, self.problem = digest, arrays, problem
        self._places = {site.node: place for place, site in enumerate(sites)}

    def knows(self, site: Site) -> bool:
        """Whether something is known of a site: gradients have reached it."""
        tokens = self._arrays.get(f"{self._places.get(site.node)}.tokens")
        return tokens is not None and bool(tokens.any())

    def tokens(self, sites: Sequence[Site]) -> list[np.ndarray] | None:
        """What tokens count to sites that read the same, float32 ``[T]`` for each batch, 1 in the mean of all.

        Two fifths of it are the same for all, the rest is |g|^2.

        None if something is not known.
        """
        if not sites or not all(self.knows(site) for site in sites):
            return None
        places = [self._places[site.node] for site in sites]
        total = np.sum([self._arrays[f"{place}.tokens"] for place in places], axis=0, dtype=np.float64)
        bounds = np.cumsum(self._arrays[f"{places[0]}.counts"])[:-1]
        return np.split((_EVEN + (1 - _EVEN) * total / total.mean()).astype(np.float32), bounds)

    def prices(self, site: Site) -> np.ndarray | None:
        """What the square of an error of each output costs the answer, in nats a token: half the mean of g^2.

        Returns:
            float64 ``[N]``; None if nothing is known of the site.
        """
        if not self.knows(site):
            return None
        place, sizes = self._places[site.node], list[np.ndarray]()
        while (name := f"{place}.size.{len(sizes)}") in self._arrays:
            sizes.append(self._arrays[name])
        tokens = len(self._arrays[f"{place}.tokens"])
        return np.asarray(np.square(np.concatenate(sizes), dtype=np.float64) / (2 * tokens))

    def curvatures(self, site: Site) -> list[np.ndarray]:
        """G of the site's outputs, float32 ``[n, n]`` for each n rows that follow one another."""
        place = self._places[site.node]
        found: list[np.ndarray] = []
        while f"{place}.size.{len(found)}" in self._arrays:
            size = self._arrays[f"{place}.size.{len(found)}"]
            found.append(self._arrays[f"{place}.correlation.{len(found)}"] * size * size[:, None])
        return found


@contextmanager
def guidance(model: ir.Model, batches: Sequence[Feeds], how: Streaming, *, draws: int, seed: int) -> Iterator[Guidance]:
    """Measure all linear sites of a model as it is.

    Args:
        model: The model.
        batches: Calibration data.
        how: Where, and with how much memory.
        draws: See `tuning.fisher`.
        seed: Of the answers that are drawn.

    Yields:
        What was found; to be used before leaving.
    """
    from qcompiler.torch_graph import unsupported

    sites = [site for site in find_sites(model)[0] if not site.nested and site.role != "embedding"]
    if not sites:
        yield Guidance("", (), {})
        return
    blocks = plan_blocks(model, sites, batches[0], how.provider)
    blocks[-1] = answer_block(model, blocks)
    problems = unsupported([node for block in blocks for node in block.nodes], model.opset_imports)
    if problems:
        yield Guidance("", (), {}, f"the model cannot run in PyTorch: {problems[0].partition(' (')[0]}")
        return
    waypoints = Waypoints(how.checkpoints, model, batches, how.provider, 1)
    for block in blocks:
        key = waypoints.segment(block, [constants_of(block.nodes)], _LABEL, draws, seed)
        waypoints.leave(block, [constants_of(block.nodes)])
    with Scratch(how.max_memory if how.max_memory else _HELD_BYTES) as scratch:

        def make() -> Arrays:
            return _measured(model, blocks, sites, batches, how, scratch, draws, seed)

        store = how.checkpoints
        yield Guidance(key, sites, store.remember(key, make, _LABEL, len(sites)) if store is not None else make())


def _measured(
    model: ir.Model,
    blocks: Sequence[Segment],
    sites: Sequence[Site],
    batches: Sequence[Feeds],
    how: Streaming,
    scratch: Scratch,
    draws: int,
    seed: int,
) -> Arrays:
    """What `Guidance` reads."""
    from qcompiler.tuning import fisher_information

    parts = [single_rows([batch]) for batch in batches]
    rows = [feeds for part in parts for feeds in part]
    starts = np.cumsum([0, *(len(part) for part in parts)])[:-1]
    places = {site.node: place for place, site in enumerate(sites)}
    arrays: Arrays = {}
    for site, facts in fisher_information(
        model,
        blocks,
        rows,
        [row_mask(feeds) for feeds in rows],
        scratch,
        seed=seed,
        threads=how.threads,
        draws=draws,
        tick=how.tick,
    ):
        if not facts.finite:
            continue
        place = places[site.node]
        arrays[f"{place}.tokens"] = np.concatenate(facts.tokens)
        arrays[f"{place}.counts"] = np.add.reduceat([len(tokens) for tokens in facts.tokens], starts)
        for part, (size, correlation) in enumerate(facts.correlations()):
            arrays[f"{place}.size.{part}"] = size
            arrays[f"{place}.correlation.{part}"] = scratch.keep(correlation)
    return arrays
