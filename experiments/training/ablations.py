"""Trains the network and two ablations on the same samples, and compares them on test images.

    python experiments/training/ablations.py --data data/camvid --runs runs/ablations

The paper's claims (section 4.4): the style of the known pixels in the modulation (SPM) beats the layout alone (SPADE),
and three stages beat one. Every variant sees the same samples in the same order, once for each seed. Finished runs are
not trained again, so that a second call goes on. Writes ablations.json, with 95 % intervals also of the difference in
LPIPS to the whole network over the same masks, and ablations.jpg.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spmdeploy.backends.pytorch import TorchSession
from spmdeploy.bench.machine import describe_machine
from spmdeploy.datasets.folder import read_classes
from spmdeploy.datasets.masks import MASK_KINDS
from spmdeploy.datasets.samples import Sample
from spmdeploy.evaluation.evaluate import bootstrap, evaluation_samples, run_samples
from spmdeploy.evaluation.metrics import Comparison, Images, Networks, Scores, frechet_distance, l1_under
from spmdeploy.imaging.contact_sheet import sheet
from spmdeploy.imaging.files import write_image
from spmdeploy.model.checkpoint import load_checkpoint
from spmdeploy.training.config import build_config
from spmdeploy.training.contact_sheets import apply_mask, layout
from spmdeploy.training.run_dir import RunDirectory
from spmdeploy.training.trainer import train

VARIANTS: dict[str, dict[str, Any]] = {
    "SPM, 3 stages": {"modulation": "spm", "stages": 3},
    "SPADE, 3 stages": {"modulation": "spade", "stages": 3},
    "SPM, 1 stage": {"modulation": "spm", "stages": 1},
}
WHOLE = next(iter(VARIANTS))
CROP = 128
BATCH = 4
SHEET_ROWS = 10


def train_variant(data: Path, run: Path, variant: dict[str, Any], images: int, seed: int) -> None:
    """Trains one variant unless its run directory is finished; goes on with an interrupted one."""
    config = build_config(
        data,
        "small",
        images=images,
        stages=variant["stages"],
        run_overrides={"modulation": variant["modulation"], "seed": seed, "bf16": True, "channels_last": True},
        data_overrides={"crop": CROP, "validation": 0},
        loss_overrides={"perceptual_network": "vgg16"},
        phase_overrides={"batch": BATCH, "generator_rate": 4e-4, "decay_from": 0.7, "perceptual_blocks": 4},
    )
    done = max((record["images"] for record in RunDirectory(run).metrics()), default=0)
    if done >= images:
        return
    started = time.monotonic()
    train(config, run, resume=(run / "config.json").exists(), report=lambda record: print(run.name, record, flush=True))
    print(f"{run.name}: {time.monotonic() - started:.0f} s", flush=True)


def test_samples(data: Path, limit: int) -> list[tuple[str, Sample]]:
    """The same masks of all kinds for every variant, each with its kind."""
    return [
        (kind, sample) for kind in MASK_KINDS for sample in evaluation_samples(data, 0, kind, crop=CROP, limit=limit)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the run directories")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--images", type=int, default=1200, help="samples of each run")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--limit", type=int, default=60, help="test images, each with a mask of every kind")
    options = parser.parse_args()

    runs = {
        (name, seed): options.runs / f"{variant['modulation']}-{variant['stages']}-seed{seed}"
        for seed in range(options.seeds)
        for name, variant in VARIANTS.items()
    }
    for (name, seed), run in runs.items():
        train_variant(options.data, run, VARIANTS[name], options.images, seed)

    samples = test_samples(options.data, options.limit)
    photos = np.stack([sample.image for _, sample in samples])
    masks = np.stack([sample.mask for _, sample in samples])
    networks = Networks()
    features = networks.features(photos)
    rows = []
    lpips: dict[tuple[str, int], Scores] = {}
    edits: dict[str, Images] = {}  # of the first seed
    for (name, seed), run in runs.items():
        session = TorchSession(load_checkpoint(run / "export" / "generator.safetensors").generator)
        edited = run_samples(session, [sample for _, sample in samples])
        comparison = Comparison(edited, photos, masks, networks, features)
        lpips[name, seed] = comparison.lpips
        edits.setdefault(name, edited)
        row: dict[str, Any] = {
            "variant": name,
            "seed": seed,
            "lpips": vars(bootstrap(comparison.lpips, 0)),
            "l1": vars(bootstrap(comparison.per_image(l1_under), 0)),
            "frechet": frechet_distance(networks.features(edited), features),
        }
        if name != WHOLE:
            row["lpips_minus_whole"] = vars(bootstrap(comparison.lpips - lpips[WHOLE, seed], 0))
        rows.append(row)
        print(json.dumps(row), flush=True)

    options.output.mkdir(parents=True, exist_ok=True)
    record = {
        "images": options.images,
        "crop": CROP,
        "batch": BATCH,
        "masks": len(samples),
        "torch": torch.__version__,
        "machine": describe_machine().title(),
        "rows": rows,
    }
    (options.output / "ablations.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    classes = read_classes(options.data)
    chosen = range(0, len(samples), max(1, len(samples) // SHEET_ROWS))
    page = [
        {
            samples[index][0]: apply_mask(samples[index][1]),
            "labels": layout(samples[index][1], classes),
            **{name: edited[index] for name, edited in edits.items()},
            "photo": photos[index],
        }
        for index in chosen
    ]
    write_image(options.output / "ablations.jpg", sheet(page), overwrite=True)


if __name__ == "__main__":
    main()
