"""The tool that counts the kernels of an engine."""

from __future__ import annotations

from tools.count_kernels import count_layers

LAYERS = """Layers:
Name: __myl_Cast_0, LayerType: kgen, Inputs: [ { Name: image } ], StreamId: 0
Name: a/Conv, LayerType: correlation, Inputs: [], StreamId: 0
Name: b/Conv, LayerType: runtime_fusion, Inputs: [], StreamId: 1
Name: __mye1, LayerType: signal, Inputs: [], StreamId: 0
Name: __mye2, LayerType: wait, Inputs: [], StreamId: 1
Name: __mye3, LayerType: wait, Inputs: [], StreamId: 2
Name: norm, LayerType: runtime_function, Inputs: [], StreamId: 2
"""


def test_count_layers_separates_kernels_from_waits() -> None:
    expected = {"kernels": 4, "convolutions": 2, "fused convolutions": 1, "waits": 2, "signals": 1}
    assert count_layers(LAYERS) == expected
    assert count_layers("Layers:\n") == dict.fromkeys(expected, 0)
