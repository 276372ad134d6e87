"""Decide for every site which scheme it gets, and write the decision on the node.

1. A site gets the scheme that the plan gives its role and names, completed for the target;
   `metadata_props["qcompiler.scheme"]` holds its text, and "qcompiler.site" the name under which reports know it;
   "qcompiler.sparse" says how many of its values are to become zero. Decisions of an earlier run are forgotten.
2. Sites that share a weight and a scheme keep sharing it: it is quantized once and stored once.
3. Sites that share a weight but differ in scheme, or in which of its axes are rows, are untied: each kind gets an
   initializer of its own (the data is copied only when the model is written). Whatever else reads the weight, or the
   caller who gets it as an output, keeps the original.
4. What looks like a site and is none, and what the plan leaves float, is recorded as skipped with the reason.
5. Products of two activations have no weight and get no scheme, but patterns may name them; where the plan would have
   them integer (see `insert_qdq`), those that stay float are recorded too.
"""

import logging
from collections.abc import Iterable, Iterator

import onnx_ir as ir

from qcompiler.errors import SchemeError
from qcompiler.graph import PASS_KEY, SCHEME_KEY, SITE_KEY, SPARSE_KEY, Site, unique_name
from qcompiler.passes.base import QuantPass, QuantPassResult, Stage, explicit_activations, quantizes_activations
from qcompiler.records import SiteRecord
from qcompiler.scheme import Scheme
from qcompiler.sites import find_products, find_sites, node_names
from qcompiler.targets import site_refusal

__all__ = ["AssignScheme"]

logger = logging.getLogger(__name__)

# Scheme text, empty for float, and whether the model stores the weight transposed. Sites alike in both can share.
_Kind = tuple[str, bool]


class AssignScheme(QuantPass):
    """Writes the plan's decisions on the nodes."""

    name = "assign_scheme"
    stage = Stage.PLAN

    @classmethod
    def applies(cls, config: object) -> bool:
        """Always."""
        del config
        return True

    def call(self, model: ir.Model) -> QuantPassResult:
        """Run the cases in order; a pattern that selects nothing is a SchemeError."""
        nodes = ir.traversal.RecursiveGraphIterator(model.graph)
        old = [node.metadata_props.pop(key, "") for node in nodes for key in (SCHEME_KEY, SITE_KEY, SPARSE_KEY)]
        sites, refusals = find_sites(model)
        products = find_products(model.graph)
        config = self.context.config
        names = [site.names for site in sites] + [refusal.names for refusal in refusals]
        lost = config.plan.unmatched([*names, *map(node_names, products)])
        if lost:
            raise SchemeError(
                f"pattern '{lost[0]}' selects no site; list their names with: qcompiler inspect MODEL --sites"
            )
        records = [SiteRecord(refusal.name, "skipped", reason=refusal.reason) for refusal in refusals]
        chosen: dict[ir.Value, dict[_Kind, list[Site]]] = {}
        for site in sites:
            scheme, reason = config.plan.scheme_for(site.role, site.names)
            text = ""
            if scheme is not None:
                resolved = scheme.resolve(config.target)
                reason = site_refusal(site, resolved.dense, config) if resolved.dense is not None else ""
                text = "" if reason else str(resolved)
            kind = (text, bool(text) and "KN" in site.layout)
            chosen.setdefault(site.weight, {}).setdefault(kind, []).append(site)
            size = {"weights": float(site.rows * site.columns)} if text else {}
            records.append(SiteRecord(site.name, "assigned" if text else "skipped", text, reason, size))
        for weight, by_kind in chosen.items():
            _apply(weight, by_kind)
        if quantizes_activations(config, dynamic=False):
            records += self._float_products(products, sites)
        return QuantPassResult(model, any(old) or any(r.action == "assigned" for r in records), tuple(records))

    def _float_products(self, products: Iterable[ir.Node], sites: Iterable[Site]) -> Iterator[SiteRecord]:
        """Records of the products that the plan leaves float, or that no integer site goes with."""
        config = self.context.config
        formats = {explicit_activations(site) for site in sites}
        for node in products:
            names = node_names(node)
            scheme, reason = config.plan.scheme_for("linear", names)
            activations = scheme.resolve(config.target).activations if scheme is not None else None
            if scheme is None:
                yield SiteRecord(_label(node), "skipped", reason=reason)
            elif activations is not None and not activations.dynamic and activations not in formats:
                reason = f"no layer runs with {scheme}, and a product is integer only beside one that does"
                yield SiteRecord(_label(node), "skipped", reason=reason)


def _label(node: ir.Node) -> str:
    return next(iter(node_names(node)), node.outputs[0].name or node.op_type)


def _apply(weight: ir.Value, by_kind: dict[_Kind, list[Site]]) -> None:
    """Write the schemes of the sites that share a weight, untying those that differ."""
    sites = [site for members in by_kind.values() for site in members]
    float_kind = ("", False)
    keeper = float_kind if float_kind in by_kind or _has_other_readers(weight, sites) else next(iter(by_kind))
    for kind, members in by_kind.items():
        if kind != keeper:
            _untie(members, kind[0])
        if kind[0]:
            scheme = Scheme.parse(kind[0])
            marks = {SCHEME_KEY: scheme.dense, SPARSE_KEY: scheme.sparsity}
            texts = {key: str(value) for key, value in marks.items() if value is not None}
            for site in members:
                site.node.metadata_props.update({**texts, SITE_KEY: site.name})


def _has_other_readers(weight: ir.Value, sites: list[Site]) -> bool:
    """Whether anything but these sites and their Transposes reads the weight."""
    nodes = {site.node for site in sites}
    values = {weight, *(site.transpose.outputs[0] for site in sites if site.transpose is not None)}
    between = {site.transpose for site in sites}
    readers = {reader for value in values for reader in value.consumers()}
    return bool(readers - nodes - between) or any(value.is_graph_output() for value in values)


def _untie(sites: list[Site], text: str) -> None:
    """Give the sites an initializer of their own with the same data."""
    weight = sites[0].weight
    graph = weight.graph
    assert graph is not None
    copy = ir.Value(
        name=unique_name(graph, f"{weight.name}_{text}"),
        shape=weight.shape,
        type=weight.type,
        const_value=weight.const_value,
    )
    graph.register_initializer(copy)
    for site in sites:
        reader = site.node
        if site.transpose is not None:
            reader = _own_transpose(site, weight)
        reader.replace_input_with(next(i for i, v in enumerate(reader.inputs) if v is weight), copy)
    logger.info("weight %s is untied: %d of its readers become %s", weight.name, len(sites), text)


def _own_transpose(site: Site, weight: ir.Value) -> ir.Node:
    """The site's Transpose, duplicated if other nodes read it too."""
    old = site.transpose
    assert old is not None and old.graph is not None
    if len(old.outputs[0].uses()) == 1 and not old.outputs[0].is_graph_output():
        return old
    graph = old.graph
    output = ir.Value(name=unique_name(graph, f"{old.outputs[0].name}_{site.name}"))
    node = ir.Node("", "Transpose", [weight], list(old.attributes.values()), outputs=[output])
    node.metadata_props[PASS_KEY] = AssignScheme.name
    graph.insert_after(old, node)
    index = next(i for i, v in enumerate(site.node.inputs) if v is old.outputs[0])
    site.node.replace_input_with(index, output)
    return node
