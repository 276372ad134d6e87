"""Training: the quantized model learns to answer as the float model does, or as labels say.

The model, as the algorithms before have quantized it, is run in PyTorch (`qcompiler.torch_graph`). Its weights are
float latents that are quantized on the way forward, its activations go through fake quantizers where the graph has Q/DQ
pairs, and gradients go through both as the method says (one file each in `qcompiler.tuning`):

1. `qat`: straight through, within ranges that stay (Jacob et al. 2018, arXiv:1712.05877).
2. `lsq`: steps of weights and activations are learned as well (Esser et al. 2020, arXiv:1902.08153).
3. `pact`: the levels at which activations are clipped are learned (Choi et al. 2018, arXiv:1805.06085).
4. `binaryconnect` (or `binaryconnect-drawn`), `bnn`, `xnor`, `twn`, `absmean`: weights of two or three values, which
   schemes of 1.58 bits hold; `ttq`: three values, two of which are learned, among codes of 4 or 8 bits.
5. `bitfit`: biases alone, which products without any get (Ben Zaken et al. 2022, arXiv:2106.10199).
6. `qlora`: low-rank adapters beside products whose weights stay (Dettmers et al. 2023, arXiv:2305.14314). With
   `export=nodes` they are part of the model, with `adapter` inputs of it, zero where none are given, and a file for
   ONNX Runtime's LoraAdapter, with `merged` they are added to the weights, which are rounded again.

Float vectors, gains of normalizations and biases, are learned with 1 to 4. Batch norms are folded before, and so
are frozen. Descent is by Adam with weight decay, or by stochastic gradients with momentum; in units of what moves: a
rate of 0.01 moves a weight by a hundredth of the step between two codes. What is kept is what `numerics` makes of the
result, so that the model that is written computes what was judged.

Left alone, with the reason: lookup tables, sites in control-flow bodies, 8-bit floats, tables, pruned weights, weights
other than float32.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from qcompiler.adapters import Additions, adapters_to_inputs, merge_adapter
from qcompiler.blocks import plan_blocks, split_rows
from qcompiler.checkpoints import Periodic, digest_of
from qcompiler.config import CompileConfig
from qcompiler.errors import CalibrationError, SchemeError
from qcompiler.extras import require_torch
from qcompiler.graph import Site
from qcompiler.passes.base import (
    WEIGHTS,
    QuantPass,
    QuantPassResult,
    Stage,
    check_options,
    planned_sites,
    scheme_text,
)
from qcompiler.records import SiteRecord
from qcompiler.scratch import Scratch
from qcompiler.segments import Segment, constants_of, whole_model
from qcompiler.sites import find_sites
from qcompiler.waypoints import Waypoints

if TYPE_CHECKING:
    from qcompiler.tuning import Lessons, Method, Settings, Student

__all__ = ["Tune"]

logger = logging.getLogger(__name__)

# Between two checkpoints of the descent.
_SECONDS = 60.0
_CHOICES = {
    "optimizer": ("adamw", "sgd"),
    "schedule": ("cosine", "linear", "constant"),
    "loss": ("auto", "kl", "mse", "labels", "next"),
    "precision": ("auto", "float32", "bfloat16"),
    "device": ("auto", "cpu", "cuda"),
    "export": ("nodes", "adapter", "merged"),
}


@dataclass(frozen=True)
class Options:
    """Options of `tune`."""

    method: str = field(default="lsq", metadata={"help": "how gradients go through what is quantized"})
    steps: int = field(default=200, metadata={"help": "steps of descent"})
    minutes: float = field(default=0.0, metadata={"help": "as many steps as this takes, judged by the first ones"})
    rows: int = field(default=0, metadata={"help": "rows to learn from; 0: those that all passes see (--samples)"})
    batch: int = field(default=0, metadata={"help": "rows in a step; 0: 1 of token ids, else 32"})
    accumulate: int = field(default=1, metadata={"help": "batches whose gradients make a step"})
    rate: float = field(default=0.01, metadata={"help": "first step of weights, in codes; for sgd a factor of slopes"})
    scale_rate: float = field(default=0.0005, metadata={"help": "first step of scales, as a part of each"})
    vector_rate: float = field(
        default=0.001, metadata={"help": "first step of gains and biases, as a part of each, and of what is added"}
    )
    warmup: float = field(default=0.1, metadata={"help": "share of the steps in which rates rise from zero"})
    momentum: float = field(default=0.9, metadata={"help": "share of the direction kept from step to step"})
    decay: float = field(default=0.0, metadata={"help": "share of a weight that the first step takes off"})
    optimizer: str = field(default="adamw", metadata={"help": "adamw or sgd"})
    schedule: str = field(default="cosine", metadata={"help": "how rates fall: cosine, linear or constant"})
    loss: str = field(default="auto", metadata={"help": "kl, mse, labels or next; auto: labels where there are any"})
    held_out: int = field(default=2, metadata={"help": "batches that are not learned from, to judge by"})
    check: int = field(default=0, metadata={"help": "steps between looks at these; 0: only at the end"})
    patience: int = field(default=3, metadata={"help": "looks without a better result after which descent stops"})
    rank: int = field(default=16, metadata={"help": "of the adapters of qlora"})
    export: str = field(default="nodes", metadata={"help": "what adapters become: nodes, adapter or merged"})
    precision: str = field(
        default="auto",
        metadata={"help": "of descent; auto: bfloat16 if fast and no activation has codes"},
    )
    device: str = field(default="auto", metadata={"help": "cpu or cuda; auto: where --provider computes"})

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        least = {"steps": 1, "rows": 0, "batch": 0, "accumulate": 1, "rank": 1}
        least |= {"held_out": 1, "check": 0, "patience": 0}
        shares = ("rate", "scale_rate", "vector_rate", "warmup", "momentum", "decay")
        if self.minutes < 0:
            raise SchemeError(f"pass tune: minutes={self.minutes:g} has to be positive, or 0 for a number of steps")
        check_options("tune", self, least=least, shares=shares, choices=_CHOICES)


class Tune(QuantPass):
    """Trains what the passes before have quantized."""

    name = "tune"
    stage = Stage.QUANTIZE
    after = (WEIGHTS, "double_quantize", "insert_qdq", "insert_dynamic")
    paper = "see `qcompiler.tuning`"
    needs_calibration = True
    Options = Options

    def call(self, model: ir.Model) -> QuantPassResult:
        """Train, and keep the result if it is better on rows that were held out."""
        require_torch(self.name, "or leave the training out")
        from qcompiler.tuning import METHODS, addition_problem, tuning_problem

        if self.options.method not in METHODS:
            raise SchemeError(f"pass tune: method={self.options.method} is unknown; choose one of {', '.join(METHODS)}")
        method = METHODS[self.options.method]
        problems = {}
        for site in planned_sites(model):
            found = addition_problem(site) if method.weights is None else tuning_problem(site, whole=True)
            problems[site] = found or self._wrong_format(site, method)
        records = [self._skipped(site, problem) for site, problem in problems.items() if problem]
        sites = [site for site, problem in problems.items() if not problem]
        if not sites:
            return QuantPassResult(model, False, tuple(records))
        added = Additions.of(sites, method.adds, self.options.rank, self.context.config.seed, self.name)
        with Scratch(_share(self.context.config)) as scratch:
            records += self._train(model, sites, scratch, added)
        return QuantPassResult(model, any(each.action != "skipped" for each in records), tuple(records))

    def _train(self, model: ir.Model, sites: Sequence[Site], scratch: Scratch, added: Additions) -> list[SiteRecord]:
        from qcompiler.tuning import LOSSES, METHODS, Student, distill, put_back_all

        method, options = METHODS[self.options.method], self.options
        blocks = self._blocks(model, sites)
        data = self._data()
        name = self._loss(model, blocks, data.labels)
        settings = self._settings(model)
        seed, constants = self.context.config.seed, added.constants
        student = Student.of(
            model, sites, blocks, method, LOSSES[name], self._direction(), settings.dtype, seed, constants
        ).to(settings.place)
        learn, judge = self._lessons(student, LOSSES[name].taught, data, scratch, settings)
        if self.options.minutes:
            settings = replace(settings, steps=self._steps(student, learn, settings))
        key = self._key(model, name, settings, data)
        store = self.context.checkpoints
        state = Periodic(store, digest_of("state", key), _SECONDS) if store is not None else None

        def train() -> dict[str, np.ndarray]:
            before, after = distill(
                student.stages,
                student.head,
                learn,
                judge,
                settings,
                lambda done, total, loss: self.context.tick(f"{self.name}, loss {loss:.3g}", done, total),
                state,
            )
            return {**student.arrays(), "before": np.array(before), "after": np.array(after)}

        made = self.context.remember(self.name, len(sites), lambda: key, train)
        if state is not None:
            state.drop()
        before, after = float(made["before"]), float(made["after"])
        figures = {"loss_before": before, "loss_after": after}
        logger.info("tune: %s: loss on held-out rows %.4g, was %.4g", options.method, after, before)
        if not after < before:
            added.remove()
            remark = f"training did not lower the loss on held-out rows ({before:.4g}, {after:.4g}); kept as it was"
            return [SiteRecord(site.name, "skipped", scheme_text(site), remark, figures) for site in sites]
        each = put_back_all(model, made, [site for site, _ in student.weights], self.name)
        how = f"trained by {options.method}, {settings.steps} steps, {LOSSES[name].unit} {before:.4g} -> {after:.4g}"
        if added.branches:
            how += self._export(model, added)
            return [SiteRecord(site.name, "quantized", scheme_text(site), how, figures) for site, _ in added.branches]
        records = [SiteRecord(s.name, "quantized", scheme_text(s), how, {**f, **figures}) for s, f in each.items()]
        records += [SiteRecord(vector.name, "scaled", "", how, figures) for vector in student.vectors]
        return records + [SiteRecord(v.name or "", "activation", "", f"scale {how}") for v, _ in student.scales]

    def _export(self, model: ir.Model, added: Additions) -> str:
        """Leave the adapters in the form that is asked for; returns what to say of it."""
        if self.options.export == "merged":
            for site, branch in added.branches:
                merge_adapter(site, branch, self.name)
            return ", then merged into the weights and rounded"
        if self.options.export == "adapter":
            self.context.artifacts["onnx_adapter"] = adapters_to_inputs(model, [branch for _, branch in added.branches])
            return ", in an adapter of its own"
        return ", as nodes"

    def _steps(self, student: "Student", learn: "Lessons", settings: "Settings") -> int:
        """How many steps the minutes hold; what is written into the recipe holds as many without a clock."""
        from qcompiler.tuning import time_of_step

        seconds = time_of_step(student.stages, student.head, learn, settings)
        steps = max(1, int(60 * self.options.minutes / seconds))
        logger.info("tune: %.2f s a step, so %d steps in %g minutes", seconds, steps, self.options.minutes)
        chosen = {**{f.name: getattr(self.options, f.name) for f in fields(Options)}, "steps": steps, "minutes": 0.0}
        self.context.settled[self.name] = str(Tune(self.context, {k: str(v) for k, v in chosen.items()}))
        return steps

    def _blocks(self, model: ir.Model, sites: Sequence[Site]) -> list[Segment]:
        """The blocks of a language model whose head is not trained; none for any other model."""
        from qcompiler.tuning import whole_problem

        linear = [site for site in find_sites(model)[0] if not site.nested and site.role != "embedding"]
        if not any(site.role == "lm_head" for site in linear) or any(site.role == "lm_head" for site in sites):
            return []
        blocks = plan_blocks(model, linear, self.context.calibration.batches[0], self.context.config.provider)
        return [] if whole_problem(model, blocks) else blocks

    def _data(self) -> Any:
        """What is learned from, read once."""
        if self.context.calibration is None:
            raise CalibrationError("tune learns from data; give --calibration PATH")
        if self.options.rows and self.context.more is not None:
            return self.context.more(self.options.rows)
        return self.context.calibration

    def _loss(self, model: ir.Model, blocks: Sequence[Segment], labels: np.ndarray | None) -> str:
        """The name of the loss."""
        chosen = str(self.options.loss)
        if chosen == "labels" and labels is None:
            raise CalibrationError("pass tune: loss=labels needs labels; give --labels FILE.npy")
        if chosen != "auto":
            return chosen
        if labels is not None:
            return "labels"
        ranks = {len(value.shape) for value in model.graph.outputs if value.shape is not None}
        return "kl" if blocks or ranks == {2} else "mse"

    def _lessons(
        self, student: "Student", taught: bool, data: Any, scratch: Scratch, settings: "Settings"
    ) -> "tuple[Lessons, Lessons]":
        """What to learn from, and what to judge by."""
        from qcompiler.tuning import Lessons, row_batches

        rows = [row for feeds in data.batches for row in split_rows(feeds)]
        tokens = bool(rows) and all(np.issubdtype(array.dtype, np.integer) for array in rows[0].values())
        batches = row_batches(rows, self.options.batch or (1 if tokens else 32), self.context.config.seed)
        if len(batches) <= self.options.held_out:
            raise CalibrationError(
                f"tune needs more than {self.options.held_out} batches of calibration data, as many of which it judges "
                f"by, and got {len(batches)}; give --calibration PATH with more rows, or tune{{held_out=1,batch=...}}"
            )
        apart = len(batches) - self.options.held_out
        found = []
        # What is learned from is as exact as descent is, what is judged by is exact.
        for part, how in ((batches[:apart], settings), (batches[apart:], None)):
            teacher = partial(student.answers, settings=how) if taught else None
            found.append(Lessons(rows, part, data.labels, teacher, scratch))
        return found[0], found[1]

    def _settings(self, model: ir.Model) -> "Settings":
        from qcompiler.tuning import Settings, fast_bfloat16, find_device

        o = self.options
        device = find_device(o.device, self.context.config.provider).type
        # bfloat16 has 8 bits of mantissa: codes of activations would come out as others than in float32.
        codes = any(node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear") for node in model.graph)
        fast = o.precision == "bfloat16" or (o.precision == "auto" and not codes and fast_bfloat16(device))
        return Settings(
            o.steps, o.accumulate, o.rate, o.scale_rate, o.momentum, self.context.config.seed, self.context.threads,
            fast, o.schedule, o.decay, o.optimizer == "adamw", o.check, o.patience, o.vector_rate,
            o.warmup, device,
        )  # fmt: skip

    def _direction(self) -> type:
        from qcompiler.tuning import Adam, Momentum

        return Adam if self.options.optimizer == "adamw" else Momentum

    def _key(self, model: ir.Model, loss: str, settings: "Settings", data: Any) -> str:
        """The hash of everything that the result follows from; empty without a folder of checkpoints."""
        store = self.context.checkpoints
        if store is None:
            return ""
        points = Waypoints(store, model, data.batches, self.context.config.provider, 1)
        tensors = [site.quantized for site in planned_sites(model) if site.quantized is not None]
        originals = [digest_of(each.meta["original"].numpy()) for each in tensors if "original" in each.meta]
        parts = str(self), loss, replace(settings, threads=1), data.labels, originals
        return str(points.segment(whole_model(model), [constants_of(list(model.graph))], *parts))

    def _wrong_format(self, site: Site, method: "Method") -> str:
        """Why a site's codes cannot hold what the method makes of weights, or nothing."""
        if site.quantized is None:
            return ""
        spec, name = site.quantized.spec, self.options.method
        if method.formats == "ternary" and not (spec.bits == 2 and spec.symmetric):
            return f"{name} makes weights of two or three values; give it a scheme w1.58"
        if method.formats == "wide" and spec.bits not in (4, 8):
            return f"{name} has two levels, which codes of 4 or 8 bits hold; give it w8 or w4"
        if method.adds == "adapters" and self.options.export == "merged":
            if spec.vector or spec.fp8:
                return "adapters are merged into integer codes alone; take export=nodes or export=adapter"
            if "original" not in site.quantized.meta:
                return "its float weight is gone, into which its adapter would be merged"
        return ""

    def _skipped(self, site: Site, problem: str) -> SiteRecord:
        return SiteRecord(site.name, "skipped", scheme_text(site), f"not trained: {problem}")


def _share(config: CompileConfig) -> int | None:
    return config.max_memory // 4 if config.max_memory else None
