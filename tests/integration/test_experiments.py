"""Experiments: they import against the current package, and their helpers compute what they should."""

from __future__ import annotations

import importlib
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


@pytest.fixture(scope="module")
def quantization() -> Iterator[ModuleType]:
    """The module, which belongs to no package."""
    sys.path.insert(0, str(ROOT / "experiments/quantization"))
    try:
        yield __import__("quantization")
    finally:
        sys.path.remove(str(ROOT / "experiments/quantization"))
        sys.modules.pop("quantization", None)


def result_of(psnr: float | None, **more: Any) -> dict[str, Any]:
    row = {"name": "int8", "psnr_db": psnr, "median_psnr_db": psnr, "max_grey": 3, **more}
    return {"least_psnr_db": 35.0, "rows": [row]}


def test_table_psnr_below_limit_is_marked(quantization: ModuleType) -> None:
    assert "34.9 dB, 34.9 dB **too far**" in quantization.table(result_of(34.9))
    assert "too far" not in quantization.table(result_of(35.0)) + quantization.table(result_of(None))
    row = result_of(
        40.0, p50_ms=70.2, times_as_fast=4.2, parts_ms={"convolutions": 40.4, "conversions": 9.6, "rest": 20}
    )
    assert "| 70 ms | 4.20× | 40, 10, 20 ms |" in quantization.table(row)


def test_with_table_page_with_old_table_replaces_it(quantization: ModuleType) -> None:
    page = f"before\n{quantization.BEGIN}\nold\n{quantization.END}\nafter\n"
    written = quantization.with_table(page, result_of(40.0))
    assert written.startswith("before\n") and written.endswith("after\n") and "old" not in written
    assert quantization.with_table(written, result_of(40.0)) == written


def test_with_plain_weights_half_weights_become_constants(quantization: ModuleType) -> None:
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


@pytest.mark.parametrize("name", ["adversarial", "cost", "norms", "quality", "scenes", "seams"])
def test_tiling_script_imports_against_the_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "experiments/tiling"))
    before = set(sys.modules)
    try:
        assert importlib.import_module(name).__doc__
    finally:
        for added in set(sys.modules) - before:
            if added in ("adversarial", "cost", "norms", "quality", "scenes", "seams"):
                del sys.modules[added]
