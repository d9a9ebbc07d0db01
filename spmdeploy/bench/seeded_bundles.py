"""A bundle of a preset with random weights: speed does not depend on what a network has learnt."""

from __future__ import annotations

from pathlib import Path

import torch

from spmdeploy.export.pipeline import ExportOptions, export_bundle
from spmdeploy.labels import class_table
from spmdeploy.model.checkpoint import save_generator
from spmdeploy.model.generator import PRESETS, Generator, GeneratorConfig
from spmdeploy.types import Precision

SEED = 0
CLASSES = {"paper": "cityscapes", "small": "street"}
"""The table that a preset is measured with: how many classes there are decides what the layout branch costs."""


def export_random(preset: str, folder: Path, precisions: tuple[Precision, ...]) -> Path:
    """Writes `folder`/PRESET.spm with seeded weights. Returns its path."""
    table = class_table(CLASSES[preset])
    torch.manual_seed(SEED)
    checkpoint = folder / f"{preset}.safetensors"
    size = PRESETS[preset]
    save_generator(Generator(GeneratorConfig(len(table), size["width"], size["hidden"])), checkpoint)
    return export_bundle(checkpoint, folder / f"{preset}.spm", ExportOptions(table, precisions)).bundle.path
