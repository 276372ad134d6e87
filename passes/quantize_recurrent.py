"""Run LSTMs on integers: DynamicQuantizeLSTM, which quantizes what it reads and its state at run time.

1. W and R become int8 codes ``[directions, input, 4 * hidden]``, turned over from LSTM's, with one scale for each
   output of each gate. Weights that come out of slicing, joining and reshaping constants, as exporters of PyTorch leave
   them to reorder the gates, are computed first.
2. Inside control-flow bodies too. Everything else of the node stays: bias, lengths, states, peepholes, directions.

Where a scheme with dynamic int8 activations holds for the node's name, on the CPU. Left float, with the reason: GRU and
RNN, for which ONNX Runtime has no integer kernel, and LSTMs in a form that its kernel does not take.
"""

from typing import Any

import numpy as np
import onnx_ir as ir

from qcompiler.config import CompileConfig
from qcompiler.graph import PASS_KEY, constant_array, walk
from qcompiler.lowering import add_constant
from qcompiler.numerics.affine import WeightSpec, dequantize, min_max_grid, quantize
from qcompiler.numerics.metrics import sqnr_db
from qcompiler.numerics.packing import integer_codes
from qcompiler.passes.base import QuantPass, QuantPassResult, Stage, quantizes_activations
from qcompiler.records import SiteRecord
from qcompiler.scheme import Scheme
from qcompiler.sites import node_names

__all__ = ["QuantizeRecurrent"]

_DOMAIN = "com.microsoft"
# Operators that only move values.
_MOVES = {"Cast", "Concat", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
_INPUTS = 8


class QuantizeRecurrent(QuantPass):
    """Replaces LSTM by DynamicQuantizeLSTM."""

    name = "quantize_recurrent"
    stage = Stage.LOWER
    after = ("export_qdq",)

    @classmethod
    def applies(cls, config: CompileConfig) -> bool:
        """Where a scheme has dynamic activations."""
        return quantizes_activations(config, dynamic=True)

    def call(self, model: ir.Model) -> QuantPassResult:
        """Go through the nodes in order."""
        config, records, modified = self.context.config, [], False
        for node, _ in list(walk(model.graph)):
            if node.op_type != "LSTM" or node.domain:
                continue
            names = node_names(node)
            scheme = config.plan.scheme_for("linear", names)[0]
            scheme = scheme.resolve(config.target) if scheme is not None else None
            if scheme is None or scheme.activations is None or not (scheme.spelled_out and scheme.activations.dynamic):
                continue  # the reason is known since schemes were assigned
            name = names[0] if names else node.op_type
            weights = [_constant(value, model.graph.opset_imports[""]) for value in node.inputs[1:3]]
            reason = _problem(node, weights, config.target)
            if reason:
                records.append(SiteRecord(name, "skipped", reason=reason))
                continue
            records.append(self._quantize(node, weights, name, scheme))
            modified = True
        if modified:
            model.opset_imports.setdefault(_DOMAIN, 1)
        return QuantPassResult(model, modified, tuple(records))

    def _quantize(self, node: ir.Node, weights: list[np.ndarray | None], name: str, scheme: Scheme) -> SiteRecord:
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        metrics: dict[str, float] = {}
        node.resize_inputs(_INPUTS + 4)
        for place, (letter, weight) in enumerate(zip("WR", weights, strict=True)):
            assert weight is not None
            spec = scheme.spec(weight.shape[2], "float32", reduced=self.context.config.reduce_range)
            codes, scale, quality = _codes(weight, spec)
            stem = f"{name}_{letter}"
            zeros = np.zeros(scale.shape, np.int8)
            node.replace_input_with(1 + place, add_constant(graph, f"{stem}_codes", codes))
            node.replace_input_with(_INPUTS + 2 * place, add_constant(graph, f"{stem}_scale", scale))
            node.replace_input_with(_INPUTS + 2 * place + 1, add_constant(graph, f"{stem}_zero_point", zeros))
            metrics[f"{letter.lower()}_sqnr_db"] = quality
        node.op_type, node.domain = "DynamicQuantizeLSTM", _DOMAIN
        node.attributes.pop("layout", None)
        node.metadata_props[PASS_KEY] = self.name
        metrics["sqnr_db"] = min(metrics.values())
        return SiteRecord(name, "quantized", str(scheme), "DynamicQuantizeLSTM, scaled at run time", metrics)


def _codes(weight: np.ndarray, spec: WeightSpec) -> tuple[np.ndarray, np.ndarray, float]:
    """Codes int8 [D, K, 4H] and scales [D, 4H] of a weight [D, 4H, K], and the SQNR in dB."""
    directions, gates, columns = weight.shape
    rows = np.ascontiguousarray(weight.reshape(-1, columns), np.float32)  # [D * 4H, K]
    grid = min_max_grid(rows, spec)
    codes = quantize(rows, grid, spec)
    quality = sqnr_db(rows, dequantize(codes, grid.scale, grid.zero_point, spec.group_size))
    signed = integer_codes(codes, 8, signed=True, width=8).view(np.int8).reshape(weight.shape)
    return np.ascontiguousarray(signed.transpose(0, 2, 1)), grid.scale.reshape(directions, gates), quality


def _problem(node: ir.Node, weights: list[np.ndarray | None], target: str) -> str:
    """Why an LSTM stays float; empty if it need not."""
    if target != "cpu":
        return f"ONNX Runtime has an integer LSTM for the CPU only; the target is {target}"
    layout = node.attributes.get("layout")
    if layout is not None and layout.as_int():
        return "an LSTM with layout = 1 has no integer kernel"
    for weight in weights:
        if weight is None:
            return "an LSTM whose weights are not constant has no integer kernel"
        if weight.dtype != np.float32:
            return f"an LSTM of {weight.dtype} has no integer kernel"
        if not np.isfinite(weight).all():
            return "its weights hold NaN or infinity"
    return ""


def _constant(value: ir.Value | None, opset: int) -> np.ndarray | None:
    """The array of a constant, or of one that is only moved about; None for anything else."""
    if value is None:
        return None
    if value.const_value is not None:
        return constant_array(value)
    node = value.producer()
    if node is None or node.op_type not in _MOVES or node.domain:
        return None
    arrays = {}
    for source in node.inputs:
        if source is not None:
            array = _constant(source, opset)
            if array is None or source.name is None:
                return None
            arrays[source.name] = array
    from onnx.reference import ReferenceEvaluator

    session = ReferenceEvaluator(ir.serde.serialize_node(node), opsets={"": opset})
    results: Any = session.run(None, arrays)
    return np.asarray(results[0])
