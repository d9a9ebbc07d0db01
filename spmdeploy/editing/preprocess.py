"""Prepares the model input from a region of the photo.

Pixels under the mask never reach the session: what is hidden there cannot show in the result.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spmdeploy.imaging.resize import resize_mask_conservative, resize_photo
from spmdeploy.tiling.letterbox import label_sampling_grid, pad_by_reflection
from spmdeploy.tiling.stitching import extrapolate_border
from spmdeploy.tiling.windows import Window
from spmdeploy.types import Image, LabelMap, LayoutInput, Mask, ModelInput

# What the session gets in place of hidden pixels: the known ones continued for a few pixels, then the gray that stands
# for "nothing here" in the network (0 in its [-1, 1]). The network halves its picture before it blanks the hole, so
# that it sees one pixel deep into the mask; the rest of the continuation is a safety margin for other networks.
HIDDEN_GREY = 128
EXTRAPOLATED_PIXELS = 4
# Stands for ids outside the mask that do not fit into a byte; under it `check_labels` lets none through.
_UNKNOWN = 255


class EditRegion(NamedTuple):
    """A photo or a part of it, and what shall become of it."""

    picture: Image  # uint8 (H, W, 3)
    labels: LabelMap  # (H, W)
    mask: Mask  # bool (H, W)
    instances: LabelMap | None  # (H, W); without them the labels stand in

    def cut(self, window: Window) -> EditRegion:
        """That part as views; where it reaches beyond the lower or right end, copies continued by reflection."""
        labels, mask = (_cut(array, window) for array in (self.labels, self.mask))
        instances = None if self.instances is None else _cut(self.instances, window)
        return EditRegion(_cut(self.picture, window), labels, mask, instances)


def model_input(scene: EditRegion, height: int, width: int, size: int) -> ModelInput:
    """The scene at height by width (its own size or less) in the upper left of the model's square."""
    hole = resize_mask(scene.mask, height, width)
    return ModelInput(image_input(scene.picture, hole, size), *layout_tensors(scene, hole, size))


def resize_mask(mask: Mask, height: int, width: int) -> Mask:
    """The mask at the size that the model sees."""
    return mask if mask.shape == (height, width) else resize_mask_conservative(mask, height, width)


def image_input(picture: Image, hole: Mask, size: int) -> NDArray[np.uint8]:
    """The picture at the size of the hole, without what the hole hides, in the model's square."""
    photo = picture.copy() if picture.shape[:2] == hole.shape else np.array(resize_photo(picture, *hole.shape))
    photo[hole] = HIDDEN_GREY
    extrapolate_border(photo, hole, EXTRAPOLATED_PIXELS)
    return pad_by_reflection(photo, size, size)


def layout_tensors(scene: EditRegion, hole: Mask, size: int) -> LayoutInput:
    """Labels, instances and mask of the scene at the size of the hole, in the model's square."""
    ids = scene.labels
    things = ids if scene.instances is None else scene.instances
    if hole.shape != scene.mask.shape:
        rows, columns = label_sampling_grid(scene.mask, hole)
        ids, things = ids[rows, columns], things[rows, columns]
    class_ids = _byte_ids(ids)
    things = class_ids if scene.instances is None else things
    return LayoutInput(
        labels=pad_by_reflection(class_ids, size, size),
        instances=pad_by_reflection(things.astype(np.int32), size, size),
        mask=pad_by_reflection(hole.astype(np.uint8), size, size),
    )


def stacked(inputs: list[ModelInput]) -> ModelInput:
    """A batch of them."""
    return ModelInput(*(np.stack(parts) for parts in zip(*inputs, strict=True)))


def _cut(array: NDArray[Any], window: Window) -> NDArray[Any]:
    return pad_by_reflection(array[window.slices], window.height, window.width)


def _byte_ids(ids: LabelMap) -> NDArray[np.uint8]:
    return np.where((ids >= 0) & (ids <= _UNKNOWN), ids, _UNKNOWN).astype(np.uint8)
