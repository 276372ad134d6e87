"""Round to nearest: each weight goes to the closest code of its group's grid, without any data.

Two grids: the min-max grid spans each group's values; the clipped one (`clip=true`) keeps the fraction of the range
that has the least squared rounding error.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompiler.numerics.affine import WeightSpec, clip_grid, min_max_grid, quantize
from qcompiler.passes.base import QuantPassResult, WeightQuantizer, assigned_sites
from qcompiler.quantized import Quantized
from qcompiler.records import SiteRecord
from qcompiler.statistics import LayerFacts

__all__ = ["Rtn"]


@dataclass(frozen=True)
class Options:
    """Options of `rtn`."""

    clip: bool = field(
        default=False, metadata={"help": "search the fraction of the range with the least squared error"}
    )


class Rtn(WeightQuantizer):
    """Quantizes every assigned site that is not quantized yet."""

    name = "rtn"
    Options = Options

    def quantize(self, weight: np.ndarray, spec: WeightSpec, facts: LayerFacts | None) -> Quantized:
        """Round a weight ``[N, K]`` to nearest."""
        del facts
        grid = clip_grid(weight, spec) if self.options.clip else min_max_grid(weight, spec)
        return Quantized(quantize(weight, grid, spec), grid)

    def call(self, model: ir.Model) -> QuantPassResult:
        """Quantize the sites, as many at a time as there are threads."""
        sites = assigned_sites(model)
        records: list[SiteRecord] = []
        with ThreadPoolExecutor(self.context.threads) as pool:
            for done, made in enumerate(pool.map(lambda site: self.quantize_sites([site], None), sites)):
                self.context.tick(self.name, done, len(sites))
                records += made
        return QuantPassResult(model, bool(records), tuple(records))
