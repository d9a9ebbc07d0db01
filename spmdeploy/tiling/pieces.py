"""What belongs together in a mask."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from spmdeploy.types import Boxes, Mask

Indices = NDArray[np.intp]

# Pieces are told apart on a grid of blocks of this size. Pixels in touching blocks are less than two blocks apart, so
# with a margin of at least one block on either side their windows overlap and would be merged anyway: nothing is lost.
BLOCK = 32


def mask_components(mask: Mask) -> Boxes:
    """The exact bounding boxes of the mask's pieces: int64 (pieces, 4), empty for an empty mask.

    Pieces are 8-connected groups of blocks on a grid that starts at the mask's own bounding box, so that moving the
    mask moves the pieces. Pieces in touching blocks count as one (see BLOCK).
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
