"""Spell quantized weights as the standard operator DequantizeLinear, in the form that ONNX Runtime fuses.

1. MatMul(x, Wq), MatMul(x, Transpose(Wq)) and Gemm(x, Wq, c) read DequantizeLinear(codes [K, N]) with blocks along
   axis 0, or one scale a column along axis 1. ONNX Runtime makes MatMulNBits of that, a ragged last block included;
   versions before 1.25 do so for some of these only and dequantize the others on every run.
2. A Gemm loses its transB. Its c stays where it is one value a column, which becomes the bias of MatMulNBits; a
   constant of shape [1, N], also that of an Add behind a MatMul, is given the shape [N]; with any other c the Gemm
   becomes MatMul and Add. Left as they were, these weights would be dequantized on every run.
3. A lookup table keeps its rows, codes [N, G, group size], or [N, K] with one group a row: Gather fetches rows of
   codes, scales and zero points; Cast, Sub and Mul decode what was fetched. A DequantizeLinear there would be taken for
   a quantized activation: ONNX Runtime fails on a MatMul behind it.
4. The projection that shares its weight with a lookup table reads the table's constants through Transpose and Reshape,
   which are folded when the model is loaded: the codes are stored once. This works for one reader, since a second would
   get the same folded constant, and ONNX Runtime does not fuse a constant that two nodes read. For the same reason
   every other site has a DequantizeLinear and constants of its own, in the graph of its node; the data file holds equal
   ones once.
5. Sites whose activations are quantized in the graph get one scale a column (a convolution: one an output channel,
   along axis 0), whatever the output form is otherwise. A bias of a convolution stays float. That of a Gemm with
   calibrated activations becomes int32 codes in the scale of the product, if it fits, and the weight gets zero points
   of zero: without either ONNX Runtime runs the Gemm in float.
6. ONNX Runtime makes a Gemm of a MatMul and the Add behind it before it looks for integers. What is added to an integer
   MatMul therefore becomes int32 codes like the bias of a Gemm, or is subtracted with the other sign.
7. Integer kernels read weights of 8 bits. Narrower codes are stored as they are and become 8 bits by a Cast, which ONNX
   Runtime folds when the model is loaded, before it looks for integers.

Symmetric weights are signed, ``code - mid``, without zero points but in case 5; others are unsigned. Codes are turned
and packed when the model is written, so that memory never holds them twice.
"""

from typing import Any

import numpy as np
import onnx_ir as ir

from qcompiler.config import CompileConfig
from qcompiler.errors import PassError
from qcompiler.graph import PASS_KEY, Site, constant_array
from qcompiler.lowering import add_constant, make_node, replace_nodes, width_note
from qcompiler.lowering_qdq import (
    Constants,
    channel_constants,
    code_dtype,
    column_constants,
    graph_of,
    group_count,
    row_constants,
)
from qcompiler.numerics.activation import quantize_bias
from qcompiler.passes.base import (
    QuantPass,
    QuantPassResult,
    Stage,
    explicit_activations,
    quantizes_activations,
    scheme_text,
)
from qcompiler.quantized import QuantizedTensor
from qcompiler.records import SiteRecord
from qcompiler.sites import find_sites
from qcompiler.targets import qdq_opset, qdq_width

__all__ = ["ExportQdq"]


