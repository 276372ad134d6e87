"""How factors of channels pass through an operator: if what it reads is divided by them, what becomes of its results.

Each rule takes a node, the number of the input whose channels are scaled, and these channels (see `foldings.shapes`).
It returns the channels of the results that are scaled with them, and what constants have to be divided as well. All
operators here are positive homogeneous in that input: f(x / s) = f(x) / s for s > 0. Anything else blocks the factors.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompiler.foldings.shapes import BlockedError, from_right, reshaped
from qcompiler.foldings.sizes import constant_ints, dims_of, target_dims

__all__ = ["Passed", "carriers", "constant_read", "constant_size", "label", "pass_through"]

_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
# They read the size of a tensor, not its values.
_SIZES = {"Shape", "Size"}
# Where two computed values may meet, one of them scaled; a node that meets scaled channels twice is not homogeneous.
_GATES = {"Mul", "Div"}


@dataclass
class Passed:
    """What becomes of scaled channels at a node.

    Attributes:
        outputs: The channels of each result that is scaled.
        constants: (reading node, input, channels) of constants to divide.
        caches: Values that hold scaled channels from one run of the model to the next.
        misused: Channels that are needed for something else, and must not be scaled.
    """

    outputs: dict[ir.Value, np.ndarray] = field(default_factory=dict)
    constants: list[tuple[ir.Node, int, np.ndarray]] = field(default_factory=list)
    caches: list[ir.Value] = field(default_factory=list)
    misused: np.ndarray | None = None


_Rule = Callable[[ir.Node, int, np.ndarray], Passed]


def pass_through(node: ir.Node, index: int, channels: np.ndarray) -> Passed:
    """Apply the operator's rule; raises BlockedError."""
    rule = _RULES.get((_domain(node), node.op_type))
    if rule is None:
        raise BlockedError(f"{label(node)} does not let factors pass")
    return rule(node, index, channels)


def carriers(node: ir.Node) -> Iterable[int]:
    """The inputs whose channels may be those of the first result."""
    key = (_domain(node), node.op_type)
    if key not in _RULES:
        return ()
    if node.op_type in ("Add", "Sub"):
        return [i for i in (0, 1) if constant_read(node, 1 - i) is not None]
    if node.op_type in _GATES:
        return [i for i in (0, 1) if constant_read(node, i) is None and (i == 0 or node.op_type == "Mul")]
    if key in _ATTENTION:
        value_input = _ATTENTION[key].value
        return [value_input if len(node.inputs) > value_input and node.inputs[value_input] is not None else 0]
    return [1] if node.op_type == "MatMul" else [0]


def constant_read(node: ir.Node, index: int) -> tuple[ir.Node, int] | None:
    """Where a float constant that reaches an input is read: there, or by a Cast of which this is the only reader."""
    value = node.inputs[index]
    if value is None:
        return None
    cast = value.producer()
    if cast is not None and cast.op_type == "Cast" and len(value.uses()) == 1 and not value.is_graph_output():
        node, index, value = cast, 0, cast.inputs[0]
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    return (node, index) if value.const_value.dtype in _FLOATS else None


def label(node: ir.Node) -> str:
    """A node as messages name it."""
    return f"{node.op_type} '{node.name or node.outputs[0].name}'"


def _domain(node: ir.Node) -> str:
    return "" if node.domain == "ai.onnx" else node.domain


def _same(node: ir.Node, index: int, channels: np.ndarray) -> Passed:
    if index:
        raise BlockedError(f"{label(node)} does not let factors pass")
    return Passed({node.outputs[0]: channels})


def _cast(node: ir.Node, index: int, channels: np.ndarray) -> Passed:
    if ir.DataType(node.attributes["to"].as_int()) not in _FLOATS:
        raise BlockedError(f"{label(node)} rounds")
    return _same(node, index, channels)


def _size(node: ir.Node, index: int, channels: np.ndarray) -> Passed:
    del node, index, channels
    return Passed()


def _product(node: ir.Node, index: int, channels: np.ndarray) -> Passed:
    if node.op_type == "Div" and index:
        raise BlockedError(f"{label(node)} divides by it")
    return Passed({node.outputs[0]: channels})


def _sum(node: ir.Node, index: int, channels: np.ndarray) -> Passed:
    place = constant_read(node, 1 - index)
    if place is None:
        raise BlockedError(f"{label(node)} adds it to what is not scaled")
    return Passed({node.outputs[0]: channels}, [(*place, channels)])


