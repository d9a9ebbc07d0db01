"""Contact sheets of a training run: inputs, masks and the output of every stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from spmdeploy.datasets.config import MASK_KINDS
from spmdeploy.datasets.folder import (
    ImageFolder,
    Sample,
    random_crop,
    read_classes,
    read_instance_rules,
    with_random_mask,
)
from spmdeploy.imaging.contact_sheet import sheet
from spmdeploy.labels import ClassTable, colorize

Pixels = npt.NDArray[np.uint8]


def sample_sheet(samples: Sequence[Sample], stages: Sequence[Pixels], classes: ClassTable) -> Pixels:
    """One row per sample: before with the hole in gray, labels under the mask, a picture per stage, the photo.

    stages: uint8 (N, S, S, 3) per stage, N at least the number of samples.
    """
    rows = []
    for index, sample in enumerate(samples):
        outputs = {f"stage {stage + 1}": pictures[index] for stage, pictures in enumerate(stages)}
        rows.append({"before": apply_mask(sample), "labels": layout(sample, classes), **outputs, "photo": sample.image})
    return sheet(rows)


def mask_sheet(root: Path, rows: int = 8, crop: int = 256, seed: int = 0) -> Pixels:
    """A row for each of some training pictures, evenly spread: its labels, then the photo under a hole of each kind."""
    classes, folder = read_classes(root), ImageFolder(root, "train", read_instance_rules(root))
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
    """The photo with its hole in mid-gray: uint8 (S, S, 3)."""
    return np.where(sample.mask[..., None], np.uint8(128), sample.image)


def layout(sample: Sample, classes: ClassTable) -> Pixels:
    """The labels under the mask in their colors, white elsewhere: uint8 (S, S, 3)."""
    return np.where(sample.mask[..., None], colorize(sample.labels, classes), np.uint8(255))
