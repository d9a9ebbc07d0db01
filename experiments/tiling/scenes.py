"""Photos, masks and measures that the tiling experiments share."""

from __future__ import annotations

import hashlib
import json
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray

from spmdeploy.backends.pytorch import bundled_generator
from spmdeploy.bench.machine import describe_machine
from spmdeploy.bundle.bundle import open_bundle
from spmdeploy.editing.preprocess import EditRegion
from spmdeploy.imaging.contact_sheet import sheet
from spmdeploy.imaging.files import read_labels, read_photo
from spmdeploy.imaging.resize import resize_labels, resize_photo
from spmdeploy.model import CHECKPOINT_SUFFIXES
from spmdeploy.model.checkpoint import load_checkpoint
from spmdeploy.model.generator import Generator
from spmdeploy.training.perceptual import Lpips

Mask = NDArray[np.bool_]
Image = NDArray[np.uint8]

# A street at night, one under a bright sky that fades, one of medium light: CamVid's test split by mean brightness.
NIGHT, SKY, STREET = "0001TP_009990", "Seq05VD_f00360", "Seq05VD_f01290"


def read_generator(path: Path) -> Generator:
    """The generator in a checkpoint, or in a bundle's graphs."""
    if path.suffix in CHECKPOINT_SUFFIXES:
        return load_checkpoint(path).generator
    return bundled_generator(open_bundle(path))


def camvid(root: Path, name: str, height: int = 360, width: int = 480) -> tuple[Image, NDArray[np.uint8]]:
    """A photo of the test split and its labels, enlarged to height by width (bicubic, labels by nearest pixel)."""
    photo = read_photo(root / "test/images" / f"{name}.jpg").pixels
    labels = read_labels(root / "test/labels" / f"{name}.png")
    return resize_photo(photo, height, width), resize_labels(labels, height, width)


def mosaic(root: Path, names: list[str], columns: int) -> tuple[Image, NDArray[np.uint8]]:
    """Photos of the test split side by side at their own size, row by row."""
    parts = [camvid(root, name) for name in names]
    rows = [parts[start : start + columns] for start in range(0, len(parts), columns)]
    return (
        np.concatenate([np.concatenate([photo for photo, _ in row], axis=1) for row in rows]),
        np.concatenate([np.concatenate([labels for _, labels in row], axis=1) for row in rows]),
    )


def ellipses(height: int, width: int, *places: tuple[float, float, float, float]) -> Mask:
    """Filled ellipses: middle and half axes of each, as parts of height and width."""
    y, x = np.mgrid[:height, :width]
    mask = np.zeros((height, width), bool)
    for middle_y, middle_x, half_y, half_x in places:
        distance = ((y + 0.5) / height - middle_y) ** 2 / half_y**2 + ((x + 0.5) / width - middle_x) ** 2 / half_x**2
        mask |= distance <= 1
    return mask


def lpips_under(lpips: Lpips, found: NDArray[Any], scene: EditRegion, photo: Image) -> float:
    """LPIPS (AlexNet) under the mask. found, photo: (H, W, 3) in 0..255."""
    ours, theirs = (torch.from_numpy(part.astype(np.float32)) / 127.5 - 1 for part in (found, photo))
    mask = torch.from_numpy(scene.mask.astype(np.float32))[None, None]
    return float(lpips(ours.permute(2, 0, 1)[None], theirs.permute(2, 0, 1)[None], mask))


def sharpness(image: NDArray[Any], where: Mask) -> float:
    """Mean absolute Laplacian, gray levels. image: (H, W, 3). where: bool (H, W)."""
    gray = image.astype(np.float64).mean(axis=2)
    laplacian = np.abs(4 * gray[1:-1, 1:-1] - gray[:-2, 1:-1] - gray[2:, 1:-1] - gray[1:-1, :-2] - gray[1:-1, 2:])
    return float(laplacian[where[1:-1, 1:-1]].mean())


def ring_around(mask: Mask, width: int) -> Mask:
    """Known pixels at most `width` rows and columns away from the mask."""
    from spmdeploy.editing.masks import dilate

    return dilate(mask, width) & ~dilate(mask, 2)


def inside(mask: Mask, margin: int) -> Mask:
    """Masked pixels more than `margin` rows and columns away from known ones."""
    from spmdeploy.editing.masks import dilate

    return ~dilate(~mask, margin)


def write_results(path: Path, name: str, model: Path, rows: Any, **more: Any) -> None:
    """Writes the results with the facts needed to repeat them. name: of the script."""
    weights = next(model.glob("graphs/edit*.fp32.onnx")) if model.is_dir() else model
    machine = describe_machine()
    found = {
        "schema": f"spmdeploy.bench-tiling-{name}/1",
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "machine": machine.title(),
        "libraries": machine.libraries,
        "threads": torch.get_num_threads(),
        **more,
        "rows": rows,
    }
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def finite(figures: dict[str, Any]) -> dict[str, Any]:
    """Replaces infinities and NaN by None."""
    return {
        name: None if isinstance(value, float) and not isfinite(value) else value for name, value in figures.items()
    }


def write_sheet(path: Path, rows: list[dict[str, Image]]) -> None:
    """A contact sheet, small enough for a page."""
    PIL.Image.fromarray(sheet(rows, cell_side=360)).save(path, quality=82)
