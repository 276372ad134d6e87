"""What formats cost, measured: each weight by itself, and all of them together.

Weights are rounded by trial (`trials`) and put into the float model (`sensitivity`), which is otherwise left alone.
What errors of outputs cost is known from gradients too, where these are wanted (`guidance`).
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import onnx_ir as ir

from qcompiler.graph import Site
from qcompiler.guidance import guidance
from qcompiler.mixing import MixedSite, Unit
from qcompiler.numerics.affine import WeightSpec
from qcompiler.passes.base import PassContext, checked_weight, streaming
from qcompiler.quantized import to_stored
from qcompiler.scratch import Scratch
from qcompiler.segments import plan_segments
from qcompiler.sensitivity import Sensitivity, first_tokens
from qcompiler.session import Feeds
from qcompiler.shared_tables import products_of, with_lookups
from qcompiler.statistics import LayerFacts
from qcompiler.trials import Curvature, TrialRounding, curvature_of, row_losses

__all__ = ["Trials"]

_LABEL = "mixed_precision"
# Rows of a table differ more than those of a product, and are cheaper to try.
_TABLE_ROWS = 8
# Sites whose cost is found by trial and from gradients, where others have one of these only.
_BOTH = 12
# How far what weights cost by gradients is taken for the same, as a power: layers that make up for the errors of others
# even out what these cost, and plans that trust every difference are worse than one format for all.
_EVEN = 0.5


class Trials:
    """Trials of the formats of some sites."""

    def __init__(self, context: PassContext, model: ir.Model, sites: Sequence[MixedSite], scratch: Scratch) -> None:
        """Measure nothing yet.

        Args:
            context: Of the pass.
            model: The float model; it is not changed.
            sites: The weights; what is measured is written into them.
            scratch: Keeps what is needed to round a weight again.
        """
        self._context, self._model, self._sites, self._scratch = context, model, sites, scratch
        algorithms = ",".join(context.config.algorithms)
        self._rounding = TrialRounding(sweeps=any(name in algorithms for name in ("gptq", "obq")))
        self._known: dict[ir.Node, Curvature] = {}
        self._prices: dict[ir.Node, np.ndarray] = {}
        self._ratios: list[float] = []
        self._both: set[MixedSite] = set()
        self._held_out: Sensitivity | None = None
        self._rounded: dict[MixedSite, tuple[int, np.ndarray | None]] = {}

    def measure(self, rows: int, batches: int, probes: int, tokens: int, *, gradients: bool) -> str:
        """Find the loss of each format of each site, and what a loss costs at the outputs.

        Args:
            rows: Rows of each weight that formats are tried on.
            batches: Calibration batches that losses are measured on.
            probes: Calibration rows that costs are measured on.
            tokens: Tokens of these rows.
            gradients: What a loss costs follows from the gradients of the answer, where they reach a site. What is
                known of the rest by trial is brought to their scale by trials of some that are known both ways.

        Returns:
            Why there are no gradients, if they were wanted; or nothing.
        """
        data, threads = self._context.calibration.batches, self._context.threads
        self._prices, self._ratios = {}, []
        chosen = [data[at] for at in _spread(batches, len(data))]
        problem = self._find_prices(chosen) if gradients else ""
        priced = [one for one in self._sites if one.site.node in self._prices]
        mixed = len(priced) < len(self._sites)
        self._both = {priced[at] for at in _spread(_BOTH, len(priced))} if priced and mixed else set()
        feeds = [first_tokens(data[at], 1, tokens) for at in _spread(probes, len(data))]
        probe = Sensitivity(self._model, feeds, provider=self._context.config.provider)
        by_node = {one.site.node: one for one in self._sites}
        tables = {one.site.weight: one for one in self._sites if one.site.role == "embedding"}
        products = products_of(self._model, [one.site for one in tables.values()])
        shared = {site.node: tables[weight] for weight, site in products.items()}
        linear = [one.site for one in self._sites if one.site.role != "embedding"] + list(products.values())
        with ThreadPoolExecutor(threads) as pool:
            waiting: deque[Future[None]] = deque()

            def weigh(sites: list[MixedSite], facts: LayerFacts | None) -> None:
                waiting.append(pool.submit(self._weigh, sites, facts, probe, rows))
                while len(waiting) > threads:
                    waiting.popleft().result()

            def on_sites(sites: list[Site], facts: LayerFacts) -> None:
                alone = [by_node[site.node] for site in sites if site.node not in shared]
                if alone:
                    weigh(alone, facts)
                for site in sites:
                    if site.node in shared:
                        weigh([shared[site.node]], with_lookups(facts))

            if linear:
                run = streaming(self._context, _LABEL, sequential=False)
                run.run(self._model, plan_segments(self._model, linear), chosen, on_sites)
            for one in self._sites:
                if one.site.role == "embedding" and one.site.weight not in products:
                    weigh([one], None)
            for job in waiting:
                job.result()
        self._to_one_scale()
        return problem

    def _find_prices(self, batches: Sequence[Feeds]) -> str:
        """Take gradients; why there are none, or nothing."""
        if find_spec("torch") is None:
            return "PyTorch, which gradients need, is not installed"
        how = streaming(self._context, _LABEL, sequential=False)
        with guidance(self._model, batches, how, draws=1, seed=self._context.config.seed) as guide:
            for one in self._sites:
                prices = guide.prices(one.site)
                if prices is not None:
                    self._prices[one.site.node] = prices
            return guide.problem

    def _to_one_scale(self) -> None:
        """Make costs comparable: those known by trial, those known from gradients, and those that are not known."""
        scale = float(np.median(self._ratios)) if self._ratios else 1.0
        priced = {one: one.asked_loss / one.weights for one in self._sites if one.site.node in self._prices}
        usual = float(np.median([each for each in priced.values() if each] or [1.0]))
        for one, each in priced.items():
            one.trial_loss, one.trial_cost = 1.0, scale * ((usual / each) ** _EVEN if each else 1.0)
        known = [one.trial_cost / one.trial_loss for one in self._sites if one.trial_cost and one.trial_loss]
        typical = float(np.median(known)) if known else 1.0
        for one in self._sites:  # small constants are part of a session: they count like the typical weight
            one.trial_cost = one.trial_cost or typical * one.trial_loss

    def cost(self, units: Sequence[Unit], plan: Sequence[int], rows: int, tokens: int) -> float:
        """What a plan costs at the outputs, on held-out rows.

        Args:
            units: All sites in groups.
            plan: For each unit the index of its format.
            rows: Held-out rows to run, the same in each call.
            tokens: Tokens of these rows.

        Returns:
            As `Sensitivity.change`.
        """
        context = self._context
        if self._held_out is None:
            data = context.calibration.held_out
            feeds = [first_tokens(data[at], 1, tokens) for at in _spread(rows, len(data))]
            self._held_out = Sensitivity(self._model, feeds, provider=context.config.provider)
        wanted = {
            one: one.schemes.index(unit.schemes[at])
            for unit, at in zip(units, plan, strict=True)
            for one in unit.members
        }
        new = [(one, at) for one, at in wanted.items() if one not in self._rounded or self._rounded[one][0] != at]
        for one, _ in new:
            old = self._rounded.pop(one, (0, None))[1]
            if old is not None:
                self._scratch.drop(old)
        with ThreadPoolExecutor(context.threads) as pool:
            made = pool.map(lambda pair: self._decoded(*pair), new)
            self._rounded.update((one, (at, array)) for (one, at), array in zip(new, made, strict=True))
        found = {one.site.weight.name or "": array for one, (_, array) in self._rounded.items() if array is not None}
        return self._held_out.change(found, context.threads)

    def _weigh(self, sites: Sequence[MixedSite], facts: LayerFacts | None, probe: Sensitivity, count: int) -> None:
        """The losses of the sites that read the same activation, and the cost of a trial of each."""
        known = curvature_of(facts) if facts is not None else None
        if known is not None:
            known = replace(known, factor=self._scratch.keep(known.factor))
        for one in sites:
            if known is not None:
                self._known[one.site.node] = known
            weight, prices = checked_weight(one.site), self._prices.get(one.site.node)
            wanted = min(count * (_TABLE_ROWS if one.site.role == "embedding" else 1), len(weight))
            chosen, counts = _sample(weight, prices, wanted)
            losses = self._rounding.losses(weight[chosen], one.specs, known) @ counts
            one.losses = [float(loss) for loss in losses] + [0.0] * (len(one.schemes) - len(losses))
            if prices is not None and one not in self._both:
                continue
            # Loud enough to be seen, quiet enough for the outputs to follow in proportion.
            spec = WeightSpec(4, 64, one.specs[0].symmetric, one.specs[0].signed_scale, one.specs[0].scale_dtype)
            decoded, one.trial_loss = self._rounding.rounded(weight, spec, known, clip=False)
            one.trial_cost = probe.change({one.site.weight.name or "": _stored(one.site, decoded)})
            if prices is not None:
                expected = float(row_losses(weight - decoded, known) @ prices)
                self._ratios += [one.trial_cost / expected] if expected and one.trial_cost else []

    def _decoded(self, one: MixedSite, index: int) -> np.ndarray | None:
        """The weight as it is stored, rounded to one of its formats; None for float."""
        if one.schemes[index] is None:
            return None
        known = self._known.get(one.site.node)
        decoded, _ = self._rounding.rounded(checked_weight(one.site), one.specs[index], known)
        return self._scratch.keep(_stored(one.site, decoded))


def _sample(weight: np.ndarray, prices: np.ndarray | None, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows ``[R]`` of a weight ``[N, K]`` to try formats on, and what their losses count, so that all rows do.

    Where prices ``[N]`` of outputs are known, few rows make up most of what an error costs: rows are drawn as often as
    their size and price make likely, at even steps.
    """
    if prices is None:
        rows = np.linspace(0, len(weight) - 1, wanted).astype(int)
        return rows, np.full(len(rows), len(weight) / len(rows))
    sizes = prices * np.square(weight, dtype=np.float64).sum(-1)
    if not sizes.any():
        sizes = np.ones(len(weight))
    upto = np.cumsum(sizes)
    rows, times = np.unique(np.searchsorted(upto, (np.arange(wanted) + 0.5) / wanted * upto[-1]), return_counts=True)
    return rows, prices[rows] * times * upto[-1] / (wanted * sizes[rows])


def _stored(site: Site, weight: np.ndarray) -> np.ndarray:
    """A weight ``[N, K]`` as the model stores it."""
    return np.ascontiguousarray(to_stored(weight, site.layout).astype(site.dtype.numpy()))


def _spread(count: int, items: int) -> list[int]:
    """Up to `count` numbers below `items`, evenly spaced."""
    return [int(at) for at in np.linspace(0, items - 1, min(count, items)).astype(int)]
