"""Keep ONNX Runtime from fusing the residual addition into the normalization behind it, which is slow on the CPU.

1. Add -> LayerNormalization, also spelled out (ReduceMean and Sub read the sum): the Add becomes a Sum of two, which
   computes the same and is not fused.

ONNX Runtime 1.31 makes SkipLayerNormalization of an Add of two tensors [B, S, K] that nothing but one
LayerNormalization reads; its CPU kernel takes about seven times as long as Add and LayerNormalization by themselves (12
layers of 512 x 384 values: 18 ms instead of 2.5 ms), which shows once the products around it run on integers. Left
alone, as ONNX Runtime does: sums that something else reads too (the residual stream of a model that normalizes in front
of its layers), broadcasting, other ranks, RMSNormalization; and everything where activations stay float.
"""

import onnx_ir as ir

from qcompiler.config import CompileConfig
from qcompiler.graph import PASS_KEY, walk
from qcompiler.passes.base import QuantPass, QuantPassResult, Stage, quantizes_activations
from qcompiler.records import SiteRecord

__all__ = ["SplitSkipNorm"]

# The beginning of a normalization that is spelled out.
_SPELLED_OUT = {"ReduceMean", "Sub"}
_RANK = 3
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


class SplitSkipNorm(QuantPass):
    """Writes residual additions as Sum."""

    name = "split_skip_norm"
    stage = Stage.CLEANUP

    @classmethod
    def applies(cls, config: CompileConfig) -> bool:
        """For the CPU, where a scheme quantizes activations."""
        return config.target == "cpu" and quantizes_activations(config)

    def call(self, model: ir.Model) -> QuantPassResult:
        """Rewrite every such Add."""
        count = 0
        for node, _ in walk(model.graph):
            if node.op_type == "Add" and node.domain == "" and _alike(*node.inputs) and _before_norm(node.outputs[0]):
                node.op_type = "Sum"
                node.metadata_props[PASS_KEY] = self.name
                count += 1
        if not count:
            return QuantPassResult(model, False)
        note = f"{count} additions before normalizations written as Sum, which ONNX Runtime leaves alone"
        return QuantPassResult(model, True, (SiteRecord("model", "rewritten", reason=note),))


def _alike(first: ir.Value | None, second: ir.Value | None) -> bool:
    """Whether two values may be floats of one shape of three axes, as far as the model says."""
    values = [value for value in (first, second) if value is not None]
    if any(value.dtype not in (None, *_FLOATS) for value in values):
        return False
    shapes = [value.shape for value in values if value.shape is not None]
    if any(shape.rank() != _RANK for shape in shapes):
        return False
    return all(_equal(*sizes) for sizes in zip(*shapes, strict=True)) if len(shapes) > 1 else True


def _equal(first: int | ir.SymbolicDim, second: int | ir.SymbolicDim) -> bool:
    """Whether two sizes may be equal; one without a name or a number may be anything."""
    sizes = {size.value if isinstance(size, ir.SymbolicDim) else size for size in (first, second)} - {None}
    return len(sizes) < 2


def _before_norm(total: ir.Value) -> bool:
    """Whether nothing but one normalization reads a sum."""
    if total.is_graph_output():
        return False
    readers = [(user.op_type, index) for user, index in total.uses()]
    return readers == [("LayerNormalization", 0)] or {operator for operator, _ in readers} == _SPELLED_OUT
