"""The file of external data: every tensor's bytes once, aligned, in an order that depends on the model alone."""

import hashlib
import math
import sys
from collections import defaultdict
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from qcompiler.files.mapped_tensor import map_bytes
from qcompiler.files.transaction import OutputFile

__all__ = ["INLINE_BYTES", "LARGE_BYTES", "DataFile", "tensor_bytes", "tensor_header"]

# Tensors up to this size stay in the model file, where shape inference sees them.
INLINE_BYTES = 1024
# From this size on a tensor begins on a page of its own, as mapping it prefers; below, pages would cost over 0.3 %.
LARGE_BYTES = 1 << 20
_PAGE, _LINE = 4096, 64
_CHUNK = 1 << 20
_SAMPLES = 1024


class DataFile:
    """Writes tensors one after the other; a tensor whose bytes are there already is not written again."""

    def __init__(self, file: OutputFile, location: str) -> None:
        """Write to `file`, to which tensors refer as `location`."""
        self._file, self._location = file, location
        self._offsets: dict[tuple[int, bytes], list[int]] = defaultdict(list)

    def store(self, tensor: ir.TensorProtocol, name: str) -> onnx.TensorProto:
        """Write a tensor and return the message that refers to it; no more than this tensor is in memory meanwhile."""
        data = tensor_bytes(tensor)
        key = (len(data), _sample(data))
        offset = next((offset for offset in self._offsets[key] if self._holds(data, offset)), None)
        if offset is None:
            self._file.align(_PAGE if len(data) >= LARGE_BYTES else _LINE)
            offset = self._file.position
            self._file.write(data.data)
            self._offsets[key].append(offset)
        header = tensor_header(tensor, name)
        header.data_location = onnx.TensorProto.EXTERNAL
        for entry, value in (("location", self._location), ("offset", offset), ("length", len(data))):
            header.external_data.add(key=entry, value=str(value))
        return header

    def _holds(self, data: np.ndarray, offset: int) -> bool:
        """Whether the bytes at `offset` are exactly these."""
        view = data.data
        return all(
            self._file.read(offset + start, len(part)) == part
            for start in range(0, len(view), _CHUNK)
            for part in (view[start : start + _CHUNK],)
        )


def _sample(data: np.ndarray) -> bytes:
    """A digest of evenly spaced bytes: tells most tensors apart without reading them whole."""
    return hashlib.blake2b(data[:: max(1, len(data) // _SAMPLES)].tobytes(), digest_size=16).digest()


def tensor_header(tensor: ir.TensorProtocol, name: str) -> onnx.TensorProto:
    """Everything about a tensor but its values."""
    header = onnx.TensorProto(name=name, data_type=int(tensor.dtype), dims=[int(size) for size in tensor.shape.numpy()])
    if tensor.doc_string:
        header.doc_string = tensor.doc_string
    for key in sorted(tensor.metadata_props):
        header.metadata_props.add(key=key, value=tensor.metadata_props[key])
    return header


def tensor_bytes(tensor: ir.TensorProtocol) -> np.ndarray:
    """A tensor's values as they are stored: uint8 ``[nbytes]``, little endian, packed below 8 bits.

    External data is mapped, not read; arrays in memory are not copied where they are contiguous.
    """
    count = math.ceil(math.prod(tensor.shape.numpy()) * tensor.dtype.itemsize)
    data: Any
    if count == 0:
        data = np.empty(0, np.uint8)
    elif isinstance(tensor, ir.ExternalTensor):
        data = map_bytes(tensor)
    elif isinstance(tensor, ir.PackedTensor):
        data = np.ascontiguousarray(tensor.numpy_packed()).reshape(-1)
    elif tensor.dtype.bitwidth < 8 or sys.byteorder == "big":
        data = np.frombuffer(tensor.tobytes(), np.uint8)
    else:
        array = tensor.numpy()
        data = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)
    assert len(data) == count, f"tensor '{tensor.name}' has {len(data)} bytes, not {count}"
    return np.asarray(data)
