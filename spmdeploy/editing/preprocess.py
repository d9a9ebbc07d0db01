"""Converts a region of a photo to model input: resizes, letterboxes, and removes what the mask hides.

Pixels under the mask never reach the session, so that nothing hidden can show in the result.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spmdeploy.imaging.resize import resize_mask_conservative, resize_photo
from spmdeploy.tiling.letterbox import Letterbox, label_sampling_grid, pad_by_reflection
from spmdeploy.tiling.outpaint import extended_size, image_window
from spmdeploy.tiling.stitching import extrapolate_border
from spmdeploy.tiling.windows import Window
from spmdeploy.types import Image, LabelMap, LayoutInput, Mask, ModelInput, Padding

# The session gets, in place of hidden pixels, the known ones extrapolated by a few pixels, then the gray that means
# "nothing here" to the network (0 in its [-1, 1]). The network halves its image before it blanks the mask, so that it
# sees one pixel deep into the mask; the rest of the extrapolation is a safety margin for other networks.
HIDDEN_GRAY = 128
EXTRAPOLATED_PIXELS = 4
# Replaces ids outside the mask that do not fit into a byte; under the mask `check_labels` allows none.
_UNKNOWN = 255


class EditRegion(NamedTuple):
    """A photo or a part of it, with its labels and mask."""

    image: Image
    labels: LabelMap
    mask: Mask
    instances: LabelMap | None
    """None: the labels are used instead."""

    def cut(self, window: Window) -> EditRegion:
        """The part in the window, as views; where it exceeds the lower or right end, copies padded by reflection."""
        labels, mask = (_cut(array, window) for array in (self.labels, self.mask))
        instances = None if self.instances is None else _cut(self.instances, window)
        return EditRegion(_cut(self.image, window), labels, mask, instances)


def extend_canvas(image: Image, padding: Padding) -> Image:
    """The image on a larger canvas, gray where it is new.

    Args:
        image: uint8 (H, W, 3), RGB.
        padding: Pixels to add on each side.

    Returns:
        uint8 (top + H + bottom, left + W + right, 3).
    """
    canvas = np.full((*extended_size(image.shape, padding), 3), HIDDEN_GRAY, np.uint8)
    canvas[image_window(image.shape, padding).slices] = image
    return canvas


def model_input(region: EditRegion, height: int, width: int, size: int) -> ModelInput:
    """The region, resized, in the upper left of the model's square input.

    Args:
        region: Part of a photo, of any size.
        height: Rows to resize it to, at most its own and at most `size`.
        width: Columns likewise.
        size: Side of the model's input.

    Returns:
        Arrays (size, size[, 3]); beyond height and width they are continued by reflection.
    """
    mask = resize_mask(region.mask, height, width)
    return ModelInput(image_input(region.image, mask, size), *layout_tensors(region, mask, size))


def resize_mask(mask: Mask, height: int, width: int) -> Mask:
    """The mask at the size that the model sees."""
    return mask if mask.shape == (height, width) else resize_mask_conservative(mask, height, width)


def image_input(image: Image, mask: Mask, size: int) -> NDArray[np.uint8]:
    """The image at the size of the mask, without what the mask hides, in the model's square input.

    Args:
        image: uint8 (H, W, 3), RGB.
        mask: bool (h, w), as the model sees it.
        size: Side of the model's input, at least h and w.

    Returns:
        uint8 (size, size, 3).
    """
    photo = image.copy() if image.shape[:2] == mask.shape else np.array(resize_photo(image, *mask.shape))
    np.putmask(photo, np.repeat(mask, 3), HIDDEN_GRAY)  # three times as fast as by index
    extrapolate_border(photo, mask, EXTRAPOLATED_PIXELS)
    return pad_by_reflection(photo, size, size)


def layout_tensors(region: EditRegion, mask: Mask, size: int) -> LayoutInput:
    """Labels, instances and mask of the region in the model's square input.

    Args:
        region: Its image is not read.
        mask: bool (h, w), the region's mask as the model sees it.
        size: Side of the model's input, at least h and w.

    Returns:
        Arrays (size, size): labels uint8, 255 for ids that do not fit; instances int32; mask uint8, 0 or 1.
    """
    ids = region.labels
    things = ids if region.instances is None else region.instances
    if mask.shape != region.mask.shape:
        rows, columns = label_sampling_grid(region.mask, mask)
        ids, things = ids[rows, columns], things[rows, columns]
    class_ids = _byte_ids(ids)
    things = class_ids if region.instances is None else things
    return LayoutInput(
        labels=pad_by_reflection(class_ids, size, size),
        instances=pad_by_reflection(things.astype(np.int32), size, size),
        mask=pad_by_reflection(mask.astype(np.uint8), size, size),
    )


def letterbox_input(letterbox: Letterbox, region: EditRegion) -> ModelInput:
    """A window of the region in the model's square input: arrays (size, size[, 3])."""
    part = region.cut(letterbox.window)
    return model_input(part, letterbox.height, letterbox.width, letterbox.size)


def stacked(inputs: list[ModelInput]) -> ModelInput:
    """The inputs as one batch."""
    return ModelInput(*(np.stack(parts) for parts in zip(*inputs, strict=True)))


def _cut(array: NDArray[Any], window: Window) -> NDArray[Any]:
    return pad_by_reflection(array[window.slices], window.height, window.width)


def _byte_ids(ids: LabelMap) -> NDArray[np.uint8]:
    return np.where((ids >= 0) & (ids <= _UNKNOWN), ids, _UNKNOWN).astype(np.uint8)
