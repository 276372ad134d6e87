"""Where the quantizable weights of a model are, and why what looks like one is none."""

import ast
import math
from collections.abc import Callable

import onnx_ir as ir

from qcompiler.graph import SITE_KEY, Refusal, Site, collect_names, walk
from qcompiler.kernels.schemas import OPERATORS

__all__ = ["find_products", "find_sites", "module_path", "node_names"]

_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
# Smaller tables cost more in scales and in the operator's overhead than they save.
_SMALLEST_TABLE = 1 << 14


def module_path(node: ir.Node) -> str:
    """The module the exporter says the node came from, e.g. ``model.layers.0.mlp.down_proj``, or nothing."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if not scopes:
        return ""
    try:
        names = [name for name in ast.literal_eval(scopes) if isinstance(name, str)]
    except (ValueError, SyntaxError):
        return ""
    # The last scope is the operator itself; the one before it is the module.
    return names[-2] if len(names) >= 2 else ""


def find_sites(model: ir.Model) -> tuple[list[Site], list[Refusal]]:
    """Every quantizable use of a constant weight, in graph order, and every look-alike with the reason it is none."""
    collect_names(model.graph)
    sites: list[Site] = []
    refusals: list[Refusal] = []
    for node, nested in walk(model.graph):
        found: Site | str | None = None
        if node.op_type in _QUANTIZED_OPS:
            found = f"quantized already: {node.op_type}"
        elif node.domain == "" and node.op_type in _MATCHERS:
            found = _MATCHERS[node.op_type](node)
        if isinstance(found, Site):
            found.nested = nested
            sites.append(found)
        elif found:
            names = node_names(node)
            refusals.append(Refusal(names[0] if names else node.op_type, found, names))
    _name_sites(sites)
    _find_lm_head(model, sites)
    return sites, refusals


def find_products(graph: ir.Graph) -> list[ir.Node]:
    """The MatMul nodes of a graph that multiply two computed values, as attention does: they have no weight."""

    def computed(value: ir.Value | None) -> bool:
        return value is not None and value.const_value is None and _constant_source(value) is None

    found = (node for node in graph if node.op_type == "MatMul" and node.domain == "")
    return [node for node in found if all(map(computed, node.inputs)) and _decoded_source(node.inputs[1]) is None]


def node_names(node: ir.Node, weight: ir.Value | None = None) -> tuple[str, ...]:
    """The names that patterns may use for a node: its module, its own and its weight's."""
    candidates = (module_path(node), node.name, weight.name if weight is not None else None)
    return tuple(dict.fromkeys(name for name in candidates if name))


def _name_sites(sites: list[Site]) -> None:
    """Give each site the first of its names that no other site has, or that of its result where all are shared.

    A name that was given when the site got its scheme stays, whatever becomes of the sites around it.
    """
    count: dict[str, int] = {}
    for site in sites:
        site.names = node_names(site.node, site.weight)
        for name in site.names:
            count[name] = count.get(name, 0) + 1
    for site in sites:
        given = site.node.metadata_props.get(SITE_KEY)
        own = [given] if given else [name for name in site.names if count[name] == 1]
        site.name = own[0] if own else site.node.outputs[0].name or "?"
        if site.name not in site.names:
            site.names += (site.name,)


