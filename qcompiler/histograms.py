"""Distributions of the worst sites for the report: their weights before and after, and what they read."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from qcompiler.collectors import RowSample
from qcompiler.graph import original_weight
from qcompiler.observing import observe
from qcompiler.passes.base import Stage, planned_sites
from qcompiler.records import Histogram
from qcompiler.session import Feeds
from qcompiler.sites import find_sites

if TYPE_CHECKING:
    from qcompiler.passes.base import QuantPass, QuantPassResult

__all__ = ["WorstWeights", "activation_histograms"]

_BINS = 60
# Batches and rows that tell how activations are distributed.
_BATCHES, _ROWS = 2, 256


class WorstWeights:
    """An instrument that counts the weights of the worst sites, just before codes are spelled out as operators.

    Attributes:
        histograms: Of the sites with the largest relative loss, or where none was measured the least SQNR.
    """

    def __init__(self, count: int) -> None:
        """Keep `count` sites."""
        self._count = count
        self._figures: dict[str, float] = {}
        self.histograms: list[Histogram] = []
        self._done = False

    def before_pass(self, step: "QuantPass", model: ir.Model) -> None:
        """Count, when the first pass of a later stage is about to run."""
        if step.stage >= Stage.LOWER and not self._done:
            self._done = True
            known = [
                (site, tensor)
                for site in planned_sites(model)
                if (tensor := site.quantized) is not None and "original" in tensor.meta and site.name in self._figures
            ]
            known.sort(key=lambda pair: -self._figures[pair[0].name])
            for site, tensor in known[: self._count]:
                self.histograms.append(_histogram(site.name, "weights", original_weight(site), tensor.dequantized()))

    def after_pass(self, step: "QuantPass", model: ir.Model, result: "QuantPassResult") -> None:
        """Note how bad sites are: every relative loss is worse than no loss, which an SQNR is turned into."""
        del step, model
        for record in result.records:
            if record.action == "quantized" and (found := record.metrics.get("relative_loss")) is not None:
                self._figures[record.site] = found
            elif record.action == "quantized" and (found := record.metrics.get("sqnr_db")) is not None:
                self._figures.setdefault(record.site, -1000.0 - found)

    def pass_failed(self, step: "QuantPass", model: ir.Model, error: Exception) -> None:
        """Nothing."""


def activation_histograms(model: ir.Model, names: Sequence[str], batches: Sequence[Feeds]) -> list[Histogram]:
    """What sites of a float model read, on the first batches.

    Args:
        model: In topological order; it is not changed.
        names: Of the sites; those that read no floats, or lie in bodies, are left out.
        batches: Feeds of the model.
    """
    wanted = {
        site.name: site
        for site in find_sites(model)[0]
        if site.name in names and not site.nested and site.role != "embedding"
    }
    samples = {site.input: RowSample(_ROWS) for site in wanted.values()}
    observe(model, {value: [sample] for value, sample in samples.items()}, batches[:_BATCHES])
    return [
        _histogram(name, "what it reads", samples[wanted[name].input].values)
        for name in names
        if name in wanted and len(batches)
    ]


def _histogram(site: str, kind: str, values: np.ndarray, quantized: np.ndarray | None = None) -> Histogram:
    """Counts over the whole range of the values."""
    shown = [each for each in (values, quantized) if each is not None]
    low, high = min(float(each.min()) for each in shown), max(float(each.max()) for each in shown)
    low, high = (low, high) if low < high else (low - 0.5, low + 0.5)
    counts = [np.histogram(each, _BINS, (low, high))[0].tolist() for each in shown]
    return Histogram(site, kind, low, high, tuple(counts[0]), tuple(counts[1]) if len(counts) > 1 else ())
