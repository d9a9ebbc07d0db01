"""Specializes the FP32 graph for CPUs: the same results without operations that cannot affect the masked pixels.

On a CPU the time follows the number of operations, and more than half of them (the layout branch) read only labels and
mask. Three facts remove most of these at the larger sizes, exactly and not approximately:

- Away from the mask the layout input is zero, so the output of the branch depends on the weights alone: one value per
  channel, except in the outermost ring of pixels, which the zero padding of the convolutions affects. These values are
  constants of the graph. A layer is computed with one value per channel and column; then the first and the last row are
  corrected, and the changes by the layout are computed in a bounding box around the mask.
- The image of a stage is used only under the mask. The last layer needs the whole map for its statistics only;
  modulation and image are computed inside the box.
- Only classes under the mask matter: the layout channels of all other classes are zero.

Elementwise operators are memory-bound on large maps, so values that are constant per channel, or needed only in the
box, are not computed for every pixel.

The graph itself finds the box around the masks of the whole batch. Shapes then depend on data, which ONNX Runtime
allows and TensorRT does not: engines are built from the plain graph, whose cost on a GPU is kernel launches.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from spmdeploy.export.onnx import rebuilt
from spmdeploy.export.tracing import needed_nodes
from spmdeploy.types import NATIVE_SIZE

MIN_SIZE = 32
"""Layers of smaller size are computed everywhere: they cost little, and a box would save little of it."""

REACH = 2
"""Distance in pixels at which two successive 3×3 convolutions are affected by the mask."""

_LAYER = re.compile(r"(stages\.\d+\.(?:encoder|decoder)\.\d+)[./]")
_CONTEXT_HEADS = ("context_gamma", "context_beta")
_LAYOUT_HEADS = ("layout_gamma_scale", "layout_gamma_shift", "layout_beta_scale", "layout_beta_shift")
_PLUS_ONE_HEADS = frozenset(_LAYOUT_HEADS[:3])
"""The heads that the modulation adds one to. Here the one is part of their biases."""


def specialize_for_mask(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of the FP32 edit graph that computes the layout branch only around the mask.

    Weights keep their names.
    """
    return _MaskSpecializer(model).graph()


class _Layer:
    """The nodes of a layer in the original graph."""

    def __init__(self, name: str, nodes: list[onnx.NodeProto]) -> None:
        self.name = name
        self.convolutions = {
            node.name.removesuffix("/Conv").rpartition(".")[2]: node for node in nodes if node.op_type == "Conv"
        }
        self.relus = {node.input[0]: node for node in nodes if node.op_type == "Relu"}
        """By their input."""
        self.norm = next(node for node in nodes if node.op_type == "InstanceNormalization")
        self.activation = nodes[-1]
        assert self.activation.op_type == "LeakyRelu", self.activation.name
        self.context_heads = tuple(head for head in _CONTEXT_HEADS if head in self.convolutions)
        self.layout_heads = tuple(head for head in _LAYOUT_HEADS if head in self.convolutions)


