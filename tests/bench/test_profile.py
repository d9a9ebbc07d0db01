"""Profiled operations are assigned to parts of the network by their names."""

from __future__ import annotations

import onnx
import pytest

import spmdeploy
from spmdeploy.bench.profile import Operation, group_by_layer, kind_of, stage_of
from spmdeploy.bundle.bundle import open_bundle


@pytest.mark.parametrize(
    ("name", "operator", "stage", "kind"),
    [
        ("stages.0.encoder.3.features/Conv_nchwc", "Conv", "1", "main convolution"),
        ("stages.2.decoder.5.context_gamma/Conv", "Conv", "3", "context modulation"),
        ("stages.1.encoder.0.layout_beta_shift/Conv_nchwc", "Conv", "2", "layout branch"),
        ("stages.1.encoder.0/Relu_nchwc", "Conv", "2", "context modulation"),
        ("stages.1.encoder.0/Relu_2_nchwc", "Conv", "2", "layout branch"),
        ("stages.1/Tanh_nchwc", "Conv", "2", "to RGB"),
        ("stages.2.to_rgb/Conv", "Conv", "3", "to RGB"),
        ("stages.2.encoder.4/InstanceNormalization", "InstanceNormalization", "3", "normalization"),
        ("stages.2/Resize_7", "Resize", "3", "resize"),
        ("generator/Resize_1_nchwc", "Upsample", "-", "resize"),
        ("stages.2.decoder.5/Mul_3", "Mul", "3", "modulation arithmetic"),
        ("stages.2/Concat_1", "Concat", "3", "skips and compositing"),
        ("stages.2.decoder.5.layout_beta_shift/Conv/unchanged_nchwc", "Conv", "3", "layout branch"),
        ("stages.2.decoder.5/scaled_gamma", "Mul", "3", "modulation arithmetic"),
        ("stages.2.decoder.5/around/scaled_gamma", "Mul", "3", "around the mask"),
        ("stages.2.decoder.5/borders/change", "ScatterElements", "3", "around the mask"),
        ("stages.2.decoder.5/changed", "Add", "3", "around the mask"),
        ("stages.2/Tanh/around", "Pad", "3", "around the mask"),
        ("stages.2.decoder.5/LeakyRelu_nchwc", "Conv", "3", "modulation arithmetic"),
        ("stages.2.decoder.5/LeakyRelu/same_nchwc", "Conv", "3", "modulation arithmetic"),
        ("stages.2.decoder.5/Relu_2", "FusedConv", "3", "layout branch"),
        ("stages.2.decoder.5.layout_shared/present", "Gather", "3", "layout branch"),
        ("classes/found", "Where", "-", "around the mask"),
        ("stages.2.decoder.5/Relu_2/inside", "Mul", "3", "around the mask"),
        ("box/256/rows/end", "Min", "-", "around the mask"),
        ("edit/Round", "Round", "-", "conditioning and compositing"),
        ("stages.0.encoder.1.features", "conv2d", "1", "main convolution"),
        ("stages.0.encoder.1", "instance_norm", "1", "normalization"),
        ("stages.0.encoder.1", "mul", "1", "modulation arithmetic"),
        ("stages.0", "upsample_bilinear2d", "1", "resize"),
    ],
)
def test_kind_of_operation_name(name: str, operator: str, stage: str, kind: str) -> None:
    assert (stage_of(name), kind_of(name, operator)) == (stage, kind)


def test_kind_of_builtin_graph_covers_every_convolution() -> None:
    bundle = open_bundle(spmdeploy.default_model())
    graph = onnx.load_from_string(bundle.read(bundle.manifest.graphs[0].file)).graph
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    kinds = {kind_of(node.name, node.op_type) for node in convolutions if not node.name.endswith("/same")}
    assert kinds == {"main convolution", "context modulation", "layout branch", "to RGB"}
    blocking = {kind_of(node.name, node.op_type) for node in convolutions if node.name.endswith("/same")}
    assert blocking == {"modulation arithmetic"}
    assert {stage_of(node.name) for node in graph.node} == {"1", "2", "3", "-"}


def test_group_by_layer_averages_runs() -> None:
    parts = group_by_layer(
        [
            Operation("stages.0.encoder.0.features/Conv", "Conv", 4000),
            Operation("ReorderOutput_token_1", "ReorderOutput", 2000),
            Operation("stages.0.encoder.1.features/Conv", "Conv", 6000),
            Operation("edit/Round", "Round", 8000),
        ],
        runs=2,
    )
    times = [(part.stage, part.kind, part.milliseconds) for part in parts]
    assert times == [
        ("1", "main convolution", 5.0),
        ("-", "conditioning and compositing", 4.0),
        ("1", "memory layout", 1.0),
    ]
    assert sum(part.share for part in parts) == pytest.approx(1)
    assert group_by_layer([], 1) == ()
