"""Exports the deploy graphs to ONNX with a dynamic batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx
import torch
from torch import nn

from spmdeploy.bundle.manifest import EDIT, REFINE
from spmdeploy.export.tracing import trace
from spmdeploy.model.deploy import COARSE_SIZE, EDIT_INPUTS, OUTPUTS, REFINE_INPUTS, EditGraph, RefineGraph
from spmdeploy.model.generator import Generator
from spmdeploy.types import NATIVE_SIZE
from spmdeploy.version import __version__

OPSET = 18
"""The newest opset with features that the graph needs; TensorRT 10.3 on JetPack 6 parses up to 20."""
IR_VERSION = 10
"""That of onnx 1.16; newer ones would shut out runtimes of 2024."""

_GENERATOR_PREFIX = "generator."
_LARGE_BYTES = 1 << 12
"""Larger tensors are weights: shapes do not depend on their values, and onnx would copy them at every step."""


def export_edit(generator: Generator) -> onnx.ModelProto:
    """Export the `edit` graph (see docs/bundle-format.md) in FP32. Weights keep their names in `Generator`."""
    return _export(EditGraph(generator), EDIT, EDIT_INPUTS)


def export_refine(generator: Generator) -> onnx.ModelProto:
    """Export the `refine` graph in FP32, with the weights of the last stage."""
    return _export(RefineGraph(generator), REFINE, REFINE_INPUTS)


def _export(graph: nn.Module, name: str, inputs: Sequence[str]) -> onnx.ModelProto:
    """Export a module in FP32; nodes outside the generator are named `name/...`.

    It is traced with one image. The batch becomes dynamic afterwards, which is sound since no operator in the graph
    holds a shape.
    """
    size = NATIVE_SIZE
    examples = {
        "image": torch.zeros(1, size, size, 3, dtype=torch.uint8),
        "labels": torch.zeros(1, size, size, dtype=torch.uint8),
        "instances": torch.zeros(1, size, size, dtype=torch.int32),
        "mask": torch.zeros(1, size, size, dtype=torch.uint8),
        "coarse": torch.zeros(1, COARSE_SIZE, COARSE_SIZE, 3),
    }
    traced = trace(graph.eval(), {value: examples[value] for value in inputs}, OUTPUTS, name, _GENERATOR_PREFIX)
    for value in (*traced.input, *traced.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    model = onnx.helper.make_model(traced, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    model.producer_name, model.producer_version = "spmdeploy", __version__
    return with_shapes(model)


def with_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return `model` after checking it, with type and shape of every value."""
    graph = model.graph
    large = [tensor for tensor in graph.initializer if len(tensor.raw_data) > _LARGE_BYTES]
    declared = [onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims) for tensor in large]
    small = [tensor for tensor in graph.initializer if len(tensor.raw_data) <= _LARGE_BYTES]
    light = onnx.helper.make_graph(graph.node, graph.name, [*graph.input, *declared], graph.output, small)
    checked = onnx.shape_inference.infer_shapes(
        onnx.helper.make_model(light, opset_imports=model.opset_import, ir_version=model.ir_version),
        check_type=True,
        strict_mode=True,
        data_prop=True,
    )
    onnx.checker.check_model(checked)  # full_check would infer the shapes again
    for tensor in large:
        onnx.checker.check_tensor(tensor)
    for value in checked.graph.value_info:
        dims = value.type.tensor_type.shape.dim
        if len(dims) >= 3 and dims[0].dim_param:  # inference loses the name at each Resize
            dims[0].dim_param = "batch"
    del graph.value_info[:]
    graph.value_info.extend(checked.graph.value_info)
    return model


def rebuilt(
    model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto], initializers: Iterable[onnx.TensorProto]
) -> onnx.ModelProto:
    """Return `model` with other nodes, the initializers that they read, and newly inferred shapes and types."""
    return with_shapes(model_of_nodes(model, nodes, initializers, model.graph.input, model.graph.output))


def model_of_nodes(
    model: onnx.ModelProto,
    nodes: Iterable[onnx.NodeProto],
    initializers: Iterable[onnx.TensorProto],
    inputs: Iterable[onnx.ValueInfoProto],
    outputs: Iterable[onnx.ValueInfoProto],
    values: Iterable[onnx.ValueInfoProto] = (),
) -> onnx.ModelProto:
    """Return a model of these nodes and the initializers that they read, in all else like `model`.

    A copy of `model` whose parts are then replaced would copy all weights twice.
    """
    nodes = list(nodes)
    read = {value for node in nodes for value in node.input}
    graph = onnx.helper.make_graph(
        nodes,
        model.graph.name,
        list(inputs),
        list(outputs),
        [tensor for tensor in initializers if tensor.name in read],
        value_info=list(values),
    )
    made = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    made.producer_name, made.producer_version = model.producer_name, model.producer_version
    return made
