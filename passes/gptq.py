"""GPTQ: quantize column by column, letting the columns that are still free make up for the error made so far.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv:2210.17323, in the inverse-free form of LDLQ (Chee et al. 2023, arXiv:2307.13304), which gives the same codes:

    minimize  tr((W - Q) H (W - Q)^T),   H = sum over tokens of x x^T + damping,   H = A A^T with A upper triangular
    v_k = w_k + sum_{j<k} (w_j - q_j) A_jk / A_kk,   q_k = round_to_grid(v_k)
    loss = sum_k A_kk^2 |v_k - q_k|^2   (exact)

Columns are visited in the order of falling diag(H) ("act-order") while the groups and their grids stay where they are
("static groups"), so the result needs no reordering at run time. The grids are searched with errors weighted by
diag(H), on scales that are already rounded to the dtype they are stored in. Columns that never fire (H_jj = 0) keep
their round-to-nearest codes.

With `drift`, the layers before are made up for too ("asymmetric calibration": Li et al. 2025, arXiv:2504.02692). Wanted
is the product of the float weight with the float model's activation x_f, and the sweep starts from what is next to it
in the quantized model, W + drift W D H^-1 with D = sum (x_f - x) x^T, in the place of W (see `second_order.shift`).
What the product is added to, as the residual stream behind attention, has moved away from the float model too, and that
is made up for with it. How much of either holds on batches that it was not found on is measured, and no more is taken.
That runs the float model beside, which takes twice the time and memory of calibration.

With `guided`, what counts is not the error of each product but what becomes of it in the model's answer: tokens count
by the gradients g that arrive at the layer's output (Kim et al. 2025, arXiv:2505.07004), and rows are related by G, the
sum of g g^T (Tseng et al. 2025, arXiv:2505.22988; see `numerics.coupled` and `tuning.fisher`):

    minimize  tr((W - Q) H (W - Q)^T G),   H = sum over tokens of |g|^2 x x^T

(and 2/5 of H with all tokens counting the same: few of them would make up most of it).
The gradients are those of the model as it is when the pass begins, for one pass forward and back in PyTorch.

Shapes: W, Q ``[N, K]``; H ``[K, K]``; scale, zero point ``[N, G]``.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from qcompiler.errors import SchemeError
from qcompiler.extras import require_torch
from qcompiler.graph import Site
from qcompiler.guidance import Guidance, guidance
from qcompiler.numerics.affine import Grid, WeightSpec, clip_grid, dequantize, min_max_grid, quantize
from qcompiler.numerics.coupled import descend_coupled, refit_coupled, sweep_coupled
from qcompiler.numerics.second_order import (
    damped,
    descend,
    refit_scales,
    row_losses,
    sweep,
    sweep_groups,
)
from qcompiler.passes.base import QuantPassResult, streaming
from qcompiler.passes.base_segments import MAX_DAMPING, SegmentPass, factor_of, made_up, unfactored
from qcompiler.quantized import Quantized
from qcompiler.statistics import LayerFacts

__all__ = ["Gptq"]

# Rows of a weight that are worked on at a time where they can be: whole heads of any usual size.
_ROWS = 8192


@dataclass(frozen=True)
class Options:
    """Options of `gptq`."""

    percdamp: float = field(default=0.05, metadata={"help": "damping, as a fraction of diag(H)"})
    act_order: bool = field(default=True, metadata={"help": "visit columns in the order of falling diag(H)"})
    clip: bool = field(default=True, metadata={"help": "search clipped grids, errors weighted by diag(H)"})
    refine: int = field(default=0, metadata={"help": "rounds of scale refit and coordinate descent after the sweep"})
    lazy_block: int = field(default=128, metadata={"help": "columns between two updates of the whole weight"})
    drift: float = field(
        default=0.0, metadata={"help": "share of the error of the layers before that is made up for, 0 to 1"}
    )
    guided: bool = field(
        default=False, metadata={"help": "weigh tokens and outputs by how much the model's answer hangs on them"}
    )
    draws: int = field(default=1, metadata={"help": "answers that are drawn for each row of data, where guided"})
    outdamp: float = field(default=1.0, metadata={"help": "damping of what relates outputs, as a fraction of diag(G)"})

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if not 0 <= self.percdamp <= MAX_DAMPING:
            raise SchemeError(f"pass gptq: percdamp={self.percdamp:g} is not between 0 and {MAX_DAMPING:g}")
        if self.refine < 0 or self.lazy_block < 1:
            raise SchemeError(
                f"pass gptq: refine={self.refine} and lazy_block={self.lazy_block} have to be at least 0 and 1"
            )
        if self.draws < 1 or self.outdamp <= 0:
            raise SchemeError(
                f"pass gptq: draws={self.draws} and outdamp={self.outdamp:g} have to be at least 1 and above 0"
            )
        if not 0 <= self.drift <= 1:
            raise SchemeError(f"pass gptq: drift={self.drift:g} is not between 0 and 1")


class Gptq(SegmentPass):
    """GPTQ with static groups, act-order and a diag(H)-weighted grid.

    1. A site with measured activations is swept as above; sites that read the same activation are swept together.
    2. A lookup table or a site inside a control-flow body has no Hessian: it is rounded to nearest on a clipped grid.
    3. The groups of a convolution have a Hessian each and are swept side by side.
    4. `drift` has no effect on these, nor where weights are measured on the float model (--no-sequential).
    5. Where `guided` cannot be followed, since PyTorch cannot run the model or no gradient arrives, records say so, and
       all tokens count the same.
    6. Where a scheme prunes, zeros stay zero, the others make up for that too, and outputs count as unrelated.
    7. Codes that name entries of tables are found as the pass `codebook` does, outputs being unrelated.
    8. Where the damped Hessian cannot be factored, damping grows tenfold, is reported, and past 1.0 is an error.
    """

    name = "gptq"
    paper = "Frantar et al. 2022, arXiv:2210.17323; guided: arXiv:2505.07004, arXiv:2505.22988"
    Options = Options

    guidance: Guidance | None = None

    @property
    def wants_drift(self) -> bool:
        """See `SegmentPass`."""
        return bool(self.options.drift > 0)

    def call(self, model: ir.Model) -> QuantPassResult:
        """Measure what guides, if that is wanted, then quantize; see `SegmentPass`."""
        if not self.options.guided or not len(self.context.batches):
            return super().call(model)
        require_torch("gptq{guided=true}", "or leave it out")
        context, draws = self.context, self.options.draws
        how = streaming(context, "guidance", sequential=False)
        with guidance(model, context.batches, how, draws=draws, seed=context.config.seed) as self.guidance:
            try:
                return super().call(model)
            finally:
                self.guidance = None

    def facts_of(self, sites: Sequence[Site], facts: LayerFacts | None) -> LayerFacts | None:
        """See `WeightQuantizer`."""
        guide = self.guidance
        if facts is None or guide is None or not all(guide.knows(site) for site in sites):
            return facts
        return replace(facts, curvatures=[each for site in sites for each in guide.curvatures(site)])

    def quantize(self, weight: np.ndarray, spec: WeightSpec, facts: LayerFacts | None) -> Quantized:
        """Quantize a weight ``[N, K]``."""
        threads = self.context.threads
        if spec.vector:
            return self.with_tables(weight, spec, facts, max(1, self.options.refine))
        if facts is None or spec.fp8:
            grid = clip_grid(weight, spec, threads=threads)
            remark = "8-bit floats are rounded to nearest" if spec.fp8 and facts is not None else ""
            return Quantized(quantize(weight, grid, spec, threads), grid, remark)
        if facts.hessian.ndim == 3:
            result = self._quantize_groups(weight, spec, facts.hessian)
            return replace(result, remark="; ".join(filter(None, (result.remark, self._unguided(facts, spec)))))
        if facts.curvatures is None and facts.drift is None and len(weight) > _ROWS:
            starts = range(0, len(weight), _ROWS)  # rows are unrelated, and a vocabulary has many
            return Quantized.stacked([self.quantize(weight[start : start + _ROWS], spec, facts) for start in starts])
        zeros = weight == 0 if spec.sparse else None
        related = None if spec.sparse else self._related(facts)
        weight = made_up(weight, facts, self.options.drift, self.options.percdamp)
        importance = np.diagonal(facts.hessian).astype(np.float32)
        order = np.argsort(-importance, kind="stable") if self.options.act_order else np.arange(len(importance))
        with ThreadPoolExecutor(1) as beside:  # matrix work, while the search for a grid and the sweep go on
            factored = beside.submit(factor_of, facts.hessian, order, self.options.percdamp, self.name)
            summed = beside.submit(row_losses, weight, facts.hessian.astype(np.float32))
            grid = (
                clip_grid(weight, spec, importance, threads=threads)
                if self.options.clip
                else min_max_grid(weight, spec, threads)
            )
            factor, damping = factored.result()
            codes, loss = self._swept(weight, factor, grid, spec, order, related, zeros)
            energy = summed.result()
        if self.options.refine:
            hessian = damped(facts.hessian, damping)
            codes, grid, loss = self._refined(weight, codes, hessian, grid, spec, related, zeros)
        grown = "" if damping == self.options.percdamp else f"damping grew to {damping:g}"
        return Quantized(codes, grid, "; ".join(filter(None, (grown, self._unguided(facts, spec)))), loss, energy)

    def _unguided(self, facts: LayerFacts, spec: WeightSpec) -> str:
        """Why a site is not guided, where that was wanted; empty if it is."""
        if self.guidance is not None and spec.sparse:
            return "not guided: its values are pruned"
        if self.guidance is None:
            return "not guided: there is no data" if self.options.guided else ""
        if facts.curvatures is not None:
            return ""
        return f"not guided: {self.guidance.problem or 'no gradient of the answer is known there'}"

    def _swept(
        self,
        weight: np.ndarray,
        factor: np.ndarray,
        grid: Grid,
        spec: WeightSpec,
        order: np.ndarray,
        related: list[np.ndarray] | None,
        zeros: np.ndarray | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Codes and losses, rows being related or not."""
        if related is None:
            return sweep(weight, factor, grid, spec, order, self.options.lazy_block, zeros)
        return sweep_coupled(weight, factor, related, grid, spec, order, self.options.lazy_block)

    def _related(self, facts: LayerFacts) -> list[np.ndarray] | None:
        """Damped G of the parts of a weight; None where rows are unrelated."""
        return None if facts.curvatures is None else [damped(g, self.options.outdamp) for g in facts.curvatures]

    def _quantize_groups(self, weight: np.ndarray, spec: WeightSpec, hessians: np.ndarray) -> Quantized:
        """Quantize the weight of a convolution of groups."""
        rows = len(weight) // len(hessians)
        importance = np.einsum("gkk->gk", hessians).astype(np.float32).repeat(rows, axis=0)
        grid = clip_grid(weight, spec, importance) if self.options.clip else min_max_grid(weight, spec)
        damping = self.options.percdamp
        while True:
            try:
                codes, loss, energy = sweep_groups(
                    weight, hessians, grid, spec, act_order=self.options.act_order, percdamp=damping
                )
                break
            except np.linalg.LinAlgError as error:
                tried, damping = damping, max(10 * damping, 1e-4)
                if damping > MAX_DAMPING:
                    raise unfactored(self.name, tried) from error
        if self.options.refine:
            parts = [slice(start, start + rows) for start in range(0, len(weight), rows)]
            refined = [
                self._refined(
                    weight[part],
                    codes[part],
                    damped(hessian, damping),
                    Grid(grid.scale[part], grid.zero_point[part]),
                    spec,
                )
                for part, hessian in zip(parts, hessians, strict=True)
            ]
            codes, loss = (np.concatenate([each[index] for each in refined]) for index in (0, 2))
            grid = Grid(np.concatenate([each.scale for _, each, _ in refined]), grid.zero_point)
        remark = "" if damping == self.options.percdamp else f"damping grew to {damping:g}"
        return Quantized(codes, grid, remark, loss, energy)

    def _refined(
        self,
        weight: np.ndarray,
        codes: np.ndarray,
        hessian: np.ndarray,
        grid: Grid,
        spec: WeightSpec,
        related: Sequence[np.ndarray] | None = None,
        zeros: np.ndarray | None = None,
    ) -> tuple[np.ndarray, Grid, np.ndarray]:
        """The codes, the grid and the loss of each row after the rounds of scale refit and coordinate descent."""
        hessian = hessian.astype(np.float32)
        unit = float(np.trace(hessian)) / len(hessian)
        hessian /= unit
        for _ in range(self.options.refine):
            if related is None:
                grid = refit_scales(weight, codes, hessian, grid, spec)
                codes = descend(weight, codes, hessian, grid, spec, self.options.lazy_block, zeros)
            else:
                grid = refit_coupled(weight, codes, hessian, related, grid, spec)
                codes = descend_coupled(weight, codes, hessian, related, grid, spec, self.options.lazy_block)
        error = weight - dequantize(codes, grid.scale, grid.zero_point, spec.group_size)
        return codes, grid, row_losses(error, hessian) * unit
