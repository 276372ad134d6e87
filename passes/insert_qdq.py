"""Quantize activations with calibrated scales: QuantizeLinear and DequantizeLinear around what runs on integers.

1. Every site with a static scheme reads decoded codes; so do products of two activations, and the operators between
   them that the target runs on codes (see `placement`).
2. Ranges are measured on the calibration data, with the weights that are quantized by now (see `ranges`). Values that
   have to share a scale get one range around all of theirs.
3. A value is encoded once and decoded for each reader by a node of its own, since ONNX Runtime fuses a decoder that two
   nodes read with neither. Scales and zero points of a tensor have rank 0.
4. A constant that an integer operator reads is stored as codes.
5. Codes of less than 8 bits lie in bytes; a Clip of the codes behind the encoder cuts them off. In front of the encoder
   a Clip would keep ONNX Runtime from making an integer kernel of what computes the value.
6. Sites may have activations of several widths of up to 8 bits. A value has the least that one of its readers has; what
   no site reads has 8.

Left float: everything else. A static site inside a control-flow body is refused when schemes are assigned.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from qcompiler.config import CompileConfig
from qcompiler.errors import CalibrationError, SchemeError
from qcompiler.graph import Site, constant_array, unique_name
from qcompiler.lowering import add_constant, make_node
from qcompiler.numerics.activation import ActivationSpec, activation_grid, quantize_activation
from qcompiler.passes.base import (
    WEIGHTS,
    QuantPass,
    QuantPassResult,
    Stage,
    explicit_activations,
    quantizes_activations,
)
from qcompiler.placement import Placement, place
from qcompiler.ranges import Range, calibrate
from qcompiler.records import SiteRecord
from qcompiler.scheme import Activations
from qcompiler.session import saturates
from qcompiler.sites import find_products, find_sites, node_names
from qcompiler.targets import IntegerRules

__all__ = ["InsertQdq"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """Options of `insert_qdq`."""

    percentile: float = field(
        default=99.99, metadata={"help": "share of the values, in percent, for --calibrator percentile"}
    )
    products: bool = field(default=True, metadata={"help": "quantize products of two activations (attention) too"})


class InsertQdq(QuantPass):
    """Inserts Q/DQ pairs with calibrated scales."""

    name = "insert_qdq"
    stage = Stage.QUANTIZE
    after = (WEIGHTS, "correct_bias")
    needs_calibration = True
    Options = Options

    @classmethod
    def applies(cls, config: CompileConfig) -> bool:
        """Where a scheme has static activations."""
        return quantizes_activations(config, dynamic=False)

    def call(self, model: ir.Model) -> QuantPassResult:
        """Run the cases in order."""
        found = {site: explicit_activations(site) for site in find_sites(model)[0] if not site.nested}
        static = {site: scheme for site, scheme in found.items() if scheme is not None and not scheme.dynamic}
        if not static:
            return QuantPassResult(model, False)
        scheme = _common(static.values())
        context = self.context
        if context.calibration is None or not len(context.calibration.batches):
            raise CalibrationError(
                "static activations need calibration data for their ranges; give --calibration PATH, or use a "
                "-dynamic scheme"
            )
        if context.config.target == "cpu" and not context.config.reduce_range and scheme.bits <= 8 and saturates():
            logger.warning(
                "this processor adds pairs of 8-bit products in 16 bits, where large ones saturate; if the model is to "
                "run on such (x86 without VNNI), give --reduce-range"
            )
        rules = IntegerRules.of(context.config.target, fp8=scheme.fp8)
        placement = place(model.graph, static, self._products(model.graph, scheme), scheme, rules)
        ranges = self._ranges(model, placement)
        writer = _Writer(model.graph, self.name, placement, static)
        records = [writer.quantize(value, ranges[value]) for value in placement.specs]
        records += [writer.quantize_constant(value, scheme, rules) for value in placement.constants]
        return QuantPassResult(model, True, tuple(records))

    def _products(self, graph: ir.Graph, scheme: Activations) -> list[ir.Node]:
        """MatMul nodes of two activations that the plan's patterns do not exclude."""
        plan = self.context.config.plan
        if not self.options.products or scheme.fp8:
            return []
        found = []
        for node in find_products(graph):
            chosen = plan.scheme_for("linear", node_names(node))[0]
            if chosen is not None and chosen.resolve(self.context.config.target).activations == scheme:
                found.append(node)
        return found

    def _ranges(self, model: ir.Model, placement: Placement) -> dict[ir.Value, Range]:
        config = self.context.config
        ranges = calibrate(
            placement.specs,
            model,
            self.context.calibration.batches,
            calibrator=config.calibrator,
            percentile=self.options.percentile,
            provider=config.provider,
            threads=self.context.threads,
            tick=lambda done, total: self.context.tick(self.name, done, total),
        )
        for members in placement.shared:
            low, high = min(ranges[v].low for v in members), max(ranges[v].high for v in members)
            methods = dict.fromkeys(ranges[v].method for v in members)
            shared = Range(low, high, f"{'/'.join(methods)}, shared by {len(members)} values")
            ranges.update((value, shared) for value in members)
        return ranges


