"""Opens calibration data: .npz and folders of .npz, .npy, .jsonl, text with a tokenizer, Python feeds.

What has no random access (compressed .npz, .jsonl, text, a generator) is written once to temporary files, which are
removed with the source.
"""

import json
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from qcompiler.calibration_inputs import ModelInputs
from qcompiler.calibration_rows import FeedRows, Ragged, Source, Spool, Stored, StoredRows, TokenRows, as_feed
from qcompiler.errors import CalibrationError

__all__ = ["open_source"]

_NPZ_REMEDY = "give an .npz with one array for each input"
# Text is tokenized in blocks of whole lines of about this many characters.
_TEXT_BLOCK = 1 << 16
_LONGEST_LINE = 1 << 16


def open_source(source: Any, inputs: ModelInputs, tokenizer: str | Path | None, sequence_length: int) -> Source:
    """Find out what `source` is.

    Args:
        source: A path or an iterable of feeds.
        inputs: The model's inputs.
        tokenizer: tokenizer.json, or the folder that holds it, for text.
        sequence_length: Tokens of a row of text, unless the model fixes that number.

    Raises:
        CalibrationError: The source is missing, empty or unreadable, or does not fit the model.
    """
    if not isinstance(source, str | Path):
        return _open_iterable(source, inputs)
    path = Path(source)
    label = f"'{path}'"
    if not path.exists():
        raise CalibrationError(
            f"calibration data {label} does not exist; give an .npz, .npy, .jsonl or text file, or a folder of .npz"
        )
    try:
        if path.is_dir():
            return _open_folder(path, label, inputs)
        if path.suffix.lower() == ".npz":
            spool = Spool()
            return StoredRows(label, {label: _read_npz(path, spool)}, inputs, spool=spool)
        if path.suffix.lower() == ".npy":
            return _open_npy(path, label, inputs)
        if path.suffix.lower() == ".jsonl":
            return _open_jsonl(path, label, inputs)
        return _open_text(path, label, inputs, tokenizer, sequence_length)
    except OSError as error:
        raise CalibrationError(f"calibration data {label} cannot be read: {error}") from error


def _open_iterable(source: Any, inputs: ModelInputs) -> Source:
    if isinstance(source, Mapping):
        raise CalibrationError("the calibration data is one dict, not many; put it into a list, or save it as .npz")
    if isinstance(source, Sequence):
        return FeedRows(source, inputs)
    if not isinstance(source, Iterable):
        raise CalibrationError(
            f"the calibration data is a {type(source).__name__}; give a path or an iterable of dicts name -> array"
        )
    spool = Spool()
    path = spool.path()
    files: dict[str, dict[str, Stored]] = {}
    with open(path, "wb") as stream:
        for index, item in enumerate(source):
            feed = as_feed(item, index)
            label = f"the calibration data (item {index})"
            inputs.fit(feed, label)
            files[label] = {name: _append(stream, path, array) for name, array in feed.items()}
    _not_empty(files, "from Python")
    return StoredRows("the calibration data", files, inputs, split=False, spool=spool)


def _append(stream: BinaryIO, path: Path, array: np.ndarray) -> Stored:
    stored = Stored(path, stream.tell(), array.dtype, array.shape)
    stream.write(array.tobytes())
    return stored


def _open_folder(path: Path, label: str, inputs: ModelInputs) -> Source:
    paths = sorted(file for file in path.iterdir() if file.suffix.lower() == ".npz")
    if not paths:
        raise CalibrationError(f"folder {label} holds no .npz file; {_NPZ_REMEDY}")
    spool = Spool()
    return StoredRows(label, {f"'{file}'": _read_npz(file, spool) for file in paths}, inputs, spool=spool)


def _open_npy(path: Path, label: str, inputs: ModelInputs) -> Source:
    stored = _read_npy(path)
    if inputs.ids is None and len(inputs.specs) == 1:
        return StoredRows(label, {label: dict.fromkeys(inputs.specs, stored)}, inputs)
    inputs.need_ids(label)
    if stored.dtype.kind not in "iu":
        raise CalibrationError(f"{label} holds {stored.dtype.name}, but token ids are integers; {_NPZ_REMEDY}")
    if len(stored.shape) != 2:
        raise CalibrationError(
            f"{label} has the shape {list(stored.shape)}, but token ids have rank 2; reshape it to [rows, tokens]"
        )
    _not_empty(range(int(np.prod(stored.shape))), label)
    return TokenRows(label, stored.open(), None, inputs)


def _open_jsonl(path: Path, label: str, inputs: ModelInputs) -> Source:
    names = {inputs.need_ids(label).name, "input_ids"}, {inputs.mask.name, "attention_mask"} if inputs.mask else set()
    spool = Spool()
    ids_path, mask_path = spool.path(), spool.path()
    ends: list[int] = []
    with open(path, "rb") as lines, open(ids_path, "wb") as ids_file, open(mask_path, "wb") as mask_file:
        for number, line in enumerate(lines, 1):
            if line.strip():
                ids, mask = _parse_line(line, f"{label} line {number}", *names)
                ids_file.write(ids.tobytes())
                mask_file.write(mask.tobytes())
                ends.append((ends[-1] if ends else 0) + len(ids))
    _not_empty(ends, label)
    rows = Ragged(np.memmap(ids_path, np.int64, "r"), ends)
    return TokenRows(label, rows, Ragged(np.memmap(mask_path, np.uint8, "r"), ends), inputs, spool)


