"""Lower quantized linear sites to ONNX Runtime's MatMulNBits (com.microsoft).

1. MatMul(x, Wq) and MatMul(x, Transpose(Wq)) become MatMulNBits(x, B, scales, zero_points).
2. Gemm(x, Wq, c) likewise, with c as the bias if it is one value an output channel, else as an Add.
3. MatMul followed by nothing but an Add of a constant of N values takes it as the bias, where the target's kernels do.
4. Conv with a kernel of one: Transpose to channels-last, MatMulNBits, Add of a bias that did not go in, Transpose back.

Sites that share a weight share its B, scales and zero points. `accuracy_level` is always written; it is 4 for schemes
with 8-bit activations by blocks. Sites whose activations the graph quantizes are left to `export_qdq`.
"""

import onnx_ir as ir

from qcompiler.config import CompileConfig
from qcompiler.graph import Site
from qcompiler.lowering import block_constants, make_node, replace_nodes, width_note
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
            if tensor is None or site.role == "embedding" or explicit_activations(site) is not None:
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
        bias, absorbed = _bias(site, graph) if fuses_bias(config.target) else (None, None)
        attributes = {
            "K": tensor.columns,
            "N": tensor.rows,
            "bits": tensor.spec.format.container,
            "block_size": block_size(tensor.spec, tensor.columns),
            "accuracy_level": level,
        }
        inputs = [site.input, *block_constants(site), None, bias]
        fused = make_node(graph, "MatMulNBits", inputs, attributes, node, self.name, domain="com.microsoft")
        new = [fused]
        extra = node.inputs[2] if len(node.inputs) > 2 else None
        if extra is not None and bias is None:
            new.append(make_node(graph, "Add", [fused.outputs[0], extra], {}, node, self.name))
        if node.op_type == "Conv":
            new = _channels_last(graph, node, new, self.name)
        replace_nodes(graph, [node] if absorbed is None else [absorbed, node], new, new[-1].outputs[0])
        return level


def _bias(site: Site, graph: ir.Graph) -> tuple[ir.Value | None, ir.Node | None]:
    """A bias [N] that the kernel can add, and the Add node it came from if it is not the site's own input."""
    own = site.node.inputs[2] if len(site.node.inputs) > 2 else None
    if site.node.op_type in ("Gemm", "Conv"):
        return (own, None) if own is not None and _is_vector(own, site) else (None, None)
    output = site.node.outputs[0]
    users = list(output.uses())
    if (
        len(users) != 1
        or output.is_graph_output()
        or users[0].node.op_type != "Add"
        or users[0].node.graph is not graph
    ):
        return None, None
    add = users[0].node
    other = add.inputs[1 - users[0].idx]
    return (other, add) if other is not None and _is_vector(other, site) else (None, None)


def _is_vector(value: ir.Value, site: Site) -> bool:
    tensor = value.const_value
    return tensor is not None and tuple(tensor.shape.numpy()) == (site.rows,) and tensor.dtype == site.dtype


def _channels_last(graph: ir.Graph, node: ir.Node, new: list[ir.Node], pass_name: str) -> list[ir.Node]:
    """The new nodes of a convolution with Transposes around them, so that the channels are their last axis."""
    weight = node.inputs[1]
    assert weight is not None and weight.const_value is not None
    rank = weight.const_value.shape.rank()
    there, back = [0, *range(2, rank), 1], [0, rank - 1, *range(1, rank - 1)]
    before = make_node(graph, "Transpose", [node.inputs[0]], {"perm": there}, node, pass_name)
    new[0].replace_input_with(0, before.outputs[0])
    return [before, *new, make_node(graph, "Transpose", [new[-1].outputs[0]], {"perm": back}, node, pass_name)]
