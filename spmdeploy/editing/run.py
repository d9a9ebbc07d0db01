"""One edit from files to a file: what the commands `edit` and `batch` both do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from spmdeploy.editing.editor import Editor, EditResult, InputNames, check_extension
from spmdeploy.editing.editor import Tiling as Tiling
from spmdeploy.editing.options import EditRequest
from spmdeploy.editing.preprocess import HIDDEN_GREY
from spmdeploy.editing.report import EditReport
from spmdeploy.errors import InputError
from spmdeploy.imaging import files as images
from spmdeploy.labels import ClassTable
from spmdeploy.tiling.outpaint import Padding, extended_size, image_window, padding_mask
from spmdeploy.types import Progress


@dataclass(frozen=True)
class EditInputs:
    """The files of an edit as arrays; whether they fit each other is for `Editor` to check."""

    photo: images.Photo
    labels: NDArray[np.uint8]
    mask: NDArray[np.bool_]
    """Of the result's size: of an extension what is new."""
    instances: NDArray[np.int32] | None
    notes: tuple[str, ...] = ()
    """What reading the mask decided."""


@dataclass(frozen=True)
class EditOutcome:
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


def run_edit_files(
    editor: Editor,
    files: EditRequest,
    tiling: Tiling = "auto",
    progress: Progress | None = None,
    inputs_ahead: Callable[[], EditInputs] | None = None,
) -> EditOutcome:
    """Reads, edits and writes. Raises InputError naming the file that is at fault; nothing is then written.

    inputs_ahead: gives what `read_inputs` of these files gave, or raises what it raised.
    """
    for path in filter(None, (files.output, files.sheet, files.explain)):
        images.check_output(path, files.overwrite)
    inputs = read_inputs(files, editor.classes) if inputs_ahead is None else inputs_ahead()
    images.check_output_size(files.output, *inputs.mask.shape)
    result = _edit(editor, files, inputs, tiling, progress)
    photo = inputs.photo if files.extend is None else _grown(inputs.photo, files.extend)
    lost = images.write_photo(files.output, replace(photo, pixels=result.image), overwrite=files.overwrite)
    if files.sheet is not None:
        from spmdeploy.imaging.contact_sheet import edit_sheet

        sheet = edit_sheet(photo.pixels, inputs.labels, inputs.mask, result.image, editor.classes)
        images.write_picture(files.sheet, sheet, overwrite=files.overwrite)
    if files.explain is not None:
        from spmdeploy.editing.overlay import explain_sheet

        explained = explain_sheet(photo.pixels, inputs.mask, result.report.windows)
        images.write_picture(files.explain, explained, overwrite=files.overwrite)
    size = (photo.pixels.shape[1], photo.pixels.shape[0])
    notes = (*photo.notes, *inputs.notes, *lost, *result.report.notes)
    return EditOutcome(files.output, files.sheet, files.explain, size, result.report, notes)


def _edit(
    editor: Editor,
    files: EditRequest,
    inputs: EditInputs,
    tiling: Tiling,
    progress: Progress | None,
) -> EditResult:
    names = InputNames(
        image=str(files.image),
        labels=str(files.labels or f"fill {files.fill}"),
        mask=files.mask_description,
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


def read_inputs(files: EditRequest, classes: ClassTable) -> EditInputs:
    """The arrays of an edit. Raises InputError, and UsageError where the photo cannot grow as it shall."""
    photo = images.read_photo(files.image)
    shape = photo.pixels.shape[:2]
    if files.extend is not None:
        check_extension(files.extend, shape, str(files.image))
        shape = extended_size(shape, files.extend)
    if files.labels is not None:
        labels = images.read_labels(files.labels, table=classes)
    else:
        labels = np.full(shape, classes.find(str(files.fill)).id, np.uint8)
    if files.extend is None:
        mask, notes = _read_mask(files, labels)
    else:
        mask, notes = padding_mask(photo.pixels.shape, files.extend), ()
    instances = None if files.instances is None else images.read_instances(files.instances)
    return EditInputs(photo, labels, mask, instances, notes)


def _grown(photo: images.Photo, sides: Padding) -> images.Photo:
    """The photo on a larger, gray canvas, which is opaque."""
    place = image_window(photo.pixels.shape, sides).slices
    size = extended_size(photo.pixels.shape, sides)
    pixels, alpha = np.full((*size, 3), HIDDEN_GREY, np.uint8), None
    pixels[place] = photo.pixels
    if photo.alpha is not None:
        alpha = np.full(size, 255, np.uint8)
        alpha[place] = photo.alpha
    return replace(photo, pixels=pixels, alpha=alpha)


def dilate(mask: NDArray[np.bool_], pixels: int) -> NDArray[np.bool_]:
    """`mask` and every pixel at most `pixels` rows and columns away from it. mask: bool (H, W)."""
    for axis in (0, 1):
        length = mask.shape[axis]
        sums = np.cumsum(mask, axis=axis, dtype=np.int32)
        sums = np.concatenate([np.zeros_like(sums.take([0], axis)), sums], axis=axis)
        first = np.clip(np.arange(length) - pixels, 0, length)
        end = np.clip(np.arange(length) + pixels + 1, 0, length)
        mask = sums.take(end, axis) > sums.take(first, axis)
    return mask


def _read_mask(files: EditRequest, labels: NDArray[np.uint8]) -> images.MaskFile:
    notes: tuple[str, ...] = ()
    if files.mask is not None:
        mask, notes = images.read_mask_file(files.mask, threshold=files.mask_threshold, alpha=files.mask_alpha)
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
    return images.MaskFile(dilate(mask, files.growth) if files.growth else mask, notes)


def _size(array: NDArray[np.uint8]) -> str:
    return f"{array.shape[1]}×{array.shape[0]}"
