"""Two reports side by side: what was asked for, what came out, and the sites that differ."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from qcompiler.errors import OutputError
from qcompiler.report_html import read_report
from qcompiler.report_meaning import plain_text
from qcompiler.report_table import add_row, decibel, percent, plain_table, show

__all__ = ["print_diff", "report_of"]

_Report = Mapping[str, Any]
# What the figures of two runs that made the same may differ by.
_SAME = 1e-3


def report_of(path: Path) -> dict[str, Any]:
    """The report of a compiled model, or one by its own name.

    Raises:
        OutputError: There is none.
    """
    found = path if path.suffix == ".json" else path.with_name(f"{path.stem}.report.json")
    if not found.is_file():
        raise OutputError(f"{path}: no report there ({found.name}); name a .report.json, or a model with one beside it")
    return read_report(found)


def print_diff(first: _Report, second: _Report, console: Console, *, every_site: bool = False) -> None:
    """Print what differs between two reports.

    Args:
        first: As plain values, the one that changes are told from.
        second: The other one.
        console: Where to; its width is used.
        every_site: All sites that differ instead of the ones whose figures differ most.
    """
    _print_recipes(first, second, console)
    _print_figures(first, second, console)
    _print_sites(first, second, console, every_site=every_site)


def _print_recipes(first: _Report, second: _Report, console: Console) -> None:
    table = plain_table("recipe", "first", "second")
    for column in table.columns[1:]:
        column.justify = "left"
    recipes = first["recipe"], second["recipe"]
    for key in dict.fromkeys([*recipes[0], *recipes[1]]):
        one, other = (_shown(recipe.get(key)) for recipe in recipes)
        if one != other:
            add_row(table, key, one or "-", other or "-")
    if table.row_count:
        show(console, table)
    else:
        console.print("the recipes are the same")


def _print_figures(first: _Report, second: _Report, console: Console) -> None:
    table = plain_table("figure", "first", "second", "change")
    for name, (one, other) in _figures(first, second).items():
        if one is not None or other is not None:
            change = f"{100 * (other / one - 1):+.1f} %" if one and other is not None else ""
            add_row(table, name, *("" if each is None else f"{each:.6g}" for each in (one, other)), change)
    show(console, table)


def _figures(first: _Report, second: _Report) -> dict[str, tuple[float | None, float | None]]:
    """Name -> the figures of both, None where there is none."""
    found = {}
    verified = [report["verification"] or {} for report in (first, second)]
    found["weights, MB"] = tuple(report["bytes"]["after"] / 1e6 for report in (first, second))
    found["quantized sites"] = tuple(report["quantized"] for report in (first, second))
    for key, name in (("kl", "KL, nats"), ("top1", "top-1 agreement"), ("sqnr_db", "SQNR, dB")):
        found[name] = tuple(each.get(key) for each in verified)
    found["time of a run, of float"] = tuple(
        report["bench"][0]["ratio"] if report["bench"] else None for report in (first, second)
    )
    found["compilation, s"] = tuple(report["seconds"] for report in (first, second))
    found["peak memory, MB"] = tuple(report["peak_bytes"] / 1e6 for report in (first, second))
    return found


def _print_sites(first: _Report, second: _Report, console: Console, *, every_site: bool, most: int = 15) -> None:
    one, other = ({site["site"]: site for site in report["sites"]} for report in (first, second))
    for names, where in ((one.keys() - other.keys(), "first"), (other.keys() - one.keys(), "second")):
        if names:
            are = "site is" if len(names) == 1 else "sites are"
            console.print(
                Text(f"\n{len(names)} {are} in the {where} alone: {plain_text(', '.join(sorted(names)[:3]))}")
            )
    shared = [name for name in one if name in other]
    changed = [name for name in shared if _differ(one[name], other[name])]
    if not changed:
        console.print(f"\nnone of {len(shared)} sites differs")
        return
    ranked = sorted(changed, key=lambda name: -_distance(one[name], other[name]))
    chosen = changed if every_site else [name for name in changed if name in ranked[:most]]
    table = plain_table("site", "scheme", "was", "SQNR dB", "was", "error", "was")
    table.columns[1].justify = table.columns[2].justify = "left"
    for name in chosen:
        new, old = other[name], one[name]
        schemes = [site["scheme"] or "float" for site in (new, old)]
        add_row(
            table, plain_text(name), schemes[0], schemes[1] if schemes[0] != schemes[1] else "",
            decibel(new["sqnr_db"]), decibel(old["sqnr_db"]),
            percent(new["relative_loss"], 3), percent(old["relative_loss"], 3),
        )  # fmt: skip
    show(console, table)
    rest = len(changed) - len(chosen)
    console.print(f"{len(changed)} of {len(shared)} sites differ" + (f"; {rest} more with -v" if rest else ""))


def _differ(one: _Report, other: _Report) -> bool:
    return any(one[key] != other[key] for key in ("scheme", "form", "action")) or _distance(one, other) > _SAME


def _distance(one: _Report, other: _Report) -> float:
    """How far the error of a site has moved, as a share; infinite where it became float, or codes."""
    if one["action"] != other["action"]:
        return float("inf")
    for key, unit in (("relative_loss", None), ("sqnr_db", 10.0)):
        if one[key] is not None and other[key] is not None:
            return float(abs(one[key] - other[key]) / (unit or max(abs(one[key]), abs(other[key]), 1e-12)))
    return 0.0


def _shown(value: Any) -> str:
    return "" if value in (None, [], ()) else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
