"""An ONNX graph in two: what the layout alone decides, and the rest, which needs the image.

More than half of an edit's operations read labels and mask only. Where many images share them, that half is run once
and what it hands over is kept. Both halves are cut from the bytes of the one graph when they are wanted, so that a
bundle holds every weight once, and without the package `onnx`, which an edge device does not have: the few fields of
ONNX's protocol buffers that say who reads what are read here, everything else is carried over unseen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from spmdeploy.errors import BundleError

# Field numbers of onnx.proto3, which never change their meaning.
_MODEL_GRAPH = 7
_NODE, _INITIALIZER, _INPUT, _OUTPUT, _VALUE_INFO = 1, 5, 11, 12, 13
_NODE_INPUT, _NODE_OUTPUT, _NODE_OPERATOR = 1, 2, 4
_TENSOR_NAME = 8
_VALUE_NAME = 1
# Their bodies read values that they do not list as inputs.
_WITH_BODIES = frozenset({"If", "Loop", "Scan"})

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class GraphPartition:
    """Two ONNX models."""

    layout: bytes
    """Takes what it needs of the graph's inputs but the image; its outputs are `kept`."""
    picture: bytes
    """Takes `kept` and the rest of the inputs; its outputs are those of the graph."""
    layout_inputs: tuple[str, ...]
    picture_inputs: tuple[str, ...]
    """The image, and whatever of the layout is read beside it."""
    kept: tuple[str, ...]


class _Node(NamedTuple):
    content: memoryview
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def split_by_layout(model: bytes, image: str = "image") -> GraphPartition:
    """The halves of a serialized model whose nodes stand in order, as ONNX demands.

    Weights that lie in files beside the model stay there. Raises BundleError for what is no such model, or has
    operators with bodies.
    """
    try:
        return _split(memoryview(model), image)
    except (IndexError, KeyError, UnicodeDecodeError) as error:
        raise BundleError(f"the graph cannot be split: {error!r}", "export the bundle again") from error


def _split(model: memoryview, image: str) -> GraphPartition:
    graph = dict(_fields(model))[_MODEL_GRAPH]
    if not isinstance(graph, memoryview):
        raise KeyError(_MODEL_GRAPH)
    parts: dict[int, list[memoryview]] = {}
    for field, value in _fields(graph):
        if isinstance(value, memoryview):
            parts.setdefault(field, []).append(value)
    nodes = [_node(content) for content in parts[_NODE]]
    weights = {_text(content, _TENSOR_NAME): content for content in parts.get(_INITIALIZER, ())}
    types = {
        _text(content, _VALUE_NAME): content
        for field in (_INPUT, _VALUE_INFO, _OUTPUT)
        for content in parts.get(field, ())
    }
    inputs = [_text(content, _VALUE_NAME) for content in parts[_INPUT]]
    outputs = [_text(content, _VALUE_NAME) for content in parts[_OUTPUT]]

    of_image = _dependent(nodes, {image})
    of_layout = _dependent(nodes, set(inputs) - {image}) - of_image
    picture_nodes = _needed(nodes, outputs, without=of_layout)
    read = {name for node in picture_nodes for name in node.inputs}
    kept = tuple(name for node in nodes for name in node.outputs if name in of_layout & read)
    layout_nodes = _needed(nodes, kept, without=of_image)
    layout_inputs, picture_inputs = _given(layout_nodes, inputs), _given(picture_nodes, inputs)

    def half(chosen: list[_Node], given: Iterable[str], made: Iterable[str]) -> bytes:
        used = {name for node in chosen for name in node.inputs}
        within = {name for node in chosen for name in node.outputs} - set(made)
        content = [(_NODE, node.content) for node in chosen]
        content += [(_INITIALIZER, weights[name]) for name in weights if name in used]
        content += [(_INPUT, types[name]) for name in given] + [(_OUTPUT, types[name]) for name in made]
        content += [(_VALUE_INFO, types[name]) for name in types if name in within]
        rest = [(field, value) for field, values in parts.items() if field not in _SPLIT for value in values]
        return _with_graph(model, _message([*rest, *content]))

    return GraphPartition(
        layout=half(layout_nodes, layout_inputs, kept),
        picture=half(picture_nodes, (*picture_inputs, *kept), outputs),
        layout_inputs=layout_inputs,
        picture_inputs=picture_inputs,
        kept=kept,
    )


