"""Lower quantized lookup tables to ONNX Runtime's GatherBlockQuantized (com.microsoft).

1. Gather(Wq, indices) and Gather(Transpose(Wq), indices) on axis 0 become GatherBlockQuantized(table, indices, scales,
   zero_points).
2. Where the last block of a row is padded, a Slice cuts the looked-up rows to K.

A table that is also the weight of the final projection keeps one copy of codes, scales and zero points.
"""

import numpy as np
import onnx_ir as ir

from qcompiler.config import CompileConfig
from qcompiler.graph import Site
from qcompiler.lowering import add_constant, block_constants, make_node, replace_nodes, width_note
from qcompiler.passes.base import QuantPass, QuantPassResult, Stage, scheme_text
from qcompiler.quantized import QuantizedTensor
from qcompiler.records import SiteRecord
from qcompiler.sites import find_sites
from qcompiler.targets import block_size

__all__ = ["FuseGather"]


class FuseGather(QuantPass):
    """Rewrites every quantized lookup table."""

    name = "fuse_gather"
    stage = Stage.LOWER

    @classmethod
    def applies(cls, config: CompileConfig) -> bool:
        """For the output form MatMulNBits."""
        return config.output_format == "matmulnbits"

    def call(self, model: ir.Model) -> QuantPassResult:
        """Rewrite site by site."""
        records = []
        for site in find_sites(model)[0]:
            tensor = site.quantized
            if tensor is None or site.role != "embedding":
                continue
            self._rewrite(site, tensor)
            note = f"GatherBlockQuantized, block {block_size(tensor.spec, tensor.columns)}"
            note += width_note(tensor.spec, tensor.spec.format.container)
            records.append(SiteRecord(site.name, "fused", scheme_text(site), note))
        if records:
            model.graph.opset_imports.setdefault("com.microsoft", 1)
        return QuantPassResult(model, bool(records), tuple(records))

    def _rewrite(self, site: Site, tensor: QuantizedTensor) -> None:
        node, graph = site.node, site.node.graph
        assert graph is not None
        size = block_size(tensor.spec, tensor.columns)
        width = tensor.spec.format.container
        attributes = {"bits": width, "block_size": size, "gather_axis": 0, "quantize_axis": 1}
        table, scales, zero_points = block_constants(site, flat=True)
        inputs = [table, site.input, scales, zero_points]
        new = [make_node(graph, "GatherBlockQuantized", inputs, attributes, node, self.name, domain="com.microsoft")]
        if tensor.columns % size:
            ends = [add_constant(graph, f"{site.weight.name}_{n}", np.array([v], np.int64)) for n, v in
                    (("start", 0), ("end", tensor.columns), ("axis", -1))]  # fmt: skip
            new.append(make_node(graph, "Slice", [new[0].outputs[0], *ends], {}, node, self.name))
        replace_nodes(graph, [node], new, new[-1].outputs[0])
