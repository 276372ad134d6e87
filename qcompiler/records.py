"""What a pass did, site by site: the only way results travel to the report."""

from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Action", "Histogram", "PassReport", "SiteRecord"]

Action = Literal["assigned", "quantized", "scaled", "fused", "pruned", "rewritten", "activation", "plan", "skipped"]


@dataclass(frozen=True)
class SiteRecord:
    """One thing a pass did, or refused to do, at one site.

    Attributes:
        site: Name of the site (module path, node or weight).
        action: What was done.
        spec: Scheme text where one applies.
        reason: Why it was skipped, or a remark about how it was done; a sentence without full stop.
        metrics: Figures with their unit in the name, e.g. ``sqnr_db``, ``relative_loss``, ``seconds``.
    """

    site: str
    action: Action
    spec: str = ""
    reason: str = ""
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Histogram:
    """How values of a site are distributed.

    Attributes:
        site: Its name.
        kind: Which values.
        low: Lower end of the first bin.
        high: Upper end of the last one; all bins are as wide.
        counts: Values in each bin.
        quantized: The same for what codes stand for; empty where there are none.
    """

    site: str
    kind: str
    low: float
    high: float
    counts: tuple[int, ...]
    quantized: tuple[int, ...] = ()


@dataclass
class PassReport:
    """What one pass cost and did.

    Attributes:
        name: Pass name.
        seconds: Wall-clock time.
        peak_bytes: Peak anonymous resident memory of the process while the pass ran.
        modified: Whether the model changed.
        records: In site order.
    """

    name: str
    seconds: float
    peak_bytes: int
    modified: bool
    records: tuple[SiteRecord, ...]
