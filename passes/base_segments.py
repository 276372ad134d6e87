"""Weight algorithms that measure activations, segment by segment."""

from collections.abc import Iterable
from dataclasses import replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompiler.checkpoints import Arrays, code_version, digest_of
from qcompiler.errors import CalibrationError, NumericsError
from qcompiler.graph import Site
from qcompiler.norm_prior import norm_priors
from qcompiler.numerics.affine import Grid, WeightSpec
from qcompiler.numerics.codebooks import decode, fit_tables, refit_sign_scales, refit_tables, sweep_codebooks
from qcompiler.numerics.second_order import damped, row_losses, shift, supported_share, upper_factor
from qcompiler.passes.base import (
    QuantPassResult,
    WeightQuantizer,
    assigned_sites,
    checked_weight,
    site_spec,
    streaming,
)
from qcompiler.quantized import Quantized
from qcompiler.records import SiteRecord
from qcompiler.segments import plan_segments
from qcompiler.shared_tables import read_products
from qcompiler.statistics import LayerFacts
from qcompiler.streaming import Reading, TokenCounts

__all__ = ["MAX_DAMPING", "SegmentPass", "factor_of", "made_up", "unfactored"]

# As a fraction of diag(H).
MAX_DAMPING = 1.0


class SegmentPass(WeightQuantizer):
    """A weight algorithm that measures activations; runs segment by segment (see `segments`)."""

    scope = "segment"
    needs_calibration = True
    # Whether it is fast enough for lookup tables, which have many rows.
    takes_tables: ClassVar[bool] = True

    def sites(self, model: ir.Model) -> list[Site]:
        """What it quantizes."""
        return assigned_sites(model)

    @property
    def wants_drift(self) -> bool:
        """Whether `LayerFacts.drift` is to be measured, which takes another run of the float model beside."""
        return False

    @property
    def guidance(self) -> TokenCounts | None:
        """What tells how much tokens count, while the pass runs; None counts all the same."""
        return None

    def call(self, model: ir.Model) -> QuantPassResult:
        """Quantize what has no activations to measure, then level by level what has.

        The former comes first, so that the measured sites see its error.
        """
        records: list[SiteRecord] = []
        context = self.context
        records += self._shared_tables(model)
        for site in self.sites(model):
            where = f"inside the body of {site.nested}" if site.nested else "a lookup table has no activations"
            if site.nested or site.role == "embedding":
                records += self._remembered([site], None, f"{where}, rounded to nearest")
        measured = self.sites(model)
        if measured and context.config.from_norms:
            records += self._from_norms(model, measured)
        elif measured:
            if context.calibration is None or not len(context.calibration.batches):
                raise CalibrationError(f"{self.name} needs calibration data; give --calibration PATH, or use rtn")

            def on_reading(sites: list[Site], reading: Reading) -> None:
                for group in self.by_spec(sites):
                    records.extend(self._remembered(group, reading))

            how = streaming(context, self.name, sequential=context.config.sequential, drift=self.wants_drift)
            run = replace(how, guidance=self.guidance)
            run.visit(model, plan_segments(model, measured), context.calibration.batches, on_reading)
        return QuantPassResult(model, bool(records), tuple(records))

    def _from_norms(self, model: ir.Model, sites: list[Site]) -> list[SiteRecord]:
        """Quantize without data, see `norm_prior`."""
        known, records = norm_priors(model, sites), list[SiteRecord]()
        for done, site in enumerate(sites):
            self.context.tick(self.name, done, len(sites))
            remark = (
                "by the gain of the normalization before it" if site in known else "nothing known of its activation"
            )
            records += self.quantize_sites([site], known.get(site), remark)
        return records

    def _shared_tables(self, model: ir.Model) -> list[SiteRecord]:
        """Quantize tables that are also the weights of products, for both; at 8 bits nothing is to be gained."""
        context, records = self.context, list[SiteRecord]()
        tables = [site for site in self.sites(model) if site.role == "embedding" and not site.nested]
        tables = [site for site in tables if site_spec(site, context.config).bits < 8]
        remark = "for lookups and for the product that shares its weight"

        def on_table(table: Site, reading: Reading) -> None:
            records.extend(self._remembered([table], reading, remark))

        if self.takes_tables and not context.config.from_norms:
            how = streaming(context, self.name, sequential=False)
            read_products(model, tables, context.batches, how, on_table)
        return records

    def _remembered(self, sites: list[Site], reading: Reading | None, remark: str = "") -> list[SiteRecord]:
        """The same as `quantize_sites`, with the codes of an interrupted run where it got as far."""
        if self.context.checkpoints is None:
            return self.quantize_sites(sites, reading.facts if reading is not None else None, remark)
        spec, weights = site_spec(sites[0], self.context.config), [checked_weight(site) for site in sites]

        def key() -> str:
            read = reading.digest if reading is not None else code_version()
            return digest_of("codes", read, str(self), self.context.config.seed, spec, weights)

        def make() -> Arrays:
            return self._stacked(sites, weights, reading.facts if reading is not None else None).arrays(spec)

        arrays = self.context.remember(self.name, len(sites), key, make)
        return self._written(sites, weights, Quantized.of(arrays, spec, sites[0].columns), remark)

    def by_spec(self, sites: Iterable[Site]) -> list[list[Site]]:
        """Group sites by their spec, in order; one that has tables has them for itself."""
        groups: dict[object, list[Site]] = {}
        for site in sites:
            spec = site_spec(site, self.context.config)
            groups.setdefault((spec, site if spec.vector else None), []).append(site)
        return list(groups.values())

    def with_tables(self, weight: np.ndarray, spec: WeightSpec, facts: LayerFacts | None, rounds: int) -> Quantized:
        """Quantize a weight to entries of learned tables, see the pass `codebook`; for options `drift` and `percdamp`.

        Args:
            weight: float32 ``[N, K]`` of one site, which tables belong to.
            spec: A format with tables.
            facts: Of its activation; without, or for a convolution of groups, all columns count the same.
            rounds: Times that tables are solved for and codes found anew.
        """
        percdamp, context = self.options.percdamp, self.context
        if facts is None or facts.hessian.ndim == 3:
            hessian, importance, damping = np.eye(weight.shape[1]), None, percdamp
            factor, order = hessian, np.arange(weight.shape[1])
        else:
            weight = made_up(weight, facts, self.options.drift, percdamp)
            importance = np.diagonal(facts.hessian).astype(np.float32)
            loudness = importance.reshape(-1, spec.vector).sum(-1)
            order = (np.argsort(-loudness, kind="stable")[:, None] * spec.vector + np.arange(spec.vector)).reshape(-1)
            factor, damping = factor_of(facts.hessian, order, percdamp, self.name)
            hessian = damped(facts.hessian, damping)
        tables, scale = fit_tables(weight, importance, spec, context.config.seed, context.threads)
        codes, loss = sweep_codebooks(weight, factor, tables, scale, spec, order)
        small = hessian.astype(np.float32)
        for _ in range(rounds):
            solved = refit_tables(weight, codes, tables, scale, small, spec)
            if solved is tables:
                break
            found, left = sweep_codebooks(weight, factor, solved, scale, spec, order)
            if left.sum() >= loss.sum():
                break
            tables, codes, loss = solved, found, left
        if spec.signs and facts is not None:
            scale = refit_sign_scales(weight, codes, scale, small, spec)
            loss = row_losses(weight - decode(codes, tables, scale, spec), small)
        grown = "" if damping == percdamp else f"damping grew to {damping:g}"
        return Quantized(codes, Grid(scale, np.zeros_like(scale)), grown, loss, row_losses(weight, small), tables)


