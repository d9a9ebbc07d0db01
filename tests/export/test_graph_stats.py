"""Counted work of an edit and of exported graphs: exact figures, updated with every intended change of the network."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest

from spmdeploy.export.graph_stats import graph_facts
from spmdeploy.model.flops import Work, edit_work
from spmdeploy.model.generator import PRESETS, GeneratorConfig

WORK = {
    ("paper", 34): Work(gflop=93.773426688, weight_bytes=296_387_968, written_bytes=1_045_508_304, operators=1227),
    ("small", 12): Work(gflop=23.063528448, weight_bytes=73_982_144, written_bytes=527_579_296, operators=1227),
}
# Node counts do not depend on the widths.
GRAPHS = {
    "edit.fp32": (1092, {"Conv": 381, "InstanceNormalization": 42, "Resize": 22, "Cast": 22, "Slice": 29}),
    "edit.fp16": (1302, {"Conv": 167, "ReduceMean": 84, "Resize": 22, "Cast": 114, "Slice": 29}),
    "edit_cpu.fp32": (2003, {"Conv": 420, "InstanceNormalization": 42, "Pad": 36, "Gather": 138, "Slice": 159}),
}


@pytest.mark.parametrize(("preset", "classes"), WORK)
def test_edit_work_of_preset_is_unchanged(preset: str, classes: int) -> None:
    size = PRESETS[preset]
    assert edit_work(GeneratorConfig(classes, size["width"], size["hidden"])) == WORK[preset, classes]


@pytest.mark.parametrize("name", GRAPHS)
def test_graph_operators_are_unchanged(name: str, street_bundle: Path) -> None:
    graph = onnx.load(street_bundle / "graphs" / f"{name}.onnx")
    nodes, some = GRAPHS[name]
    counted = Counter(node.op_type for node in graph.graph.node)
    assert {operator: counted[operator] for operator in some} == some
    assert len(graph.graph.node) == nodes


def test_graph_facts_gflop_equals_edit_work(street_bundle: Path) -> None:
    facts = graph_facts(onnx.load(street_bundle / "graphs/edit.fp32.onnx"))
    assert facts.gflop == pytest.approx(edit_work(GeneratorConfig(12, 2, 8)).gflop, rel=1e-6)
