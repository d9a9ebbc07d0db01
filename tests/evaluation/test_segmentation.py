from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from spmdeploy.errors import InputError
from spmdeploy.evaluation.segmentation import Segmenter, accuracy, confusion_matrix, mean_iou
from spmdeploy.labels import ClassTable
from tests.toy_dataset import CLASSES, COLORS

CLASS_TABLE = ClassTable.from_json(
    {
        "name": "toy",
        "void_id": None,
        "classes": [{"id": i, "name": name, "color": list(COLORS[i])} for i, name in enumerate(CLASSES)],
    },
    "test",
)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
# The network's numbers are not the folder's ids: 0 is something else, 1 is car, 2 sky, 3 road.
TABLE = {"classes": {"1": "car", "2": "sky", "3": "road"}, "mean": MEAN, "std": STD}


def write_segmenter(
    path: Path, size: tuple[Any, Any] = ("h", "w"), channels: int = 3, element: int = TensorProto.FLOAT
) -> Path:
    """A network that knows each class by its color: its score is minus the squared distance, less what all share.

    |x - c|² = |x|² - 2 x·c + |c|²: a 1 × 1 convolution. Halved in size, as real ones answer at a lower resolution.
    """
    colors = np.array([(255, 0, 255), COLORS[2], COLORS[0], COLORS[1]]) / 255
    centers = ((colors - MEAN) / STD) * np.array(STD)  # distances in 0..1 colors, the network undoes the scale
    weight = (2 * centers * np.array(STD))[:, :, None, None].astype(np.float32)
    bias = -(centers**2).sum(axis=1).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["image", "weight", "bias"], ["full"]),
            helper.make_node("AveragePool", ["full"], ["scores"], kernel_shape=[2, 2], strides=[2, 2]),
        ],
        "toy",
        [helper.make_tensor_value_info("image", element, [1, channels, *size])],
        [helper.make_tensor_value_info("scores", element, None)],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def write_table(path: Path, **changes: object) -> Path:
    path.write_text(json.dumps(TABLE | changes))
    return path


def image_of(labels: np.ndarray) -> np.ndarray:
    return np.array(COLORS, np.uint8)[labels]


def street() -> np.ndarray:
    labels = np.zeros((64, 64), np.uint8)
    labels[32:] = 1
    labels[24:48, 8:40] = 2
    return labels


@pytest.mark.parametrize("size", [("h", "w"), (None, None), (64, 64), (128, 32)])
def test_predict_gives_ids_of_the_folder(tmp_path: Path, size: tuple[Any, Any]) -> None:
    network = write_segmenter(tmp_path / "toy.onnx", size)
    segmenter = Segmenter(network, write_table(tmp_path / "t.json"), CLASS_TABLE)
    found = segmenter.predict(image_of(street()))
    assert found.shape == (64, 64)
    assert (found == street()).mean() > 0.9  # the borders of classes blur at half the size
    assert segmenter.scored_classes.tolist() == [True, True, True]


def test_predict_number_outside_the_table_is_255(tmp_path: Path) -> None:
    network, table = write_segmenter(tmp_path / "toy.onnx"), write_table(tmp_path / "t.json", classes={"3": "road"})
    segmenter = Segmenter(network, table, CLASS_TABLE)
    assert segmenter.scored_classes.tolist() == [False, True, False]
    found = segmenter.predict(image_of(street()))
    assert set(np.unique(found)) == {1, 255}


def test_confusion_matrix_counts_scored_labels_under_the_mask() -> None:
    labels = np.array([[0, 0, 1, 2, 9]], np.uint8)
    found = np.array([[0, 1, 255, 2, 0]], np.uint8)
    counts = confusion_matrix(labels, found, np.ones((1, 5), bool), np.array([True, True, False]))
    assert counts.tolist() == [[1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    masked = confusion_matrix(labels, found, np.array([[True, False, True, True, True]]), np.array([True, True, True]))
    assert masked.tolist() == [[1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]


def test_accuracy_and_mean_iou_of_known_counts() -> None:
    counts = np.array([[6, 2, 0, 0], [1, 3, 0, 2], [0, 0, 0, 0]])
    assert accuracy(counts) == 9 / 14
    assert mean_iou(counts) == pytest.approx((6 / (8 + 1) + 3 / (6 + 2)) / 2)
    assert np.isnan(accuracy(counts * 0)) and np.isnan(mean_iou(counts * 0))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "not a table"),
        ("{", "not a table"),
        ('{"classes": {}}', "not a table"),
        ('{"classes": {"x": "road"}}', "not a table"),
        ('{"classes": {"-1": "road"}}', "not a table"),
        ('{"classes": {"0": "moon"}}', "no class 'moon'"),
        ('{"classes": {"0": "road"}, "mean": [1, 2]}', "three numbers each"),
        ('{"classes": {"0": "road"}, "std": [1, 0, 2]}', "std not 0"),
    ],
)
def test_segmenter_bad_table_is_named(tmp_path: Path, content: str, message: str) -> None:
    network = write_segmenter(tmp_path / "toy.onnx")
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(InputError, match=message):
        Segmenter(network, tmp_path / "t.json", CLASS_TABLE)


def test_segmenter_unusable_network_is_named(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.json")
    (tmp_path / "no.onnx").write_bytes(b"no graph")
    with pytest.raises(InputError, match=r"no\.onnx: not a network that ONNX Runtime reads"):
        Segmenter(tmp_path / "no.onnx", table, CLASS_TABLE)
    with pytest.raises(InputError, match=r"missing\.onnx: not a network"):
        Segmenter(tmp_path / "missing.onnx", table, CLASS_TABLE)
    beyond = write_table(tmp_path / "f.json", classes={"9": "car"})
    few = Segmenter(write_segmenter(tmp_path / "few.onnx"), beyond, CLASS_TABLE)
    with pytest.raises(InputError, match=r"few\.onnx: its first output has the shape \[1, 4, 32, 32\]"):
        few.predict(image_of(street()))


def test_segmenter_network_with_other_inputs_is_named(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["image"], ["edited"])],
        "edit",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [1, 64, 64, 3])],
        [helper.make_tensor_value_info("edited", TensorProto.UINT8, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, tmp_path / "edit.onnx")
    with pytest.raises(InputError, match=r"its inputs are image tensor\(uint8\).*float32 \[N, 3, H, W\] is needed"):
        Segmenter(tmp_path / "edit.onnx", write_table(tmp_path / "t.json"), CLASS_TABLE)
