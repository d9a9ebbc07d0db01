"""A window carried up through its levels on the GPU: its picture stays there from the coarse edit to the last level.

The host sends what the photo shows of each tile, and reads when all is done. In between there are only kernels
(`device_kernels`) and the two graphs, queued one behind the other in one stream; the host prepares tiles meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spmdeploy.gpu.buffers import ALIGNMENT, EngineMemory
from spmdeploy.imaging.resize import canvas_taps
from spmdeploy.tiling.letterbox import Letterbox
from spmdeploy.tiling.pyramid import PyramidLevel, Tile, blend_windows, coarse_size
from spmdeploy.tiling.windows import Window
from spmdeploy.types import ModelInput

EnqueueBatch = Callable[[int], None]
"""Queues so many edits on the inputs in the memory's places; results stay in theirs."""


class LevelResult(NamedTuple):
    """canvas: float32 (H, W, 3), the level's region as far as the window has it. mismatch: the distances of
    neighboring tiles where both show the same masked pixel, in gray levels, added up."""

    canvas: NDArray[np.float32]
    mismatch: float


@dataclass(frozen=True)
class _Picture:
    """float32 (height, width, 3)."""

    offset: int
    height: int
    width: int

    @property
    def numbers(self) -> int:
        return self.height * self.width * 3


@dataclass(frozen=True)
class _ResampleTable:
    """What `canvas_taps` gives, and the last pixel that there is."""

    first: int
    weights: int
    taps: int
    length: int
    last: int


