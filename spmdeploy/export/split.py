"""Splits an edit graph into the part that depends on the layout alone and the part that needs the image.

More than half of the operations of an edit read labels, instances and mask only. Where many images share them, the
`layout` graph runs once and its outputs, the cached tensors, are inputs of the `picture` graph for every image.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from spmdeploy.export.onnx import model_of_nodes
from spmdeploy.export.tracing import needed_nodes

_WITH_BODIES = frozenset({"If", "Loop", "Scan"})
"""Their bodies read values that are not listed as inputs of the node."""


@dataclass(frozen=True)
class GraphPartition:
    """Two ONNX models that together compute the original one."""

    layout: onnx.ModelProto
    """Reads labels, instances and mask; its outputs are the cached tensors."""
    picture: onnx.ModelProto
    """Reads the image, the cached tensors and the layout inputs that it needs; has the original outputs."""


def split_by_layout(model: onnx.ModelProto, image: str = "image") -> GraphPartition:
    """Split a graph at the values that depend on the layout alone and are read by nodes that depend on the image.

    Args:
        model: a graph with shape information for every value (`with_shapes`), its nodes in topological order.
        image: the name of the input that changes from edit to edit.

    Returns:
        Both parts; initializers keep their names, so that they can share external data.
    """
    graph = model.graph
    assert _WITH_BODIES.isdisjoint(node.op_type for node in graph.node), "nodes with bodies cannot be split"
    inputs = [value.name for value in graph.input]
    outputs = [value.name for value in graph.output]
    of_image = _dependent(graph, {image})
    of_layout = _dependent(graph, set(inputs) - {image}) - of_image
    picture = needed_nodes(graph.node, outputs, without=of_layout)
    read = {name for node in picture for name in node.input}
    cached = [name for node in graph.node for name in node.output if name in of_layout and name in read]
    layout = needed_nodes(graph.node, cached, without=of_image)
    return GraphPartition(
        _part(model, layout, _read_by(layout, inputs), cached),
        _part(model, picture, [*_read_by(picture, inputs), *cached], outputs),
    )


def _dependent(graph: onnx.GraphProto, names: set[str]) -> set[str]:
    """The values that depend on any of `names`, which are among them."""
    known = set(names)
    for node in graph.node:
        if not known.isdisjoint(node.input):
            known.update(node.output)
    return known


def _read_by(nodes: list[onnx.NodeProto], names: list[str]) -> list[str]:
    read = {name for node in nodes for name in node.input}
    return [name for name in names if name in read]


def _part(
    model: onnx.ModelProto, nodes: list[onnx.NodeProto], inputs: list[str], outputs: list[str]
) -> onnx.ModelProto:
    """A model of these nodes, with the initializers and the shape information that they need."""
    graph = model.graph
    values = {value.name: value for value in (*graph.input, *graph.value_info, *graph.output)}
    made = {name for node in nodes for name in node.output} - set(outputs)
    return model_of_nodes(
        model,
        nodes,
        graph.initializer,
        inputs=[values[name] for name in inputs],
        outputs=[values[name] for name in outputs],
        values=[values[name] for name in values if name in made],
    )
