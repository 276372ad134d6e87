"""How the noise of layers looks on a terminal: all in graph order, then those that add the most."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from qcompiler.report_table import add_row, decibel, percent, plain_table, show

if TYPE_CHECKING:
    from qcompiler.propagation import LayerNoise, Propagation

__all__ = ["print_layers"]


def print_layers(found: "Propagation", console: Console, *, worst: int, every_layer: bool) -> None:
    """Print what each layer does to the signal.

    Args:
        found: The layers.
        console: Where to.
        worst: How many of those that add the most noise are named again.
        every_layer: Float layers too.
    """
    rows = f"{found.rows} {'row' if found.rows == 1 else 'rows'}{' of random inputs' if found.synthetic else ''}"
    console.print(Text(f"{found.matched} of {found.tensors} float tensors compared on {rows}", "bold"))
    shown = [layer for layer in found.layers if layer.quantized or every_layer]
    _print(console, "layer", shown)
    guilty = found.worst(worst)
    if guilty:
        _print(console, "adds the most noise", guilty)
    else:
        console.print("no quantized layer adds noise")
    if rescaled := sum(layer.rescaled for layer in shown):
        console.print(
            f"* {rescaled} tensors have other scales than in the float model; their channels were rescaled to it"
        )


def _print(console: Console, title: str, layers: Iterable["LayerNoise"]) -> None:
    table = plain_table(title, "operator", "SQNR before, dB", "after", "drop", "added noise")
    table.columns[1].justify = "left"
    for layer in layers:
        name = f"{layer.name}{' *' if layer.rescaled else ''}"
        drop = "" if layer.drop_db is None else f"{layer.drop_db:.1f}"
        add_row(
            table, name, layer.operator, decibel(layer.before_db), decibel(layer.after_db), drop, percent(layer.added)
        )
    show(console, table)
    console.print()
