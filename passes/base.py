"""What a pass is: its stage, scope and options, what it gets and what it returns."""

import dataclasses
import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from qcompiler.checkpoints import Arrays, Checkpoints
from qcompiler.config import CompileConfig
from qcompiler.errors import NumericsError
from qcompiler.graph import SCHEME_KEY, SPARSE_KEY, Site, read_weight, write_weight
from qcompiler.numerics.affine import Grid, WeightSpec
from qcompiler.numerics.metrics import sqnr_db
from qcompiler.observing import Collector, observe
from qcompiler.options import NoOptions, check_options, parse_options
from qcompiler.quantized import Quantized
from qcompiler.records import SiteRecord
from qcompiler.scheme import Activations, Scheme
from qcompiler.session import Feeds
from qcompiler.sites import find_sites
from qcompiler.statistics import LayerFacts
from qcompiler.streaming import Streaming
from qcompiler.targets import needs_operators

__all__ = [
    "WEIGHTS",
    "NoOptions",
    "PassContext",
    "QuantPass",
    "QuantPassResult",
    "Stage",
    "WeightQuantizer",
    "assigned_sites",
    "check_options",
    "explicit_activations",
    "planned_sites",
    "quantizes_activations",
    "scheme_text",
    "site_scheme",
    "site_spec",
    "spec_of",
    "streaming",
    "watch",
]

logger = logging.getLogger(__name__)

# Among the passes that one comes after, this means all that choose weights (see `QuantPass.chooses_weights`).
WEIGHTS = "weights"


class Stage(IntEnum):
    """Where in the pipeline a pass belongs; between stages the model is checked (see `legality`)."""

    CANONICALIZE = 0
    PLAN = 1
    TRANSFORM = 2
    QUANTIZE = 3
    LOWER = 4
    CLEANUP = 5


@dataclass(frozen=True)
class PassContext:
    """What a pass may know beside the model.

    Attributes:
        config: The user's choices.
        threads: Number of threads, at least 1.
        calibration: Batches of feeds, or None; see `calibration.CalibrationData`.
        progress: Called with (label, done, total) by anything that may take long.
        checkpoints: Where results are stored for a run that is interrupted, or None.
        more: Gives as many rows of the same data as it is told; None where there is no data.
        settled: What a pass chose by the clock: its name -> how to write it so that another run chooses the same.
        artifacts: Files that a pass wants beside the model: the end of their names -> arrays by name.
    """

    config: CompileConfig
    threads: int = 1
    calibration: Any = None
    progress: Any = None
    checkpoints: Checkpoints | None = None
    more: Callable[[int], Any] | None = None
    settled: dict[str, str] = field(default_factory=dict)
    artifacts: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)

    @property
    def batches(self) -> Sequence[Feeds]:
        """The batches of calibration data; none without such data."""
        batches: Sequence[Feeds] = () if self.calibration is None else self.calibration.batches
        return batches

    def tick(self, label: str, done: int, total: int) -> None:
        """Report progress."""
        if self.progress is not None:
            self.progress(label, done, total)

    def remember(self, label: str, sites: int, key: Callable[[], str], make: Callable[[], Arrays]) -> Arrays:
        """What `make` gives, which is stored, or what is stored already; without a folder nothing is hashed.

        Args:
            label: Who asks, for the report.
            sites: How many sites the result is about.
            key: Gives the hash of everything that the result follows from.
            make: Gives the result.
        """
        return make() if self.checkpoints is None else self.checkpoints.remember(key(), make, label, sites)


@dataclass
class QuantPassResult(ir.passes.PassResult):
    """PassResult with one record for each site that the pass looked at."""

    records: tuple[SiteRecord, ...] = ()


