"""Exports the deploy graphs to ONNX with a dynamic batch, and names nodes after their layers."""

from __future__ import annotations

import ast
import contextlib
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import onnx
import onnx_ir
import torch
from onnx import numpy_helper
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules.common import max_min_rule
from torch import nn

from spmdeploy.bundle.manifest import EDIT, REFINE
from spmdeploy.model.deploy import COARSE_SIZE, EDIT_INPUTS, OUTPUTS, REFINE_INPUTS, EditGraph, RefineGraph
from spmdeploy.model.generator import Generator
from spmdeploy.types import NATIVE_SIZE

OPSET = 18
"""The newest opset with features that the graph needs; TensorRT 10.3 on JetPack 6 parses up to 20."""
MAX_IR_VERSION = 10

_GENERATOR_PREFIX = "generator."
_SHAPE_OPERATORS = {"Reshape", "Expand", "Tile", "ConstantOfShape"}
"""Their constants could hold the batch of the example inputs."""


def export_edit(generator: Generator) -> onnx.ModelProto:
    """Export the `edit` graph (see docs/bundle-format.md) in FP32. Weights keep their names in `Generator`."""
    return _export(generator, EditGraph(generator), EDIT, EDIT_INPUTS)


def export_refine(generator: Generator) -> onnx.ModelProto:
    """Export the `refine` graph in FP32, with the weights of the last stage."""
    return _export(generator, RefineGraph(generator), REFINE, REFINE_INPUTS)


def _export(generator: Generator, graph: nn.Module, name: str, inputs: Sequence[str]) -> onnx.ModelProto:
    """Export a module in FP32; nodes outside the generator are named `name/...`.

    Tracing takes half the time with a constant batch. The batch becomes dynamic afterwards, which is sound since no
    operator in the graph holds a shape.
    """
    size, batch = NATIVE_SIZE, 2
    examples = {
        "image": torch.zeros(batch, size, size, 3, dtype=torch.uint8),
        "labels": torch.zeros(batch, size, size, dtype=torch.uint8),
        "instances": torch.zeros(batch, size, size, dtype=torch.int32),
        "mask": torch.zeros(batch, size, size, dtype=torch.uint8),
        "coarse": torch.zeros(batch, COARSE_SIZE, COARSE_SIZE, 3),
    }
    with _quiet(), torch.no_grad():  # with gradients, norms are exported in their training form
        program = torch.onnx.export(
            graph.eval(),
            tuple(examples[value] for value in inputs),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(OUTPUTS),
            optimize=False,
            verbose=False,
        )
        assert program is not None
        _simplify(program.model)
    model = program.model_proto
    assert not _SHAPE_OPERATORS & {node.op_type for node in model.graph.node}
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    _rename(model.graph, name)
    _restore_weights(model.graph, generator)
    _strip_traces(model)
    assert model.ir_version <= MAX_IR_VERSION, model.ir_version
    return with_shapes(model)


def _simplify(model: onnx_ir.Model) -> None:
    """Removes what tracing leaves behind, in place.

    `optimize=True` of torch.onnx takes five times as long, because it searches for all patterns that it knows. These
    graphs have one of them.
    """
    fold_constants(model, onnx_shape_inference=True)
    rewrite(model, [max_min_rule])
    onnx_ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
    )(model)


def with_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return `model` after checking it, with type and shape of every value."""
    del model.graph.value_info[:]
    model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    for value in model.graph.value_info:
        dims = value.type.tensor_type.shape.dim
        if len(dims) >= 3 and dims[0].dim_param:  # inference loses the name at each Resize
            dims[0].dim_param = "batch"
    onnx.checker.check_model(model, full_check=True)
    return model


def rebuilt(
    model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto], initializers: Iterable[onnx.TensorProto]
) -> onnx.ModelProto:
    """Return `model` with other nodes, the initializers that they read, and newly inferred shapes and types."""
    nodes = list(nodes)
    read = {value for node in nodes for value in node.input}
    graph = onnx.helper.make_graph(
        nodes,
        model.graph.name,
        model.graph.input,
        model.graph.output,
        [tensor for tensor in initializers if tensor.name in read],
    )
    rebuilt = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    rebuilt.producer_name, rebuilt.producer_version = model.producer_name, model.producer_version
    return with_shapes(rebuilt)


def _rename(graph: onnx.GraphProto, outermost: str) -> None:
    """Name nodes and outputs `layer/Operator`, after the module that they come from."""
    fixed = {value.name for value in (*graph.input, *graph.output)}
    names: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for initializer in graph.initializer:
        names[initializer.name] = initializer.name.removeprefix(_GENERATOR_PREFIX)
        initializer.name = names[initializer.name]
    for node in graph.node:
        name = f"{_layer(node) or outermost}/{node.op_type}"
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"
        for index, output in enumerate(node.output):
            names[output] = output if output in fixed else node.name + (f":{index}" if index else "")
    for node in graph.node:
        node.input[:] = [names.get(value, value) for value in node.input]
        node.output[:] = [names[value] for value in node.output]


def _restore_weights(graph: onnx.GraphProto, generator: Generator) -> None:
    """Connect each convolution to the weights of its layer, under their own names.

    The exporter merges equal tensors and drops zero biases, which is all that an untrained stage has.
    """
    weights = {name: value.detach().numpy() for name, value in generator.state_dict().items()}
    stored = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Conv":
            names = [f"{node.name.removesuffix('/Conv')}.{part}" for part in ("weight", "bias")]
            node.input[1:] = [name for name in names if name in weights]
    read = {name for node in graph.node for name in node.input}
    graph.initializer.extend(numpy_helper.from_array(weights[name], name) for name in weights if name in read - stored)


def _layer(node: onnx.NodeProto) -> str:
    """The path of the module that the node was exported from; empty for the deploy graph itself."""
    scopes = next((entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"), "[]")
    modules = [scope for scope in ast.literal_eval(scopes)[:-1] if scope]
    return modules[-1].removeprefix(_GENERATOR_PREFIX) if modules else ""


def _strip_traces(model: onnx.ModelProto) -> None:
    """Remove the exporter's metadata, which includes source paths of the exporting machine."""
    for holder in (model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output):
        del holder.metadata_props[:]
        holder.doc_string = ""
    for initializer in model.graph.initializer:
        del initializer.metadata_props[:]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the log, warnings and output of torch 2.13's exporter; errors are still raised."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            open(os.devnull, "w", encoding="utf-8") as null,
            contextlib.redirect_stdout(null),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