def made_up(weight: np.ndarray, facts: LayerFacts, share: float, percdamp: float) -> np.ndarray:
    """The weight that makes up for what the layers before did, as far as that holds on held-out data.

    Args:
        weight: float32 ``[N, K]``.
        facts: Of its activation.
        share: The most that is made up for, 0 to 1.
        percdamp: Damping of the Hessian.

    Returns:
        float32 ``[N, K]``; the weight itself where nothing is known, or nothing holds.
    """
    part, residual = facts.held_out, facts.residual
    if facts.drift is None:
        return weight
    if part is not None and part.drift is not None:
        rest = damped(facts.hessian - part.hessian, percdamp)
        apart = None if residual is None or part.residual is None else residual - part.residual
        found = shift(weight, facts.drift - part.drift, rest, apart)
        share *= supported_share(weight, found, part.drift, part.hessian, part.residual)
    if not share:
        return weight
    change = shift(weight, facts.drift, damped(facts.hessian, percdamp), residual)
    return np.asarray(weight + np.float32(share) * change)


def factor_of(hessian: np.ndarray, order: np.ndarray, percdamp: float, name: str) -> tuple[np.ndarray, float]:
    """Factor a damped Hessian in visiting order for the pass called `name`; damping grows until that is possible.

    Returns:
        `upper_factor`, and the damping that it took.

    Raises:
        NumericsError: No damping is enough.
    """
    damping = tried = percdamp
    while damping <= MAX_DAMPING:
        try:
            return upper_factor(damped(hessian, damping)[np.ix_(order, order)]), damping
        except np.linalg.LinAlgError:
            tried, damping = damping, max(10 * damping, 1e-4)
    raise unfactored(name, tried)


def unfactored(name: str, damping: float) -> NumericsError:
    """The error of a pass that cannot factor a Hessian."""
    return NumericsError(
        f"{name}: the Hessian cannot be factored even with damping {damping:g}; give more calibration samples, or "
        "leave the site float with --ignore"
    )
