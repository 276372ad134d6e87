"""What formats of each size would cost: the curve that a budget is a point of, as a table and as a drawing."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qcompiler.errors import OutputError
from qcompiler.records import SiteRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

__all__ = ["PlanPoint", "curve_table", "draw_curve", "draw_points", "require_matplotlib"]

_LINES = 12


@dataclass(frozen=True)
class PlanPoint:
    """A plan of formats.

    Attributes:
        bytes: Of the weights that formats were chosen for.
        bits_per_weight: Of these weights, scales and zero points included.
        expected_cost: KL divergence of the logits in nats, or the noise of the outputs over their energy where there
            are none: the sum of what was measured for each weight.
        chosen: Whether it is the plan that was taken.
    """

    bytes: int
    bits_per_weight: float
    expected_cost: float
    chosen: bool

    @classmethod
    def of(cls, record: SiteRecord) -> "PlanPoint":
        """What a pass recorded."""
        found = record.metrics
        return cls(int(found["bytes"]), found["bits_per_weight"], found["cost"], bool(found["chosen"]))


def curve_table(points: Sequence[PlanPoint]) -> "Table":
    """Some of the points, the chosen one among them, in the order of their size."""
    from qcompiler.report_table import add_row, plain_table

    table = plain_table("formats for all weights", "bits/weight", "MB", "expected cost")
    others = sorted((point for point in points if not point.chosen), key=lambda point: point.bytes)
    step = max(1, -(-len(others) // _LINES))
    shown = [*others[::step], *(point for point in points if point.chosen)]
    for point in sorted(shown, key=lambda point: point.bytes):
        name = "chosen" if point.chosen else ""
        figures = f"{point.bits_per_weight:.3f}", f"{point.bytes / 1e6:.2f}", f"{point.expected_cost:.4g}"
        add_row(table, name, *figures)
    return table


def require_matplotlib() -> None:
    """Raise OutputError where nothing can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise OutputError(
            "--pareto draws with matplotlib, which is not installed; pip install 'onnx-qcompiler[report]'"
        ) from error


def draw_points(axes: "Axes", points: Sequence[PlanPoint]) -> None:
    """Draw the curve, cost in logarithms over bits a weight, and mark the plan that was taken."""
    curve = sorted((p for p in points if not p.chosen and p.expected_cost > 0), key=lambda point: point.bytes)
    chosen = [point for point in points if point.chosen]
    axes.semilogy([p.bits_per_weight for p in curve], [p.expected_cost for p in curve], ".-", label="best plans")
    axes.semilogy(
        [p.bits_per_weight for p in chosen], [p.expected_cost for p in chosen], "o", label="chosen", markersize=9
    )
    axes.set_xlabel("stored bits a weight")
    axes.set_ylabel("expected cost at the outputs")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()


def draw_curve(points: Sequence[PlanPoint], path: Path) -> Path:
    """Draw the curve into a file.

    Args:
        points: At least one.
        path: Where to, .png or .svg; the same points make the same bytes.

    Returns:
        The path.

    Raises:
        OutputError: matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "qcompiler"}):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        draw_points(figure.subplots(), points)
        metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(path, dpi=120, metadata=metadata)
    return path
