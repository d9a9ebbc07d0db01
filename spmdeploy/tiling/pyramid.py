"""Plans the pyramid levels of a window, and the tiles of each level.

Levels double: a pixel of a level stands for `factor` by `factor` pixels of the photo, 1 at the last level. Tiles lie at
even places, so that what a tile is made from, the level before at half the size, begins at a whole pixel too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from spmdeploy.tiling.letterbox import Letterbox
from spmdeploy.tiling.windows import MIN_MARGIN, Window, bounding_box
from spmdeploy.types import NATIVE_SIZE, Mask

# What neighboring tiles share at least, as a part of a tile's side.
OVERLAP = 0.25
# The coarse edit is made at the model's size, and enlarged at most so far before the first doubling.
BASE_ENLARGED = 1.25


@dataclass(frozen=True, slots=True)
class Tile:
    """A square of a level: the numbers of its row and its column in the grid, its place in pixels of the level."""

    row: int
    column: int
    top: int
    left: int


@dataclass(frozen=True, slots=True)
class PyramidLevel:
    """One size of a window. rows, columns: tops and lefts of the grid, in pixels of the level, even and ascending."""

    window: Window
    factor: int
    """Photo pixels along one pixel of the level, a power of two."""
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    tiles: tuple[Tile, ...]
    """The tiles that touch the mask, row by row: no other is run."""
    size: int
    """Of a tile."""

    @property
    def height(self) -> int:
        """Of the whole window in this level; the last row may lie half outside the window."""
        return -(-self.window.height // self.factor)

    @property
    def width(self) -> int:
        """Of the whole window in this level, like `height`."""
        return -(-self.window.width // self.factor)

    @property
    def region(self) -> Window:
        """What the grid covers, in pixels of the level; a level smaller than a tile lies at its upper left."""
        height, width = (places[-1] + self.size - places[0] for places in (self.rows, self.columns))
        return Window(self.rows[0], self.columns[0], height, width)

    @property
    def extent(self) -> tuple[int, int]:
        """Height and width of the region, as far as the window has it."""
        region = self.region
        return min(region.height, self.height - region.top), min(region.width, self.width - region.left)

    def place(self, tile: Tile) -> tuple[slice, slice]:
        """Cuts the tile out of an array of the region; of its extent, what is there of the tile."""
        region = self.region
        return Window(tile.top - region.top, tile.left - region.left, self.size, self.size).slices

    def neighbors(self, tile: Tile) -> list[tuple[int, int, int, int]]:
        """The places in the grid on the left of a tile and above it: row and column, and how far below and to the right
        of each the tile begins."""
        before = ((tile.row, tile.column - 1), (tile.row - 1, tile.column))
        return [
            (row, column, tile.top - self.rows[row], tile.left - self.columns[column])
            for row, column in before
            if row >= 0 and column >= 0
        ]

    def weights(self, tile: Tile) -> NDArray[np.float32]:
        """float32 (size, size): how much the tile counts at each place. Over all tiles of the grid they sum to one."""
        down, right = (blend_windows(starts, self.size) for starts in (self.rows, self.columns))
        return np.outer(down[tile.row], right[tile.column])

    def source_window(self, tile: Tile) -> Window:
        """What the tile shows of the window, in photo pixels from the window's corner; it may reach beyond its end."""
        side = self.size * self.factor
        return Window(tile.top * self.factor, tile.left * self.factor, side, side)


def plan_pyramid(
    window: Window, mask: Mask, size: int = NATIVE_SIZE, overlap: float = OVERLAP
) -> tuple[PyramidLevel, ...]:
    """The levels of a window from the coarsest to its own resolution; none where the window fits into the model.

    The grid of a level covers the mask and a margin around it, not the window.

    Args:
        window: Part of the photo.
        mask: bool (height, width) of the window, not empty.
        size: Side of a tile, which is the model's input.
        overlap: What neighboring tiles share at least, as a part of a tile's side, 0..1.
    """
    factors = [2**power for power in range(_doublings(max(window.height, window.width), size))]
    shared = 2 * round(size * overlap / 2)
    return tuple(_level(window, mask, factor, size, shared) for factor in reversed(factors))


