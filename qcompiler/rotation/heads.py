"""The values of an attention, whose channels can be mixed inside each head.

Attention weighs the values of a head with one number for each token, so for any R [D, D] the weighted sum of v R is
that of v, times R. `foldings` finds the way from the value projection to the layers that read the result, for factors
of single channels; here every operator on it has to treat the channels of a head alike.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.foldings import Folding
from qcompiler.foldings.rules import constant_read, label, pass_through
from qcompiler.foldings.shapes import BlockedError
from qcompiler.graph import Site, constant_array
from qcompiler.rotation.mixing import Changes, Mix
from qcompiler.rotation.operators import one_value

__all__ = ["HeadPlan", "linear_heads", "mix_heads", "plan_heads", "reads_attention"]

_ATTENTIONS = {"MatMul", "Attention", "MultiHeadAttention", "GroupQueryAttention"}
_MOVES = {
    "Identity", "Dropout", "Cast", "Neg", "Reshape", "Transpose", "Unsqueeze", "Squeeze", "Expand", "Split", "Slice",
    "Shape", "Size",
}  # fmt: skip


@dataclass(frozen=True)
class HeadPlan:
    """The channels of an attention's values.

    Attributes:
        source: The linear layer that computes them, perhaps among other things.
        heads: int ``[G, D]``, its rows that make up each key and value head.
        readers: The linear layers that read the result.
        columns: int ``[H, D]``, their columns for each query head.
        owner: int ``[H]``, the key and value head of each query head.
        constants: (node, input, rows of its elements) of biases.
    """

    source: Site
    heads: np.ndarray
    readers: tuple[Site, ...]
    columns: np.ndarray
    owner: np.ndarray
    constants: tuple[tuple[ir.Node, int, np.ndarray], ...]


def plan_heads(folding: Folding) -> HeadPlan:
    """The heads behind a folding of kind "attention"; raises BlockedError where its channels are not those of heads."""
    plan = folding.plan
    assert plan is not None and plan.rows is not None, folding.reason
    site, rows = plan.rows
    stop = {reader.node for reader in plan.readers}
    heads: dict[tuple[int, ...], int] = {}
    # Channels are numbered as rows before the attention; behind it, as rows of one query head after the other.
    before: dict[ir.Value, np.ndarray] = {site.node.outputs[0]: rows}
    behind: dict[ir.Value, np.ndarray] = {}
    found: list[np.ndarray] = []
    todo = [(site.node.outputs[0], False)]
    while todo:
        value, attended = todo.pop()
        channels = (behind if attended else before)[value]
        for node, index in value.uses():
            if node in stop:
                found.append(channels.reshape(-1))
                continue
            _require_alike(node, index, attended)
            for output, ids in pass_through(node, index, channels).outputs.items():
                attends = node.op_type in _ATTENTIONS
                (behind if attended or attends else before)[output] = (
                    _numbered(node, ids, site.rows, heads) if attends else ids
                )
                todo.append((output, attended or attends))
    members = _head_rows(heads, label(site.node))
    columns, owner = _columns(found, site.rows, members)
    for node, place, ids in plan.constants:
        _require_all(node, place, ids, members)
    return HeadPlan(site, members, tuple(plan.readers), columns, owner, tuple(plan.constants))


def linear_heads(folding: Folding) -> HeadPlan:
    """The heads that the folding's channels make up, between linear layers alone; raises BlockedError."""
    if not folding.legal:
        raise BlockedError(folding.reason)
    plan = plan_heads(folding)
    for site in (plan.source, *plan.readers):
        if site.node.op_type == "Conv":
            raise BlockedError(f"{label(site.node)} is a convolution")
        if site.nested:
            raise BlockedError(f"'{site.name}' is inside the body of {site.nested}")
    if plan.heads.shape[1] < 2:
        raise BlockedError("its heads have one channel")
    return plan


def mix_heads(plan: HeadPlan, matrices: np.ndarray, changes: Changes) -> None:
    """Note what becomes of the constants around an attention; matrices ``[G, D, D]``."""
    changes.rows(plan.source, Mix(plan.heads, matrices))
    columns = Mix(plan.columns, matrices[plan.owner])
    for site in plan.readers:
        changes.columns(site, columns)
    for node, index, ids in plan.constants:
        value = node.inputs[index]
        assert value is not None
        array = constant_array(value).astype(np.float64)
        shape = array.shape
        flat = np.broadcast_to(array.reshape(-1) if array.size > 1 else array.reshape(1), ids.size).copy()
        place = np.full(plan.source.rows, -1)
        places = ids.reshape(-1)
        place[places[places >= 0]] = np.flatnonzero(places >= 0)
        mixed = Mix(place[plan.heads], matrices).apply(flat)
        changes.constant((node, index), mixed.reshape(shape if array.size == ids.size else ids.shape))


