"""Lower weights in formats that ONNX Runtime has no kernels for to the operators of `ai.qcompiler`.

1. MatMul(x, Wq) and MatMul(x, Transpose(Wq)) become MatMul3Bits(x, codes, scales, zero_points, bias), or where codes
   name entries of tables MatMulCodebook16(x, codes, tables, starts, scales, bias); signs of weights become
   MatMul1Bit, or with signs of activations MatMulSigns.
2. A Gemm's bias, or that of an Add behind a MatMul, goes in if it is one value an output channel; an Add does the rest.
3. Conv with a kernel of one: Transpose to channels-last, the product, Transpose back.

The model carries the body of each operator it uses: it runs on any ONNX Runtime, decoding weights as it is loaded, and
fast and small where the library of operators is registered (`qcompiler.kernels`). Sites that share a weight share its
codes, scales and zero points.
"""

import numpy as np
import onnx_ir as ir

from qcompiler.config import CompileConfig
from qcompiler.graph import Site
from qcompiler.kernels.schemas import DOMAIN, OPERATORS, VERSION, function_proto
from qcompiler.lowering import add_constant, bias_of, make_node, replace_product, stream_constants
from qcompiler.passes.base import QuantPass, QuantPassResult, Stage, scheme_text, site_scheme
from qcompiler.quantized import QuantizedTensor
from qcompiler.records import SiteRecord
from qcompiler.sites import find_sites
from qcompiler.targets import stream_operator

__all__ = ["FuseCustom"]


class FuseCustom(QuantPass):
    """Rewrites every site whose codes are a stream of bits."""

    name = "fuse_custom"
    stage = Stage.LOWER

    @classmethod
    def applies(cls, config: CompileConfig) -> bool:
        """Where our own operators may be used."""
        return config.own_operators

    def call(self, model: ir.Model) -> QuantPassResult:
        """Rewrite site by site."""
        records, used = [], set()
        for site in find_sites(model)[0]:
            tensor = site.quantized
            if tensor is None or not tensor.spec.stream:
                continue
            name = stream_operator(tensor.spec, site_scheme(site))
            level = self._rewrite(site, tensor, name)
            used.add(name)
            note = f"{name}, group {tensor.spec.group_size}" + ("" if level is None else f", accuracy level {level}")
            records.append(SiteRecord(site.name, "fused", scheme_text(site), note))
        for name in sorted(used):
            function = ir.serde.deserialize_function(function_proto(name, model.graph.opset_imports[""]))
            model.functions[function.identifier()] = function
        if used:
            model.graph.opset_imports[DOMAIN] = VERSION
        return QuantPassResult(model, bool(records), tuple(records))

    def _rewrite(self, site: Site, tensor: QuantizedTensor, name: str) -> int | None:
        """Put the operator in the place of the product; its accuracy level, None where it has none."""
        node, graph = site.node, site.node.graph
        assert isinstance(graph, ir.Graph)
        level = None
        if OPERATORS[name].attributes:
            scheme, asked = site_scheme(site), self.context.config.accuracy_level
            rounds = scheme is not None and scheme.activations is not None
            level = asked if asked is not None else 4 if rounds else 0
        bias, absorbed = bias_of(site, graph)
        constants = stream_constants(site)
        if bias is None:
            none = np.zeros(1, site.dtype.numpy())
            constants = constants | {"bias": add_constant(graph, f"{site.weight.name}_bias", none)}
        if name == "MatMulSigns":
            constants = constants | {"scales": constants["magnitudes"]}
        inputs = [site.input, *(constants.get(each.name, bias) for each in OPERATORS[name].inputs[1:])]
        attributes = {} if level is None else {"accuracy_level": level}
        fused = make_node(graph, name, inputs, attributes, node, self.name, domain=DOMAIN)
        replace_product(site, fused, bias, absorbed, self.name)
        return level
