"""Mixed precision: give each weight the format in which it costs least, so that all of them fit a budget.

1. Loss. Every weight is quantized by trial in each format of a ladder (2, 4 and 8 bits, several group sizes), with the
   Hessians of the float model, on a sample of its rows: tr((W - Q) H (W - Q)^T), as GPTQ would leave it.
2. Sensitivity. What a loss costs at the outputs is measured, not guessed: the weights that read the same activation are
   rounded together to 4 bits, the rest stays float, and the model is run. The KL divergence of its logits (the noise of
   its outputs, where there are none) over the loss of that rounding is what each format's loss is multiplied with.
3. Choice. Costs are taken to add up, and the formats are chosen by a knapsack over stored bits (`numerics.allocation`).

The budget is `bits_per_weight`, over the linear layers, or `max_size`, of all constants. The scheme given is the one
whose symmetry all formats have. Weights of sites whose activations are quantized, lookup tables and weights inside
bodies have no Hessian: with a budget for everything, tables are weighed by ||W - Q||^2 instead; the others keep theirs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from qcompiler.config import CompileConfig
from qcompiler.errors import CalibrationError, ModelError, SchemeError
from qcompiler.graph import SCHEME_KEY, Site, read_weight
from qcompiler.numerics.affine import WeightSpec, clip_grid, dequantize, min_max_grid, quantize
from qcompiler.numerics.allocation import Choice, allocate
from qcompiler.numerics.second_order import damped, row_losses, sweep, upper_factor
from qcompiler.passes.base import (
    QuantPass,
    QuantPassResult,
    Stage,
    assigned_sites,
    checked_weight,
    site_scheme,
    site_spec,
    spec_of,
    streaming,
)
from qcompiler.quantized import to_stored
from qcompiler.records import SiteRecord
from qcompiler.scheme import Scheme
from qcompiler.segments import plan_segments
from qcompiler.sensitivity import Sensitivity, first_rows
from qcompiler.statistics import LayerFacts
from qcompiler.targets import lowered_bytes, site_refusal

__all__ = ["MixedPrecision"]

_LADDER = ((2, 64), (2, 32), (4, 128), (4, 64), (4, 32), (8, 128), (8, 32))
# What sensitivity is measured with: loud enough to be seen, quiet enough for the outputs to follow in proportion.
_PROBE = WeightSpec(4, 64, symmetric=False)
_DAMPING = 0.05


@dataclass(frozen=True)
class Options:
    """Options of `mixed_precision`."""

    rows: int = field(default=64, metadata={"help": "rows of each weight that formats are tried on"})
    probes: int = field(default=1, metadata={"help": "calibration rows that sensitivity is measured on"})

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if self.rows < 1 or self.probes < 1:
            raise SchemeError(f"pass mixed_precision: rows={self.rows} and probes={self.probes} have to be at least 1")


@dataclass(eq=False)
class _Unit:
    """A weight, the schemes it may get, what each costs, and what it costs by itself."""

    site: Site
    schemes: list[Scheme]
    losses: list[float] = field(default_factory=list)
    probe_loss: float = 0.0
    sensitivity: float = 0.0


class MixedPrecision(QuantPass):
    """Chooses a format for each weight within a budget."""

    name = "mixed_precision"
    stage = Stage.TRANSFORM
    after = ("awq", "equalize", "rotate", "smooth_conv", "smoothquant")
    needs_calibration = True
    Options = Options

    @classmethod
    def applies(cls, config: CompileConfig) -> bool:
        """Where a budget is given."""
        return config.bits_per_weight is not None or config.max_size is not None

    def call(self, model: ir.Model) -> QuantPassResult:
        """Measure, choose and write the schemes."""
        config, calibration = self.context.config, self.context.calibration
        if calibration is None or not len(calibration.batches):
            raise CalibrationError("a budget is spent by what data show; give --calibration PATH")
        units = [unit for site in assigned_sites(model) if (unit := self._unit(site)) is not None]
        if not units:
            raise ModelError("mixed_precision: there is no weight-only site to choose formats for")
        linear = [unit for unit in units if unit.site.role != "embedding"]
        self._try_formats(model, linear)
        for unit in units:
            if unit not in linear:
                self._weigh(unit, None)
        self._probe(model, units)
        budget = self._budget(model, units)
        choices = [[Choice(size, unit.sensitivity * loss) for size, loss in _sized(unit, config)] for unit in units]
        least = sum(min(choice.size for choice in each) for each in choices)
        if least > budget:
            raise ModelError(
                f"mixed_precision: the smallest formats of the {len(units)} weights take {least / 8e6:.2f} MB where "
                f"{budget / 8e6:.2f} MB are left for them; give a larger budget, or let more be quantized"
            )
        chosen = allocate(choices, budget)
        records = [self._assign(unit, choices[at], chosen[at]) for at, unit in enumerate(units)]
        return QuantPassResult(model, True, tuple(records))

    def _unit(self, site: Site) -> _Unit | None:
        """The site with the formats that it may get; None where it keeps the one it has."""
        config, scheme = self.context.config, site_scheme(site)
        if scheme is None or scheme.activations is not None or site.nested:
            return None
        if config.bits_per_weight is not None and site.role != "linear":
            return None
        wanted = [replace(scheme, bits=bits, group_size=size) for bits, size in _LADDER]
        return _Unit(site, [each for each in wanted if not site_refusal(site, each, config)] or [scheme])

    def _try_formats(self, model: ir.Model, units: Sequence[_Unit]) -> None:
        """Quantize a sample of each weight in each format, on the Hessians of the float model."""
        by_site = {unit.site.node: unit for unit in units}

        def on_sites(sites: list[Site], facts: LayerFacts) -> None:
            for site in sites:
                if site.node in by_site:
                    self._weigh(by_site[site.node], facts)

        run = streaming(self.context, self.name, sequential=False)
        segments = plan_segments(model, [unit.site for unit in units])
        run.run(model, segments, self.context.calibration.batches, on_sites)

    def _weigh(self, unit: _Unit, facts: LayerFacts | None) -> None:
        """The loss of each format, scaled up from a sample of rows."""
        weight = checked_weight(unit.site)
        rows = weight[np.linspace(0, len(weight) - 1, min(self.options.rows, len(weight))).astype(int)]
        share = len(weight) / len(rows)
        specs = [spec_of(unit.site, scheme, self.context.config) for scheme in unit.schemes]
        if facts is None or facts.hessian.ndim == 3:
            identity = np.eye(weight.shape[1], dtype=np.float32)
            unit.losses = [share * _rounded(rows, spec, identity) for spec in specs]
            unit.probe_loss = share * _rounded(rows, _PROBE, identity)
            return
        hessian = facts.hessian / facts.tokens
        importance = np.diagonal(hessian).astype(np.float32)
        order = np.argsort(-importance, kind="stable")
        factor = upper_factor(damped(hessian, _DAMPING)[np.ix_(order, order)])
        for spec in specs:
            grid = clip_grid(rows, spec, importance)
            _, loss = sweep(rows, factor, grid, spec, order, 128)
            unit.losses.append(share * float(loss.sum()))
        unit.probe_loss = share * _rounded(rows, _PROBE, hessian.astype(np.float32))

    def _probe(self, model: ir.Model, units: Sequence[_Unit]) -> None:
        """Measure what the probe's rounding of the weights that read the same activation costs at the outputs."""
        batches = self.context.calibration.batches
        feeds = [first_rows(batches[at], 1) for at in range(min(self.options.probes, len(batches)))]
        config = self.context.config
        float_model = Sensitivity(model, feeds, provider=config.provider, threads=self.context.threads)
        groups = list(_reading_together(units))
        for done, group in enumerate(groups):
            changed = {}
            for unit in group:
                grid = min_max_grid(weight := read_weight(unit.site), _PROBE)
                decoded = dequantize(quantize(weight, grid, _PROBE), grid.scale, grid.zero_point, _PROBE.group_size)
                stored = to_stored(decoded, unit.site.layout).astype(unit.site.dtype.numpy())
                changed[unit.site.weight.name or ""] = np.ascontiguousarray(stored)
            reachable = {name: array for name, array in changed.items() if name in float_model.weights}
            cost = float_model.change(reachable) if reachable else 0.0
            total = sum(unit.probe_loss for unit in group)
            for unit in group:
                unit.sensitivity = cost / total if total else 0.0
            self.context.tick(self.name, done + 1, len(groups))
        known = [unit.sensitivity for unit in units if unit.sensitivity]
        for unit in units:  # small constants are part of the session: they count like the typical weight
            unit.sensitivity = unit.sensitivity or (float(np.median(known)) if known else 1.0)

    def _budget(self, model: ir.Model, units: Sequence[_Unit]) -> int:
        """Bits that the units may take together."""
        config = self.context.config
        if config.bits_per_weight is not None:
            return int(config.bits_per_weight * sum(unit.site.rows * unit.site.columns for unit in units))
        assert config.max_size is not None
        mine = {unit.site.weight for unit in units}
        fixed = 0
        for site in assigned_sites(model):
            if site.weight not in mine:
                mine.add(site.weight)
                fixed += lowered_bytes(site_spec(site, config), site.rows, site.columns)
        rest = [value.const_value for g in model.graphs() for value in g.initializers.values() if value not in mine]
        fixed += sum({id(tensor): tensor.nbytes for tensor in rest if tensor is not None}.values())
        return 8 * (config.max_size - fixed - _file_overhead(model))

    def _assign(self, unit: _Unit, choices: Sequence[Choice], chosen: int) -> SiteRecord:
        text = str(unit.schemes[chosen])
        for node in _users(unit.site):
            node.metadata_props[SCHEME_KEY] = text
        bits = choices[chosen].size / (unit.site.rows * unit.site.columns)
        metrics = {"bits_per_weight": bits, "expected_cost": choices[chosen].loss}
        return SiteRecord(unit.site.name, "assigned", text, "", metrics)


