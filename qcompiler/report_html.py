"""A report as one HTML file that needs nothing beside it: figures first, plots, and every site in a table to search.

It is made of the report as plain values (`CompileReport.to_dict`, or its JSON file), so that a report of last year can
be looked at. Needs the extra `report`.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qcompiler.errors import OutputError
from qcompiler.report import EXACT_DB, SCHEMA, SiteRow
from qcompiler.report_advice import remedy
from qcompiler.report_curve import PlanPoint
from qcompiler.report_meaning import plain_text
from qcompiler.report_table import megabytes

__all__ = ["read_report", "report_page", "require_html"]

_TEMPLATE = "report.html.jinja"
_Report = Mapping[str, Any]
# What every report of this schema says.
_KEYS = {"sites", "recipe", "bytes", "verification", "bench", "curve", "passes", "skipped", "seconds", "peak_bytes"}


def require_html() -> None:
    """Raise OutputError where no page can be made."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise OutputError(
            f"HTML reports need {error.name}, which is not installed; pip install 'onnx-qcompiler[report]'"
        ) from error


def read_report(path: Path) -> dict[str, Any]:
    """A report's JSON file.

    Raises:
        OutputError: It is not one.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise OutputError(f"{path}: this is not JSON ({error}); give a MODEL.report.json") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA or not found.keys() >= _KEYS:
        raise OutputError(f"{path}: this is not a report of qcompile, or one of another version; give a .report.json")
    return found


def report_page(report: _Report) -> str:
    """The page.

    Args:
        report: The report as plain values.

    Raises:
        OutputError: jinja2 or matplotlib is not installed.
    """
    require_html()
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("qcompiler"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters.update(figure=_figure, megabytes=megabytes, percent=_percent, plain=plain_text)
    return str(environment.get_template(_TEMPLATE).render(_view(report)))


def _view(report: _Report) -> dict[str, Any]:
    """What the template shows."""
    from qcompiler.report_plots import bits_plot, curve_plot, depth_plot, histogram_plot

    quantized = [site for site in report["sites"] if site["action"] == "quantized"]
    rows = [SiteRow(**site) for site in report["sites"]]
    histograms = [{"title": each["site"], "svg": histogram_plot(each)} for each in report.get("histograms", ())]
    plots = [
        ("Error by depth", depth_plot(quantized)),
        ("Error by bits", bits_plot(quantized)),
        ("What each size would cost", curve_plot([PlanPoint(**point) for point in report["curve"]])),
    ]
    return {
        "report": report,
        "cards": _cards(report, quantized),
        "plots": [(title, svg) for title, svg in plots if svg],
        "histograms": histograms,
        "remedy": remedy(rows),
        "forms": Counter(site["form"] for site in quantized if site["form"]).most_common(),
        "verification": report["verification"],
    }


def _cards(report: _Report, quantized: list[Any]) -> list[tuple[str, str, str]]:
    """Headline figures: what, how much, and a remark."""
    size, found = report["bytes"], report["verification"] or {}
    share = f"{100 * size['after'] / size['before']:.1f} % of the weights" if size["before"] else ""
    cards = [("Size", f"{megabytes(size['before'])} → {megabytes(size['after'])}", share)]
    bits = _mean_bits(quantized)
    if bits is not None:
        cards.append(("Bits a weight", f"{bits:.2f}", f"{len(quantized)} sites, scales included"))
    if found.get("kl") is not None:
        cards.append(("KL divergence", f"{found['kl']:.4g}", "nats, mean over positions"))
    if found.get("top1") is not None:
        cards.append(("Top-1 agreement", f"{100 * found['top1']:.1f} %", f"on {found['rows']} rows"))
    if found.get("sqnr_db") is not None:
        cards.append(
            ("SQNR", "exact" if found["sqnr_db"] >= EXACT_DB else f"{found['sqnr_db']:.1f} dB", "of the worst output")
        )
    if not found:
        cards.append(("Accuracy", "not verified", "--no-verify"))
    for row in report["bench"][:1]:
        times = f"{row['float_ms']:.1f} → {row['compiled_ms']:.1f} ms"
        cards.append(("Time of a run", f"{100 * row['ratio']:.0f} %", f"of the float model's, {times}"))
    cards.append(("Compilation", f"{report['seconds']:.1f} s", f"peak memory {megabytes(report['peak_bytes'])}"))
    return cards


def _mean_bits(quantized: list[Any]) -> float | None:
    """Mean over the weights of the sites, where their number is known, else over the sites."""
    known = [(s["bits_per_weight"], s["metrics"].get("weights", 1.0)) for s in quantized if s["bits_per_weight"]]
    total = sum(count for _, count in known)
    return sum(bits * count for bits, count in known) / total if total else None


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.3g} %"


def _figure(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"
