"""Measuring finished models: how close two are, and how fast."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from qcompiler.calibration import CalibrationData
from qcompiler.config import CompileConfig
from qcompiler.feeding import calibration_data, input_specs, random_data
from qcompiler.files.loader import load_model, resolve_model_path
from qcompiler.verify import Verification, verify

__all__ = ["bench_models", "compare_models", "verify_output"]

# More rows cost more than they tell: the difference of two models varies little from row to row.
_MOST_HELD_OUT = 4


def verify_output(
    reference: Path | bytes,
    model: ir.Model,
    output: Path,
    config: CompileConfig,
    data: CalibrationData | None,
) -> Verification:
    """Compare the output with the float model on held-out rows, or on random inputs where there is no data."""
    synthetic = data is None
    if data is None:
        data = random_data(model, input_specs(model), seed=config.seed)
    return verify(
        reference,
        output,
        data.held_out[:_MOST_HELD_OUT],
        providers=config.verify_providers,
        threads=config.threads,
        max_memory=config.max_memory,
        synthetic=synthetic,
    )


def compare_models(
    reference: str | Path,
    model: str | Path,
    *,
    calibration: str | Path | None = None,
    tokenizer: str | Path | None = None,
    samples: int | None = None,
) -> Verification:
    """Run two models on the same rows and compare their outputs; see `verify.verify`."""
    loaded = load_model(reference)
    config = CompileConfig(calibration=calibration, tokenizer=tokenizer, samples=samples)
    data = calibration_data(loaded, config)
    return verify_output(resolve_model_path(reference), loaded, resolve_model_path(model), config, data)


def bench_models(
    models: Iterable[str | Path], *, rows: int = 1, length: int = 64, repeat: int = 10, threads: int = 0
) -> list[tuple[str, str, str]]:
    """Time models in turns on the same random inputs.

    Args:
        models: Paths; all take the inputs of the first.
        rows: Batch size.
        length: Size of the other dynamic dimensions.
        repeat: Timed runs of each model.
        threads: Threads; 0 takes all cores.

    Returns:
        (model, median milliseconds, ratio to the first with its quartiles) as text.
    """
    from qcompiler.bench import bench

    paths = [resolve_model_path(path) for path in models]
    first = load_model(paths[0])
    specs = [
        replace(
            spec,
            shape=tuple(
                d if isinstance(d, int) else rows if axis == 0 else length for axis, d in enumerate(spec.shape)
            ),
        )
        for spec in input_specs(first)
    ]
    data = random_data(first, specs, seed=0, rows=1)
    timed = bench(paths, data.held_out[0], repeat, threads=threads)
    return [
        (str(path), f"{t.seconds * 1e3:.2f}", f"{t.ratio:.2f} ({t.ratio_low:.2f} to {t.ratio_high:.2f})")
        for path, t in zip(paths, timed, strict=True)
    ]
