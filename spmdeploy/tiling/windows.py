"""The context windows around the pieces of a mask: what the network gets to see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from spmdeploy.tiling.pieces import BLOCK, Indices, connected_groups, mask_components, merge_boxes
from spmdeploy.types import NATIVE_SIZE, Boxes, Mask

# The window's side over the longer side of what is edited in it. The network was trained on holes that fill from a few
# per cent up to three quarters of the picture; 1.5 leaves at least 5/9 of a square window known.
CONTEXT_FACTOR = 1.5
# Known pixels on every side of a piece where the photo has them, whatever its size.
MIN_MARGIN = BLOCK
# A window whose longer side is more than this many times the model's loses detail when it is shrunk to it.
CROP_LIMIT = 1.5


@dataclass(frozen=True, slots=True)
class Window:
    """A rectangle of the photo, in pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """Cuts the window out of any (H, W, ...) array, as a view."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)

    def overlaps(self, other: Window) -> bool:
        """True if the two share at least one pixel."""
        rows = self.top < other.top + other.height and other.top < self.top + self.height
        columns = self.left < other.left + other.width and other.left < self.left + self.width
        return rows and columns


@dataclass(frozen=True, slots=True, eq=False)
class EditWindow:
    """A window, and which of the masked pixels in it are edited there: those in `boxes`, which no other site has."""

    window: Window
    boxes: Boxes

    def hole(self, mask: Mask) -> Mask:
        """These pixels: bool (height, width) of the window. mask: bool (H, W) of the photo."""
        hole = np.zeros((self.window.height, self.window.width), np.bool_)
        for top, left, bottom, right in self.boxes.tolist():
            inside = np.s_[
                top - self.window.top : bottom - self.window.top, left - self.window.left : right - self.window.left
            ]
            hole[inside] = mask[top:bottom, left:right]
        return hole


def plan_windows(
    mask: Mask,
    native: int = NATIVE_SIZE,
    context: float = CONTEXT_FACTOR,
    margin: int = MIN_MARGIN,
    crop_limit: float = CROP_LIMIT,
) -> list[EditWindow]:
    """Where to edit: sites that have every masked pixel exactly once between them, from top to bottom, left to right.

    Around each piece of the mask lies a square of side max(native, context * the piece's longer side, that side + 2 *
    margin), moved inside the photo and cut to it where the photo is smaller. Pieces whose windows overlap share one, as
    long as it is not larger than crop_limit * native. Beyond that each piece keeps its own, or shares it with small
    ones in the same cell of a grid: a mask of many specks all over a photo would otherwise become one window, the
    photo. Sites can be edited in any order, or together. margin >= BLOCK.
    """
    assert margin >= BLOCK, (margin, BLOCK)
    around = partial(_windows_around, shape=mask.shape, native=native, context=context, margin=margin)
    pieces = mask_components(mask)
    group, boxes = _joined(pieces, around)
    alone = (np.bincount(group) == 1) | (_longer(around(boxes)) <= crop_limit * native)
    shared = alone[group]
    sites = _sites(pieces[shared], group[shared], around)
    sites += _sites(*_kept_apart(pieces[~shared], native // 2), around)
    return sorted(sites, key=lambda site: (site.window.top, site.window.left, site.boxes.tolist()))


def _joined(boxes: Boxes, around: Callable[[Boxes], Boxes]) -> tuple[Indices, Boxes]:
    """The boxes whose surroundings overlap as one, until no two do: the group of each, and the box of each group."""
    group = np.arange(len(boxes))
    while len((overlapping := _overlapping(around(boxes)))[0]):
        joined = connected_groups(len(boxes), *overlapping)
        group, boxes = joined[group], merge_boxes(boxes, joined)
    return group, boxes


def _kept_apart(pieces: Boxes, cell: int) -> tuple[Boxes, Indices]:
    """The pieces as boxes that do not overlap, and which of these share a window: small ones in one cell."""
    _, boxes = _joined(pieces, lambda boxes: boxes)
    if len(boxes) == 0:
        return boxes, np.empty(0, np.intp)
    place = ((boxes[:, :2] + boxes[:, 2:]) // 2 - boxes[:, :2].min(axis=0)) // cell
    large = np.flatnonzero(_longer(boxes) > cell)
    place[large, 0] = -1 - large  # a cell of its own
    return boxes, np.unique(place, axis=0, return_inverse=True)[1].reshape(-1)


def _sites(boxes: Boxes, group: Indices, around: Callable[[Boxes], Boxes]) -> list[EditWindow]:
    """A site for each group of boxes."""
    if len(boxes) == 0:
        return []
    numbers = np.unique(group, return_inverse=True)[1]
    order = np.argsort(numbers, kind="stable")
    members = np.split(boxes[order], np.flatnonzero(np.diff(numbers[order])) + 1)
    windows = around(merge_boxes(boxes, numbers)).tolist()
    return [
        EditWindow(Window(top, left, bottom - top, right - left), own)
        for (top, left, bottom, right), own in zip(windows, members, strict=True)
    ]


def full_image_window(mask: Mask) -> EditWindow:
    """The whole photo, and all of its mask."""
    height, width = mask.shape
    return EditWindow(whole_photo(height, width), np.array([[0, 0, height, width]]))


def whole_photo(height: int, width: int) -> Window:
    """The window that is the whole photo."""
    return Window(0, 0, height, width)


def _longer(boxes: Boxes) -> NDArray[np.int64]:
    """The longer side of each box."""
    longer: NDArray[np.int64] = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
    return longer


def _windows_around(boxes: Boxes, shape: tuple[int, ...], native: int, context: float, margin: int) -> Boxes:
    extent = boxes[:, 2:] - boxes[:, :2]
    longer = _longer(boxes)
    side = np.maximum(np.maximum(native, np.ceil(context * longer).astype(np.int64)), longer + 2 * margin)
    photo = np.array(shape[:2], np.int64)
    size = np.minimum(side[:, None], photo)
    start = np.clip(boxes[:, :2] - (side[:, None] - extent) // 2, 0, photo - size)
    return np.concatenate((start, start + size), axis=1)


def _overlapping(boxes: Boxes) -> tuple[Indices, Indices]:
    """All pairs of boxes that share a pixel.

    A sweep down the photo: a box is compared only with those that start above its end.
    """
    order = np.argsort(boxes[:, 0], kind="stable")
    top, left, bottom, right = boxes[order].T
    first, second = [np.empty(0, np.intp)], [np.empty(0, np.intp)]
    for start in range(0, len(boxes), 256):
        some = slice(start, start + 256)
        others = slice(start, int(np.searchsorted(top, bottom[some].max())))
        meet = (top[some, None] < bottom[others]) & (top[others] < bottom[some, None])
        meet &= (left[some, None] < right[others]) & (left[others] < right[some, None])
        one, other = np.nonzero(np.triu(meet, 1))  # each pair once, and none with itself
        first.append(order[one + start])
        second.append(order[other + start])
    return np.concatenate(first), np.concatenate(second)
