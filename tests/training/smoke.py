"""`make train-smoke`: training works at all. About a minute on two cores; prints the losses and fails unless they fall.

A small generator overfits four street images, all three stages at once, with every loss of the recipe. The
tests run the same with fewer steps and without the perceptual network.

    python -m tests.training.smoke
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spmdeploy.assets.samples import SAMPLE_EDITS
from spmdeploy.datasets.samples import DataConfig
from spmdeploy.imaging.files import write_image
from spmdeploy.imaging.resize import resize_labels, resize_photo
from spmdeploy.labels import class_table
from spmdeploy.training.config import LossConfig, Phase, TrainConfig
from spmdeploy.training.logging import progress_line
from spmdeploy.training.run_dir import RunDirectory
from spmdeploy.training.trainer import train

SIDE = 128
STEPS = 80
FALLS_TO = {"l1": 0.6, "perceptual": 0.9}
"""The part of its first value that each loss must fall to. Measured: 0.43 and 0.79."""


def write_street_images(root: Path) -> Path:
    """Writes a data folder of four real images: the left and the right part of two sample photos, 128 × 128."""
    table = class_table("street")
    for kind in ("images", "labels"):
        (root / "train" / kind).mkdir(parents=True)
    for sample in SAMPLE_EDITS[:2]:
        photo, labels, _ = sample.read(table)
        height, width = labels.shape
        for part, left in (("left", 0), ("right", width - height)):
            square = (slice(0, height), slice(left, left + height))
            name = f"{sample.name}_{part}.png"
            write_image(root / "train/images" / name, resize_photo(photo[square], SIDE, SIDE))
            write_image(root / "train/labels" / name, resize_labels(labels[square], SIDE, SIDE))
    (root / "labels.json").write_text(json.dumps(table.to_json()))
    return root


def smoke_config(root: Path, steps: int, stages: tuple[int, ...] = (0, 1, 2), perceptual: float = 1.0) -> TrainConfig:
    phase = Phase(
        stages,
        images=4 * steps,
        batch=4,
        generator_rate=2e-3,
        discriminator_rate=1e-3,
        perceptual_blocks=2,
        perceptual_crop=SIDE // 2,
    )
    return TrainConfig(
        data=DataConfig(str(root), crop=SIDE, validation=0),
        schedule=(phase,),
        width=6,
        hidden=8,
        discriminator_width=6,
        loss=LossConfig(adversarial=0.05, l1_inside=5, perceptual=perceptual, perceptual_network="vgg16"),
        report_images=20,
    )


def falls(metrics: Sequence[dict[str, Any]], name: str) -> float:
    """The mean of a loss over the last fifth of the records, as a part of that over the first fifth."""
    values = [record[name] for record in metrics if record["kind"] == "train"]
    few = max(1, len(values) // 5)
    return float(np.mean(values[-few:]) / np.mean(values[:few]))


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        root = write_street_images(Path(folder) / "data")
        config = smoke_config(root, STEPS)
        run = Path(folder) / "run"
        train(config, run, False, lambda record: print(progress_line(record, config), flush=True))
        metrics = RunDirectory(run).metrics()
    found = {name: falls(metrics, name) for name in FALLS_TO}
    for name, part in found.items():
        print(f"{name} fell to {part:.2f} of its first value; at most {FALLS_TO[name]} is expected")
    return int(any(part > FALLS_TO[name] for name, part in found.items()))


if __name__ == "__main__":
    sys.exit(main())
