"""Run the compiled model and say how close it is to the float model, and what ONNX Runtime really runs.

The float model is the reference. Where it is large its weights stay mapped (no prepacking, no constant folding): it
then costs little more anonymous memory than its activations, whatever its size, so it is never cut into parts. Rows
are compared one at a time and dropped. What is run:

1. The compiled model on one short row, on every provider, with graph optimizations off and on; with them on, ONNX
   Runtime records which operators it ran.
2. Where MatMulNBits computes with int8 activations (accuracy level 4), the same on the same row with exact compute.
3. All held-out rows, on the first provider, with optimizations on.
"""

import logging
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx

from qcompiler.calibration import row_mask
from qcompiler.errors import CalibrationError, KernelError
from qcompiler.instruments import MemoryMeter, anonymous_bytes
from qcompiler.session import Feeds, OrtRunner, cpu_threads, operators_of
from qcompiler.verify_audit import (
    check_scales,
    constant_bytes,
    count_operators,
    fusion_remarks,
    with_exact_compute,
)
from qcompiler.verify_forms import CompiledRunner, Decoder, cache_decoders, holds_float8
from qcompiler.verify_integers import IntegerAudit, Unfused, audit_integers, oversight_remarks, quantizes_values
from qcompiler.verify_outputs import Closeness, Comparison, producers_of_logits
from qcompiler.verify_results import AccuracyLevelCost, RunResult, Verification
from qcompiler.verify_rows import Sample, short_row

__all__ = ["AccuracyLevelCost", "RunResult", "Verification", "verify"]

logger = logging.getLogger(__name__)

_CPU = "CPUExecutionProvider"
# Providers that do not compile parts of the graph, so that ONNX Runtime can save what it runs.
_SAVING = {_CPU, "CUDAExecutionProvider"}
# A float model up to this size is optimized and prepacked: a copy of its weights for speed.
_COPIED_BYTES = 128 << 20
# What a session needs beside its weights, for a short row.
_WORKING_BYTES = 128 << 20
# What optimizations may cost before it is worth a remark.
_TOLERATED_DB = 3.0
# Above this SQNR a difference is that of two orders of summation.
_EXACT_ENOUGH_DB = 60.0


@dataclass(frozen=True)
class _Job:
    """The compiled model and how it is run.

    Attributes:
        output: Its file.
        model: The same, external data not loaded.
        producers: Outputs that may be logits, and what computes them.
        providers: Execution providers; the first one runs all rows.
        threads: Threads; 0 takes all cores.
        decoders: What makes floats of outputs that are codes.
        prepack: Whether sessions keep a packed copy of the weights.
    """

    output: Path
    model: onnx.ModelProto
    producers: dict[str, str]
    providers: tuple[str, ...]
    threads: int
    decoders: Mapping[str, Decoder]
    prepack: bool = True

    def comparison(self, provider: str, optimize: bool) -> Comparison:
        """An empty comparison whose messages say how the model was run."""
        how = f"on {provider} with optimizations {'on' if optimize else 'off'}"
        return Comparison(f"{self.output.name} {how}", self.producers, cpu_threads(self.threads))

    def runner(
        self, provider: str, optimize: bool, model: bytes | None = None, optimized: Path | None = None
    ) -> OrtRunner:
        """A session on the file, or on a variant of it; `optimized` is where the graph that it runs is written."""
        source = self.output if model is None else model
        return CompiledRunner(
            source,
            self.decoders,
            provider=provider,
            threads=self.threads,
            optimize=optimize,
            prepack=self.prepack,
            arena=self.prepack,
            folder=None if model is None else self.output.parent,
            record=True,
            optimized=optimized,
            # ONNX Runtime 1.31 makes an integer kernel of MatMul on 8-bit floats too, and cannot load what it made.
            fuse_qdq=not holds_float8(self.model),
            custom_ops=operators_of(self.model.opset_import),
        )