class ExportQdq(QuantPass):
    """Rewrites every quantized site."""

    name = "export_qdq"
    stage = Stage.LOWER
    after = ("fuse_matmul_nbits", "fuse_gather")  # what they leave, or everything where they do not run

    @classmethod
    def applies(cls, config: CompileConfig) -> bool:
        """For the output form QDQ, and for schemes that quantize activations."""
        return config.output_format == "qdq" or quantizes_activations(config)

    def call(self, model: ir.Model) -> QuantPassResult:
        """Rewrite site by site."""
        sites = [site for site in find_sites(model)[0] if site.quantized is not None]
        for site in sites:
            _check(site, model.graph.opset_imports.get("", 0))
        tables = {site.weight: site for site in sites if site.role == "embedding"}
        constants = {weight: row_constants(site) for weight, site in tables.items()}
        unread = dict(constants)
        records = []
        for site in sites:
            tensor, scheme = site.quantized, scheme_text(site)  # before the node may become another
            assert tensor is not None
            if site.role == "embedding":
                note = self._rewrite_lookup(site, tensor, constants[site.weight])
            else:
                note = self._rewrite_linear(site, tensor, unread.pop(site.weight, None))
            records.append(SiteRecord(site.name, "fused", scheme, note))
        return QuantPassResult(model, bool(records), tuple(records))

    def _rewrite_lookup(self, site: Site, tensor: QuantizedTensor, table: Constants) -> str:
        rows = [self._node(site, "Gather", [part, site.input], axis=0) for part in table]
        codes, scale, *zero = (row.outputs[0] for row in rows)
        new = [*rows, self._node(site, "Cast", [codes], to=int(tensor.dtype))]
        if zero:
            shift = self._node(site, "Cast", zero, to=int(tensor.dtype))
            new += [shift, self._node(site, "Sub", [new[-1].outputs[0], shift.outputs[0]])]
        new.append(self._node(site, "Mul", [new[-1].outputs[0], scale]))
        if group_count(tensor) > 1:
            new += self._joined(site, tensor, new[-1].outputs[0])
        replace_nodes(graph_of(site), [site.node], new, new[-1].outputs[0])
        return f"Gather of {code_dtype(tensor, tensor.spec.bits).name.lower()}, Cast, Mul, {_form(tensor)}"

    def _joined(self, site: Site, tensor: QuantizedTensor, values: ir.Value) -> list[ir.Node]:
        """Nodes that make rows [..., K] of values [..., G, group size]."""
        indices, width = site.input, group_count(tensor) * tensor.spec.group_size
        nodes: list[ir.Node] = []
        if indices.shape is not None:
            shape = _sizes(site, "shape", *[0] * indices.shape.rank(), width)
        else:
            nodes.append(self._node(site, "Shape", [indices]))
            nodes.append(self._node(site, "Concat", [nodes[0].outputs[0], _sizes(site, "width", width)], axis=0))
            shape = nodes[-1].outputs[0]
        nodes.append(self._node(site, "Reshape", [values, shape]))
        if width != tensor.columns:
            nodes.append(self._cut(site, nodes[-1].outputs[0], tensor.columns, axis=-1))
        return nodes

    def _cut(self, site: Site, value: ir.Value, end: int, axis: int) -> ir.Node:
        """The node that keeps the first `end` places of an axis."""
        limits = (("start", 0), ("end", end), ("axis", axis))
        return self._node(site, "Slice", [value, *(_sizes(site, name, number) for name, number in limits)])

    def _rewrite_linear(self, site: Site, tensor: QuantizedTensor, table: Constants | None) -> str:
        if site.node.op_type == "Conv":
            width = tensor.spec.format.container
            inputs, widening = self._widened(site, tensor, channel_constants(site, tensor), width)
            decode = self._node(site, "DequantizeLinear", inputs, axis=0)
            graph_of(site).insert_before(site.node, [*widening, decode])
            site.node.replace_input_with(1, decode.outputs[0])
            site.node.metadata_props[PASS_KEY] = self.name
            kind, held = code_dtype(tensor, width).name.lower(), width_note(tensor.spec, width)
            return f"DequantizeLinear of {kind}, per output channel{held}"
        width = qdq_width(tensor.spec.bits, tensor.rows)
        integers = _runs_on_integers(site, self.context.config.target)
        before: list[ir.Node] = []
        if table is None:
            inputs = column_constants(site, tensor, width, integers=integers)
            if integers:
                inputs, before = self._widened(site, tensor, inputs, width)
        else:
            chains = self._turned(site, tensor, table)
            before = [step for chain in chains for step in chain]
            inputs = [chain[-1].outputs[0] for chain in chains]
        attributes = {"axis": 0, "block_size": tensor.spec.group_size} if group_count(tensor) > 1 else {"axis": 1}
        decode = self._node(site, "DequantizeLinear", inputs, **attributes)
        graph_of(site).insert_before(site.node, [*before, decode])
        self._read_columns(site, decode.outputs[0], integers=integers)
        kind, held = code_dtype(tensor, width).name.lower(), width_note(tensor.spec, width)
        note = f"DequantizeLinear of {kind}, {_form(tensor)}{held}"
        if width != tensor.spec.format.container:
            note += f" because N = {tensor.rows} is no multiple of 4"
        return note if table is None else f"{note}, codes shared with the lookup table"

    def _widened(
        self, site: Site, tensor: QuantizedTensor, inputs: list[ir.Value], width: int
    ) -> tuple[list[ir.Value], list[ir.Node]]:
        """A decoder's inputs with codes that integer kernels read, and the node that makes these (case 7)."""
        if width == 8:
            return inputs, []
        cast = self._node(site, "Cast", inputs[:1], to=int(code_dtype(tensor, 8)))
        cast.outputs[0].dtype, cast.outputs[0].shape = code_dtype(tensor, 8), inputs[0].shape
        return [cast.outputs[0], *inputs[1:]], [cast]

    def _turned(self, site: Site, tensor: QuantizedTensor, table: Constants) -> list[list[ir.Node]]:
        """For each constant of a table the nodes that give it the shape of `column_constants`."""
        codes, *others = table
        if group_count(tensor) == 1:
            flat = _sizes(site, "flat", -1)
            turned = [[self._node(site, "Transpose", [codes], perm=[1, 0])]]
            return turned + [[self._node(site, "Reshape", [part, flat])] for part in others]
        columns, turned = _sizes(site, "columns", -1, tensor.rows), []
        for part in table:
            chain = [self._node(site, "Transpose", [part], perm=[1, 2, 0])]
            chain.append(self._node(site, "Reshape", [chain[0].outputs[0], columns]))
            turned.append(chain)
        if tensor.columns % tensor.spec.group_size:
            turned[0].append(self._cut(site, turned[0][-1].outputs[0], tensor.columns, axis=0))
        return turned

    def _read_columns(self, site: Site, weight: ir.Value, *, integers: bool) -> None:
        """Let the site's node read a weight [K, N]."""
        node, graph = site.node, graph_of(site)
        extra = node.inputs[2] if len(node.inputs) > 2 else None
        if extra is not None:
            vector = _as_vector(extra, site)
            if vector is not None and integers:
                vector = self._integer_bias(site, vector)
            if vector is None:
                product = self._node(site, "MatMul", [site.input, weight])
                total = self._node(site, "Add", [product.outputs[0], extra])
                replace_nodes(graph, [node], [product, total], total.outputs[0])
                if integers:
                    site.node = product
                    self._set_apart(site)
                return
            node.replace_input_with(2, vector)
        node.replace_input_with(1, weight)
        node.attributes.pop("transB", None)
        node.metadata_props[PASS_KEY] = self.name
        activations = explicit_activations(site)
        if node.op_type == "Gemm" and activations is not None and activations.dynamic:
            node.op_type = "MatMul"  # ONNX Runtime has no Gemm with activations that are quantized at run time
            node.attributes.clear()
        if node.op_type == "MatMul" and integers:
            self._set_apart(site)
        elif node.op_type == "MatMul":
            _straighten_added_bias(site)

    def _integer_bias(self, site: Site, bias: ir.Value) -> ir.Value | None:
        """The decoded int32 codes of a bias [N] in the scale of the product; None for one that has no such codes.

        That is one that is not constant, or too large for its scale; or a row of the weight is zero, so that its scale
        means nothing.
        """
        tensor, decode = site.quantized, site.input.producer()
        scale = decode.inputs[1] if decode is not None else None
        if bias.const_value is None or tensor is None or scale is None or scale.const_value is None:
            return None
        product = tensor.scale[:, 0].astype(np.float32) * np.float32(constant_array(scale))
        codes = quantize_bias(constant_array(bias), product)
        too_large = (np.abs(codes) == np.iinfo(np.int32).max).any()
        if too_large or (tensor.packed == tensor.spec.format.mid).all(1).any():
            return None
        inputs = [add_constant(graph_of(site), f"{bias.name}_codes", codes)]
        inputs.append(add_constant(graph_of(site), f"{bias.name}_scales", product))
        node = self._node(site, "DequantizeLinear", inputs, axis=0)
        graph_of(site).insert_before(site.node, node)
        return node.outputs[0]

    def _set_apart(self, site: Site) -> None:
        """Keep what is added to an integer MatMul from making a float Gemm of it (case 6)."""
        result, graph = site.node.outputs[0], graph_of(site)
        uses = list(result.uses())
        if result.is_graph_output() or len(uses) != 1 or uses[0].node.op_type != "Add":
            return
        add, other = uses[0].node, uses[0].node.inputs[1 - uses[0].idx]
        if add.graph is not graph or other is None or not _may_become_gemm(site, other):
            return
        vector = _as_vector(other, site)
        codes = None if vector is None or _read_both_ways(add.outputs[0]) else self._integer_bias(site, vector)
        if codes is not None:
            add.replace_input_with(1 - uses[0].idx, codes)
            return
        new = []
        if other.const_value is not None:
            negative = add_constant(graph, f"{other.name}_negative", -constant_array(other))
        else:
            new.append(self._node(site, "Neg", [other]))
            negative = new[0].outputs[0]
        new.append(self._node(site, "Sub", [result, negative]))
        replace_nodes(graph, [add], new, new[-1].outputs[0])

    def _node(self, site: Site, op_type: str, inputs: list[ir.Value], **attributes: Any) -> ir.Node:
        return make_node(graph_of(site), op_type, inputs, attributes, site.node, self.name)


