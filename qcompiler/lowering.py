"""What the passes that spell a QuantizedTensor out as operators and constants have in common."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompiler.graph import PASS_KEY, SCHEME_KEY, SITE_KEY, SPARSE_KEY, Site, unique_name
from qcompiler.numerics.affine import WeightSpec
from qcompiler.numerics.codebooks import table_of_rows
from qcompiler.numerics.double_scales import double_quantized
from qcompiler.numerics.formats import int_format
from qcompiler.numerics.packing import centred, pack_codes, pack_matmul_nbits, pack_stream
from qcompiler.targets import block_size

__all__ = [
    "add_constant",
    "append_nodes",
    "bias_of",
    "block_constants",
    "make_node",
    "replace_nodes",
    "replace_product",
    "stream_constants",
    "width_note",
]


def add_constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Register an initializer under a free name like `name`."""
    tensor = ir.Tensor(array, name=unique_name(graph, name))
    value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def width_note(spec: WeightSpec, width: int) -> str:
    """What a record says where codes are stored in `width` bits and are narrower; empty where they fill them."""
    return f", holding {spec.bits}-bit codes" if width != spec.bits else ""


def block_constants(site: Site, *, flat: bool = False) -> list[ir.Value | None]:
    """The initializers of a quantized weight in ONNX Runtime's block layout (see `numerics.packing`).

    Every caller gets the same initializers for the same weight; the codes of both shapes are views of the same bytes.

    Args:
        site: A site whose weight is quantized.
        flat: Codes as ``[N, blocks * blob]`` (GatherBlockQuantized) instead of ``[N, blocks, blob]`` (MatMulNBits).

    Returns:
        Codes, scales and zero points; the last is None where the format has none.
    """
    tensor, graph = site.quantized, site.weight.graph
    assert tensor is not None and graph is not None
    made: dict[str, ir.Value] = tensor.meta.setdefault("lowered", {})
    spec, columns, size = tensor.spec, tensor.columns, block_size(tensor.spec, tensor.columns)

    def constant(suffix: str, array: np.ndarray) -> ir.Value:
        if suffix not in made:
            made[suffix] = add_constant(graph, f"{site.weight.name}_{suffix}", array)
        return made[suffix]

    if "blob" not in tensor.meta:
        width, packed, padding = spec.format.container, tensor.packed, spec.format.mid
        if tensor.zero_point is None:
            packed, padding = centred(packed, spec.bits), int_format(width).mid
        tensor.meta["blob"] = pack_matmul_nbits(packed, width, columns, size, padding)
    blob = tensor.meta["blob"]
    codes = constant("table", blob.reshape(len(blob), -1)) if flat else constant("codes", blob)
    spread = np.arange(blob.shape[1]) * size // spec.group_size  # block -> group
    zero = None
    if tensor.zero_point is not None:
        zero = constant("zero_points", pack_codes(tensor.zero_point[:, spread], spec.bits))
    same = len(spread) == tensor.scale.shape[1]
    if "scales" not in made:
        scale = tensor.scale if same else tensor.scale[:, spread]
        made["scales"] = _add_scales(graph, f"{site.weight.name}_scales", scale, spec)
    return [codes, made["scales"], zero]


def _add_scales(graph: ir.Graph, name: str, scale: np.ndarray, spec: WeightSpec, more: int = 0) -> ir.Value:
    """Scales ``[N, G]`` with a number of dimensions more: a constant, or codes and steps that are multiplied."""
    shape = scale.shape + (1,) * more
    if not spec.double:
        return add_constant(graph, name, scale.reshape(shape))
    codes, step = double_quantized(scale)
    stored = add_constant(graph, f"{name}_codes", codes.reshape(shape))
    steps = add_constant(graph, f"{name}_steps", step.reshape(len(step), *(1,) * (len(shape) - 1)))
    widened = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT}, name=unique_name(graph, f"{name}_Cast"))
    product = ir.node("Mul", [widened.outputs[0], steps], name=unique_name(graph, f"{name}_Mul"))
    for node, output in ((widened, f"{name}_widened"), (product, name)):
        value = node.outputs[0]
        value.name, value.shape, value.dtype = unique_name(graph, output), ir.Shape(shape), ir.DataType.FLOAT
    graph.insert_before(graph[0], [widened, product])
    return product.outputs[0]


def make_node(
    graph: ir.Graph,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any],
    origin: ir.Node,
    pass_name: str,
    domain: str = "",
    suffix: str = "",
) -> ir.Node:
    """A node with one output that stands for (a part of) `origin`, carries its metadata and says which pass made it.

    Its name is that of `origin` with `suffix`, or the operator, behind it.
    """
    metadata = {
        key: text for key, text in origin.metadata_props.items() if key not in (SCHEME_KEY, SITE_KEY, SPARSE_KEY)
    }
    metadata[PASS_KEY] = pass_name
    name = unique_name(graph, f"{origin.name or origin.op_type}_{suffix or op_type}")
    present = list(inputs)
    while present and present[-1] is None:
        present.pop()
    output = ir.Value(name=unique_name(graph, f"{name}_output"))
    return ir.node(op_type, present, attributes, domain=domain, name=name, metadata_props=metadata, outputs=[output])


