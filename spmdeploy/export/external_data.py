"""Stores large weights once in an ONNX external data file that several graphs share.

The `edit` graph, its variant for CPUs and `refine`, the last stage alone, have the same weights; the FP16 graphs have
convolutions whose weights are those of several others, one after the other. Graphs refer to their tensors by offset and
length.
"""

from __future__ import annotations

from collections import defaultdict
from math import prod
from pathlib import Path

import onnx
from onnx import TensorProto, numpy_helper

from spmdeploy.export.onnx import model_of_nodes

ELEMENTS = 1024
"""Smaller tensors stay in the graph: a reference costs about a hundred bytes."""

ALIGNMENT = 64
"""Alignment of every tensor in bytes: a cache line, for libraries that use the memory-mapped file."""

_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16)  # shapes and indices must be known when a graph is parsed


class WeightStore:
    """An external data file to which graphs are added one after the other; written tensors never move."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._starts: defaultdict[bytes, list[int]] = defaultdict(list)
        """Offsets of the output channels of the tensors, by their first bytes."""
        self._end = 0
        path.touch()

    def without_weights(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """Return a copy of `model` that refers to its large weights in this file; adds missing ones."""
        graph = model.graph
        tensors = [self._stored(tensor) for tensor in graph.initializer]
        return model_of_nodes(model, graph.node, tensors, graph.input, graph.output, graph.value_info)

    def _stored(self, tensor: TensorProto) -> TensorProto:
        """The tensor, or one that refers to its content in this file."""
        if tensor.data_type not in _TYPES or prod(tensor.dims) < ELEMENTS:
            return tensor
        content = numpy_helper.to_array(tensor).tobytes()
        start = self._find(content)
        if start is None:
            start = self._append(content, tensor.dims[0])
        reference = TensorProto(
            name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, data_location=TensorProto.EXTERNAL
        )
        for key, value in (("location", self._path.name), ("offset", str(start)), ("length", str(len(content)))):
            reference.external_data.add(key=key, value=value)
        return reference

    def _find(self, content: bytes) -> int | None:
        """Where written tensors hold this content: one, several without padding between them, or a part of one."""
        with open(self._path, "rb") as stream:
            for start in self._starts[content[:ALIGNMENT]]:
                stream.seek(start)
                if stream.read(len(content)) == content:
                    return start
        return None

    def _append(self, content: bytes, channels: int) -> int:
        start = self._end + -self._end % ALIGNMENT
        with open(self._path, "ab") as stream:
            stream.write(bytes(start - self._end) + content)
        for offset in range(0, len(content), len(content) // channels):
            if offset % ALIGNMENT == 0:
                self._starts[content[offset : offset + ALIGNMENT]].append(start + offset)
        self._end = start + len(content)
        return start
