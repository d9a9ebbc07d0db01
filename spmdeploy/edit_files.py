"""One edit from files to a file: what the commands `edit` and `batch` both do."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spmdeploy import images
from spmdeploy.editor import Editor, EditReport, InputNames
from spmdeploy.editor import Tiling as Tiling
from spmdeploy.errors import InputError, UsageError
from spmdeploy.labels import ClassTable

GROWTH_OF_CHANGES = 8
"""Pixels by which a mask made from changed labels is grown unless told otherwise: label maps cut objects tightly, and
what is left of an object's outline or shadow would show."""


@dataclass(frozen=True)
class EditFiles:
    """What to edit. One of `labels` and `fill`, and one of `mask` and `edited_from`, says what becomes of it."""

    image: Path
    output: Path
    labels: Path | None = None
    fill: str | None = None
    """One class, by name or id, for everything under the mask."""
    mask: Path | None = None
    edited_from: Path | None = None
    """The label map before it was edited: the mask is what differs."""
    instances: Path | None = None
    grow: int | None = None
    """Pixels to grow the mask by; None: `GROWTH_OF_CHANGES` with edited_from, else 0."""
    sheet: Path | None = None
    """Where to put a picture of before, labels, mask and after side by side."""
    explain: Path | None = None
    """Where to put a picture of the windows and tiles over the photo."""
    overwrite: bool = False
    match_surroundings: bool = False
    """See `Editor.edit`."""

    def __post_init__(self) -> None:
        if (self.labels is None) == (self.fill is None):
            raise UsageError("give either labels or fill", "--labels FILE for a label map, --fill CLASS for one class")
        if (self.mask is None) == (self.edited_from is None):
            raise UsageError(
                "give either mask or edited_from",
                "--mask FILE, or --edited-from FILE with the labels before the change",
            )
        if self.edited_from is not None and self.labels is None:
            raise UsageError("edited_from needs labels to compare with", "add --labels FILE, or use --mask")
        if self.match_surroundings and self.labels is None:
            raise UsageError(
                "match_surroundings needs the labels of the photo's known pixels too",
                "give --labels FILE instead of --fill, or leave --match-surroundings out",
            )
        if self.grow is not None and not 0 <= self.grow <= 1024:
            raise UsageError(f"grow is {self.grow}, which is not within 0 and 1024 pixels")
        self._check_names()

    def _check_names(self) -> None:
        """An output may take the place of the photo, if overwriting is allowed, but of nothing else it is made from."""
        sources = (self.labels, self.mask, self.edited_from, self.instances)
        written_too = (*sources, self.image, self.output)
        for written, others in (
            (self.output, sources),
            (self.sheet, written_too),
            (self.explain, (*written_too, self.sheet)),
        ):
            same = written and next((other for other in others if other and _same_file(written, other)), None)
            if same:
                raise UsageError(f"{written} would be written over {same}, which is needed too", "choose another name")

    @property
    def mask_name(self) -> str:
        """What messages call the mask."""
        name = str(self.mask) if self.mask else f"the difference of {self.labels} and {self.edited_from}"
        return f"{name}, grown by {self.growth}," if self.growth else name

    @property
    def growth(self) -> int:
        """Pixels to grow the mask by."""
        if self.grow is not None:
            return self.grow
        return 0 if self.edited_from is None else GROWTH_OF_CHANGES


@dataclass(frozen=True)
class EditInputs:
    """The files of an edit as arrays; whether they fit each other is for `Editor.edit` to check."""

    photo: images.Photo
    labels: NDArray[np.uint8]
    mask: NDArray[np.bool_]
    instances: NDArray[np.int32] | None


@dataclass(frozen=True)
class FileEdit:
    """A finished edit."""

    output: Path
    sheet: Path | None
    explain: Path | None
    size: tuple[int, int]
    """Width and height."""
    report: EditReport
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "output": str(self.output),
            "sheet": None if self.sheet is None else str(self.sheet),
            "explain": None if self.explain is None else str(self.explain),
            "width": self.size[0],
            "height": self.size[1],
            "report": self.report.to_json(),
            "notes": list(self.notes),
        }


