"""Variants of tiling compared with the untiled run of the whole window.

    python experiments/tiling/seams.py --data CAMVID --output FILE.json --sheet FILE.jpg

Three photos of CamVid's test split, cut and enlarged to 896×640, half of each masked, with their own labels. Only the
last doubling is run, from one image of half that size, whether or not the photo has detail. The network is fully
convolutional, so an image whose sides are multiples of 128 can be run whole. Means over the photos: distance to that
run under the mask, error and LPIPS to the photo there, seam score, tile mismatch, runs of the network at 256×256, and
CPU seconds of one thread. null: the image overflowed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from norms import (
    MIN_SIDE,
    Canvas,
    ExperimentSession,
    MomentSums,
    collect_moments,
    pool_moments,
    replay_norms,
    sweep_tiles,
)
from numpy.typing import NDArray
from scenes import NIGHT, SKY, STREET, camvid, ellipses, finite, lpips_under, write_results, write_sheet

import spmdeploy
from spmdeploy.editing import pyramid as cascade
from spmdeploy.editing.preprocess import EditRegion, model_input, stacked
from spmdeploy.editing.pyramid import coarse_canvas, refine_on_host
from spmdeploy.editing.report import PhaseTimer
from spmdeploy.imaging.files import write_image
from spmdeploy.imaging.resize import resize_labels, resize_photo
from spmdeploy.model.deploy import COLOR_BLOCK
from spmdeploy.tiling import pyramid as geometry
from spmdeploy.tiling.letterbox import fit_letterbox
from spmdeploy.tiling.pyramid import plan_pyramid
from spmdeploy.tiling.seams import border_lines, seam_score
from spmdeploy.tiling.windows import full_window
from spmdeploy.training.perceptual import Lpips
from spmdeploy.types import ModelInput

HEIGHT, WIDTH = 640, 896
HALF_SINE = geometry.blend_windows
MASK_ELLIPSES = ((0.42, 0.32, 0.37, 0.285), (0.62, 0.68, 0.33, 0.285), (0.2, 0.86, 0.15, 0.1))
BATCH = 4


@dataclass(frozen=True)
class Variant:
    overlap: float = 0.25
    """Part of a tile."""
    ramp: Literal["cut", "linear", "half-sine"] = "half-sine"
    """Blending of neighboring tiles; "cut": none."""
    shared: bool = True
    """Whether tiles refine the shared coarse result; otherwise each tile is a separate edit."""
    statistics: Literal["tile", "pooled", "swept", "coarse", "bounded"] = "tile"
    """Source of the last stage's norm statistics: the tile; all tiles of the level, layer by layer; all tiles of a
    previous pass over the level; the coarse edit; the coarse edit, clamped (see norms.py)."""
    min_side: int = MIN_SIDE
    color_block: int = 0
    """Side of the blocks whose mean colors come from the coarse result; 0: no transfer."""


VARIANTS = {
    "independent tiles, linear": Variant(ramp="linear", shared=False),
    "independent tiles, half-sine": Variant(shared=False),
    "shared coarse result, cut": Variant(ramp="cut"),
    "shared coarse result, linear": Variant(ramp="linear"),
    "shared coarse result, half-sine": Variant(),
    "overlap 32": Variant(overlap=0.125),
    "overlap 96": Variant(overlap=0.375),
    "overlap 128": Variant(overlap=0.5),
    "statistics pooled layer by layer": Variant(statistics="pooled"),
    "statistics pooled in a previous pass": Variant(statistics="swept"),
    "statistics pooled in a previous pass, all maps": Variant(statistics="swept", min_side=1),
    "statistics of the coarse edit": Variant(statistics="coarse"),
    "statistics of the coarse edit, bounded": Variant(statistics="bounded"),
    "color transfer, blocks of 4": Variant(color_block=4),
    "color transfer, blocks of 8": Variant(color_block=8),
    "color transfer, blocks of 16": Variant(color_block=16),
    "color transfer, blocks of 32": Variant(color_block=32),
    "pooled layer by layer, color transfer": Variant(statistics="pooled", color_block=8),
    "coarse edit, bounded, color transfer": Variant(statistics="bounded", color_block=8),
}
SHEET_VARIANTS = (
    "untiled",
    "independent tiles, half-sine",
    "shared coarse result, half-sine",
    "color transfer, blocks of 8",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CamVid as a training folder")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=spmdeploy.default_model(), help="bundle or checkpoint")
    parser.add_argument("--sheet", type=Path, help="for the edits of the first photo side by side")
    parser.add_argument("--images", type=Path, help="folder for the edits themselves")
    options = parser.parse_args()
    torch.set_num_threads(1)
    network, lpips = ExperimentSession(options.model), Lpips()
    rows: dict[str, list[dict[str, Any]]] = {}
    sheet: dict[str, NDArray[np.uint8]] = {}
    for name in (SKY, STREET, NIGHT):
        photo, labels = (part[8:351] for part in camvid(options.data, name))  # 7:5
        photo, labels = resize_photo(photo, HEIGHT, WIDTH), resize_labels(labels, HEIGHT, WIDTH)
        scene = EditRegion(photo, labels, ellipses(HEIGHT, WIDTH, *MASK_ELLIPSES), None)
        for variant, found in run_variants(network, scene).items():
            image = np.where(scene.mask[..., None], found.pop("canvas"), photo)
            found["error"] = float(np.abs(image - photo).mean(axis=2)[scene.mask].mean())
            found["lpips"] = lpips_under(lpips, image, scene, photo)
            row = finite({key: round(value, 4) for key, value in found.items()})
            rows.setdefault(variant, []).append({"photo": name, **row})
            print(name, variant, row, flush=True)
            if options.images and row["distance"] is not None:
                options.images.mkdir(parents=True, exist_ok=True)
                file = options.images / f"{name}_{variant.replace(' ', '_').replace(',', '')}.png"
                write_image(file, np.rint(image).astype(np.uint8), overwrite=True)
            if name == SKY and variant in SHEET_VARIANTS:
                sheet[variant] = np.rint(image).astype(np.uint8)
    if options.sheet:
        write_sheet(
            options.sheet,
            [{variant: sheet[variant] for variant in SHEET_VARIANTS[start : start + 2]} for start in (0, 2)],
        )
    means = {variant: {**mean(samples), "photos": samples} for variant, samples in rows.items()}
    command = "python experiments/tiling/seams.py --data CAMVID --model WEIGHTS --output FILE"
    write_results(options.output, "seams", options.model, means, command=command, window=[HEIGHT, WIDTH])
    for variant, row in means.items():
        print(f"{variant:36}", {key: value for key, value in row.items() if key != "photos"})


def run_variants(network: ExperimentSession, scene: EditRegion) -> dict[str, dict[str, Any]]:
    """Canvas of the window and figures of every variant."""
    geometry.blend_windows = HALF_SINE
    window = full_window(HEIGHT, WIDTH)
    *coarser, last = plan_pyramid(window, scene.mask)
    frame = fit_letterbox(window)
    inputs = stacked([model_input(scene, frame.height, frame.width, 256)])
    network.content = (frame.height, frame.width)
    edited = network.run_unrounded(inputs)[0]
    half, _ = refine_on_host(
        network, tuple(coarser), coarse_canvas(frame, edited, coarser[0]), scene, BATCH, PhaseTimer()
    )
    started, network.color_block = time.process_time(), 0
    uncut = ModelInput(*(part[None, :HEIGHT] for part in model_input(scene, HEIGHT, WIDTH, WIDTH)))
    whole = network.refine(uncut, half[None])[0]
    seconds = time.process_time() - started
    lines = border_lines(last.rows, 256), border_lines(last.columns, 256)
    seam = seam_score(whole, scene.mask, *lines)
    found = {"untiled": {"canvas": whole, "distance": 0.0, "seam": seam, "seconds": seconds}}
    for name, variant in VARIANTS.items():
        network.runs, started = 0, time.process_time()
        canvas, report = tiled(network, variant, scene, half)
        cost = {"runs": network.runs, "seconds": time.process_time() - started}
        distance = float(np.abs(canvas - whole).mean(axis=2)[scene.mask].mean())
        found[name] = {"canvas": canvas, "distance": distance, **report, **cost}
    return found


def tiled(
    network: ExperimentSession, variant: Variant, scene: EditRegion, half: Canvas
) -> tuple[Canvas, dict[str, Any]]:
    """The whole window and the report of its last level."""
    geometry.blend_windows, cascade.MIN_DETAIL = ramps_of(variant.ramp), 0
    level = plan_pyramid(full_window(HEIGHT, WIDTH), scene.mask, overlap=variant.overlap)[-1]
    batch, session = BATCH, network if variant.shared else Independent(network)
    if variant.statistics == "pooled":
        network.norms, batch = iter([pool_moments(level)]), len(level.tiles)
    elif variant.statistics == "swept":
        sums: dict[int, MomentSums] = {}
        network.norms = sweep_tiles(sums, level, batch)
        refine_on_host(network, (level,), half, scene, batch, PhaseTimer())
        network.norms = (replay_norms(collect_moments(sums, variant.min_side)) for _ in level.tiles)
    elif variant.statistics != "tile":
        network.statistics = variant.statistics
    network.color_block = variant.color_block
    canvas, (report,) = refine_on_host(session, (level,), half, scene, batch, PhaseTimer())
    network.norms, network.statistics, network.color_block = iter(()), "tile", COLOR_BLOCK
    return canvas, {"seam": report.seam_score, "mismatch": report.tile_mismatch}


class Independent:
    """Session whose tiles ignore the previous level."""

    def __init__(self, network: ExperimentSession) -> None:
        self.network = network

    def refine(self, inputs: ModelInput, coarse: Canvas) -> Canvas:
        return self.network.edit(inputs)


def ramps_of(kind: str) -> Callable[[tuple[int, ...], int], NDArray[np.float32]]:
    if kind == "half-sine":
        return HALF_SINE

    def blend_windows(starts: tuple[int, ...], size: int) -> NDArray[np.float32]:
        weights = geometry.linear_ramps(starts, size)
        if kind == "cut":
            weights = (np.arange(len(starts))[:, None] == weights.argmax(axis=0)).astype(np.float32)
        return geometry.tile_by_tile(weights, starts, size)

    return blend_windows


def mean(samples: list[dict[str, Any]]) -> dict[str, float | None]:
    return {
        key: None if None in (values := [sample[key] for sample in samples]) else round(float(np.mean(values)), 4)
        for key in samples[0]
        if key != "photo"
    }


if __name__ == "__main__":
    main()
