"""Keep ONNX Runtime from fusing the residual addition into the normalization behind it, which is slow on the CPU.

1. Add -> LayerNormalization, also spelled out (ReduceMean and Sub read the sum), and the same for RMSNormalization
   (Pow or Mul, or the operator): the Add becomes a Sum of two, which computes the same and is not fused.

ONNX Runtime 1.31 makes SkipLayerNormalization of an Add that only a LayerNormalization reads; its CPU kernel takes
about seven times as long as Add and LayerNormalization by themselves (12 layers of 512 x 384 values: 18 ms instead of
2.5 ms), which shows once the products around it run on integers. Left alone: everything where activations stay float.
"""

import onnx_ir as ir

from qcompiler.config import CompileConfig
from qcompiler.graph import PASS_KEY, walk
from qcompiler.passes.base import QuantPass, QuantPassResult, Stage, quantizes_activations
from qcompiler.records import SiteRecord

__all__ = ["SplitSkipNorm"]

_NORMS = {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"}
# Beginnings of norms that are spelled out.
_PARTS = ({"ReduceMean", "Sub"}, {"Pow", "Mul"}, {"Pow", "Div"})


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
            if node.op_type == "Add" and node.domain == "" and _before_norm(node):
                node.op_type = "Sum"
                node.metadata_props[PASS_KEY] = self.name
                count += 1
        if not count:
            return QuantPassResult(model, False)
        note = f"{count} additions before normalizations written as Sum, which ONNX Runtime leaves alone"
        return QuantPassResult(model, True, (SiteRecord("model", "rewritten", reason=note),))


def _before_norm(node: ir.Node) -> bool:
    """Whether a normalization reads what an Add of two activations computes; Sum has no integers."""
    for value in (*node.inputs, *node.outputs):
        if value is None or value.const_value is not None:
            return False
        if value.dtype is not None and not value.dtype.is_floating_point():
            return False
    readers = [(user, index) for user, index in node.outputs[0].uses()]
    if any(user.op_type in _NORMS and index == 0 for user, index in readers):
        return True
    operators = {user.op_type for user, _ in readers}
    return any(part <= operators for part in _PARTS)
