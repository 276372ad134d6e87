"""What a case in cases/*.yaml may say, and how what came out is held against it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

BOUNDS = ("at_least", "at_most", "near_float")


@dataclass(frozen=True)
class Expected:
    """What has to come of a command.

    Attributes:
        exit: Exit code.
        says: Regular expressions found in stderr.
        prints: Regular expressions found in stdout.
        figures: Name of a figure (see `models.FIGURES`) -> bounds.
        megabytes: Bounds on all that was written but the report, in 10^6 bytes.
        quantized: Number of quantized sites.
        skipped: Reason -> number of sites that were left float for it; all of them.
        report: Dotted path into the report -> value, or bounds.
        unchanged: Whether the output is the input, byte for byte.
    """

    exit: int = 0
    says: tuple[str, ...] = ()
    prints: tuple[str, ...] = ()
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    megabytes: dict[str, float] | None = None
    quantized: int | None = None
    skipped: dict[str, int] | None = None
    report: dict[str, Any] = field(default_factory=dict)
    unchanged: bool = False


@dataclass(frozen=True)
class Case:
    """One end-to-end case.

    Attributes:
        about: What it shows, and where its numbers come from.
        model: Name of a model (see `models.MODELS`).
        arguments: Of qcompile, as typed after the model; the output is added.
        data: Name of calibration data (see `models.DATA`), or nothing.
        slow: Left out unless pytest gets --slow.
        windows: Windows of evaluation text for the figures of language models.
        again: Arguments added to repeat the command; each time the output has to be the same, byte for byte.
        expect: What has to come of it.
    """

    about: str
    model: str
    arguments: str = ""
    data: str = ""
    slow: bool = False
    windows: int = 4
    again: tuple[str, ...] = ()
    expect: Expected = field(default_factory=Expected)


def read_case(file: Path) -> Case:
    """Read a case; a key that means nothing is an error."""
    found = yaml.safe_load(file.read_text("utf-8"))
    found["expect"] = Expected(**found.get("expect", {}))
    return Case(**found)


def misses(name: str, value: Any, wanted: Any, float_value: Any = None) -> list[str]:
    """In words, how a value misses what is wanted: another value, or a mapping of bounds.

    Args:
        name: What the value is of.
        value: The value.
        wanted: A plain value to be equal to, or some of `at_least`, `at_most`, and `near_float`: the largest distance
            from the float model's.
        float_value: Returns the float model's value.
    """
    if not isinstance(wanted, dict):
        return [] if value == wanted else [f"{name} is {value!r}, not {wanted!r}"]
    unknown = set(wanted) - set(BOUNDS)
    assert not unknown, f"{name}: {sorted(unknown)} are no bounds; there are {BOUNDS}"
    found = []
    if "at_least" in wanted and not value >= wanted["at_least"]:
        found.append(f"{name} is {value:.6g}, below {wanted['at_least']:g}")
    if "at_most" in wanted and not value <= wanted["at_most"]:
        found.append(f"{name} is {value:.6g}, above {wanted['at_most']:g}")
    if "near_float" in wanted and not abs(value - (expected := float_value())) <= wanted["near_float"]:
        found.append(
            f"{name} is {value:.6g}, and the float model's {expected:.6g}: over {wanted['near_float']:g} apart"
        )
    return found


def pick(report: dict[str, Any], path: str) -> Any:
    """The value at a dotted path."""
    for key in path.split("."):
        report = report[key]
    return report
