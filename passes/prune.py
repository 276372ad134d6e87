"""Set values of weights to zero, for schemes like `sparse50` and `sparse2:4+w4a16`, and let the others make up for it.

``sparse50`` zeroes half of the values of a weight; ``sparse2:4`` all but two of each four neighbouring columns.
What costs least goes, and what that is depends on the method (see `numerics.pruning`):

    obs         Optimal Brain Surgeon, in sweeps: column by column, those to come make up for what is deleted
                (Hassibi and Stork 1993; Frantar and Alistarh 2023, arXiv:2301.00774)
    greedy      the same one value at a time, each row in its own order; time grows with N K^3
                (Frantar and Alistarh 2022, arXiv:2208.11580)
    obd         Optimal Brain Damage: w^2 H_jj, nothing makes up for it (LeCun et al. 1989)
    magnitude   w^2

Algorithms for weights that come behind keep zeros as they are, and `gptq` lets the others make up for its rounding.
"""

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompiler.config import CompileConfig
from qcompiler.errors import NumericsError, SchemeError
from qcompiler.graph import SPARSE_KEY, Site
from qcompiler.numerics.metrics import sqnr_db
from qcompiler.numerics.pruning import Sparsity, cheapest, prune_greedily, prune_swept
from qcompiler.numerics.second_order import damped, row_losses
from qcompiler.passes.base import QuantPass, QuantPassResult, Stage, checked_weight, streaming
from qcompiler.passes.base_segments import factor_of
from qcompiler.quantized import to_stored
from qcompiler.records import SiteRecord
from qcompiler.segments import plan_segments
from qcompiler.sites import find_sites
from qcompiler.statistics import LayerFacts

__all__ = ["Prune"]

_METHODS = ("obs", "greedy", "obd", "magnitude")


@dataclass(frozen=True)
class Options:
    """Options of `prune`."""

    method: str = field(default="obs", metadata={"help": f"what goes: {', '.join(_METHODS)}"})
    percdamp: float = field(default=0.05, metadata={"help": "damping, as a fraction of diag(H)"})
    max_columns: int = field(default=768, metadata={"help": "widest layer that the method greedy takes"})

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if self.method not in _METHODS:
            raise SchemeError(f"pass prune: method={self.method} is unknown; choose one of {', '.join(_METHODS)}")
        if not 0 <= self.percdamp <= 1:
            raise SchemeError(f"pass prune: percdamp={self.percdamp:g} is not between 0 and 1")


class Prune(QuantPass):
    """Zeroes values of the sites whose schemes say so.

    1. A site with measured activations is pruned as above, and what reads its output is measured behind it.
    2. Without data, and for lookup tables and sites inside control-flow bodies, magnitudes decide.
    3. The groups of a convolution have a Hessian each.
    4. A layer with more than `max_columns` columns is an error for the method `greedy`, before anything is measured.
    """

    name = "prune"
    stage = Stage.TRANSFORM
    scope = "segment"
    after = ("awq", "equalize", "reorder", "rotate", "smooth_conv", "smoothquant")
    paper = "Hassibi & Stork 1993; Frantar & Alistarh 2023, arXiv:2301.00774"
    Options = Options

    @classmethod
    def applies(cls, config: CompileConfig) -> bool:
        """Where a scheme asks for zeros."""
        return any(scheme.sparsity is not None for scheme in config.plan.schemes)

    def call(self, model: ir.Model) -> QuantPassResult:
        """Prune what has no activations to measure, then level by level what has."""
        sites = _sparse_sites(model)
        blind = [site for site in sites if site.nested or site.role == "embedding" or not len(self.context.batches)]
        why = {site: "a lookup table has no activations" for site in blind if site.role == "embedding"}
        why |= {site: f"inside the body of {site.nested}" for site in blind if site.nested}
        seeing = [site for site in sites if site not in blind]
        for site in seeing:
            if self.options.method == "greedy" and site.columns > self.options.max_columns:
                raise SchemeError(
                    f"prune: '{site.name}' has K = {site.columns} columns, more than {self.options.max_columns}, and "
                    f"the time grows with N K^3; allow it (prune{{method=greedy,max_columns={site.columns}}}), or use "
                    "another method"
                )
        records = [self._prune(site, None, why.get(site, "no data")) for site in blind]
        if seeing:

            def on_sites(level: list[Site], facts: LayerFacts) -> None:
                records.extend(self._prune(site, facts, "") for site in level)

            how = streaming(self.context, self.name, sequential=self.context.config.sequential)
            how.run(model, plan_segments(model, seeing), self.context.batches, on_sites)
        return QuantPassResult(model, bool(records), tuple(records))

    def _prune(self, site: Site, facts: LayerFacts | None, why: str) -> SiteRecord:
        """Write a site's pruned weight; facts are None where magnitudes have to do."""
        text, weight = site.node.metadata_props[SPARSE_KEY], checked_weight(site)
        method = self.options.method if facts is not None else "magnitude"
        metrics = {}
        try:
            if facts is None:
                pruned = self._pruned(weight, None, Sparsity.parse(text), method)
            else:
                hessians = facts.hessian if facts.hessian.ndim == 3 else facts.hessian[None]
                parts = np.split(weight, len(hessians))
                found = [
                    self._pruned(part, hessian, Sparsity.parse(text), method)
                    for part, hessian in zip(parts, hessians, strict=True)
                ]
                pruned = np.concatenate(found)
                metrics["pruning_loss"] = _relative_loss(parts, found, hessians)
        except NumericsError as error:
            raise NumericsError(f"'{site.name}': {error}") from error
        array = np.ascontiguousarray(to_stored(pruned, site.layout).astype(site.dtype.numpy()))
        site.weight.const_value = ir.Tensor(array, name=site.weight.name)
        metrics = {"zeros": float(np.mean(pruned == 0)), "sqnr_db": sqnr_db(weight, pruned), **metrics}
        reason = f"pruned by {method}" + (f": {why}" if why else "")
        return SiteRecord(site.name, "pruned", f"sparse{text}", reason, metrics)

    def _pruned(self, weight: np.ndarray, hessian: np.ndarray | None, sparsity: Sparsity, method: str) -> np.ndarray:
        """The pruned weight float32 ``[N, K]``."""
        if hessian is None or method in ("magnitude", "obd"):
            costs = np.square(weight) if method == "magnitude" or hessian is None else weight**2 * np.diagonal(hessian)
            return np.where(cheapest(costs, sparsity), np.float32(0), weight)
        percdamp = self.options.percdamp
        if method == "greedy":
            return prune_greedily(weight, damped(hessian, percdamp), sparsity, self.context.threads)[0]
        factor, _ = factor_of(hessian, np.arange(len(hessian)), percdamp, self.name)
        return prune_swept(weight, factor, sparsity)[0]


def _sparse_sites(model: ir.Model) -> list[Site]:
    """The sites that are to be pruned, the first user of each weight."""
    found: dict[ir.Value, Site] = {}
    for site in find_sites(model)[0]:
        if SPARSE_KEY in site.node.metadata_props and site.quantized is None:
            found.setdefault(site.weight, site)
    return list(found.values())


def _relative_loss(parts: list[np.ndarray], found: list[np.ndarray], hessians: np.ndarray) -> float:
    """The error of products as a share of their energy."""
    lost = energy = 0.0
    for part, pruned, hessian in zip(parts, found, hessians, strict=True):
        small = hessian.astype(np.float32)
        lost += float(row_losses(part - pruned, small).sum())
        energy += float(row_losses(part, small).sum())
    return lost / energy if energy else 0.0
