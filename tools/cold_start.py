"""Compares whole processes of `spmdeploy edit`, from start to file, between two checkouts: `cold_start.py OLD NEW`.

The checkouts take turns in one run with the same Python. Each has a cache of its own, which is warm from the second of
its runs on; the first run of each is reported apart. With --size the sample is enlarged and the middle quarter masked.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image


def edit_files(folder: Path, sample: Path, size: str | None) -> list[str | Path]:
    """The photo, label map and mask of the edit, as arguments."""
    photo, labels, mask = sample / "photo.jpg", sample / "labels.png", sample / "mask.png"
    if size is not None:
        width, height = map(int, size.split("x"))
        enlarged = [folder / name for name in ("photo.png", "labels.png", "mask.png")]
        Image.open(photo).resize((width, height), Image.Resampling.BICUBIC).save(enlarged[0])
        Image.open(labels).resize((width, height), Image.Resampling.NEAREST).save(enlarged[1])
        masked = Image.new("L", (width, height))
        masked.paste(255, (width // 4, height // 4, width // 4 * 3, height // 4 * 3))
        masked.save(enlarged[2])
        photo, labels, mask = enlarged
    return [photo, "--labels", labels, "--mask", mask]


def seconds_of(checkout: Path, backend: str, cache: Path, files: list[str | Path]) -> float:
    """Seconds of one process."""
    command = [sys.executable, "-m", "spmdeploy", "edit", *files, "--output", cache / "edited.png", "--overwrite"]
    command += ["--backend", backend, "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "SPMDEPLOY_CACHE": str(cache)}
    environment["PYTHONPYCACHEPREFIX"] = str(cache / "bytecode")  # compiled once, as an installation is by pip
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    started = time.perf_counter()
    subprocess.run(list(map(str, command)), env=environment, cwd=checkout, check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size", help="of the photo, such as 2048x1536; the sample's own without it")
    parser.add_argument("--backend", default="onnxruntime", help="of NEW; OLD always uses onnxruntime")
    options = parser.parse_args()
    times: dict[str, list[float]] = {"old": [], "new": []}
    with tempfile.TemporaryDirectory() as folder:
        sample = next(options.new.resolve().glob("spmdeploy/**/car_away/photo.jpg")).parent
        files = edit_files(Path(folder), sample, options.size)
        for _ in range(options.rounds + 1):
            for name, checkout in (("old", options.old), ("new", options.new)):
                cache = Path(folder) / name
                cache.mkdir(exist_ok=True)
                backend = options.backend if name == "new" else "onnxruntime"
                times[name].append(seconds_of(checkout.resolve(), backend, cache, files))
    medians = {name: statistics.median(taken[1:]) for name, taken in times.items()}
    for name, taken in times.items():
        print(f"{name}: median {medians[name]:.3f} s, fastest {min(taken[1:]):.3f} s, first {taken[0]:.3f} s")
    print(f"ratio of the medians: {medians['new'] / medians['old']:.3f} (n = {options.rounds})")


if __name__ == "__main__":
    main()