def _common(schemes: Iterable[Activations]) -> Activations:
    """The formats of all sites as one, of the largest width; raises SchemeError where they differ in more."""
    widest = max(schemes, key=lambda each: each.bits)
    others = {each for each in schemes if each.bits != 1 and replace(each, bits=widest.bits) != widest}
    if others or (widest.bits > 8 and any(each.bits != widest.bits for each in schemes)):
        raise SchemeError(
            "insert_qdq: two static formats of activations in one model, which differ in more than their width of at "
            "most 8 bits; choose one for all sites"
        )
    return widest


def _nodes_within(attribute: ir.Attr) -> Iterator[ir.Node]:
    if attribute.type == ir.AttributeType.GRAPH:
        yield from ir.traversal.RecursiveGraphIterator(attribute.as_graph())
    elif attribute.type == ir.AttributeType.GRAPHS:
        for body in attribute.as_graphs():
            yield from ir.traversal.RecursiveGraphIterator(body)


def _spell_out(graph: ir.Graph, node: ir.Node, dtype: ir.DataType, pass_name: str) -> None:
    """Make Max and Min of a Relu or a Clip.

    ONNX Runtime 1.31 merges those into the encoder behind them as if its codes were integers: in front of 8-bit floats
    it drops a Relu, and fails on a Clip.
    """
    value, low, high = (*node.inputs, None, None)[:3]
    if node.op_type == "Relu":
        low = add_constant(graph, f"{node.outputs[0].name}_floor", np.zeros((), dtype.numpy()))
    if low is not None and high is not None:
        above = make_node(graph, "Max", [value, low], {}, node, pass_name)
        above.outputs[0].type, above.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        graph.insert_before(node, above)
        value, low = above.outputs[0], None
    limit = high if low is None else low
    node.op_type = "Identity" if limit is None else "Min" if low is None else "Max"
    node.resize_inputs(1 if limit is None else 2)
    node.replace_input_with(0, value)
    if limit is not None:
        node.replace_input_with(1, limit)


