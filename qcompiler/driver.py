"""compile_model: load, run the pipeline, save, verify, report. No algorithm lives here."""

import json
import logging
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from qcompiler import pipeline
from qcompiler.caching import prune
from qcompiler.calibration import CalibrationData
from qcompiler.checkpoints import Checkpoints
from qcompiler.config import CompileConfig
from qcompiler.errors import ModelError, OutputError, SchemeError
from qcompiler.feeding import calibration_data, more_rows
from qcompiler.files import saver
from qcompiler.files.loader import load_model, resolve_model_path, source_of
from qcompiler.files.transaction import OutputTransaction, check_output
from qcompiler.histograms import WorstWeights, activation_histograms
from qcompiler.instruments import Dump, Instrument, Legality, MemoryMeter, stored_bytes
from qcompiler.measuring import bench_output, verify_output, worst_sites
from qcompiler.pass_manager import PassManager
from qcompiler.passes.base import PassContext
from qcompiler.records import Histogram
from qcompiler.report import CompileReport, Excluded
from qcompiler.report_curve import draw_curve, require_matplotlib
from qcompiler.report_html import read_report, report_page, require_html
from qcompiler.scheme import Scheme
from qcompiler.scheme_plan import Pattern
from qcompiler.session import adapter_bytes, cpu_threads, single_threaded_blas

__all__ = ["CompileResult", "compile_model", "write_report_page"]

logger = logging.getLogger(__name__)

# Sites whose distributions are drawn.
_DRAWN = 6


@dataclass(frozen=True)
class CompileResult:
    """A compiled model.

    Attributes:
        model: The model; its float weights are still read from the input's files.
        report: What was done, what it cost and how close the result is.
        files: What was written, the model first; empty without an output path.
        below_floor: Accuracy floors that the result misses.
    """

    model: ir.Model
    report: CompileReport
    files: tuple[Path, ...]
    below_floor: tuple[str, ...]

    def save(self, path: str | Path, *, force: bool = False) -> list[Path]:
        """Write the model (and its external data) to `path`."""
        return saver.save_model(self.model, Path(path), force=force)


def compile_model(
    source: str | Path | onnx.ModelProto,
    scheme: str | Scheme | None = None,
    *,
    calibration: str | Path | Iterable[dict[str, np.ndarray]] | None = None,
    output: str | Path | None = None,
    config: CompileConfig | None = None,
    pipeline_text: str | None = None,
    **options: Any,
) -> CompileResult:
    """Quantize a model.

    Args:
        source: A path, a folder that onnxruntime-genai's builder made, or a ModelProto (which is not changed).
        scheme: For example ``w4a16`` or ``w4a16-g32-sym``; sets the default of `config.plan`.
        calibration: See `CompileConfig.calibration`.
        output: Where to write; without it the result is only returned (and verified).
        config: All choices; `scheme`, `calibration` and `options` override it.
        pipeline_text: An explicit pipeline instead of the one that `config` implies.
        options: Fields of CompileConfig.

    Returns:
        The model and its report.

    Raises:
        QCompilerError: What is wrong, where, and the remedy; nothing is left behind.
    """
    config = _configured(config or CompileConfig(), scheme, calibration, options)
    started = time.perf_counter()
    with MemoryMeter() as meter, single_threaded_blas(), _temporary() as temporary, _store(config) as store:
        model = load_model(source)
        place = _Place.of(source, Path(output) if output is not None else temporary / "model.onnx")
        place.check(model, force=config.force, html=config.html)
        config, excluded = _without_worst(source, config, pipeline_text)
        before, data = stored_bytes(model), calibration_data(model, config)
        config = pipeline.with_algorithms(config, calibrated=data is not None)
        context = _context(model, config, data, store)
        steps = pipeline.build(config, context, text=pipeline_text)
        worst = WorstWeights(_DRAWN)
        reports = PassManager(steps, [*_instruments(config), *([worst] if config.html else [])]).run(model, meter)
        config = pipeline.settled(config, context.settled)
        report = CompileReport(config, _source_name(source), reports, data, before, stored_bytes(model))
        report.excluded, report.checkpoints = excluded, store.tally if store is not None else {}
        if report.changed:
            model.metadata_props.update(report.metadata())
        else:
            _nothing_quantized(report, config)
        with OutputTransaction(place.folder, force=config.force, protect=saver.input_files(model)) as transaction:
            if report.changed:
                place.write(model, transaction)
            else:
                place.copy(source, transaction)
            sizes = saver.file_bytes(transaction.seal())
            _measure(report, source, model, transaction.staged(place.model), worst)
            report.finish(time.perf_counter() - started, meter.peak_bytes, sizes)
            place.write_beside(transaction, context, report)
            files = transaction.commit() if output is not None else []
        files += [draw_curve(report.curve, path) for path in (config.pareto,) if path is not None]
    return CompileResult(model, report, tuple(files), tuple(report.below_floor()))


