"""A tensor in a file, mapped anew each time it is read."""

import math
from typing import Any

import numpy as np
import onnx_ir as ir

__all__ = ["MappedTensor", "map_bytes"]


def map_bytes(tensor: ir.ExternalTensor) -> np.ndarray:
    """The stored bytes, uint8 ``[nbytes]``, as a read-only mapping that ends with the array's life."""
    count = math.ceil(tensor.size * tensor.dtype.itemsize)
    if count == 0:
        return np.empty(0, np.uint8)
    return np.asarray(np.memmap(tensor.path, np.uint8, "r", tensor.offset or 0, (count,)))


class MappedTensor(ir.ExternalTensor):
    """External data of which nothing stays open or in memory between two reads.

    `onnx_ir.ExternalTensor` maps the whole file at the first read and keeps that mapping, and a file descriptor, for
    good: a thousand tensors reach the usual limit on open files. It also refuses every file with two names, as caches
    have them; the loader has looked where they lead.
    """

    __slots__ = ()

    def numpy(self) -> np.ndarray:
        """The values: a mapping, or below 8 bits an unpacked copy."""
        data = map_bytes(self)
        if self.dtype.bitwidth < 8:
            packed = ir.PackedTensor(np.array(data), self.dtype, shape=self.shape)
            return np.asarray(packed.numpy())
        return np.asarray(data.view(self.dtype.numpy().newbyteorder("<")).reshape(self.shape.numpy()))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.numpy(), dtype, copy=copy)

    def tobytes(self) -> bytes:
        """The stored bytes, copied."""
        return map_bytes(self).tobytes()

    def tofile(self, file: Any) -> None:
        """Write the stored bytes to a binary file."""
        file.write(map_bytes(self).data)
