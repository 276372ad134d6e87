"""Drop what exporters note on nodes for debugging, where the size of the file is what counts.

1. With `--max-size`, stack traces, class hierarchies and the like are removed from every node; PyTorch's exporter
   writes some 2 kB of them on each, 4 of the 86 MB that SmolLM2-135M takes in 4 bits.

Left alone: the module paths (`pkg.torch.onnx.name_scopes`), by which sites are named, and everything where no size is
asked for.
"""

import onnx_ir as ir

from qcompiler.config import CompileConfig
from qcompiler.passes.base import QuantPass, QuantPassResult, Stage
from qcompiler.records import SiteRecord

__all__ = ["DropTraces"]

_TRACES = (
    "namespace",
    "pkg.torch.onnx.class_hierarchy",
    "pkg.torch.onnx.fx_node",
    "pkg.torch.onnx.stack_trace",
)


class DropTraces(QuantPass):
    """Removes metadata that only a debugger reads."""

    name = "drop_traces"
    stage = Stage.CANONICALIZE
    after = ("canonicalize",)

    @classmethod
    def applies(cls, config: CompileConfig) -> bool:
        """Where the files have a size to keep to."""
        return config.max_size is not None

    def call(self, model: ir.Model) -> QuantPassResult:
        """Run over all nodes."""
        saved = 0
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            for key in _TRACES:
                text = node.metadata_props.pop(key, None)
                saved += 0 if text is None else len(key) + len(text.encode())
        if not saved:
            return QuantPassResult(model, False)
        reason = f"{saved / 1e6:.2f} MB of an exporter's traces dropped, which count for --max-size"
        return QuantPassResult(model, True, (SiteRecord("model", "rewritten", reason=reason),))
