"""Plans the context windows around the connected components of a mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from spmdeploy.types import NATIVE_SIZE, Boxes, Indices, Mask

# Connected components are found on a grid of blocks of this size. Pixels in touching blocks are less than two blocks
# apart, so with a margin of at least one block on either side their windows overlap and would be merged anyway.
BLOCK = 32
# The window's side over the longer side of what is edited in it. The network was trained on masks that fill from a few
# per cent up to three quarters of the image; 1.5 leaves at least 5/9 of a square window known.
CONTEXT_FACTOR = 1.5
# Known pixels on every side of a component where the photo has them, whatever its size.
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
    def bottom(self) -> int:
        """Row after the last."""
        return self.top + self.height

    @property
    def right(self) -> int:
        """Column after the last."""
        return self.left + self.width

    @property
    def slices(self) -> tuple[slice, slice]:
        """Cuts the window out of any (H, W, ...) array, as a view."""
        return slice(self.top, self.bottom), slice(self.left, self.right)

    def overlaps(self, other: Window) -> bool:
        """True if the two share at least one pixel."""
        rows = self.top < other.top + other.height and other.top < self.top + self.height
        columns = self.left < other.left + other.width and other.left < self.left + self.width
        return rows and columns


@dataclass(frozen=True, slots=True, eq=False)
class EditWindow:
    """A window, and which of the masked pixels in it are edited there: those in `boxes`, which no other window has."""

    window: Window
    boxes: Boxes

    def mask_of(self, mask: Mask) -> Mask:
        """The masked pixels that are edited in this window.

        Args:
            mask: bool (H, W) of the photo.

        Returns:
            bool (height, width) of the window.
        """
        own = np.zeros((self.window.height, self.window.width), np.bool_)
        for top, left, bottom, right in self.boxes.tolist():
            inside = np.s_[
                top - self.window.top : bottom - self.window.top, left - self.window.left : right - self.window.left
            ]
            own[inside] = mask[top:bottom, left:right]
        return own


def plan_windows(
    mask: Mask,
    native: int = NATIVE_SIZE,
    context: float = CONTEXT_FACTOR,
    margin: int = MIN_MARGIN,
    crop_limit: float = CROP_LIMIT,
) -> list[EditWindow]:
    """Plan the windows to edit: each masked pixel is edited in exactly one of them.

    Around each component of the mask is a square of side max(native, context * its longer side, that side + 2 *
    margin), moved inside the photo and cut to it where the photo is smaller. Components whose windows overlap share
    one, as long as it is not larger than crop_limit * native. Beyond that each component keeps its own, or shares it
    with small ones in the same cell of a grid: a mask of many specks all over a photo would otherwise become one
    window, the photo. Windows can be edited in any order, or together.

    Args:
        mask: bool (H, W) of the photo, True = edit.
        native: Side of the model's input.
        context: Side of a window over the longer side of its component, at least 1.
        margin: Known pixels on every side of a component, at least `BLOCK`.
        crop_limit: Longer side of a shared window over `native`, at most.

    Returns:
        The windows from top to bottom, left to right; none for an empty mask.
    """
    assert margin >= BLOCK, (margin, BLOCK)
    around = partial(_windows_around, shape=mask.shape, native=native, context=context, margin=margin)
    components = mask_components(mask)
    group, boxes = _joined(components, around)
    alone = (np.bincount(group) == 1) | (_longer(around(boxes)) <= crop_limit * native)
    shared = alone[group]
    planned = _edit_windows(components[shared], group[shared], around)
    planned += _edit_windows(*_kept_apart(components[~shared], native // 2), around)
    return sorted(planned, key=lambda one: (one.window.top, one.window.left, one.boxes.tolist()))


def _joined(boxes: Boxes, around: Callable[[Boxes], Boxes]) -> tuple[Indices, Boxes]:
    """The boxes whose surroundings overlap as one, until no two do: the group of each, and the box of each group."""
    group = np.arange(len(boxes))
    while len((overlapping := _overlapping(around(boxes)))[0]):
        joined = connected_groups(len(boxes), *overlapping)
        group, boxes = joined[group], merge_boxes(boxes, joined)
    return group, boxes


def _kept_apart(components: Boxes, cell: int) -> tuple[Boxes, Indices]:
    """The components as boxes that do not overlap, and which of these share a window: small ones in one cell."""
    _, boxes = _joined(components, lambda boxes: boxes)
    if len(boxes) == 0:
        return boxes, np.empty(0, np.intp)
    place = ((boxes[:, :2] + boxes[:, 2:]) // 2 - boxes[:, :2].min(axis=0)) // cell
    large = np.flatnonzero(_longer(boxes) > cell)
    place[large, 0] = -1 - large  # a cell of its own
    return boxes, np.unique(place, axis=0, return_inverse=True)[1].reshape(-1)


def _edit_windows(boxes: Boxes, group: Indices, around: Callable[[Boxes], Boxes]) -> list[EditWindow]:
    """A window for each group of boxes."""
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
    return EditWindow(full_window(height, width), np.array([[0, 0, height, width]]))


def full_window(height: int, width: int) -> Window:
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


def mask_components(mask: Mask) -> Boxes:
    """The exact bounding boxes of the mask's connected components: int64 (N, 4), empty for an empty mask.

    Components are 8-connected groups of blocks on a grid that starts at the mask's own bounding box, so that moving the
    mask moves them. Components in touching blocks count as one (see BLOCK).
    """
    bounds = bounding_box(mask)
    if bounds is None:
        return np.empty((0, 4), np.int64)
    top, left, bottom, right = bounds
    boxes, block_rows, block_columns = _block_boxes(mask[top:bottom, left:right])
    groups = connected_groups(len(boxes), *_touching_blocks(block_rows, block_columns))
    whole = merge_boxes(boxes, groups)
    whole += np.array([top, left, top, left])
    return whole


def bounding_box(mask: Mask) -> tuple[int, int, int, int] | None:
    """The smallest box around the masked pixels.

    Args:
        mask: bool (H, W).

    Returns:
        Top, left, bottom and right, the last two exclusive; None for an empty mask.
    """
    rows = np.flatnonzero(mask.any(axis=1))
    if rows.size == 0:
        return None
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    columns = np.flatnonzero(mask[top:bottom].any(axis=0))
    return top, int(columns[0]), bottom, int(columns[-1]) + 1


def _block_boxes(mask: Mask) -> tuple[Boxes, Indices, Indices]:
    """The box of the masked pixels in every block that has any, and those blocks' rows and columns in the grid."""
    height, width = mask.shape
    row_starts, column_starts = np.arange(0, height, BLOCK), np.arange(0, width, BLOCK)
    # One call per block row: logical_or.reduceat along axis 0 takes forty times as long (numpy 2.4).
    columns_used = np.stack([mask[at : at + BLOCK].any(axis=0) for at in row_starts])  # (block rows, width)
    rows_used = np.logical_or.reduceat(mask, column_starts, axis=1)  # (height, block columns)
    first_column, last_column = _extents(columns_used.T, column_starts)  # (block columns, block rows)
    first_row, last_row = _extents(rows_used, row_starts)  # (block rows, block columns)
    block_rows, block_columns = np.nonzero(last_row > 0)
    corners = (first_row, first_column.T, last_row, last_column.T)
    return np.stack([corner[block_rows, block_columns] for corner in corners], axis=1), block_rows, block_columns


