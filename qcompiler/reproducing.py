"""Making a compiled model again from what its metadata say, and comparing the bytes."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompiler.config import CompileConfig
from qcompiler.driver import compile_model
from qcompiler.errors import CalibrationError, ModelError, SchemeError
from qcompiler.files.loader import load_model, resolve_model_path, source_of

__all__ = ["reproduce"]

_BLOCK = 1 << 22


def reproduce(model: Path, source: Path, **options: Any) -> list[tuple[str, int]]:
    """Compile a model again and compare what comes out with what there is.

    Args:
        model: The compiled model, or the folder that it is in.
        source: The float model, or its folder, that it was made of.
        options: Fields of CompileConfig that the recipe does not hold: calibration, tokenizer, labels, threads,
            progress ...

    Returns:
        The files, the model first, with their sizes; all are equal.

    Raises:
        ModelError: Nothing in the model says how it was made, or bytes differ.
        CalibrationError: It was made with other data.
    """
    path = resolve_model_path(model)
    made = load_model(path)
    config = _config(made, path, options)
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as temporary:
        folder = Path(temporary) / "again"
        output = folder if source.is_dir() and model.is_dir() else folder / path.name
        folder.mkdir()
        again = compile_model(source, config=config, output=output)
        _check_data(made, again.model, path)
        result = resolve_model_path(output)
        pairs = list(_pairs(path, made, result, load_model(result)))
        for there, new in pairs:
            _compare(there, new, _origin(made, again.model))
        return [(there.name, there.stat().st_size) for there, _ in pairs]


def _config(made: ir.Model, path: Path, options: dict[str, Any]) -> CompileConfig:
    """What the metadata of a model say."""
    text = made.metadata_props.get("qcompiler.recipe")
    if text is None:
        raise ModelError(f"{path}: no recipe in its metadata; only models that qcompile wrote can be made again")
    given = {name: value for name, value in options.items() if value is not None}
    try:
        config = CompileConfig.from_recipe(json.loads(text), verify=False, force=True, **given)
    except (AttributeError, KeyError, TypeError, ValueError, SchemeError) as error:
        raise ModelError(f"{path}: the recipe in its metadata is not understood: {error}") from error
    if config.calibration is None and (what := made.metadata_props.get("qcompiler.calibration")):
        raise CalibrationError(f"{path}: it was made with {what}; give them with --calibration PATH")
    return config


def _check_data(made: ir.Model, again: ir.Model, path: Path) -> None:
    """Raise CalibrationError where a model was made with other data."""
    key = "qcompiler.calibration.sha256"
    if made.metadata_props.get(key) != again.metadata_props.get(key):
        raise CalibrationError(
            f"{path}: it was made with other data ({made.metadata_props.get('qcompiler.calibration', 'none')}; "
            f"now {again.metadata_props.get('qcompiler.calibration', 'none')}); give the same to --calibration"
        )


def _origin(made: ir.Model, again: ir.Model) -> str:
    """Why models may differ, as far as their metadata tell."""
    key = "qcompiler.version"
    there, here = made.metadata_props.get(key), again.metadata_props.get(key)
    return f" (made by version {there}, this is {here})" if there != here else ""


def _pairs(path: Path, made: ir.Model, result: Path, again: ir.Model) -> Iterator[tuple[Path, Path]]:
    """Files of both models that belong together, the model first."""
    yield path, result
    old, new = ({file.name: file for file in source_of(each).data_files} for each in (made, again))
    if old.keys() != new.keys():
        names = " and ".join(", ".join(sorted(each)) or "none" for each in (old, new))
        raise ModelError(f"{path}: other data files than what it is made to now: {names}")
    yield from ((old[name], new[name]) for name in sorted(old))


def _compare(there: Path, new: Path, remark: str) -> None:
    """Raise ModelError where two files differ."""
    if (sizes := (there.stat().st_size, new.stat().st_size))[0] != sizes[1]:
        raise ModelError(f"{there}: {sizes[0]} bytes, made again {sizes[1]}{remark}")
    with there.open("rb") as first, new.open("rb") as second:
        at = 0
        while block := first.read(_BLOCK):
            other = second.read(_BLOCK)
            if block != other:
                at += next(i for i, (a, b) in enumerate(zip(block, other, strict=False)) if a != b)
                raise ModelError(
                    f"{there}: byte {at} is another when it is made again{remark}; versions of numpy and ONNX Runtime "
                    "and the kind of processor may matter too"
                )
            at += len(block)
