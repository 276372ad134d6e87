"""Tables of results: the options that choose rows, the loop that gets one after the other, and their Markdown."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, TypeVar

__all__ = ["collect", "conclude", "markdown", "row_options"]

_Row = TypeVar("_Row", bound=Any)  # a dataclass


def row_options(parser: argparse.ArgumentParser, example: str) -> None:
    """Add what `collect` takes: --only and --save; the example is of a text that chooses rows."""
    parser.add_argument("--only", default="", metavar="TEXT", help=f"rows whose names hold this, e.g. {example}")
    parser.add_argument("--save", type=Path, metavar="FILE", help="append each row to this file as a line of JSON")


def collect(todo: Iterable[tuple[str, Callable[[], _Row]]], only: str, save: Path | None) -> list[_Row]:
    """Get rows, each of which is shown on stderr as soon as it is known.

    Args:
        todo: What each row is called, and what returns it, a dataclass.
        only: Rows whose names do not hold this are left out.
        save: File that each row is appended to, as a line of JSON.

    Raises:
        SystemExit: No name holds the text.
    """
    named = list(todo)
    chosen = [get for name, get in named if only in name]
    if not chosen:
        sys.exit(f"--only '{only}': no row is called so; rows: {'; '.join(name for name, _ in named)}")
    rows = []
    for get in chosen:
        rows.append(get())
        print(rows[-1], file=sys.stderr, flush=True)
        if save:
            with save.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(asdict(rows[-1])) + "\n")
    return rows


def conclude(table: str, failures: Iterable[str]) -> NoReturn:
    """Print a table and what is not as it should be; exit with 1 if anything is."""
    print(table)
    problems = list(failures)
    for problem in problems:
        print(f"FAILS: {problem}")
    sys.exit(bool(problems))


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]], texts: int) -> str:
    """A Markdown table; columns are aligned to the right but for the first `texts` of them."""
    rules = ["---"] * texts + ["---:"] * (len(titles) - texts)
    head = ["| " + " | ".join(titles) + " |", "|" + "|".join(rules) + "|"]
    return "\n".join([*head, *("| " + " | ".join(cells) + " |" for cells in rows)])
