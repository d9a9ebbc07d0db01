"""Charts of records."""

from __future__ import annotations

import io
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from spmdeploy.bench.plot import format_tick, plot_comparison, plot_record
from spmdeploy.errors import UnavailableError

from .conftest import FAST, empty_row, measured_row, record_of

UNAVAILABLE = empty_row("tensorrt", "unavailable", "no NVIDIA driver")
TORCH, OTHER = (0xC4, 0xCA, 0xD1), (0x9B, 0xBC, 0xE0)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def longest_run(image: np.ndarray, color: tuple[int, int, int]) -> int:
    return int((image == color).all(axis=2).sum(axis=1).max())


def test_plot_record_bars_are_proportional_to_medians() -> None:
    image = pixels(plot_record(record_of(measured_row(), measured_row("onnxruntime", FAST))))
    assert image.shape[1] == 1600 and image.shape[0] >= 900
    assert longest_run(image, TORCH) / longest_run(image, OTHER) == pytest.approx(805 / 402, rel=0.1)


def test_plot_record_row_without_figures_has_no_bar() -> None:
    image = pixels(plot_record(record_of(measured_row(), empty_row("onnxruntime", "differs", "wrong"), UNAVAILABLE)))
    assert longest_run(image, TORCH) > 100 and longest_run(image, OTHER) == 0


@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_plot_record_any_scale_is_drawn(scale: float) -> None:
    row = measured_row(turns=[[value * scale for value in turn] for turn in FAST])
    assert row.floor is not None
    row = replace(row, floor=replace(row.floor, milliseconds=200 * scale))
    assert longest_run(pixels(plot_record(record_of(row))), TORCH) > 100


def test_plot_comparison_draws_stable_rows_only() -> None:
    stable, other = measured_row(), measured_row("onnxruntime", FAST)
    assert other.latency_ms is not None
    unstable = replace(other, latency_ms=replace(other.latency_ms, unstable=True))
    assert longest_run(pixels(plot_comparison([record_of(stable, other)])), OTHER) > 20
    assert longest_run(pixels(plot_comparison([record_of(stable, unstable)])), OTHER) == 0


def test_plot_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib.backends.backend_agg", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnavailableError, match="matplotlib") as caught:
        plot_record(record_of(UNAVAILABLE))
    assert caught.value.hint == 'pip install "spmdeploy[bench]"'


def test_format_tick_uses_round_numbers() -> None:
    assert [format_tick(value) for value in (0, 2.5, 1500)] == ["0 ms", "2.5 ms", "1.5 s"]