def _reshape(node: ir.Node, index: int, channels: np.ndarray) -> Passed:
    if index:
        raise BlockedError(f"{label(node)} takes it for a shape")
    before, target = dims_of(node.inputs[0]), target_dims(node.inputs[1])
    found = dims_of(node.outputs[0]) or []
    zero = node.attributes.get("allowzero")
    after = list(found) or [None] * len(target or [])
    for axis, dim in enumerate(target or []):
        if isinstance(dim, int) and dim > 0:
            after[axis] = dim
        elif dim == 0 and not (zero is not None and zero.as_int()) and before is not None and axis < len(before):
            after[axis] = before[axis]
    return Passed({node.outputs[0]: reshaped(channels, before, after, node.name or node.op_type)})


def _transpose(node: ir.Node, index: int, channels: np.ndarray) -> Passed:
    del index
    dims = dims_of(node.inputs[0])
    perm = list(node.attributes["perm"].as_ints()) if "perm" in node.attributes else None
    if perm is None:
        if dims is None:
            raise BlockedError(f"the rank of what {label(node)} reads is not known")
        perm = list(range(len(dims)))[::-1]
    ids = channels.reshape((1,) * (len(perm) - channels.ndim) + channels.shape)
    return Passed({node.outputs[0]: ids.transpose(perm)})


def _unsqueeze(node: ir.Node, index: int, channels: np.ndarray) -> Passed:
    axes = constant_ints(node.inputs[1]) if len(node.inputs) > 1 else None
    dims = dims_of(node.inputs[0])
    if index or axes is None or (dims is None and any(axis >= 0 for axis in axes)):
        raise BlockedError(f"where {label(node)} puts its axes is not known")
    rank = (len(dims) if dims is not None else channels.ndim) + len(axes)
    ids = channels.reshape((1,) * (rank - len(axes) - channels.ndim) + channels.shape)
    if dims is None and any(-axis > rank for axis in axes):
        return Passed({node.outputs[0]: channels})
    return Passed({node.outputs[0]: np.expand_dims(ids, tuple(axis % rank for axis in axes))})


def _squeeze(node: ir.Node, index: int, channels: np.ndarray) -> Passed:
    axes = constant_ints(node.inputs[1]) if len(node.inputs) > 1 else None
    if index or axes is None:
        raise BlockedError(f"which axes {label(node)} removes is not known")
    places = [from_right(axis, node.inputs[0]) for axis in axes]
    ids = channels.reshape((1,) * (max(-axis for axis in places) - channels.ndim) + channels.shape)
    return Passed({node.outputs[0]: ids.squeeze(tuple(axis + ids.ndim for axis in places))})