def coarse_size(frame: Letterbox, first: PyramidLevel) -> tuple[int, int, float, float]:
    """The image from which the first level starts, at half that level's size.

    Args:
        frame: The window in the model's input.
        first: The coarsest level.

    Returns:
        Its height and width in pixels, and the rows and columns of the coarse edit that it shows.
    """
    window, factor = frame.window, 2 * first.factor
    height, width = (-(-side // factor) for side in (window.height, window.width))
    # A pixel of it is `factor` photo pixels, which the window's sides need not be multiples of.
    rows, columns = height * factor / window.height, width * factor / window.width
    return height, width, rows * frame.height, columns * frame.width


def _doublings(longer: int, size: int) -> int:
    """The fewest that bring a coarse edit, enlarged no further than BASE_ENLARGED, to `longer` pixels."""
    count = 0 if longer <= size else 1
    while longer > size * BASE_ENLARGED * 2**count:
        count += 1
    return count


def _level(window: Window, mask: Mask, factor: int, size: int, overlap: int) -> PyramidLevel:
    bounds = bounding_box(mask)
    assert bounds is not None, window
    top, left, bottom, right = bounds
    rows = tile_starts(top // factor, -(-bottom // factor), -(-window.height // factor), size, overlap)
    columns = tile_starts(left // factor, -(-right // factor), -(-window.width // factor), size, overlap)
    whole = PyramidLevel(window, factor, rows, columns, (), size)
    tiles = (Tile(i, j, y, x) for i, y in enumerate(rows) for j, x in enumerate(columns))
    return replace(whole, tiles=tuple(tile for tile in tiles if mask[whole.source_window(tile).slices].any()))


def tile_starts(first: int, end: int, length: int, size: int, overlap: int) -> tuple[int, ...]:
    """Where tiles begin that cover a part of a line and a margin, as few as the overlap allows, evenly spread.

    Args:
        first: First pixel to cover.
        end: Pixel after the last to cover.
        length: Of the line, in pixels.
        size: Of a tile, even.
        overlap: Pixels that neighboring tiles share at least.

    Returns:
        Even numbers, ascending. All tiles are inside 0..length, except that a line of odd length may be exceeded by
        one pixel, and a line shorter than a tile has one tile that begins at 0.
    """
    room = _even_above(length)
    if room <= size:
        return (0,)
    first, end = _even_below(max(first - MIN_MARGIN, 0)), _even_above(min(end + MIN_MARGIN, room))
    span = max(end - first, size)
    start = _even_below(min(max(first - (span - (end - first)) // 2, 0), room - span))
    steps = -(-(span - size) // (size - overlap))
    return tuple(start + _even_below(step * (span - size) // max(steps, 1)) for step in range(steps + 1))


def _even_below(number: int) -> int:
    return number - number % 2


def _even_above(number: int) -> int:
    return number + number % 2


@lru_cache(maxsize=64)
def blend_windows(starts: tuple[int, ...], size: int) -> NDArray[np.float32]:
    """float32 (tiles, size): the weights along one axis of tiles that begin at `starts`, ascending.

    A tile counts fully where it is alone and passes over to the next in half a sine over all that the two share. At
    each place the weights sum to one, also where three tiles meet.
    """
    linear = linear_ramps(starts, size)
    risen = np.sin(linear * (np.pi / 2)) ** 2
    return tile_by_tile(risen / risen.sum(axis=0), starts, size)


def linear_ramps(starts: tuple[int, ...], size: int) -> NDArray[np.float32]:
    """float32 (tiles, length from the first tile's begin to the last one's end): weights by the distance to the tile's
    own end, which sum to one at each place."""
    place = np.arange(starts[0], starts[-1] + size, dtype=np.float32) + 0.5
    middle = np.array(starts, np.float32)[:, None] + size / 2
    reach = np.clip(size / 2 - np.abs(place - middle), 0, None).astype(np.float32)
    ramp: NDArray[np.float32] = reach / reach.sum(axis=0)
    return ramp


def tile_by_tile(weights: NDArray[np.float32], starts: tuple[int, ...], size: int) -> NDArray[np.float32]:
    """(tiles, length) to (tiles, size): of each tile's weights those that lie on it."""
    return np.stack([row[start - starts[0] :][:size] for row, start in zip(weights, starts, strict=True)])


def high_frequency_energy(image: NDArray[np.uint8], known: Mask) -> tuple[float, int]:
    """Sum and number of the finest detail at the known pixels.

    Detail is the absolute fourth difference, by rows and by columns, over 16: all of a checkerboard's amplitude, a
    quarter of it at twice the wavelength, and nothing of gradients. Only differences between known pixels count.

    Args:
        image: uint8 (H, W, 3).
        known: bool (H, W).

    Returns:
        The sum in gray levels and the number of its terms.
    """
    total, count = 0.0, 0
    for axis in (0, 1):
        pixels, inside = np.moveaxis(image, axis, 0).astype(np.int16), np.moveaxis(known, axis, 0)
        middle = pixels[2:-2]
        difference = pixels[:-4] - 4 * pixels[1:-3] + 6 * middle - 4 * pixels[3:-1] + pixels[4:]
        whole = inside[:-4] & inside[1:-3] & inside[2:-2] & inside[3:-1] & inside[4:]
        total += float(np.abs(difference)[whole].mean(axis=-1, dtype=np.float64).sum() / 16)
        count += int(whole.sum())
    return total, count
