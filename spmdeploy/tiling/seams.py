"""Seam score: how visible the borders of tiles are in an edit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spmdeploy.types import Mask

# Rows handled at once, so that the differences of a large image never exist as a whole.
_ROWS = 256


def border_lines(starts: tuple[int, ...], size: int) -> frozenset[int]:
    """Where tiles along one axis begin, end, and pass over into each other: lines before these pixels, from the first
    tile's begin."""
    lines = set()
    for start, after in itertools.pairwise(starts):
        lines |= {after, start + size, (after + start + size) // 2}
    return frozenset(line - starts[0] for line in lines)


def seam_score(image: NDArray[Any], mask: Mask, rows: frozenset[int], columns: frozenset[int]) -> float | None:
    """Mean step between neighboring pixels across the borders of tiles, less the mean step elsewhere, in gray levels.

    Steps down and steps to the right are compared among themselves, since photos have more of the one than of the
    other.

    Args:
        image: (H, W, 3), 0..255, integer or float.
        mask: bool (H, W); only steps between two masked pixels count.
        rows: Borders between rows, see `border_lines`.
        columns: Borders between columns.

    Returns:
        0 where borders do not show; None where the mask has no pixels on both sides of one.
    """
    excess, count = 0.0, 0
    for turned, lines in ((False, rows), (True, columns)):
        across, elsewhere = _Mean(), _Mean()
        for steps, inside, first in _steps(image, mask, turned):
            border = np.isin(np.arange(first, first + steps.shape[0]), list(lines))
            across.add(steps[border], inside[border])
            elsewhere.add(steps[~border], inside[~border])
        if across.count and elsewhere.count:
            excess += (across.value - elsewhere.value) * across.count
            count += across.count
    return excess / count if count else None


def mean_of_channels(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """The mean over the three channels of the last axis, as `mean` gives it and ten times as fast."""
    mean: NDArray[np.float32] = (image[..., 0] + image[..., 1] + image[..., 2]) / np.float32(3)
    return mean


class _Mean:
    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, values: NDArray[np.float32], where: Mask) -> None:
        self.total += float(values[where].sum(dtype=np.float64))
        self.count += int(np.count_nonzero(where))

    @property
    def value(self) -> float:
        return self.total / self.count


def _steps(image: NDArray[Any], mask: Mask, turned: bool) -> Iterator[tuple[NDArray[np.float32], Mask, int]]:
    """In strips: the step from each pixel to the one before it, float32 (n, length), whether both are masked, and the
    number of the first. Down the rows, or along the columns where `turned`."""
    if turned:
        image, mask = image.swapaxes(0, 1), mask.T
    for start in range(1, len(mask), _ROWS):
        stop = min(start + _ROWS, len(mask))
        here, before = (image[a:b].astype(np.float32) for a, b in ((start, stop), (start - 1, stop - 1)))
        yield mean_of_channels(np.abs(here - before)), mask[start:stop] & mask[start - 1 : stop - 1], start