def replace_nodes(graph: ir.Graph, old: Sequence[ir.Node], new: Sequence[ir.Node], output: ir.Value) -> None:
    """Put `new` after old[0]; `output` takes name, type, shape and readers of old[0]'s result; remove `old`."""
    result = old[0].outputs[0]
    graph.insert_after(old[0], new)
    output.type, output.shape = result.type, result.shape
    name = result.name
    result.replace_all_uses_with(output, replace_graph_outputs=True)
    graph.remove(old, safe=True)
    output.name = name


def append_nodes(graph: ir.Graph, node: ir.Node, new: Sequence[ir.Node]) -> None:
    """Put `new`, of which new[0] reads the node's result, behind `node`; all other readers get the last result."""
    result, output = node.outputs[0], new[-1].outputs[0]
    graph.insert_after(node, new)
    output.type, output.shape, name = result.type, result.shape, result.name
    for reader, index in list(result.uses()):
        if reader not in new:
            reader.replace_input_with(index, output)
    for index, other in enumerate(graph.outputs):
        if other is result:
            graph.outputs[index] = output
    result.name, output.name = unique_name(graph, f"{name}_before_{new[0].op_type}"), name


def bias_of(site: Site, graph: ir.Graph) -> tuple[ir.Value | None, ir.Node | None]:
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


def replace_product(
    site: Site, fused: ir.Node, bias: ir.Value | None, absorbed: ir.Node | None, pass_name: str
) -> None:
    """Put the product that stands for a site in its place.

    Args:
        site: A linear layer or a convolution with a kernel of one.
        fused: The product, which nothing reads yet.
        bias: What `bias_of` found, which the product adds; where that is None an Add does it for a bias of the site.
        absorbed: The Add node behind the site that goes too, or None.
        pass_name: Who made it.
    """
    node, graph = site.node, site.node.graph
    assert isinstance(graph, ir.Graph)
    new = [fused]
    extra = node.inputs[2] if len(node.inputs) > 2 else None
    if extra is not None and bias is None:
        new.append(make_node(graph, "Add", [fused.outputs[0], extra], {}, node, pass_name))
    if node.op_type == "Conv":
        new = _channels_last(graph, node, new, pass_name)
    replace_nodes(graph, [node] if absorbed is None else [absorbed, node], new, new[-1].outputs[0])


def _channels_last(graph: ir.Graph, node: ir.Node, new: list[ir.Node], pass_name: str) -> list[ir.Node]:
    """The new nodes of a convolution with Transposes around them, so that the channels are their last axis."""
    weight = node.inputs[1]
    assert weight is not None and weight.const_value is not None
    rank = weight.const_value.shape.rank()
    there, back = [0, *range(2, rank), 1], [0, rank - 1, *range(1, rank - 1)]
    before = make_node(graph, "Transpose", [node.inputs[0]], {"perm": there}, node, pass_name)
    new[0].replace_input_with(0, before.outputs[0])
    return [before, *new, make_node(graph, "Transpose", [new[-1].outputs[0]], {"perm": back}, node, pass_name)]


def stream_constants(site: Site) -> dict[str, ir.Value]:
    """The initializers of a quantized weight in the layout of our own operators (see `kernels.schemas`).

    Every caller gets the same initializers for the same weight.

    Returns:
        By name of the operator's input: B and scales, and zero_points, or codebook and starts. For signs there are also
        magnitudes, half the scales; what nothing reads in the end is removed by the pass `cleanup`.
    """
    tensor, graph = site.quantized, site.weight.graph
    assert tensor is not None and graph is not None
    made: dict[str, ir.Value] = tensor.meta.setdefault("lowered", {})
    if not made:
        spec, name = tensor.spec, site.weight.name
        codes = pack_stream(tensor.codes(), spec.code_bits, spec.group_size // max(spec.vector, 1))
        made["B"] = add_constant(graph, f"{name}_codes", codes)
        if spec.signs:  # codes 0 and 1 about a half
            made["scales"] = _add_scales(graph, f"{name}_scales", 2 * tensor.scale, spec, 1)
            made["magnitudes"] = _add_scales(graph, f"{name}_magnitudes", tensor.scale, spec, 1)
            half = np.full((1, 1, 1), 0.5, tensor.scale.dtype)
            made["zero_points"] = add_constant(graph, f"{name}_zero_points", half)
            return made
        made["scales"] = _add_scales(graph, f"{name}_scales", tensor.scale, spec, 1)
        if tensor.tables is not None:
            starts = table_of_rows(spec, tensor.rows, tensor.columns) * spec.entries
            made["codebook"] = add_constant(graph, f"{name}_tables", tensor.tables.reshape(-1, spec.vector))
            made["starts"] = add_constant(graph, f"{name}_starts", starts.astype(np.int32)[:, None, None])
            return made
        zero = tensor.zero_point[..., None] if tensor.zero_point is not None else _middle(spec)
        made["zero_points"] = add_constant(graph, f"{name}_zero_points", zero)
    return made


def _middle(spec: WeightSpec) -> np.ndarray:
    """The one zero point of a symmetric grid, [1, 1, 1]."""
    return np.full((1, 1, 1), spec.format.mid, np.uint8)
