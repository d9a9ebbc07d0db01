"""Checks of the arrays that an edit is given; the only place where they are checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spmdeploy.editing.masks import dilate
from spmdeploy.errors import InputError, UsageError
from spmdeploy.imaging.decode import MAX_MEGAPIXELS
from spmdeploy.imaging.mask_files import check_mask
from spmdeploy.labels import ClassTable, check_labels
from spmdeploy.tiling.outpaint import extended_size
from spmdeploy.tiling.windows import EditWindow
from spmdeploy.types import Image, LabelMap, Mask, Padding


@dataclass(frozen=True, slots=True)
class InputNames:
    """How error messages name the inputs: file names where there are files."""

    image: str = "image"
    labels: str = "labels"
    mask: str = "mask"
    instances: str = "instances"
    extended: bool = False
    """Whether the image is the canvas of an extension."""
    turned: bool = False
    """Whether the image was turned by a quarter, as its EXIF orientation says."""


def check_layout(
    labels: LabelMap,
    mask: NDArray[Any],
    instances: LabelMap | None,
    classes: ClassTable,
    names: InputNames,
    image: Image | None = None,
    dilation: int = 0,
) -> Mask:
    """Check everything that decides an edit but the image's pixels, and return the mask to edit.

    Args:
        labels: integer (H, W), known to `classes` under the mask.
        mask: bool or integer (H, W), 0 = keep.
        instances: integer (H, W), or None.
        classes: the model's classes.
        names: for messages.
        image: uint8 (H, W, 3), whose size all must have; None: the labels'.
        dilation: pixels to dilate the mask by.

    Returns:
        bool (H, W), dilated.

    Raises:
        InputError: names the array and what is wrong with it.
    """
    like, like_name = (labels, names.labels) if image is None else (image, names.image)
    _check_ids(labels, names.labels, "label")
    _check_mask_type(mask, names.mask)
    _check_same_size(labels, names.labels, like, like_name, names)
    _check_same_size(mask, names.mask, like, like_name, names)
    if instances is not None:
        _check_ids(instances, names.instances, "instance")
        _check_same_size(instances, names.instances, like, like_name, names)
        _check_instance_range(instances, names.instances)
    edit_mask = dilate(mask if mask.dtype == np.bool_ else mask != 0, dilation)
    check_mask(edit_mask, names.mask)
    check_labels(labels, classes, names.labels, where=edit_mask)
    return edit_mask


def check_image(image: Image, name: str, labels: LabelMap | None = None, labels_name: str = "labels") -> None:
    """Check an image, alone or against its labels.

    Args:
        image: Must be uint8 (H, W, 3), not empty.
        name: How messages name it.
        labels: integer (H, W), whose size it must have; None: any size.
        labels_name: How messages name the labels.

    Raises:
        InputError: Says which of this does not hold.
    """
    _check_array(image, name)
    if image.dtype != np.uint8:
        raise InputError(f"{name} has type {image.dtype}, expected uint8", "convert it to 8 bits, 0..255")
    if image.ndim != 3 or image.shape[2] != 3:
        raise InputError(f"{name} has shape {image.shape}, expected (height, width, 3)", "convert it to RGB")
    if image.size == 0:
        raise InputError(f"{name} is {format_size(image)}, it has no pixels")
    if labels is not None:
        _check_same_size(image, name, labels, labels_name, InputNames())


def check_padding(padding: Padding, shape: tuple[int, ...], name: str) -> None:
    """Check that an image of a shape can be extended.

    Args:
        padding: Pixels to add on each side.
        shape: (H, W, ...) of the image.
        name: How messages name the image.

    Raises:
        UsageError: The padding is negative, empty or too large.
    """
    hint = "give the pixels to add on the left, top, right and bottom, for example 0,0,256,0"
    if min(padding) < 0:
        raise UsageError(f"{name} cannot grow by {min(padding)} pixels", hint)
    if not any(padding):
        raise UsageError(f"{name} grows by 0 pixels on every side: nothing would be new", hint)
    height, width = extended_size(shape, padding)
    if height * width > MAX_MEGAPIXELS * 1_000_000:
        problem = f"{name} would grow to {width}×{height}, {height * width / 1e6:.0f} megapixels"
        raise UsageError(f"{problem}; at most {MAX_MEGAPIXELS} are made", "extend it by less")


def check_windows(windows: Sequence[EditWindow], mask: Mask) -> None:
    """UsageError unless each masked pixel is edited in some window, and all windows are inside the mask's array."""
    missed = mask.copy()
    height, width = mask.shape
    for edit_window in windows:
        window = edit_window.window
        if min(window.top, window.left) < 0 or window.bottom > height or window.right > width:
            raise UsageError(f"{window} is not inside an image of {width}×{height} pixels")
        missed[window.slices] &= ~edit_window.mask_of(mask)
    if missed.any():
        raise UsageError(f"the windows leave {np.count_nonzero(missed)} masked pixels out")


def format_size(array: NDArray[Any]) -> str:
    """Width×height, as image sizes are written."""
    return f"{array.shape[1]}×{array.shape[0]}"


def _check_ids(ids: LabelMap, name: str, kind: str) -> None:
    _check_array(ids, name)
    if ids.ndim != 2:
        hint = "turn a color label map into ids first: spmdeploy labels convert" if ids.ndim == 3 else None
        raise InputError(f"{name} has shape {ids.shape}, expected (height, width) with one {kind} id a pixel", hint)
    if not np.issubdtype(ids.dtype, np.integer):
        raise InputError(f"{name} has type {ids.dtype}, expected integer {kind} ids")


def _check_mask_type(mask: NDArray[Any], name: str) -> None:
    _check_array(mask, name)
    if mask.ndim != 2:
        raise InputError(f"{name} has shape {mask.shape}, expected (height, width)", "a mask has one channel")
    if mask.dtype != np.bool_ and not np.issubdtype(mask.dtype, np.integer):
        hint = "decide what is edited, for example mask > 0.5"
        raise InputError(f"{name} has type {mask.dtype}, expected bool or integers (0 = keep)", hint)


def _check_array(array: object, name: str) -> None:
    if not isinstance(array, np.ndarray):
        raise InputError(f"{name} is a {type(array).__name__}, expected a numpy array")


def _check_same_size(array: NDArray[Any], name: str, like: NDArray[Any], like_name: str, names: InputNames) -> None:
    if array.shape[:2] == like.shape[:2]:
        return
    if names.extended:
        problem = f"{name}: {format_size(array)}, but {like_name} grows to {format_size(like)}; the sizes must match"
        raise InputError(problem, "give a map of the whole extended image: its new pixels have labels too")
    if names.turned and array.shape[:2] == like.shape[1::-1]:
        raise InputError(
            f"{name}: {format_size(array)}, but {like_name}: {format_size(like)}, turned as its EXIF orientation says",
            f"{name} was drawn on the image as it is stored: turn it the same way",
        )
    problem = f"{name}: {format_size(array)}, but {like_name}: {format_size(like)}; the sizes must match"
    raise InputError(problem, f"resize {name} with nearest-neighbor")


def _check_instance_range(instances: LabelMap, name: str) -> None:
    limits = np.iinfo(np.int32)
    lowest, highest = int(instances.min()), int(instances.max())
    if lowest < limits.min or highest > limits.max:
        raise InputError(f"{name} holds ids from {lowest} to {highest}, which do not fit into 32 bits")
