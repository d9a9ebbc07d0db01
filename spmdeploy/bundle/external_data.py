"""Lists the external data files that an ONNX graph refers to.

Libraries open any file that a graph names, so every name is checked before a graph is loaded. The names cannot be found
by searching for bytes: of a field that a message holds twice the last one counts, and unknown fields may hold anything.
So the messages of ONNX that lead to a tensor are parsed as protobuf does, and all others are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator

# The fields of each message that lead to external data, from onnx.proto. Messages not named here end with an error.
_MODEL, _GRAPH, _NODE, _ATTRIBUTE, _TENSOR, _SPARSE, _FUNCTION, _TRAINING = range(8)
_FIELDS: dict[int, dict[int, int]] = {
    _MODEL: {7: _GRAPH, 20: _TRAINING, 25: _FUNCTION},
    _GRAPH: {1: _NODE, 5: _TENSOR, 15: _SPARSE},
    _NODE: {5: _ATTRIBUTE},
    _ATTRIBUTE: {5: _TENSOR, 6: _GRAPH, 10: _TENSOR, 11: _GRAPH, 22: _SPARSE, 23: _SPARSE},
    _SPARSE: {1: _TENSOR, 2: _TENSOR},
    _FUNCTION: {7: _NODE, 11: _ATTRIBUTE},
    _TRAINING: {1: _GRAPH, 2: _GRAPH},
    _TENSOR: {},
}
_EXTERNAL_DATA, _KEY, _VALUE = 13, 1, 2
_MAX_DEPTH = 100  # that of protobuf


def external_locations(model: bytes) -> set[bytes]:
    """The values of all `location` entries in a serialized ModelProto.

    Raises:
        ValueError: It is no valid protobuf message.
    """
    if model[4:8] == b"ORTM":
        raise ValueError("a model in ONNX Runtime's own format")
    found: set[bytes] = set()
    pending = [(_MODEL, 0, len(model), 0)]
    while pending:
        kind, start, end, depth = pending.pop()
        if depth > _MAX_DEPTH:
            raise ValueError("messages are nested too deeply")
        if model.find(b"location", start, end) < 0:  # strings are stored as they are: most messages can be skipped
            continue
        inner = _FIELDS[kind]
        for number, first, last in _fields(model, start, end):
            if number in inner:
                pending.append((inner[number], first, last, depth + 1))
            elif kind == _TENSOR and number == _EXTERNAL_DATA:
                entry = {field: model[a:b] for field, a, b in _fields(model, first, last)}  # the last one counts
                if entry.get(_KEY) == b"location":
                    found.add(entry.get(_VALUE, b""))
    return found


def _fields(model: bytes, position: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of every length-delimited field of a message; others are skipped."""
    while position < end:
        tag, position = _varint(model, position, end)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            _, position = _varint(model, position, end)
        elif wire_type == 2:
            length, position = _varint(model, position, end)
            if position + length > end:
                raise ValueError("a field ends after its message")
            yield number, position, position + length
            position += length
        elif wire_type in (1, 5):
            position += 8 if wire_type == 1 else 4
        else:  # groups, which ONNX does not use, and undefined wire types
            raise ValueError(f"a field of wire type {wire_type}")
    if position != end:
        raise ValueError("a field ends after its message")


def _varint(model: bytes, position: int, end: int) -> tuple[int, int]:
    """A number of variable length, and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            raise ValueError("a field ends after its message")
        byte = model[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number of more than 10 bytes")
