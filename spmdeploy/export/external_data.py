"""Stores large weights once in an ONNX external data file that several graphs share.

The `edit` graph, its variant for CPUs and `refine`, the last stage alone, have the same weights. Graphs refer to
their tensors by offset and length.
"""

from __future__ import annotations

import hashlib
from math import prod
from pathlib import Path

import onnx
from onnx import TensorProto, numpy_helper

ELEMENTS = 1024
"""Smaller tensors stay in the graph: a reference costs about a hundred bytes."""

ALIGNMENT = 64
"""Alignment of every tensor in bytes: a cache line, for libraries that use the memory-mapped file."""

_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16)  # shapes and indices must be known when a graph is parsed


class WeightStore:
    """An external data file to which graphs are added one after the other; written tensors never move."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._places: dict[str, int] = {}
        self._end = 0
        path.touch()

    def without_weights(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """Return a copy of `model` that refers to its large weights in this file; adds missing ones."""
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        with open(self._path, "ab") as stream:
            for tensor in copy.graph.initializer:
                if tensor.data_type in _TYPES and prod(tensor.dims) >= ELEMENTS:
                    content = numpy_helper.to_array(tensor).tobytes()
                    digest = hashlib.sha256(content).hexdigest()
                    if digest not in self._places:
                        padding = -self._end % ALIGNMENT
                        stream.write(bytes(padding) + content)
                        self._places[digest] = self._end + padding
                        self._end += padding + len(content)
                    self._move(tensor, self._places[digest], len(content))
        return copy

    def _move(self, tensor: TensorProto, start: int, length: int) -> None:
        for values in ("raw_data", "float_data", "int32_data"):
            tensor.ClearField(values)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self._path.name), ("offset", str(start)), ("length", str(length))):
            tensor.external_data.add(key=key, value=value)
