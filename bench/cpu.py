"""What an edit costs on this machine's CPU: ONNX Runtime against eager PyTorch, cold start, peak memory.

    python bench/cpu.py --output bench/results/cpu.json

One 256×256 edit of the `paper` preset, alternating between the two in one run; `spmdeploy edit` from process start to
file on disk with the `small` preset; the largest resident set of a process that edits with the `paper` bundle. Weights
are random: they do not change the time. The bundles are exported once, into --bundles.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SAMPLE = Path(__file__).parents[1] / "spmdeploy/samples/car_away"
CLASSES = {"paper": "cityscapes", "small": "street"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--bundles", type=Path, default=Path(tempfile.gettempdir()) / "spmdeploy-bench")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    options.bundles.mkdir(parents=True, exist_ok=True)
    paper, small = (exported(preset, options.bundles) for preset in ("paper", "small"))
    result = {
        "schema": "spmdeploy.bench-cpu/1",
        "command": "python bench/cpu.py --output FILE",
        "machine": machine(),
        "edit_256_paper": against_eager(paper, options.repeats, masked=None),
        "edit_256_paper_quarter_masked": against_eager(paper, options.repeats, masked=0.25),
        "cold_start_small": cold_start(small, options.repeats),
        "peak_memory_paper_mb": peak_memory(paper),
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def exported(preset: str, folder: Path) -> Path:
    """An FP32 bundle of the preset with seeded random weights."""
    bundle = folder / f"{preset}.spm"
    if not bundle.exists():
        import torch

        from spmdeploy.export.pipeline import ExportOptions, export_bundle
        from spmdeploy.labels import class_table
        from spmdeploy.networks.generator import PRESETS, Generator, GeneratorConfig
        from spmdeploy.networks.weights import save_generator

        table = class_table(CLASSES[preset])
        torch.manual_seed(0)
        checkpoint = folder / f"{preset}.safetensors"
        save_generator(Generator(GeneratorConfig(len(table), **PRESETS[preset])), checkpoint)
        export_bundle(checkpoint, bundle, ExportOptions(table, precisions=("fp32",)))
    return bundle


def against_eager(path: Path, repeats: int, masked: float | None) -> dict[str, Any]:
    """Median seconds of one edit in each backend, alternating, and how far their pictures are apart.

    masked: part of the picture under a square mask in its middle; None: the sample's own mask.
    """
    import spmdeploy
    from spmdeploy.bundle import open_bundle
    from spmdeploy.runtime.golden import measure_drift, read_golden

    bundle = open_bundle(path)
    golden = read_golden(bundle, bundle.manifest.golden[0])
    if masked is not None:
        golden = replace(golden, mask=square_mask(masked))
    sessions = {backend: spmdeploy.open_editor(path, backend).session for backend in ("onnxruntime", "torch")}
    edits: dict[str, Callable[[], Any]] = {
        backend: lambda session=session: session.run(golden.image, golden.labels, golden.instances, golden.mask)
        for backend, session in sessions.items()
    }
    pictures = {backend: edit() for backend, edit in edits.items()}  # the warm-up too
    seconds: dict[str, list[float]] = {backend: [] for backend in edits}
    for _ in range(repeats):
        for backend, edit in edits.items():
            started = time.perf_counter()
            edit()
            seconds[backend].append(time.perf_counter() - started)
    drift = measure_drift(pictures["onnxruntime"], pictures["torch"], golden.mask)
    ratios = [slow / fast for slow, fast in zip(seconds["torch"], seconds["onnxruntime"], strict=True)]
    return {
        "repeats": repeats,
        "masked_share": round(float(np.mean(golden.mask != 0)), 4),
        "median_seconds": {backend: round(statistics.median(times), 4) for backend, times in seconds.items()},
        "samples": {backend: [round(value, 4) for value in times] for backend, times in seconds.items()},
        "median_speedup": round(statistics.median(ratios), 3),
        "drift": drift.to_json(),
        "gflop": bundle.manifest.generator.gflop,
    }


def square_mask(share: float) -> NDArray[np.uint8]:
    """uint8 (1, 256, 256)."""
    side = round(256 * share**0.5)
    start = (256 - side) // 2
    mask = np.zeros((1, 256, 256), np.uint8)
    mask[:, start : start + side, start : start + side] = 1
    return mask


def cold_start(bundle: Path, repeats: int) -> dict[str, Any]:
    """Seconds from process start to the edited file, the first run (which fills the page cache) not counted."""
    with tempfile.TemporaryDirectory() as folder:
        times = []
        for _ in range(repeats + 1):
            started = time.perf_counter()
            subprocess.run(edit_command(bundle, Path(folder) / "edited.png"), check=True, capture_output=True)
            times.append(time.perf_counter() - started)
    times = times[1:]
    return {"median_seconds": round(statistics.median(times), 3), "samples": [round(value, 3) for value in times]}


def peak_memory(bundle: Path) -> int:
    """Largest resident set of `spmdeploy edit`, in MB of 1e6 bytes."""
    with tempfile.TemporaryDirectory() as folder:
        code = (
            "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, capture_output=True);"
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        )
        command = [sys.executable, "-c", code, *edit_command(bundle, Path(folder) / "edited.png")]
        kilobytes = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return round(kilobytes * 1024 / 1e6)


def edit_command(bundle: Path, output: Path) -> list[str]:
    command = [sys.executable, "-m", "spmdeploy", "edit", str(SAMPLE / "photo.jpg"), "--fill", "road"]
    return [
        *command,
        "--mask",
        str(SAMPLE / "mask.png"),
        "--model",
        str(bundle),
        "--output",
        str(output),
        "--overwrite",
    ]


def machine() -> dict[str, Any]:
    """What a reader must know to compare."""
    import onnxruntime
    import torch

    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next(
            (line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line), ""
        )
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
        "load_before": round(os.getloadavg()[0], 2),
    }


if __name__ == "__main__":
    main()
