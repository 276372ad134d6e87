"""A decoder with a key-value cache out of one that was exported without.

What a causal model computes of a token does not hang on later ones. So only the newest token has to be run, if its
queries meet the keys and values of all tokens before. In the graph:

1. *Content* is what is computed from the lookups of token ids. The rest (masks, angles of rotary embeddings, learned
   positions) is the same for all texts of a length: it is computed once, for the longest, and a step is fed its row.
2. A product of two contents is attention: the first kind makes scores out of queries and keys ``[.., d, T]``, the
   second weights values ``[.., T, d]``. The second operand of either is joined to that of the steps before, which
   becomes an input and an output.
3. Shapes follow from what is fed, a text of one token.

Whether that holds is not proven but tried: what the new graph makes of two texts, token by token, has to be what the
model makes of them whole. That also shows that the model is causal. Where it does not hold, there is no such decoder.
"""

import logging
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from qcompiler.calibration_inputs import ModelInputs
from qcompiler.errors import KernelError
from qcompiler.graph import unique_name
from qcompiler.segments import read_values
from qcompiler.session import Feeds
from qcompiler.synthetic.decoders import Part, Sessions, input_dtypes

__all__ = ["SteppedDecoder", "stepped_decoder"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

# Lengths that tell which axes count tokens: hardly anything else has sizes that differ as these do.
_PROBES = (5, 7)
# Of the largest logit: in float16 two orders of summation differ by a thousandth, a wrong graph by more.
_TOLERANCE = 1e-2
# Axes of scores, from the end.
_QUERY, _KEY = -2, -1
# What leads from the ids of the graph to those that are looked up.
_PLAIN = ("Cast", "Identity")


class _NoCacheError(Exception):
    """Why no cache could be derived."""


@dataclass
class _Plan:
    """Where the graph is changed.

    Attributes:
        joined: Operands that a cache is joined to, with the axis of tokens, from the end.
        aside: What is no content and read by some: whether it meets scores, by value.
        contents: Nodes that compute contents.
    """

    joined: dict[ir.Value, int] = field(default_factory=dict)
    aside: dict[ir.Value, bool] = field(default_factory=dict)
    contents: set[ir.Node] = field(default_factory=set)


@dataclass(frozen=True)
class _Joint:
    """A cache: its name as an input and as an output, and what it is before the first token of a row."""

    past: str
    present: str
    empty: np.ndarray


def stepped_decoder(
    model: ir.Model,
    inputs: ModelInputs,
    logits: str,
    length: int,
    how: Sessions,
    ids: np.ndarray,
    expected: np.ndarray,
) -> "SteppedDecoder | None":
    """Derive a decoder with a cache.

    Args:
        model: Without functions, its constants as initializers; it is not changed.
        inputs: Its inputs.
        logits: The output.
        length: The most tokens of a row.
        how: Where it runs.
        ids: Texts to try it on, int64 ``[B, T]``.
        expected: Their logits, float32 ``[B, T, V]``.

    Returns:
        The decoder; None where it would not compute the same.
    """
    try:
        made = SteppedDecoder(model.clone(), inputs, logits, length, how)
        made.check(ids[:, :length], expected[:, :length])
    except (_NoCacheError, KernelError) as error:
        logger.info("no key-value cache could be derived: %s", error)
        return None
    return made


class SteppedDecoder:
    """The changed graph; see above."""

    longest: int | None

    def __init__(self, model: ir.Model, inputs: ModelInputs, logits: str, length: int, how: Sessions) -> None:
        """Change the graph of `model`, and load it."""
        assert inputs.ids is not None
        self.longest, self._inputs, self._logits, self._ids = length, inputs, logits, inputs.ids.name
        dtypes = input_dtypes(inputs)
        plan = _planned(model, self._ids)

        def values(names: Iterable[str], length: int) -> Feeds:
            """What the model makes of a text; copies, since the arrays of a run keep all memory of their session."""
            part = Part(model, list(dict.fromkeys(names)), dtypes, replace(how, packed=False))
            return {
                name: array.copy() for name, array in part.run(self._feeds(np.zeros((1, length), np.int64))).items()
            }

        names = [value.name or "" for value in (*plan.joined, *plan.aside)]
        short, longer = (values(names, size) for size in _PROBES)
        found = {name: _token_axes(short[name], longer[name], scores) for name, scores in _named(plan.aside)}
        self._axes = {name: axes for name, axes in found.items() if axes}
        self._aside = values(self._axes, length) if self._axes else {}
        _feed_instead(plan, self._axes)
        self._joints = [_joined(model, value, axis, short, longer) for value, axis in plan.joined.items()]
        dtypes.update((name, array.dtype) for name, array in self._aside.items())
        dtypes.update((joint.past, joint.empty.dtype) for joint in self._joints)
        self._part = Part(model, [logits, *(joint.present for joint in self._joints)], dtypes, how)
        sizes = [short[name].nbytes for name, _ in _named(plan.joined)]
        self.bytes_per_token = sum(sizes) // _PROBES[0]
        self._cache: Feeds = {}

    def _feeds(self, ids: np.ndarray) -> Feeds:
        return self._inputs.complete({self._ids: ids}, "text")

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Run the last token on the cache of the others; see `text.Decoder`."""
        place = ids.shape[1] - 1
        feeds = self._feeds(ids[:, place:])
        for name, axes in self._axes.items():
            array = self._aside[name]
            for axis, up_to in axes.items():
                array = array.take(range(0 if up_to else place, place + 1), axis)
            feeds[name] = np.ascontiguousarray(array)
        if not place:
            self._cache = {joint.past: joint.empty.repeat(len(ids), 0) for joint in self._joints}
        results = self._part.run({**feeds, **self._cache})
        self._cache = {joint.past: results[joint.present] for joint in self._joints}
        return np.asarray(results[self._logits][:, -1], np.float32)

    def check(self, ids: np.ndarray, expected: np.ndarray) -> None:
        """Raise _NoCacheError unless the logits of texts ``[B, T]``, token by token, are those expected."""
        steps = np.stack([self.logits(ids[:, : place + 1]) for place in range(ids.shape[1])], axis=1)
        off = float(np.abs(steps - expected).max() / max(float(np.abs(expected).max()), 1e-30))
        if not off <= _TOLERANCE:
            raise _NoCacheError(f"token by token the logits are off by {off:.2g} of the largest")


def _named(values: Mapping[ir.Value, _T]) -> Iterator[tuple[str, _T]]:
    return ((value.name or "", found) for value, found in values.items())


def _planned(model: ir.Model, ids: str) -> _Plan:
    """Find contents and the products of two of them."""
    looked_up = {value for value in model.graph.inputs if value.name == ids}
    contents: set[ir.Value] = set()
    scores: set[ir.Value] = set()
    plan = _Plan()
    for node in model.graph:
        reads = list(read_values(node))
        if node.op_type in _PLAIN and node.inputs[0] in looked_up:
            looked_up.add(node.outputs[0])
        lookup = node.op_type == "Gather" and node.inputs[1] in looked_up and node.inputs[0] not in contents
        if not lookup and (node.op_type == "Shape" or contents.isdisjoint(reads)):
            continue
        contents.update(node.outputs)
        if lookup:
            continue
        plan.contents.add(node)
        meets = not scores.isdisjoint(reads)
        if node.op_type == "MatMul" and contents.issuperset(reads):
            first, second = node.inputs
            assert second is not None
            axis = -2 if first in scores else -1
            if plan.joined.setdefault(second, axis) != axis:
                raise _NoCacheError(f"'{second.name}' is keys and values")
            meets = axis == -1
        scores.update(node.outputs if meets else ())
        for value in reads:
            if value not in contents and value.const_value is None and plan.aside.setdefault(value, meets) != meets:
                raise _NoCacheError(f"'{value.name}' meets scores and other values")
    if not plan.joined:
        raise _NoCacheError("no product of two values that hang on the text was found")
    return plan


def _token_axes(short: np.ndarray, longer: np.ndarray, scores: bool) -> dict[int, bool]:
    """Axes that count tokens, from the end, and whether a step reads all tokens up to its own, or that one alone."""
    axes = [
        axis - short.ndim
        for axis, sizes in enumerate(zip(short.shape, longer.shape, strict=True))
        if sizes[0] != sizes[1]
    ]
    if any((short.shape[axis], longer.shape[axis]) != _PROBES for axis in axes):
        raise _NoCacheError(f"sizes {short.shape} become {longer.shape} where {_PROBES[0]} tokens become {_PROBES[1]}")
    if not set(axes) <= {_QUERY, _KEY} if scores else len(axes) > 1:
        raise _NoCacheError(f"axes of {longer.shape} cannot be told apart")
    return {axis: scores and axis == _KEY for axis in axes}


def _feed_instead(plan: _Plan, names: Container[str]) -> None:
    """Let contents read inputs of these names where they read what is no content."""
    for value in plan.aside:
        if value.name in names:
            fed = ir.Value(name=value.name)
            for node, index in list(value.uses()):
                if node in plan.contents:
                    node.replace_input_with(index, fed)


def _joined(model: ir.Model, value: ir.Value, axis: int, short: Feeds, longer: Feeds) -> _Joint:
    """Join a cache to an operand in front of the products that read it."""
    sizes = [short[value.name or ""].shape, longer[value.name or ""].shape]
    if [size[axis] for size in sizes] != list(_PROBES) or sizes[0][0] != sizes[1][0]:
        raise _NoCacheError(f"'{value.name}' of {sizes[0]} has no axis of tokens where one should be")
    past, present = (unique_name(model.graph, f"{value.name}_{name}") for name in ("past", "present"))
    cache = ir.Value(name=past)
    concat = ir.node("Concat", [cache, value], {"axis": axis})
    concat.outputs[0].name = present
    readers = [(node, index) for node, index in value.uses() if node.op_type == "MatMul" and index == 1]
    model.graph.insert_before(readers[0][0], concat)
    for node, index in readers:
        node.replace_input_with(index, concat.outputs[0])
    shape = list(sizes[0])
    shape[axis] = 0
    return _Joint(past, present, np.zeros(shape, short[value.name or ""].dtype))
