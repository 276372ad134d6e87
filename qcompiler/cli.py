"""The commands `qcompile` and `qcompiler`: strings in, CompileConfig out; errors become one line and an exit code."""

import sys
import traceback
from pathlib import Path
from typing import Any

import click

from qcompiler import __version__
from qcompiler.cli_options import COUNT, compile_options, tune_options, verbosity
from qcompiler.cli_recipe import recipe_text
from qcompiler.cli_signals import Terminated, tidy_termination
from qcompiler.errors import QCompilerError, SchemeError

__all__ = ["main", "qcompile"]

_BELOW_FLOOR = 3


class _Command(click.Command):
    """A command whose failures are one line on stderr that begins with "Error: "."""

    def invoke(self, context: click.Context) -> Any:
        """Run, turning errors into exit codes: 1 failed, 2 usage, 130 interrupted, 143 terminated."""
        verbose = context.params.get("verbose", 0)
        try:
            with tidy_termination():
                return super().invoke(context)
        except QCompilerError as error:
            _fail(str(error), error.exit_code, verbose)
        except MemoryError:
            _fail("out of memory; give --max-memory, fewer --samples, or a machine with more memory", 1, verbose)
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            _fail(f"{place}{error.strerror or error}; check the path, its permissions and the free space", 1, verbose)
        except KeyboardInterrupt as error:
            folder = context.params.get("checkpoint")
            folder = "the cache" if context.params.get("cache") else folder
            more = f" but checkpoints in {folder}, from which the same command goes on" if folder is not None else ""
            _fail(f"interrupted; nothing was written{more}", 143 if isinstance(error, Terminated) else 130, verbose)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            _fail(
                f"internal error: {type(error).__name__}: {error}; run again with -vv and report what it prints",
                1,
                verbose,
            )


def _fail(message: str, code: int, verbose: int) -> None:
    if verbose >= 2:
        traceback.print_exc()
    click.echo("Error: " + " ".join(message.split()), err=True)
    sys.exit(code)


@click.command(
    cls=_Command,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    short_help="Quantize MODEL and report what it cost.",
    epilog="Example: qcompile model.onnx -o model.w4.onnx --scheme w4a16 --calibration texts.txt "
    "--tokenizer tokenizer.json",
)
@click.version_option(__version__)
@compile_options
def qcompile(model: Path, **options: Any) -> None:
    """Quantize an ONNX MODEL (a file, or a folder made by onnxruntime-genai's builder) and report what it cost."""
    _compile(model, options)


def _compile(model: Path, options: dict[str, Any]) -> None:
    """Do what the options say."""
    from qcompiler import cli_output
    from qcompiler.driver import compile_model
    from qcompiler.pipeline import default_algorithms
    from qcompiler.planning import plan_model

    verbose, quiet, dry_run = options.pop("verbose"), options.pop("quiet"), options.pop("dry_run")
    cli_output.set_up_logging(verbose, quiet)
    if options.pop("cache"):
        options.update(_cache(options))
    output, text, print_recipe = options.pop("output"), options.pop("pipeline_text"), options.pop("print_recipe")
    config = _config(options)
    if print_recipe:
        chosen = config.algorithms or default_algorithms(config, calibrated=config.calibration is not None)
        given = click.get_current_context().params
        spelled = {parameter.name: given.get(parameter.name or "") for parameter in qcompile.params}
        spelled |= {"algorithm": ",".join(chosen), "effort": None}
        click.echo(recipe_text(qcompile, spelled), nl=False)
        return
    if dry_run:
        plan = plan_model(model, config, pipeline_text=text)
        cli_output.print_plan(plan)
        if config.pareto is not None:
            cli_output.draw_plan(plan, config.pareto)
        return
    with cli_output.Progress(hidden=quiet) as progress:
        result = compile_model(
            model,
            config=config,
            output=output or cli_output.default_output(model, options["scheme"]),
            pipeline_text=text,
            progress=progress,
        )
    if not quiet:
        cli_output.print_report(result, every_site=verbose > 0)
    for failure in result.below_floor:
        click.echo(f"Below the floor: {failure}", err=True)
    if result.below_floor:
        sys.exit(_BELOW_FLOOR)


