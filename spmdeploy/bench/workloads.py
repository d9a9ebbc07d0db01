"""Inputs of a benchmark: the sample photos of the package under a small, a medium and a large mask.

Each case is the largest square of the photo around the edit, resized to the requested size, and the sample's own mask,
scaled about the middle of its box until it covers the requested share of the square (its box moved as little as needed
to stay inside). Nothing is random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spmdeploy.assets.samples import SAMPLE_EDITS, SampleEdit
from spmdeploy.editing.options import EditRequest
from spmdeploy.imaging.files import write_image
from spmdeploy.imaging.resize import resize_labels, resize_photo
from spmdeploy.labels import ClassTable
from spmdeploy.types import ModelInput

MASK_SHARES = {"small": 0.05, "medium": 0.12, "large": 0.25}
MASK_RULE = (
    "the sample's own mask, scaled about the middle of its box until it covers "
    + ", ".join(f"{share:.0%} ({name})" for name, share in MASK_SHARES.items())
    + " of the square around the edit"
)


@dataclass(frozen=True)
class EditCase:
    """One edit. photo: uint8 (S, S, 3) RGB. labels: uint8 (S, S). mask: bool (S, S), True = edit."""

    photo: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    mask: NDArray[np.bool_]


def masked_share(batch: ModelInput) -> float:
    """Fraction of the pixels that is edited."""
    return float(np.mean(batch.mask != 0))


def edit_case(table: ClassTable, size: int, mask: str, sample: SampleEdit = SAMPLE_EDITS[0]) -> EditCase:
    """A square around the mask of a sample, resized.

    Args:
        table: The classes of the model.
        size: Height and width in pixels.
        mask: A key of `MASK_SHARES`.
        sample: The sample.
    """
    photo, labels, own_mask = sample.read(table)
    square = _square_around(own_mask)
    own_mask = resize_labels(own_mask[square].astype(np.uint8), size, size) != 0
    return EditCase(
        photo=resize_photo(photo[square], size, size),
        labels=resize_labels(labels[square], size, size),
        mask=scaled_mask(own_mask, MASK_SHARES[mask]),
    )


def edit_batch(table: ClassTable, size: int, mask: str, batch: int) -> ModelInput:
    """Edits for one call of a graph: the samples in order, repeated from the first.

    Args:
        table: The classes of the model.
        size: Height and width in pixels.
        mask: A key of `MASK_SHARES`.
        batch: Number of edits.

    Returns:
        Arrays (batch, size, size[, 3]).
    """
    samples = [SAMPLE_EDITS[place % len(SAMPLE_EDITS)] for place in range(batch)]
    return stack_cases([edit_case(table, size, mask, sample) for sample in samples])


def stack_cases(cases: Sequence[EditCase]) -> ModelInput:
    """Cases of one size as inputs of the graph, (B, S, S[, 3]); the labels serve as instances."""
    labels = np.stack([case.labels for case in cases])
    return ModelInput(
        image=np.stack([case.photo for case in cases]),
        labels=labels,
        instances=labels.astype(np.int32),
        mask=np.stack([case.mask for case in cases]).astype(np.uint8),
    )


def scaled_mask(mask: NDArray[np.bool_], share: float) -> NDArray[np.bool_]:
    """Scales a mask until it covers a share of the image, as closely as whole pixels allow.

    Args:
        mask: bool (S, S), not empty, without gaps; parts outside the image are cut off.
        share: Of the image's pixels, 0..1.
    """
    smallest, largest = 1e-3, 1e3
    for _ in range(30):  # halves the interval on a logarithmic scale until no pixel changes
        middle = (smallest * largest) ** 0.5
        if _magnified(mask, middle).mean() < share:
            smallest = middle
        else:
            largest = middle
    return min(
        (_magnified(mask, factor) for factor in (smallest, largest)), key=lambda it: abs(float(it.mean()) - share)
    )


def _magnified(mask: NDArray[np.bool_], factor: float) -> NDArray[np.bool_]:
    """Nearest-neighbor magnification; nothing outside the image is masked."""
    rows, columns = (_origins(np.any(mask, axis=axis), factor) for axis in (1, 0))
    inside = ((rows >= 0) & (rows < len(mask)))[:, None] & (columns >= 0) & (columns < mask.shape[1])
    picked = mask[np.clip(rows, 0, len(mask) - 1)[:, None], np.clip(columns, 0, mask.shape[1] - 1)]
    magnified: NDArray[np.bool_] = picked & inside
    return magnified


def _origins(occupied: NDArray[np.bool_], factor: float) -> NDArray[np.int64]:
    """For each pixel of an axis, the pixel it is taken from: int64 (S,), which may lie outside."""
    length = len(occupied)
    places = np.flatnonzero(occupied)
    middle, reach = (places[0] + places[-1] + 1) / 2, (places[-1] + 1 - places[0]) / 2 * factor
    # The box stays inside where it fits, else it is centered.
    moved = length / 2 if 2 * reach >= length else float(np.clip(middle, reach, length - reach))
    origins: NDArray[np.float64] = np.floor(middle + (np.arange(length) + 0.5 - moved) / factor)
    return np.clip(origins, -1, length).astype(np.int64)


def _square_around(mask: NDArray[np.bool_]) -> tuple[slice, slice]:
    """The largest square of the image whose center is nearest to that of the mask's box."""
    side = min(mask.shape)

    def span(occupied: NDArray[np.bool_]) -> slice:
        places = np.flatnonzero(occupied)
        start = int(np.clip((places[0] + places[-1] + 1 - side) // 2, 0, len(occupied) - side))
        return slice(start, start + side)

    return span(np.any(mask, axis=1)), span(np.any(mask, axis=0))


def write_case(case: EditCase, folder: Path) -> EditRequest:
    """Writes the case as files, the photo as JPEG."""
    files = EditRequest(
        image=folder / "photo.jpg",
        output=folder / "edited.png",
        labels=folder / "labels.png",
        mask=folder / "mask.png",
        overwrite=True,
    )
    write_image(files.image, case.photo)
    write_image(folder / "labels.png", case.labels)
    write_image(folder / "mask.png", case.mask.astype(np.uint8) * 255)
    return files
