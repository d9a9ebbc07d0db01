"""Masks made to show seams, edited with the real model: scores, and contact sheets to look at.

    python experiments/tiling/adversarial.py --data CAMVID --output FILE.json --sheet FILE.jpg

Long and thin, frame-shaped, the whole photo but a corner, a sky that is a plain gradient, a street at night: photos of
CamVid's test split enlarged to 960×720, with their own labels. Each is edited as shipped and without the low-frequency
color transfer from the coarse result (see seams.py).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from norms import ExperimentSession
from numpy.typing import NDArray
from scenes import NIGHT, SKY, STREET, camvid, ellipses, write_results, write_sheet

import spmdeploy
from spmdeploy.editing.editor import Editor
from spmdeploy.imaging.contact_sheet import with_mask
from spmdeploy.imaging.files import write_image
from spmdeploy.labels import class_table
from spmdeploy.model.deploy import COLOR_BLOCK

HEIGHT, WIDTH = 720, 960
Case = tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.bool_]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CamVid as a training folder")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=spmdeploy.default_model(), help="bundle or checkpoint")
    parser.add_argument("--sheet", type=Path, required=True, help="for the edits side by side")
    parser.add_argument("--images", type=Path, help="folder for the edits themselves")
    options = parser.parse_args()
    torch.set_num_threads(1)
    network = ExperimentSession(options.model)
    editor = Editor(network, class_table("street"))
    rows: dict[str, Any] = {}
    sheet_rows = []
    for name, (photo, labels, mask) in cases(options.data).items():
        sheet_rows.append({name: with_mask(photo, mask)})
        for variant, network.color_block in (("no color transfer", 0), ("as shipped", COLOR_BLOCK)):
            result = editor.edit(photo, labels, mask, tiling="cascade")
            sheet_rows[-1][variant] = result.image
            if options.images:
                options.images.mkdir(parents=True, exist_ok=True)
                file = f"{name}_{variant}.png".replace(" ", "_")
                write_image(options.images / file, result.image, overwrite=True)
            (window,) = result.report.windows
            rows.setdefault(name, {})[variant] = [level.to_json() for level in window.levels]
            print(name, variant, rows[name][variant], flush=True)
    write_sheet(options.sheet, sheet_rows)
    command = "python experiments/tiling/adversarial.py --data CAMVID --model WEIGHTS --output FILE --sheet FILE.jpg"
    write_results(options.output, "adversarial", options.model, rows, command=command)


def cases(root: Path) -> dict[str, Case]:
    street, night = (camvid(root, name, HEIGHT, WIDTH) for name in (STREET, NIGHT))
    thin, frame, corner, ellipse = (np.zeros((HEIGHT, WIDTH), bool) for _ in range(4))
    thin[380:396, 40:920] = True
    frame[60:660, 60:900] = True
    frame[110:610, 110:850] = False
    corner[:] = True
    corner[-180:, -240:] = False
    ellipse[:] = ellipses(HEIGHT, WIDTH, (0.5, 0.5, 0.36, 0.38))
    down, right = np.mgrid[:HEIGHT, :WIDTH] / (HEIGHT - 1)
    gradient = np.stack([150 + 60 * down + 8 * right, 180 + 40 * down + 6 * right, 215 + 20 * down + right], axis=2)
    sky = np.zeros((HEIGHT, WIDTH), np.uint8)
    return {
        "long thin": (*street, thin),
        "frame": (*street, frame),
        "all but a corner": (*camvid(root, SKY, HEIGHT, WIDTH), corner),
        "gradient sky": (np.rint(gradient).astype(np.uint8), sky, ellipse),
        "night street": (*night, ellipse),
    }


if __name__ == "__main__":
    main()
