"""Quantize activations at run time: the scales are computed from what arrives.

1. Per tensor: DynamicQuantizeLinear, and a DequantizeLinear for each site that reads the value; ONNX Runtime makes
   DynamicQuantizeMatMul (one reader) or MatMulIntegerToFloat (several) of that.
2. Per token: x is divided by the largest magnitude of its token, quantized with the fixed scale 1/127 and the zero
   point 128, decoded, multiplied with the weight, and the product is multiplied by the magnitude. A row of outliers
   then costs the other rows nothing. ONNX Runtime runs the product on integers (MatMulIntegerToFloat).
3. The bias of a Gemm is added behind the product.

Sites that read the same value share its codes. Works inside control-flow bodies. No calibration data is needed.
"""

import numpy as np
import onnx_ir as ir

from qcompiler.config import CompileConfig
from qcompiler.graph import PASS_KEY, Site, unique_name
from qcompiler.lowering import add_constant, append_nodes, make_node
from qcompiler.passes.base import (
    WEIGHTS,
    QuantPass,
    QuantPassResult,
    Stage,
    explicit_activations,
    quantizes_activations,
)
from qcompiler.records import SiteRecord
from qcompiler.sites import find_sites

__all__ = ["InsertDynamic"]

# Tokens of zeros are divided by this.
_SMALLEST = 1e-30
_MIDDLE, _REACH = 128, 127


class InsertDynamic(QuantPass):
    """Inserts the operators that quantize at run time."""

    name = "insert_dynamic"
    stage = Stage.QUANTIZE
    after = (WEIGHTS, "correct_bias", "insert_qdq")

    @classmethod
    def applies(cls, config: CompileConfig) -> bool:
        """Where a scheme has dynamic activations."""
        return quantizes_activations(config, dynamic=True)

    def call(self, model: ir.Model) -> QuantPassResult:
        """Run the cases for each value that dynamic sites read."""
        groups: dict[tuple[ir.Value, ir.Graph, str], list[Site]] = {}
        for site in find_sites(model)[0]:
            activations, graph = explicit_activations(site), site.node.graph
            if activations is not None and activations.dynamic:
                assert isinstance(graph, ir.Graph)
                groups.setdefault((site.input, graph, activations.granularity or "token"), []).append(site)
        records = []
        for (_, graph, granularity), sites in groups.items():
            value = sites[0].input  # as it is now: what a site computes is scaled by a node behind it
            if granularity == "tensor":
                _per_tensor(value, graph, sites)
            else:
                _per_token(value, graph, sites, model.graph.opset_imports[""])
            records.append(SiteRecord(value.name or "", "activation", f"u8-{granularity}", "scaled at run time"))
        return QuantPassResult(model, bool(records), tuple(records))


def _per_tensor(value: ir.Value, graph: ir.Graph, sites: list[Site]) -> None:
    origin = sites[0].node
    names = [unique_name(graph, f"{value.name}_{part}") for part in ("codes", "scale", "zero_point")]
    encode = ir.node("DynamicQuantizeLinear", [value], outputs=[ir.Value(name=name) for name in names])
    encode.name = unique_name(graph, f"{origin.name or origin.op_type}_DynamicQuantizeLinear")
    encode.metadata_props[PASS_KEY] = InsertDynamic.name
    graph.insert_before(origin, encode)
    for site in sites:
        _decode(site, graph, list(encode.outputs))


def _per_token(value: ir.Value, graph: ir.Graph, sites: list[Site], opset: int) -> None:
    origin = sites[0].node
    dtype = np.float16 if sites[0].dtype == ir.DataType.FLOAT16 else np.float32

    def node(op_type: str, inputs: list[ir.Value], **attributes: object) -> ir.Value:
        made = make_node(graph, op_type, inputs, attributes, origin, InsertDynamic.name)
        graph.insert_before(origin, made)
        return made.outputs[0]

    def constant(name: str, number: float, kind: type) -> ir.Value:
        return add_constant(graph, f"{value.name}_{name}", np.asarray(number, kind))

    magnitudes = node("Abs", [value])
    if opset < 18:
        largest = node("ReduceMax", [magnitudes], axes=[-1], keepdims=1)
    else:
        axes = add_constant(graph, f"{value.name}_axes", np.array([-1], np.int64))
        largest = node("ReduceMax", [magnitudes, axes], keepdims=1)
    largest = node("Max", [largest, constant("floor", max(_SMALLEST, float(np.finfo(dtype).tiny)), dtype)])
    parameters = [constant("scale", 1 / _REACH, dtype), constant("zero_point", _MIDDLE, np.uint8)]
    codes = node("QuantizeLinear", [node("Div", [value, largest]), *parameters])
    for site in sites:
        _decode(site, graph, [codes, *parameters])
        behind = [make_node(graph, "Mul", [site.node.outputs[0], largest], {}, site.node, InsertDynamic.name)]
        if len(site.node.inputs) > 2 and site.node.inputs[2] is not None:
            inputs = [behind[0].outputs[0], site.node.inputs[2]]
            behind.append(make_node(graph, "Add", inputs, {}, site.node, InsertDynamic.name))
            site.node.resize_inputs(2)
        append_nodes(graph, site.node, behind)


def _decode(site: Site, graph: ir.Graph, inputs: list[ir.Value]) -> None:
    """Let the site read its activation through a decoder of its own."""
    decode = make_node(graph, "DequantizeLinear", inputs, {}, site.node, InsertDynamic.name)
    decode.outputs[0].type, decode.outputs[0].shape = site.input.type, site.input.shape
    graph.insert_before(site.node, decode)
    site.node.replace_input_with(0, decode.outputs[0])