def edit_files(
    editor: Editor, files: EditFiles, tiling: Tiling = "auto", progress: Callable[[int, int], None] | None = None
) -> FileEdit:
    """Reads, edits and writes. Raises InputError naming the file that is at fault; nothing is then written."""
    for path in filter(None, (files.output, files.sheet, files.explain)):
        images.check_output(path, files.overwrite)
    inputs = read_inputs(files, editor.classes)
    names = InputNames(
        image=str(files.image),
        labels=str(files.labels or f"fill {files.fill}"),
        mask=files.mask_name,
        instances=str(files.instances),
    )
    photo = inputs.photo
    result = editor.edit(
        photo.pixels,
        inputs.labels,
        inputs.mask,
        inputs.instances,
        tiling=tiling,
        match_surroundings=files.match_surroundings,
        progress=progress,
        names=names,
    )
    lost = images.write_photo(files.output, replace(photo, pixels=result.image), overwrite=files.overwrite)
    if files.sheet is not None:
        from spmdeploy.sheets import edit_sheet

        sheet = edit_sheet(photo.pixels, inputs.labels, inputs.mask, result.image, editor.classes)
        images.write_picture(files.sheet, sheet, overwrite=files.overwrite)
    if files.explain is not None:
        from spmdeploy.explain import explain_sheet

        explained = explain_sheet(photo.pixels, inputs.mask, result.report.windows)
        images.write_picture(files.explain, explained, overwrite=files.overwrite)
    size = (photo.pixels.shape[1], photo.pixels.shape[0])
    notes = (*photo.notes, *lost, *result.report.notes)
    return FileEdit(files.output, files.sheet, files.explain, size, result.report, notes)


def read_inputs(files: EditFiles, classes: ClassTable) -> EditInputs:
    """The arrays of an edit. Raises InputError."""
    photo = images.read_photo(files.image)
    shape = photo.pixels.shape[:2]
    if files.labels is not None:
        labels = images.read_labels(files.labels)
    else:
        labels = np.full(shape, classes.find(str(files.fill)).id, np.uint8)
    mask = _read_mask(files, labels)
    instances = None if files.instances is None else images.read_instances(files.instances)
    return EditInputs(photo, labels, mask, instances)


def grow_mask(mask: NDArray[np.bool_], pixels: int) -> NDArray[np.bool_]:
    """`mask` and every pixel at most `pixels` rows and columns away from it. mask: bool (H, W)."""
    for axis in (0, 1):
        length = mask.shape[axis]
        sums = np.cumsum(mask, axis=axis, dtype=np.int32)
        sums = np.concatenate([np.zeros_like(sums.take([0], axis)), sums], axis=axis)
        first = np.clip(np.arange(length) - pixels, 0, length)
        end = np.clip(np.arange(length) + pixels + 1, 0, length)
        mask = sums.take(end, axis) > sums.take(first, axis)
    return mask


def _read_mask(files: EditFiles, labels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    if files.mask is not None:
        mask = images.read_mask(files.mask)
    else:
        assert files.edited_from is not None
        before = images.read_labels(files.edited_from)
        if before.shape != labels.shape:
            raise InputError(
                f"{files.edited_from} is {_size(before)} but {files.labels} is {_size(labels)}; they must match",
                "give the labels before and after the change of one and the same photo",
            )
        mask = before != labels
        if not mask.any():
            raise InputError(f"{files.labels} equals {files.edited_from}: nothing to edit", "change some labels first")
    return grow_mask(mask, files.growth) if files.growth else mask


def _size(array: NDArray[np.uint8]) -> str:
    return f"{array.shape[1]}×{array.shape[0]}"


def _same_file(first: Path, second: Path) -> bool:
    return os.path.realpath(first) == os.path.realpath(second)
