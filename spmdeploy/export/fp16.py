"""Converts an FP32 graph to FP16 by the types in the graph.

TensorRT 11 and TensorRT-RTX have no precision flags: an engine computes in the types of the graph. So the precision is
decided here and can be read from the file. Exceptions that stay in FP32:

- instance normalization: the squares of a 256×256 channel overflow half precision;
- the deploy graph's own arithmetic on 8-bit pixels: a half holds integers to 2048 exactly, but not the 1/127.5 steps
  between them, and known pixels must not change.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from spmdeploy.bundle.manifest import EDIT, REFINE
from spmdeploy.export.gpu import NORM
from spmdeploy.export.onnx import rebuilt

FP32_OPERATORS = frozenset({"InstanceNormalization"})
FP32_LAYERS = (EDIT, REFINE, "generator")  # pixel arithmetic and the composites between the stages

_DATA_INPUTS = {"Resize": 1, "Pad": 1, "InstanceNormalization": 1}
"""Number of data inputs of operators whose later float inputs are parameters and must stay FP32."""

_WEIGHT_ELEMENTS = 1024
"""Smaller constants are not stored as halves: it would save little."""


@dataclass
class _Typing:
    """Precision of each float value so far, and the casts that were added."""

    elem_types: dict[str, int]
    halves: dict[str, onnx.TensorProto]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    casts: dict[tuple[str, int], str] = field(default_factory=dict)

    def as_type(self, value: str, wanted: int) -> str:
        """The name of `value` in the wanted precision; adds a cast if there is none yet."""
        have = self.elem_types.get(value)
        if have not in (TensorProto.FLOAT, TensorProto.FLOAT16) or have == wanted:
            return value
        if wanted == TensorProto.FLOAT16 and value in self.halves:
            return self.halves[value].name
        if (value, wanted) not in self.casts:
            name = f"{value}/{'Half' if wanted == TensorProto.FLOAT16 else 'Float'}"
            self.nodes.append(helper.make_node("Cast", [value], [name], name=name, to=wanted))
            self.casts[value, wanted] = name
        return self.casts[value, wanted]


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of the FP32 `model` that computes in FP16 except for the cases above.

    Inputs and outputs are unchanged.
    """
    graph = model.graph
    elem_types = _elem_types(graph)
    floats = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    typing = _Typing(elem_types, {name: _halved(tensor) for name, tensor in floats.items()})

    for node in graph.node:
        wanted = TensorProto.FLOAT if _stays_fp32(node) else TensorProto.FLOAT16
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        data_inputs = _DATA_INPUTS.get(node.op_type, len(node.input))
        copy.input[:data_inputs] = [typing.as_type(value, wanted) for value in node.input[:data_inputs]]
        if node.op_type == "Cast" and elem_types[node.output[0]] == TensorProto.FLOAT:
            copy.ClearField("attribute")
            copy.attribute.append(helper.make_attribute("to", wanted))
        for output in node.output:
            if elem_types.get(output) == TensorProto.FLOAT:
                elem_types[output] = wanted
        typing.nodes.append(copy)

    return rebuilt(model, typing.nodes, (*typing.halves.values(), *graph.initializer))


def store_weights_as_halves(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of the FP32 `model` that computes in FP32 with weights rounded to FP16 and stored as FP16.

    This halves the file. Runtimes fold the casts when they load the graph.
    """
    large = [
        tensor
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.FLOAT and np.prod(tensor.dims) >= _WEIGHT_ELEMENTS
    ]
    halves = [_halved(tensor) for tensor in large]
    casts = [
        helper.make_node("Cast", [half.name], [tensor.name], name=f"{tensor.name}/Cast", to=TensorProto.FLOAT)
        for half, tensor in zip(halves, large, strict=True)
    ]
    replaced = {tensor.name for tensor in large}
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in replaced]
    return rebuilt(model, [*casts, *model.graph.node], (*halves, *kept))


def _stays_fp32(node: onnx.NodeProto) -> bool:
    path = node.name.rpartition("/")[0]
    return node.op_type in FP32_OPERATORS or path in FP32_LAYERS or path.endswith(NORM)


def _elem_types(graph: onnx.GraphProto) -> dict[str, int]:
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def _halved(tensor: onnx.TensorProto) -> onnx.TensorProto:
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), f"{tensor.name}.half")
