"""From a file, a folder or a message to an `onnx_ir` model that is known to be sound, with its weights left on disk."""

import json
import logging
import mmap
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from qcompiler.errors import ModelError
from qcompiler.files.graph_checks import check_wiring
from qcompiler.files.inline_weights import FramingError, detach_weights
from qcompiler.files.mapped_tensor import MappedTensor
from qcompiler.files.tensor_checks import ExternalFiles, check_tensors
from qcompiler.files.versions import MAX_IR_VERSION, MAX_OPSETS, RUNTIME

__all__ = ["GENAI_CONFIG", "Source", "load_model", "resolve_model_path", "source_of"]

logger = logging.getLogger(__name__)

GENAI_CONFIG = "genai_config.json"
_SOURCE_KEY = "qcompiler.source"
# What a file that is no ONNX model has at some offset, what it is then, and what to do.
_SIGNATURES = (
    (0, b"version https://git-lfs", "a pointer of git-lfs", "fetch the model with 'git lfs pull'"),
    (0, b"PK\x03\x04", "a zip archive (a PyTorch checkpoint?)", "export it to ONNX first"),
    (0, b"GGUF", "a GGUF file", "give the ONNX export of the model"),
    (0, b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (4, b"ORTM", "a model in ORT format", "give the .onnx file it was made from"),
)


@dataclass(frozen=True)
class Source:
    """The files that a model came from; none of them may be written to.

    Attributes:
        path: The model file, or None for a model that came from memory.
        data_files: Files of external data.
    """

    path: Path | None
    data_files: tuple[Path, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """All of them."""
        return (self.path, *self.data_files) if self.path is not None else self.data_files


def source_of(model: ir.Model) -> Source:
    """The files that `load_model` read; empty for a model that was built otherwise."""
    source = model.meta.get(_SOURCE_KEY)
    return source if isinstance(source, Source) else Source(None)


def resolve_model_path(path: str | Path) -> Path:
    """The model file that `path` means.

    Args:
        path: A file; or a folder: the decoder that its genai_config.json names, or the only .onnx file in it.

    Returns:
        The path of an existing file.

    Raises:
        ModelError: There is no such file, or the folder does not say which.
    """
    path = Path(path)
    try:
        if path.is_dir():
            config = path / GENAI_CONFIG
            file = path / _decoder_file(config) if config.is_file() else _only_model(path)
        else:
            file = path
        if file.is_file():
            return file
        exists = file.exists()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    if exists:
        raise ModelError(f"{file}: is neither a file nor a folder; give the path of an .onnx file")
    named = f", which {GENAI_CONFIG} names," if path.is_dir() else ""
    raise ModelError(f"{file}: the model{named} does not exist; check the path")


def _only_model(folder: Path) -> Path:
    models = sorted(file for file in folder.iterdir() if file.suffix == ".onnx")
    if len(models) == 1:
        return models[0]
    found = ", ".join(file.name for file in models[:5]) or "none"
    what = f"has no {GENAI_CONFIG} to name its model, and these .onnx files: {found}"
    raise ModelError(f"{folder}: the folder {what}; give the path of the model file")


def _decoder_file(config: Path) -> str:
    """The file name in ``model.decoder.filename`` of a genai_config.json."""
    try:
        name = json.loads(config.read_text(encoding="utf-8"))["model"]["decoder"]["filename"]
    except (ValueError, KeyError, TypeError) as error:
        what = "is not JSON" if isinstance(error, ValueError) else "names no model.decoder.filename"
        raise ModelError(f"{config}: {what}; mend it or give the model file itself") from error
    return str(name)


def load_model(source: str | Path | onnx.ModelProto, *, base_dir: str | Path | None = None) -> ir.Model:
    """Load and check a model; weights in the file, or in files beside it, stay there until they are read.

    What is accepted is normalized: one entry an operator set, nodes in topological order.

    Args:
        source: A path as `resolve_model_path` takes it, or a message, which is not changed.
        base_dir: For a message: the folder of its external data.

    Returns:
        A model whose nodes all read values that exist, and whose tensors all have their bytes.

    Raises:
        ModelError: One line that names the file, what is wrong with it and what to do.
    """
    try:
        if isinstance(source, onnx.ModelProto):
            return _checked_model(source, None, None if base_dir is None else Path(base_dir))
        path = resolve_model_path(source)
        return _checked_model(_read(path), path, path.parent)
    except ModelError as error:
        # Names come from the file and may hold anything, line breaks and terminal codes too.
        raise ModelError(printable(str(error))) from error


def printable(text: str) -> str:
    """The text in one line, with everything that a terminal would not show as it is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _checked_model(proto: onnx.ModelProto, path: Path | None, folder: Path | None) -> ir.Model:
    where = "the model" if path is None else str(path)
    _check_versions(proto, where)
    unsorted = check_wiring(proto, where)
    files = ExternalFiles(where, folder, path)
    check_tensors(proto, where, files)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about extra keys of external data, which nobody needs
            model = ir.serde.deserialize_model(proto)
    except (ir.serde.SerdeError, ValueError, NotImplementedError) as error:
        what = "this form is broken or not supported: export the model again, or without it"
        raise ModelError(f"{where}: {_root_cause(error)}; {what}") from error
    _normalize_opsets(model, proto)
    _place_external(model, files)
    if unsorted:
        logger.info("%s: nodes were out of order and have been sorted", where)
        model.graph.sort()
        for function in model.functions.values():
            function.sort()
    own = path.name if path is not None else None
    data_files = tuple(file for location, file in files.paths.items() if location != own)
    model.meta[_SOURCE_KEY] = Source(path, data_files)
    return model


def _read(path: Path) -> onnx.ModelProto:
    """Parse a file without its large weights."""
    try:
        with open(path, "rb") as file:
            head = file.read(512)
            _check_signature(head, str(path))
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as data:
                size = len(data)
                skeleton = detach_weights(data, path.name)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    except FramingError as error:
        if error.end:
            raise ModelError(
                f"{path}: is cut short or not an ONNX model: a part that begins at byte {error.position} ends at byte "
                f"{error.end}, but the file at {size}; download or export it again"
            ) from error
        raise _not_a_model(path, f"no protobuf at byte {error.position}") from error
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(skeleton)
    except DecodeError as error:
        raise _not_a_model(path, "its protobuf does not parse") from error
    return proto


def _not_a_model(path: Path, why: str) -> ModelError:
    return ModelError(f"{path}: is not an ONNX model ({why}); give an .onnx file, or export or download it again")


def _check_signature(head: bytes, where: str) -> None:
    """Refuse files that are plainly something else."""
    if not head:
        raise ModelError(f"{where}: is empty (0 bytes); export or download it again")
    for offset, signature, what, remedy in _SIGNATURES:
        if head.startswith(signature, offset):
            raise ModelError(f"{where}: is {what}, not an ONNX model; {remedy}")
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head):
        raise ModelError(f"{where}: is text, not an ONNX model; give an .onnx file, or download it again")


def _check_versions(proto: onnx.ModelProto, where: str) -> None:
    """Refuse what is no model, and models newer than the runtime."""
    if not proto.HasField("graph"):
        raise ModelError(f"{where}: holds no graph, so it is not a complete ONNX model; export or download it again")
    if proto.ir_version < 1:
        raise ModelError(f"{where}: states no IR version, so it is not an ONNX model; export or download it again")
    if proto.ir_version > MAX_IR_VERSION:
        raise ModelError(
            f"{where}: has IR version {proto.ir_version}, but {RUNTIME} reads up to {MAX_IR_VERSION}; "
            f"load it with onnx.load, set ir_version = {MAX_IR_VERSION} and save it"
        )
    if not proto.opset_import:
        raise ModelError(f"{where}: imports no operator set (opset); export it again")
    for domain, version in _opsets(proto).items():
        known = MAX_OPSETS.get(domain)
        if version < 1:
            raise ModelError(f"{where}: imports opset {version} of '{domain or 'ai.onnx'}'; export it again")
        if known is not None and version > known:
            raise ModelError(
                f"{where}: imports opset {version} of '{domain or 'ai.onnx'}', but {RUNTIME} knows up to {known}; "
                f"export it for opset {known}, or convert it with onnx.version_converter"
            )
    if not proto.graph.output:
        raise ModelError(f"{where}: its graph has no outputs, so it computes nothing; export it again")


def _opsets(proto: onnx.ModelProto) -> dict[str, int]:
    """Each operator set once, at its highest version."""
    opsets: dict[str, int] = {}
    for entry in proto.opset_import:
        domain = "" if entry.domain == "ai.onnx" else entry.domain
        opsets[domain] = max(entry.version, opsets.get(domain, entry.version))
    return opsets


def _normalize_opsets(model: ir.Model, proto: onnx.ModelProto) -> None:
    """Import each operator set once; and com.microsoft, which the runtime implies, where a node needs it."""
    opsets = model.graph.opset_imports
    opsets.clear()
    opsets.update(_opsets(proto))
    implied = "com.microsoft"
    if any(node.domain == implied for node in ir.traversal.RecursiveGraphIterator(model.graph)):
        opsets.setdefault(implied, MAX_OPSETS[implied])


def _place_external(model: ir.Model, files: ExternalFiles) -> None:
    """Tell every external tensor where its file is."""
    for graph in _all_graphs(model):
        for value in graph.initializers.values():
            value.const_value = _placed(value.const_value, files)
    containers: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for container in containers:
        for node in ir.traversal.RecursiveGraphIterator(container):
            for name, attribute in list(node.attributes.items()):
                if attribute.is_ref():
                    continue
                if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                    node.attributes[name] = ir.AttrTensor(name, _placed(attribute.value, files))
                elif attribute.type == ir.AttributeType.TENSORS:
                    node.attributes[name] = ir.AttrTensors(name, [_placed(t, files) for t in attribute.value])


def _all_graphs(model: ir.Model) -> Iterator[ir.Graph]:
    yield from model.graphs()
    for function in model.functions.values():
        yield from function.subgraphs()


def _placed(tensor: Any, files: ExternalFiles) -> Any:
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor
    length = tensor.length if tensor.length is not None else tensor.nbytes
    return MappedTensor(
        tensor.location,
        tensor.offset,
        length,
        tensor.dtype,
        shape=tensor.shape,
        name=tensor.name,
        doc_string=tensor.doc_string,
        metadata_props=tensor.metadata_props,
        base_dir=os.path.abspath(files.folder or ""),
    )


def _root_cause(error: BaseException) -> str:
    """The first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().split("\n")[0].split(". Please")[0][:300] or type(error).__name__
