"""Sample edits of the package: three street photos of CamVid with label maps and masks (see ATTRIBUTION.txt).

Exports are checked on them, and benchmarks run on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spmdeploy.imaging import files as images
from spmdeploy.imaging.mask_files import read_mask
from spmdeploy.labels import ClassTable, class_table

ATTRIBUTION = "CamVid (Brostow et al. 2008), research and non-commercial use only"

# Names of the samples' classes in other tables. A class without a counterpart keeps its id, modulo the class count.
_SYNONYMS = {
    "pavement": ("sidewalk",),
    "tree": ("vegetation", "plant"),
    "sign_symbol": ("traffic sign", "signboard"),
    "pedestrian": ("person",),
    "bicyclist": ("rider", "bicycle"),
    "void": ("unlabeled", "other"),
}


@dataclass(frozen=True)
class SampleEdit:
    """One edit on disk. Labels are ids of the built-in `street` table."""

    name: str
    title: str

    @property
    def photo(self) -> Path:
        """Path of the photo, a JPEG file."""
        return self._folder / "photo.jpg"

    @property
    def labels(self) -> Path:
        """Path of the label map, a PNG with ids of the built-in `street` table."""
        return self._folder / "labels.png"

    @property
    def mask(self) -> Path:
        """Path of the mask, white = edit."""
        return self._folder / "mask.png"

    @property
    def _folder(self) -> Path:
        return Path(__file__).parent / self.name

    def read(self, table: ClassTable) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.bool_]]:
        """Read the files.

        Returns:
            Photo uint8 (360, 480, 3) RGB, labels uint8 (360, 480) as ids of `table`, mask bool (360, 480).
        """
        labels = _translation(table)[images.read_labels(self.labels)]
        return images.read_photo(self.photo).pixels, labels, read_mask(self.mask)


SAMPLE_EDITS = (
    SampleEdit("car_away", "The parked car goes; wall, pavement and road take its place"),
    SampleEdit("tree_planted", "A tree in front of the house"),
    SampleEdit("crossing_cleared", "The crossing without the waiting car"),
)


def _translation(table: ClassTable) -> NDArray[np.uint8]:
    """Lookup table from ids of the `street` table to ids of `table`, by name where the name exists."""
    ids = {entry.name: entry.id for entry in table.classes}
    lookup = np.zeros(256, np.uint8)
    for entry in class_table("street").classes:
        names = (entry.name, *_SYNONYMS.get(entry.name, ()))
        lookup[entry.id] = next((ids[name] for name in names if name in ids), entry.id % len(table))
    return lookup