def reads_attention(value: ir.Value) -> bool:
    """Whether a value is the result of an attention, perhaps in another shape."""
    node = value.producer()
    while node is not None and node.op_type in _MOVES and node.inputs:
        source = node.inputs[0]
        node = source.producer() if source is not None else None
    if node is None or node.op_type not in _ATTENTIONS:
        return False
    operand = node.inputs[1] if node.op_type == "MatMul" else None
    return operand is None or (operand.const_value is None and not _is_constant(operand))


def _is_constant(value: ir.Value) -> bool:
    """Whether a value is a weight behind a Transpose, or decoded from codes."""
    node = value.producer()
    while node is not None and node.inputs and node.inputs[0] is not None:
        if node.inputs[0].const_value is not None:
            return True
        if node.op_type not in ("Transpose", "Cast", "Reshape", "Identity"):
            return False
        node = node.inputs[0].producer()
    return False


def _require_all(node: ir.Node, index: int, ids: np.ndarray, heads: np.ndarray) -> None:
    """Refuse a constant that does not have each channel of the heads once."""
    value = node.inputs[index]
    assert value is not None and value.const_value is not None
    shape = np.broadcast_shapes(ids.shape, [int(size) for size in value.const_value.shape.numpy()])
    if np.prod(shape) != ids.size or not np.array_equal(np.sort(ids[ids >= 0]), np.sort(heads.reshape(-1))):
        raise BlockedError(f"'{value.name}' does not have each channel of the heads once")


def _require_alike(node: ir.Node, index: int, attended: bool) -> None:
    """Refuse what treats channels of a head differently."""
    if node.op_type in _MOVES:
        return
    if node.op_type in _ATTENTIONS:
        if attended:
            raise BlockedError(f"{label(node)} is a second attention on the same values")
        return
    if node.op_type in ("Add", "Sub") and not attended and constant_read(node, 1 - index) is not None:
        return
    if node.op_type in ("Mul", "Div") and one_value(node.inputs[1 - index], node.inputs[index]):
        return
    raise BlockedError(f"{label(node)} does not treat the channels of a head alike")


def _numbered(node: ir.Node, ids: np.ndarray, rows: int, heads: dict[tuple[int, ...], int]) -> np.ndarray:
    """Channels of an attention's result, numbered by query head; notes the rows of each key and value head."""
    matrix = ids.reshape(-1, ids.shape[-1])  # [H, D]
    if ids.ndim == 1 and node.op_type != "MatMul":
        count = node.attributes.get_int("num_heads", 0) or node.attributes.get_int("q_num_heads", 0)
        if count <= 0 or ids.size % count:
            raise BlockedError(f"{label(node)} does not say how many heads it has")
        matrix = ids.reshape(count, -1)
    for head in matrix:
        heads.setdefault(tuple(int(channel) for channel in head), len(heads))
    numbers = np.where(matrix >= 0, np.arange(len(matrix))[:, None] * rows + matrix, -1)
    return np.asarray(numbers.reshape(ids.shape))


def _head_rows(heads: dict[tuple[int, ...], int], name: str) -> np.ndarray:
    """The rows of each key and value head, [G, D]."""
    rows = [head for head in heads if any(channel >= 0 for channel in head)]
    channels = [channel for head in rows for channel in head]
    if not rows or len({len(head) for head in rows}) > 1:
        raise BlockedError(f"the heads of {name} are not of one size")
    if min(channels) < 0 or len(set(channels)) < len(channels):
        raise BlockedError(f"the heads of {name} overlap")
    return np.array(rows, dtype=np.int64)


def _columns(found: list[np.ndarray], rows: int, heads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns [H, D] that read each query head, in the order of the rows of its key and value head; which that is."""
    numbers = found[0]
    if any(not np.array_equal(other, numbers) for other in found[1:]):
        raise BlockedError("the layers behind the attention read its heads in different orders")
    place = {int(number): column for column, number in enumerate(numbers)}
    if len(place) < len(numbers) or min(place) < 0:
        raise BlockedError("a layer behind the attention reads a channel twice, or what is no value")
    columns: list[list[int]] = []
    owner: list[int] = []
    for query in sorted({number // rows for number in place}):
        group = next((g for g, head in enumerate(heads) if query * rows + int(head[0]) in place), 0)
        taken = [place[number] for channel in heads[group] if (number := query * rows + int(channel)) in place]
        if len(taken) < heads.shape[1]:
            raise BlockedError("a layer behind the attention does not read all channels of a head")
        columns.append(taken)
        owner.append(group)
    if len(columns) * heads.shape[1] != len(numbers):
        raise BlockedError("a layer behind the attention reads something else beside the heads")
    return np.array(columns, dtype=np.int64), np.array(owner, dtype=np.int64)
