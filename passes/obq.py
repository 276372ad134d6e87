"""Optimal Brain Quantization: round the weight that costs least, let the others make up for it, and so on.

Frantar & Alistarh 2022, "Optimal Brain Compression: A Framework for Accurate Post-Training Quantization and Pruning",
arXiv:2208.11580, section 5; the equations are in `numerics.greedy`. GPTQ is the same with one order for all rows, which
makes it faster by a factor of about K; here each row takes its own, in float64. The time grows with N K^3, so this is
for small layers, and what GPTQ can be measured with. Cheapest first is not best: it leaves loud channels for the end,
when nothing is left to make up for them, and `gptq`, which takes these first, has the lower loss where some are loud.

Damping, grids and groups are those of `gptq`: H + percdamp (H_jj + mean(diag H) / 10), grids searched with errors
weighted by diag(H).
"""

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompiler.errors import NumericsError, SchemeError
from qcompiler.numerics.affine import Grid, WeightSpec, clip_grid, min_max_grid, quantize
from qcompiler.numerics.greedy import greedy_sweep
from qcompiler.numerics.second_order import damped, row_losses
from qcompiler.passes.base import QuantPassResult, assigned_sites, site_spec
from qcompiler.passes.base_segments import SegmentPass
from qcompiler.quantized import Quantized
from qcompiler.statistics import LayerFacts

__all__ = ["Obq"]


@dataclass(frozen=True)
class Options:
    """Options of `obq`."""

    percdamp: float = field(default=0.05, metadata={"help": "damping, as a fraction of diag(H)"})
    clip: bool = field(default=True, metadata={"help": "search clipped grids, errors weighted by diag(H)"})
    max_columns: int = field(default=768, metadata={"help": "widest layer that is accepted: time grows with N K^3"})

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if not 0 <= self.percdamp <= 1:
            raise SchemeError(f"pass obq: percdamp={self.percdamp:g} is not between 0 and 1")
        if self.max_columns < 1:
            raise SchemeError(f"pass obq: max_columns={self.max_columns} accepts no layer")


class Obq(SegmentPass):
    """OBQ with static groups and a diag(H)-weighted grid.

    1. A site with measured activations is rounded greedily, each row in its own order.
    2. The groups of a convolution have a Hessian each.
    3. A lookup table or a site inside a control-flow body has no Hessian: it is rounded to nearest on a clipped grid.
    4. A site with more than `max_columns` columns is an error, before anything is measured.
    5. A Hessian that cannot be inverted with the damping given is an error.
    """

    name = "obq"
    takes_tables = False
    paper = "Frantar & Alistarh 2022, arXiv:2208.11580"
    Options = Options

    def call(self, model: ir.Model) -> QuantPassResult:
        """Refuse what is too wide, then quantize as other algorithms do."""
        for site in assigned_sites(model):
            greedy = not (site.nested or site.role == "embedding" or site_spec(site, self.context.config).fp8)
            if greedy and site.columns > self.options.max_columns:
                raise SchemeError(
                    f"obq: '{site.name}' has K = {site.columns} columns, more than {self.options.max_columns}, and the "
                    f"time grows with N K^3; leave it float (--set '{site.name}=float'), allow it "
                    f"(obq{{max_columns={site.columns}}}), or use gptq"
                )
        return super().call(model)

    def quantize(self, weight: np.ndarray, spec: WeightSpec, facts: LayerFacts | None) -> Quantized:
        """Quantize a weight ``[N, K]``."""
        threads = self.context.threads
        if facts is None or spec.fp8:
            grid = clip_grid(weight, spec, threads=threads)
            remark = "8-bit floats are rounded to nearest" if spec.fp8 and facts is not None else ""
            return Quantized(quantize(weight, grid, spec, threads), grid, remark)
        hessians = facts.hessian if facts.hessian.ndim == 3 else facts.hessian[None]  # [groups, K, K]
        rows = len(weight) // len(hessians)
        importance = np.einsum("gkk->gk", hessians).astype(np.float32).repeat(rows, axis=0)
        grid = (
            clip_grid(weight, spec, importance, threads=threads)
            if self.options.clip
            else min_max_grid(weight, spec, threads)
        )
        found, energy = [], []
        for index, hessian in enumerate(hessians):
            part = slice(index * rows, (index + 1) * rows)
            damp = damped(hessian, self.options.percdamp)
            own = Grid(grid.scale[part], grid.zero_point[part])
            try:
                found.append(greedy_sweep(weight[part], damp, own, spec, threads=threads))
            except NumericsError as error:
                raise NumericsError(f"obq: with percdamp={self.options.percdamp:g} {error}") from error
            energy.append(row_losses(weight[part], hessian.astype(np.float32)))
        codes, loss = (np.concatenate([each[index] for each in found]) for index in (0, 1))
        return Quantized(codes, grid, "", loss, np.concatenate(energy))
