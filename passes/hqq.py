"""Half-quadratic quantization: grids that fit most of the weights well and outliers badly, without any data.

Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models", mobiusml.github.io/hqq_blog; the
equations and what differs from there are in `numerics.half_quadratic`. Zero points are whole numbers here: ONNX
Runtime's CPU kernel takes 20 to 90 times as long with others.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompiler.errors import SchemeError
from qcompiler.numerics.affine import WeightSpec, clip_grid, dequantize, min_max_grid, quantize
from qcompiler.numerics.half_quadratic import HalfQuadratic, half_quadratic_grid
from qcompiler.passes.base import QuantPassResult, WeightQuantizer, assigned_sites
from qcompiler.quantized import Quantized
from qcompiler.records import SiteRecord
from qcompiler.statistics import LayerFacts

__all__ = ["Hqq"]


@dataclass(frozen=True)
class Options:
    """Options of `hqq`."""

    norm: float = field(default=0.7, metadata={"help": "power of the errors that are summed, above 0 and up to 1"})
    beta: float = field(default=10.0, metadata={"help": "how near the auxiliary variable comes to the error"})
    kappa: float = field(default=1.01, metadata={"help": "growth of beta from turn to turn"})
    iterations: int = field(default=20, metadata={"help": "most turns of a group"})
    scale: bool = field(default=True, metadata={"help": "move scales too, not zero points alone"})
    clip: bool = field(default=True, metadata={"help": "start from the grid of the least squared error too"})

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if not 0 < self.norm <= 1:
            raise SchemeError(f"pass hqq: norm={self.norm:g} is not above 0 and up to 1")
        if not (self.beta > 0 and self.kappa >= 1):
            raise SchemeError(f"pass hqq: beta={self.beta:g} and kappa={self.kappa:g} are not above 0 and at least 1")
        if self.iterations < 0:
            raise SchemeError(f"pass hqq: iterations={self.iterations} has to be at least 0")


class Hqq(WeightQuantizer):
    """Half-quadratic refinement of each group's grid.

    1. Asymmetric grids: scale and zero point move, with `scale=false` the zero point alone.
    2. Symmetric grids: the scale moves.
    3. 8-bit floats have no codes to refine for and are rounded to nearest, with a remark.
    """

    name = "hqq"
    paper = "Badri & Shaji 2023, mobiusml.github.io/hqq_blog"
    Options = Options

    def quantize(self, weight: np.ndarray, spec: WeightSpec, facts: LayerFacts | None) -> Quantized:
        """Quantize a weight ``[N, K]``; the loss is ``sum |W - Q|^norm``."""
        del facts
        options = self.options
        starts = [min_max_grid(weight, spec), *([clip_grid(weight, spec)] if options.clip else [])]
        if spec.fp8:
            return Quantized(quantize(weight, starts[-1], spec), starts[-1], "8-bit floats are rounded to nearest")
        solver = HalfQuadratic(options.norm, options.beta, options.kappa, options.iterations, options.scale)
        grid = half_quadratic_grid(weight, spec, solver, starts)
        codes = quantize(weight, grid, spec)
        error = weight - dequantize(codes, grid.scale, grid.zero_point, spec.group_size)
        return Quantized(codes, grid, "", _powers(error, options.norm), _powers(weight, options.norm))

    def call(self, model: ir.Model) -> QuantPassResult:
        """Quantize the sites, as many at a time as there are threads."""
        sites = assigned_sites(model)
        records: list[SiteRecord] = []
        with ThreadPoolExecutor(self.context.threads) as pool:
            for done, made in enumerate(pool.map(lambda site: self.quantize_sites([site], None), sites)):
                self.context.tick(self.name, done, len(sites))
                records += made
        return QuantPassResult(model, bool(records), tuple(records))


def _powers(values: np.ndarray, norm: float) -> np.ndarray:
    """``sum_k |v_k|^norm`` of each row, float64 [N]."""
    return np.asarray((np.abs(values) ** norm).sum(axis=1, dtype=np.float64))
