"""How a report looks on a terminal: a headline, tables that fit the width, and a line for every remark."""

import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qcompiler.report_advice import worst_sites
from qcompiler.report_curve import curve_table
from qcompiler.report_meaning import scheme_meaning

if TYPE_CHECKING:
    from qcompiler.bench import BenchResult
    from qcompiler.report import ActivationRow, CompileReport, Excluded, SiteRow
    from qcompiler.verify import Verification
    from qcompiler.verify_integers import IntegerAudit
    from qcompiler.verify_outputs import Closeness

__all__ = ["add_row", "decibel", "megabytes", "percent", "plain_table", "print_report", "print_verification", "show"]

_WORST = 5
# Passes that took less than this are shown together.
_BRIEF_SECONDS = 0.1


def print_report(report: "CompileReport", console: Console, *, every_site: bool) -> None:
    """Print everything but what was written where."""
    before, after = report.bytes_before, report.bytes_after
    head = Text(report.model_name, "bold")
    head.append(f"  {megabytes(before)} -> {megabytes(after)}", "bold")
    head.append(f" ({100 * after / before:.1f} % of the weights' size)" if before else "")
    console.print(head)
    _line(console, scheme_meaning(report.config))
    if report.calibration is not None:
        _line(console, f"data: {report.calibration.description}")
    for note in report.notes:
        _line(console, note)
    for name, (recalled, sites) in report.checkpoints.items():
        if recalled:
            _line(console, f"{name}: {recalled} of {sites} sites came from checkpoints")
    quantized = [row for row in report.sites if row.action == "quantized"]
    if every_site:
        _print_sites(console, report.sites)
        _print_activations(console, report.activations)
    elif quantized:
        _print_schemes(console, quantized)
        _print_worst(console, quantized)
    if not every_site:
        _print_skipped(console, report)
    if report.activations:
        console.print()
        _line(console, report.activation_summary())
    _print_excluded(console, report.excluded)
    if report.curve:
        show(console, curve_table(report.curve))
    if report.verification is not None:
        console.print()
        print_verification(report.verification, console)
    _print_bench(console, report.bench)
    console.print()
    _line(console, f"{report.seconds:.1f} s ({_times(report)}), peak memory {megabytes(report.peak_bytes)}")


def _print_schemes(console: Console, rows: Sequence["SiteRow"]) -> None:
    groups: dict[str, list[SiteRow]] = {}
    for row in rows:
        groups.setdefault(row.scheme, []).append(row)
    table = plain_table("scheme", "sites", "bits/weight", "SQNR dB", "worst", "rel. loss", "worst")
    for scheme, members in groups.items():
        bits = [row.bits_per_weight for row in members if row.bits_per_weight is not None]
        sqnr = [row.sqnr_db for row in members if row.sqnr_db is not None]
        loss = [row.relative_loss for row in members if row.relative_loss is not None]
        add_row(
            table, scheme, str(len(members)),
            f"{statistics.fmean(bits):.2f}" if bits else "",
            decibel(statistics.median(sqnr) if sqnr else None), decibel(min(sqnr, default=None)),
            percent(statistics.median(loss) if loss else None), percent(max(loss, default=None)),
        )  # fmt: skip
    show(console, table)


def _print_worst(console: Console, rows: Sequence["SiteRow"]) -> None:
    """The sites with the largest relative loss, or where none was measured the least SQNR."""
    worst = worst_sites(rows, _WORST)
    if len(worst) < 2 or len(worst) == len(rows):
        return
    table = plain_table("worst sites", "scheme", "SQNR dB", "rel. loss")
    for row in worst:
        add_row(table, row.site, row.scheme, decibel(row.sqnr_db), percent(row.relative_loss))
    show(console, table)


def _print_skipped(console: Console, report: "CompileReport") -> None:
    reasons = report.skip_reasons()
    if not reasons:
        return
    examples: dict[str, str] = {}
    for row in report.sites:
        if row.action == "skipped":
            examples.setdefault(row.reason, row.site)
    table = plain_table("left float", "count", "first")
    table.columns[1].justify, table.columns[2].justify = "right", "left"
    for reason, count in reasons:
        add_row(table, reason, str(count), examples[reason])
    show(console, table)


def _print_sites(console: Console, rows: Iterable["SiteRow"]) -> None:
    table = plain_table("site", "scheme", "bits/weight", "SQNR dB", "rel. loss", "remark")
    table.columns[1].justify = table.columns[-1].justify = "left"
    for row in rows:
        bits = "" if row.bits_per_weight is None else f"{row.bits_per_weight:.2f}"
        scheme = row.scheme or "float"
        add_row(table, row.site, scheme, bits, decibel(row.sqnr_db), percent(row.relative_loss), row.reason)
    show(console, table)


def _print_activations(console: Console, rows: Sequence["ActivationRow"]) -> None:
    if not rows:
        return
    table = plain_table("activation", "format", "low", "high", "scale", "zero", "range by")
    table.columns[1].justify = table.columns[-1].justify = "left"
    for row in rows:
        figures = ("" if figure is None else f"{figure:.4g}" for figure in (row.low, row.high, row.scale))
        zero = "" if row.zero_point is None else f"{row.zero_point:.0f}"
        add_row(table, row.value, row.format, *figures, zero, row.method)
    show(console, table)


