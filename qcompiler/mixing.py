"""Units of mixed precision: weights that get a format together, the formats to choose from, and what each takes."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from qcompiler.config import CompileConfig
from qcompiler.graph import EXTERNAL_BYTES, SCHEME_KEY, Site
from qcompiler.numerics.affine import WeightSpec
from qcompiler.numerics.allocation import Choice
from qcompiler.numerics.formats import int_format
from qcompiler.passes.base import assigned_sites, site_spec, spec_of
from qcompiler.scheme import Scheme
from qcompiler.targets import form_bytes, needs_operators, qdq_opset, site_refusal

__all__ = ["UNITS", "MixedSite", "Unit", "fixed_bytes", "formats_of", "layer_of", "units_of"]

UNITS = ("site", "head", "reading", "layer")
# Group sizes by width. Smaller ones than these take as much as a wider format of larger groups, and lose more; so do
# 3-bit codes where they are stored in 4 bits.
_LADDER = {2: (16, 32, 64, 128, 256), 3: (32, 64, 128, 256), 4: (32, 64, 128, 256), 8: (64, 128, 256)}
# Bits, columns that share a code and group sizes of formats with tables.
_TABLES = ((2, 2, (64,)), (3, 1, (64,)), (4, 1, (32, 64)))
# What a file says about one constant beside its values and its name, which it says three times: shape and type, twice,
# and in the second case where it lies in the file of external data.
_CONSTANT_BYTES = (75, 185)
# What a lowered node says beyond what it says now and the names of its constants: attributes, domain, who made it.
_NODE_BYTES = 95
# The body of one of our own operators, and how many of them a plan may use.
_BODY_BYTES, _BODIES = 1800, 4
_FIRST_NUMBER = re.compile(r".*?\d+")


@dataclass(eq=False)
class MixedSite:
    """A weight that may get one of several formats.

    Attributes:
        site: Where it is.
        asked: The format that it has without mixed precision, one of `schemes`.
        schemes: The formats from the smallest to the largest; None leaves the weight float.
        specs: The same with nothing left to decide; shorter by one where the weight may stay float.
        sizes: Bits that each takes.
        losses: What each leaves, in the unit of `trial_loss`.
        trial_loss: What a rounding by trial leaves.
        trial_cost: What that rounding costs at the model's outputs.
    """

    site: Site
    asked: Scheme
    schemes: list[Scheme | None]
    specs: list[WeightSpec]
    sizes: list[int]
    losses: list[float] = field(default_factory=list)
    trial_loss: float = 0.0
    trial_cost: float = 0.0

    @property
    def weights(self) -> int:
        """How many weights there are."""
        return self.site.rows * self.site.columns

    @property
    def asked_loss(self) -> float:
        """What the format that was asked for leaves."""
        return self.losses[self.schemes.index(self.asked)]

    def choices(self) -> list[Choice]:
        """Size and cost of each format: a loss costs in proportion what the trial's loss did."""
        price = self.trial_cost / self.trial_loss if self.trial_loss else 0.0
        return [Choice(size, price * loss) for size, loss in zip(self.sizes, self.losses, strict=True)]


@dataclass(frozen=True)
class Unit:
    """Weights that get the same format.

    Attributes:
        members: The weights.
        schemes: The formats that all of them may get.
        choices: Size and cost of each, summed over the members.
    """

    members: tuple[MixedSite, ...]
    schemes: tuple[Scheme | None, ...]
    choices: tuple[Choice, ...]


def formats_of(site: Site, scheme: Scheme, opset: int, config: CompileConfig) -> MixedSite:
    """A site with the formats that it may get.

    These are widths and group sizes with the symmetry of `scheme`, as far as the output form can hold them, `scheme`
    itself, and float. A larger group that takes no less than a smaller one, as where K is no multiple of it, is left
    out.

    Args:
        site: A weight-only site.
        scheme: Its resolved scheme.
        opset: Of the model.
        config: The user's choices.
    """
    found: dict[Scheme, tuple[int, WeightSpec]] = {}

    def add(candidate: Scheme, limit: int | None) -> int | None:
        spec = spec_of(site, candidate, config)
        size = 8 * (form_bytes(site, spec, config) + _own_bytes(site, spec, config))
        if limit is not None and size >= limit:
            return limit
        found[candidate] = size, spec
        return size

    add(scheme, None)
    for bits, group_sizes in _LADDER.items():
        narrow = int_format(bits).container == bits or needs_operators(
            site, replace(scheme, bits=bits, ternary=False), config
        )
        if not narrow:
            continue
        least: int | None = None
        for group_size in group_sizes:
            candidate = replace(scheme, bits=bits, group_size=group_size, ternary=False)
            if _is_held(site, candidate, opset, config):
                least = add(candidate, least)
    for bits, vector, group_sizes in _TABLES:
        for group_size in group_sizes:
            candidate = Scheme(bits, group_size, True, vector=vector)
            if needs_operators(site, candidate, config) and not site_refusal(site, candidate, config):
                add(candidate, None)
    ordered = sorted(found, key=lambda each: (found[each][0], str(each)))
    sizes = [found[each][0] for each in ordered]
    width = 16 if config.float16 else 8 * site.dtype.itemsize
    return MixedSite(
        site,
        scheme,
        [*ordered, None],
        [found[each][1] for each in ordered],
        [*sizes, int(width * site.rows * site.columns)],
    )