def _runs_on_integers(site: Site, target: str) -> bool:
    """Whether ONNX Runtime's integer kernels run the site; TensorRT's take a float bias and no int32 codes."""
    found = explicit_activations(site)
    integers = found is not None and found.bits <= 8 and not found.fp8
    return integers and site.scale_dtype == "float32" and target != "tensorrt"


def _read_both_ways(value: ir.Value) -> bool:
    """Whether codes and floats are made of a value, so that ONNX Runtime has no Gemm that gives both."""
    readers = {node.op_type == "QuantizeLinear" for node in value.consumers()}
    return True in readers and (False in readers or value.is_graph_output())


def _may_become_gemm(site: Site, other: ir.Value) -> bool:
    """Whether ONNX Runtime may make a Gemm of a MatMul and the Add of another value.

    It does so for matrices, and for a constant vector where all sizes are known.
    """
    shape = site.input.shape
    if other.const_value is None:
        return shape is not None and shape.rank() == 2
    return shape is None or shape.rank() <= 2 or all(isinstance(size, int) for size in shape)


def _check(site: Site, opset: int) -> None:
    """Raise PassError for what has no QDQ form."""
    tensor, lookup = site.quantized, site.role == "embedding"
    assert tensor is not None
    weight_only = explicit_activations(site) is None
    if (site.node.op_type == "Conv" and weight_only) or (lookup and tensor.spec.bits != 8):
        raise PassError(
            f"export_qdq: '{site.name}' is a {site.node.op_type} of {tensor.spec.bits} bits, which has no QDQ form; "
            f"leave it float with --ignore '{site.name}', or use --format matmulnbits"
        )
    needed = qdq_opset(tensor.spec, tensor.rows, tensor.columns, lookup=lookup)
    if opset < needed:
        raise PassError(
            f"export_qdq: '{site.name}' needs operators of opset {needed}, but the model is of opset {opset}; "
            "run raise_opset before"
        )


