"""What the commands print: results on stdout, progress and logs on stderr."""

import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

if TYPE_CHECKING:
    from qcompiler.caching import Usage
    from qcompiler.driver import CompileResult
    from qcompiler.planning import Inspection, Plan
    from qcompiler.propagation import Propagation
    from qcompiler.verify import Verification

__all__ = [
    "Progress",
    "default_output",
    "draw_plan",
    "print_bench",
    "print_cache",
    "print_difference",
    "print_inspection",
    "print_passes",
    "print_plan",
    "print_propagation",
    "print_report",
    "print_reproduction",
    "print_schemes",
    "print_verification",
    "set_up_logging",
    "tell_written",
]

# A bar for what is over sooner would only flicker.
_PATIENCE_SECONDS = 2.0
_UNLIMITED = 10_000


class _Lines(logging.Handler):
    """One line on stderr for each record, whatever the width: it can be searched for."""

    def __init__(self, *, times: bool) -> None:
        super().__init__()
        self._times = times

    def emit(self, record: logging.LogRecord) -> None:
        """Write ``Warning: text``, or with times ``12.3 s  Debug: text``."""
        time_passed = f"{record.relativeCreated / 1e3:7.2f} s  " if self._times else ""
        # Looked up each time: while a progress bar is shown, writes go above it.
        sys.stderr.write(f"{time_passed}{record.levelname.capitalize()}: {record.getMessage()}\n")


def set_up_logging(verbose: int, quiet: bool) -> None:
    """Warnings to stderr; -v adds what each pass did, -vv what it did at each site."""
    level = logging.ERROR if quiet else [logging.WARNING, logging.INFO, logging.DEBUG][min(verbose, 2)]
    logger = logging.getLogger("qcompiler")
    logger.handlers[:] = [_Lines(times=verbose > 1)]
    logger.setLevel(level)


def default_output(model: Path, scheme: str) -> Path:
    """``model-w4a16.onnx`` beside ``model.onnx``; ``folder-w4a16`` beside a folder."""
    model = model.absolute()
    return model.with_name(f"{model.name}-{scheme}" if model.is_dir() else f"{model.stem}-{scheme}{model.suffix}")


class Progress:
    """Progress bars on stderr for what takes over two seconds; nothing where stderr is not a terminal."""

    def __init__(self, *, hidden: bool = False) -> None:
        """Show nothing if `hidden`."""
        console = Console(stderr=True)
        self._bar = RichProgress(
            TextColumn("{task.description:18}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True,
            disable=hidden or not console.is_terminal,
        )  # fmt: skip
        self._tasks: dict[str, Any] = {}
        self._started: dict[str, float] = {}

    def __call__(self, label: str, done: int, total: int) -> None:
        """Report that `done` of `total` steps of `label` are finished; behind a comma it may say how they go."""
        name = label.partition(",")[0]
        started = self._started.setdefault(name, time.monotonic())
        if name not in self._tasks:
            if time.monotonic() - started < _PATIENCE_SECONDS:
                return
            self._bar.start()
            self._tasks[name] = self._bar.add_task(label, total=total)
        self._bar.update(self._tasks[name], description=label, completed=done, total=total)
        if done >= total:
            self._bar.remove_task(self._tasks.pop(name))

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _console() -> Console:
    # Without a terminal rich would assume 80 columns and cut names in two, which could not be searched for.
    return Console(width=None if sys.stdout.isatty() else _UNLIMITED)


def print_report(result: "CompileResult", *, every_site: bool) -> None:
    """The report's table and the files that were written."""
    console = _console()
    result.report.table(console, every_site=every_site)
    for file in result.files:
        console.print(f"wrote {file}", highlight=False, markup=False, soft_wrap=True)


def print_verification(verification: "Verification") -> None:
    """How close two models are."""
    from qcompiler.report import verification_table

    verification_table(verification, _console())


def print_propagation(found: "Propagation", *, worst: int, every_layer: bool) -> None:
    """How noise grows from layer to layer."""
    from qcompiler.report_layers import print_layers

    print_layers(found, _console(), worst=worst, every_layer=every_layer)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    _console().print(table)


def print_plan(plan: "Plan") -> None:
    """What a compilation would do."""
    if any(site.scheme for site in plan.sites):
        _table("Plan", ("site", "N x K", "scheme", "kernel", "MB"), [
            (s.name, f"{s.rows} x {s.columns}", s.scheme or f"float: {s.reason}", s.kernel, _size(s.stored_bytes / 1e6))
            for s in plan.sites
        ])  # fmt: skip
    else:
        _console().print("nothing to quantize")
    _print_refusals(plan.refusals)
    if plan.curve:
        from qcompiler.report_curve import curve_table
        from qcompiler.report_table import show

        show(_console(), curve_table(plan.curve))
    _console().print(
        f"weights {plan.bytes_before / 1e6:.1f} MB -> about {plan.bytes_after / 1e6:.1f} MB; "
        f"peak memory about {plan.memory_bytes / 1e6:.0f} MB; passes: {plan.pipeline}",
        highlight=False,
    )


def draw_plan(plan: "Plan", path: Path) -> None:
    """What formats of other sizes would cost, drawn into a file."""
    from qcompiler.report_curve import draw_curve

    draw_curve(plan.curve, path)
    tell_written(path)


def tell_written(path: Path) -> None:
    """Say that a file is there."""
    _console().print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)


