"""A small data folder and a tiny model, so that whole runs take seconds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spmdeploy.datasets.samples import DataConfig, Sample, TrainingSamples
from spmdeploy.training.config import LossConfig, Phase, TrainConfig

CLASSES = ("sky", "road", "car")
COLORS = ((90, 140, 220), (100, 100, 100), (180, 30, 40))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are tiny, threads only cost; and sums are the same in every process
    yield
    torch.set_num_threads(threads)


def write_data_folder(
    root: Path, images: int, classes: tuple[str, ...] = CLASSES, size: tuple[int, int] = (140, 180)
) -> Path:
    """Writes skies over roads with one car each: the color of a pixel depends on its class alone."""
    height, width = size
    for split in ("train", "test"):
        for kind in ("images", "labels"):
            (root / split / kind).mkdir(parents=True)
        for index in range(images):
            labels = np.zeros((height, width), np.uint8)
            labels[height // 2 :] = 1
            labels[height // 2 : height // 2 + 40, 20 + index : 80 + index] = 2
            Image.fromarray(np.array(COLORS, np.uint8)[labels]).save(root / split / "images" / f"{index:03d}.png")
            Image.fromarray(labels).save(root / split / "labels" / f"{index:03d}.png")
    rows = [{"id": index, "name": name, "color": COLORS[index]} for index, name in enumerate(classes)]
    table = {"dataset": "toy", "void_id": None, "thing_ids": [2], "labels": rows}
    (root / "labels.json").write_text(json.dumps(table))
    return root


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data_folder(tmp_path_factory.mktemp("data"), images=6)


@pytest.fixture
def tiny(data_folder: Path) -> TrainConfig:
    """Two steps of each stage alone, then two of all together; no perceptual network, no validation."""
    return TrainConfig(
        data=DataConfig(str(data_folder), crop=128, validation=0),
        schedule=(
            Phase((0,), images=4, batch=2),
            Phase((1,), images=4, batch=2, inherit=True),
            Phase((0, 1, 2), images=4, batch=2),
        ),
        width=2,
        hidden=2,
        discriminator_width=2,
        loss=LossConfig(perceptual=0),
        checkpoint_seconds=1e9,
        report_images=1,
    )


def same(first: Sample, second: Sample) -> bool:
    return all(np.array_equal(getattr(first, part), getattr(second, part)) for part in vars(first))


def samples(root: Path, seed: int = 0, **options: object) -> TrainingSamples:
    return TrainingSamples(DataConfig(str(root), crop=128, validation=0, **options), seed)  # type: ignore[arg-type]
