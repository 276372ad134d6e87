"""Recipe files: the options of `qcompile` as YAML, under their own names.

    scheme: w4a16-g64-asym
    algorithm: gptq{drift=0.5},learned_rounding
    set:
    - re:.*down_proj=w8a16-g32
    verify: false

What the command line says comes before what a recipe says.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import yaml

__all__ = ["read_recipe", "recipe_text", "use_recipe"]

# They say how a run is watched, not what is made.
_APART = ("model", "verbose", "quiet", "version", "recipe", "print_recipe", "dry_run")


def use_recipe(context: click.Context, option: click.Parameter, path: Path | None) -> None:
    """Make what a recipe says the defaults of the command; a callback for click."""
    del option
    if path is not None:
        context.default_map = {**(context.default_map or {}), **read_recipe(path, context)}


def read_recipe(path: Path, context: click.Context) -> dict[str, Any]:
    """Read a recipe for a command.

    Args:
        path: A YAML file.
        context: Of the command whose options it gives.

    Returns:
        Values by the names of the command's parameters.

    Raises:
        click.UsageError: It cannot be read, holds something that is no option, or a value that an option does not take.
    """
    try:
        given = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"{path}: the recipe cannot be read ({error}); name a YAML file") from error
    except yaml.YAMLError as error:
        raise click.UsageError(f"{path}: this is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict):
        raise click.UsageError(f"{path}: a recipe holds lines of 'option: value', for example 'scheme: w4a16'")
    known = _options(context.command)
    for key in given:
        if key not in known:
            raise click.UsageError(f"{path}: '{key}' is no option of a recipe; known are {', '.join(sorted(known))}")
    options = ((known[key], value, f"{path}: {key}") for key, value in given.items())
    return {option.name or "": _checked(option, value, context, where) for option, value, where in options}


def recipe_text(command: click.Command, values: Mapping[str, Any]) -> str:
    """The recipe that stands for parameters of a command: the scheme, and what differs from its default.

    Args:
        command: Whose parameters they are.
        values: By the names of the parameters, as the command gets them.
    """
    plain: dict[str, Any] = {}
    without = click.Context(command)
    for key, option in _options(command).items():
        value: Any = values.get(option.name or "")
        default = option.process_value(without, option.get_default(without))
        if key == "scheme" or (value is not None and value != default):
            plain[key] = list(value) if option.multiple else str(value) if isinstance(value, Path) else value
    return str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=1000))


def _options(command: click.Command) -> dict[str, click.Option]:
    """What a recipe may say: the command's options by their long names, without the dashes in front."""
    options = [each for each in command.params if isinstance(each, click.Option) and each.name not in _APART]
    return {max(option.opts, key=len).removeprefix("--"): option for option in options}


def _checked(option: click.Option, value: Any, context: click.Context, where: str) -> Any:
    """The value, if the option takes it."""
    if option.multiple != isinstance(value, list):
        wanted = "a list, an item a line" if option.multiple else "one value"
        raise click.UsageError(f"{where} takes {wanted}, not {value!r}")
    for item in value if option.multiple else [value]:
        # Click would take `verify: 7` for true and `samples: true` for a number.
        if not isinstance(item, str | int | float) or isinstance(item, bool) != option.is_flag:
            wanted = "true or false" if option.is_flag else "text or a number"
            raise click.UsageError(f"{where} takes {wanted}, not {item!r}")
    try:
        option.type_cast_value(context, value if option.multiple else str(value))
    except click.BadParameter as error:
        raise click.UsageError(f"{where}: {error.format_message()}") from error
    return value
