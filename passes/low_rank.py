"""Low-rank compensation: two small float matrices beside a quantized weight give back the worst of its error.

Yao et al. 2023, "ZeroQuant-V2" (LoRC), arXiv:2303.08302, with the error weighed by what the layer reads, as in Liu et
al. 2024, "EoRA", arXiv:2410.21271:

    y = Q x + B A x,   minimize  tr((E - B A) H (E - B A)^T),   E = W - Q,   H = sum over tokens of x x^T

which `numerics.low_rank` solves exactly. It runs behind what chooses the codes. Layers are measured one level after the
other, and those that come later read the result of those that are compensated already.

The factors are float32 (float16 where the rest of the model is), r (N + K) numbers for a weight of N K, and take two
products and a sum on every run. From rank min(N, K) on they give the float layer back.

Shapes: W, Q, E ``[N, K]``; H ``[K, K]``; B ``[N, r]``; A ``[r, K]``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompiler.branches import add_branch
from qcompiler.errors import CalibrationError, SchemeError
from qcompiler.graph import Site, original_weight, unique_name, weight_error
from qcompiler.layers import constant_add
from qcompiler.numerics.affine import storage_dtype
from qcompiler.numerics.low_rank import low_rank_factors
from qcompiler.numerics.metrics import sqnr_db
from qcompiler.numerics.second_order import row_losses
from qcompiler.passes.base import (
    PassContext,
    QuantPass,
    QuantPassResult,
    Stage,
    check_options,
    explicit_activations,
    scheme_text,
    site_scheme,
    site_spec,
    streaming,
)
from qcompiler.quantized import QuantizedTensor
from qcompiler.records import SiteRecord
from qcompiler.scheme_plan import Pattern
from qcompiler.segments import Segment, plan_segments
from qcompiler.sites import find_sites
from qcompiler.statistics import LayerFacts

__all__ = ["LowRank"]


@dataclass(frozen=True)
class Options:
    """Options of `low_rank`."""

    rank: int = field(default=16, metadata={"help": "columns of B and rows of A"})
    sites: str = field(
        default="",
        metadata={
            "help": "what to compensate: names joined with |, or re: and a regular expression; left out, every "
            "quantized linear layer but the projection onto the vocabulary"
        },
    )

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        check_options("low_rank", self, least={"rank": 1})

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """What `sites` means; in a regular expression | says "or" already."""
        names = [self.sites] if self.sites.startswith("re:") else self.sites.split("|")
        return tuple(Pattern(name) for name in names if name)


class LowRank(QuantPass):
    """Puts low-rank factors beside quantized weights.

    1. MatMul and Gemm get two MatMul beside them, a convolution with a kernel of one two Conv. The Add of both is
       behind that of a constant where there is one, so that the bias is fused as ever.
    2. Lookup tables, sites in control-flow bodies, sites whose activations the graph quantizes and convolutions with
       larger kernels are recorded as skipped with the reason, like sites where nothing is gained.
    3. With a budget for the size, which does not know of factors, it is an error.
    """

    name = "low_rank"
    stage = Stage.QUANTIZE
    chooses_weights = True
    after = ("rtn", "gptq", "hqq", "obq", "learned_rounding")
    paper = "Liu et al. 2024, arXiv:2410.21271; Yao et al. 2023, arXiv:2303.08302"
    needs_calibration = True
    Options = Options

    def __init__(self, context: PassContext, options: dict[str, str] | None = None) -> None:
        """See `QuantPass`; a budget is refused before anything is done."""
        super().__init__(context, options)
        config = context.config
        if config.bits_per_weight is not None or config.max_size is not None:
            raise SchemeError(
                "low_rank adds factors that --bits-per-weight and --max-size do not count; drop the budget, or low_rank"
            )

    def call(self, model: ir.Model) -> QuantPassResult:
        """Measure level by level, and compensate each before the next is measured."""
        sites = self._wanted(model)
        problems = {site: self._problem(site) for site in sites}
        chosen = [site for site, problem in problems.items() if not problem]
        if chosen and not len(self.context.batches):
            raise CalibrationError("low_rank needs calibration data; give --calibration PATH, or leave it out")
        records = {
            site: SiteRecord(site.name, "skipped", scheme_text(site), f"no factors: {problem}")
            for site, problem in problems.items()
            if problem
        }
        if chosen:
            segments, sequential = plan_segments(model, chosen), self.context.config.sequential
            waiting: list[Callable[[], None]] = []

            def on_sites(reading: list[Site], facts: LayerFacts) -> None:
                for site in reading:
                    records[site], insert = self._compensate(site, facts, segments)
                    if sequential:
                        insert()
                    else:  # later levels are to see the model as it was
                        waiting.append(insert)

            run = streaming(self.context, self.name, sequential=sequential)
            run.run(model, segments, self.context.batches, on_sites)
            for insert in waiting:
                insert()
        modified = any(record.action == "quantized" for record in records.values())
        return QuantPassResult(model, modified, tuple(records[site] for site in sites))

    def added_bytes(self, site: Site) -> int:
        """See `QuantPass`."""
        if not self._means(site) or _exclusion(site):
            return 0
        itemsize = storage_dtype(site_spec(site, self.context.config).scale_dtype).itemsize
        return int(min(self.options.rank, site.rows, site.columns) * (site.rows + site.columns) * itemsize)

    def _means(self, site: Site) -> bool:
        """Whether `sites` selects a site."""
        patterns = self.options.patterns
        return any(each.matches(site.names) for each in patterns) if patterns else site.role in ("linear", "conv")

    def _wanted(self, model: ir.Model) -> list[Site]:
        """The sites with a scheme that are meant; a pattern that selects none is an error, as in a plan."""
        sites = [site for site in find_sites(model)[0] if site_scheme(site) is not None]
        patterns = self.options.patterns
        lost = next((each for each in patterns if not any(each.matches(site.names) for site in sites)), None)
        if lost is not None:
            raise SchemeError(
                f"pass low_rank: '{lost.text}' selects no site that is quantized; list their names with: qcompiler "
                "inspect MODEL --sites"
            )
        return [site for site in sites if self._means(site)]

    def _problem(self, site: Site) -> str:
        """Why a site gets no factors, or nothing."""
        if site.quantized is None:
            raise SchemeError(
                f"pass low_rank: '{site.name}' is not quantized yet; name what chooses its codes: gptq,low_rank"
            )
        if found := _exclusion(site):
            return found
        if "original" not in site.quantized.meta:
            return "its float weight is gone"
        return "it has some already" if site.node in site.quantized.meta.get("factors", {}) else ""

    def _compensate(
        self, site: Site, facts: LayerFacts, segments: Sequence[Segment]
    ) -> tuple[SiteRecord, Callable[[], None]]:
        """Find factors that lessen the loss as they are stored; also what inserts them."""
        tensor = site.quantized
        assert tensor is not None
        error, dtype = weight_error(site), storage_dtype(tensor.spec.scale_dtype)
        found = low_rank_factors(error, facts.hessian, self.options.rank)
        outer, inner = (factor.astype(dtype).astype(np.float32) for factor in found)
        left, weight = error - outer @ inner, original_weight(site)
        before, after, energy = (_loss(each, facts.hessian) for each in (error, left, weight))
        if not after < before:
            reason = "no factors: there is no error to make up for" if not before else "no factors: they lessen nothing"
            return SiteRecord(site.name, "skipped", scheme_text(site), reason, {"loss": before}), lambda: None
        tensor.meta.setdefault("factors", {})[site.node] = (outer, inner)
        metrics = {
            "sqnr_db": sqnr_db(weight, weight - left),
            "bits_per_weight": _bits(tensor, inner.shape[0], dtype.itemsize),
            "loss": after,
            "relative_loss": after / energy if energy else 0.0,
            "loss_without_factors": before,
        }
        record = SiteRecord(site.name, "quantized", scheme_text(site), f"factors of rank {len(inner)}", metrics)
        return record, lambda: self._insert(site, outer, inner, segments)

    def _insert(self, site: Site, outer: np.ndarray, inner: np.ndarray, segments: Sequence[Segment]) -> None:
        """Put the nodes into the graph, and into the segment that is about to run."""
        node, graph = site.node, site.node.graph
        assert isinstance(graph, ir.Graph)
        own = next(segment for segment in segments if site in segment.sites)
        later = {each for segment in segments if segment is not own for each in segment.nodes}
        bias = constant_add(node)
        end = bias[0] if bias is not None and bias[0] not in later else node
        branch = add_branch(site, inner, outer, self.name, self.name, end)
        if end is not node:  # no tensor without the factors may pass for what the float model computes
            node.outputs[0].name = unique_name(graph, f"{node.outputs[0].name}_before_low_rank")
        at = own.nodes.index(node)
        own.nodes[at:at] = branch.products
        if end in own.nodes:  # nothing behind the last site runs
            own.nodes.insert(own.nodes.index(end) + 1, branch.add)


def _exclusion(site: Site) -> str:
    """Why a site gets no factors whatever its codes, or nothing."""
    if site.nested:
        return f"inside the body of {site.nested}, where nothing is measured"
    if site.role == "embedding":
        return "a lookup table computes no product"
    if explicit_activations(site) is not None:
        return "its activations are quantized, and factors would read the float ones"
    if site.not_linear:
        return site.not_linear
    return "it reads a constant" if site.input.const_value is not None else ""


def _loss(error: np.ndarray, hessian: np.ndarray) -> float:
    """``tr(E H E^T)`` in float64."""
    return float(row_losses(error.astype(np.float64), hessian).sum())


def _bits(tensor: QuantizedTensor, rank: int, itemsize: int) -> float:
    """Bits per weight, factors included."""
    factors = rank * (tensor.rows + tensor.columns) / (tensor.rows * tensor.columns)
    return float(tensor.spec.stored_bits(tensor.columns) + 8 * itemsize * factors)
