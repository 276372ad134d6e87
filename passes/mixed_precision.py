"""Mixed precision: give each weight the format in which it costs least, so that all of them fit a budget.

1. Loss. Every weight is quantized by trial in each format of a ladder (2, 4 and 8 bits, several group sizes), with the
   Hessians of the float model, on a sample of its rows: tr((W - Q) H (W - Q)^T), as GPTQ would leave it.
2. Sensitivity. What a loss costs at the outputs is measured, not guessed: each weight alone is rounded to 4 bits, as
   GPTQ would, the rest stays float, and the model is run. The KL divergence of its logits (the noise of its outputs,
   where there are none) over the loss of that rounding is what each format's loss is multiplied with.
   Where layers make up for the errors of those before (`gptq{drift=...}`), such a run is misleading: what tokens have
   in common of an error of attention's values is a quarter of all there is to measure on a language model, and all of
   it is made up for. There each output's loss is multiplied with half the mean square of the answer's gradient at it
   (`tuning.fisher`), and nothing is tried in step 4.
3. Choice. Costs are taken to add up, and the formats are chosen by a knapsack over stored bits (`numerics.allocation`).
4. Swaps. All weights are rounded as chosen, the model is run on held-out rows, and formats are exchanged where that
   lowers what these runs measure.

The budget is `bits_per_weight`, over the linear layers, or `max_size`, of the files; or `target_kl` is to be met by
the smallest formats. The scheme given is the one whose symmetry all formats have. Where nothing else is gained by more
bits a weight stays float. Weights of sites whose activations are quantized, and weights inside bodies, keep their
formats; lookup tables are weighed by ||W - Q||^2 in the place of 1.

What gets a format is a weight, those that read the same, those of a layer, or a head of an attention (`units`; see
`mixing_heads`).
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from qcompiler.checkpoints import Arrays, code_version, digest_of
from qcompiler.config import CompileConfig
from qcompiler.errors import CalibrationError, ModelError, PassError
from qcompiler.graph import SCHEME_KEY, Site
from qcompiler.mixing import UNITS, MixedSite, Unit, fixed_bytes, formats_of, units_of
from qcompiler.mixing_heads import CutLayer, cut_heads, join_heads
from qcompiler.mixing_trials import Trials
from qcompiler.numerics.allocation import Choice, allocate, cheapest, efficient, frontier, swapped, totals
from qcompiler.passes.base import QuantPass, QuantPassResult, Stage, assigned_sites, check_options, site_scheme
from qcompiler.records import SiteRecord
from qcompiler.scratch import Scratch
from qcompiler.segments import constants_of, whole_model
from qcompiler.sites import find_sites
from qcompiler.waypoints import Waypoints

__all__ = ["MixedPrecision"]

# Points of the curve that the report has.
_POINTS = 24
# Four times the bytes of Hessians and rounded weights that are held in memory; the rest waits in mapped files.
_KEPT = 1 << 30
# Layers that make up for the errors of those before.
_DRIFT = re.compile(r"drift=0*\.?0*[1-9]")
_SENSITIVITIES = ("auto", "trial", "gradient")
# Of target_kl: plans measured, and how far below the target a plan may end.
_AIMS, _NEAR = 6, 0.05


@dataclass(frozen=True)
class Options:
    """Options of `mixed_precision`."""

    rows: int = field(default=64, metadata={"help": "rows of each weight that formats are tried on"})
    batches: int = field(default=4, metadata={"help": "calibration batches that losses are measured on"})
    probes: int = field(default=1, metadata={"help": "calibration rows that sensitivity is measured on"})
    tokens: int = field(default=64, metadata={"help": "tokens of each of these rows"})
    trials: int = field(default=2, metadata={"help": "held-out rows, of twice the tokens, that plans are run on"})
    swaps: int = field(default=12, metadata={"help": "exchanges of formats to try by such a run; 0 runs none"})
    sensitivity: str = field(
        default="auto", metadata={"help": f"what tells how much a loss costs: {', '.join(_SENSITIVITIES)}"}
    )
    units: str = field(default="site", metadata={"help": f"what gets a format of its own: {', '.join(UNITS)}"})

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        counts = dict.fromkeys(("rows", "batches", "probes", "tokens", "trials"), 1)
        choices = {"units": UNITS, "sensitivity": _SENSITIVITIES}
        check_options("mixed_precision", self, least={**counts, "swaps": 0}, choices=choices)


class MixedPrecision(QuantPass):
    """Chooses a format for each weight within a budget."""

    name = "mixed_precision"
    stage = Stage.TRANSFORM
    after = ("awq", "equalize", "prune", "reorder", "rotate", "smooth_conv", "smoothquant")
    needs_calibration = True
    Options = Options

    @classmethod
    def applies(cls, config: CompileConfig) -> bool:
        """Where a budget is given."""
        return bool(config.budgets)

    def call(self, model: ir.Model) -> QuantPassResult:
        """Measure, choose, try and write the schemes."""
        calibration = self.context.calibration
        if calibration is None or not len(calibration.batches):
            raise CalibrationError("a budget is spent by what data show; give --calibration PATH")
        opset = model.graph.opset_imports.get("", 0)
        layers: list[CutLayer] = []
        whole: dict[str, str] = {}
        if self.options.units == "head":
            layers, whole = cut_heads(model, [site for site in assigned_sites(model) if self._mixed(site, opset)])
        try:
            records = self._assigned(model, opset)
        finally:
            joined = join_heads(layers)
        records = _joined(records, joined)
        records += [SiteRecord(name, "skipped", reason=f"not cut into heads: {why}") for name, why in whole.items()]
        return QuantPassResult(model, True, tuple(records))

    def _assigned(self, model: ir.Model, opset: int) -> list[SiteRecord]:
        """Write the schemes on the nodes; what was done, with the curve."""
        sites = [one for site in assigned_sites(model) if (one := self._mixed(site, opset)) is not None]
        if not sites:
            raise ModelError("mixed_precision: there is no weight-only site to choose formats for")
        kept = self.context.remember(
            self.name, len(sites), lambda: self._key(model, sites), lambda: self._planned(model, sites)
        )
        losses = np.split(kept["losses"], np.cumsum([len(one.schemes) for one in sites])[:-1])
        for one, listed, (loss, cost) in zip(sites, losses, kept["trials"].tolist(), strict=True):
            one.losses, one.trial_loss, one.trial_cost = listed.tolist(), loss, cost
        units, chosen, note = units_of(sites, self.options.units), kept["chosen"].tolist(), kept["note"].tobytes()
        users: dict[ir.Value, list[ir.Node]] = {}
        for site in find_sites(model)[0]:
            if SCHEME_KEY in site.node.metadata_props:
                users.setdefault(site.weight, []).append(site.node)
        records = [record for unit, index in zip(units, chosen, strict=True) for record in _assign(unit, index, users)]
        weights = sum(one.weights for one in sites)
        choices = [unit.choices for unit in units]
        points = [(point, 0.0) for point in frontier(choices, _POINTS)] + [(totals(choices, chosen), 1.0)]
        records += [_point(point, weights, chosen=mark) for point, mark in points]
        return [SiteRecord(self.name, "rewritten", reason=note.decode()), *records]

    def _planned(self, model: ir.Model, sites: Sequence[MixedSite]) -> Arrays:
        """What was measured of the sites, the index of each unit's format, and what was done in words."""
        config = self.context.config
        with Scratch(min(config.max_memory or _KEPT, _KEPT) // 4) as scratch:
            trials = Trials(self.context, model, sites, scratch)
            gradients = self._wants_gradients()
            problem = trials.measure(
                self.options.rows,
                self.options.batches,
                self.options.probes,
                self.options.tokens,
                gradients=gradients,
            )
            if problem and self.options.sensitivity == "gradient":
                raise PassError(f"mixed_precision{{sensitivity=gradient}}: {problem}; leave the option out")
            units = units_of(sites, self.options.units)
            budget = self._budget(model, sites)
            least = sum(min(choice.size for choice in unit.choices) for unit in units)
            if budget is not None and least > budget:
                raise ModelError(
                    f"mixed_precision: the smallest formats of the {len(sites)} weights take {least / 8e6:.2f} MB "
                    f"where {budget / 8e6:.2f} MB are left for them; give a larger budget, or let more be quantized"
                )
            chosen, note = self._chosen(units, budget, trials, run=not gradients or bool(problem))
            note += f"; sensitivity measured by trial: {problem}" if problem else ""
        return {
            "losses": np.concatenate([one.losses for one in sites]),
            "trials": np.array([(one.trial_loss, one.trial_cost) for one in sites]),
            "chosen": np.array(chosen, np.int64),
            "note": np.frombuffer(note.encode(), np.uint8),
        }

    def _key(self, model: ir.Model, sites: Sequence[MixedSite]) -> str:
        """The hash of all that the plan follows from."""
        config, calibration = self.context.config, self.context.calibration
        whole = whole_model(model)
        waypoints = Waypoints(self.context.checkpoints, model, calibration.batches, config.provider, 1)
        return waypoints.segment(
            whole,
            [constants_of(whole.nodes)],
            digest_of("plan", code_version(), str(self), config.algorithms, config.budgets, config.float16),
            [digest_of(sorted(feeds.items())) for feeds in calibration.held_out],
            [(one.site.name, str(one.asked), [str(each) for each in one.schemes], one.sizes) for one in sites],
            [(site.name, str(site_scheme(site))) for site in assigned_sites(model)],
        )

    def _mixed(self, site: Site, opset: int) -> MixedSite | None:
        """The site with the formats that it may get; None where it keeps the one it has."""
        config, scheme = self.context.config, site_scheme(site)
        if scheme is None or scheme.activations is not None or site.nested:
            return None
        if config.bits_per_weight is not None and site.role != "linear":
            return None
        return formats_of(site, scheme, opset, config)

    def _budget(self, model: ir.Model, sites: Sequence[MixedSite]) -> int | None:
        """Bits that the sites may take together; None where a divergence is given."""
        config = self.context.config
        if config.bits_per_weight is not None:
            return int(config.bits_per_weight * sum(one.weights for one in sites))
        if config.max_size is None:
            return None
        return 8 * (config.max_size - fixed_bytes(model, [one.site for one in sites], config))

    def _wants_gradients(self) -> bool:
        """Whether what a loss costs is to follow from gradients."""
        if self.options.sensitivity != "auto":
            return bool(self.options.sensitivity == "gradient")
        return self.context.config.target_kl is None and bool(_DRIFT.search(",".join(self.context.config.algorithms)))

    def _chosen(self, units: Sequence[Unit], budget: int | None, trials: Trials, *, run: bool) -> tuple[list[int], str]:
        """The index of each unit's format, and what was done in words; with `run` plans for a budget are tried."""
        choices = [unit.choices for unit in units]

        def cost(plan: Sequence[int]) -> float:
            return trials.cost(units, plan, rows=self.options.trials, tokens=2 * self.options.tokens)

        if budget is None:
            chosen, measured = self._aimed(choices, cost)
            found = f"measured {measured:.4g} by trial"
        else:
            chosen, found = allocate(choices, budget), "not tried"
            if run and self.options.swaps:
                uniform = [unit.schemes.index(unit.members[0].asked) for unit in units if _is_uniform(unit)]
                fits = len(uniform) == len(units) and totals(choices, uniform).size <= budget
                # What each weight costs by itself is a guess at what all cost together: the scheme may be better.
                if fits and cost(uniform) < cost(chosen):
                    chosen = uniform
                result = swapped(choices, chosen, budget, cost, self.options.swaps)
                chosen = result.chosen
                found = f"measured {result.before:.4g} by trial, {result.after:.4g} after {result.kept} swaps"
        total, sites = totals(choices, chosen), [one for unit in units for one in unit.members]
        asked = totals([one.choices() for one in sites], [one.schemes.index(one.asked) for one in sites])
        weights = sum(one.weights for one in sites)
        sizes = [f"{plan.size / weights:.3f} bits a weight, {plan.size / 8e6:.2f} MB" for plan in (total, asked)]
        return chosen, (
            f"{sizes[0]}; expected cost {total.loss:.4g}, {found} (as --scheme says: {sizes[1]}; expected cost "
            f"{asked.loss:.4g})"
        )

    def _aimed(
        self, choices: Sequence[Sequence[Choice]], cost: Callable[[Sequence[int]], float]
    ) -> tuple[list[int], float]:
        """The smallest plan that was found to keep to the divergence asked for."""
        target = self.context.config.target_kl
        assert target is not None
        best = [efficient(each)[-1] for each in choices]
        measured = cost(best)
        if measured > target:
            raise ModelError(
                f"mixed_precision: with the largest formats the divergence is {measured:.4g} by trial, where "
                f"--target-kl asks for {target:g}; give a larger one, or leave weights float with --ignore"
            )
        aim = target
        for _ in range(_AIMS):
            plan = cheapest(choices, aim)
            found = cost(plan)
            if found <= target and totals(choices, plan).size < totals(choices, best).size:
                best, measured = plan, found
            if (1 - _NEAR) * target <= found <= target:
                break
            # What is measured grows with what is expected; a little less is aimed at than proportion would have.
            aim *= (1 - _NEAR / 2) * target / found if found else 2.0
        return best, measured


def _is_uniform(unit: Unit) -> bool:
    """Whether all members were asked for in one format that all of them may get."""
    asked = {one.asked for one in unit.members}
    return len(asked) == 1 and asked <= set(unit.schemes)


def _assign(unit: Unit, index: int, users: Mapping[ir.Value, Sequence[ir.Node]]) -> Iterator[SiteRecord]:
    """Write the format of a unit on the nodes that use the weights of its members."""
    scheme = unit.schemes[index]
    for one in unit.members:
        choice = one.choices()[one.schemes.index(scheme)]
        metrics = {"bits_per_weight": choice.size / one.weights, "expected_cost": choice.loss}
        for node in users[one.site.weight]:
            if scheme is None:
                node.metadata_props.pop(SCHEME_KEY, None)
            else:
                node.metadata_props[SCHEME_KEY] = str(scheme)
        if scheme is None:
            yield SiteRecord(
                one.site.name, "skipped", reason="left float, which the budget has room for", metrics=metrics
            )
        else:
            yield SiteRecord(one.site.name, "assigned", str(scheme), "", metrics)


def _joined(records: Iterable[SiteRecord], joined: Mapping[str, Sequence[tuple[str, list[str]]]]) -> list[SiteRecord]:
    """Records of heads made those of the layers that heads became; all of a layer's heads have the same size."""
    place = {head: (layer, name) for layer, parts in joined.items() for name, heads in parts for head in heads}
    found: dict[str, list[SiteRecord]] = {}
    for record in records:
        layer, name = place.get(record.site, ("", record.site))
        found.setdefault(name if layer else f"{record.site} {len(found)}", []).append(record)
    made = []
    for name, members in found.items():
        first = members[0]
        if first.site not in place:
            made.append(first)
            continue
        metrics = {
            "bits_per_weight": sum(each.metrics["bits_per_weight"] for each in members) / len(members),
            "expected_cost": sum(each.metrics["expected_cost"] for each in members),
        }
        made.append(replace(first, site=name, metrics=metrics))
    return made


def _point(point: Choice, weights: int, *, chosen: float) -> SiteRecord:
    """A point of the curve, for the report."""
    metrics = {"bytes": point.size / 8, "bits_per_weight": point.size / weights, "cost": point.loss, "chosen": chosen}
    return SiteRecord("budget", "plan", metrics=metrics)
