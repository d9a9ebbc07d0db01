"""Measures how many training samples per second are prepared on the host, without a network.

    python experiments/training/loading.py [--data FOLDER] [--workers 2] [--samples 3000]

Without --data, images of 480 x 360 with CamVid's number of classes are generated in a temporary folder. Images are read
once before the measurement, as in a run whose images fit into memory; --cold measures reading and decoding too. Prints
one line of JSON: the rates of the repetitions by wall clock, and the processor time per sample, which other load on the
machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from spmdeploy.datasets.samples import DataConfig, HostBatch, TrainingSamples
from spmdeploy.training.loader import BackgroundLoader

CLASSES = 12
BATCH = 8


def write_data(root: Path, count: int = 64, height: int = 360, width: int = 480) -> Path:
    """Writes smooth noise with blocks of labels: files as large as photos, masks of all kinds."""
    rng = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (root / "train" / kind).mkdir(parents=True)
    for index in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(root / "train" / "images" / f"{index:03d}.png")
        ids = Image.fromarray(rng.integers(0, CLASSES, (height // 60, width // 60), np.uint8))
        ids.resize((width, height), Image.Resampling.NEAREST).save(root / "train" / "labels" / f"{index:03d}.png")
    labels = [{"id": index, "name": f"class {index}", "color": [20 * index, 0, 0]} for index in range(CLASSES)]
    table = {"dataset": "noise", "void_id": None, "thing_ids": [8, 9, 10], "labels": labels}
    (root / "labels.json").write_text(json.dumps(table))
    return root


def measure(samples: TrainingSamples, count: int, workers: int) -> tuple[float, float]:
    """Samples per second by wall clock, and milliseconds of processor time per sample."""

    def load(position: int) -> HostBatch:
        return samples.host_batch(range(position, position + BATCH))

    loader = BackgroundLoader(load, 0, BATCH, workers, end=count)
    wall, processor = time.perf_counter(), time.process_time()
    loaded = sum(len(batch.image) for batch in loader)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    loader.close()
    assert loaded >= count
    return loaded / wall, 1000 * processor / loaded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="data folder; generated without")
    parser.add_argument("--workers", type=int, default=2, help="threads that prepare batches")
    parser.add_argument("--samples", type=int, default=3000, help="samples per repetition")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--scale-jitter", type=float, nargs=2, default=(1.0, 1.0), metavar=("LOW", "HIGH"))
    parser.add_argument("--color-jitter", type=float, default=0.0)
    parser.add_argument("--cold", action="store_true", help="read the files in every repetition")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = options.data or write_data(Path(folder))
        low, high = options.scale_jitter
        config = DataConfig(str(root), min_scale=low, max_scale=high, color_jitter=options.color_jitter, validation=0)
        samples = TrainingSamples(config, seed=0)
        if not options.cold:
            for position in range(samples.epoch_length):
                samples.at(position)
        rates = []
        for _ in range(options.repetitions):
            if options.cold:
                samples = TrainingSamples(config, seed=0)
            rates.append(measure(samples, options.samples, options.workers))
    wall = [round(rate, 1) for rate, _ in rates]
    result = {
        "samples_per_second": {"median": statistics.median(wall), "all": wall},
        "processor_ms_per_sample": round(statistics.median(cost for _, cost in rates), 3),
        "crop": config.crop,
        "workers": options.workers,
        "scale_jitter": [low, high],
        "color_jitter": options.color_jitter,
        "cold": options.cold,
        "data": "given" if options.data else "generated, 480x360",
        "cpus": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