def _is_weight(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and value.is_initializer()


def _constant_source(value: ir.Value | None) -> tuple[ir.Value, ir.Node | None] | None:
    """The initializer behind an input, and the 2-D Transpose between them if there is one."""
    if value is None:
        return None
    if _is_weight(value):
        return value, None
    node = value.producer()
    if node is not None and node.op_type == "Transpose" and node.domain == "" and _is_weight(node.inputs[0]):
        permutation = node.attributes.get("perm")
        source = node.inputs[0]
        plain = permutation is None or tuple(permutation.as_ints()) == (1, 0)
        if plain and source is not None and source.const_value is not None and source.const_value.shape.rank() == 2:
            return source, node
    return None


def _shape_of(weight: ir.Value) -> tuple[int, ...]:
    assert weight.const_value is not None
    return tuple(int(d) for d in weight.const_value.shape.numpy())


def _not_float(weight: ir.Value) -> bool:
    return weight.const_value is None or weight.const_value.dtype not in _FLOATS


def _other_type(weight: ir.Value) -> str | None:
    """Why a weight that is not float is no site; integers are nothing to wonder about."""
    double = weight.const_value is not None and weight.const_value.dtype == ir.DataType.DOUBLE
    return "a float64 weight has no kernel; convert the model to float32" if double else None


def _match_matmul(node: ir.Node) -> Site | str | None:
    source = _constant_source(node.inputs[1])
    if source is None:
        left = _constant_source(node.inputs[0])
        if left is not None and not _not_float(left[0]):
            return "the constant is the left operand, which no block-quantized kernel takes"
        return _decoded_source(node.inputs[1])
    weight, transpose = source
    if _not_float(weight):
        return _other_type(weight)
    if _constant_source(node.inputs[0]) is not None:
        return "both operands are constants; fold them into one"
    shape = _shape_of(weight)
    if transpose is not None:
        return Site("", node, weight, "NK", shape[0], shape[1], transpose=transpose)
    if len(shape) == 2:
        return Site("", node, weight, "KN", shape[1], shape[0])
    if len(shape) == 3 and shape[0] == 1 and _rank(node.inputs[0]) >= 3:
        return Site("", node, weight, "1KN", shape[2], shape[1])
    return f"a batch of constant weights of shape {list(shape)} is not one matrix"


def _rank(value: ir.Value | None) -> int:
    return value.shape.rank() if value is not None and value.shape is not None else 0


def _match_gemm(node: ir.Node) -> Site | str | None:
    source = _constant_source(node.inputs[1])
    if source is None:
        return _decoded_source(node.inputs[1])
    if _not_float(source[0]):
        return _other_type(source[0])
    weight, transpose = source
    for name, wanted in (("alpha", 1.0), ("beta", 1.0), ("transA", 0)):
        attribute = node.attributes.get(name)
        if attribute is not None and attribute.value != wanted:
            return f"Gemm with {name} = {attribute.value} is not a plain linear layer"
    if transpose is not None:
        return "Gemm whose weight goes through a Transpose; fold the transposition into the weight"
    flag = node.attributes.get("transB")
    shape = _shape_of(weight)
    if flag is not None and flag.as_int():
        return Site("", node, weight, "NK", shape[0], shape[1])
    return Site("", node, weight, "KN", shape[1], shape[0])


def _match_conv(node: ir.Node) -> Site | str | None:
    weight = node.inputs[1]
    if weight is None or not _is_weight(weight):
        return _decoded_source(weight)
    if _not_float(weight):
        return _other_type(weight)
    shape = _shape_of(weight)
    layout, columns = "N:" + ",".join(map(str, shape[1:])), math.prod(shape[1:])
    problem = _not_linear(node, shape)
    return Site("", node, weight, layout, shape[0], columns, "conv" if problem else "linear", not_linear=problem)


def _not_linear(node: ir.Node, shape: tuple[int, ...]) -> str:
    """Why a convolution with a weight of this shape is no linear layer over its channels; empty if it is one."""
    if any(size != 1 for size in shape[2:]):
        return f"a convolution with a kernel of {list(shape[2:])} has no weight-only kernel"

    def values(name: str, default: int) -> tuple[int, ...]:
        attribute = node.attributes.get(name)
        return attribute.as_ints() if attribute is not None else (default,)

    group = node.attributes.get("group")
    if group is not None and group.as_int() != 1:
        return f"a convolution of {group.as_int()} groups is not one matrix"
    auto_pad = node.attributes.get("auto_pad")
    if any(s != 1 for s in values("strides", 1)) or any(p != 0 for p in values("pads", 0)):
        return "a convolution of kernel 1 with stride or padding is not a linear layer"
    if auto_pad is not None and auto_pad.as_string() not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
        return "a convolution with unknown auto_pad is not a linear layer"
    return ""


def _match_gather(node: ir.Node) -> Site | str | None:
    axis = node.attributes.get("axis")
    if axis is not None and axis.as_int() not in (0, -2):  # of the two axes of a table
        return None
    source = _constant_source(node.inputs[0])
    if source is None:
        return _decoded_source(node.inputs[0])
    if _not_float(source[0]) or _is_weight(node.inputs[1]):
        return None
    weight, transpose = source
    shape = _shape_of(weight)
    if len(shape) != 2:
        return None
    if shape[0] * shape[1] < _SMALLEST_TABLE:
        return f"a table of {shape[0]} x {shape[1]} is too small to gain from quantization"
    if transpose is not None:
        return Site("", node, weight, "KN", shape[1], shape[0], role="embedding", transpose=transpose)
    return Site("", node, weight, "NK", shape[0], shape[1], role="embedding")


def _decoded_source(value: ir.Value | None) -> str | None:
    """Recognize a constant behind operators: codes of a weight that is quantized already, or a float to be folded."""
    steps = []
    constant = True
    while value is not None and not _is_weight(value):
        node = value.producer()
        if node is None or node.domain != "" or node.op_type not in _DECODING:
            return None
        steps.append(node.op_type)
        constant = constant and all(other is None or _is_weight(other) for other in node.inputs[1:])
        value = node.inputs[0]
    if value is None or value.const_value is None:
        return None
    path = " -> ".join(reversed(steps))
    if value.const_value.dtype in _INTEGERS:
        return f"quantized already: {value.const_value.dtype.name.lower()} codes behind {path}"
    if constant and value.const_value.dtype in _FLOATS:
        return f"the weight is behind {path}; fold that into it first"
    return None


def _match_recurrent(node: ir.Node) -> str:
    if node.op_type == "LSTM":
        return "no weight-only kernel runs an LSTM; w8a8-dynamic runs it on integers on the CPU"
    return f"ONNX Runtime has no integer kernel for {node.op_type}"


def _match_transposed_conv(node: ir.Node) -> str:
    return "a transposed convolution has no integer kernel"


# What turns codes into a float weight.
_DECODING = {"DequantizeLinear", "Cast", "Mul", "Sub", "Reshape", "Transpose", "Identity"}
_INTEGERS = {
    ir.DataType[name] for name in ("INT8", "UINT8", "INT4", "UINT4", "INT2", "UINT2", "FLOAT8E4M3FN", "FLOAT8E5M2") if
    name in ir.DataType.__members__
}  # fmt: skip
# Operators that exist only in quantized models.
_QUANTIZED_OPS = {
    "MatMulNBits", "MatMulBnb4", "GatherBlockQuantized", "QLinearMatMul", "QLinearConv", "QGemm", "MatMulInteger",
    "ConvInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QAttention", "QMoE", *OPERATORS,
}  # fmt: skip


_MATCHERS: dict[str, Callable[[ir.Node], Site | str | None]] = {
    "MatMul": _match_matmul, "Gemm": _match_gemm, "Conv": _match_conv, "Gather": _match_gather,
    "LSTM": _match_recurrent, "GRU": _match_recurrent, "RNN": _match_recurrent, "ConvTranspose": _match_transposed_conv,
}  # fmt: skip


def _find_lm_head(model: ir.Model, sites: list[Site]) -> None:
    """Mark the projection onto the vocabulary: tied to a lookup table, or as wide as one and read by no other site."""
    tables = [site for site in sites if site.role == "embedding"]
    inputs = {site.node for site in sites}
    for site in sites:
        if site.role != "linear":
            continue
        tied = any(table.weight is site.weight for table in tables)
        if tied or (any(table.rows == site.rows for table in tables) and _ends_at_output(site.node, inputs)):
            site.role = "lm_head"


def _ends_at_output(node: ir.Node, sites: set[ir.Node]) -> bool:
    """Whether no other site reads, directly or not, what `node` computes."""
    seen, todo = {node}, [node]
    while todo:
        for output in todo.pop().outputs:
            for user in output.consumers():
                if user in sites:
                    return False
                if user not in seen:
                    seen.add(user)
                    todo.append(user)
    return True
