"""Weights stored inside a model file, seen as external data of that very file.

A protobuf parser copies every weight into memory and keeps it there for the life of the model. Reading the file's
framing first and leaving the large weights out of what is parsed makes them memory-mapped, like weights in a file of
their own.

The framing (https://protobuf.dev/programming-guides/encoding): a message is a row of fields, each a tag (number << 3 |
kind) and a payload that is a varint (kind 0), 8 bytes (1), a length and that many bytes (2), or 4 bytes (5).
"""

from collections.abc import Iterator
from typing import NamedTuple

import onnx

__all__ = ["DETACH_BYTES", "FramingError", "detach_weights"]

# Smaller weights cost less in memory than a mapping and a file descriptor each.
DETACH_BYTES = 1 << 16

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_GRAPH, _INITIALIZER = 7, 5
_DATA_TYPE, _FLOAT_DATA, _RAW_DATA, _DATA_LOCATION = 2, 4, 9, 14


class FramingError(Exception):
    """Bytes that are no protobuf message.

    Attributes:
        end: Where a field would end that reaches past the last byte, or 0 if the bytes are wrong in another way.
    """

    def __init__(self, position: int, end: int = 0) -> None:
        """Mark what is wrong at byte `position`."""
        super().__init__(f"byte {position} is not a protobuf field")
        self.position, self.end = position, end


class _Field(NamedTuple):
    number: int
    kind: int
    start: int
    payload: int
    end: int


def detach_weights(data: memoryview, location: str) -> bytes:
    """Serialized model without its large inline initializers.

    Args:
        data: A serialized ModelProto.
        location: Name of the file that holds `data`, which the initializers left out refer to.

    Returns:
        A serialized ModelProto, the same but for those initializers, which are external data now.

    Raises:
        FramingError: `data` is not a protobuf message, or is cut short.
    """
    parts: list[bytes] = []
    for field in _fields(data, 0, len(data)):
        graph = _without_weights(data, field, location) if (field.number, field.kind) == (_GRAPH, _BYTES) else None
        parts.append(bytes(data[field.start : field.end]) if graph is None else _message(_GRAPH, graph))
    return b"".join(parts)


def _without_weights(data: memoryview, graph: _Field, location: str) -> bytes | None:
    """The payload of a graph without its large initializers, or None if it has none."""
    parts: list[bytes] = []
    copied = graph.payload
    for field in _fields(data, graph.payload, graph.end):
        if (field.number, field.kind) != (_INITIALIZER, _BYTES) or field.end - field.payload < DETACH_BYTES:
            continue
        stub = _stub(data, field, location)
        if stub is not None:
            parts += [bytes(data[copied : field.start]), _message(_INITIALIZER, stub)]
            copied = field.end
    if not parts:
        return None
    return b"".join([*parts, bytes(data[copied : graph.end])])


def _stub(data: memoryview, tensor: _Field, location: str) -> bytes | None:
    """A tensor whose values are replaced by where they lie, or None if they are not one run of little-endian bytes."""
    fields = list(_fields(data, tensor.payload, tensor.end))
    scalars = {field.number: _varint(data, field.payload)[0] for field in fields if field.kind == _VARINT}
    if scalars.get(_DATA_LOCATION) == onnx.TensorProto.EXTERNAL:
        return None
    carriers = {_RAW_DATA, _FLOAT_DATA} if scalars.get(_DATA_TYPE) == onnx.TensorProto.FLOAT else {_RAW_DATA}
    values = [field for field in fields if field.number in carriers and field.kind == _BYTES]
    if len(values) != 1 or values[0].end - values[0].payload < DETACH_BYTES:
        return None
    place = onnx.TensorProto(data_location=onnx.TensorProto.EXTERNAL)
    length = values[0].end - values[0].payload
    for key, value in (("location", location), ("offset", values[0].payload), ("length", length)):
        place.external_data.add(key=key, value=str(value))
    kept = [bytes(data[field.start : field.end]) for field in fields if field is not values[0]]
    return b"".join([*kept, place.SerializeToString()])


def _fields(data: memoryview, position: int, end: int) -> Iterator[_Field]:
    """The fields of the message in ``data[position:end]``."""
    while position < end:
        start = position
        tag, position = _varint(data, position)
        number, kind = tag >> 3, tag & 7
        payload = position
        if kind == _VARINT:
            position = _varint(data, position)[1]
        elif kind == _BYTES:
            length, payload = _varint(data, position)
            position = payload + length
        elif kind in (_FIXED64, _FIXED32):
            position += 8 if kind == _FIXED64 else 4
        if number == 0 or kind not in (_VARINT, _FIXED64, _BYTES, _FIXED32):
            raise FramingError(start)
        if position > end:
            raise FramingError(start, position)
        yield _Field(number, kind, start, payload, position)


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """A variable-length number and the position after it."""
    value = shift = 0
    for here in range(position, min(position + 10, len(data))):
        byte = data[here]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, here + 1
        shift += 7
    raise FramingError(position, len(data) + 1 if position + 10 > len(data) else 0)


def _message(number: int, payload: bytes) -> bytes:
    """A field that holds bytes."""
    length, head = len(payload), [number << 3 | _BYTES]
    while length >= 0x80:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([*head, length]) + payload
