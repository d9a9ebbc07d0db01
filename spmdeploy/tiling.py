"""Where an edit of any size happens: pieces of the mask, context windows around them, the model's frame, stitching.

numpy only; nothing here knows a model. Arrays at the border of every function:
mask: bool (H, W), True = edit, False = known. picture: uint8 (H, W, 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T", bound=np.generic)
Mask = NDArray[np.bool_]
Picture = NDArray[np.uint8]
Indices = NDArray[np.intp]
# One box a row: top, left, bottom, right in pixels; bottom and right are the first row and column outside.
Boxes = NDArray[np.int64]

NATIVE_SIZE = 256
# The window's side over the longer side of what is edited in it. The network was trained on holes that fill from a few
# per cent up to three quarters of the picture; 1.5 leaves at least 5/9 of a square window known.
CONTEXT_FACTOR = 1.5
# Known pixels on every side of a piece where the photo has them, whatever its size.
MIN_MARGIN = 32
# Pieces are told apart on a grid of blocks of this size. Pixels in touching blocks are less than two blocks apart, so
# with a margin of at least one block on either side their windows overlap and would be merged anyway: nothing is lost.
BLOCK = MIN_MARGIN
# Pixels handled at once where an index array would otherwise grow with the length of the mask's rim.
_CHUNK = 1 << 19


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


@dataclass(frozen=True, slots=True)
class Frame:
    """How a window lies in the model's square input: at the upper left, `height` by `width`, the rest is padding."""

    window: Window
    height: int
    width: int
    size: int

    @property
    def scale(self) -> float:
        """Frame pixels per photo pixel along the longer side, at most 1."""
        return max(self.height, self.width) / max(self.window.height, self.window.width)

    @property
    def shrinks(self) -> bool:
        return (self.height, self.width) != (self.window.height, self.window.width)


def frame_of(window: Window, size: int = NATIVE_SIZE) -> Frame:
    """The frame of a window: shrunk until its longer side is `size`, never enlarged."""
    longer = max(window.height, window.width)
    if longer <= size:
        return Frame(window, window.height, window.width, size)
    return Frame(window, _shrunk(window.height, size, longer), _shrunk(window.width, size, longer), size)


