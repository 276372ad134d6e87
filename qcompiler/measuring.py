"""Measuring finished models: how close two are, and how fast."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from qcompiler import pipeline
from qcompiler.bench import BenchResult, bench
from qcompiler.calibration import CalibrationData
from qcompiler.calibration_inputs import ModelInputs
from qcompiler.config import CompileConfig
from qcompiler.errors import ModelError
from qcompiler.feeding import calibration_data, input_specs, random_data
from qcompiler.files.loader import load_model, resolve_model_path
from qcompiler.passes.base import PassContext
from qcompiler.propagation import LayerNoise, Propagation, propagate
from qcompiler.session import Feeds, InputSpec, cpu_threads, single_threaded_blas
from qcompiler.verify import Verification, verify

__all__ = ["bench_models", "bench_output", "compare_layers", "compare_models", "verify_output", "worst_sites"]

# More rows cost more than they tell: the difference of two models varies little from row to row.
_MOST_HELD_OUT = 4
# Rows that two models are compared on unless told otherwise.
_COMPARED = 8
# A benchmark that goes with a compilation takes about this long for each size of input.
_BENCH_SECONDS = 10.0


def verify_output(
    reference: Path | bytes,
    model: ir.Model,
    output: Path,
    config: CompileConfig,
    data: CalibrationData | None,
) -> Verification:
    """Compare the output with the float model on held-out rows, or on random inputs where there is no data."""
    rows = (random_data(model, input_specs(model), seed=config.seed) if data is None else data).held_out
    return verify(
        reference,
        output,
        rows[:_MOST_HELD_OUT],
        providers=config.verify_providers,
        threads=config.threads,
        max_memory=config.max_memory,
        synthetic=data is None,
    )


def bench_output(
    reference: Path | bytes, model: ir.Model, output: Path, config: CompileConfig, data: CalibrationData | None
) -> tuple[BenchResult, ...]:
    """Time the output and the float model in turns: on a held-out row, and on a batch where the data has larger ones.

    Args:
        reference: The float model: a file, or bytes that hold all of its weights.
        model: The compiled model.
        output: Its file.
        config: Provider, threads and seed.
        data: None makes up a row.
    """
    rows = (random_data(model, input_specs(model), seed=config.seed) if data is None else data).held_out
    sizes = [("one row", rows[0])]
    if data is not None:
        batch = data.batches[0]
        if _elements(batch) > _elements(rows[0]):
            sizes.append(("a batch of the data", batch))
    found = []
    for name, feeds in sizes:
        _, timed = times = bench(
            (reference, output), feeds, provider=config.provider, threads=config.threads, seconds=_BENCH_SECONDS
        )
        shapes = {key: list(array.shape) for key, array in feeds.items()}
        first, second = (each.seconds * 1e3 for each in times)
        found.append(BenchResult(name, shapes, first, second, timed.ratio, timed.ratio_low, timed.ratio_high))
    return tuple(found)


def _elements(feeds: Feeds) -> int:
    return sum(array.size for array in feeds.values())


def compare_models(
    reference: str | Path,
    model: str | Path,
    *,
    calibration: str | Path | None = None,
    tokenizer: str | Path | None = None,
    samples: int | None = None,
) -> Verification:
    """Run two models on the same rows and compare their outputs.

    Args:
        reference: Path of the model that the other is held against.
        model: Path of the other one.
        calibration: Path of data; without it the rows are random.
        tokenizer: tokenizer.json for text.
        samples: Rows to run, evenly spaced over the data.

    Returns:
        See `verify.verify`.

    Raises:
        ModelError: The models have other inputs.
    """
    loaded = load_model(reference)
    _check_inputs(reference, loaded, model, load_model(model))
    config = CompileConfig(calibration=calibration, tokenizer=tokenizer, samples=samples or _COMPARED)
    data, rows = _compared_rows(loaded, config)
    return verify(
        resolve_model_path(reference),
        resolve_model_path(model),
        rows,
        providers=config.verify_providers,
        threads=config.threads,
        synthetic=data is None,
    )


def compare_layers(
    reference: str | Path,
    model: str | Path,
    *,
    calibration: str | Path | None = None,
    tokenizer: str | Path | None = None,
    samples: int | None = None,
) -> Propagation:
    """Run two models on the same rows and compare what they compute on the way.

    The arguments are those of `compare_models`; see `propagation.propagate`.
    """
    loaded, other = load_model(reference), load_model(model)
    _check_inputs(reference, loaded, model, other)
    config = CompileConfig(calibration=calibration, tokenizer=tokenizer, samples=samples or _COMPARED)
    data, rows = _compared_rows(loaded, config)
    for each in (loaded, other):
        _canonicalize(each, config)
    with single_threaded_blas():
        found = propagate(loaded, other, rows, threads=cpu_threads(config.threads), inputs=input_specs(other))
    return replace(found, synthetic=data is None)


def worst_sites(
    reference: ir.Model, model: ir.Model, config: CompileConfig, count: int, sites: Collection[str]
) -> list[LayerNoise]:
    """The sites, of those given, that add the most noise, on the rows that `verify_output` would take.

    Args:
        reference: The float model, as loaded; it is canonicalized.
        model: The compiled model.
        config: As for the compilation.
        count: Sites to return at most.
        sites: Names to choose from.
    """
    data = calibration_data(reference, config)
    rows = random_data(reference, input_specs(reference), seed=config.seed) if data is None else data
    _canonicalize(reference, config)
    tick = config.progress
    found = propagate(
        reference,
        model,
        rows.held_out[:_MOST_HELD_OUT],
        provider=config.provider,
        threads=cpu_threads(config.threads),
        inputs=input_specs(model),
        tick=None if tick is None else lambda done, total: tick("noise of layers", done, total),
    )
    return [layer for layer in found.worst(len(found.layers), sites=True) if layer.name in sites][:count]


def _canonicalize(model: ir.Model, config: CompileConfig) -> None:
    """Inline functions and lift constants, so that sites have the names that a compilation knows them by."""
    for step in pipeline.build(config, PassContext(config), text="canonicalize"):
        step(model)


def _check_inputs(reference: str | Path, first: ir.Model, model: str | Path, second: ir.Model) -> None:
    """Raise ModelError where the second model wants what the first does not."""
    known = {spec.name for spec in input_specs(first)}
    if extra := [spec.name for spec in input_specs(second) if spec.name not in known]:
        raise ModelError(f"{model} has the input '{extra[0]}', which {reference} lacks; compare two forms of one model")


def _compared_rows(model: ir.Model, config: CompileConfig) -> tuple[CalibrationData | None, Sequence[Feeds]]:
    """The data, and the rows to compare on."""
    data = calibration_data(model, config, batch_rows=1)
    if data is not None:
        return data, data.batches
    return None, random_data(model, input_specs(model), seed=config.seed).held_out


def bench_models(
    models: Iterable[str | Path],
    *,
    rows: int = 1,
    length: int = 64,
    calibration: str | Path | None = None,
    tokenizer: str | Path | None = None,
    repeat: int = 10,
    threads: int = 0,
) -> list[tuple[str, str, str]]:
    """Time models in turns on the same inputs.

    Args:
        models: Paths; all take the inputs of the first.
        rows: Batch size of random inputs.
        length: Size of their other dynamic dimensions.
        calibration: Path of data whose first row is taken instead.
        tokenizer: tokenizer.json for text.
        repeat: Timed runs of each model.
        threads: Threads; 0 takes all cores.

    Returns:
        (model, median milliseconds, ratio to the first with its quartiles) as text.
    """
    paths = [resolve_model_path(path) for path in models]
    first = load_model(paths[0])
    data = calibration_data(first, CompileConfig(calibration=calibration, tokenizer=tokenizer, samples=1), batch_rows=1)
    if data is None:
        feeds = random_data(first, _sized(input_specs(first), rows, length), seed=0, rows=1).held_out[0]
    else:
        feeds = data.batches[0]
    timed = bench(paths, feeds, repeat, threads=threads)
    return [
        (str(path), f"{t.seconds * 1e3:.2f}", f"{t.ratio:.2f} ({t.ratio_low:.2f} to {t.ratio_high:.2f})")
        for path, t in zip(paths, timed, strict=True)
    ]


def _sized(specs: Sequence[InputSpec], rows: int, length: int) -> list[InputSpec]:
    """The inputs with their dynamic dimensions filled in; key-value caches stay as they are, to be empty."""

    def size(axis: int, dimension: int | str | None) -> int:
        return dimension if isinstance(dimension, int) else rows if axis == 0 else length

    caches = {name for name, role in ModelInputs(specs).roles.items() if role == "cache"}
    return [
        spec if spec.name in caches else replace(spec, shape=tuple(size(*place) for place in enumerate(spec.shape)))
        for spec in specs
    ]