def _users(site: Site) -> Iterator[ir.Node]:
    """The nodes that share the site's weight and have a scheme of their own to follow it."""
    values = [site.weight, *([site.transpose.outputs[0]] if site.transpose is not None else [])]
    nodes = [node for value in values for node in value.consumers() if SCHEME_KEY in node.metadata_props]
    yield from dict.fromkeys([site.node, *nodes])


def _sized(unit: _Unit, config: CompileConfig) -> Iterator[tuple[int, float]]:
    """Stored bits and loss of each format."""
    site = unit.site
    for scheme, loss in zip(unit.schemes, unit.losses, strict=True):
        yield 8 * lowered_bytes(spec_of(site, scheme, config), site.rows, site.columns), loss


def _rounded(weight: np.ndarray, spec: WeightSpec, hessian: np.ndarray) -> float:
    """The loss of rounding to nearest."""
    grid = min_max_grid(weight, spec)
    decoded = dequantize(quantize(weight, grid, spec), grid.scale, grid.zero_point, spec.group_size)
    return float(row_losses(weight - decoded, hessian).sum())


def _reading_together(units: Sequence[_Unit]) -> Iterator[list[_Unit]]:
    groups: dict[ir.Value, list[_Unit]] = {}
    for unit in units:
        groups.setdefault(unit.site.input, []).append(unit)
    yield from groups.values()


def _file_overhead(model: ir.Model) -> int:
    """About what nodes and names take in the file."""
    return 400 * sum(1 for _ in model.graph.all_nodes())
