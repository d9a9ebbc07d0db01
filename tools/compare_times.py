"""Compares the times of an edit between two checkouts: `compare_times.py OLD NEW`.

The checkouts take turns in one run with the same Python: whole processes of `spmdeploy edit`, from start to file, or
with --warm edits from files to file in a process of each that keeps its editor open. Each has a cache of its own; the
first run of each fills it and is reported apart. With --size the sample is enlarged, given grain and masked in its
middle quarter.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

# Gray levels of standard deviation. Without grain an enlarged photo has no detail, and levels without any are skipped.
GRAIN = 4

# Runs inside each checkout, through the Python API that both revisions have. Prints a line when the editor is open and
# one with the seconds of every edit that a line of input asks for.
WARM_EDITS = """
import sys, time
import numpy as np
from PIL import Image
import spmdeploy

photo, _, labels, _, mask, output, backend = sys.argv[1:]
with spmdeploy.open_editor(backend=backend, device="cpu") as editor:
    print("open", flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        inputs = [np.asarray(Image.open(path)) for path in (photo, labels, mask)]
        Image.fromarray(editor.edit(*inputs).image).save(output, compress_level=1)
        print(time.perf_counter() - started, flush=True)
"""


def edit_files(folder: Path, sample: Path, size: str | None) -> list[str | Path]:
    """The photo, label map and mask of the edit, as arguments."""
    photo, labels, mask = sample / "photo.jpg", sample / "labels.png", sample / "mask.png"
    if size is not None:
        width, height = map(int, size.split("x"))
        enlarged = [folder / name for name in ("photo.png", "labels.png", "mask.png")]
        plain = np.asarray(Image.open(photo).resize((width, height), Image.Resampling.BICUBIC))
        grainy = plain + np.random.default_rng(0).normal(0, GRAIN, plain.shape)
        Image.fromarray(np.clip(grainy, 0, 255).astype(np.uint8)).save(enlarged[0])
        Image.open(labels).resize((width, height), Image.Resampling.NEAREST).save(enlarged[1])
        masked = Image.new("L", (width, height))
        masked.paste(255, (width // 4, height // 4, width // 4 * 3, height // 4 * 3))
        masked.save(enlarged[2])
        photo, labels, mask = enlarged
    return [photo, "--labels", labels, "--mask", mask]


def environment_of(checkout: Path, cache: Path) -> dict[str, str]:
    """The environment of the checkout's processes."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "SPMDEPLOY_CACHE": str(cache)}
    environment["PYTHONPYCACHEPREFIX"] = str(cache / "bytecode")  # compiled once, as an installation is by pip
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment


def seconds_of_process(checkout: Path, backend: str, cache: Path, files: list[str | Path]) -> float:
    """Seconds of one process of `spmdeploy edit`."""
    command = [sys.executable, "-m", "spmdeploy", "edit", *files, "--output", cache / "edited.png", "--overwrite"]
    command += ["--backend", backend, "--device", "cpu"]
    started = time.perf_counter()
    subprocess.run(
        list(map(str, command)),
        env=environment_of(checkout, cache),
        cwd=checkout,
        check=True,
        stderr=subprocess.DEVNULL,
    )
    return time.perf_counter() - started


def open_warm(
    stack: ExitStack, checkout: Path, backend: str, cache: Path, files: list[str | Path]
) -> Callable[[], float]:
    """Opens an editor in a process that ends with `stack`; returns what edits once and returns the seconds."""
    process = subprocess.Popen(
        [sys.executable, "-c", WARM_EDITS, *map(str, files), str(cache / "edited.png"), backend],
        env=environment_of(checkout, cache),
        cwd=checkout,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    stack.enter_context(process)
    asks, answers = process.stdin, process.stdout
    assert asks is not None and answers is not None
    assert answers.readline() == "open\n", f"the process of {checkout} has ended"

    def edit() -> float:
        print(file=asks, flush=True)
        return float(answers.readline())

    return edit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size", help="of the photo, such as 2048x1536; the sample's own without it")
    parser.add_argument("--backend", default="onnxruntime", help="of NEW; OLD always uses onnxruntime")
    parser.add_argument("--warm", action="store_true", help="edit in processes that keep their editors open")
    options = parser.parse_args()
    times: dict[str, list[float]] = {"old": [], "new": []}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        sample = next(options.new.resolve().glob("spmdeploy/**/car_away/photo.jpg")).parent
        files = edit_files(Path(folder), sample, options.size)
        edits: dict[str, Callable[[], float]] = {}
        for name, checkout in (("old", options.old), ("new", options.new)):
            cache = Path(folder) / name
            cache.mkdir()
            arguments = (checkout.resolve(), options.backend if name == "new" else "onnxruntime", cache, files)
            edits[name] = open_warm(stack, *arguments) if options.warm else partial(seconds_of_process, *arguments)
        for _ in range(options.rounds + 1):
            for name, edit in edits.items():
                times[name].append(edit())
    medians = {name: statistics.median(taken[1:]) for name, taken in times.items()}
    for name, taken in times.items():
        print(f"{name}: median {medians[name]:.3f} s, fastest {min(taken[1:]):.3f} s, first {taken[0]:.3f} s")
    print(f"ratio of the medians: {medians['new'] / medians['old']:.3f} (n = {options.rounds})")


if __name__ == "__main__":
    main()
