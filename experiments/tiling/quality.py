"""Coarse-to-fine refinement against enlarging the coarse result, for windows larger than 256 pixels.

    python experiments/tiling/quality.py --data CAMVID --output FILE.json

Elliptic masks in photos of CamVid's test split with their own labels, filled by `cascade`, by `cascade` without color
transfer or with norms that use the statistics of the coarse edit (see seams.py), by `crop`, and by editing the whole
photo at 256 and enlarging it (of which only the masked part is taken). Three kinds of photo: as they are (480×360), 2×2
mosaics (960×720), and enlarged to 960×720. Means over the photos for each kind and mask size: LPIPS and mean absolute
error under the mask, and sharpness there (mean absolute Laplacian) relative to the photo's own and to that of the known
pixels around.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from norms import ExperimentSession
from numpy.typing import NDArray
from scenes import (
    camvid,
    ellipses,
    inside,
    lpips_under,
    mosaic,
    ring_around,
    sharpness,
    write_results,
)

import spmdeploy
from spmdeploy.editing.editor import Editor
from spmdeploy.editing.preprocess import EditRegion
from spmdeploy.imaging.files import write_image
from spmdeploy.imaging.resize import resize_labels, resize_mask_conservative, resize_photo
from spmdeploy.labels import class_table
from spmdeploy.model.deploy import COLOR_BLOCK
from spmdeploy.tiling.windows import plan_windows
from spmdeploy.training.perceptual import Lpips

Image = NDArray[np.uint8]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CamVid as a training folder")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=spmdeploy.default_model(), help="bundle or checkpoint")
    parser.add_argument("--photos", type=int, default=4, help="of each kind")
    parser.add_argument("--images", type=Path, help="folder for the edits themselves")
    options = parser.parse_args()
    torch.set_num_threads(1)
    editor = Editor(ExperimentSession(options.model), class_table("street"))
    lpips = Lpips()
    rows = []
    for name, side, photo, labels in photos(options.data, options.photos):
        kind = name.split()[0]
        for part in MASK_SIDES[kind]:
            scene = EditRegion(photo, labels, ellipse_mask(*labels.shape, part * side), None)
            (site,) = plan_windows(scene.mask)
            for method, fill in METHODS.items():
                found = fill(editor, scene)
                window = max(site.window.height, site.window.width)
                row = {"kind": kind, "mask": part, "window": window, "method": method}
                rows.append(row | measured(lpips, found, scene, photo))
                if options.images:
                    options.images.mkdir(parents=True, exist_ok=True)
                    file = options.images / f"{name} {part} {method}.png".replace(" ", "_")
                    write_image(file, found, overwrite=True)
    command = "python experiments/tiling/quality.py --data CAMVID --model WEIGHTS --output FILE"
    write_results(options.output, "quality", options.model, means(rows), command=command, photos=options.photos)
    for row in means(rows):
        print(row)


MASK_SIDES = {"photo": (0.5, 0.6, 0.7, 0.85), "mosaic": (0.4, 0.55, 0.7), "enlarged": (0.25, 0.3, 0.35, 0.425, 0.7)}
"""Longer side of the masks, as fractions of the photo's height."""


def photos(root: Path, count: int) -> Iterator[tuple[str, int, Image, Image]]:
    """Kind and number, height, photo and labels of `count` photos of each kind, evenly spread over the test split."""
    names = sorted(path.stem for path in (root / "test/images").glob("*.jpg"))
    chosen = [names[index * len(names) // count] for index in range(count)]
    for number, name in enumerate(chosen):
        yield f"photo {number}", 360, *camvid(root, name)
        four = [chosen[(number + step) % count] for step in range(4)]
        yield f"mosaic {number}", 720, *mosaic(root, four, columns=2)
        yield f"enlarged {number}", 720, *camvid(root, name, 720, 960)


def ellipse_mask(height: int, width: int, side: float) -> NDArray[np.bool_]:
    """An ellipse in the middle, three quarters as high as it is wide."""
    return ellipses(height, width, (0.5, 0.5, 0.375 * side / height, 0.5 * side / width))


def by_editor(
    tiling: Any, statistics: Any = "tile", color_block: int = COLOR_BLOCK
) -> Callable[[Editor, EditRegion], Image]:
    def fill(editor: Editor, scene: EditRegion) -> Image:
        editor.session.statistics, editor.session.color_block = statistics, color_block
        return editor.edit(scene.image, scene.labels, scene.mask, tiling=tiling).image

    return fill


def by_resizing(editor: Editor, scene: EditRegion) -> Image:
    height, width = scene.mask.shape
    scale = 256 / max(height, width)
    small = round(height * scale), round(width * scale)
    mask = resize_mask_conservative(scene.mask, *small)
    edited = editor.edit(resize_photo(scene.image, *small), resize_labels(scene.labels, *small), mask, tiling="crop")
    return np.where(scene.mask[..., None], resize_photo(edited.image, height, width), scene.image)


METHODS: dict[str, Callable[[Editor, EditRegion], Image]] = {
    "cascade": by_editor("cascade"),
    "cascade, no color transfer": by_editor("cascade", color_block=0),
    "cascade, statistics of the coarse edit, bounded": by_editor("cascade", "bounded", color_block=0),
    "crop": by_editor("crop"),
    "resizing": by_resizing,
}


def measured(lpips: Lpips, found: Image, scene: EditRegion, photo: Image) -> dict[str, float]:
    deep, around = inside(scene.mask, 8), ring_around(scene.mask, 48)
    error = np.abs(found.astype(np.float64) - photo).mean(axis=2)[scene.mask].mean()
    return {
        "lpips": lpips_under(lpips, found, scene, photo),
        "error": float(error),
        "sharpness": sharpness(found, deep) / sharpness(photo, deep),
        "sharpness_to_known": sharpness(found, deep) / sharpness(photo, around),
        "photo_to_known": sharpness(photo, deep) / sharpness(photo, around),
    }


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["kind"], row["mask"], row["window"], row["method"]), []).append(row)
    names = ("lpips", "error", "sharpness", "sharpness_to_known", "photo_to_known")
    return [
        dict(zip(("kind", "mask", "window", "method"), key, strict=True))
        | {name: round(float(np.mean([row[name] for row in group])), 4) for name in names}
        for key, group in groups.items()
    ]


if __name__ == "__main__":
    main()
