"""The plots of the HTML report, as SVG to be put into the page; the same figures make the same text."""

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qcompiler.report_curve import PlanPoint, draw_points
from qcompiler.report_meaning import plain_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["bits_plot", "curve_plot", "depth_plot", "histogram_plot"]

_BLUE, _ORANGE, _GREY = "#2b6cb0", "#dd6b20", "#a0aec0"
_KINDS = 8
_Site = Mapping[str, Any]


def depth_plot(sites: Sequence[_Site]) -> str:
    """The error of each quantized site, first to last, a colour for each kind of layer; empty below two sites."""
    name, label = _figure(sites)
    rows = [(at, site) for at, site in enumerate(sites) if site[name] is not None]
    if len(rows) < 2:
        return ""
    kinds: dict[str, list[tuple[int, float]]] = {}
    for at, site in rows:
        kinds.setdefault(_kind(site["site"]), []).append((at, site[name]))
    largest = sorted(kinds, key=lambda kind: -len(kinds[kind]))[: _KINDS if len(kinds) <= _KINDS else _KINDS - 1]

    def draw(axes: "Axes") -> None:
        rest = [point for kind, points in kinds.items() if kind not in largest for point in points]
        for kind in largest:
            axes.plot(*zip(*kinds[kind], strict=True), "o", markersize=4, label=kind)
        if rest:
            axes.plot(*zip(*rest, strict=True), "o", markersize=4, color=_GREY, label="others")
        _scaled(axes, name, label)
        axes.set_xlabel("site, in order of the graph")
        axes.legend(fontsize=8, ncols=2)

    return _svg(draw, (7.2, 3.4), "depth")


def bits_plot(sites: Sequence[_Site]) -> str:
    """The error of sites over their stored bits a weight; empty where all have as many."""
    name, label = _figure(sites)
    points = [(s["bits_per_weight"], s[name]) for s in sites if None not in (s["bits_per_weight"], s[name])]
    if len({round(bits, 2) for bits, _ in points}) < 2:
        return ""

    def draw(axes: "Axes") -> None:
        axes.plot(*zip(*points, strict=True), "o", markersize=4, color=_BLUE)
        _scaled(axes, name, label)
        axes.set_xlabel("stored bits a weight")

    return _svg(draw, (7.2, 3.4), "bits")


def histogram_plot(histogram: Mapping[str, Any]) -> str:
    """A distribution, counts in logarithms; where codes have one too, both."""

    def draw(axes: "Axes") -> None:
        low, high, counts = histogram["low"], histogram["high"], histogram["counts"]
        width = (high - low) / len(counts)
        places = [low + (at + 0.5) * width for at in range(len(counts))]
        axes.bar(places, counts, width, color=_BLUE, label="float")
        if histogram["quantized"]:
            axes.step(places, histogram["quantized"], where="mid", color=_ORANGE, linewidth=1, label="quantized")
            axes.legend(fontsize=7)
        axes.set_yscale("symlog", linthresh=1)
        axes.tick_params(labelsize=7)
        axes.set_title(plain_text(histogram["kind"]), fontsize=8)

    return _svg(draw, (3.4, 2.2), f"{histogram['site']} {histogram['kind']}")


def curve_plot(points: Sequence[PlanPoint]) -> str:
    """What plans of other sizes cost; empty where formats were not chosen."""
    return _svg(lambda axes: draw_points(axes, points), (7.2, 3.4), "curve") if points else ""


def _figure(sites: Sequence[_Site]) -> tuple[str, str]:
    """The figure that tells the error of sites, and what it is called."""
    if any(site["relative_loss"] is not None for site in sites):
        return "relative_loss", "error of the site's output, share of its energy"
    return "sqnr_db", "SQNR of the weight, dB"


def _scaled(axes: "Axes", name: str, label: str) -> None:
    if name == "relative_loss":
        axes.set_yscale("symlog", linthresh=1e-6)
    axes.set_ylabel(label, fontsize=8)
    axes.grid(visible=True, alpha=0.3)


def _kind(site: str) -> str:
    """The last part of a site's name that is no number."""
    parts = [part for part in re.split(r"[./]", site) if part and not part.isdecimal()]
    return plain_text(re.sub(r"\d+", "#", parts[-1]) if parts else site)


def _svg(draw: Callable[["Axes"], None], size: tuple[float, float], salt: str) -> str:
    """A figure as an SVG element."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # The text of names is data: a dollar sign in it is no mathematics.
    options = {"svg.hashsalt": salt, "svg.fonttype": "none", "text.parse_math": False, "font.size": 9}
    with mpl.rc_context(options), warnings.catch_warnings():
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() != "linear":  # matplotlib would write powers of ten as mathematics
                axis.set_major_formatter(lambda value, _: f"{value:g}")
                axis.set_minor_formatter("")
        made = io.StringIO()
        warnings.filterwarnings("ignore", "Glyph")  # what matplotlib's font lacks, the browser's has
        figure.savefig(made, format="svg", transparent=True, metadata={"Date": None})
    text = made.getvalue()
    return text[text.index("<svg") :]
