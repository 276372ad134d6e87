"""What a model wants to be fed, and the data it is fed: calibration rows, held-out rows, random rows."""

import json
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from qcompiler.calibration import CalibrationData, load_calibration, made_up_data, synthetic_data
from qcompiler.calibration_inputs import ModelInputs
from qcompiler.calibration_labels import with_labels
from qcompiler.calibration_rows import Source
from qcompiler.config import CompileConfig
from qcompiler.errors import CalibrationError, ModelError
from qcompiler.files.loader import GENAI_CONFIG, source_of
from qcompiler.session import InputSpec, cpu_threads
from qcompiler.sites import find_sites
from qcompiler.synthetic import Means, synthetic_rows

__all__ = ["calibration_data", "input_specs", "more_rows", "random_data"]

# Rows of calibration data that run together; two of 512 tokens keep a matrix product busy and the activations small.
_BATCH_ROWS = 2


def input_specs(model: ir.Model) -> list[InputSpec]:
    """The graph inputs that a run has to be fed."""
    specs = []
    for value in model.graph.inputs:
        if value.name is None or value.is_initializer() or value.dtype is None:
            continue
        shape = value.shape if value.shape is not None else ()
        # Some exporters write -1 for a dimension that they do not know.
        dims = tuple((d if d >= 0 else None) if isinstance(d, int) else d.value for d in shape)
        dtype = "str" if value.dtype == ir.DataType.STRING else value.dtype.numpy().name
        specs.append(InputSpec(value.name, dtype, dims))
    return specs


def random_data(model: ir.Model, specs: list[InputSpec], *, seed: int, rows: int = 2) -> CalibrationData:
    """Random held-out rows for a model without data: token ids within the vocabulary, masks of ones, normal floats."""
    return synthetic_data(specs, seed=seed, rows=rows, vocabulary=_vocabulary(model), head_size=_head_size(model))


def calibration_data(
    model: ir.Model, config: CompileConfig, *, batch_rows: int = _BATCH_ROWS
) -> CalibrationData | None:
    """The data that the configuration names, cut to the model's inputs; None if it names none."""
    if config.calibration is None:
        return None
    if config.keyword and Path(config.keyword).exists():
        raise CalibrationError(
            f"--calibration {config.keyword} is a word for calibration without data, but there is a file called so "
            "too; rename the file, or give its whole path"
        )
    if config.from_norms:
        return None
    if config.data_free:
        return _synthetic(model, config, batch_rows)
    data = load_calibration(
        config.calibration,
        input_specs(model),
        samples=config.samples,
        tokenizer=config.tokenizer,
        sequence_length=config.sequence_length,
        batch_rows=batch_rows,
        head_size=_head_size(model),
        vocabulary=_vocabulary(model),
    )
    return data if config.labels is None else with_labels(data, config.labels)


def more_rows(model: ir.Model, config: CompileConfig, rows: int) -> CalibrationData | None:
    """As many rows of the data that the configuration names as it has, up to `rows`."""
    return calibration_data(model, replace(config, samples=rows))


def _synthetic(model: ir.Model, config: CompileConfig, batch_rows: int) -> CalibrationData:
    """Data that the model makes itself."""
    inputs = ModelInputs(input_specs(model), head_size=_head_size(model), vocabulary=_vocabulary(model))
    means = Means(
        config.sequence_length, config.seed, config.provider, cpu_threads(config.threads), config.max_memory,
        config.progress,
    )  # fmt: skip

    def make(rows: int) -> tuple[Source, str]:
        return synthetic_rows(model, inputs, rows, means)

    return made_up_data(make, samples=config.samples, batch_rows=batch_rows)


def _vocabulary(model: ir.Model) -> int | None:
    """Rows of the largest lookup table, which bounds token ids."""
    return max((site.rows for site in find_sites(model)[0] if site.role == "embedding"), default=None)


def _head_size(model: ir.Model) -> int | None:
    """What onnxruntime-genai's configuration beside the model says about its key-value cache."""
    path = source_of(model).path
    config = path.with_name(GENAI_CONFIG) if path is not None else None
    if config is None or not config.is_file():
        return None
    try:
        return int(json.loads(config.read_text(encoding="utf-8"))["model"]["decoder"]["head_size"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{config}: names no model.decoder.head_size; mend it, or move it away") from error
