"""What is known about the sizes of the values of a model, those that its exporter did not note included."""

from collections.abc import Sequence

import onnx_ir as ir

from qcompiler.graph import constant_array

__all__ = ["Dim", "constant_ints", "dims_of", "note_sizes", "target_dims"]

# A size, a symbol, or nothing known.
Dim = int | str | None
_KEY = "qcompiler.sizes"
_ELEMENTWISE = {"Add", "Sub", "Mul", "Div", "Pow", "Where", "Min", "Max", "PRelu"}
_UNARY = {
    "Identity", "Cast", "Relu", "LeakyRelu", "Neg", "Abs", "Sqrt", "Reciprocal", "Exp", "Log", "Erf", "Tanh", "Sigmoid",
    "Softmax", "Gelu", "Clip", "Dropout", "IsNaN", "Not", "LayerNormalization", "RMSNormalization",
    "SimplifiedLayerNormalization", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization",
}  # fmt: skip
_REDUCTIONS = {"ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2"}


def constant_ints(value: ir.Value | None) -> list[int] | None:
    """The numbers of an integer initializer, or None."""
    if value is None or value.const_value is None:
        return None
    return [int(number) for number in constant_array(value).reshape(-1)]


def dims_of(value: ir.Value | None) -> list[Dim] | None:
    """What is known about the sizes of a value; None where not even their number is."""
    if value is None:
        return None
    if value.const_value is not None:
        return [int(size) for size in value.const_value.shape.numpy()]
    if value.shape is not None:
        return [dim if isinstance(dim, int) else dim.value for dim in value.shape]
    known: list[Dim] | None = value.meta.get(_KEY)
    return known


def note_sizes(model: ir.Model) -> None:
    """Find out, for `dims_of`, what follows from sizes that are known; the model's own annotations stay as they are."""
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for output in node.outputs:
            output.meta.pop(_KEY, None)
        if node.outputs and node.inputs and node.outputs[0].shape is None:
            dims = _result_dims(node)
            if dims is not None:
                node.outputs[0].meta[_KEY] = dims


def target_dims(value: ir.Value | None) -> list[Dim] | None:
    """What is known about the sizes that a shape tensor holds, -1 and 0 as they are written."""
    known = constant_ints(value)
    if known is not None or value is None:
        return list(known) if known is not None else None
    node = value.producer()
    if node is not None and node.domain == "" and node.op_type == "Concat":
        parts = [target_dims(part) for part in node.inputs]
        return None if any(part is None for part in parts) else [dim for part in parts for dim in part or []]
    if node is not None and node.domain == "" and node.op_type == "Unsqueeze":
        return [None]
    dims = dims_of(value)
    return [None] * dims[0] if dims is not None and len(dims) == 1 and isinstance(dims[0], int) else None


def _result_dims(node: ir.Node) -> list[Dim] | None:
    """The sizes of a node's first result."""
    op, every = node.op_type, [dims_of(value) for value in node.inputs if value is not None]
    first = every[0] if every and node.inputs[0] is not None else None
    if op in _ELEMENTWISE:
        return _broadcast(every)
    if op == "Transpose" and "perm" in node.attributes:
        perm = node.attributes["perm"].as_ints()
        return [first[axis] if first is not None else None for axis in perm]
    if first is None:
        return None
    if op in _UNARY:
        return first
    if op in _REDUCTIONS and ("keepdims" not in node.attributes or node.attributes["keepdims"].as_int()):
        return [None] * len(first)
    if op in ("MatMul", "Gemm", "Conv"):
        return _product_dims(node, first, every[1])
    if op == "Gather" and "axis" not in node.attributes and every[1] is not None:
        return every[1] + first[1:]
    if op == "Shape" and not node.attributes:
        return [len(first)]
    if op == "Slice":
        return [None] * len(first)
    return _moved_dims(node, first)


def _moved_dims(node: ir.Node, first: list[Dim]) -> list[Dim] | None:
    """The sizes of what changes shape alone."""
    if node.op_type == "Reshape":
        return _reshape_dims(node, first)
    if node.op_type == "Expand":
        return _broadcast([first, target_dims(node.inputs[1])])
    axes = constant_ints(node.inputs[1]) if node.op_type == "Unsqueeze" and len(node.inputs) > 1 else None
    if axes is None:
        return None
    rank = len(first) + len(axes)
    rest, places = iter(first), {axis % rank for axis in axes}
    return [1 if axis in places else next(rest) for axis in range(rank)]


def _product_dims(node: ir.Node, first: list[Dim], second: list[Dim] | None) -> list[Dim] | None:
    if second is None:
        return None
    if node.op_type == "Conv":
        return [first[0], second[0], *[None] * (len(first) - 2)]
    if node.op_type == "Gemm":
        return [None, None]
    if len(first) < 2 or len(second) < 2:
        return None
    batch = _broadcast([first[:-2], second[:-2]])
    return None if batch is None else [*batch, first[-2], second[-1]]


def _broadcast(every: Sequence[list[Dim] | None]) -> list[Dim] | None:
    known = [dims for dims in every if dims is not None]
    if len(known) < len(every) or not known:
        return None
    rank = max(map(len, known))
    columns = zip(*([*[1] * (rank - len(dims)), *dims] for dims in known), strict=True)
    return [_joined(column) for column in columns]


def _joined(sizes: Sequence[Dim]) -> Dim:
    """What sizes become when they are broadcast: a number above 1 decides; what is not known may be 1."""
    given = [size for size in sizes if size != 1]
    numbers = [size for size in given if isinstance(size, int)]
    if numbers:
        return numbers[0]
    return 1 if not given else given[0] if len(set(given)) == 1 else None


def _reshape_dims(node: ir.Node, inner: list[Dim]) -> list[Dim] | None:
    target = target_dims(node.inputs[1])
    if target is None:
        return None
    zero = node.attributes.get("allowzero")
    copies = zero is None or not zero.as_int()

    def size(axis: int, dim: Dim) -> Dim:
        if dim == 0 and copies and axis < len(inner):
            return inner[axis]
        return dim if not isinstance(dim, int) or dim > 0 else None

    return [size(axis, dim) for axis, dim in enumerate(target)]
