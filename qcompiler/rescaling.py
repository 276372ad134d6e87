"""What the passes have in common that scale the channels of activations, and the columns of weights against them."""

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import onnx_ir as ir

from qcompiler.errors import CalibrationError
from qcompiler.foldings import Folding, find_foldings
from qcompiler.graph import Site
from qcompiler.passes.base import QuantPass, QuantPassResult, Stage, site_scheme
from qcompiler.records import SiteRecord
from qcompiler.sites import find_sites

__all__ = ["RescalingPass", "open_sites"]

logger = logging.getLogger(__name__)


class RescalingPass(QuantPass):
    """Finds foldings (see `foldings`) and says what became of each: a pass chooses the factors.

    Its options have `caches`: whether values that a model caches between runs may be scaled.

    Class attributes:
        done: What records call a folding that is rescaled.
    """

    stage = Stage.TRANSFORM
    needs_calibration = True
    done: ClassVar[str] = "scaled"

    def choose(self, sites: list[Site]) -> list[Site]:
        """Which of the linear sites that have a scheme and are not quantized yet are rescaled."""
        return sites

    @property
    def inserts(self) -> bool:
        """Whether a node may be inserted where nothing absorbs the factors."""
        return False

    @abstractmethod
    def rescale(self, model: ir.Model, foldings: Sequence[Folding]) -> Mapping[Folding, SiteRecord]:
        """Measure what the foldings' sites read in the float model, then rescale those that are the better for it."""

    def call(self, model: ir.Model) -> QuantPassResult:
        """Measure the float model, then rescale it."""
        sites = [site for site in open_sites(find_sites(model)[0]) if site.node.op_type != "Conv"]
        foldings = find_foldings(model, self.choose(sites), caches=self.options.caches)
        chosen = [folding for folding in foldings if not self._problem(folding)]
        if chosen and not len(self.context.batches):
            raise CalibrationError(f"{self.name} needs calibration data; give --calibration PATH, or leave it out")
        records = self.rescale(model, chosen)
        scaled = sum(record.action == "scaled" for record in records.values())
        logger.info("%s: %d of %d activations rescaled", self.name, scaled, len(foldings))
        return QuantPassResult(model, scaled > 0, tuple(records.get(each) or self._skipped(each) for each in foldings))

    def _problem(self, folding: Folding) -> str:
        """Why the folding is left alone; empty if it is not."""
        nested = next((site.nested for site in folding.sites if site.nested), "")
        if nested:
            return f"inside the body of {nested}, whose activations are not measured"
        return folding.stuck or ("" if folding.legal or self.inserts else folding.reason)

    def _skipped(self, folding: Folding) -> SiteRecord:
        return SiteRecord(folding.sites[0].name, "skipped", reason=f"not {self.done}: {self._problem(folding)}")


def open_sites(sites: Sequence[Site]) -> list[Site]:
    """The sites that have a scheme and are not quantized yet."""
    return [site for site in sites if site_scheme(site) is not None and site.quantized is None]
