"""CompileReport: what was done at every site, what it cost and how close the result is, as JSON, table and metadata."""

import importlib
import importlib.metadata
import json
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from qcompiler.config import CompileConfig
from qcompiler.records import Histogram, PassReport, SiteRecord
from qcompiler.report_curve import PlanPoint
from qcompiler.report_meaning import scheme_meaning

if TYPE_CHECKING:
    from rich.console import Console

    from qcompiler.bench import BenchResult
    from qcompiler.calibration import CalibrationData
    from qcompiler.verify import Verification

__all__ = [
    "EXACT_DB",
    "SCHEMA",
    "ActivationRow",
    "CompileReport",
    "Excluded",
    "SiteRow",
    "merge_records",
    "verification_table",
]

SCHEMA = 1
_DISTRIBUTIONS = ("onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "numpy")
# JSON has no infinity; an exact result is written as this many dB, more than float64 can resolve.
EXACT_DB = 400.0
_SKIPS_LISTED = 3
# What a site's row shows in fields of its own.
_FIGURES = ("bits_per_weight", "sqnr_db", "loss", "relative_loss", "seconds")


# Passes whose work is wanted where nothing is quantized.
_KEPT = ("convert_float16", "prune")


@dataclass
class SiteRow:
    """Everything that happened at one site.

    Attributes:
        site: Its name.
        action: ``quantized``, ``skipped``, or ``assigned`` where no pass quantized it.
        scheme: Scheme text; empty if it stayed float.
        form: The operator that it became.
        bits_per_weight: Scales and zero points included.
        sqnr_db: Of the weight, in dB.
        loss: GPTQ's loss, the squared error of the site's output summed over the calibration tokens.
        relative_loss: The loss divided by the summed square of the output.
        seconds: Time, where a pass measured it.
        metrics: Further figures, unit in the name.
        reason: Why it was skipped, or remarks on how it was done.
    """

    site: str
    action: str = "assigned"
    scheme: str = ""
    form: str = ""
    bits_per_weight: float | None = None
    sqnr_db: float | None = None
    loss: float | None = None
    relative_loss: float | None = None
    seconds: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    reason: str = ""

    def update(self, record: SiteRecord) -> None:
        """Add what a pass recorded."""
        if record.action == "fused":
            self.action, self.form = "quantized", record.reason
        else:
            if record.action == "quantized":
                # What one form cannot do, another one has done.
                self.action, self.reason = "quantized", "" if self.action == "skipped" else self.reason
            self.action = "skipped" if record.action == "skipped" else self.action
            self.reason = "; ".join(text for text in (self.reason, record.reason) if text)
        # A budget may have given another format than the one that was asked for first.
        known = record.spec if record.action in ("assigned", "quantized") else ""
        self.scheme = "" if self.action == "skipped" else known or self.scheme or record.spec
        for name, figure in record.metrics.items():
            if name in _FIGURES:
                setattr(self, name, figure)
            else:
                self.metrics[name] = figure


@dataclass(frozen=True)
class ActivationRow:
    """A value that the model encodes.

    Attributes:
        value: Its name.
        format: Of the codes, e.g. ``uint8``.
        low: Lower end of the range, in the value's unit; None where scales are computed at run time.
        high: Upper end.
        scale: Of the codes.
        zero_point: The code that means zero.
        method: How the range was chosen.
    """

    value: str
    format: str
    low: float | None
    high: float | None
    scale: float | None
    zero_point: float | None
    method: str

    @classmethod
    def of(cls, record: SiteRecord) -> "ActivationRow":
        """What a pass recorded."""
        low, high, scale, zero = (record.metrics.get(name) for name in ("low", "high", "scale", "zero_point"))
        return cls(record.site, record.spec, low, high, scale, zero, record.reason)

    @property
    def kind(self) -> str:
        """The method for counting: ``shared`` where values were measured together."""
        return "shared" if "shared by" in self.method else self.method


@dataclass(frozen=True)
class Excluded:
    """A site that was left float because it added much noise in a compilation before.

    Attributes:
        site: Its name.
        before_db: SQNR of what it read, in dB.
        after_db: SQNR of its result.
        added: The noise it added, as a share of its result's energy.
    """

    site: str
    before_db: float
    after_db: float
    added: float


def merge_records(records: Iterable[SiteRecord]) -> tuple[list[SiteRow], list[ActivationRow], list[str]]:
    """One row for each site, in order of appearance, the quantized values, and notes on the model as a whole."""
    rows: list[SiteRow] = []
    activations: list[ActivationRow] = []
    latest: dict[str, SiteRow] = {}
    notes = []
    for record in records:
        if record.action == "rewritten":
            notes.append(f"{record.site}: {record.reason}" if record.reason else record.site)
            continue
        if record.action == "activation":
            activations.append(ActivationRow.of(record))
            continue
        if record.action == "plan":  # of no site: see `report_curve`
            continue
        row = latest.get(record.site)
        # Two unnamed nodes may have been skipped under one name; they stay two rows.
        if row is None or (row.action == record.action == "skipped"):
            row = latest[record.site] = SiteRow(record.site)
            rows.append(row)
        row.update(record)
    return rows, activations, notes


@dataclass
class CompileReport:
    """The report of one compilation.

    Attributes:
        config: The choices.
        model_name: File name of the model.
        passes: What each pass cost and did.
        calibration: The data that was measured on, or None.
        bytes_before: Of the constants.
        bytes_after: Of the constants.
        verification: How close the result is; None where it was not verified.
        seconds: Wall-clock time of everything.
        peak_bytes: Peak anonymous resident memory.
        file_bytes: Size of what was written.
        bench: How fast the result is; empty where it was not timed.
        excluded: Sites that were left float for the noise they added.
        checkpoints: For each pass that stores results how many sites came from an earlier run, and of how many.
        curve: What plans of other sizes would cost, where formats were chosen for a budget.
        histograms: Distributions of the worst sites, where a page is made.
    """

    config: CompileConfig
    model_name: str
    passes: Sequence[PassReport]
    calibration: "CalibrationData | None"
    bytes_before: int
    bytes_after: int
    verification: "Verification | None" = None
    seconds: float = 0.0
    peak_bytes: int = 0
    file_bytes: int = 0
    bench: "tuple[BenchResult, ...]" = ()
    excluded: tuple[Excluded, ...] = ()
    checkpoints: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    histograms: Sequence[Histogram] = ()

    def __post_init__(self) -> None:
        records = [record for done in self.passes for record in done.records]
        self.sites, self.activations, self.notes = merge_records(records)
        self.curve = tuple(PlanPoint.of(record) for record in records if record.action == "plan")

    @property
    def quantized_sites(self) -> int:
        """Number of sites that were quantized."""
        return sum(row.action == "quantized" for row in self.sites)

    @property
    def changed(self) -> bool:
        """Whether there is a model to write that differs from the one that came in."""
        return bool(self.quantized_sites) or any(p.modified and p.name in _KEPT for p in self.passes)

    def below_floor(self) -> list[str]:
        """The accuracy floors that the result misses, in words."""
        config, found = self.config, self.verification
        failures = found.floor_failures(config.min_sqnr_db, config.max_kl) if found is not None else []
        if config.max_size is not None and self.file_bytes > config.max_size:
            failures.append(f"the output takes {self.file_bytes} bytes where --max-size asks for {config.max_size}")
        return failures

    def finish(self, seconds: float, peak_bytes: int, file_bytes: int) -> None:
        """Put in what is known only at the end."""
        self.seconds, self.peak_bytes, self.file_bytes = seconds, peak_bytes, file_bytes

    def activation_summary(self) -> str:
        """How many values are codes, of which format, and how their ranges were chosen; empty if there are none."""
        rows = self.activations
        if not rows:
            return ""
        formats = Counter(row.format for row in rows).most_common()
        named = " and ".join(name if len(formats) == 1 else f"{name} ({count})" for name, count in formats)
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(row.kind for row in rows).most_common())
        return f"{len(rows)} {'activation' if len(rows) == 1 else 'activations'} quantized to {named}: {kinds}"

    def skip_reasons(self) -> list[tuple[str, int]]:
        """Why sites were skipped and how many for each reason, the most frequent first."""
        return Counter(row.reason for row in self.sites if row.action == "skipped").most_common()

    def skip_summary(self) -> str:
        """The same as one line."""
        reasons = self.skip_reasons()
        if not reasons:
            return "no MatMul, Gemm, Conv or Gather reads a constant float weight"
        listed = [f"{count} {'site' if count == 1 else 'sites'}: {reason}" for reason, count in reasons[:_SKIPS_LISTED]]
        rest = len(reasons) - len(listed)
        return "; ".join([*listed, f"{rest} further reasons"] if rest else listed)

    def metadata(self) -> dict[str, str]:
        """What the model's metadata_props say: everything that determines its bytes, and nothing else."""
        recipe = {key: value for key, value in self.config.recipe().items() if key != "threads"}
        found = {
            "qcompiler.version": _own_version(),
            "qcompiler.recipe": json.dumps(recipe, sort_keys=True, separators=(",", ":")),
            "qcompiler.passes": ",".join(done.name for done in self.passes),
            "qcompiler.seed": str(self.config.seed),
        }
        if self.calibration is not None:
            found["qcompiler.calibration"] = self.calibration.description
            found["qcompiler.calibration.sha256"] = self.calibration.digest
        return found

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values; keys below "sites", "activations" and so on are attributes of their classes."""
        data = self.calibration
        return {
            "schema": SCHEMA,
            "model": self.model_name,
            "bytes": {"before": self.bytes_before, "after": self.bytes_after, "files": self.file_bytes},
            "recipe": self.config.recipe(),
            "meaning": scheme_meaning(self.config),
            "calibration": None if data is None else _told(data),
            "sites": [asdict(row) for row in self.sites],
            "quantized": self.quantized_sites,
            "skipped": dict(self.skip_reasons()),
            "excluded": [asdict(row) for row in self.excluded],
            "checkpoints": {
                name: {"recalled": recalled, "sites": sites} for name, (recalled, sites) in self.checkpoints.items()
            },
            "curve": [asdict(point) for point in self.curve],
            **({"histograms": [asdict(each) for each in self.histograms]} if self.histograms else {}),
            "activations": [asdict(row) for row in self.activations],
            "notes": self.notes,
            "passes": [
                {"name": p.name, "seconds": p.seconds, "peak_bytes": p.peak_bytes, "modified": p.modified}
                for p in self.passes
            ],
            "verification": asdict(self.verification) if self.verification is not None else None,
            "bench": [asdict(row) for row in self.bench],
            "versions": _versions(),
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
        }

    def to_json(self) -> str:
        """The report as JSON; no infinity, no NaN: an exact result has an SQNR of 400 dB."""
        return json.dumps(_finite(self.to_dict()), indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    def table(self, console: "Console", *, every_site: bool = False) -> None:
        """Print the report.

        Args:
            console: Where to; its width is used.
            every_site: One line for each site instead of a summary with the worst ones.
        """
        from qcompiler.report_table import print_report

        print_report(self, console, every_site=every_site)


def verification_table(verification: "Verification", console: "Console") -> None:
    """Print how close two models are."""
    from qcompiler.report_table import print_verification

    print_verification(verification, console)


def _told(data: "CalibrationData") -> dict[str, Any]:
    return {"description": data.description, "sha256": data.digest, "synthetic": data.synthetic}


def _own_version() -> str:
    # The package, unlike what is installed under its name, is sure to be the code that runs.
    return str(importlib.import_module("qcompiler").__version__)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _versions() -> dict[str, str]:
    """Versions of what the result depends on; what is not installed is left out."""
    found = {"qcompiler": _own_version(), "python": platform.python_version()}
    found.update((name, _version(name)) for name in _DISTRIBUTIONS)
    return {name: version for name, version in found.items() if version}


def _finite(value: Any) -> Any:
    """The same value without infinities; anything that is not a number is left as it is."""
    if isinstance(value, float):
        # NaN has no place in a report; where it got in, null says that there is no figure.
        return None if value != value else max(-EXACT_DB, min(EXACT_DB, value)) if abs(value) == float("inf") else value
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