def _shrunk(side: int, size: int, longer: int) -> int:
    return max(1, (2 * side * size + longer) // (2 * longer))


def pad_by_reflection(array: NDArray[T], size: int) -> NDArray[T]:
    """An (h, w, ...) array with h, w <= size, continued below and to the right by mirroring to (size, size, ...).

    The outermost pixel is not repeated, so a label map gets no edges that it did not have; a side of one pixel is
    repeated.
    """
    height, width = array.shape[:2]
    if (height, width) == (size, size):
        return array
    margins = [(0, size - height), (0, size - width)] + [(0, 0)] * (array.ndim - 2)
    return np.pad(array, margins, mode="reflect")


# ---- pieces of the mask ----


def mask_pieces(mask: Mask) -> Boxes:
    """The exact bounding boxes of the mask's pieces: int64 (pieces, 4), empty for an empty mask.

    Pieces are 8-connected groups of blocks on a grid that starts at the mask's own bounding box, so that moving the
    mask moves the pieces. Pieces in touching blocks count as one (see BLOCK).
    """
    bounds = _bounding_box(mask)
    if bounds is None:
        return np.empty((0, 4), np.int64)
    top, left, bottom, right = bounds
    boxes, block_rows, block_columns = _block_boxes(mask[top:bottom, left:right])
    groups = connected_groups(len(boxes), *_touching_blocks(block_rows, block_columns))
    united = _united(boxes, groups)
    united += np.array([top, left, top, left])
    return united


def _bounding_box(mask: Mask) -> tuple[int, int, int, int] | None:
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
        neighbour = number[rows + down, columns + 1 + right]
        touching = np.flatnonzero(neighbour >= 0)
        first.append(touching)
        second.append(neighbour[touching])
    return np.concatenate(first), np.concatenate(second)


def connected_groups(count: int, first: Indices, second: Indices) -> Indices:
    """Group numbers 0, 1, ... of `count` things, of which first[i] and second[i] belong together.

    Every group hooks onto its lowest neighbouring group, all at once, until nothing moves: the number of groups that
    have a neighbour at least halves each round. Numbered in the order of their lowest members.
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


def _united(boxes: Boxes, groups: Indices) -> Boxes:
    """One box around the boxes of each group."""
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    corners = np.minimum.reduceat(boxes[order, :2], starts), np.maximum.reduceat(boxes[order, 2:], starts)
    return np.concatenate(corners, axis=1)


# ---- windows ----


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
        boxes = _united(boxes, connected_groups(len(boxes), *overlapping))
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


# ---- what the network is told in a shrunken frame ----


def layout_positions(mask: Mask, frame_mask: Mask) -> tuple[Indices, Indices]:
    """Which pixel of the window each frame pixel takes its label from: rows and columns, both (h, w) of the frame.

    mask: bool (H, W) of the window; frame_mask: bool (h, w), True where the frame pixel touches a masked one. It is the
    pixel in the middle, except that a frame pixel to be edited takes the *masked* pixel nearest to its middle: labels
    count only there, and a thin mask would else be told what lies beside it.
    """
    rows, first_row, last_row = _cells(mask.shape[0], frame_mask.shape[0])
    columns, first_column, last_column = _cells(mask.shape[1], frame_mask.shape[1])
    row, column = (positions.copy() for positions in np.broadcast_arrays(rows[:, None], columns[None]))
    y, x = np.nonzero(frame_mask & ~mask[row, column])
    for down, right in _nearest_first(int((last_row - first_row).max()), int((last_column - first_column).max())):
        if len(y) == 0:
            break
        near_row = np.clip(rows[y] + down, first_row[y], last_row[y])
        near_column = np.clip(columns[x] + right, first_column[x], last_column[x])
        found = mask[near_row, near_column]
        row[y[found], x[found]], column[y[found], x[found]] = near_row[found], near_column[found]
        y, x = y[~found], x[~found]
    return row, column


def _cells(length: int, parts: int) -> tuple[Indices, Indices, Indices]:
    """Per part of a line of pixels: the pixel in its middle, the first and the last that it touches."""
    part = np.arange(parts)
    return (2 * part + 1) * length // (2 * parts), part * length // parts, ((part + 1) * length - 1) // parts


def _nearest_first(reach_down: int, reach_right: int) -> list[tuple[int, int]]:
    steps = [(y, x) for y in range(-reach_down, reach_down + 1) for x in range(-reach_right, reach_right + 1)]
    return sorted(steps, key=lambda step: (step[0] ** 2 + step[1] ** 2, step))


# ---- stitching ----


@dataclass(frozen=True, slots=True)
class Ring:
    """The masked pixels that are `depth` steps (8 neighbours) away from the nearest known one."""

    depth: int
    rows: Indices
    columns: Indices


def extend_known(picture: Picture, mask: Mask, depth: int) -> list[Ring]:
    """Continue the known pixels `depth` steps into the mask, in place; returns the rings, the outermost first.

    Each ring gets the mean of its known neighbours and of those already filled in (3x3), so nothing that was hidden
    under the mask contributes. Deeper pixels stay as they are; where no pixel is known there are no rings.
    """
    hidden, known = _framed(mask), _framed(~mask)
    rings = []
    line = hidden.shape[1]
    around = np.array([-line - 1, -line, -line + 1, -1, 1, line - 1, line, line + 1])
    at = np.flatnonzero(_grown(known) & hidden)
    for step in range(1, depth + 1):
        if len(at) == 0:
            break
        rows, columns = np.divmod(at, line)
        rings.append(Ring(step, rows - 1, columns - 1))
        for some in _chunks(len(at)):
            picture[rows[some] - 1, columns[some] - 1] = _known_mean(picture, known, at[some], around)
        known.ravel()[at] = True
        hidden.ravel()[at] = False
        at = _next_ring(hidden, at, around)
    return rings


def _framed(flags: Mask) -> Mask:
    """The flags with a border of False: beyond the picture lies neither a known pixel nor one to fill.

    In C order whatever the order of the flags (np.pad would keep theirs), since pixels are addressed by flat index.
    """
    framed = np.zeros((flags.shape[0] + 2, flags.shape[1] + 2), np.bool_)
    framed[1:-1, 1:-1] = flags
    return framed


def _grown(flags: Mask) -> Mask:
    """The flags and their 8 neighbours."""
    grown = flags.copy()
    grown[1:] |= flags[:-1]
    grown[:-1] |= flags[1:]
    upright = grown.copy()
    grown[:, 1:] |= upright[:, :-1]
    grown[:, :-1] |= upright[:, 1:]
    return grown


def _known_mean(picture: Picture, known: Mask, at: Indices, around: Indices) -> Picture:
    """uint8 (n, 3): the rounded mean over the known among the neighbours of the places `at` of the padded picture."""
    total = np.zeros((len(at), picture.shape[2]), np.int32)
    count = np.zeros(len(at), np.int32)
    for offset in around:
        neighbours = at + offset
        use = np.flatnonzero(known.ravel()[neighbours])
        rows, columns = np.divmod(neighbours[use], known.shape[1])
        total[use] += picture[rows - 1, columns - 1]
        count[use] += 1
    return ((2 * total + count[:, None]) // (2 * count[:, None])).astype(np.uint8)


def _next_ring(hidden: Mask, at: Indices, around: Indices) -> Indices:
    beyond = [at + offset for offset in around]
    return np.unique(np.concatenate([places[hidden.ravel()[places]] for places in beyond]))


def _chunks(length: int) -> Iterator[slice]:
    return (slice(start, start + _CHUNK) for start in range(0, length, _CHUNK))


def stitch(picture: Picture, edited: Picture, mask: Mask, feather: int) -> None:
    """Put the edited pixels under the mask into the picture, in place; known pixels are never written.

    picture, edited: uint8 (H, W, 3). In the outermost `feather` pixels under the mask the picture passes over from the
    continued known pixels (`extend_known`) to the edited ones in equal steps; feather 0 puts the edit side by side with
    the photo.
    """
    rings = extend_known(picture, mask, feather)
    continued = [picture[ring.rows, ring.columns] for ring in rings]  # uint8 (n, 3) each
    np.copyto(picture, edited, where=mask[:, :, None])
    for ring, outer in zip(rings, continued, strict=True):
        for some in _chunks(len(ring.rows)):
            inner = edited[ring.rows[some], ring.columns[some]].astype(np.int32)
            blend = outer[some].astype(np.int32) * (feather + 1 - ring.depth) + inner * ring.depth
            picture[ring.rows[some], ring.columns[some]] = (2 * blend + feather + 1) // (2 * (feather + 1))