def _split(node: ir.Node, index: int, channels: np.ndarray) -> Passed:
    axis = from_right(node.attributes["axis"].as_int() if "axis" in node.attributes else 0, node.inputs[0])
    if index or -axis > channels.ndim or channels.shape[axis] == 1:
        return Passed(dict.fromkeys(node.outputs, channels))
    count, size = len(node.outputs), channels.shape[axis]
    sizes = constant_ints(node.inputs[1]) if len(node.inputs) > 1 else None
    if len(node.inputs) < 2:
        step = -(-size // count)
        sizes = [min(step, size - i * step) for i in range(count)]
    if sizes is None or sum(sizes) != size:
        raise BlockedError(f"the sizes of {label(node)} are not known")
    parts = np.split(channels, np.cumsum(sizes)[:-1], axis)
    return Passed({output: part for output, part in zip(node.outputs, parts, strict=True) if (part >= 0).any()})


def _slice(node: ir.Node, index: int, channels: np.ndarray) -> Passed:
    starts, ends, axes, steps = (constant_ints(node.inputs[i]) if i < len(node.inputs) else None for i in (1, 2, 3, 4))
    if index or (len(node.inputs) > 4 and steps is None) or (axes is None and len(node.inputs) > 3):
        raise BlockedError(f"what {label(node)} takes is not known")
    if axes is None:
        axes = list(range(len(starts or [])))
    ids = channels
    for i, axis in enumerate(axes):
        place = from_right(axis, node.inputs[0])
        if -place > ids.ndim or ids.shape[place] == 1:
            continue
        if starts is None or ends is None:
            raise BlockedError(f"what {label(node)} takes is not known")
        ids = np.moveaxis(np.moveaxis(ids, place, 0)[slice(starts[i], ends[i], steps[i] if steps else 1)], 0, place)
    return Passed({node.outputs[0]: ids} if (ids >= 0).any() else {})


def _values_of_attention(node: ir.Node, index: int, channels: np.ndarray) -> Passed:
    """MatMul(probabilities, values): sums over tokens, so channels must not depend on the token."""
    if index == 0 or (channels.ndim > 1 and channels.shape[-2] > 1):
        raise BlockedError(f"{label(node)} sums over the channels")
    return Passed({node.outputs[0]: channels})


@dataclass(frozen=True)
class _Attention:
    """Inputs and outputs of a fused attention; the attributes that count heads; where a bias for q, k and v is read."""

    value: int
    past: int
    present: int
    heads: str
    kv_heads: str
    bias: int | None = None
    scales: tuple[int, ...] = ()
    packed: bool = False


_ATTENTION = {
    ("com.microsoft", "GroupQueryAttention"): _Attention(
        2, 4, 2, "num_heads", "kv_num_heads", scales=(12, 13), packed=True
    ),
    ("com.microsoft", "MultiHeadAttention"): _Attention(2, 7, 2, "num_heads", "num_heads", 3),
    ("", "Attention"): _Attention(2, 5, 2, "q_num_heads", "kv_num_heads"),
}


def _fused_attention(node: ir.Node, index: int, channels: np.ndarray) -> Passed:
    """Values ``[B, S, KV * D]``, or queries, keys and values side by side, or ``[B, KV, S, D]``: repeated per group."""
    kind = _ATTENTION[_domain(node), node.op_type]

    def present(i: int | None) -> ir.Value | None:
        return node.inputs[i] if i is not None and i < len(node.inputs) else None

    def count(name: str) -> int:
        if name not in node.attributes:
            raise BlockedError(f"{label(node)} does not say how many heads it has")
        return node.attributes[name].as_int()

    packed = present(kind.value) is None
    if index != (0 if packed else kind.value) or (packed and not kind.packed):
        raise BlockedError(f"{label(node)} reads it for something else than values")
    if any(present(i) is not None for i in kind.scales):
        raise BlockedError(f"{label(node)} quantizes its cache")
    if channels.ndim > 1 and (channels.ndim != 4 or channels.shape[0] > 1 or channels.shape[2] > 1):
        raise BlockedError(f"{label(node)} sums over the channels")
    ids, constants, caches, misused = channels, [], [], None
    if channels.ndim == 1:
        heads, groups = count(kind.heads), count(kind.kv_heads)
        if packed:
            size = len(ids) // (heads + 2 * groups)
            misused, ids = ids[: -groups * size], ids[-groups * size :]
        bias = present(kind.bias)
        if bias is not None:
            place = constant_read(node, kind.bias or 0)
            if place is None:
                raise BlockedError(f"{label(node)} adds '{bias.name}' to it")
            before = constant_size(place) - len(ids)  # of queries and keys
            constants.append((*place, np.concatenate([np.full(before, -1), ids])))
        ids = ids.reshape(groups, -1).repeat(heads // groups, axis=0).reshape(-1)
    elif ids.shape[1] > 1:
        dims = dims_of(node.inputs[0])
        queries = dims[1] if dims is not None and len(dims) == 4 else None
        if not isinstance(queries, int):
            raise BlockedError(f"how many heads {label(node)} has is not known")
        ids = ids.repeat(queries // ids.shape[1], axis=1)
    past = present(kind.past)
    if past is not None:
        caches.append(past)
    result = node.outputs[kind.present] if kind.present < len(node.outputs) else None
    if result is not None and (result.uses() or result.is_graph_output()):
        caches.append(result)
    return Passed({node.outputs[0]: ids}, constants, caches=caches, misused=misused)


def constant_size(place: tuple[ir.Node, int]) -> int:
    """The number of elements of a constant that is read at (node, input)."""
    value = place[0].inputs[place[1]]
    assert value is not None and value.const_value is not None
    return int(value.const_value.size)


_RULES: dict[tuple[str, str], _Rule] = {
    **dict.fromkeys([("", name) for name in ("Identity", "Relu", "LeakyRelu", "PRelu", "Neg", "Dropout")], _same),
    **dict.fromkeys([("", name) for name in _SIZES], _size),
    **dict.fromkeys([("", name) for name in _GATES], _product),
    **dict.fromkeys(_ATTENTION, _fused_attention),
    ("", "Expand"): _same, ("", "Cast"): _cast, ("", "Add"): _sum, ("", "Sub"): _sum, ("", "Reshape"): _reshape,
    ("", "Transpose"): _transpose, ("", "Unsqueeze"): _unsqueeze, ("", "Squeeze"): _squeeze, ("", "Split"): _split,
    ("", "Slice"): _slice, ("", "MatMul"): _values_of_attention,
}  # fmt: skip