class _MaskSpecializer:
    """Rewrites a graph: collects its nodes in order, and the constants of the new nodes."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._shapes = {
            value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in model.graph.value_info
        }
        self._producers: dict[str, onnx.NodeProto] = {
            output: node for node in model.graph.node for output in node.output
        }
        self._layers = _layers(model.graph)
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._added: set[str] = set()

    def graph(self) -> onnx.ModelProto:
        ends = {layer.activation.name: layer for layer in self._layers}
        before_image = {node.input[0] for node in self._model.graph.node if node.op_type == "Pad"}
        for node in self._model.graph.node:
            if node.name in ends:
                layer = ends[node.name]
                if node.output[0] in before_image:
                    self._last_layer(layer)
                elif self._size(layer) < MIN_SIZE:
                    self._layer_everywhere(layer)
                else:
                    self._layer_around_mask(layer)
            elif node.op_type == "Tanh":
                self._stage_image(node)
            elif node.op_type == "Transpose" and self._producers.get(node.input[0], node).op_type == "Tanh":
                self._add("Identity", node.input, node.name)  # `_result` transposes at the end
            elif node.op_type == "Where":
                self._result(node)
            elif _LAYER.match(node.name) is None:
                self._nodes.append(node)
        nodes = needed_nodes(self._nodes, [value.name for value in self._model.graph.output])
        return rebuilt(self._model, nodes, {**self._weights, **self._constants}.values())

    def _size(self, layer: _Layer) -> int:
        """Height and width of the output of the layer."""
        size: int = self._shapes[layer.activation.input[0]][-1]
        return size

    def _layer_everywhere(self, layer: _Layer) -> None:
        heads: dict[str, str] = {}
        for branch, parts in (("context", layer.context_heads), ("layout", layer.layout_heads)):
            if parts:
                self._nodes.append(layer.convolutions[f"{branch}_shared"])
                hidden = self._relu(layer, f"{branch}_shared")
                for part in parts:
                    heads[part] = self._head(layer, part, hidden)
        modulated = self._modulated(self._normalized(layer), heads, layer.name)
        self._activated(layer, modulated)

    def _layer_around_mask(self, layer: _Layer) -> None:
        """Compute the layer for an empty layout, and add the change that the layout makes in the box."""
        maps = {"normalized": self._normalized(layer)}
        if layer.context_heads:
            self._nodes.append(layer.convolutions["context_shared"])
            hidden = self._relu(layer, "context_shared")
            maps |= {part: self._head(layer, part, hidden) for part in layer.context_heads}

        empty = {head: self._output_for_empty_layout(layer, head) + _added_one(head) for head in layer.layout_heads}
        middle = {
            head: self._row_constant(layer, f"empty/{head}", answer[..., 1:2, :]) for head, answer in empty.items()
        }
        base = self._modulated(maps["normalized"], {**maps, **middle}, layer.name)
        change = self._change_in_box(layer, maps, base)
        borders = {head: answer[..., ::2, :] - answer[..., 1:2, :] for head, answer in empty.items()}
        change = self._change_of_borders(layer, maps, borders, change)
        self._activated(layer, self._add("Add", [base, change], f"{layer.name}/changed"))

    def _change_in_box(self, layer: _Layer, maps: Mapping[str, str], base: str) -> str:
        """Difference from `base` in the box, padded with zeros to the size of the layer."""
        box, name = self._box(self._size(layer)), f"{layer.name}/around"
        hidden = self._hidden_in_box(layer, "layout_shared")
        heads = {head: self._head(layer, head, hidden, inside=True) for head in layer.layout_heads}
        inside = {
            part: self._add("Slice", [value, f"{box}/start", f"{box}/end", self._axes()], f"{name}/{part}")
            for part, value in {**maps, "base": base}.items()
        }
        modulated = self._modulated(inside["normalized"], {**inside, **heads}, name)
        change = self._add("Sub", [modulated, inside["base"]], f"{name}/difference")
        return self._add("Pad", [change, f"{box}/around"], f"{name}/change")

    def _change_of_borders(
        self, layer: _Layer, maps: Mapping[str, str], borders: Mapping[str, NDArray[np.float32]], change: str
    ) -> str:
        """Add to `change` the effect of the padding on the first and the last row, outside the box.

        borders: for each head float32 (1, C, 2, 3), the difference of these rows from the other rows.
        """
        size, name = self._size(layer), f"{layer.name}/borders"
        first, behind, step = self._number(0), self._number(size), self._number(size - 1)
        rows = {
            part: self._add("Slice", [value, first, behind, self._number(2), step], f"{name}/{part}")
            for part, value in maps.items()
        }
        heads = {head: self._row_constant(layer, f"borders/{head}", answer) for head, answer in borders.items()}
        modulated = self._modulated(rows["normalized"], {**rows, **heads}, name)
        beside = self._add("Mul", [modulated, self._outside_box(size)], f"{name}/beside")
        places = self._constant(f"borders/{size}", _ints(0, size - 1).reshape(1, 1, 2, 1))
        shape = self._add("Shape", [beside], f"{name}/shape")
        places = self._add("Expand", [places, shape], f"{name}/places")
        return self._add("ScatterElements", [change, places, beside], f"{name}/change", axis=2, reduction="add")

    def _row_constant(self, layer: _Layer, name: str, answer: NDArray[np.float32]) -> str:
        """Expand `answer` (1, C, R, 3), for the first, all middle and the last column, to (1, C, R, size)."""
        patch = self._constant(f"{layer.name}/{name}/patch", answer)
        size = self._size(layer)
        kinds = self._constant(f"columns/{size}", _ints(0, *[1] * (size - 2), 2))
        return self._add("Gather", [patch, kinds], f"{layer.name}/{name}", axis=3)

    def _last_layer(self, layer: _Layer) -> None:
        """Compute the last layer of a stage in the box only. Its output keeps its name."""
        box, name = self._box(self._size(layer)), f"{layer.name}/around"
        heads: dict[str, str] = {}
        for branch, parts in (("context", layer.context_heads), ("layout", layer.layout_heads)):
            if parts:
                hidden = self._hidden_in_box(layer, f"{branch}_shared")
                heads |= {part: self._head(layer, part, hidden, inside=True) for part in parts}
        whole = self._normalized(layer)
        inside = self._add("Slice", [whole, f"{box}/start", f"{box}/end", self._axes()], f"{name}/normalized")
        self._nodes.append(_copy(layer.activation, self._modulated(inside, heads, name)))

    def _stage_image(self, tanh: onnx.NodeProto) -> None:
        """The image of a stage, which `tanh` computes in the box, padded with zeros."""
        output = tanh.output[0]
        box = self._box(self._shapes[output][-1])
        self._nodes.append(_copy(tanh, output=f"{output}/box"))
        self._add("Pad", [f"{output}/box", f"{box}/around"], f"{tanh.name}/around", output)

    def _result(self, where: onnx.NodeProto) -> None:
        """The output of `where`, selected in planar layout, which is faster than in interleaved layout."""
        _, levels, given = where.input
        edit = self._producers[self._mask()].input[0]
        planes = next(node for node in self._model.graph.node if node.op_type == "Transpose" and given in node.input)
        chosen = self._add("Where", [edit, levels, planes.output[0]], f"{where.name}/planes")
        self._add("Transpose", [chosen], where.name, where.output[0], perm=[0, 2, 3, 1])

    def _normalized(self, layer: _Layer) -> str:
        self._nodes += [layer.convolutions["features"], layer.norm]
        return str(layer.norm.output[0])

    def _activated(self, layer: _Layer, value: str) -> None:
        """Ends a layer in ONNX Runtime's blocked layout.

        All readers of the layer support that layout, but none converts into it. A depthwise convolution with weight 1
        does, and changes no value.
        """
        channels = self._shapes[layer.activation.input[0]][1]
        ones = self._constant(f"ones/{channels}", np.ones((channels, 1, 1, 1), np.float32))
        same = self._add("Conv", [value, ones], f"{layer.activation.name}/same", group=channels, kernel_shape=[1, 1])
        self._nodes.append(_copy(layer.activation, same))

    def _modulated(self, normalized: str, heads: Mapping[str, str], name: str) -> str:
        """The modulation equation, for heads that include the added ones."""
        gamma, beta = heads["layout_gamma_shift"], heads["layout_beta_shift"]
        if "context_gamma" in heads:
            scaled = self._add("Mul", [heads["context_gamma"], heads["layout_gamma_scale"]], f"{name}/scaled_gamma")
            gamma = self._add("Add", [scaled, gamma], f"{name}/gamma")
            scaled = self._add("Mul", [heads["context_beta"], heads["layout_beta_scale"]], f"{name}/scaled_beta")
            beta = self._add("Add", [scaled, beta], f"{name}/beta")
        scaled = self._add("Mul", [normalized, gamma], f"{name}/scaled")
        return self._add("Add", [scaled, beta], f"{name}/modulated")

    def _relu(self, layer: _Layer, part: str) -> str:
        """The ReLU after the first convolution of a branch."""
        relu = layer.relus[layer.convolutions[part].output[0]]
        self._nodes.append(relu)
        return str(relu.output[0])

    def _hidden_in_box(self, layer: _Layer, part: str) -> str:
        """The first convolution of a branch, on its input around the box."""
        size = self._size(layer)
        node = _copy(layer.convolutions[part], pads=(0, 0, 0, 0))
        node.input[0] = self._around(node.input[0], size)
        if part == "layout_shared":
            weights = [node.input[1], self._present_channels()]
            node.input[1] = self._add("Gather", weights, f"{layer.name}.{part}/present", axis=1)
        self._nodes.append(node)
        # Outside the image the output of this convolution is not zero, but the next one expects zero padding.
        relu = self._relu(layer, part)
        return self._add("Mul", [relu, f"{self._box(size)}/picture"], f"{relu}/inside")

    def _head(self, layer: _Layer, part: str, hidden: str, *, inside: bool = False) -> str:
        """The second convolution of a branch, plus one for heads in `_PLUS_ONE_HEADS`; without padding if `inside`."""
        node = layer.convolutions[part]
        copy = _copy(node, hidden, pads=(0, 0, 0, 0) if inside else None)
        if part in _PLUS_ONE_HEADS:  # folded when the graph is loaded; the stored bias is unchanged
            one = self._constant("one", np.ones(1, np.float32))
            copy.input[2] = self._add("Add", [node.input[2], one], f"{node.input[2]}/one_more")
        self._nodes.append(copy)
        if not part.endswith("_shift"):
            return str(copy.output[0])
        # LeakyRelu with slope 1 is the identity. ONNX Runtime (1.32) fuses it into the convolution, and then no longer
        # fuses the following Add. Otherwise the last bit would differ where `split_by_layout` cuts the graph here.
        return self._add("LeakyRelu", [copy.output[0]], f"{copy.name}/unchanged", alpha=1.0)

    def _around(self, value: str, size: int) -> str:
        """`value` (B, C, size, size) in the box with a margin, zero outside the image.

        A layout is recomputed there from its single-channel maps, with the channels of `_present_channels` only.
        """
        name, node = f"{value}/around", self._producers[value]
        if name in self._added:
            return name
        self._added.add(name)
        if self._shapes[value][1] > 1 and node.op_type in ("Concat", "Mul", "Cast", "Equal"):
            copy = _copy(node, output=name)
            copy.name = f"{node.name}/around"
            ids = self._present_classes()
            copy.input[:] = [self._around(it, size) if it in self._producers else ids for it in node.input]
            self._nodes.append(copy)
            return name
        box = self._box(size)
        self._add("Slice", [value, f"{box}/wide_start", f"{box}/wide_end", self._axes()], f"{value}/wide")
        return self._add("Pad", [f"{value}/wide", f"{box}/beyond"], name)

    def _output_for_empty_layout(self, layer: _Layer, head: str) -> NDArray[np.float32]:
        """Output of a head for an empty layout: float32 (1, C, 3, 3), rows and columns first, middle, last."""
        weight, bias = (self._weight(name).astype(np.float64) for name in layer.convolutions[head].input[1:])
        shared_bias = self._weight(layer.convolutions["layout_shared"].input[2])
        hidden = np.maximum(shared_bias.astype(np.float64), 0)
        taps = np.einsum("oikl,i->okl", weight, hidden)
        inside = (slice(1, 3), slice(0, 3), slice(0, 2))  # the taps that are not in the padding
        answer = [[bias + taps[:, rows, columns].sum((1, 2)) for columns in inside] for rows in inside]
        return np.moveaxis(np.array(answer), 2, 0)[None].astype(np.float32)

    def _box(self, size: int) -> str:
        """Name prefix of the values that describe the box at this size; they are added at the first call."""
        box = f"box/{size}"
        if box in self._added:
            return box
        self._added.add(box)
        if "box" not in self._added:
            self._added.add("box")
            self._find_mask()
        zero, reach, whole = self._number(0), self._number(REACH), self._number(size)
        for axis in ("rows", "columns"):
            step = self._constant(f"{box}/step", _ints(NATIVE_SIZE // size))
            place = f"{box}/{axis}"
            self._add("Div", [f"box/{axis}/first", step], f"{place}/first")
            self._add("Sub", [f"{place}/first", reach], f"{place}/reach")
            self._add("Max", [f"{place}/reach", zero], f"{place}/start")
            self._add("Div", [f"box/{axis}/last", step], f"{place}/last")
            self._add("Add", [f"{place}/last", self._number(REACH + 1)], f"{place}/reach_end")
            self._add("Min", [f"{place}/reach_end", whole], f"{place}/end")
            self._add("Sub", [whole, f"{place}/end"], f"{place}/rest")
            self._add("Add", [f"{place}/end", reach], f"{place}/end+{REACH}")
            # The margin around the box for the convolutions: inside the image, and outside it.
            self._add("Sub", [f"{place}/start", reach], f"{place}/around_start")
            self._add("Max", [f"{place}/around_start", zero], f"{place}/wide_start")
            self._add("Sub", [f"{place}/wide_start", f"{place}/around_start"], f"{place}/beyond_start")
            self._add("Min", [f"{place}/end+{REACH}", whole], f"{place}/wide_end")
            self._add("Sub", [f"{place}/end+{REACH}", f"{place}/wide_end"], f"{place}/beyond_end")
        for edge in ("start", "end", f"end+{REACH}", "rest", "wide_start", "wide_end", "beyond_start", "beyond_end"):
            self._add("Concat", [f"{box}/rows/{edge}", f"{box}/columns/{edge}"], f"{box}/{edge}", axis=0)
        none = self._constant("box/none", _ints(0, 0))
        self._add("Concat", [none, f"{box}/start", none, f"{box}/rest"], f"{box}/around", axis=0)
        self._add("Concat", [none, f"{box}/beyond_start", none, f"{box}/beyond_end"], f"{box}/beyond", axis=0)
        inside = np.pad(np.ones((1, 1, size, size), np.float32), ((0, 0), (0, 0), (1, 1), (1, 1)))
        padded = self._constant(f"{box}/padded_picture", inside)
        self._add("Slice", [padded, f"{box}/start", f"{box}/end+{REACH}", self._axes()], f"{box}/picture")
        return box

    def _outside_box(self, size: int) -> str:
        """1 where the first and the last row lie outside the box, else 0: float32 (2, size)."""
        name, box = f"box/{size}/beside", self._box(size)
        if name in self._added:
            return name
        self._added.add(name)
        for axis, places in (("rows", _ints(0, size - 1).reshape(2, 1)), ("columns", np.arange(size).reshape(1, size))):
            place = self._constant(f"{box}/{axis}/places", places)
            self._add("Less", [place, f"{box}/{axis}/start"], f"{box}/{axis}/before")
            self._add("GreaterOrEqual", [place, f"{box}/{axis}/end"], f"{box}/{axis}/behind")
            self._add("Or", [f"{box}/{axis}/before", f"{box}/{axis}/behind"], f"{box}/{axis}/beside")
        self._add("Or", [f"{box}/rows/beside", f"{box}/columns/beside"], f"{box}/outside")
        return self._add("Cast", [f"{box}/outside"], name, to=onnx.TensorProto.FLOAT)

    def _find_mask(self) -> None:
        """First and last masked row and column in the batch; the whole image if no pixel is masked."""
        self._add("ReduceMax", [self._mask(), self._constant("box/batch", _ints(0, 1))], "box/masks", keepdims=0)
        for axis, other in (("rows", 1), ("columns", 0)):
            self._add("ReduceMax", ["box/masks", self._number(other)], f"box/{axis}/touched", keepdims=0)
            self._add("ArgMax", [f"box/{axis}/touched"], f"box/{axis}/first", axis=0)
            reverse = [self._number(-1), self._number(-NATIVE_SIZE - 1), self._number(0), self._number(-1)]
            self._add("Slice", [f"box/{axis}/touched", *reverse], f"box/{axis}/reversed")
            self._add("ArgMax", [f"box/{axis}/reversed"], f"box/{axis}/behind", axis=0)
            self._add("Sub", [self._number(NATIVE_SIZE - 1), f"box/{axis}/behind"], f"box/{axis}/last")

    def _mask(self) -> str:
        """The mask as float (B, 1, S, S): the last channel of the layout at full size."""
        return str(self._whole_layout().input[-1])

    def _whole_layout(self) -> onnx.NodeProto:
        """The Concat node of the layout at full size: one-hot labels, edges, mask."""
        largest = next(layer for layer in self._layers if self._size(layer) == NATIVE_SIZE)
        return self._producers[largest.convolutions["layout_shared"].input[0]]

    def _present_channels(self) -> str:
        """The layout channels that are not zero everywhere: int64 (k + 2,), classes first."""
        self._present_classes()
        return "classes/channels"

    def _present_classes(self) -> str:
        """The ids of the classes under the masks of the batch: int32 (1, k, 1, 1).

        A mask covers a few of dozens of classes, and a convolution of few channels is faster. Class 0 is always
        included, so that k is at least 1.
        """
        if "classes" not in self._added:
            self._added.add("classes")
            layout = self._producers[self._whole_layout().input[0]]
            one_hot, mask = layout.input
            labels, ids = self._producers[self._producers[one_hot].input[0]].input
            count = self._weight(ids).size
            flat = self._number(-1)
            edit = self._add("Cast", [mask], "classes/edit", to=onnx.TensorProto.BOOL)
            none = self._constant("classes/none", np.array(count, np.int32))
            found = self._add("Where", [edit, labels, none], "classes/found")
            within = self._add("Min", [found, none], "classes/within")
            places = self._add("Reshape", [within, flat], "classes/places")
            marks = self._add("Reshape", [mask, flat], "classes/marks")
            first = self._constant("classes/first", np.eye(1, count + 1, dtype=np.float32)[0])
            marked = self._add("ScatterElements", [first, places, marks], "classes/marked", axis=0)
            known = self._add("Slice", [marked, self._number(0), self._number(count)], "classes/known")
            numbers = self._add("NonZero", [known], "classes/numbers")
            numbers = self._add("Reshape", [numbers, flat], "classes/present")
            others = self._constant("classes/others", _ints(count, count + 1))  # edges and mask
            self._add("Concat", [numbers, others], "classes/channels", axis=0)
            along = self._constant("classes/shape", _ints(1, -1, 1, 1))
            numbers = self._add("Reshape", [numbers, along], "classes/along")
            self._add("Cast", [numbers], "classes/ids", to=onnx.TensorProto.INT32)
        return "classes/ids"

    def _add(
        self, operator: str, inputs: Iterable[str], name: str, output: str | None = None, **attributes: Any
    ) -> str:
        """Add a node and return the name of its output, by default that of the node."""
        self._nodes.append(helper.make_node(operator, list(inputs), [output or name], name=name, **attributes))
        return output or name

    def _constant(self, name: str, value: NDArray[Any]) -> str:
        if name not in self._constants:
            self._constants[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def _number(self, value: int) -> str:
        return self._constant(f"box/{value}", _ints(value))

    def _axes(self) -> str:
        return self._constant("box/axes", _ints(2, 3))

    def _weight(self, name: str) -> NDArray[np.float32]:
        return numpy_helper.to_array(self._weights[name])


def _layers(graph: onnx.GraphProto) -> list[_Layer]:
    nodes: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        if found := _LAYER.match(node.name):
            nodes.setdefault(found[1], []).append(node)
    return [_Layer(name, own) for name, own in nodes.items()]


def _copy(
    node: onnx.NodeProto, source: str | None = None, output: str | None = None, pads: tuple[int, ...] | None = None
) -> onnx.NodeProto:
    """A copy of `node` with another input, output or padding."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.input[0], copy.output[0] = source or node.input[0], output or node.output[0]
    for attribute in copy.attribute:
        if attribute.name == "pads" and pads is not None:
            attribute.ints[:] = pads
    return copy


def _added_one(head: str) -> np.float32:
    return np.float32(head in _PLUS_ONE_HEADS)


def _ints(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)
