"""Fits a window into the square model input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from spmdeploy.tiling.windows import Window
from spmdeploy.types import NATIVE_SIZE, Indices, Mask

T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True, slots=True)
class Letterbox:
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
        """Whether the window is larger than the model's input."""
        return (self.height, self.width) != (self.window.height, self.window.width)


def fit_letterbox(window: Window, size: int = NATIVE_SIZE) -> Letterbox:
    """The letterbox of a window: shrunk until its longer side is `size`, never enlarged."""
    longer = max(window.height, window.width)
    if longer <= size:
        return Letterbox(window, window.height, window.width, size)
    return Letterbox(window, _shrunk(window.height, size, longer), _shrunk(window.width, size, longer), size)


def _shrunk(side: int, size: int, longer: int) -> int:
    return max(1, (2 * side * size + longer) // (2 * longer))


def pad_by_reflection(array: NDArray[T], height: int, width: int) -> NDArray[T]:
    """Continue an array below and to the right by mirroring.

    The outermost pixel is not repeated, so a label map gets no edges that it did not have; a side of one pixel is
    repeated.

    Args:
        array: (h, w, ...), not empty.
        height: Rows of the result, at least h.
        width: Columns of the result, at least w.

    Returns:
        (height, width, ...); the array itself where nothing is to be added.
    """
    if array.shape[:2] == (height, width):
        return array
    margins = [(0, height - array.shape[0]), (0, width - array.shape[1])] + [(0, 0)] * (array.ndim - 2)
    return np.pad(array, margins, mode="reflect")


def label_sampling_grid(mask: Mask, frame_mask: Mask) -> tuple[Indices, Indices]:
    """Choose the pixel of the window from which each pixel of a smaller image takes its label.

    It is the pixel in the middle, except that a pixel to be edited takes the *masked* pixel nearest to its middle:
    labels count only there, and a thin mask would otherwise get the labels next to it.

    Args:
        mask: bool (H, W) of the window.
        frame_mask: bool (h, w) of the smaller image, True where its pixel touches a masked one.

    Returns:
        Rows and columns of the window, both (h, w).
    """
    rows, first_row, last_row = _cell_bounds(mask.shape[0], frame_mask.shape[0])
    columns, first_column, last_column = _cell_bounds(mask.shape[1], frame_mask.shape[1])
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


def _cell_bounds(length: int, parts: int) -> tuple[Indices, Indices, Indices]:
    """Per part of a line of pixels: the pixel in its middle, the first and the last that it touches."""
    part = np.arange(parts)
    return (2 * part + 1) * length // (2 * parts), part * length // parts, ((part + 1) * length - 1) // parts


def _nearest_first(reach_down: int, reach_right: int) -> list[tuple[int, int]]:
    steps = [(y, x) for y in range(-reach_down, reach_down + 1) for x in range(-reach_right, reach_right + 1)]
    return sorted(steps, key=lambda step: (step[0] ** 2 + step[1] ** 2, step))
