"""Raise the model's standard opset, where the output form needs it or --opset asks for it.

1. The lowest opset that works is taken: exactly what --opset says, else that in which the assigned formats can be
   written (QDQ). Where that is the model's opset, or a lower one, nothing is changed.
2. Nodes of operators that changed their form on the way are rewritten (see `opset_rules`), in every body.
3. A node that cannot be rewritten is a PassError that names it; an --opset that cannot be had is a SchemeError.

Left alone: operators of other domains. Names, metadata and weights stay as they are; the IR version is raised, where
the types of the model need it, when the model is written.
"""

import logging
from collections import Counter

import onnx_ir as ir

from qcompiler.config import CompileConfig
from qcompiler.errors import PassError, SchemeError
from qcompiler.graph import SCHEME_KEY, collect_names, walk
from qcompiler.kernels.schemas import BODY_OPSET, DOMAIN
from qcompiler.opset_rules import CannotRaiseError, raise_node
from qcompiler.passes.base import (
    QuantPass,
    QuantPassResult,
    Stage,
    explicit_activations,
    quantizes_activations,
    scheme_text,
    site_spec,
)
from qcompiler.records import SiteRecord
from qcompiler.sites import find_sites
from qcompiler.targets import MAX_OPSET, lacks_kernel, qdq_opset

__all__ = ["RaiseOpset"]

logger = logging.getLogger(__name__)


class RaiseOpset(QuantPass):
    """Raises the opset of the default domain."""

    name = "raise_opset"
    stage = Stage.PLAN
    after = ("assign_scheme",)

    @classmethod
    def applies(cls, config: CompileConfig) -> bool:
        """Where an opset is asked for, for the output form QDQ, and for schemes that quantize activations."""
        planned = config.output_format == "qdq" or quantizes_activations(config) or config.own_operators
        return config.opset is not None or planned

    def call(self, model: ir.Model) -> QuantPassResult:
        """Run the cases in order."""
        opsets, wanted = model.graph.opset_imports, self.context.config.opset
        current = opsets.get("", 0)
        needed, why = _needed(model, self.context.config)
        if wanted is not None:
            _check_wanted(wanted, current, needed, why)
            needed, why = wanted, "--opset"
        if needed <= current:
            return QuantPassResult(model, False)
        if any(function.domain != DOMAIN for function in model.functions.values()):
            raise PassError("raise_opset: local functions have opsets of their own; run canonicalize before")
        rewritten = self._rewrite(model, current, needed)
        opsets[""] = needed
        counts = ", ".join(f"{count} {op_type}" for op_type, count in rewritten.most_common() if count)
        note = f"opset {current} raised to {needed} ({why}), rewritten: {counts or 'nothing'}"
        logger.info("raise_opset: %s", note)
        return QuantPassResult(model, True, (SiteRecord("model", "rewritten", reason=note),))

    def _rewrite(self, model: ir.Model, current: int, target: int) -> Counter[str]:
        """Bring all nodes to the new opset; returns how many of which operator had to be rewritten."""
        collect_names(model.graph)
        rewritten: Counter[str] = Counter()
        for node, _ in list(walk(model.graph)):
            operator = node.op_type
            if node.domain != "":
                continue
            try:
                if lacks_kernel(operator, target) and not lacks_kernel(operator, current):
                    raise CannotRaiseError("ONNX Runtime has no kernel for it there")
                rewritten[operator] += raise_node(node, current, target)
            except CannotRaiseError as error:
                form = "--custom-ops never" if self.context.config.output_format != "qdq" else "--format matmulnbits"
                remedy = "leave --opset out" if self.context.config.opset else f"use {form}"
                raise PassError(
                    f"raise_opset: '{node.name}' ({operator}) cannot be raised from opset {current} to {target}: "
                    f"{error}; export the model for opset {target}, or {remedy}"
                ) from error
        return rewritten


def _needed(model: ir.Model, config: CompileConfig) -> tuple[int, str]:
    """The lowest opset that the output form can be written in, with the reason; 0 where any will do."""
    needed, why = 0, ""
    for site in find_sites(model)[0]:
        activations = explicit_activations(site)
        if site.quantized is not None:
            spec = site.quantized.spec
        elif SCHEME_KEY in site.node.metadata_props:
            spec = site_spec(site, config)
        else:
            continue
        if config.output_format == "qdq" or activations is not None:
            opset = qdq_opset(spec, site.rows, site.columns, lookup=site.role == "embedding")
        else:
            opset = BODY_OPSET if spec.stream else 0
        if activations is not None and activations.bits == 16:
            opset = max(opset, 21)
        if opset > needed:
            needed, why = opset, f"'{site.name}' as {scheme_text(site)} needs {opset}"
    return needed, why


def _check_wanted(wanted: int, current: int, needed: int, why: str) -> None:
    """Raise SchemeError for an --opset that cannot be had."""
    if wanted < current:
        raise SchemeError(
            f"--opset {wanted} is below the model's opset {current}, and an opset can only be raised; leave --opset out"
        )
    if wanted > MAX_OPSET:
        raise SchemeError(f"--opset {wanted} is more than ONNX Runtime knows; give {MAX_OPSET} at most")
    if wanted < needed:
        raise SchemeError(f"--opset {wanted} is too low: {why}; give at least {needed}, or leave --opset out")
