"""Rewrites the FP32 graph into one that TensorRT compiles to fewer kernels, before it is converted to FP16.

At a batch of one most layers are so small that launching their kernels takes longer than running them. TensorRT-RTX
keeps every convolution of a graph, so those that can be one are made one here:

- the heads of a layer that read the same hidden map become one convolution, whose output is split;
- the layout branches of layers with the same layout input and the same widths become two convolutions, the second one
  with a group for each layer.

Instance normalization becomes arithmetic, which TensorRT fuses with the modulation and computes in the memory layout of
the convolutions; its kernel for the operator converts to another layout and back. The FP32 graph stays as it is: CPU
libraries read it too, and TensorRT before 10.12 chooses FP16 in it, where sums of squares would overflow.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

import numpy as np
import onnx
from onnx import helper, numpy_helper

from spmdeploy.export.onnx import rebuilt
from spmdeploy.model.modulation import NORM_EPS

NORM = ".norm"
"""End of the path of the nodes that normalize."""

_CONVOLUTION = re.compile(r"(stages\.\d+\.(?:encoder|decoder)\.\d+)\.(\w+)/Conv")
_CONTEXT_HEADS = ("context_gamma", "context_beta")
_LAYOUT_HEADS = ("layout_gamma_scale", "layout_gamma_shift", "layout_beta_scale", "layout_beta_shift")


def specialize_for_gpu(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of the FP32 `edit` or `refine` graph with fewer convolutions and without InstanceNormalization."""
    return _with_plain_norms(_Merger(model).graph())


def order_weights(model: onnx.ModelProto) -> None:
    """Put the weights that are merged next to each other, so that an external data file can hold them once."""
    layers = _Layers(model.graph)
    merged = [
        *(node for layer in layers for node in layers.heads(layer, _CONTEXT_HEADS)),
        *(node for group in layers.with_equal_layouts() for node in layers.shared(group)),
        *(node for group in layers.with_equal_layouts() for layer in group for node in layers.heads(layer)),
    ]
    ranks = {node.input[1]: rank for rank, node in enumerate(merged)}
    tensors = sorted(model.graph.initializer, key=lambda tensor: ranks.get(tensor.name, -1))
    del model.graph.initializer[:]
    model.graph.initializer.extend(tensors)


