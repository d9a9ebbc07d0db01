"""FP32 graph to the graph for CPUs: the same pictures, without work that the mask makes superfluous.

On a CPU time follows the operations, and more than half of them (the layout branch) read labels and mask only. Two
facts make most of that superfluous at the larger sizes, exactly and not approximately:

- Where no masked pixel is within reach, the layout input is zero, and what the branch answers depends on the weights
  alone: one value a channel, but for the outermost ring of pixels, where the zero padding of the convolutions shows.
  That is known when the graph is written. The branch is computed inside the box around the mask, and that answer
  stands around it.
- The picture of a stage counts under the mask alone. Its last layer needs both modulations inside the box only.

The box is found in the graph, around the masks of the whole batch. Shapes then depend on data, which ONNX Runtime
allows and TensorRT does not: engines are built from the plain graph, where launches and not operations are what costs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from spmdeploy.export.to_onnx import with_shapes
from spmdeploy.networks.deploy_graph import NATIVE_SIZE

SMALLEST = 32
"""Layers of smaller pictures stay as they are: they cost little, and a box of a few pixels saves little of it."""

REACH = 2
"""Pixels from which a 3×3 convolution of a 3×3 convolution sees the mask."""

_LAYOUT_HEADS = ("layout_gamma_scale", "layout_gamma_shift", "layout_beta_scale", "layout_beta_shift")
_CONTEXT_HEADS = ("context_gamma", "context_beta")


def restrict_to_mask(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the FP32 edit graph that computes the layout branch around the mask only. Weights keep their names."""
    return _Restriction(model).graph()


