"""What a normalization in front of a layer tells of its activation, without any data.

A normalization gives x = gamma * z + beta with z of unit size. If the channels of z are unrelated and centred,

    E[x x^T] = diag(gamma^2) + beta beta^T

which is the Hessian of the layer that reads x, per token. Behind attention and nonlinearities nothing is known.

Shapes: x, gamma, beta ``[K]``.
"""

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from qcompiler.foldings.rules import constant_read
from qcompiler.foldings.search import Sites, Source, columns_of, find_sources, followed
from qcompiler.foldings.shapes import BlockedError
from qcompiler.foldings.sizes import note_sizes
from qcompiler.graph import Site, constant_array, constant_scalar
from qcompiler.rotation.operators import one_value
from qcompiler.sites import find_sites
from qcompiler.statistics import LayerFacts

__all__ = ["norm_priors"]

_MOVES = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Split", "Slice", "Gather", "Cast", "Identity", "Dropout"}
_SUMS = {"Add": 1.0, "Sub": -1.0}


def norm_priors(model: ir.Model, sites: Iterable[Site]) -> dict[Site, LayerFacts]:
    """The facts of the sites that read what a normalization computes, as of one token.

    Args:
        model: Its nodes in topological order.
        sites: Those asked for.
    """
    note_sizes(model)
    every: Sites = {site.node: site for site in find_sites(model)[0] if site.role in ("linear", "lm_head")}
    known: dict[ir.Value, LayerFacts | None] = {}
    for site in (each for each in sites if each.node in every and not each.nested):
        if site.input not in known:
            known[site.input] = _prior(site, every)
    found = {site: known.get(site.input) for site in sites}
    return {site: facts for site, facts in found.items() if facts is not None}


def _prior(site: Site, sites: Sites) -> LayerFacts | None:
    """The facts of the nearest normalization, if nothing but moves and shifts lies between."""
    for found in find_sources(site.input, sites, []):
        if isinstance(found, str) or found[0].site is not None:
            continue
        source, path = found
        if not _normalizes(source.node) or any(node.op_type not in (*_MOVES, *_SUMS) for node, _ in path):
            continue
        try:
            columns = columns_of(site, followed(source, path, site.input))
            shift = _shift(source, path)[columns]
        except BlockedError:
            continue
        node, index, _ = source.constants[0]
        gain = _constant(node, index).reshape(-1)[columns]
        return LayerFacts(np.diag(np.square(gain)) + np.outer(shift, shift), tokens=1)
    return None


def _normalizes(node: ir.Node) -> bool:
    """Whether a node is a normalization, or the product of its gain with what one number per token has normalized."""
    if node.op_type != "Mul":
        return True  # see `foldings`: other sources are normalizations
    for value in node.inputs:
        maker = value.producer() if value is not None else None
        while maker is not None and maker.op_type in ("Cast", "Identity") and maker.inputs[0] is not None:
            maker = maker.inputs[0].producer()
        if maker is None or maker.op_type not in ("Mul", "Div"):
            continue
        for index in range(1 if maker.op_type == "Div" else 2):
            factor, other = maker.inputs[1 - index], maker.inputs[index]
            if constant_scalar(factor, other) is None and one_value(factor, other):
                return True
    return False


def _shift(source: Source, path: list[tuple[ir.Node, int]]) -> np.ndarray:
    """What is added to each channel of the source behind its gain, float64."""
    total = np.zeros(source.channels.size)
    for node, index, channels in source.constants[1:]:
        np.add.at(total, channels.reshape(-1), _constant(node, index).reshape(-1))
    for at, (node, index) in enumerate(path):
        if node.op_type not in _SUMS:
            continue
        place, value = constant_read(node, 1 - index), node.inputs[index]
        if place is None or value is None or (node.op_type == "Sub" and index):
            raise BlockedError("something that is computed is added, or x is subtracted")
        channels = followed(source, path[:at], value)
        try:
            added = np.broadcast_to(_constant(*place), channels.shape)
        except ValueError:
            raise BlockedError("what is added has more elements than there are channels") from None
        total[channels.reshape(-1)] += _SUMS[node.op_type] * added.reshape(-1)
    return total


def _constant(node: ir.Node, index: int) -> np.ndarray:
    value = node.inputs[index]
    assert value is not None
    return constant_array(value).astype(np.float64)
