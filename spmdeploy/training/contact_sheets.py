"""Contact sheets of a training run: inputs, masks and the output of every stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from spmdeploy.datasets.folder import ImageFolder, read_classes
from spmdeploy.datasets.masks import MASK_KINDS
from spmdeploy.datasets.samples import Sample, random_crop, with_random_mask
from spmdeploy.imaging.contact_sheet import sheet
from spmdeploy.labels import ClassTable, colorize

Pixels = npt.NDArray[np.uint8]


def sample_sheet(samples: Sequence[Sample], stages: Sequence[Pixels], classes: ClassTable) -> Pixels:
    """Draws a row per sample: the masked photo, labels under the mask, the output of each stage, the photo.

    Args:
        samples: The rows.
        stages: uint8 (N, S, S, 3) per stage, N at least the number of samples.
        classes: Their colors are those of the labels.

    Returns:
        uint8 (H, W, 3), RGB.
    """
    rows = []
    for index, sample in enumerate(samples):
        outputs = {f"stage {stage + 1}": outputs_of_stage[index] for stage, outputs_of_stage in enumerate(stages)}
        rows.append({"before": apply_mask(sample), "labels": layout(sample, classes), **outputs, "photo": sample.image})
    return sheet(rows)


def mask_sheet(root: Path, rows: int = 8, crop: int = 256, seed: int = 0) -> Pixels:
    """Draws training images under a mask of each kind.

    Args:
        root: A data folder.
        rows: Images, evenly spread over the training split; fewer where it has fewer.
        crop: Side of the square that is cut from each, in pixels.
        seed: Of crops and masks.

    Returns:
        uint8 (H, W, 3), RGB: a row for each image: labels, then the photo under a mask of each kind.
    """
    classes, folder = read_classes(root), ImageFolder.open(root, "train")
    rows = min(rows, len(folder.names))
    page = []
    for index in range(rows):
        rng = np.random.default_rng((seed, index))
        cut = random_crop(folder[folder.names[index * len(folder.names) // rows]], crop, 1.0, False, rng)
        row = {"labels": colorize(cut.labels, classes)}
        for kind in MASK_KINDS:
            row[kind] = apply_mask(with_random_mask(cut, kind, len(classes), rng))
        page.append(row)
    return sheet(page)


def apply_mask(sample: Sample) -> Pixels:
    """The photo with the mask in mid-gray: uint8 (S, S, 3)."""
    return np.where(sample.mask[..., None], np.uint8(128), sample.image)


def layout(sample: Sample, classes: ClassTable) -> Pixels:
    """The labels under the mask in their colors, white elsewhere: uint8 (S, S, 3)."""
    return np.where(sample.mask[..., None], colorize(sample.labels, classes), np.uint8(255))