def verify(
    source: Path | bytes,
    output: Path,
    held_out: Sequence[Feeds],
    *,
    providers: Sequence[str],
    threads: int,
    max_memory: int | None = None,
    synthetic: bool = False,
    accuracy_levels: bool = True,
) -> Verification:
    """Compare a compiled model with the float model it was made of.

    Args:
        source: The float model: a file, or bytes that hold all of its weights.
        output: The compiled model's file.
        held_out: Feeds of one row each; an item is read once.
        providers: Execution providers to run on; the first one runs all rows.
        threads: Threads; 0 takes all cores.
        max_memory: Where loading the compiled model would take more bytes of anonymous memory than this, it is run
            without prepacking on one short row only; None is unlimited.
        synthetic: Whether the rows are made up, for the report.
        accuracy_levels: Whether to measure what accuracy level 4 costs.

    Returns:
        Figures, in which nothing is NaN.

    Raises:
        PassError: A scale that is NaN, infinite or zero; an output that is missing or of another shape.
        KernelError: A provider that cannot load or run the model; an output that is NaN or infinite.
        CalibrationError: There is no row, or the float model cannot run it.
    """
    if not len(held_out):
        raise CalibrationError("there is no held-out row to verify on; give more calibration data, or --no-verify")
    started = time.perf_counter()
    with MemoryMeter() as meter:
        model = onnx.load(output, load_external_data=False)
        check_scales(model, output.parent, output.name)
        decoders = cache_decoders(model, output.parent, output.name)
        job = _Job(output, model, producers_of_logits(model.graph), tuple(providers), threads, decoders)
        reference = _open_reference(source, threads, providers[0])
        row = held_out[0]
        try:
            sample = short_row(reference, row)
        except CalibrationError as error:
            if not synthetic:
                raise
            del reference
            return _load_only(job, str(error), time.perf_counter() - started, meter)
        if max_memory is not None and _needed(model, sample, row) > max_memory:
            del reference
            result = _run_little(replace(job, prepack=False), sample)
        else:
            result = _run_all(job, reference, sample, row, held_out, accuracy_levels)
    return replace(result, seconds=time.perf_counter() - started, peak_bytes=meter.peak_bytes, synthetic=synthetic)


def _needed(model: onnx.ModelProto, sample: Sample, row: Feeds) -> int:
    """Anonymous memory with the compiled model loaded, prepacked, and a row's outputs of both models at hand."""
    longer = sum(array.size for array in row.values()) / max(1, sum(array.size for array in sample.feeds.values()))
    outputs = sum(array.nbytes for array in sample.expected.values()) * longer
    return anonymous_bytes() + constant_bytes(model) + int(2 * outputs) + _WORKING_BYTES


def _run_all(
    job: _Job, reference: OrtRunner, sample: Sample, row: Feeds, held_out: Sequence[Feeds], levels: bool
) -> Verification:
    """Run everything that the module's docstring lists."""
    found = _Findings()
    first = job.providers[0]
    for provider in job.providers:
        found.runs.append(RunResult(provider, False, _close(job, provider, sample, optimize=False)))
        if provider != first:
            with job.runner(provider, True) as runner:
                _audit(job, runner, provider, sample, found)
    variant, nodes = with_exact_compute(job.model) if levels and first == _CPU else (b"", 0)
    exact = _close(job, first, sample, model=variant) if nodes else Closeness()
    total = job.comparison(first, True)
    with _audited(job, found) as runner:
        outputs = _audit(job, runner, first, sample, found)
        if not sample.positions:
            total.add(sample.expected, outputs, sample.mask)
        del outputs
        sample.expected.clear()
        for index in range(0 if sample.positions else 1, len(held_out)):
            feeds = row if index == 0 else held_out[index]
            total.add(reference.run(feeds), runner.run(feeds), row_mask(feeds))
    if nodes:
        found.cost = AccuracyLevelCost(nodes, found.runs[-1].close, exact)
    return found.verification(job, total, len(held_out), sample.positions)


def _load_only(job: _Job, why: str, seconds: float, meter: MemoryMeter) -> Verification:
    """The model is loaded in every way, but nothing is known that it could be run on."""
    for provider in job.providers:
        for optimize in (False, True):
            job.runner(provider, optimize).close()
    remark = f"loaded, but not compared, since made-up inputs do not fit: {why}"
    logger.warning(
        "the output could not be compared with the float model, made-up inputs do not fit; give --calibration"
    )
    return Verification(
        (),
        (),
        None,
        None,
        None,
        None,
        {},
        0,
        0,
        (remark,),
        seconds=seconds,
        peak_bytes=meter.peak_bytes,
        synthetic=True,
    )