def print_cache(folder: Path, held: "Usage", removed: "Usage | None") -> None:
    """Where the cache is, and what it holds."""
    console = _console()
    if removed is not None:
        console.print(f"removed {removed.files} files, {removed.bytes / 1e6:.1f} MB", highlight=False)
    text = f"{folder}: {held.files} files, {held.bytes / 1e6:.1f} MB"
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def print_difference(first: dict[str, Any], second: dict[str, Any], *, every_site: bool) -> None:
    """What differs between two reports."""
    from qcompiler.report_diff import print_diff

    print_diff(first, second, _console(), every_site=every_site)


def print_reproduction(files: Sequence[tuple[str, int]]) -> None:
    """What came out as it was."""
    for name, size in files:
        _console().print(f"{name}: {size:,} bytes, all of them equal", highlight=False, markup=False, soft_wrap=True)


def print_inspection(inspection: "Inspection", *, every_site: bool) -> None:
    """What a model holds."""
    console = _console()
    console.print(inspection.headline, highlight=False)
    if every_site and inspection.sites:
        rows = [(s.name, s.role, f"{s.rows} x {s.columns}", s.state, ", ".join(s.names)) for s in inspection.sites]
        _table("Sites", ("site", "role", "N x K", "state", "names"), rows)
    elif inspection.sites:
        kinds = [(role, op, count, _size(size), state) for role, op, count, size, state in inspection.summary()]
        _table("Sites by kind", ("role", "operator", "count", "MB", "state"), kinds)
    if every_site and inspection.products:
        products = [(names[0], ", ".join(names)) for names in inspection.products]
        _table("Products of two activations", ("product", "names"), products)
    _print_refusals(inspection.refusals)


def _print_refusals(refusals: Sequence[tuple[int, str]]) -> None:
    if refusals:
        _table("Cannot be quantized", ("count", "reason"), refusals)


def _size(megabytes: float) -> str:
    """A size; a weight that was counted where it was read first takes none."""
    return f"{megabytes:.3f}" if megabytes else "shared"


def print_bench(rows: Sequence[Sequence[object]]) -> None:
    """Latencies of models that were timed in turns."""
    _table("Latency", ("model", "median ms", "ratio to the first"), rows)


def print_schemes() -> None:
    """Every width with the bits per weight of its group sizes."""
    from qcompiler.numerics.affine import WeightSpec
    from qcompiler.numerics.formats import FORMATS
    from qcompiler.scheme import ALIASES, GROUP_SIZES

    rows, title = [], "Bits per weight at K = 4096"
    for bits in sorted(FORMATS):
        if FORMATS[bits].container != bits:
            title += f"; {bits}-bit codes are stored in {FORMATS[bits].container} bits"
        for size in (*GROUP_SIZES, 0):
            name = f"w{bits}a16" + (f"-g{size}" if size else "-channel")
            shown = [
                f"{WeightSpec(bits, size or 4096, symmetric, scale_dtype=dtype).stored_bits(4096):.3f}"
                for symmetric in (True, False)
                for dtype in ("float32", "float16")
            ]
            rows.append((name, *shown))
    _table(title, ("scheme", "sym, fp32", "sym, fp16", "asym, fp32", "asym, fp16"), rows)
    _table("Aliases", ("alias", "means"), list(ALIASES.items()))


def print_passes() -> None:
    """Every pass with its options."""
    import dataclasses

    from qcompiler import passes, pipeline

    rows = []
    for name in pipeline.pass_names():
        cls = passes.load(name)
        module = sys.modules[cls.__module__].__doc__ or ""
        options = "\n".join(f"{f.name}={f.default}: {f.metadata['help']}" for f in dataclasses.fields(cls.Options))
        rows.append((name, cls.stage.name.lower(), module.strip().splitlines()[0], options, cls.paper))
    _table("Passes", ("pass", "stage", "what it does", "options", "paper"), rows)
