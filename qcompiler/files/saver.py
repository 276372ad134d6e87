"""From an `onnx_ir` model to files: all or none, the same bytes for the same model, one tensor in memory at a time."""

import json
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir

from qcompiler.errors import ModelError, OutputError
from qcompiler.files.data_file import INLINE_BYTES, LARGE_BYTES, DataFile, tensor_bytes, tensor_header
from qcompiler.files.loader import GENAI_CONFIG, resolve_model_path, source_of
from qcompiler.files.transaction import OutputTransaction, check_folder, check_output
from qcompiler.files.versions import required_ir_version
from qcompiler.graph import EXTERNAL_BYTES

__all__ = [
    "OutputTransaction",
    "check_destination",
    "copy_companions",
    "data_path",
    "file_bytes",
    "input_files",
    "save_folder",
    "save_model",
    "serialize_model",
    "write_model",
]

# A protobuf message ends here; a little is left for the graph itself.
_MESSAGE_BYTES = (1 << 31) - (1 << 24)
_CHUNK = 1 << 24


def data_path(path: Path) -> Path:
    """Where the external data of the model file `path` goes."""
    return path.with_name(path.name + ".data")


def file_bytes(paths: Iterable[Path]) -> int:
    """Size of all these files together."""
    return sum(path.stat().st_size for path in paths)


def check_destination(path: Path, model: ir.Model, *, force: bool, folder: bool = False) -> None:
    """Find out before the work whether `save_model`, or `save_folder`, would refuse its destination.

    Args:
        path: The model file to be, or the folder to be.
        model: What was loaded; its files are never overwritten.
        force: Whether an existing output may be replaced.
        folder: Whether `path` is a folder.

    Raises:
        OutputError: See `check_output`.
    """
    source = source_of(model)
    if folder:
        check_folder(path if path.exists() else path.parent, path)
        path = path / (source.path.name if source.path is not None else "model.onnx")
        if not path.parent.exists():
            return
    for file in (path, data_path(path)):
        check_output(file, force=force, protect=source.files)


def save_model(model: ir.Model, path: Path, *, force: bool, external: bool | None = None) -> list[Path]:
    """Write a model; the model is the same afterwards as before.

    Initializers above 1 KiB go to a data file beside the model file if there are more than 64 MiB of them or the
    model came with such a file; tensors of equal bytes are stored once.

    Args:
        model: What to write.
        path: The model file. Its folder must exist.
        force: Whether existing files may be replaced. The files that the model was loaded from never are.
        external: Whether to write a data file, if that is not to be decided by size.

    Returns:
        The model file, and the data file if there is one.

    Raises:
        OutputError: The output exists, or cannot be written; nothing is left behind then.
    """
    path = Path(path)
    check_output(path, force=force, protect=source_of(model).files)
    with OutputTransaction(path.parent, force=force, protect=input_files(model)) as transaction:
        write_model(model, path, transaction, external=external)
        return transaction.commit()[::-1]


def save_folder(
    model: ir.Model, source_folder: Path, destination: Path, *, force: bool, external: bool | None = None
) -> list[Path]:
    """Write a model and everything that stood beside it (tokenizer, configuration) into a folder of its own.

    Args:
        model: What to write, under the name of the model file in `source_folder`.
        source_folder: The folder that the model was loaded from.
        destination: The folder to write; it is made if its parent exists.
        force: Whether files in it may be replaced.
        external: See `save_model`.

    Returns:
        The model file, its data file if there is one, and the companions.

    Raises:
        OutputError: See `save_model`.
    """
    destination = Path(destination)
    file = resolve_model_path(source_folder)
    name = file.relative_to(source_folder) if file.is_relative_to(source_folder) else Path(file.name)
    if os.path.realpath(source_folder) == os.path.realpath(destination):
        raise OutputError(f"{destination}: is the input itself, which is never overwritten; choose another folder")
    with OutputTransaction(destination, force=force, protect=input_files(model)) as transaction:
        copy_companions(
            source_folder, destination, name.as_posix(), transaction=transaction, skip=source_of(model).files
        )
        write_model(model, destination / name, transaction, external=external)
        return transaction.commit()[::-1]


def copy_companions(
    source_folder: Path,
    destination_folder: Path,
    model_name: str,
    *,
    transaction: OutputTransaction,
    skip: Collection[Path] = (),
) -> None:
    """Copy all files of a folder, and of the folders in it, but its model and what is hidden.

    Args:
        source_folder: Where from.
        destination_folder: Where to.
        model_name: The model file there, which genai_config.json will name.
        transaction: Creates the files.
        skip: More files to leave out: the model's external data.
    """
    left_out = {os.path.realpath(path) for path in (resolve_model_path(source_folder), destination_folder, *skip)}
    for folder, folders, files in os.walk(source_folder):
        here = Path(folder)
        target = Path(destination_folder) / here.relative_to(source_folder)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and os.path.realpath(here / f) not in left_out)
        for name in sorted(files):
            if name.startswith(".") or os.path.realpath(here / name) in left_out:
                continue
            if here == Path(source_folder) and name == GENAI_CONFIG:
                transaction.create(target / name).write(_renamed_decoder(here / name, model_name))
            else:
                _copy(here / name, target / name, transaction)


def _copy(source: Path, target: Path, transaction: OutputTransaction) -> None:
    output = transaction.create(target)
    try:
        with open(source, "rb") as file:
            while chunk := file.read(_CHUNK):
                output.write(chunk)
    except OSError as error:
        raise ModelError(f"{source}: cannot be read ({error.strerror}); check its permissions") from error


