"""One edit from files to a file: what the commands `edit` and `batch` both do."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from spmdeploy import images
from spmdeploy.edit_report import EditReport
from spmdeploy.editor import Editor, EditResult, InputNames, check_extension
from spmdeploy.editor import Tiling as Tiling
from spmdeploy.errors import InputError, UsageError
from spmdeploy.labels import ClassTable
from spmdeploy.model_inputs import HIDDEN_GREY
from spmdeploy.tally import Progress
from spmdeploy.tiling.extension import Sides, grown_size, new_pixels, photo_place

GROWTH_OF_CHANGES = 8
"""Pixels by which a mask made from changed labels is grown unless told otherwise: label maps cut objects tightly, and
what is left of an object's outline or shadow would show."""


@dataclass(frozen=True)
class EditFiles:
    """What to edit. One of `labels` and `fill` says what becomes of it; one of `mask`, `edited_from` and `extend` says
    where."""

    image: Path
    output: Path
    labels: Path | None = None
    fill: str | None = None
    """One class, by name or id, for everything under the mask."""
    mask: Path | None = None
    edited_from: Path | None = None
    """The label map before it was edited: the mask is what differs."""
    extend: Sides | None = None
    """Pixels to grow the picture by: what is new is the mask. Labels and instances then have the size of the result."""
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
        if sum(given is not None for given in (self.mask, self.edited_from, self.extend)) != 1:
            raise UsageError(
                "give one of mask, edited_from and extend",
                "--mask FILE, --edited-from FILE with the labels before the change, or --extend LEFT,TOP,RIGHT,BOTTOM "
                "(to edit and to extend are two steps)",
            )
        if self.edited_from is not None and self.labels is None:
            raise UsageError("edited_from needs labels to compare with", "add --labels FILE, or use --mask")
        if self.match_surroundings and self.labels is None:
            raise UsageError(
                "match_surroundings needs the labels of the photo's known pixels too",
                "give --labels FILE instead of --fill, or leave --match-surroundings out",
            )
        if self.grow is not None and self.extend is not None:
            raise UsageError("grow enlarges a mask, and an extension has none", "leave one of them out")
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
        if self.extend is not None:
            return "the extension"
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
    """The files of an edit as arrays; whether they fit each other is for `Editor` to check."""

    photo: images.Photo
    labels: NDArray[np.uint8]
    mask: NDArray[np.bool_]
    """Of the result's size: of an extension what is new."""
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


def edit_files(editor: Editor, files: EditFiles, tiling: Tiling = "auto", progress: Progress | None = None) -> FileEdit:
    """Reads, edits and writes. Raises InputError naming the file that is at fault; nothing is then written."""
    for path in filter(None, (files.output, files.sheet, files.explain)):
        images.check_output(path, files.overwrite)
    inputs = read_inputs(files, editor.classes)
    images.check_output_size(files.output, *inputs.mask.shape)
    result = _edit(editor, files, inputs, tiling, progress)
    photo = inputs.photo if files.extend is None else _grown(inputs.photo, files.extend)
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


def _edit(
    editor: Editor,
    files: EditFiles,
    inputs: EditInputs,
    tiling: Tiling,
    progress: Progress | None,
) -> EditResult:
    names = InputNames(
        image=str(files.image),
        labels=str(files.labels or f"fill {files.fill}"),
        mask=files.mask_name,
        instances=str(files.instances),
    )
    photo, labels, instances = inputs.photo.pixels, inputs.labels, inputs.instances
    options: _Options = {
        "tiling": tiling,
        "match_surroundings": files.match_surroundings,
        "progress": progress,
        "names": names,
    }
    if files.extend is not None:
        return editor.extend(photo, labels, files.extend, instances, **options)
    return editor.edit(photo, labels, inputs.mask, instances, **options)


class _Options(TypedDict):
    tiling: Tiling
    match_surroundings: bool
    progress: Progress | None
    names: InputNames


def read_inputs(files: EditFiles, classes: ClassTable) -> EditInputs:
    """The arrays of an edit. Raises InputError, and UsageError where the photo cannot grow as it shall."""
    photo = images.read_photo(files.image)
    shape = photo.pixels.shape[:2]
    if files.extend is not None:
        check_extension(files.extend, shape, str(files.image))
        shape = grown_size(shape, files.extend)
    if files.labels is not None:
        labels = images.read_labels(files.labels)
    else:
        labels = np.full(shape, classes.find(str(files.fill)).id, np.uint8)
    mask = _read_mask(files, labels) if files.extend is None else new_pixels(photo.pixels.shape, files.extend)
    instances = None if files.instances is None else images.read_instances(files.instances)
    return EditInputs(photo, labels, mask, instances)


def parse_sides(text: str) -> Sides:
    """ "LEFT,TOP,RIGHT,BOTTOM" in pixels. UsageError for anything else."""
    words = text.replace(",", " ").split()
    if len(words) != 4 or not all(re.fullmatch(r"-?[0-9]{1,9}", word) for word in words):
        raise UsageError(
            f"extend is {text!r}, not four whole numbers",
            "give the pixels to add on the left, top, right and bottom, for example 0,0,256,0",
        )
    return Sides(*map(int, words))


def _grown(photo: images.Photo, sides: Sides) -> images.Photo:
    """The photo on a larger, grey canvas, which is opaque."""
    place = photo_place(photo.pixels.shape, sides).slices
    size = grown_size(photo.pixels.shape, sides)
    pixels, alpha = np.full((*size, 3), HIDDEN_GREY, np.uint8), None
    pixels[place] = photo.pixels
    if photo.alpha is not None:
        alpha = np.full(size, 255, np.uint8)
        alpha[place] = photo.alpha
    return replace(photo, pixels=pixels, alpha=alpha)


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
