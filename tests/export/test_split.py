"""Splitting of an edit graph into `layout` and `picture`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from spmdeploy.bundle.bundle import open_bundle
from spmdeploy.bundle.manifest import PARTS
from spmdeploy.export.split import split_by_layout


@pytest.mark.parametrize("whole", PARTS)
def test_split_by_layout_exported_parts_hold_every_weight_once(whole: str, street_bundle: Path) -> None:
    bundle = open_bundle(street_bundle)
    graph, layout, image = (
        onnx.load(bundle.path_of_graph(bundle.graph(name, "fp32"))) for name in (whole, *PARTS[whole])
    )
    for part in (layout, image):
        onnx.checker.check_model(part, full_check=True)
    cached = [value.name for value in layout.graph.output]
    assert {value.name for value in layout.graph.input} == {"labels", "instances", "mask"}
    assert {"image", *cached} <= {value.name for value in image.graph.input}
    weights = [{it.name for it in part.graph.initializer if it.name.startswith("stages.")} for part in (layout, image)]
    assert weights[0] | weights[1] == {it.name for it in graph.graph.initializer if it.name.startswith("stages.")}
    assert not weights[0] & weights[1]
    assert {name.split(".")[4].partition("_")[0] for name in weights[0]} == {"layout"}
    assert not any(".layout_" in name for name in weights[1])


def model(*nodes: onnx.NodeProto, weights: tuple[onnx.TensorProto, ...] = ()) -> onnx.ModelProto:
    """out = f(image, labels), all float[2]; with the type of every value."""
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("image", "labels", "out")}
    inner = {name for node in nodes for name in node.output} - {"out"}
    graph = helper.make_graph(
        list(nodes),
        "small",
        [values["image"], values["labels"]],
        [values["out"]],
        list(weights),
        value_info=[helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in inner],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def test_split_by_layout_constants_go_where_they_are_read() -> None:
    two, three = (numpy_helper.from_array(np.full(2, value, np.float32), f"{value}") for value in (2, 3))
    whole = model(
        helper.make_node("Neg", ["2"], ["minus two"]),
        helper.make_node("Mul", ["labels", "minus two"], ["product"]),
        helper.make_node("Add", ["product", "3"], ["sum"]),
        helper.make_node("Mul", ["image", "minus two"], ["other"]),
        helper.make_node("Add", ["other", "labels"], ["both"]),
        helper.make_node("Add", ["both", "sum"], ["out"]),
        weights=(two, three),
    )
    partition = split_by_layout(whole)
    layout, image = partition.layout.graph, partition.picture.graph
    assert [node.output[0] for node in layout.node] == ["minus two", "product", "sum"]
    assert [value.name for value in layout.output] == ["sum"]
    assert [node.output[0] for node in image.node] == ["minus two", "other", "both", "out"]
    assert [it.name for it in layout.initializer] == ["2", "3"] and [it.name for it in image.initializer] == ["2"]
    assert [value.name for value in layout.input] == ["labels"]
    assert [value.name for value in image.input] == ["image", "labels", "sum"]