def _renamed_decoder(config: Path, model_name: str) -> bytes:
    """The configuration as it is, or, where the model's name changed, with the new one."""
    data = config.read_bytes()
    content = json.loads(data)
    decoder = content["model"]["decoder"]
    if decoder["filename"] == model_name:
        return data
    decoder["filename"] = model_name
    return (json.dumps(content, indent=4, ensure_ascii=False) + "\n").encode()


def input_files(model: ir.Model) -> tuple[Path, ...]:
    """Files that the model came from, or still reads: those that must not be overwritten."""
    read = {tensor.path for _, tensor in _initializers(model.graphs()) if isinstance(tensor, ir.ExternalTensor)}
    return (*source_of(model).files, *(Path(path) for path in sorted(read)))


def _initializers(graphs: Iterable[ir.Graph]) -> list[tuple[ir.Value, ir.TensorProtocol]]:
    """Initializers that have a value, with it."""
    values = [value for graph in graphs for value in graph.initializers.values()]
    return [(value, value.const_value) for value in values if value.const_value is not None]


def _function_graphs(model: ir.Model) -> Iterator[ir.Graph]:
    for function in model.functions.values():
        yield from function.subgraphs()


def _size(tensor: ir.TensorProtocol) -> int:
    """Bytes that external data would hold; strings are never external."""
    return 0 if tensor.dtype == ir.DataType.STRING else tensor.nbytes


def write_model(model: ir.Model, path: Path, transaction: OutputTransaction, *, external: bool | None = None) -> None:
    """Create the data file, if there is to be one, and then the model file; see `save_model`."""
    values = _initializers(model.graphs())
    total = sum({id(tensor): _size(tensor) for _, tensor in values}.values())
    if external is None:
        external = total > EXTERNAL_BYTES or bool(source_of(model).data_files)
    if not external and total > _MESSAGE_BYTES:
        raise OutputError(f"{path}: {total / 2**30:.1f} GiB of weights do not fit into one file; allow external data")
    stored = {value: _inline(tensor, value.name or "") for value, tensor in _initializers(_function_graphs(model))}
    data: DataFile | None = None
    # Large tensors first: most of them are whole pages, so that hardly a byte is lost between them.
    for value, tensor in sorted(values, key=lambda pair: _size(pair[1]) < LARGE_BYTES):
        if not external or _size(tensor) <= INLINE_BYTES:
            stored[value] = _inline(tensor, value.name or "")
            continue
        if data is None:
            data = DataFile(transaction.create(data_path(path)), data_path(path).name)
        stored[value] = data.store(tensor, value.name or "")
    proto = serialize_model(model, stored)
    stored.clear()
    if proto.ByteSize() >= 1 << 31:
        raise OutputError(f"{path}: does not fit into one file of 2 GiB; allow external data")
    transaction.create(path).write(proto.SerializeToString(deterministic=True))


def _inline(tensor: ir.TensorProtocol, name: str) -> onnx.TensorProto:
    """A message that holds the tensor's values."""
    header = tensor_header(tensor, name)
    if tensor.dtype == ir.DataType.STRING:
        header.string_data.extend(ir.serde.serialize_tensor(tensor).string_data)
    else:
        header.raw_data = tensor_bytes(tensor).tobytes()
    return header


def serialize_model(model: ir.Model, stored: dict[ir.Value, onnx.TensorProto]) -> onnx.ModelProto:
    """The model as a message, with these messages for its initializers; no tensor of an initializer is evaluated.

    Args:
        model: What to serialize; the same afterwards as before.
        stored: What to write for each initializer.

    Returns:
        A message whose IR version is what the model needs.
    """
    try:
        with _replaced(model, stored):
            proto = ir.serde.serialize_model(model)
    except ir.serde.SerdeError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ModelError(f"the model cannot be serialized: {cause}; export it again") from error
    proto.ir_version = required_ir_version(model)
    return proto


@contextmanager
def _replaced(model: ir.Model, stored: dict[ir.Value, onnx.TensorProto]) -> Iterator[None]:
    """Exchange initializers for messages, and attributes that point into other files for their values, for a while."""
    initializers = [(value, value.const_value) for value in stored]
    attributes: list[tuple[ir.Node, ir.Attr]] = []
    containers: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    try:
        for value, proto in stored.items():
            value.const_value = ir.serde.TensorProtoTensor(proto)
        for container in containers:
            for node in ir.traversal.RecursiveGraphIterator(container):
                for attribute in list(node.attributes.values()):
                    inline = _self_contained(attribute)
                    if inline is not attribute:
                        attributes.append((node, attribute))
                        node.attributes[attribute.name] = inline
        yield
    finally:
        for value, tensor in initializers:
            value.const_value = tensor
        for node, attribute in attributes:
            node.attributes[attribute.name] = attribute


def _self_contained(attribute: ir.Attr) -> ir.Attr:
    """The attribute, or, if it points into another file, one that holds the values itself."""
    if attribute.is_ref() or attribute.type not in (ir.AttributeType.TENSOR, ir.AttributeType.TENSORS):
        return attribute
    single = attribute.type == ir.AttributeType.TENSOR
    tensors = [attribute.value] if single else list(attribute.value)
    if not any(isinstance(tensor, ir.ExternalTensor) for tensor in tensors):
        return attribute
    inline = [ir.serde.TensorProtoTensor(_inline(tensor, tensor.name or "")) for tensor in tensors]
    make = ir.AttrTensor(attribute.name, inline[0]) if single else ir.AttrTensors(attribute.name, inline)
    make.doc_string = attribute.doc_string
    return make
