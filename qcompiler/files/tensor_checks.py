"""Checks on the tensors of a stored model: that each has the bytes its shape asks for, where it says they are."""

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
import onnx_ir as ir

from qcompiler.errors import ModelError
from qcompiler.files.graph_checks import attribute_graphs, describe_node

__all__ = ["ExternalFiles", "check_tensors"]

_LFS = b"version https://git-lfs"
# Values of a tensor that one entry of each field holds; what is not listed is one for one.
_PER_ENTRY = {
    ir.DataType.UINT4: 2,
    ir.DataType.INT4: 2,
    ir.DataType.FLOAT4E2M1: 2,
    ir.DataType.UINT2: 4,
    ir.DataType.INT2: 4,
    ir.DataType.COMPLEX64: 0.5,
    ir.DataType.COMPLEX128: 0.5,
}
_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")


class ExternalFiles:
    """The files beside a model that hold tensors; each is looked up once.

    A link is followed as far as ONNX Runtime does: within the model's folder, or within the folder that the model file
    itself is a link into, as in a download cache.
    """

    def __init__(self, where: str, folder: Path | None, model_file: Path | None) -> None:
        """Look below `folder`; without one, a model that needs a file is refused."""
        self.where, self.folder = where, folder
        roots = [folder] if folder is not None else []
        if model_file is not None:
            roots.append(model_file.resolve().parent)
        self._roots = [root.resolve() for root in roots]
        self._sizes: dict[str, int] = {}
        self.paths: dict[str, Path] = {}

    def size(self, location: str, tensor: str) -> int:
        """Bytes of the file at `location`; raises ModelError if it is missing or not to be read."""
        if location not in self._sizes:
            self._find(location, tensor)
        return self._sizes[location]

    def _find(self, location: str, tensor: str) -> None:
        def refuse(what: str) -> ModelError:
            return ModelError(f"{self.where}: tensor '{tensor}' is stored in '{location}', {what}")

        if not location:
            raise ModelError(f"{self.where}: tensor '{tensor}' is external but names no file; export the model again")
        if PurePosixPath(location).is_absolute() or PureWindowsPath(location).drive:
            raise refuse("an absolute path; save the model again with its data file in its own folder")
        if self.folder is None:
            raise refuse("but a model in memory has no folder; pass base_dir, the folder of that file")
        path = self.folder / location
        if os.path.normpath(location).split(os.sep)[0] == os.pardir:
            raise refuse("outside the model's folder; move the file beside the model and save the model again")
        real = path.resolve()
        if not any(real.is_relative_to(root) for root in self._roots):
            raise refuse(f"a link that leaves the model's folder for '{real}'; put a copy of the file in its place")
        if not real.is_file():
            what = "which is not a file" if real.exists() else f"which is missing from '{path.parent}'"
            raise refuse(f"{what}; put the data file that came with the model there")
        with open(real, "rb") as file:
            if file.read(len(_LFS)) == _LFS:
                raise refuse("which is a pointer of git-lfs and holds no data; fetch it with 'git lfs pull'")
        self._sizes[location] = real.stat().st_size
        self.paths[location] = path


def check_tensors(model: onnx.ModelProto, where: str, files: ExternalFiles) -> None:
    """Check every initializer and every tensor attribute, in bodies and functions too.

    Args:
        model: The stored model.
        where: What messages begin with: the file's name.
        files: Where external data lies.

    Raises:
        ModelError: A tensor of unknown dtype or impossible shape, whose data is missing, too short or too long.
    """
    for tensor, owner in _tensors(model):
        _check_tensor(tensor, owner, where, files)


def _tensors(model: onnx.ModelProto) -> Iterator[tuple[onnx.TensorProto, str]]:
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from _node_tensors(function.node)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[tuple[onnx.TensorProto, str]]:
    for tensor in graph.initializer:
        yield tensor, f"tensor '{tensor.name}'"
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[tuple[onnx.TensorProto, str]]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t, f"attribute '{attribute.name}' of {describe_node(node)}"
            elif attribute.type == onnx.AttributeProto.TENSORS:
                for tensor in attribute.tensors:
                    yield tensor, f"attribute '{attribute.name}' of {describe_node(node)}"
        for graph in attribute_graphs(node):
            yield from _graph_tensors(graph)


def _check_tensor(tensor: onnx.TensorProto, owner: str, where: str, files: ExternalFiles) -> None:
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError:
        dtype = ir.DataType.UNDEFINED
    if dtype == ir.DataType.UNDEFINED:
        raise ModelError(f"{where}: {owner} has the unknown data type {tensor.data_type}; export the model again")
    dims = list(tensor.dims)
    if any(size < 0 for size in dims):
        raise ModelError(f"{where}: {owner} has the impossible shape {dims}; export the model again")
    count = math.prod(dims)
    if dtype == ir.DataType.STRING:
        have, need, unit = len(tensor.string_data), count, "strings"
    elif tensor.data_location == onnx.TensorProto.EXTERNAL:
        have, need, unit = _external_bytes(tensor, owner, where, files), math.ceil(count * dtype.itemsize), "bytes"
    elif tensor.HasField("raw_data") or not any(len(getattr(tensor, name)) for name in _FIELDS):
        have, need, unit = len(tensor.raw_data), math.ceil(count * dtype.itemsize), "bytes"
    else:
        have = sum(len(getattr(tensor, name)) for name in _FIELDS)
        need, unit = math.ceil(count / _PER_ENTRY.get(dtype, 1)), "entries"
    if have != need:
        raise ModelError(
            f"{where}: {owner} has {have} {unit}, but its shape {dims} of {dtype} needs {need}; "
            "the file is damaged: export or download it again"
        )


def _external_bytes(tensor: onnx.TensorProto, owner: str, where: str, files: ExternalFiles) -> int:
    """Bytes that the tensor claims in its file (what it needs, if it claims none), which the file is known to have."""
    entries = {str(entry.key): str(entry.value) for entry in tensor.external_data}
    location = entries.get("location", "")
    size = files.size(location, tensor.name)
    try:
        offset = int(entries.get("offset") or 0)
        wanted = math.ceil(math.prod(tensor.dims) * ir.DataType(tensor.data_type).itemsize)
        length = int(entries["length"]) if entries.get("length") else wanted
    except ValueError:
        offset = length = -1
    if offset < 0 or length < 0:
        raise ModelError(f"{where}: {owner} has an offset or length that is no number of bytes; export the model again")
    if offset + length > size:
        raise ModelError(
            f"{where}: {owner} needs bytes {offset} to {offset + length} of '{location}', which ends at {size}; "
            "the data file is cut short: download or export it again"
        )
    return length
