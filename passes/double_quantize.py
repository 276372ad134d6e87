"""Double quantization: scales of weights become codes of 8 bits, with one step for each row.

Dettmers et al. 2023, "QLoRA", arXiv:2305.14314, section 3; see `numerics.double_scales`. In groups of 64 a float32
scale costs half a bit for each weight, in groups of 32 a whole one; two thirds of that are saved. The file holds
the codes, a Cast and a product with the steps, which ONNX Runtime folds when it loads the model, so that it runs as
ever.

1. It runs behind what chooses codes and grids, and in front of the training, which learns scales of this form.
2. A weight stays as it is, with the reason, where its rows have one scale, where scales have 16 bits already, in
   integer operators and `--format qdq`, whose operators want scales as constants, and where the codes would cost it
   accuracy: rows whose scales differ by more than 8 bits can tell, and weights of 8 bits.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from qcompiler.graph import PASS_KEY, Site, original_weight
from qcompiler.numerics.affine import Grid, stored_scale
from qcompiler.numerics.metrics import sqnr_db
from qcompiler.passes.base import (
    WEIGHTS,
    QuantPass,
    QuantPassResult,
    Stage,
    check_options,
    explicit_activations,
    planned_sites,
    scheme_text,
)
from qcompiler.quantized import QuantizedTensor
from qcompiler.records import SiteRecord

__all__ = ["DoubleQuantize"]


@dataclass(frozen=True)
class Options:
    """Options of `double_quantize`."""

    loss: float = field(default=0.1, metadata={"help": "decibels of a weight's accuracy that codes of scales may cost"})

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        check_options("double_quantize", self, least={"loss": 0})


class DoubleQuantize(QuantPass):
    """Gives quantized weights scales of 8 bits."""

    name = "double_quantize"
    stage = Stage.QUANTIZE
    after = (WEIGHTS, "low_rank")
    paper = "Dettmers et al. 2023, arXiv:2305.14314"
    Options = Options

    def call(self, model: ir.Model) -> QuantPassResult:
        """Look at every quantized weight once."""
        records = [self._compress(site, site.quantized) for site in planned_sites(model) if site.quantized is not None]
        return QuantPassResult(model, any(each.action == "quantized" for each in records), tuple(records))

    def _compress(self, site: Site, tensor: QuantizedTensor) -> SiteRecord:
        text = scheme_text(site)
        if problem := self._problem(site, tensor):
            return SiteRecord(site.name, "skipped", text, f"scales as they were: {problem}")
        spec = replace(tensor.spec, double=True)
        scale = stored_scale(tensor.scale, spec)
        grid = Grid(scale, np.zeros_like(scale) if tensor.zero_point is None else tensor.zero_point)
        exact = original_weight(site)
        before = sqnr_db(exact, tensor.dequantized())
        made = QuantizedTensor(
            tensor.codes(), grid, spec, layout=site.layout, dtype=site.dtype, name=tensor.name, tables=tensor.tables
        )
        after = sqnr_db(exact, made.dequantized())
        if after < before - self.options.loss:
            reason = f"they differ too much: {before:.1f} dB would become {after:.1f}"
            return SiteRecord(site.name, "skipped", text, f"scales as they were: {reason}")
        made.meta.update(tensor.meta)
        site.weight.const_value = made
        site.node.metadata_props[PASS_KEY] = self.name
        bits = spec.stored_bits(site.columns)
        remark = f"scales of 8 bits: {tensor.spec.stored_bits(site.columns):.3f} -> {bits:.3f} bits per weight"
        return SiteRecord(site.name, "quantized", text, remark, {"sqnr_db": after, "bits_per_weight": bits})

    def _problem(self, site: Site, tensor: QuantizedTensor) -> str:
        """Why the scales of a weight stay as they are, or nothing."""
        if site.nested:
            return f"inside the body of {site.nested}"
        if explicit_activations(site) is not None or self.context.config.output_format == "qdq":
            return "its operators want them as constants"
        if tensor.spec.scale_dtype != "float32" or site.dtype != ir.DataType.FLOAT:
            return "they have 16 bits already"
        if tensor.spec.groups(site.columns) < 2:
            return "there is one for each row"
        if "original" not in tensor.meta:
            return "its float weight is gone, so that nothing tells what it would cost"
        return ""
