"""The experiment with fewer bits: what it prepares, and that the page shows what was committed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "bench/results/quantization_street_cpu.json"


@pytest.fixture(scope="module")
def quantization() -> Iterator[ModuleType]:
    """The module of bench/, which is no package."""
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        yield __import__("quantization")
    finally:
        sys.path.remove(str(ROOT / "bench"))
        sys.modules.pop("quantization", None)


def told(psnr: float | None, **more: Any) -> dict[str, Any]:
    row = {"name": "int8", "psnr_db": psnr, "median_psnr_db": psnr, "max_grey": 3, **more}
    return {"least_psnr_db": 35.0, "rows": [row]}


def test_what_drifts_too_far_is_marked(quantization: ModuleType) -> None:
    assert "34.9 dB, 34.9 dB **too far**" in quantization.table(told(34.9))
    assert "too far" not in quantization.table(told(35.0)) + quantization.table(told(None))
    row = told(40.0, p50_ms=70.2, times_as_fast=4.2, parts_ms={"convolutions": 40.4, "conversions": 9.6, "rest": 20})
    assert "| 70 ms | 4.20× | 40, 10, 20 ms |" in quantization.table(row)


def test_the_table_stands_between_the_markers(quantization: ModuleType) -> None:
    page = f"before\n{quantization.BEGIN}\nold\n{quantization.END}\nafter\n"
    written = quantization.with_table(page, told(40.0))
    assert written.startswith("before\n") and written.endswith("after\n") and "old" not in written
    assert quantization.with_table(written, told(40.0)) == written


def test_the_page_shows_the_committed_result(quantization: ModuleType) -> None:
    page = (ROOT / "docs/bench.md").read_text(encoding="utf-8")
    if RESULT.exists():
        assert quantization.with_table(page, json.loads(RESULT.read_text(encoding="utf-8"))) == page, "`make figures`"
    else:
        assert f"{quantization.BEGIN}\n\nNo figures yet.\n\n{quantization.END}" in page


def test_halves_become_the_weights_that_they_stand_for(quantization: ModuleType) -> None:
    half = np.array([1 / 3, -2], np.float16)
    nodes = [
        helper.make_node("Cast", ["w.half"], ["w.cast"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["w.cast", "one"], ["w"]),
        helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["w", "y"], ["z"]),
    ]
    ends = [helper.make_tensor_value_info(name, kind, [2]) for name, kind in (("x", 10), ("z", 1))]
    stored = [numpy_helper.from_array(half, "w.half"), numpy_helper.from_array(np.ones(1, np.float32), "one")]
    graph = helper.make_graph(nodes, "small", ends[:1], ends[1:], stored)
    plain = quantization.with_plain_weights(helper.make_model(graph)).graph
    assert [node.output[0] for node in plain.node] == ["y", "z"]  # only what computes weights is gone
    (weight,) = plain.initializer
    assert weight.name == "w" and weight.data_type == onnx.TensorProto.FLOAT
    np.testing.assert_array_equal(numpy_helper.to_array(weight), half.astype(np.float32) + 1)
