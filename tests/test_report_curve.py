"""The curve that a budget is a point of, as a table and as a drawing."""

import sys
from io import StringIO

import pytest
from rich.console import Console

from qcompiler.errors import OutputError
from qcompiler.records import SiteRecord
from qcompiler.report_curve import PlanPoint, curve_table, draw_curve
from qcompiler.report_table import show

POINTS = [PlanPoint(1000 * bits, bits / 2, 2.0**-bits, False) for bits in range(4, 34)] + [
    PlanPoint(9100, 4.55, 0.002, True)
]


def test_a_point_is_what_was_recorded():
    metrics = {"bytes": 12.0, "bits_per_weight": 4.5, "cost": 0.25, "chosen": 1.0}
    assert PlanPoint.of(SiteRecord("budget", "plan", metrics=metrics)) == PlanPoint(12, 4.5, 0.25, True)


def test_the_table_is_short_in_order_and_has_the_plan():
    text = StringIO()
    show(Console(file=text, width=80), curve_table(POINTS))
    lines = text.getvalue().splitlines()[3:]
    assert len(lines) <= 14
    sizes = [float(line.split()[-3]) for line in lines]
    assert sizes == sorted(sizes)
    (chosen,) = (line.split() for line in lines if line.startswith("chosen"))
    assert chosen == ["chosen", "4.550", "0.01", "0.002"]


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_drawing_is_the_same_twice(tmp_path, suffix):
    first, second = (tmp_path / f"{name}{suffix}" for name in "ab")
    draw_curve(POINTS, first)
    draw_curve(POINTS, second)
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes().startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")


def test_without_matplotlib_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        OutputError, match=r"matplotlib, which is not installed; pip install 'onnx-qcompiler\[report\]'"
    ):
        draw_curve(POINTS, tmp_path / "curve.png")
    assert not list(tmp_path.iterdir())