def _own_bytes(site: Site, spec: WeightSpec, config: CompileConfig) -> int:
    """Bytes that a file says about the constants which our own operators have beyond three, where they count."""
    if config.max_size is None or not spec.stream:
        return 0
    more = 2 if spec.vector and not spec.signs else 1
    each = _CONSTANT_BYTES[config.max_size > EXTERNAL_BYTES] + 3 * (len(site.weight.name or "") + 9)
    return int(more * each)


def _is_held(site: Site, scheme: Scheme, opset: int, config: CompileConfig) -> bool:
    """Whether the output form can hold a site in a format, in the opset that the model has."""
    if site_refusal(site, scheme, config):
        return False
    if config.output_format != "qdq":
        return True
    spec = spec_of(site, scheme, config)
    return opset >= qdq_opset(spec, site.rows, site.columns, lookup=site.role == "embedding")


def units_of(sites: Sequence[MixedSite], kind: str) -> list[Unit]:
    """Group weights: each by itself (`site`; `head`, see `mixing_heads`), or those of a `reading` or a `layer`."""
    groups: dict[object, list[MixedSite]] = {}
    for one in sites:
        key: object = one
        if kind == "reading":
            key = one.site.input
        elif kind == "layer":
            key = layer_of(one.site.name) or one
        groups.setdefault(key, []).append(one)
    return [_unit(members) for members in groups.values()]


def _unit(members: Sequence[MixedSite]) -> Unit:
    known = [dict(zip(one.schemes, one.choices(), strict=True)) for one in members]
    shared = [scheme for scheme in known[0] if all(scheme in choices for choices in known)]
    return Unit(tuple(members), tuple(shared), tuple(_sum(choices[scheme] for choices in known) for scheme in shared))


def _sum(choices: Iterable[Choice]) -> Choice:
    listed = list(choices)
    return Choice(sum(choice.size for choice in listed), sum(choice.loss for choice in listed))


def layer_of(name: str) -> str:
    """The layer that a site's name speaks of: what comes up to its first number; empty without one.

    ``model.layers.3.mlp.down_proj`` and ``/model/layers.3/attn/MatMul`` are of layer 3.
    """
    match = _FIRST_NUMBER.match(name)
    return match[0] if match else ""


def fixed_bytes(model: ir.Model, sites: Sequence[Site], config: CompileConfig) -> int:
    """Bytes that the files will take beside the weights of these sites: other constants, nodes, names and metadata."""
    mine, total = {site.weight for site in sites}, 0
    each = _CONSTANT_BYTES[(config.max_size or 0) > EXTERNAL_BYTES]
    for site in assigned_sites(model):
        if site.weight not in mine:
            mine.add(site.weight)
            total += form_bytes(site, site_spec(site, config), config)
    # Codes, scales and zero points are called by their weight's name and up to 12 letters.
    total += sum(3 * (each + 3 * (len(weight.name or "") + 9)) for weight in mine)
    total += _BODY_BYTES * _BODIES * config.own_operators
    total += _NODE_BYTES * sum(SCHEME_KEY in node.metadata_props for node in model.graph.all_nodes())
    for graph in model.graphs():
        kept = {
            id(v.const_value): v for v in graph.initializers.values() if v not in mine and v.const_value is not None
        }
        for value in kept.values():
            halved = config.float16 and value.dtype == ir.DataType.FLOAT
            total += (value.const_value.nbytes // (2 if halved else 1) if value.const_value else 0) + each
            total += 3 * len(value.name or "")
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        described = [value for value in node.outputs if value.type is not None or value.shape is not None]
        total += ir.serde.serialize_node(node).ByteSize() + sum(
            ir.serde.serialize_value(value).ByteSize() for value in described
        )
    return int(total)