def _extents(used: Mask, starts: Indices) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Along axis 0 of (length, lines), per block: the first used position and the one after the last (0 if none)."""
    position = np.arange(len(used), dtype=np.int64)[:, None]
    first = np.minimum.reduceat(np.where(used, position, len(used)), starts, axis=0)
    last = np.maximum.reduceat(np.where(used, position + 1, 0), starts, axis=0)
    return first, last


def _touching_blocks(rows: Indices, columns: Indices) -> tuple[Indices, Indices]:
    """All pairs of listed blocks that touch, corners included, as two index arrays."""
    number = np.full((int(rows.max()) + 2, int(columns.max()) + 3), -1, np.intp)
    number[rows, columns + 1] = np.arange(len(rows))
    first, second = [], []
    for down, right in ((0, 1), (1, -1), (1, 0), (1, 1)):
        neighbor = number[rows + down, columns + 1 + right]
        touching = np.flatnonzero(neighbor >= 0)
        first.append(touching)
        second.append(neighbor[touching])
    return np.concatenate(first), np.concatenate(second)


def connected_groups(count: int, first: Indices, second: Indices) -> Indices:
    """Group numbers 0, 1, ... of `count` things, of which first[i] and second[i] belong together.

    Every group hooks onto its lowest neighboring group, all at once, until nothing moves: the number of groups that
    have a neighbor at least halves each round. Numbered in the order of their lowest members.
    """
    root = np.arange(count)
    while True:
        lower, upper = np.minimum(root[first], root[second]), np.maximum(root[first], root[second])
        apart = lower != upper
        if not apart.any():
            break
        np.minimum.at(root, upper[apart], lower[apart])
        while not np.array_equal(root, further := root[root]):
            root = further
    return np.unique(root, return_inverse=True)[1]


def merge_boxes(boxes: Boxes, groups: Indices) -> Boxes:
    """One box around the boxes of each group."""
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    corners = np.minimum.reduceat(boxes[order, :2], starts), np.maximum.reduceat(boxes[order, 2:], starts)
    return np.concatenate(corners, axis=1)