def _config(options: dict[str, Any]) -> Any:
    """CompileConfig of the command's options."""
    from qcompiler.config import CompileConfig
    from qcompiler.scheme import Scheme
    from qcompiler.scheme_plan import Pattern, SchemePlan, parse_optional_scheme

    overrides = []
    for text in options["overrides"]:
        pattern, equals, scheme = text.rpartition("=")
        if not equals or not pattern:
            raise SchemeError(
                f"--set {text} is not understood; write PATTERN=SCHEME, for example 're:.*down_proj=w8a16-g32'"
            )
        overrides.append((Pattern(pattern), parse_optional_scheme(scheme)))
    plan = SchemePlan(
        Scheme.parse(options["scheme"]),
        embedding=parse_optional_scheme(options["embedding"]),
        lm_head=parse_optional_scheme(options["lm_head"]),
        overrides=tuple(overrides),
        ignore=tuple(Pattern(text) for text in options["ignore"]),
        only=tuple(Pattern(text) for text in options["only"]),
    )
    providers = options["providers"] or ("CPUExecutionProvider",)
    known = set(CompileConfig.__dataclass_fields__)
    return CompileConfig(
        plan=plan,
        algorithms=(options["algorithm"],) if options["algorithm"] else (),
        provider=providers[0],
        verify_providers=tuple(providers),
        max_memory=_bytes(options["max_memory"], "--max-memory"),
        max_size=_bytes(options["max_size"], "--max-size"),
        min_sqnr_db=options["min_sqnr"],
        **{name: value for name, value in options.items() if name in known and name not in ("max_memory", "max_size")},
    )


def _cache(options: dict[str, Any]) -> dict[str, Any]:
    """What --cache means."""
    from qcompiler.caching import DEFAULT_LIMIT, cache_folder

    if options["checkpoint"] is not None:
        raise SchemeError("--cache and --checkpoint both say where results are kept; keep one of them")
    return {"checkpoint": cache_folder(), "checkpoint_limit": DEFAULT_LIMIT}


