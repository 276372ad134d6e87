"""Learned rounding: the codes and scales of a block's weights, moved by gradient until the block computes what it did.

Cheng et al. 2023, arXiv:2309.05516 (AutoRound): sign descent on a rounding offset for every weight and a factor for
every scale. The model is cut into blocks at narrow places (`qcompiler.blocks`; in a transformer a block is attention
and MLP). A block's inputs come from the quantized blocks before it, its targets from the float model, so that it also
makes up for what they got wrong. What is done by gradient is in `qcompiler.tuning.rounding`.

With `distill=N` a language model is learned as a whole in their place: N steps, all weights at once, on the divergence
of its answers from those of the float model (`qcompiler.tuning.distillation`).

Behind `gptq` it starts from GPTQ's codes and grids; by itself from codes rounded to nearest on clipped grids.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from qcompiler.blocks import TwoStreams, learned_outputs, plan_blocks, single_rows
from qcompiler.checkpoints import Arrays, Periodic, digest_of
from qcompiler.errors import CalibrationError, SchemeError
from qcompiler.extras import require_torch
from qcompiler.graph import Site
from qcompiler.numerics.affine import WeightSpec, clip_grid, quantize
from qcompiler.passes.base import (
    QuantPassResult,
    WeightQuantizer,
    assigned_sites,
    check_options,
    planned_sites,
    scheme_text,
)
from qcompiler.quantized import Quantized
from qcompiler.records import SiteRecord
from qcompiler.scratch import Scratch
from qcompiler.segments import Segment
from qcompiler.session import Feeds
from qcompiler.sites import find_sites
from qcompiler.statistics import LayerFacts
from qcompiler.waypoints import Waypoints

if TYPE_CHECKING:
    from qcompiler.tuning import Settings

__all__ = ["LearnedRounding"]

logger = logging.getLogger(__name__)

# Between two checkpoints of the descent through the whole model.
_SECONDS = 60.0


@dataclass(frozen=True)
class Options:
    """Options of `learned_rounding`."""

    steps: int = field(default=120, metadata={"help": "steps of descent for each block, where nothing is distilled"})
    batch: int = field(default=1, metadata={"help": "batches of calibration data in a step"})
    rate: float = field(default=0.005, metadata={"help": "first step of the rounding offsets, in codes"})
    scale_rate: float = field(default=0.0003, metadata={"help": "first step of the scales, as a fraction of each"})
    momentum: float = field(default=0.9, metadata={"help": "share of the direction kept from step to step"})
    held_out: int = field(default=2, metadata={"help": "batches that are not learned from, to judge by"})
    narrow: int = field(default=2, metadata={"help": "narrow places in a block; 2 takes attention and MLP together"})
    distill: int = field(default=0, metadata={"help": "steps through the whole model, on its answers' divergence"})
    distill_rate: float = field(default=0.002, metadata={"help": "first step of the rounding offsets in these"})
    distill_scale_rate: float = field(default=0.001, metadata={"help": "first step of the scales in these"})
    distill_momentum: float = field(default=0.95, metadata={"help": "share of the direction kept in these"})
    both: bool = field(default=False, metadata={"help": "learn blocks even where the whole model is distilled then"})
    vectors: bool = field(default=True, metadata={"help": "learn gains of normalizations and biases in these as well"})
    precision: str = field(
        default="auto", metadata={"help": "of descent: float32, bfloat16, or auto: bfloat16 on processors that have it"}
    )

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        least = {"steps": 0, "distill": 0, "batch": 1, "held_out": 1, "narrow": 1}
        rates = ("rate", "scale_rate", "distill_rate", "distill_scale_rate")
        check_options("learned_rounding", self, least=least, shares=rates)
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise SchemeError(
                f"pass learned_rounding: precision={self.precision} is unknown; choose auto, float32 or bfloat16"
            )
        for name in ("momentum", "distill_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise SchemeError(
                    f"pass learned_rounding: {name}={getattr(self, name):g} is not at least 0 and below 1"
                )


class LearnedRounding(WeightQuantizer):
    """Tunes quantized weights block by block.

    1. A site that nothing has quantized yet is rounded to nearest on a clipped grid, and is the better for 2.
    2. The sites of a block are learned together and kept if that lowers the error on batches that were held out.
    3. With `distill`, the sites of a language model are learned together instead, and all kept or none.
    4. Lookup tables, sites in control-flow bodies, 8-bit floats, weights other than float32, very wide layers (the
       vocabulary's) and blocks with operators that PyTorch is not given keep what they have, with the reason.
    """

    name = "learned_rounding"
    after = ("rtn", "gptq", "hqq", "obq")
    paper = "Cheng et al. 2023, arXiv:2309.05516"
    needs_calibration = True
    Options = Options

    def quantize(self, weight: np.ndarray, spec: WeightSpec, facts: LayerFacts | None) -> Quantized:
        """Where to start: round a weight ``[N, K]`` to nearest on a clipped grid."""
        del facts
        grid = clip_grid(weight, spec, threads=self.context.threads)
        return Quantized(quantize(weight, grid, spec), grid, "start of learned rounding")

    def call(self, model: ir.Model) -> QuantPassResult:
        """Quantize what is float, tune block by block, then through the whole model if that is wanted."""
        require_torch(self.name, "or use gptq")
        from qcompiler.tuning import tuning_problem, whole_problem

        sites = planned_sites(model)
        calibration = self.context.calibration
        if sites and (calibration is None or len(calibration.batches) <= self.options.held_out):
            raise CalibrationError(
                f"{self.name} needs calibration data of more than {self.options.held_out} batches, as many of which it "
                "judges by; give --calibration PATH and --samples, or use gptq or rtn"
            )
        records = [record for site in assigned_sites(model) for record in self.quantize_sites([site], None)]
        modified = bool(records)
        problems = {site: tuning_problem(site) for site in sites}
        records += [_skipped(site, problem) for site, problem in problems.items() if problem]
        tunable = [site for site, problem in problems.items() if not problem]
        if tunable:
            linear = [site for site in find_sites(model)[0] if not site.nested and site.role != "embedding"]
            provider = self.context.config.provider
            blocks = plan_blocks(model, linear, calibration.batches[0], provider, self.options.narrow)
            problem = whole_problem(model, blocks) if self.options.distill else "not asked for"
            made = []
            if self.options.steps and (problem or self.options.both):
                made += self._tune(model, tunable, blocks)
            if not problem:
                made += self._distill(model, tunable, blocks)
            elif self.options.distill and not self.options.steps:
                made += [_skipped(site, f"{problem}, so that nothing is distilled") for site in tunable]
            modified |= any(record.action == "quantized" for record in made)
            records += made
        return QuantPassResult(model, modified, tuple(records))

    def _settings(self, *, whole: bool = False) -> "Settings":
        from qcompiler.tuning import Settings, fast_bfloat16

        options = self.options
        return Settings(
            options.distill if whole else options.steps,
            options.batch,
            options.distill_rate if whole else options.rate,
            options.distill_scale_rate if whole else options.scale_rate,
            options.distill_momentum if whole else options.momentum,
            self.context.config.seed,
            self.context.threads,
            self.options.precision == "bfloat16" or (self.options.precision == "auto" and fast_bfloat16()),
        )

    def _tune(self, model: ir.Model, tunable: Sequence[Site], blocks: Sequence[Segment]) -> list[SiteRecord]:
        """Go through the blocks up to the last that has sites to tune."""
        config, context = self.context.config, self.context
        nodes = {site.node for site in tunable}
        last = max(index for index, block in enumerate(blocks) if any(site.node in nodes for site in block.sites))
        records: list[SiteRecord] = []
        with ThreadPoolExecutor(context.threads) as pool, self._scratch() as scratch:
            streams = self._streams(model, context.calibration.batches, scratch, pool)
            for index, block in enumerate(blocks[: last + 1]):
                context.tick(self.name, index, last + 1)
                sites = [site for site in block.sites if site.node in nodes]
                if sites:
                    records += self._tune_block(model, block, sites, streams)
                if index < last:
                    streams.advance(block, config.provider)
            streams.close()
        context.tick(self.name, last + 1, last + 1)
        return records

    def _tune_block(self, model: ir.Model, block: Segment, sites: list[Site], streams: TwoStreams) -> list[SiteRecord]:
        """Learn the sites of a block, and keep the result if it is better on held-out batches."""
        from qcompiler.torch_graph import TorchGraph, unsupported
        from qcompiler.tuning import Example, outcome_arrays, parted, start_of, tune_block

        problems = unsupported(block.nodes, model.opset_imports)
        if problems:
            return [_skipped(site, f"its block cannot run in PyTorch: {problems[0]}") for site in sites]
        outputs = learned_outputs(block, sites)
        if not outputs:
            return [_skipped(site, "nothing that later layers read depends on it") for site in sites]

        def tune() -> Arrays:
            targets = streams.targets(block, self.context.config.provider)
            graph = TorchGraph(block.nodes, model.opset_imports, outputs)
            examples = [
                Example({name: feeds[name] for name in graph.inputs}, {name: wanted[name] for name in outputs}, mask)
                for feeds, wanted, mask in zip(streams.actual, targets, streams.masks, strict=True)
            ]
            starts = [start_of(site) for site in sites]
            outcome = tune_block(graph, starts, *parted(examples, self.options.held_out), self._settings())
            return outcome_arrays(outcome, sites)

        def key() -> str:
            options = {name: value for name, value in vars(self.options).items() if not name.startswith("distill")}
            return streams.digest(block, "tuned", options, self._settings(), [site.weight.name for site in sites])

        return self._kept(sites, self.context.remember(self.name, len(sites), key, tune), "learned rounding")

    def _distill(self, model: ir.Model, tunable: Sequence[Site], blocks: Sequence[Segment]) -> list[SiteRecord]:
        """Descend through the whole model; all of it is kept, or nothing."""
        from qcompiler.tuning import put_back_vectors

        context, provider = self.context, self.context.config.provider
        first, *middle, end = blocks
        with ThreadPoolExecutor(context.threads) as pool, self._scratch() as scratch:
            streams = self._streams(model, single_rows(context.calibration.batches), scratch, pool)
            streams.advance(first, provider)
            followed = []
            for block in middle:
                followed.append(streams.digest(block))
                streams.follow(block, provider)

            weights = [site.weight.name for site in tunable]
            key = streams.digest(end, "distilled", str(self), self._settings(whole=True), weights, followed)
            store = context.checkpoints
            state = Periodic(store, digest_of("state", key), _SECONDS) if store is not None else None
            made = context.remember(
                "distillation",
                len(tunable),
                lambda: key,
                lambda: self._descended(model, tunable, blocks[1:], streams, state),
            )
            streams.close()
            if state is not None:
                state.drop()
        records = self._kept(tunable, made, "distilled")
        if any(record.action == "quantized" for record in records):
            learned = "learned with the weights around it"
            records += [SiteRecord(name, "scaled", "", learned) for name in put_back_vectors(model, made)]
        return records

    def _descended(
        self,
        model: ir.Model,
        tunable: Sequence[Site],
        blocks: Sequence[Segment],
        streams: TwoStreams,
        state: Periodic | None,
    ) -> Arrays:
        """What the descent through the blocks gives; it goes on from `state`."""
        from qcompiler.tuning import Example, learn_whole, parted

        examples = [Example(*each) for each in zip(streams.actual, streams.exact, streams.masks, strict=True)]
        return learn_whole(
            model,
            tunable,
            blocks,
            parted(examples, self.options.held_out),
            self._settings(whole=True),
            vectors=self.options.vectors,
            tick=lambda done, total, _: self.context.tick("distillation", done, total),
            stored=state,
        )

    def _kept(self, sites: Sequence[Site], learned: Arrays, how: str) -> list[SiteRecord]:
        """Write what was learned if it is better, and say so."""
        from qcompiler.tuning import outcome_of, put_back

        found = outcome_of(learned, sites)
        before, after = found.before, found.after
        logger.debug("%s: held-out error %.3g, was %.3g", self.name, after, before)
        figures = {"loss_before": before, "loss_after": after}
        if not after < before:
            remark = f"{how}: did not lower the error on held-out data ({before:.3g}, {after:.3g}), kept as it was"
            return [SiteRecord(site.name, "skipped", scheme_text(site), remark, figures) for site in sites]
        records = []
        for site, codes, grid in zip(sites, found.codes, found.grids, strict=True):
            metrics = {**put_back(site, codes, grid, self.name), **figures}
            records.append(SiteRecord(site.name, "quantized", scheme_text(site), how, metrics))
        return records

    def _streams(
        self, model: ir.Model, batches: Sequence[Feeds], scratch: Scratch, pool: ThreadPoolExecutor
    ) -> TwoStreams:
        waypoints = Waypoints(self.context.checkpoints, model, batches, self.context.config.provider, 2)
        return TwoStreams(model, batches, scratch, pool, self.context.threads, waypoints)

    def _scratch(self) -> Scratch:
        most = self.context.config.max_memory
        return Scratch(most // 4 if most else None)


def _skipped(site: Site, problem: str) -> SiteRecord:
    return SiteRecord(site.name, "skipped", scheme_text(site), f"rounding not learned: {problem}")