class QuantPass(ir.passes.InPlacePass):
    """Base of all passes.

    Class attributes:
        name: As the user types it; the name of the file.
        stage: Where it belongs.
        after: Passes of the same stage that have to come before it; `WEIGHTS` stands for all that choose weights.
        chooses_weights: Whether it decides what weights become; what reads the result comes after `WEIGHTS`.
        paper: Reference, printed by `qcompiler passes`.
        needs_calibration: Whether it measures activations.
        Options: Frozen dataclass; each field's metadata["help"] says what it does.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage]
    scope: ClassVar[Literal["model", "segment"]] = "model"
    after: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[str] = ""
    needs_calibration: ClassVar[bool] = False
    chooses_weights: ClassVar[bool] = False
    Options: ClassVar[type] = NoOptions

    def __init__(self, context: PassContext, options: dict[str, str] | None = None) -> None:
        """Take the context and options as text, e.g. ``{"percdamp": "0.02"}``; unknown ones raise SchemeError."""
        self.context = context
        self.options = parse_options(self.name, self.Options, options or {})

    @classmethod
    def applies(cls, config: CompileConfig) -> bool:
        """Whether the pass belongs in every pipeline for this configuration; False: only when named."""
        del config
        return False

    def added_bytes(self, site: Site) -> int:
        """Bytes that the pass will put beside a site's weight, for those who plan with sizes."""
        del site
        return 0

    @abstractmethod
    def call(self, model: ir.Model) -> QuantPassResult:
        """Change the model in place."""

    def __str__(self) -> str:
        """The pass as pipelines write it: name and the options that differ from their defaults."""
        changed = [
            f"{f.name}={getattr(self.options, f.name)}"
            for f in dataclasses.fields(self.Options)
            if getattr(self.options, f.name) != f.default
        ]
        return self.name + (f"{{{','.join(changed)}}}" if changed else "")


def assigned_sites(model: ir.Model) -> list[Site]:
    """The sites that got a scheme and are not quantized yet; one for each weight, the first user."""
    seen: set[ir.Value] = set()
    chosen = []
    for site in find_sites(model)[0]:
        if SCHEME_KEY in site.node.metadata_props and site.quantized is None and site.weight not in seen:
            seen.add(site.weight)
            chosen.append(site)
    return chosen


def planned_sites(model: ir.Model) -> list[Site]:
    """The sites that got a scheme, the first for each weight, quantized or not."""
    found: dict[ir.Value, Site] = {}
    for site in find_sites(model)[0]:
        if SCHEME_KEY in site.node.metadata_props:
            found.setdefault(site.weight, site)
    return list(found.values())


def site_spec(site: Site, config: CompileConfig) -> WeightSpec:
    """The WeightSpec of an assigned site."""
    return spec_of(site, Scheme.parse(scheme_text(site)), config)


def spec_of(site: Site, scheme: Scheme, config: CompileConfig) -> WeightSpec:
    """The WeightSpec that a resolved scheme means for a site."""
    made = scheme.spec(
        site.columns,
        "float16" if config.float16 and site.scale_dtype == "float32" else site.scale_dtype,
        signed_scale=config.target in ("cpu", "cuda"),
        reduced=config.reduce_range,
        stream=needs_operators(site, scheme, config),
    )
    return dataclasses.replace(made, sparse=True) if SPARSE_KEY in site.node.metadata_props else made


def scheme_text(site: Site) -> str:
    """What records call the format of an assigned site: the text of its scheme, activations and zeros included."""
    marks = site.node.metadata_props
    sparse = f"sparse{marks[SPARSE_KEY]}+" if SPARSE_KEY in marks else ""
    return sparse + marks[SCHEME_KEY]


def site_scheme(site: Site) -> Scheme | None:
    """The scheme that the site was assigned, or None."""
    text = site.node.metadata_props.get(SCHEME_KEY)
    return Scheme.parse(text) if text else None


def explicit_activations(site: Site) -> Activations | None:
    """How the graph is to quantize what the site reads; None where it stays float, or the kernel does it."""
    scheme = site_scheme(site)
    return scheme.activations if scheme is not None and scheme.spelled_out else None


def quantizes_activations(config: CompileConfig, *, dynamic: bool | None = None) -> bool:
    """Whether a scheme of the plan has the graph quantize activations; with `dynamic`, at run time or not."""
    found = (scheme.resolve(config.target) for scheme in config.plan.schemes)
    kinds = [bool(scheme.activations.dynamic) for scheme in found if scheme.spelled_out and scheme.activations]
    return bool(kinds) if dynamic is None else dynamic in kinds


