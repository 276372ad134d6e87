"""Lower quantized linear sites to ONNX Runtime's MatMulNBits (com.microsoft).

1. MatMul(x, Wq) and MatMul(x, Transpose(Wq)) become MatMulNBits(x, B, scales, zero_points).
2. Gemm(x, Wq, c) likewise, with c as the bias if it is one value an output channel, else as an Add.
3. MatMul followed by nothing but an Add of a constant of N values takes it as the bias, where the target's kernels do.
4. Conv with a kernel of one: Transpose to channels-last, MatMulNBits, Add of a bias that did not go in, Transpose back.

Sites that share a weight share its B, scales and zero points. `accuracy_level` is always written; it is 4 for schemes
with 8-bit activations by blocks. Sites whose activations the graph quantizes are left to `export_qdq`, and those in
formats of our own operators to `fuse_custom`.
"""

import onnx_ir as ir

from qcompiler.config import CompileConfig
from qcompiler.graph import Site
from qcompiler.lowering import bias_of, block_constants, make_node, replace_product, width_note
from qcompiler.passes.base import QuantPass, QuantPassResult, Stage, explicit_activations, scheme_text, site_scheme
from qcompiler.quantized import QuantizedTensor
from qcompiler.records import SiteRecord
from qcompiler.sites import find_sites
from qcompiler.targets import block_size, default_accuracy_level, fuses_bias

__all__ = ["FuseMatMulNBits"]


class FuseMatMulNBits(QuantPass):
    """Rewrites every quantized linear site."""

    name = "fuse_matmul_nbits"
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
            if tensor is None or tensor.spec.stream:
                continue
            if site.role == "embedding" or explicit_activations(site) is not None:
                continue
            level = self._rewrite(site, tensor)
            note = f"MatMulNBits, block {block_size(tensor.spec, tensor.columns)}, accuracy level {level}"
            note += width_note(tensor.spec, tensor.spec.format.container)
            records.append(SiteRecord(site.name, "fused", scheme_text(site), note))
        if records:
            model.graph.opset_imports.setdefault("com.microsoft", 1)
        return QuantPassResult(model, bool(records), tuple(records))

    def _rewrite(self, site: Site, tensor: QuantizedTensor) -> int:
        config = self.context.config
        node, graph = site.node, site.node.graph
        assert graph is not None
        level = default_accuracy_level(tensor.spec.bits) if config.accuracy_level is None else config.accuracy_level
        scheme = site_scheme(site)
        if scheme is not None and scheme.activations is not None:
            level = 4
        bias, absorbed = bias_of(site, graph) if fuses_bias(config.target) else (None, None)
        attributes = {
            "K": tensor.columns,
            "N": tensor.rows,
            "bits": tensor.spec.format.container,
            "block_size": block_size(tensor.spec, tensor.columns),
            "accuracy_level": level,
        }
        inputs = [site.input, *block_constants(site), None, bias]
        fused = make_node(graph, "MatMulNBits", inputs, attributes, node, self.name, domain="com.microsoft")
        replace_product(site, fused, bias, absorbed, self.name)
        return level