@contextmanager
def _temporary() -> Iterator[Path]:
    """A folder that is gone in the end."""
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as folder:
        yield Path(folder)


@contextmanager
def _store(config: CompileConfig) -> Iterator[Checkpoints | None]:
    """The folder of checkpoints, where there is to be one; in the end it is no larger than it may be."""
    if config.checkpoint is None:
        yield None
        return
    try:
        yield Checkpoints(Path(config.checkpoint))
    finally:
        if config.checkpoint_limit is not None:
            try:
                prune(Path(config.checkpoint), config.checkpoint_limit)
            except OutputError as error:  # of no concern to the model, which may be there already
                logger.warning("%s", error)


def _context(
    model: ir.Model, config: CompileConfig, data: CalibrationData | None, store: Checkpoints | None
) -> PassContext:
    """What passes may know."""
    more = None if data is None else partial(more_rows, model, config)
    return PassContext(config, cpu_threads(config.threads), data, config.progress, store, more)


def _measure(
    report: CompileReport, source: str | Path | onnx.ModelProto, model: ir.Model, output: Path, worst: WorstWeights
) -> None:
    """Put into the report how close the output is, and how fast, and how the worst sites look."""
    config, data, reference = report.config, report.calibration, _reference(source)
    if not report.changed:
        return
    if config.verify:
        report.verification = verify_output(reference, model, output, config, data)
    if config.bench:
        report.bench = bench_output(reference, model, output, config, data)
    if config.html:
        report.histograms = _histograms(source, worst, data)


def _histograms(
    source: str | Path | onnx.ModelProto, worst: WorstWeights, data: CalibrationData | None
) -> list[Histogram]:
    """Those of the worst sites' weights, each followed by that of what the site reads."""
    if data is None or not len(data.batches):
        return worst.histograms
    read = activation_histograms(load_model(source), [each.site for each in worst.histograms], data.batches)
    reads = {each.site: each for each in read}
    return [each for one in worst.histograms for each in (one, reads.get(one.site)) if each is not None]


def _without_worst(
    source: str | Path | onnx.ModelProto, config: CompileConfig, pipeline_text: str | None
) -> tuple[CompileConfig, tuple[Excluded, ...]]:
    """Compile once if asked to; the configuration without the sites that added the most noise, and what these are."""
    if not config.exclude_worst:
        return config, ()
    if config.calibration is not None and not isinstance(config.calibration, str | Path | Sequence):
        config = replace(config, calibration=list(config.calibration))  # it is read several times
    trial = replace(config, exclude_worst=0, verify=False, min_sqnr_db=None, max_kl=None, bench=False, dump_dir=None,
                    pareto=None, html=False)  # fmt: skip
    first = compile_model(source, config=trial, pipeline_text=pipeline_text)
    sites = {row.site for row in first.report.sites if row.action == "quantized"}
    if not sites:
        return config, ()
    found = worst_sites(load_model(source), first.model, config, config.exclude_worst, sites)
    if not found:
        logger.warning("no site adds noise that could be measured; none is left out")
    ignore = (*config.plan.ignore, *(Pattern(layer.name) for layer in found))
    excluded = tuple(Excluded(layer.name, layer.before_db, layer.after_db, layer.added) for layer in found)
    return replace(config, plan=replace(config.plan, ignore=ignore)), excluded


def _check_drawing(config: CompileConfig) -> None:
    """Raise OutputError now for a drawing that could not be made after the work."""
    if config.html:
        require_html()
    if config.pareto is not None:
        require_matplotlib()
        check_output(config.pareto, force=config.force)


def _source_name(source: str | Path | onnx.ModelProto) -> str:
    """What messages and the report call the input."""
    return source.graph.name or "model" if isinstance(source, onnx.ModelProto) else Path(source).name


