"""Measuring finished models: how close two are, and how fast."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from qcompiler.calibration import CalibrationData
from qcompiler.calibration_inputs import ModelInputs
from qcompiler.config import CompileConfig
from qcompiler.errors import ModelError
from qcompiler.feeding import calibration_data, input_specs, random_data
from qcompiler.files.loader import load_model, resolve_model_path
from qcompiler.session import InputSpec
from qcompiler.verify import Verification, verify

__all__ = ["bench_models", "compare_models", "verify_output"]

# More rows cost more than they tell: the difference of two models varies little from row to row.
_MOST_HELD_OUT = 4
# Rows that two models are compared on unless told otherwise.
_COMPARED = 8


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
    specs = input_specs(loaded)
    other = [spec.name for spec in input_specs(load_model(model))]
    if extra := [name for name in other if name not in {spec.name for spec in specs}]:
        raise ModelError(f"{model} has the input '{extra[0]}', which {reference} lacks; compare two forms of one model")
    config = CompileConfig(calibration=calibration, tokenizer=tokenizer, samples=samples or _COMPARED)
    data = calibration_data(loaded, config, batch_rows=1)
    rows = random_data(loaded, specs, seed=config.seed).held_out if data is None else data.batches
    return verify(
        resolve_model_path(reference),
        resolve_model_path(model),
        rows,
        providers=config.verify_providers,
        threads=config.threads,
        synthetic=data is None,
    )


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
    from qcompiler.bench import bench

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
