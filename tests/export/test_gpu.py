"""The graph for GPUs has fewer convolutions, the same results and the same weights in the file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from spmdeploy.export.external_data import ELEMENTS, WeightStore
from spmdeploy.export.gpu import order_weights, specialize_for_gpu
from spmdeploy.export.onnx import export_edit
from spmdeploy.model.generator import Generator, GeneratorConfig
from spmdeploy.training.ema import initialize
from spmdeploy.types import Modulation


def exported(modulation: Modulation) -> onnx.ModelProto:
    generator = Generator(GeneratorConfig(classes=5, width=2, hidden=32, modulation=modulation, stages=1)).eval()
    initialize(generator)
    model = export_edit(generator)
    order_weights(model)
    return model


def run(model: onnx.ModelProto) -> np.ndarray:
    rng = np.random.default_rng(0)
    maps = (1, 256, 256)
    inputs = {
        "image": rng.integers(0, 256, (*maps, 3), dtype=np.uint8),
        "labels": rng.integers(0, 6, maps, dtype=np.uint8),
        "instances": rng.integers(0, 3, maps, dtype=np.int32),
        "mask": np.tri(256, dtype=np.uint8)[None],
    }
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["unrounded"], inputs)[0]


@pytest.mark.parametrize(("modulation", "convolutions"), [("spm", 1 + 16 * 3 + 11 * 2), ("spade", 1 + 16 + 11 * 2)])
def test_specialize_for_gpu_merges_convolutions_and_keeps_results(modulation: Modulation, convolutions: int) -> None:
    model = exported(modulation)
    special = specialize_for_gpu(model)
    counted = Counter(node.op_type for node in special.graph.node)
    assert counted["Conv"] == convolutions and counted["InstanceNormalization"] == 0 and counted["ReduceMean"] == 2 * 16
    names = [node.name for node in special.graph.node]
    assert len(set(names)) == len(names)
    assert np.abs(run(special) - run(model)).max() < 0.1


def test_specialize_for_gpu_merged_weights_take_no_space(tmp_path: Path) -> None:
    model = exported("spm")
    store = WeightStore(tmp_path / "some.weights")
    store.without_weights(model)
    before = (tmp_path / "some.weights").stat().st_size
    special = specialize_for_gpu(model)
    onnx.save(store.without_weights(special), tmp_path / "special.onnx")
    own = {tensor.name for tensor in model.graph.initializer if np.prod(tensor.dims) >= ELEMENTS}
    added = [
        tensor
        for tensor in special.graph.initializer
        if np.prod(tensor.dims) >= ELEMENTS > 1 and tensor.name not in own
    ]
    assert len(added) > 20
    assert (tmp_path / "some.weights").stat().st_size < before * 1.04
    again = {tensor.name: tensor for tensor in onnx.load(tmp_path / "special.onnx").graph.initializer}
    for tensor in special.graph.initializer:
        assert np.array_equal(numpy_helper.to_array(again[tensor.name]), numpy_helper.to_array(tensor))


def test_weight_store_finds_a_part_of_a_tensor(tmp_path: Path) -> None:
    values = np.arange(6 * 64 * 9, dtype=np.float32).reshape(6, 64, 3, 3)
    sizes = []
    store = WeightStore(tmp_path / "some.weights")
    for part in (values, values[2:5], values[2:5] + 1):
        graph = onnx.helper.make_graph([], "graph", [], [], [numpy_helper.from_array(part, "weight")])
        store.without_weights(onnx.helper.make_model(graph))
        sizes.append((tmp_path / "some.weights").stat().st_size)
    assert sizes[0] == sizes[1] == values.nbytes and sizes[2] == 1.5 * values.nbytes