def _parse_line(line: bytes, where: str, id_names: set[str], mask_names: set[str]) -> tuple[np.ndarray, np.ndarray]:
    """Ids int64 ``[S]`` and mask uint8 ``[S]`` of one line."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise CalibrationError(f"{where} is not JSON ({error}); give a list of token ids on each line") from error
    fields = value if isinstance(value, dict) else {"input_ids": value}
    unknown = sorted(set(fields) - id_names - mask_names)
    if unknown:
        known = ", ".join(sorted(id_names | mask_names))
        raise CalibrationError(f"{where} has '{unknown[0]}', which the model does not take; keep only {known}")
    ids = _int_list(next((fields[name] for name in sorted(id_names) if name in fields), None), where, "token ids")
    given = next((fields[name] for name in sorted(mask_names) if name in fields), None)
    mask = np.ones_like(ids) if given is None else _int_list(given, where, "mask values")
    if mask.shape != ids.shape:
        raise CalibrationError(f"{where} has {len(ids)} token ids but {len(mask)} mask values; give one for each id")
    if not mask.any() or not np.isin(mask, (0, 1)).all():
        raise CalibrationError(f"{where} has a mask that is not made of 0 and 1 with at least one 1; correct it")
    return ids, mask.astype(np.uint8)


def _int_list(value: Any, where: str, what: str) -> np.ndarray:
    if not isinstance(value, list) or not value or not all(type(item) is int and abs(item) < 1 << 62 for item in value):
        raise CalibrationError(f"{where} has no list of integers for the {what}; give for example [1, 2, 3]")
    return np.asarray(value, np.int64)


def _open_text(
    path: Path, label: str, inputs: ModelInputs, tokenizer: str | Path | None, sequence_length: int
) -> Source:
    width = inputs.need_ids(label).shape[1]
    length = width if isinstance(width, int) else sequence_length
    if tokenizer is None:
        raise CalibrationError(
            f"text {label} needs a tokenizer; give --tokenizer tokenizer.json, or token ids as .npy or .jsonl"
        )
    encode = _load_tokenizer(Path(tokenizer))
    spool = Spool()
    ids_path = spool.path()
    total = 0
    with open(ids_path, "wb") as stream:
        for block in _text_blocks(path, label):
            ids = np.asarray(encode(block), np.int32)
            stream.write(ids.tobytes())
            total += len(ids)
    _not_empty(range(total), label)
    flat = np.memmap(ids_path, np.int32, "r")
    length = min(length, total)
    rows = flat[: total // length * length].reshape(-1, length)  # [tokens] -> [rows, length]; the rest is dropped
    return TokenRows(label, rows, None, inputs, spool)


def _text_blocks(path: Path, label: str) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8-sig") as stream:
            while block := stream.read(_TEXT_BLOCK):
                yield block + stream.readline(_LONGEST_LINE)
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{label} is not UTF-8 text ({error.reason}); give .npz, .npy, .jsonl or UTF-8 text"
        ) from error


def _load_tokenizer(path: Path) -> Callable[[str], list[int]]:
    """A function from text to ids without special tokens, truncation or padding."""
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise CalibrationError(f"tokenizer '{path}' does not exist; give the model's tokenizer.json")
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise CalibrationError(
            "calibration with text needs the package tokenizers; pip install 'onnx-qcompiler[text]'"
        ) from error
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise CalibrationError(
            f"tokenizer '{path}' cannot be read ({error}); give the model's tokenizer.json"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


def _read_npy(path: Path) -> Stored:
    try:
        with open(path, "rb") as stream:
            dtype, shape, fortran = _read_header(stream)
            offset = stream.tell()
    except ValueError as error:
        raise CalibrationError(f"'{path}' is not a plain .npy file ({error}); save it with numpy.save") from error
    return _checked(Stored(path, offset, dtype, shape, fortran), path)


def _read_npz(path: Path, spool: Spool) -> dict[str, Stored]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            found = {info.filename.removesuffix(".npy"): _read_member(archive, info, path, spool) for info in members}
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, RuntimeError) as error:
        raise CalibrationError(f"'{path}' is not a plain .npz file ({error}); save it with numpy.savez") from error
    _not_empty(found, f"'{path}'")
    return found


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path, spool: Spool) -> Stored:
    """Where an array lies: in the archive itself if it is not compressed, else in a temporary copy."""
    if info.compress_type != zipfile.ZIP_STORED:
        copy = spool.path()
        with archive.open(info) as packed, open(copy, "wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
        with open(copy, "rb") as stream:
            dtype, shape, fortran = _read_header(stream)
            return _checked(Stored(copy, stream.tell(), dtype, shape, fortran), path)
    with archive.open(info) as stream:
        dtype, shape, fortran = _read_header(stream)
        header = stream.tell()
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        # The local file header: 26 bytes, then the lengths of the name and of the extra field that follow it.
        name, extra = struct.unpack("<26xHH", file.read(30))
    return _checked(Stored(path, info.header_offset + 30 + name + extra + header, dtype, shape, fortran), path)


def _read_header(stream: Any) -> tuple[np.dtype, tuple[int, ...], bool]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    return dtype, shape, fortran


def _checked(stored: Stored, path: Path) -> Stored:
    wanted = stored.offset + int(np.prod(stored.shape, dtype=np.int64)) * stored.dtype.itemsize
    size = stored.path.stat().st_size
    if size < wanted:
        raise CalibrationError(f"'{path}' is cut short: {wanted} bytes expected, {size} found; save it again")
    return stored


def _not_empty(rows: Sequence[Any] | Mapping[str, Any], label: str) -> None:
    if not len(rows):
        raise CalibrationError(f"calibration data {label} is empty; give at least one row")
