"""Which sites are worst, and what to add to the command so that they become better."""

import re
import shlex
import statistics
from collections.abc import Sequence
from typing import Protocol, TypeVar

__all__ = ["SiteFigures", "remedy", "worst_sites"]

# A site whose error is this many times the median stands out.
_STANDS_OUT = 3.0
# The width that comes after one.
_WIDER = {"1": 4, "1.58": 4, "2": 4, "3": 4, "4": 8}


class SiteFigures(Protocol):
    """What is looked at of a row of the report."""

    site: str
    action: str
    scheme: str
    sqnr_db: float | None
    relative_loss: float | None


_Row = TypeVar("_Row", bound=SiteFigures)


def worst_sites(rows: Sequence[_Row], count: int) -> list[_Row]:
    """The quantized sites with the largest relative loss, or where none was measured the least SQNR, worst first."""
    quantized = [row for row in rows if row.action == "quantized"]
    measured = [row for row in quantized if row.relative_loss is not None]
    if measured:
        return sorted(measured, key=lambda row: -(row.relative_loss or 0.0))[:count]
    return sorted((row for row in quantized if row.sqnr_db is not None), key=lambda row: row.sqnr_db or 0.0)[:count]


def remedy(rows: Sequence[SiteFigures], count: int = 5) -> str:
    """Options that give the sites that stand out wider codes, or leave them float; empty where none does."""
    measured = [row.relative_loss for row in rows if row.relative_loss is not None]
    if not measured:
        return ""
    bound = _STANDS_OUT * statistics.median(measured)
    return " ".join(_option(row) for row in worst_sites(rows, count) if (row.relative_loss or 0.0) > bound)


def _option(row: SiteFigures) -> str:
    width = re.match(r"(?:sparse[^+]*\+)?w([\d.]+)(a(?:8|16)(?:-g\d+)?(?=-|$))", row.scheme)
    wider = _WIDER.get(width[1]) if width and not re.search("-(static|dynamic|lut|vq|nf4)", row.scheme) else None
    if width and wider:
        return f"--set {shlex.quote(f'{row.site}=w{wider}{width[2]}')}"
    return f"--ignore {shlex.quote(row.site)}"
