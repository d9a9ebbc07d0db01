"""Runs one edit from files to a file; the commands `edit` and `batch` call it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spmdeploy.editing.editor import Editor
from spmdeploy.editing.masks import dilate, mask_from_changed_labels, mask_from_file, mask_from_padding
from spmdeploy.editing.options import EditRequest
from spmdeploy.editing.preprocess import extend_canvas
from spmdeploy.editing.report import EditReport
from spmdeploy.editing.validate import InputNames, check_padding
from spmdeploy.errors import OutOfMemoryError, SpmDeployError
from spmdeploy.imaging import files as images
from spmdeploy.inputs import LocalOrRemote, input_name
from spmdeploy.labels import ClassTable
from spmdeploy.tiling.outpaint import extended_size, image_window, outpaint_windows
from spmdeploy.tiling.windows import EditWindow
from spmdeploy.types import Image, LabelMap, Mask, Padding, Progress


@dataclass(frozen=True)
class EditInputs:
    """The arrays of an edit as read from its files. `Editor` checks whether they fit each other."""

    photo: images.Photo
    """On the canvas, if the photo is to be extended."""
    labels: NDArray[np.uint8]
    mask: Mask
    """Not yet dilated."""
    instances: LabelMap | None
    notes: tuple[str, ...] = ()
    """How the mask was read."""


@dataclass(frozen=True)
class EditOutcome:
    """A finished edit."""

    output: LocalOrRemote
    sheet: Path | None
    explain: Path | None
    size: tuple[int, int]
    """Width and height."""
    report: EditReport
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The outcome as plain JSON values."""
        return {
            "output": str(self.output),
            "sheet": None if self.sheet is None else str(self.sheet),
            "explain": None if self.explain is None else str(self.explain),
            "width": self.size[0],
            "height": self.size[1],
            "report": self.report.to_json(),
            "notes": list(self.notes),
        }


def run_edit(
    editor: Editor,
    request: EditRequest,
    progress: Progress | None = None,
    get_inputs: Callable[[], EditInputs] | None = None,
) -> EditOutcome:
    """Read the files of an edit, edit, and write the results.

    Args:
        editor: stays open.
        request: the files and options.
        progress: called with the windows and tiles done and their total.
        get_inputs: returns what `read_inputs` returns for the request, or raises what it raises; None: read here.

    Raises:
        SpmDeployError: names the file or option at fault. Nothing has been written then, unless the message names
            the files that are complete: the edit stays if its sheet or explanation cannot be written.
    """
    images.check_output(request.output, request.overwrite, allow_stream=True)
    for path in filter(None, (request.sheet, request.explain)):
        images.check_output(path, request.overwrite)
    inputs = read_inputs(request, editor.classes) if get_inputs is None else get_inputs()
    images.check_output_size(request.output, *inputs.mask.shape)
    photo, options = inputs.photo, replace(request.options, dilate=request.dilation)
    result = editor.edit(
        photo.pixels,
        inputs.labels,
        inputs.mask,
        inputs.instances,
        options,
        windows=None if request.extend is None else _outpaint_windows(inputs, request.extend, editor.session.size),
        progress=progress,
        names=_names(request, photo),
    )
    lost = images.write_photo(request.output, replace(photo, pixels=result.image), overwrite=request.overwrite)
    if request.sheet is not None or request.explain is not None:
        _write_overviews(request, inputs, dilate(inputs.mask, request.dilation), result.image, result.report, editor)
    size = (photo.pixels.shape[1], photo.pixels.shape[0])
    notes = (*photo.notes, *inputs.notes, *lost, *result.report.notes)
    return EditOutcome(request.output, request.sheet, request.explain, size, result.report, notes)


def read_inputs(request: EditRequest, classes: ClassTable) -> EditInputs:
    """Read the arrays of an edit.

    Raises:
        InputError: a file cannot be read or used.
        UsageError: the photo cannot be extended as requested, or `fill` is no class.
    """
    photo = images.read_photo(request.image)
    original = photo.pixels.shape
    if request.extend is not None:
        check_padding(request.extend, original, input_name(request.image))
        photo = extend_photo(photo, request.extend)
    if request.labels is not None:
        labels = images.read_labels(request.labels, table=classes)
    else:
        labels = np.full(photo.pixels.shape[:2], classes.find(str(request.fill)).id, np.uint8)
    notes: tuple[str, ...] = ()
    if request.mask is not None:
        mask, notes = mask_from_file(request.mask, request.mask_threshold, request.mask_alpha)
    elif request.edited_from is not None:
        mask = mask_from_changed_labels(labels, request.labels, request.edited_from)
    else:
        assert request.extend is not None
        mask = mask_from_padding(original, request.extend)
    instances = None if request.instances is None else images.read_instances(request.instances)
    return EditInputs(photo, labels, mask, instances, notes)


def extend_photo(photo: images.Photo, padding: Padding) -> images.Photo:
    """Return the photo on a larger, gray canvas, which is opaque."""
    alpha = None
    if photo.alpha is not None:
        alpha = np.full(extended_size(photo.pixels.shape, padding), 255, np.uint8)
        alpha[image_window(photo.pixels.shape, padding).slices] = photo.alpha
    return replace(photo, pixels=extend_canvas(photo.pixels, padding), alpha=alpha)


def _names(request: EditRequest, photo: images.Photo) -> InputNames:
    return InputNames(
        image=input_name(request.image),
        labels=input_name(request.labels or f"fill {request.fill}"),
        mask=request.mask_description,
        instances=str(request.instances),
        extended=request.extend is not None,
        turned=photo.orientation > 4,
    )


def _outpaint_windows(inputs: EditInputs, padding: Padding, size: int) -> list[EditWindow]:
    height, width = inputs.mask.shape
    original = height - padding.top - padding.bottom, width - padding.left - padding.right
    return outpaint_windows(original, padding, size)


def _write_overviews(
    request: EditRequest, inputs: EditInputs, mask: Mask, edited: Image, report: EditReport, editor: Editor
) -> None:
    """Write the sheet and the explanation, as far as requested."""
    before, written = inputs.photo.pixels, str(request.output)
    if request.sheet is not None:
        from spmdeploy.imaging.contact_sheet import edit_sheet

        with _errors_name(written, request.sheet):
            sheet = edit_sheet(before, inputs.labels, mask, edited, editor.classes)
            images.write_image(request.sheet, sheet, overwrite=request.overwrite)
        written += f" and {request.sheet}"
    if request.explain is not None:
        from spmdeploy.editing.overlay import explain_sheet

        with _errors_name(written, request.explain):
            explained = explain_sheet(before, mask, report.windows)
            images.write_image(request.explain, explained, overwrite=request.overwrite)


@contextmanager
def _errors_name(written: str, path: Path) -> Iterator[None]:
    """Add to errors about `path` which files are complete."""
    kept = f"written and complete: {written}"
    try:
        yield
    except MemoryError as exc:
        raise OutOfMemoryError(f"too little memory to write {path}; {kept}", "close other programs") from exc
    except SpmDeployError as exc:
        raise type(exc)(f"{exc.problem}; {kept}", exc.hint) from exc