class _Restriction:
    """The graph as it is rewritten: its nodes in order, and the constants that the new ones need."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._sizes = {
            value.name: value.type.tensor_type.shape.dim[-1].dim_value
            for value in model.graph.value_info
            if value.type.tensor_type.shape.dim
        }
        self._convolutions = {node.name.removesuffix("/Conv"): node for node in model.graph.node if _is_conv(node)}
        self._producers = {output: node for node in model.graph.node for output in node.output}
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._made: set[str] = set()

    def graph(self) -> onnx.ModelProto:
        last_layers = self._last_layers()
        for node in self._model.graph.node:
            layer, _, part = node.name.removesuffix("/Conv").rpartition(".")
            if not _is_conv(node) or self._sizes.get(node.output[0], 0) < SMALLEST:
                self._nodes.append(node)
            elif part == "layout_shared" or (part == "context_shared" and layer in last_layers):
                self._shared_in_box(node)
            elif part in _LAYOUT_HEADS and layer not in last_layers:
                self._head_in_box(node, self._answer_to_zeros(layer, part))
            elif part in _LAYOUT_HEADS + _CONTEXT_HEADS and layer in last_layers:
                self._head_in_box(node, None)
            else:
                self._nodes.append(node)
        rebuilt = onnx.ModelProto()
        rebuilt.CopyFrom(self._model)
        del rebuilt.graph.node[:], rebuilt.graph.value_info[:]
        rebuilt.graph.node.extend(self._nodes)
        rebuilt.graph.initializer.extend(self._constants.values())
        return with_shapes(rebuilt)

    def _last_layers(self) -> set[str]:
        """The layer before `to_rgb` in each stage."""
        layers = {name.rpartition(".")[0] for name in self._convolutions if ".decoder." in name}
        stages = {layer.partition(".decoder.")[0] for layer in layers}
        return {f"{stage}.decoder.{sum(layer.startswith(f'{stage}.') for layer in layers) - 1}" for stage in stages}

    # -- convolutions in the box

    def _shared_in_box(self, node: onnx.NodeProto) -> None:
        """The first convolution of a branch, on its input around the box; beyond the picture lie zeros."""
        size = self._sizes[node.output[0]]
        source = node.input[0]
        around = f"{source}/around"
        if around not in self._made:
            self._made.add(around)
            box = self._box(size)
            margin = self._constant("box/margins", _ints(0, 0, REACH, REACH, 0, 0, REACH, REACH))
            self._add("Pad", [source, margin], f"{source}/padded")
            self._add("Slice", [f"{source}/padded", f"{box}/start", f"{box}/end+4", self._axes()], around)
        self._valid(node, around, node.output[0])

    def _head_in_box(self, node: onnx.NodeProto, outside: NDArray[np.float32] | None) -> None:
        """A head of a branch, in the box; around it `outside` (1, C, 3, 3) as corners, edges and middle, or zeros."""
        size = self._sizes[node.output[0]]
        box, output = self._box(size), node.output[0]
        inside = f"{node.input[0]}/inside"
        if inside not in self._made:
            self._made.add(inside)
            # What the first convolution answers beyond the picture is not zero, but what the second must see there is.
            self._add("Mul", [node.input[0], f"{box}/picture"], inside)
        if outside is None:
            self._valid(node, inside, f"{output}/box")
            self._add("Pad", [f"{output}/box", f"{box}/around"], f"{output}/everywhere", output)
            return
        self._valid(node, inside, f"{output}/box")
        patch = self._constant(f"{output}/outside", outside)
        self._add("Gather", [patch, f"{box}/ring"], f"{output}/rows", axis=2)
        self._add("Gather", [f"{output}/rows", f"{box}/ring"], f"{output}/base", axis=3)
        self._add("Slice", [f"{output}/base", f"{box}/start", f"{box}/end", self._axes()], f"{output}/base_box")
        self._add("Sub", [f"{output}/box", f"{output}/base_box"], f"{output}/change")
        self._add("Pad", [f"{output}/change", f"{box}/around"], f"{output}/changes")
        self._add("Add", [f"{output}/changes", f"{output}/base"], f"{output}/everywhere", output)

    def _valid(self, node: onnx.NodeProto, source: str, output: str) -> None:
        """The convolution without its own padding."""
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[0], copy.output[0] = source, output
        for attribute in copy.attribute:
            if attribute.name == "pads":
                attribute.ints[:] = [0, 0, 0, 0]
        self._nodes.append(copy)

    def _answer_to_zeros(self, layer: str, head: str) -> NDArray[np.float32]:
        """What a head answers to an empty layout: float32 (1, C, 3, 3), rows and columns first, middle, last."""
        weight, bias = (self._weight(f"{layer}.{head}.{part}").astype(np.float64) for part in ("weight", "bias"))
        hidden = np.maximum(self._weight(f"{layer}.layout_shared.bias").astype(np.float64), 0)
        taps = np.einsum("oikl,i->okl", weight, hidden)
        inside = (slice(1, 3), slice(0, 3), slice(0, 2))  # the taps that are not in the padding
        answer = [[bias + taps[:, rows, columns].sum((1, 2)) for columns in inside] for rows in inside]
        return np.moveaxis(np.array(answer), 2, 0)[None].astype(np.float32)

    # -- the box

    def _box(self, size: int) -> str:
        """The common name of the values that describe the box in pictures of this size; made at the first call."""
        box = f"box/{size}"
        if box in self._made:
            return box
        self._made.add(box)
        if "box" not in self._made:
            self._made.add("box")
            self._find_mask()
        for axis in ("rows", "columns"):
            step = self._constant(f"{box}/step", _ints(NATIVE_SIZE // size))
            self._add("Div", [f"box/{axis}/first", step], f"{box}/{axis}/first")
            self._add("Sub", [f"{box}/{axis}/first", self._number(REACH)], f"{box}/{axis}/reach")
            self._add("Max", [f"{box}/{axis}/reach", self._number(0)], f"{box}/{axis}/start")
            self._add("Div", [f"box/{axis}/last", step], f"{box}/{axis}/last")
            self._add("Add", [f"{box}/{axis}/last", self._number(REACH + 1)], f"{box}/{axis}/reach_end")
            self._add("Min", [f"{box}/{axis}/reach_end", self._number(size)], f"{box}/{axis}/end")
            self._add("Sub", [self._number(size), f"{box}/{axis}/end"], f"{box}/{axis}/rest")
            for extra in (REACH, 2 * REACH):
                self._add("Add", [f"{box}/{axis}/end", self._number(extra)], f"{box}/{axis}/end+{extra}")
        for edge in ("start", "end", f"end+{REACH}", f"end+{2 * REACH}", "rest"):
            self._add("Concat", [f"{box}/rows/{edge}", f"{box}/columns/{edge}"], f"{box}/{edge}", axis=0)
        none = self._constant("box/none", _ints(0, 0))
        self._add("Concat", [none, f"{box}/start", none, f"{box}/rest"], f"{box}/around", axis=0)
        picture = np.pad(np.ones((1, 1, size, size), np.float32), ((0, 0), (0, 0), (1, 1), (1, 1)))
        padded = self._constant(f"{box}/padded_picture", picture)
        self._add("Slice", [padded, f"{box}/start", f"{box}/end+{REACH}", self._axes()], f"{box}/picture")
        self._constant(f"{box}/ring", _ints(0, *[1] * (size - 2), 2))
        return box

    def _find_mask(self) -> None:
        """First and last row and column that the batch's masks touch; everything where no mask touches any."""
        self._add("ReduceMax", [self._mask(), self._constant("box/batch", _ints(0, 1))], "box/masks", keepdims=0)
        for axis, other in (("rows", 1), ("columns", 0)):
            self._add("ReduceMax", ["box/masks", self._number(other)], f"box/{axis}/touched", keepdims=0)
            self._add("ArgMax", [f"box/{axis}/touched"], f"box/{axis}/first", axis=0)
            reverse = [self._number(-1), self._number(-NATIVE_SIZE - 1), self._number(0), self._number(-1)]
            self._add("Slice", [f"box/{axis}/touched", *reverse], f"box/{axis}/reversed")
            self._add("ArgMax", [f"box/{axis}/reversed"], f"box/{axis}/behind", axis=0)
            self._add("Sub", [self._number(NATIVE_SIZE - 1), f"box/{axis}/behind"], f"box/{axis}/last")

    def _mask(self) -> str:
        """The mask as float (B, 1, S, S): the last channel of the layout of the largest pictures."""
        shared = next(
            node
            for name, node in self._convolutions.items()
            if name.endswith(".layout_shared") and self._sizes[node.output[0]] == NATIVE_SIZE
        )
        return str(self._producers[shared.input[0]].input[-1])

    # -- nodes and constants

    def _add(
        self, operator: str, inputs: Iterable[str], name: str, output: str | None = None, **attributes: Any
    ) -> None:
        self._nodes.append(helper.make_node(operator, list(inputs), [output or name], name=name, **attributes))

    def _constant(self, name: str, value: NDArray[np.int64] | NDArray[np.float32]) -> str:
        self._constants.setdefault(name, numpy_helper.from_array(value, name))
        return name

    def _number(self, value: int) -> str:
        return self._constant(f"box/{value}", _ints(value))

    def _axes(self) -> str:
        return self._constant("box/axes", _ints(2, 3))

    def _weight(self, name: str) -> NDArray[np.float32]:
        return numpy_helper.to_array(self._weights[name])


def _is_conv(node: onnx.NodeProto) -> bool:
    return bool(node.op_type == "Conv")


def _ints(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)