class _Writer:
    """Inserts the nodes."""

    def __init__(self, graph: ir.Graph, pass_name: str, placement: Placement, sites: Iterable[Site]) -> None:
        self.graph, self.pass_name, self.placement = graph, pass_name, placement
        self.groups = {value: at for at, members in enumerate(placement.shared) for value in members}
        self.constants: dict[tuple[int, float, int], list[ir.Value]] = {}
        self.types = {value: site.dtype for site in sites for value in (site.input, site.node.outputs[0])}
        # The control-flow node of this graph in whose bodies a node lies; it may read values from outside of them.
        self.around = {
            child: node
            for node in graph
            for attribute in node.attributes.values()
            for child in _nodes_within(attribute)
        }

    def quantize(self, value: ir.Value, found: Range) -> SiteRecord:
        """Encode a value once and decode it for each reader."""
        spec = self.placement.specs[value]
        readers = list(self.placement.readers[value])
        forced = value in self.placement.forced
        if forced:
            readers = [(use.node, use.idx) for use in value.uses()]
        name = value.name or "activation"
        anchor = self.placement.anchors.get(value, 0.0)
        group = self.groups.get(value)
        scale, zero, parameters = self._parameters(name, found.low, found.high, spec, self._type(value), anchor, group)
        producer = value.producer()
        if spec.fp8 and producer is not None and producer.op_type in ("Relu", "Clip") and not producer.domain:
            _spell_out(self.graph, producer, self._type(value), self.pass_name)
        origin = producer if producer is not None else readers[0][0]
        encoder = self._encoder(value, name, parameters, spec, origin)
        if producer is not None:
            self.graph.insert_after(producer, encoder)
        else:
            self.graph.insert_before(self.graph[0], encoder)
        encode = encoder[-1]
        for node, index in readers:
            self._decode(encode.outputs[0], parameters, value, node, index)
        if forced and value.is_graph_output():
            self._decode_output(encode, parameters, value)
        figures = {"low": found.low, "high": found.high, "scale": scale, "zero_point": float(zero)}
        return SiteRecord(name, "activation", str(spec), found.method, figures)

    def _encoder(
        self, value: ir.Value, name: str, parameters: list[ir.Value], spec: ActivationSpec, origin: ir.Node
    ) -> list[ir.Node]:
        """The nodes that make codes of a value; the result is that of the last (case 5)."""
        if spec.bits == 1:
            scale = np.asarray(spec.encoding_scale(1.0), self._type(value).numpy())
            parameters = [add_constant(self.graph, f"{name}_sign_scale", scale), parameters[1]]
        nodes = [make_node(self.graph, "QuantizeLinear", [value, *parameters], {}, origin, self.pass_name)]
        if spec.narrow:
            limits = [
                add_constant(self.graph, f"{name}_{end}_code", np.asarray(limit, spec.dtype))
                for end, limit in zip(("lowest", "highest"), spec.limits, strict=True)
            ]
            inputs = [nodes[0].outputs[0], *limits]
            nodes.append(make_node(self.graph, "Clip", inputs, {}, origin, self.pass_name))
        for node in nodes:
            node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.from_numpy(spec.dtype), value.shape
        return nodes

    def quantize_constant(self, value: ir.Value, scheme: Activations, rules: IntegerRules) -> SiteRecord:
        """Store a constant as codes."""
        array = constant_array(value).astype(np.float32)
        low, high = float(array.min(initial=0)), float(array.max(initial=0))
        spec = replace(scheme, bits=max(scheme.bits, 8)).spec(signed=rules.signed)
        name = value.name or "constant"
        scale, zero, parameters = self._parameters(name, low, high, spec, self._type(value))
        codes = add_constant(self.graph, f"{name}_codes", quantize_activation(array, scale, zero, spec))
        for node, index in self.placement.constants[value]:
            self._decode(codes, parameters, value, node, index)
        figures = {"low": low, "high": high, "scale": scale, "zero_point": float(zero)}
        return SiteRecord(name, "activation", str(spec), "constant", figures)

    def _type(self, value: ir.Value) -> ir.DataType:
        """The value's type; where the model does not say, that of the site it belongs to, or of any."""
        if value.const_value is not None:
            return value.const_value.dtype
        return value.dtype or self.types.get(value) or next(iter(self.types.values()))

    def _parameters(
        self,
        name: str,
        low: float,
        high: float,
        spec: ActivationSpec,
        dtype: ir.DataType,
        anchor: float = 0.0,
        group: int | None = None,
    ) -> tuple[float, int, list[ir.Value]]:
        """Scale, zero point, and the constants of rank 0 that hold them, the same for all of a group."""
        kind = "float16" if dtype == ir.DataType.FLOAT16 else "float32"
        scale, zero = activation_grid(low, high, spec, kind, anchor)
        if group is not None and (group, scale, zero) in self.constants:
            return scale, zero, self.constants[group, scale, zero]
        constants = [
            add_constant(self.graph, f"{name}_scale", np.asarray(scale, kind)),
            add_constant(self.graph, f"{name}_zero_point", np.asarray(zero, spec.dtype)),
        ]
        if group is not None:
            self.constants[group, scale, zero] = constants
        return scale, zero, constants

    def _decode(
        self, codes: ir.Value, parameters: list[ir.Value], value: ir.Value, reader: ir.Node, index: int
    ) -> None:
        decode = make_node(self.graph, "DequantizeLinear", [codes, *parameters], {}, reader, self.pass_name)
        decode.outputs[0].type, decode.outputs[0].shape = value.type, value.shape
        self.graph.insert_before(self.around.get(reader, reader), decode)
        reader.replace_input_with(index, decode.outputs[0])

    def _decode_output(self, encode: ir.Node, parameters: list[ir.Value], value: ir.Value) -> None:
        """Let the caller have decoded codes under the name of the value."""
        decode = make_node(self.graph, "DequantizeLinear", [encode.outputs[0], *parameters], {}, encode, self.pass_name)
        self.graph.insert_after(encode, decode)
        output, name = decode.outputs[0], value.name
        output.type, output.shape = value.type, value.shape
        for index, other in enumerate(self.graph.outputs):
            if other is value:
                self.graph.outputs[index] = output
        value.name = unique_name(self.graph, f"{name}_float")
        output.name = name