_SPLIT = (_NODE, _INITIALIZER, _INPUT, _OUTPUT, _VALUE_INFO)


def _dependent(nodes: list[_Node], names: set[str]) -> set[str]:
    """The values that depend on any of `names`, which are among them."""
    known = set(names)
    for node in nodes:
        if not known.isdisjoint(node.inputs):
            known.update(node.outputs)
    return known


def _needed(nodes: list[_Node], outputs: Iterable[str], without: set[str]) -> list[_Node]:
    """The nodes that `outputs` are made by, in order; the makers of `without` are somebody else's."""
    wanted = set(outputs)
    chosen = []
    for node in reversed(nodes):
        if not wanted.isdisjoint(node.outputs) and without.isdisjoint(node.outputs):
            chosen.append(node)
            wanted.update(node.inputs)
    return chosen[::-1]


def _given(nodes: list[_Node], inputs: list[str]) -> tuple[str, ...]:
    read = {name for node in nodes for name in node.inputs}
    return tuple(name for name in inputs if name in read)


# ---- protocol buffers ----


def _node(content: memoryview) -> _Node:
    inputs, outputs = [], []
    for field, value in _fields(content):
        if field == _NODE_INPUT:
            inputs.append(_decoded(value))
        elif field == _NODE_OUTPUT:
            outputs.append(_decoded(value))
        elif field == _NODE_OPERATOR and _decoded(value) in _WITH_BODIES:
            raise BundleError(f"the graph cannot be split: it has the operator {_decoded(value)}")
    return _Node(content, tuple(filter(None, inputs)), tuple(filter(None, outputs)))


def _text(content: memoryview, wanted: int) -> str:
    return next((_decoded(value) for field, value in _fields(content) if field == wanted), "")


def _decoded(value: int | memoryview) -> str:
    return str(value, "utf-8") if isinstance(value, memoryview) else ""


def _fields(content: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a message: numbers for varints, the bytes of everything else. IndexError where it ends too soon."""
    place = 0
    while place < len(content):
        key, place = _varint(content, place)
        kind = key & 7
        if kind == _VARINT:
            number, place = _varint(content, place)
            yield key >> 3, number
            continue
        length = {_FIXED64: 8, _FIXED32: 4}.get(kind)
        if length is None:
            if kind != _BYTES:
                raise IndexError(f"field of kind {kind}")
            length, place = _varint(content, place)
        if place + length > len(content):
            raise IndexError(f"{place + length - len(content)} bytes are missing")
        yield key >> 3, content[place : place + length]
        place += length


def _varint(content: memoryview, place: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = content[place]
        number |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return number, place


def _with_graph(model: memoryview, graph: bytes) -> bytes:
    """The model's other fields and another graph."""
    others: list[bytes | memoryview] = []
    for field, value in _fields(model):
        if field != _MODEL_GRAPH:
            others += [_key(field, value), value if isinstance(value, memoryview) else b""]
    return b"".join([*others, _key(_MODEL_GRAPH, graph), graph])


def _message(fields: Iterable[tuple[int, memoryview]]) -> bytes:
    return b"".join(part for field, value in fields for part in (_key(field, value), value))


def _key(field: int, value: int | bytes | memoryview) -> bytes:
    """What stands before the bytes of a field; of a number, all of it."""
    if isinstance(value, int):
        return _number(field << 3 | _VARINT) + _number(value)
    return _number(field << 3 | _BYTES) + _number(len(value))


def _number(value: int) -> bytes:
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    parts.append(value)
    return bytes(parts)
