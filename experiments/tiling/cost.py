"""Time and memory of edits of large photos, against the same mask in a small photo.

    python experiments/tiling/cost.py --backend onnxruntime --output FILE.json

Each figure comes from a process of its own, which loads the model and makes one small edit before it is measured.
Photos are noise: their content changes neither figure. CPU seconds are used because other work on the machine changes
them little.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from scenes import write_results

import spmdeploy

CASES = {
    "1024×1024, 2 % of 3840×2160 masked": (1024, 1024, 407),
    "3840×2160, 2 % masked": (2160, 3840, 407),
    "3840×2160, 25 % masked": (2160, 3840, 1440),
    "12000×8400, 1 % masked": (8400, 12000, 1000),
}
"""Height, width and side of the square mask."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("cost.json"))
    parser.add_argument("--model", type=Path, default=spmdeploy.default_model(), help="bundle")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--case", choices=list(CASES), help="measure this case only, in this process")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measured(options.model, options.backend, *CASES[options.case])))
        return
    rows = {}
    for case in CASES:
        command = [sys.executable, __file__, "--model", str(options.model), "--backend", options.backend]
        done = subprocess.run([*command, "--case", case], check=True, capture_output=True, text=True)
        rows[case] = json.loads(done.stdout)
        print(case, rows[case], flush=True)
    command = f"python experiments/tiling/cost.py --backend {options.backend} --output FILE"
    write_results(options.output, "cost", options.model, rows, command=command)


def measured(model: Path, backend: str, height: int, width: int, side: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    with spmdeploy.open_editor(model, backend) as editor:
        loaded = resident_mb()
        small = np.zeros((500, 500), bool)
        small[100:400, 100:400] = True
        editor.edit(rng.integers(0, 256, (500, 500, 3), np.uint8), np.full(small.shape, 3, np.uint8), small)
        photo = rng.integers(0, 256, (height, width, 3), np.uint8)
        mask = np.zeros((height, width), bool)
        top, left = (height - side) // 2, (width - side) // 2
        mask[top : top + side, left : left + side] = True
        labels = np.full(mask.shape, 3, np.uint8)
        cpu = time.process_time()
        report = editor.edit(photo, labels, mask).report
        return {
            "tiling": report.tiling,
            "tiles": report.tiles,
            "cpu_seconds": round(time.process_time() - cpu, 2),
            "cpu_seconds_outside_the_network": round(
                sum(spent for phase, spent in report.milliseconds.items() if phase != "run") / 1000, 3
            ),
            "peak_mb_above_loaded_model": peak_mb() - loaded,
            "of_which_inputs_mb": round((photo.nbytes + mask.nbytes + labels.nbytes) / 1e6),
            "provider": report.provider,
        }


def resident_mb() -> int:
    """Resident set of this process now, in MB of 1e6 bytes (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * resource.getpagesize() / 1e6)


def peak_mb() -> int:
    """Largest resident set of this process so far, in MB of 1e6 bytes."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)


if __name__ == "__main__":
    main()
