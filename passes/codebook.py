"""Weights as entries of learned tables, for schemes with `-lut`, `-vq2` or `-vq4` that another algorithm leaves alone.

A code of 3, 4 or 8 bits names an entry of a table that some rows of a weight share: a value for one column, or a vector
for 2 or 4 columns that follow one another. See `numerics.codebooks`.

1. Scales begin as the values of largest magnitude of each group, with their signs.
2. Tables are found by k-means over the weight in its scales, errors weighted by diag(H), and scales are searched for
   that suit the tables, in turns.
3. Codes are found as GPTQ does, d columns at a time: the error of each goes to those that are still to come.
4. Small tables are solved for with these codes, all correlations of columns included, and the codes found anew;
   `rounds` of this, of which the best is kept.
5. As with `gptq{drift}`, weights make up for what quantized layers before did to the activations.
6. Without data all columns count the same, and codes are the nearest entries.

The pass `gptq` does the same where it is the algorithm, in one go with the weights of other formats.
"""

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompiler.config import CompileConfig
from qcompiler.errors import SchemeError
from qcompiler.graph import Site
from qcompiler.numerics.affine import WeightSpec
from qcompiler.passes.base import QuantPassResult, assigned_sites, site_scheme
from qcompiler.passes.base_segments import SegmentPass
from qcompiler.quantized import Quantized
from qcompiler.statistics import LayerFacts

__all__ = ["Codebook"]


@dataclass(frozen=True)
class Options:
    """Options of `codebook`."""

    percdamp: float = field(default=0.05, metadata={"help": "damping, as a fraction of diag(H)"})
    rounds: int = field(default=1, metadata={"help": "times that tables are solved for and codes found anew"})
    drift: float = field(
        default=0.5, metadata={"help": "share of the error of the layers before that is made up for, 0 to 1"}
    )

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if self.rounds < 0:
            raise SchemeError(f"pass codebook: rounds={self.rounds} has to be at least 0")
        for name in ("percdamp", "drift"):
            if not 0 <= getattr(self, name) <= 1:
                raise SchemeError(f"pass codebook: {name}={getattr(self, name):g} is not between 0 and 1")


class Codebook(SegmentPass):
    """Finds tables and codes for the sites whose schemes ask for tables; other algorithms take the rest."""

    name = "codebook"
    paper = "van Baalen et al. 2024, arXiv:2402.15319; Kim et al. 2023, arXiv:2306.07629"
    Options = Options
    needs_calibration = False
    takes_tables = False

    @property
    def wants_drift(self) -> bool:
        """See `SegmentPass`."""
        return bool(self.options.drift > 0)

    @classmethod
    def applies(cls, config: CompileConfig) -> bool:
        """Where a scheme asks for tables, or a budget may choose them, and the algorithm does not know of them."""
        if any(text.partition("{")[0].strip() == "gptq" for text in config.algorithms):
            return False
        chosen = bool(config.budgets) and config.own_operators
        return chosen or any(scheme.vector for scheme in config.plan.schemes)

    def sites(self, model: ir.Model) -> list[Site]:
        """The sites whose schemes ask for tables."""
        return [site for site in assigned_sites(model) if (scheme := site_scheme(site)) is not None and scheme.vector]

    def call(self, model: ir.Model) -> QuantPassResult:
        """Quantize, on data where there are some."""
        if len(self.context.batches) or self.context.config.from_norms:
            return super().call(model)
        records = [record for site in self.sites(model) for record in self.quantize_sites([site], None, "no data")]
        return QuantPassResult(model, bool(records), tuple(records))

    def quantize(self, weight: np.ndarray, spec: WeightSpec, facts: LayerFacts | None) -> Quantized:
        """Quantize a weight ``[N, K]``."""
        return self.with_tables(weight, spec, facts, self.options.rounds)