class _Layers:
    """The convolutions of each modulation, by layer and part."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._dims = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        self._parts: defaultdict[str, dict[str, onnx.NodeProto]] = defaultdict(dict)
        for node in graph.node:
            if found := _CONVOLUTION.fullmatch(node.name):
                self._parts[found[1]][found[2]] = node

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def shared(self, layers: Iterable[str]) -> list[onnx.NodeProto]:
        return [self._parts[layer]["layout_shared"] for layer in layers]

    def heads(self, layer: str, heads: tuple[str, ...] = _LAYOUT_HEADS) -> list[onnx.NodeProto]:
        return [self._parts[layer][part] for part in heads if part in self._parts[layer]]

    def with_equal_layouts(self) -> list[list[str]]:
        """Layers that read the same layout, in groups whose weights have the same shapes."""
        groups: defaultdict[tuple[object, ...], list[str]] = defaultdict(list)
        for layer in self._parts:
            (shared,), heads = self.shared([layer]), self.heads(layer)
            shapes = tuple(self._dims[node.input[1]] for node in (shared, *heads))
            groups[shared.input[0], shapes].append(layer)
        return list(groups.values())


class _Merger:
    """Replaces convolutions by merged ones, each at the place of the first that it replaces."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self._constants: list[onnx.TensorProto] = []
        self._instead: dict[str, list[onnx.NodeProto]] = {}
        """New nodes, by the name of the first node that they replace; none for the others."""

    def graph(self) -> onnx.ModelProto:
        layers = _Layers(self._model.graph)
        for layer in layers:
            heads = layers.heads(layer, _CONTEXT_HEADS)
            if heads:
                self._replace(heads, self._with_heads(f"{layer}.context_heads", heads, heads[0].input[0], groups=1))
        relus = {node.input[0]: node for node in self._model.graph.node if node.op_type == "Relu"}
        for group in layers.with_equal_layouts():
            shared, heads = layers.shared(group), [node for layer in group for node in layers.heads(layer)]
            hidden = self._convolution(f"{group[0]}.layout_hidden", shared, shared[0].input[0])
            relu = helper.make_node("Relu", hidden.output, [f"{group[0]}.layout_hidden/Relu"])
            relu.name = relu.output[0]
            new = self._with_heads(f"{group[0]}.layout_heads", heads, relu.name, groups=len(group))
            self._replace([*shared, *(relus[node.output[0]] for node in shared), *heads], [hidden, relu, *new])
        nodes = [new for node in self._model.graph.node for new in self._instead.get(node.name, [node])]
        return rebuilt(self._model, nodes, (*self._stored.values(), *self._constants))

    def _replace(self, old: list[onnx.NodeProto], new: list[onnx.NodeProto]) -> None:
        self._instead |= {node.name: [] for node in old}
        self._instead[old[0].name] = new

    def _with_heads(self, name: str, heads: list[onnx.NodeProto], source: str, groups: int) -> list[onnx.NodeProto]:
        """The merged heads, and the node that splits their output into the original ones."""
        merged = self._convolution(name, heads, source, groups)
        channels = np.array([self._stored[head.input[1]].dims[0] for head in heads])
        self._constants.append(numpy_helper.from_array(channels, f"{name}.channels"))
        outputs = [head.output[0] for head in heads]
        split = helper.make_node("Split", [merged.name, f"{name}.channels"], outputs, f"{name}/Split", axis=1)
        return [merged, split]

    def _convolution(self, name: str, parts: list[onnx.NodeProto], source: str, groups: int = 1) -> onnx.NodeProto:
        """One convolution with the output channels of all parts."""
        for index, kind in ((1, "weight"), (2, "bias")):
            values = [numpy_helper.to_array(self._stored[part.input[index]]) for part in parts]
            self._constants.append(numpy_helper.from_array(np.concatenate(values), f"{name}.{kind}"))
        merged = onnx.NodeProto()
        merged.CopyFrom(parts[0])
        merged.name = merged.output[0] = f"{name}/Conv"
        merged.input[:] = [source, f"{name}.weight", f"{name}.bias"]
        kept = [attribute for attribute in merged.attribute if attribute.name != "group"]
        del merged.attribute[:]
        merged.attribute.extend([*kept, helper.make_attribute("group", groups)])
        return merged


def _with_plain_norms(model: onnx.ModelProto) -> onnx.ModelProto:
    """Instance normalization in two passes: the mean, then the variance around it."""
    axes = numpy_helper.from_array(np.array([2, 3]), "norm/axes")
    epsilon = numpy_helper.from_array(np.array(NORM_EPS, np.float32), "norm/epsilon")
    nodes: list[onnx.NodeProto] = []

    def add(operator: str, name: str, *inputs: str) -> str:
        nodes.append(helper.make_node(operator, inputs, [name], name=name))
        return name

    for node in model.graph.node:
        if node.op_type != "InstanceNormalization":
            nodes.append(node)
            continue
        path, features = f"{node.name.rpartition('/')[0]}{NORM}", node.input[0]
        mean = add("ReduceMean", f"{path}/Mean", features, axes.name)
        centered = add("Sub", f"{path}/Centered", features, mean)
        squares = add("Mul", f"{path}/Squares", centered, centered)
        variance = add("ReduceMean", f"{path}/Variance", squares, axes.name)
        deviation = add("Sqrt", f"{path}/Deviation", add("Add", f"{path}/Above0", variance, epsilon.name))
        scale = add("Reciprocal", f"{path}/Scale", deviation)
        nodes.append(helper.make_node("Mul", [centered, scale], node.output, name=f"{path}/Normalized"))
    return rebuilt(model, nodes, (*model.graph.initializer, axes, epsilon))
