"""Counted operations of the presets and ablations."""

from __future__ import annotations

import pytest
import torch

from spmdeploy.model.flops import edit_gflop
from spmdeploy.model.generator import PRESETS, Generator, GeneratorConfig


@pytest.mark.parametrize(
    ("classes", "preset", "millions", "gflop"),
    [(34, "paper", 74.1, 93.8), (151, "paper", 76.9, 124.7), (12, "small", 18.5, 23.1)],
)
def test_presets_have_known_size_and_work(classes: int, preset: str, millions: float, gflop: float) -> None:
    config = GeneratorConfig(classes, **PRESETS[preset])
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in Generator(config).parameters())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.05)
    assert edit_gflop(config) == pytest.approx(gflop, abs=0.05)


def test_edit_gflop_of_ablations_is_known() -> None:
    """A single scale saves the two smaller stages; spade saves the context branch and two of four layout heads."""
    whole, single, spade = (
        edit_gflop(GeneratorConfig(34, **PRESETS["paper"], **switches))  # type: ignore[arg-type]
        for switches in ({}, {"stages": 1}, {"modulation": "spade"})
    )
    assert 0.7 < single / whole < 0.8  # the last stage is three quarters of the work
    assert 0.3 < spade / whole < 0.7