def _form(tensor: QuantizedTensor) -> str:
    return f"block {tensor.spec.group_size}" if group_count(tensor) > 1 else "per channel"


def _sizes(site: Site, name: str, *numbers: int) -> ir.Value:
    """A constant of shapes or limits."""
    return add_constant(graph_of(site), f"{site.weight.name}_{name}", np.array(numbers, np.int64))


def _as_vector(value: ir.Value, site: Site) -> ir.Value | None:
    """A value [N] in the place of one that is [N], or of a constant [1, N]; None for anything else."""
    known = value.shape if value.const_value is None else value.const_value.shape
    shape = () if known is None else tuple(known)
    if shape == (site.rows,):
        return value
    if value.const_value is None or shape != (1, site.rows):
        return None
    return add_constant(graph_of(site), f"{value.name}_vector", constant_array(value).reshape(-1))


def _straighten_added_bias(site: Site) -> None:
    """Make a constant [1, N] that is added to a MatMul's result [N]: ONNX Runtime would put the other into a Gemm."""
    output, rank = site.node.outputs[0], site.input.shape.rank() if site.input.shape is not None else 0
    uses = list(output.uses())
    if rank < 2 or output.is_graph_output() or len(uses) != 1 or uses[0].node.op_type != "Add":
        return
    add = uses[0].node
    other = add.inputs[1 - uses[0].idx]
    vector = _as_vector(other, site) if other is not None and other.const_value is not None else None
    if vector is not None and add.graph is site.node.graph:
        add.replace_input_with(1 - uses[0].idx, vector)
