"""Compares whole processes of `spmdeploy edit`, from start to file, between two checkouts: `cold_start.py OLD NEW`.

The checkouts take turns in one run with the same Python. Each has a cache of its own, which is warm from the second of
its runs on; the first run of each is reported apart.
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


def seconds_of(checkout: Path, backend: str, cache: Path) -> float:
    """Seconds of one process."""
    sample = next(checkout.glob("spmdeploy/**/car_away/photo.jpg")).parent
    files = ["--labels", sample / "labels.png", "--mask", sample / "mask.png", "--output", cache / "edited.png"]
    command = [sys.executable, "-m", "spmdeploy", "edit", sample / "photo.jpg", *files, "--overwrite"]
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
    parser.add_argument("--backend", default="onnxruntime", help="of NEW; OLD always uses onnxruntime")
    options = parser.parse_args()
    times: dict[str, list[float]] = {"old": [], "new": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds + 1):
            for name, checkout in (("old", options.old), ("new", options.new)):
                cache = Path(folder) / name
                cache.mkdir(exist_ok=True)
                backend = options.backend if name == "new" else "onnxruntime"
                times[name].append(seconds_of(checkout.resolve(), backend, cache))
    medians = {name: statistics.median(taken[1:]) for name, taken in times.items()}
    for name, taken in times.items():
        print(f"{name}: median {medians[name]:.3f} s, fastest {min(taken[1:]):.3f} s, first {taken[0]:.3f} s")
    print(f"ratio of the medians: {medians['new'] / medians['old']:.3f} (n = {options.rounds})")


if __name__ == "__main__":
    main()
