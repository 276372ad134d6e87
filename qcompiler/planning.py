"""Looking before leaping: what a model holds, and what a compilation of it would do."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from qcompiler import pipeline
from qcompiler.config import CompileConfig
from qcompiler.feeding import calibration_data
from qcompiler.files.loader import load_model
from qcompiler.graph import SCHEME_KEY, Refusal, Site
from qcompiler.instruments import stored_bytes
from qcompiler.passes.base import PassContext, Stage, site_scheme, site_spec
from qcompiler.report_curve import PlanPoint
from qcompiler.session import cpu_threads, single_threaded_blas
from qcompiler.sites import find_products, find_sites, node_names
from qcompiler.targets import form_bytes, stream_operator

__all__ = ["Inspection", "Plan", "PlannedSite", "inspect_model", "plan_model"]

# Memory of the interpreter with its libraries.
_BASE_BYTES = 120_000_000


@dataclass(frozen=True)
class PlannedSite:
    """A site and what would become of it.

    Attributes:
        name: Display name.
        names: Every name that patterns may use.
        role: linear, embedding or lm_head.
        operator: Node type.
        rows: N.
        columns: K.
        scheme: Scheme text; empty if it stays float.
        reason: Why it stays float.
        kernel: The operator that will run it.
        float_bytes: Bytes of the weight now.
        stored_bytes: Bytes of the weight afterwards, 0 for a use of a weight that is counted already, and of what
            passes put beside it.
    """

    name: str
    names: tuple[str, ...]
    role: str
    operator: str
    rows: int
    columns: int
    scheme: str
    reason: str
    kernel: str
    float_bytes: int
    stored_bytes: int

    @property
    def state(self) -> str:
        """In words."""
        return self.scheme or "float"


@dataclass(frozen=True)
class Plan:
    """What a compilation would do.

    Attributes:
        sites: What can be quantized, and what becomes of it.
        refusals: How many weights cannot be quantized, and why.
        pipeline: The passes.
        bytes_before: Of the constants.
        bytes_after: Of the constants, about.
        memory_bytes: Peak anonymous memory, about.
        curve: What formats of other sizes would cost, where they are chosen for a budget.
    """

    sites: tuple[PlannedSite, ...]
    refusals: tuple[tuple[int, str], ...]
    pipeline: str
    bytes_before: int
    bytes_after: int
    memory_bytes: int
    curve: tuple[PlanPoint, ...] = ()


@dataclass(frozen=True)
class Inspection:
    """What a model holds.

    Attributes:
        headline: The model in one line.
        sites: What can be quantized.
        refusals: How many weights cannot be quantized, and why.
        products: The names that patterns may use for each product of two activations.
    """

    headline: str
    sites: tuple[PlannedSite, ...]
    refusals: tuple[tuple[int, str], ...]
    products: tuple[tuple[str, ...], ...] = ()

    def summary(self) -> list[tuple[str, str, int, float, str]]:
        """Sites counted by role, operator and state, and their weights in MB."""
        groups: dict[tuple[str, str, str], list[PlannedSite]] = {}
        for site in self.sites:
            groups.setdefault((site.role, site.operator, site.state), []).append(site)
        return [
            (role, operator, len(members), sum(s.float_bytes for s in members) / 1e6, state)
            for (role, operator, state), members in groups.items()
        ]


def _kernel(site: Site, config: CompileConfig) -> str:
    spec = site_spec(site, config)
    if spec.stream:
        return stream_operator(spec, site_scheme(site))
    if config.output_format == "qdq":
        return "DequantizeLinear"
    return "GatherBlockQuantized" if site.role == "embedding" else "MatMulNBits"


def _planned(site: Site, config: CompileConfig, reason: str, seen: set[int], added: int = 0) -> PlannedSite:
    tensor = site.weight.const_value
    assert tensor is not None
    text = site.node.metadata_props.get(SCHEME_KEY, "")
    after = form_bytes(site, site_spec(site, config), config) if text else int(tensor.nbytes)
    first = id(site.weight) not in seen
    seen.add(id(site.weight))
    return PlannedSite(
        site.name, site.names, site.role, site.node.op_type, site.rows, site.columns, text, "" if text else reason,
        _kernel(site, config) if text else site.node.op_type, int(tensor.nbytes) if first else 0,
        (after if first else 0) + added,
    )  # fmt: skip


def _bytes_after(model: ir.Model, sites: list[Site], config: CompileConfig) -> int:
    """Bytes of all initializers once the assigned sites are lowered; untied copies of a weight share their data."""
    assigned = [site for site in sites if SCHEME_KEY in site.node.metadata_props]
    lowered = {site.weight: form_bytes(site, site_spec(site, config), config) for site in assigned}
    rest = [value.const_value for g in model.graphs() for value in g.initializers.values() if value not in lowered]
    return sum(lowered.values()) + sum({id(tensor): tensor.nbytes for tensor in rest if tensor is not None}.values())


def plan_model(source: str | Path, config: CompileConfig, *, pipeline_text: str | None = None) -> Plan:
    """Load a model and run the passes that decide, but none that quantizes.

    Formats for a budget are measured as they are in a compilation, which takes as long.

    Args:
        source: A path as `load_model` takes it.
        config: As for a compilation.
        pipeline_text: An explicit pipeline instead of the one that `config` implies.

    Returns:
        Sites with their schemes, the expected size of the weights and an estimate of the peak memory.
    """
    model, config = load_model(source), pipeline.with_operators(config)
    before = stored_bytes(model)
    algorithms = config.algorithms or pipeline.default_algorithms(config, calibrated=config.calibration is not None)
    config = replace(config, algorithms=algorithms, effort=None)
    data = calibration_data(model, config) if config.budgets else None
    context = PassContext(config, cpu_threads(config.threads), data, config.progress)
    full = pipeline.build(config, context, text=pipeline_text)
    reasons: dict[str, str] = {}
    curve: list[PlanPoint] = []
    with single_threaded_blas():
        for step in full:
            if step.stage <= (Stage.TRANSFORM if config.budgets else Stage.PLAN):
                records = getattr(step(model), "records", ())
                reasons.update({record.site: record.reason for record in records if record.action == "skipped"})
                curve += [PlanPoint.of(record) for record in records if record.action == "plan"]
    seen: set[int] = set()
    found, refusals = find_sites(model)
    added = {s: sum(step.added_bytes(s) for step in full) if SCHEME_KEY in s.node.metadata_props else 0 for s in found}
    sites = tuple(_planned(s, config, reasons.get(s.name, ""), seen, added[s]) for s in found)
    codes = sum(site.stored_bytes for site in sites if site.scheme)
    largest = max((site.rows * site.columns for site in sites if site.scheme), default=0)
    widest = max((site.columns for site in sites if site.scheme and site.role == "linear"), default=0)
    memory = _BASE_BYTES + codes + 12 * largest
    if any(step.needs_calibration for step in full):
        rows = config.samples or 128
        memory += 40 * widest * widest + rows * 512 * widest * 4 * 2
    text, after = ",".join(str(step) for step in full), _bytes_after(model, found, config) + sum(added.values())
    left = [site for site, planned in zip(found, sites, strict=True) if not planned.scheme]
    return Plan(sites, _counted(refusals, left), text, before, after, memory, tuple(curve))


def _counted(refusals: Iterable[Refusal], sites: Iterable[Site] = ()) -> tuple[tuple[int, str], ...]:
    """How often each reason why there is no site, or no weight-only one, occurs, the most frequent first."""
    reasons = [refusal.reason for refusal in refusals] + [site.not_linear for site in sites if site.not_linear]
    return tuple((count, reason) for reason, count in Counter(reasons).most_common())


def inspect_model(source: str | Path) -> Inspection:
    """Load a model and list its sites, quantized or not, and the weights that cannot be quantized, with the reason."""
    from qcompiler.passes import load

    model = load_model(source)
    config = CompileConfig()
    load("canonicalize")(PassContext(config))(model)
    sites, refusals = find_sites(model)
    seen: set[int] = set()
    planned = tuple(_planned(site, config, "", seen) for site in sites)
    opsets = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in model.opset_imports.items())
    headline = (
        f"{Path(source).name}: {sum(1 for _ in model.graph.all_nodes())} nodes, IR version {model.ir_version}, "
        f"opset {opsets}, {stored_bytes(model) / 1e6:.1f} MB of constants, {len(planned)} sites that can be quantized"
    )
    products = tuple(names for names in map(node_names, find_products(model.graph)) if names)
    return Inspection(headline, planned, _counted(refusals), products)