def _reference(source: str | Path | onnx.ModelProto) -> bytes | Path:
    """The float model as `verify` takes it."""
    return source.SerializeToString() if isinstance(source, onnx.ModelProto) else resolve_model_path(source)


def write_report_page(report: Path, page: Path, *, force: bool) -> None:
    """Make a page of a report's JSON file."""
    text = report_page(read_report(report))
    check_output(page, force=force)
    with OutputTransaction(page.parent, force=force) as transaction:
        transaction.create(page).write(text.encode())
        transaction.commit()


@dataclass(frozen=True)
class _Place:
    """Where the output goes.

    Attributes:
        folder: The folder that everything is written to.
        model: The model file.
        companions: The input folder whose other files are copied along, or None.
    """

    folder: Path
    model: Path
    companions: Path | None

    @classmethod
    def of(cls, source: str | Path | onnx.ModelProto, target: Path) -> "_Place":
        """A folder goes to a folder, a file or message to a file."""
        if isinstance(source, str | Path) and Path(source).is_dir() and target.suffix != ".onnx":
            return cls(target, target / resolve_model_path(source).relative_to(source), Path(source))
        return cls(target.parent, target, None)

    @property
    def report(self) -> Path:
        """The report beside the model."""
        return self.model.with_name(f"{self.model.stem}.report.json")

    @property
    def page(self) -> Path:
        """The same as a page."""
        return self.report.with_suffix(".html")

    def write_beside(self, transaction: OutputTransaction, context: PassContext, report: CompileReport) -> None:
        """Create what goes with the model: files of passes, and the report."""
        for ending, arrays in context.artifacts.items():
            transaction.create(self.model.with_suffix(f".{ending}")).write(adapter_bytes(arrays))
        text = report.to_json()
        transaction.create(self.report).write(text.encode())
        if report.config.html:
            transaction.create(self.page).write(report_page(json.loads(text)).encode())

    def check(self, model: ir.Model, *, force: bool, html: bool) -> None:
        """Raise OutputError now for what would be found out only after the work."""
        saver.check_destination(
            self.folder if self.companions else self.model, model, force=force, folder=bool(self.companions)
        )
        if self.folder.exists():
            for path in (self.report, *((self.page,) if html else ())):
                check_output(path, force=force)

    def write(self, model: ir.Model, transaction: OutputTransaction) -> None:
        """Write the model and what goes along with it."""
        self._write_companions(model, transaction)
        saver.write_model(model, self.model, transaction)

    def copy(self, source: str | Path | onnx.ModelProto, transaction: OutputTransaction) -> None:
        """Write the input as it came: byte for byte if it is one file."""
        model = load_model(source)
        self._write_companions(model, transaction)
        files = source_of(model)
        if files.path is not None and not files.data_files:
            with files.path.open("rb") as file:
                output = transaction.create(self.model)
                while chunk := file.read(1 << 24):
                    output.write(chunk)
        else:
            saver.write_model(model, self.model, transaction)

    def _write_companions(self, model: ir.Model, transaction: OutputTransaction) -> None:
        if self.companions is not None:
            skip = source_of(model).files
            saver.copy_companions(self.companions, self.folder, self.model.name, transaction=transaction, skip=skip)


def _configured(
    config: CompileConfig, scheme: str | Scheme | None, calibration: Any, options: dict[str, Any]
) -> CompileConfig:
    """The configuration with the caller's own arguments put in."""
    unknown = set(options) - set(CompileConfig.__dataclass_fields__)
    if unknown:
        raise SchemeError(f"unknown option '{sorted(unknown)[0]}'; see qcompiler.CompileConfig for the known ones")
    if scheme is not None:
        parsed = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
        options = {"plan": replace(config.plan, default=parsed), **options}
    if calibration is not None:
        options["calibration"] = calibration
    config = pipeline.with_operators(replace(config, **options))
    _check_drawing(config)
    return config


def _instruments(config: CompileConfig) -> list[Instrument]:
    return [Legality(), *([Dump(Path(config.dump_dir))] if config.dump_dir else [])]


def _nothing_quantized(report: CompileReport, config: CompileConfig) -> None:
    """Say that the model leaves as it came; an error where something had to be quantized."""
    message = f"{report.model_name}: nothing was quantized ({report.skip_summary()})"
    if config.require_quantized:
        raise ModelError(f"{message}; check --scheme, --ignore and --only, or drop --require-quantized")
    logger.warning("%s; the model is copied unchanged", message)