class _Layout:
    """Where everything of a cascade lies in one allocation, by offsets in bytes, and what is written there at first."""

    def __init__(self, frame: Letterbox, levels: tuple[PyramidLevel, ...]) -> None:
        size = frame.size
        self.bytes = 0
        self.tables: list[tuple[int, NDArray[np.uint8]]] = []
        height, width, rows, columns = coarse_size(frame, levels[0])
        self.down = self._taps(frame.height, rows, height)
        self.right = self._taps(frame.width, columns, width)
        self.twice = self._taps(size // 2, size // 2, size)
        self.blend_windows = [
            tuple(self._table(blend_windows(starts, size)) for starts in (one.rows, one.columns)) for one in levels
        ]
        # Between the two axes of a resampling: of the base, or of a tile.
        self.halfway = self._room(4 * 3 * max(frame.height * width, size // 2 * size))
        self.base = _Picture(self._room(4 * 3 * height * width), height, width)
        self.tiles = self._room(2 * 4 * 3 * size * size * max(len(level.columns) for level in levels))
        self.zeros = self.bytes  # what follows begins as such
        self.canvases = [_Picture(self._room(4 * 3 * math.prod(level.extent)), *level.extent) for level in levels]
        self.planes = [self._room(4 * level.region.height * level.region.width) for level in levels]

    def _room(self, size: int) -> int:
        start = self.bytes
        self.bytes += math.ceil(size / ALIGNMENT) * ALIGNMENT
        return start

    def _table(self, values: NDArray[Any]) -> int:
        offset = self._room(values.nbytes)
        self.tables.append((offset, np.ascontiguousarray(values).view(np.uint8).reshape(-1)))
        return offset

    def _taps(self, have: int, reach: float, length: int) -> _ResampleTable:
        first, weights = canvas_taps(have, reach, length)
        return _ResampleTable(self._table(first), self._table(weights), weights.shape[1], length, have - 1)


class DeviceCascade:
    """Made for one window; use it as a context manager. May be used while other threads use the session.

    `coarse`, then for each level `begin` and `paint` for its tiles row by row, then `levels`.
    """

    def __init__(
        self,
        memory: EngineMemory,
        edit: EnqueueBatch,
        refine: EnqueueBatch,
        most: int,
        frame: Letterbox,
        levels: tuple[PyramidLevel, ...],
    ) -> None:
        """most: edits that one call of edit and refine takes. Raises OutOfMemory, UnavailableError; nothing is left
        behind then."""
        self._memory, self._edit, self._refine, self._most = memory, edit, refine, most
        self._frame, self._levels, self._size = frame, levels, frame.size
        self._layout = layout = _Layout(frame, levels)
        self._number = -1
        self._painted: set[tuple[int, int]] = set()
        with memory.in_use():
            memory.device.load_kernels()
            self._start = memory.allocate_temporary(layout.bytes, "the levels of a cascade")
            try:
                for offset, content in layout.tables:
                    memory.upload(self._start + offset, content)
                memory.device.clear(self._start + layout.zeros, layout.bytes - layout.zeros, memory.stream)
                memory.queued()
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> DeviceCascade:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gives the memory back. Safe to call twice, and after the session was closed."""
        self._memory.release_temporary(self._start)

    # -- the levels

    def coarse(self, inputs: ModelInput) -> None:
        """The edit of the whole window at the model's size, a batch of one, from which the first level starts."""
        memory, frame, layout = self._memory, self._frame, self._layout
        base, halfway = layout.base, self._start + layout.halfway
        with memory.in_use():
            self._stage(**inputs._asdict())
            self._edit(1)
            edited, row = memory.address("unrounded"), self._size * 3
            across = frame.height * base.width * 3
            self._resample(halfway, edited, layout.right, row, 3, across, clip=False)
            into = self._start + base.offset
            self._resample(into, halfway, layout.down, 0, base.width * 3, base.numbers, clip=True)
            memory.queued()

    def begin(self) -> None:
        """The next level."""
        self._number += 1
        self._painted = set()

    def paint(
        self,
        tiles: tuple[Tile, ...],
        inputs: ModelInput,
        *,
        refined: bool,
    ) -> None:
        """Tiles of the level, (B, size, size[, 3]) what the photo shows there; else than refined they are enlarged."""
        for start in range(0, len(tiles), self._most):
            part = slice(start, start + self._most)
            with self._memory.in_use():
                if refined:
                    self._stage(**{name: array[part] for name, array in inputs._asdict().items()})
                else:
                    self._stage(image=inputs.image[part], mask=inputs.mask[part])
                self._paint(tiles[part], refined)
                self._memory.queued()

    def levels(self) -> Iterator[LevelResult]:
        """What became of the levels, the coarsest first. Here and nowhere else pictures come back to the host."""
        layout = self._layout
        for level, canvas, plane in zip(self._levels, layout.canvases, layout.planes, strict=True):
            picture = np.empty((canvas.height, canvas.width, 3), np.float32)
            distances = np.empty((level.region.height, level.region.width), np.float32)
            with self._memory.in_use():
                self._memory.download(self._start + canvas.offset, picture.reshape(-1).view(np.uint8))
                self._memory.download(self._start + plane, distances.reshape(-1).view(np.uint8))
            yield LevelResult(picture, float(distances.sum(dtype=np.float64)))

    # -- inside `in_use`

    def _stage(self, **inputs: NDArray[Any]) -> None:
        for name, array in inputs.items():
            self._memory.stage(name, array)

    def _paint(self, tiles: tuple[Tile, ...], refined: bool) -> None:
        memory, size = self._memory, self._size
        coarse, painted = memory.address("coarse"), memory.address("unrounded")
        half_bytes, tile_bytes = 3 * size * size, 12 * size * size
        for number, tile in enumerate(tiles):
            self._cut(coarse + number * half_bytes, tile)
        if refined:
            self._refine(len(tiles))
        else:
            for number in range(len(tiles)):
                self._enlarge(painted + number * tile_bytes, coarse + number * half_bytes)
        for number, tile in enumerate(tiles):
            place = self._tile(tile.row, tile.column)
            memory.device.copy_within(place, painted + number * tile_bytes, tile_bytes, memory.stream)
            image = memory.address("image") + number * size * size * 3
            mask = memory.address("mask") + number * size * size
            self._blend(tile, place, image, mask)
            self._compare(tile, place, mask)
            self._painted.add((tile.row, tile.column))

    def _tile(self, row: int, column: int) -> int:
        """Where a tile's picture is kept for its neighbors: those of two rows are."""
        return self._start + self._layout.tiles + ((row % 2) * len(self._level.columns) + column) * 12 * self._size**2

    @property
    def _level(self) -> PyramidLevel:
        return self._levels[self._number]

    def _cut(self, out: int, tile: Tile) -> None:
        """What the level before shows of a tile, at half size."""
        half, before, top, left = self._size // 2, self._layout.base, 0, 0
        if self._number > 0:
            before, region = self._layout.canvases[self._number - 1], self._levels[self._number - 1].region
            top, left = region.top, region.left
        top, left = tile.top // 2 - top, tile.left // 2 - left
        assert top >= 0 and left >= 0, (tile, top, left)
        rows, columns = min(half, before.height - top), min(half, before.width - left)
        source = self._start + before.offset
        self._kernel("cut", half * half * 3, out, source, before.width, top, left, rows, columns, half)

    def _enlarge(self, out: int, half: int) -> None:
        size, twice, halfway = self._size, self._layout.twice, self._start + self._layout.halfway
        self._resample(halfway, half, twice, size // 2 * 3, 3, size // 2 * size * 3, clip=False)
        self._resample(out, halfway, twice, 0, size * 3, size * size * 3, clip=True)

    def _resample(
        self, out: int, source: int, by: _ResampleTable, row: int, inner: int, count: int, clip: bool
    ) -> None:
        numbers = (by.taps, by.last, row, inner, by.length, int(clip))
        tables = self._start + by.first, self._start + by.weights
        self._kernel("resample", count, out, source, *tables, *numbers)

    def _blend(self, tile: Tile, picture: int, image: int, mask: int) -> None:
        region, canvas, size = self._level.region, self._layout.canvases[self._number], self._size
        top, left = tile.top - region.top, tile.left - region.left
        rows, columns = min(size, canvas.height - top), min(size, canvas.width - left)
        ramp_of_row, ramp_of_column = (self._start + place for place in self._layout.blend_windows[self._number])
        down, right = ramp_of_row + tile.row * size * 4, ramp_of_column + tile.column * size * 4
        pointers = self._start + canvas.offset, picture, image, mask, down, right
        numbers = canvas.width, top * canvas.width + left, columns, size
        self._kernel("blend", rows * columns * 3, *pointers, *numbers)

    def _compare(self, tile: Tile, picture: int, mask: int) -> None:
        """With the tiles on the left and above."""
        level, size = self._level, self._size
        region, plane = level.region, self._start + self._layout.planes[self._number]
        at = (tile.top - region.top) * region.width + tile.left - region.left
        for row, column, down, right in level.neighbors(tile):
            if (row, column) in self._painted:
                both = Window(down, right, size - down, size - right)
                place = (region.width, at, down, right, both.width, size)
                other = self._tile(row, column)
                self._kernel("compare", both.height * both.width, plane, picture, other, mask, *place)

    def _kernel(self, name: str, threads: int, *arguments: int) -> None:
        self._memory.device.kernel(name, threads, self._memory.stream, *arguments)