def _bytes(text: str | None, option: str) -> int | None:
    """Read ``1.5GB``, ``800MB`` or a plain number of bytes."""
    if text is None:
        return None
    units = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1}
    upper = text.strip().upper()
    unit = next((u for u in sorted(units, key=len, reverse=True) if upper.endswith(u)), "")
    try:
        size = int(float(upper.removesuffix(unit)) * units.get(unit, 1))
    except (ValueError, OverflowError):
        size = -1
    if size < 0:
        raise SchemeError(f"{option} {text} is not a size; write for example 2GB or 800MB")
    return size


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Quantization compiler for ONNX."""


main.add_command(qcompile, "compile")


@main.command(
    "tune",
    cls=_Command,
    short_help="Quantize MODEL and train it to answer as the float model does.",
    epilog="Example: qcompiler tune model.onnx -o model.w2.onnx --scheme w2a16-g32 --calibration texts.txt "
    "--tokenizer tokenizer.json --minutes 20",
)
@tune_options
@compile_options
def tune_command(model: Path, algorithm: str, **options: Any) -> None:
    """Quantize an ONNX MODEL and train it: it learns from the float model, or from labels. Needs torch.

    What --algorithm or --effort names comes first, or what they stand for with calibration data; the training starts
    from its result.
    """
    from qcompiler.cli_tune import with_training

    _compile(model, with_training(algorithm, options))


@main.command("inspect", cls=_Command, short_help="Show what could be quantized in MODEL, and what is already.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--sites", is_flag=True, help="List every site with all names that patterns may use.")
@verbosity
def inspect_command(model: Path, sites: bool, verbose: int, quiet: bool) -> None:
    """Show what could be quantized in MODEL and what is quantized already."""
    from qcompiler import cli_output
    from qcompiler.planning import inspect_model

    cli_output.set_up_logging(verbose, quiet)
    cli_output.print_inspection(inspect_model(model), every_site=sites)


@main.command("compare", cls=_Command)
@click.argument("reference", type=click.Path(path_type=Path))
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--calibration", type=click.Path(path_type=Path), help="Data to compare on; random inputs without it.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="tokenizer.json for text data.")
@click.option("--samples", type=COUNT, default=8, show_default=True, help="Rows to run, evenly spaced over the data.")
@click.option(
    "--layers", is_flag=True, help="Compare layer by layer: the noise that each adds; -v lists float ones too."
)
@click.option("--worst", type=COUNT, default=5, show_default=True, help="With --layers: worst layers to name.")
@verbosity
def compare_command(
    reference: Path, model: Path, layers: bool, worst: int, verbose: int, quiet: bool, **options: Any
) -> None:
    """Compare the outputs of MODEL with those of REFERENCE."""
    from qcompiler import cli_output
    from qcompiler.measuring import compare_layers, compare_models

    cli_output.set_up_logging(verbose, quiet)
    if layers:
        found = compare_layers(reference, model, **options)
        cli_output.print_propagation(found, worst=worst, every_layer=verbose > 0)
    else:
        cli_output.print_verification(compare_models(reference, model, **options))


@main.command("bench", cls=_Command)
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--rows", type=COUNT, default=1, show_default=True, help="Batch size.")
@click.option("--length", type=COUNT, default=64, show_default=True, help="Size of the other dynamic dimensions.")
@click.option("--calibration", type=click.Path(path_type=Path), help="Data to run on, one row; random inputs without.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="tokenizer.json for text data.")
@click.option("--repeat", type=COUNT, default=10, show_default=True, help="Timed runs of each model.")
@click.option("--threads", type=click.IntRange(min=0), default=0, help="Threads. Default: all cores.")
@verbosity
def bench_command(models: tuple[Path, ...], verbose: int, quiet: bool, **options: Any) -> None:
    """Time MODELS in turns in one process; ratios are to the first."""
    from qcompiler import cli_output
    from qcompiler.measuring import bench_models

    cli_output.set_up_logging(verbose, quiet)
    cli_output.print_bench(bench_models(models, **options))


@main.command("report", cls=_Command)
@click.argument("report", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Default: beside the report, .html.")
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
@verbosity
def report_command(report: Path, output: Path | None, force: bool, verbose: int, quiet: bool) -> None:
    """Make a page of REPORT, the .report.json of a compiled model. Needs the extra `report`."""
    from qcompiler import cli_output
    from qcompiler.driver import write_report_page

    cli_output.set_up_logging(verbose, quiet)
    page = output or report.with_suffix(".html")
    write_report_page(report, page, force=force)
    cli_output.tell_written(page)


@main.command("diff", cls=_Command, short_help="Compare two compiled models by their reports.")
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@verbosity
def diff_command(first: Path, second: Path, verbose: int, quiet: bool) -> None:
    """Compare two compiled models by the reports beside them: recipes, figures, and the sites that differ."""
    from qcompiler import cli_output
    from qcompiler.report_diff import report_of

    cli_output.set_up_logging(verbose, quiet)
    cli_output.print_difference(report_of(first), report_of(second), every_site=verbose > 0)


@main.command(
    "reproduce",
    cls=_Command,
    short_help="Make MODEL again from SOURCE and compare the bytes.",
    epilog="Example: qcompiler reproduce model.w4.onnx model.onnx --calibration rows.npy",
)
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--calibration", type=click.Path(path_type=Path), help="The data that it was made with.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="tokenizer.json for text data.")
@click.option("--labels", type=click.Path(path_type=Path), help="The labels that it was trained on.")
@click.option("--checkpoint", type=click.Path(path_type=Path), metavar="DIR", help="Folder for results on the way.")
@click.option("--threads", type=click.IntRange(min=0), default=0, help="Threads. Default: all cores.")
@verbosity
def reproduce_command(model: Path, source: Path, verbose: int, quiet: bool, **options: Any) -> None:
    """Make the compiled MODEL again from the float model SOURCE, by the recipe in it, and compare the bytes."""
    from qcompiler import cli_output
    from qcompiler.reproducing import reproduce

    cli_output.set_up_logging(verbose, quiet)
    with cli_output.Progress(hidden=quiet) as progress:
        found = reproduce(model, source, progress=progress, **options)
    cli_output.print_reproduction(found)


@main.command("cache", cls=_Command)
@click.option("--limit", metavar="SIZE", help="Remove what was used longest ago, until this is left, e.g. 5GB; 0: all.")
@verbosity
def cache_command(limit: str | None, verbose: int, quiet: bool) -> None:
    """Show where --cache keeps results, and how much, or clean it up."""
    from qcompiler import caching, cli_output

    cli_output.set_up_logging(verbose, quiet)
    folder = caching.cache_folder()
    removed = None if limit is None else caching.prune(folder, _bytes(limit, "--limit") or 0)
    cli_output.print_cache(folder, caching.usage(folder), removed)


@main.command("schemes", cls=_Command)
def schemes_command() -> None:
    """List the schemes with their bits per weight."""
    from qcompiler import cli_output

    cli_output.print_schemes()


@main.command("passes", cls=_Command)
def passes_command() -> None:
    """List the passes, in pipeline order, with their options."""
    from qcompiler import cli_output

    cli_output.print_passes()
