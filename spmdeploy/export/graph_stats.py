"""Counts operations, precisions and work of an ONNX graph from the graph itself."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import Literal

import onnx
from onnx import TensorProto

_FLOATS = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16"}


@dataclass(frozen=True)
class GraphFacts:
    """Statistics of the nodes that compute in floating point; casts and constants are not counted."""

    nodes: int
    opset: int
    weights_dtype: Literal["float32", "float16"]
    """Type of most of the stored weights, by elements."""
    fp16_operations: int
    fp32_operations: dict[str, int]
    """By ONNX operator."""
    gflop: float
    """Operations of the convolutions per image of the batch, 2 per multiply-add, in units of 1e9. Convolutions whose
    size depends on the mask are not counted."""

    @property
    def fp16_share(self) -> float:
        """Share of the floating-point operations that compute in FP16, 0..1."""
        return self.fp16_operations / ((self.fp16_operations + sum(self.fp32_operations.values())) or 1)


def graph_facts(model: onnx.ModelProto) -> GraphFacts:
    """Return the statistics of a graph with inferred shapes (`with_shapes`)."""
    graph = model.graph
    values = (*graph.input, *graph.value_info, *graph.output)
    types = {value.name: value.type.tensor_type for value in values}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    elem_types = {name: value.elem_type for name, value in types.items()}
    elem_types |= {name: tensor.data_type for name, tensor in weights.items()}

    operations: dict[str, Counter[str]] = {"fp32": Counter(), "fp16": Counter()}
    multiply_adds = 0
    for node in graph.node:
        # Operators with one type variable compute in the type of their first input; Cast has none and computes nothing.
        precision = _FLOATS.get(elem_types.get(node.input[0], 0)) if node.input else None
        if precision is None or node.op_type == "Cast":
            continue
        operations[precision][node.op_type] += 1
        if node.op_type == "Conv":
            kernel = _shape_of_weight(node.input[1], weights, graph)
            size = [dim.dim_value for dim in types[node.output[0]].shape.dim[2:]]
            multiply_adds += prod(kernel) * prod(size)

    stored: Counter[int] = Counter()
    for tensor in graph.initializer:
        stored[tensor.data_type] += prod(tensor.dims)
    return GraphFacts(
        nodes=len(graph.node),
        opset=next(entry.version for entry in model.opset_import if not entry.domain),
        weights_dtype="float16" if stored[TensorProto.FLOAT16] > stored[TensorProto.FLOAT] else "float32",
        fp16_operations=operations["fp16"].total(),
        fp32_operations=dict(operations["fp32"]),
        gflop=2 * multiply_adds / 1e9,
    )


def _shape_of_weight(name: str, weights: dict[str, TensorProto], graph: onnx.GraphProto) -> list[int]:
    """Shape of a kernel, also if its weights are stored as halves behind a cast, or gathered."""
    while name not in weights:
        name = next(node.input[0] for node in graph.node if name in node.output)
    return list(weights[name].dims)
