"""Masks of an edit: read from a file, from changed labels, from padding; dilation.

A new source of masks is one function here and one field of `EditRequest`.
"""

from __future__ import annotations

import numpy as np

from spmdeploy.errors import InputError
from spmdeploy.imaging import files as images
from spmdeploy.imaging.mask_files import MaskFile, read_mask_file
from spmdeploy.inputs import FilePath
from spmdeploy.tiling.outpaint import padding_mask
from spmdeploy.types import LabelMap, Mask, MaskAlpha, Padding


def mask_from_file(path: FilePath, threshold: int | None = None, alpha: MaskAlpha | None = None) -> MaskFile:
    """bool (H, W), where the image is white, and notes on how it was read: see `imaging.mask_files.read_mask_file`."""
    return read_mask_file(path, threshold=threshold, alpha=alpha)


def mask_from_changed_labels(labels: LabelMap, labels_path: FilePath | None, before_path: FilePath) -> Mask:
    """bool (H, W): where the labels differ from those stored in `before_path`.

    Raises:
        InputError: the maps differ in size, or not at all.
    """
    before = images.read_labels(before_path)
    if before.shape != labels.shape:
        raise InputError(
            f"{before_path} is {_size(before)} but {labels_path} is {_size(labels)}; they must match",
            "give the labels before and after the change of one and the same photo",
        )
    mask: Mask = before != labels
    if not mask.any():
        raise InputError(f"{labels_path} equals {before_path}: nothing to edit", "change some labels first")
    return mask


def mask_from_padding(shape: tuple[int, ...], padding: Padding) -> Mask:
    """bool (H, W) of the extended image: everything but the image of that shape."""
    return padding_mask(shape, padding)


def dilate(mask: Mask, pixels: int) -> Mask:
    """The mask, bool (H, W), and every pixel at most `pixels` rows and columns away from it."""
    for axis in (0, 1) if pixels else ():
        length = mask.shape[axis]
        sums = np.cumsum(mask, axis=axis, dtype=np.int32)
        sums = np.concatenate([np.zeros_like(sums.take([0], axis)), sums], axis=axis)
        first = np.clip(np.arange(length) - pixels, 0, length)
        end = np.clip(np.arange(length) + pixels + 1, 0, length)
        mask = sums.take(end, axis) > sums.take(first, axis)
    return mask


def _size(array: LabelMap) -> str:
    return f"{array.shape[1]}×{array.shape[0]}"