def _run_little(job: _Job, sample: Sample) -> Verification:
    """Run the short row once on every provider."""
    found = _Findings()
    total = job.comparison(job.providers[0], True)
    for provider in job.providers:
        first = provider == job.providers[0]
        with _audited(job, found) if first else job.runner(provider, True) as runner:
            outputs = _audit(job, runner, provider, sample, found)
            if first:
                total.add(sample.expected, outputs, sample.mask)
            del outputs
    size = f"{sample.positions} positions of one row" if sample.positions else "one row"
    found.remarks.append(f"compared on {size} only, without prepacking, to stay within --max-memory")
    return found.verification(job, total, 1, sample.positions)


@dataclass
class _Findings:
    """What comes together while the model is run in several ways."""

    runs: list[RunResult] = field(default_factory=list)
    fused: dict[str, dict[str, int]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    cost: AccuracyLevelCost | None = None
    integers: IntegerAudit | None = None
    unfused: tuple[Unfused, ...] = ()

    def verification(self, job: _Job, total: Comparison, rows: int, positions: int) -> Verification:
        """The result, but for time, memory and where the rows are from."""
        runs = sorted(self.runs, key=lambda run: (job.providers.index(run.provider), run.optimized))
        remarks = dict.fromkeys([*self.remarks, *_run_remarks(runs), *total.remarks()])
        close, outputs = total.closeness(), total.outputs()
        return Verification(
            outputs, tuple(runs), close.sqnr_db, close.kl, close.top1, self.cost, self.fused, rows, positions,
            tuple(remarks), seconds=0.0, peak_bytes=0, synthetic=False, integers=self.integers, unfused=self.unfused,
        )  # fmt: skip


def _open_reference(source: Path | bytes, threads: int, provider: str) -> OrtRunner:
    """A session on the float model, on the CPU unless only `provider` can run it."""
    if isinstance(source, bytes):
        size = len(source)
    else:
        size = source.stat().st_size
        if size <= _COPIED_BYTES:
            size = constant_bytes(onnx.load(source, load_external_data=False))
    small = size <= _COPIED_BYTES
    try:
        return OrtRunner(source, threads=threads, optimize=small, prepack=small)
    except KernelError:
        if provider == _CPU:
            raise
        logger.info("the CPU cannot run the float model; %s does", provider)
        return OrtRunner(source, provider=provider, threads=threads)


def _close(job: _Job, provider: str, sample: Sample, *, optimize: bool = True, model: bytes | None = None) -> Closeness:
    """How close the compiled model, or a variant of it, is on the short row."""
    comparison = job.comparison(provider, optimize)
    with job.runner(provider, optimize, model) as runner:
        comparison.add(sample.expected, runner.run(sample.feeds), sample.mask)
    return comparison.closeness()


def _audit(job: _Job, runner: OrtRunner, provider: str, sample: Sample, found: _Findings) -> Feeds:
    """Run the short row with optimizations on and note how close it is and which operators ran; returns its outputs."""
    comparison = job.comparison(provider, True)
    outputs = runner.run(sample.feeds)
    comparison.add(sample.expected, outputs, sample.mask)
    found.runs.append(RunResult(provider, True, comparison.closeness()))
    executed = runner.executed()
    found.fused[provider] = count_operators(executed, provider)
    found.remarks += fusion_remarks(job.model, executed, provider)
    return outputs


@contextmanager
def _audited(job: _Job, found: _Findings) -> Iterator[OrtRunner]:
    """The session that runs everything; what it made of encoders and decoders is noted."""
    first = job.providers[0]
    if first not in _SAVING or not quantizes_values(job.model):
        with job.runner(first, True) as runner:
            yield runner
        return
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as folder:
        path = Path(folder) / "optimized.onnx"
        with job.runner(first, True, optimized=path) as runner:
            optimized = onnx.load(path, load_external_data=False)
            found.integers, found.unfused = audit_integers(job.model, optimized)
            found.remarks += oversight_remarks(found.unfused)
            yield runner


def _run_remarks(runs: Sequence[RunResult]) -> list[str]:
    """Where optimizations, or another provider, come out clearly worse."""
    remarks = []
    first = next(run for run in runs if run.optimized)
    for run in runs:
        for other in runs:
            same = other.provider == run.provider and not other.optimized
            if not run.optimized or not (same or (other is first and run is not first)):
                continue
            found, better = run.close.sqnr_db, other.close.sqnr_db
            if found is None or better is None or found >= min(better, _EXACT_ENOUGH_DB) - _TOLERATED_DB:
                continue
            than = "without graph optimizations" if same else f"on {other.provider}"
            remarks.append(f"on {run.provider} the SQNR is {found:.1f} dB, {than} {better:.1f} dB")
    return remarks