class WeightQuantizer(QuantPass):
    """A weight algorithm: implement `quantize`, arrays in, arrays out."""

    stage = Stage.QUANTIZE
    chooses_weights = True

    @abstractmethod
    def quantize(self, weight: np.ndarray, spec: WeightSpec, facts: LayerFacts | None) -> Quantized:
        """Quantize a weight float32 ``[N, K]``; `facts` is None where no activations were measured."""

    def facts_of(self, _sites: Sequence[Site], facts: LayerFacts | None) -> LayerFacts | None:
        """What is known of the activation that sites read, and of what they compute from it."""
        return facts

    def quantize_sites(self, sites: Sequence[Site], facts: LayerFacts | None, remark: str = "") -> list[SiteRecord]:
        """Quantize sites that read the same activation and have the same spec, stacked into one weight."""
        weights = [checked_weight(site) for site in sites]
        return self._written(sites, weights, self._stacked(sites, weights, facts), remark)

    def _stacked(self, sites: Sequence[Site], weights: list[np.ndarray], facts: LayerFacts | None) -> Quantized:
        """The result for the weights of `sites` one above the other."""
        spec = site_spec(sites[0], self.context.config)
        facts = self.facts_of(sites, facts)
        try:
            weight = np.concatenate(weights) if len(weights) > 1 else weights[0]
            result = self.quantize(weight, spec, facts)
        except NumericsError as error:
            raise NumericsError(f"{', '.join(repr(site.name) for site in sites)}: {error}") from error
        if spec.sparse and not spec.fp8:  # whatever the algorithm knows of that
            middle = result.grid.zero_point.repeat(spec.group_size, axis=1)[:, : weight.shape[1]]
            result.codes[:] = np.where(weight == 0, middle, result.codes)
        return result

    def _written(
        self, sites: Sequence[Site], weights: list[np.ndarray], result: Quantized, remark: str
    ) -> list[SiteRecord]:
        """Give each site its part of a result, and record it."""
        spec = site_spec(sites[0], self.context.config)
        records, start = [], 0
        for site, weight in zip(sites, weights, strict=True):
            rows = slice(start, start + len(weight))
            start = rows.stop
            grid = Grid(result.grid.scale[rows], result.grid.zero_point[rows])
            original = site.weight.const_value
            # Tables are those of one site: see the pass `codebook`.
            tensor = write_weight(site, result.codes[rows], grid, spec, self.name, result.tables)
            # For passes that need the error W - Q. What lies on disk stays mapped there and costs no memory.
            tensor.meta["original"] = original
            metrics = {
                "sqnr_db": sqnr_db(weight, tensor.dequantized()),
                "bits_per_weight": spec.stored_bits(site.columns),
                **result.metrics(rows),
            }
            reason = "; ".join(text for text in (remark, result.remark) if text)
            records.append(SiteRecord(site.name, "quantized", scheme_text(site), reason, metrics))
            logger.debug("%s: %s quantized to %s", self.name, site.name, scheme_text(site))
        return records


def checked_weight(site: Site) -> np.ndarray:
    """The weight float32 [N, K]; raises NumericsError naming the site if a value is not finite."""
    weight = read_weight(site)
    total = float(np.sum(weight, dtype=np.float64))
    if not np.isfinite(total):
        bad = int(np.size(weight) - np.count_nonzero(np.isfinite(weight)))
        raise NumericsError(
            f"the weight of '{site.name}' holds {bad} values that are NaN or infinite; "
            f"mend the model, or leave the site float with --ignore '{site.name}'"
        )
    return weight


def streaming(context: PassContext, name: str, *, sequential: bool, drift: bool = False) -> Streaming:
    """How the pass called `name` streams calibration data through the model."""
    config = context.config
    return Streaming(
        config.provider,
        context.threads,
        sequential,
        # The rest is for Hessians, codes and what a batch needs while it runs.
        config.max_memory // 4 if config.max_memory else None,
        lambda done, total: context.tick(name, done, total),
        drift,
        context.checkpoints,
    )


def watch(
    context: PassContext,
    name: str,
    model: ir.Model,
    collectors: Mapping[ir.Value, Sequence[Collector]],
    batches: Sequence[Feeds] | None = None,
) -> None:
    """Show values of the model, as it is now, to the collectors of the pass called `name`, on all batches or these."""
    observe(
        model,
        collectors,
        context.batches if batches is None else batches,
        provider=context.config.provider,
        threads=context.threads,
        tick=lambda done, total: context.tick(name, done, total),
    )