def _print_excluded(console: Console, rows: Sequence["Excluded"]) -> None:
    if not rows:
        return
    table = plain_table("left float for the noise added", "SQNR before, dB", "after", "added noise")
    for row in rows:
        add_row(table, row.site, decibel(row.before_db), decibel(row.after_db), percent(row.added))
    show(console, table)


def _print_bench(console: Console, rows: Sequence["BenchResult"]) -> None:
    if not rows:
        return
    table = plain_table("time of a run", "float ms", "compiled ms", "compiled : float", "quartiles")
    for row in rows:
        quartiles = f"{row.ratio_low:.2f} to {row.ratio_high:.2f}"
        add_row(table, row.data, f"{row.float_ms:.2f}", f"{row.compiled_ms:.2f}", f"{row.ratio:.2f}", quartiles)
    show(console, table)


def _times(report: "CompileReport") -> str:
    """Seconds of each pass that took long, of verification, and of the rest."""
    parts = [(done.name, done.seconds) for done in report.passes if done.seconds >= _BRIEF_SECONDS]
    if report.verification is not None:
        parts.append(("verification", report.verification.seconds))
    rest = report.seconds - sum(seconds for _, seconds in parts)
    return ", ".join(f"{name} {seconds:.1f}" for name, seconds in [*parts, ("the rest", max(0.0, rest))])


def print_verification(verification: "Verification", console: Console) -> None:
    """Print how close two models are, what runs, and what to know about it."""
    rows = f"{verification.rows} {'row' if verification.rows == 1 else 'rows'}"
    what = f"{rows} of random inputs (real data may fare better or worse)" if verification.synthetic else rows
    console.print(Text(f"compared with the float model on {what}", "bold"))
    table = plain_table("output", "SQNR dB", "KL nats", "top-1", "largest error", "equal")
    for found in verification.outputs:
        add_row(
            table, found.name, decibel(found.sqnr_db), _nats(found.kl), percent(found.top1, 1),
            "" if found.max_abs_error is None else f"{found.max_abs_error:.3g}", percent(found.equal),
        )  # fmt: skip
    show(console, table)
    ways = [
        (f"{_provider(run.provider)}, optimizations {'on' if run.optimized else 'off'}", run.close)
        for run in verification.runs
    ]
    cost = verification.accuracy_level
    if cost is not None:
        nodes = f"{cost.nodes} {'node' if cost.nodes == 1 else 'nodes'}"
        ways.append((f"float instead of int8 activations in {nodes}", cost.exact))
    _print_ways(console, ways, verification.short_positions)
    for provider, counts in verification.fused.items():
        listed = ", ".join(f"{count} {op_type}" for op_type, count in counts.items())
        if listed:
            _line(console, f"{_provider(provider)} runs {listed}")
    if verification.integers is not None:
        _print_integers(console, verification.integers)
    for remark in verification.remarks:
        console.print(Text(f"note: {remark}", "yellow"))


def _print_integers(console: Console, audit: "IntegerAudit") -> None:
    added = f" and {audit.added} that it put in" if audit.added else ""
    _line(
        console,
        f"of {audit.written} QuantizeLinear and DequantizeLinear ONNX Runtime fused {audit.fused}; "
        f"{audit.written - audit.fused}{added} run",
    )
    for reason, count in audit.reasons.items():
        _line(console, f"  {count}: {reason}")


def _print_ways(console: Console, ways: Sequence[tuple[str, "Closeness"]], positions: int) -> None:
    title = f"ways to run it, {positions} positions" if positions else "ways to run it, one row"
    table = plain_table(title, "SQNR dB", "KL nats", "top-1")
    for name, close in ways:
        add_row(table, name, decibel(close.sqnr_db), _nats(close.kl), percent(close.top1, 1))
    show(console, table)
    console.print()


def plain_table(*columns: str) -> Table:
    """A plain table: text in the first column, figures in the others."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    return table


def add_row(table: Table, *cells: str) -> None:
    """Add a row; nothing in it is markup."""
    table.add_row(*(Text(cell) for cell in cells))


def show(console: Console, table: Table) -> None:
    """Print an empty line and the table, without the columns in which nothing stands."""
    table.columns = [
        column for column in table.columns if any(str(cell) for cell in column.cells) or column is table.columns[0]
    ]
    console.print()
    console.print(table)


def _line(console: Console, text: str) -> None:
    console.print(Text(text))


def megabytes(count: float) -> str:
    """A size."""
    return f"{count / 1e6:.1f} MB"


def decibel(figure: float | None) -> str:
    """A ratio in dB; nothing where there is none."""
    if figure is None:
        return ""
    return "exact" if figure == float("inf") else f"{figure:.1f}"


def _nats(figure: float | None) -> str:
    return "" if figure is None else f"{figure:.4f}" if figure >= 1e-3 or figure == 0 else f"{figure:.1e}"


def percent(figure: float | None, digits: int = 2) -> str:
    """A share in percent; nothing where there is none."""
    return "" if figure is None else f"{100 * figure:.{digits}f} %"


def _provider(name: str) -> str:
    return name.removesuffix("ExecutionProvider")
