"""The context windows around the pieces of a mask: what the network gets to see."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spmdeploy.tiling.pieces import BLOCK, Boxes, Indices, Mask, connected_groups, mask_pieces, united

NATIVE_SIZE = 256
# The window's side over the longer side of what is edited in it. The network was trained on holes that fill from a few
# per cent up to three quarters of the picture; 1.5 leaves at least 5/9 of a square window known.
CONTEXT_FACTOR = 1.5
# Known pixels on every side of a piece where the photo has them, whatever its size.
MIN_MARGIN = BLOCK


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


def plan_windows(
    mask: Mask, native: int = NATIVE_SIZE, context: float = CONTEXT_FACTOR, margin: int = MIN_MARGIN
) -> list[Window]:
    """Windows of the photo that hold every masked pixel exactly once between them, from top to bottom, left to right.

    Around each piece of the mask lies a square of side max(native, context * the piece's longer side, that side + 2 *
    margin), moved inside the photo and cut to it where the photo is smaller. Pieces whose windows overlap become one
    piece, until no two overlap; the windows can therefore be edited in any order, or together. margin >= BLOCK.
    """
    assert margin >= BLOCK, (margin, BLOCK)
    boxes = mask_pieces(mask)
    windows = _windows_around(boxes, mask.shape, native, context, margin)
    while len((overlapping := _overlapping(windows))[0]):
        boxes = united(boxes, connected_groups(len(boxes), *overlapping))
        windows = _windows_around(boxes, mask.shape, native, context, margin)
    windows = windows[np.lexsort((windows[:, 1], windows[:, 0]))]
    return [Window(top, left, bottom - top, right - left) for top, left, bottom, right in windows.tolist()]


def whole_photo(height: int, width: int) -> Window:
    """The window that is the whole photo."""
    return Window(0, 0, height, width)


def _windows_around(boxes: Boxes, shape: tuple[int, ...], native: int, context: float, margin: int) -> Boxes:
    extent = boxes[:, 2:] - boxes[:, :2]
    longer = extent.max(axis=1)
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
