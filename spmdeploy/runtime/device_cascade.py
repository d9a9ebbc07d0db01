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

from spmdeploy.images import canvas_taps
from spmdeploy.runtime.engine_memory import ALIGNMENT, EngineMemory
from spmdeploy.tiling.blending import ramps
from spmdeploy.tiling.frames import Frame
from spmdeploy.tiling.levels import Level, Tile
from spmdeploy.tiling.windows import Window

Batch = Callable[[int], None]
"""Queues so many edits on the inputs in the memory's places; results stay in theirs."""


class PaintedLevel(NamedTuple):
    """canvas: float32 (H, W, 3), the level's region as far as the window has it. mismatch: the distances of
    neighbouring tiles where both show the same masked pixel, in grey levels, added up."""

    canvas: NDArray[np.float32]
    mismatch: float


@dataclass(frozen=True)
class _Picture:
    """float32 (height, width, 3) on the device."""

    address: int
    height: int
    width: int

    @property
    def numbers(self) -> int:
        return self.height * self.width * 3


@dataclass(frozen=True)
class _Taps:
    """What `canvas_taps` gives, on the device."""

    first: int
    weights: int
    taps: int
    length: int
    last: int


class _Places:
    """The pieces of one allocation, and what is to be written to them at first."""

    def __init__(self) -> None:
        self.size = 0
        self.written: list[tuple[int, NDArray[np.uint8]]] = []

    def room(self, size: int) -> int:
        """The offset of so many bytes."""
        start = self.size
        self.size += math.ceil(size / ALIGNMENT) * ALIGNMENT
        return start

    def table(self, values: NDArray[Any]) -> int:
        offset = self.room(values.nbytes)
        self.written.append((offset, np.ascontiguousarray(values).view(np.uint8).reshape(-1)))
        return offset


class DeviceCascade:
    """Made for one window; use it as a context manager. May be used while other threads use the session.

    `coarse`, then for each level `begin` and `paint` for its tiles row by row, then `levels`.
    """

    def __init__(
        self, memory: EngineMemory, edit: Batch, refine: Batch, most: int, frame: Frame, levels: tuple[Level, ...]
    ) -> None:
        """most: edits that one call of edit and refine takes. Raises OutOfMemory, UnavailableError; nothing is left
        behind then."""
        self._memory, self._edit, self._refine, self._most = memory, edit, refine, most
        self._frame, self._levels, self._size = frame, levels, levels[0].size
        places, size = _Places(), frame.size
        factor = 2 * levels[0].factor
        height, width = (-(-side // factor) for side in (frame.window.height, frame.window.width))
        # A pixel of the base is `factor` photo pixels, which the window's sides need not be multiples of.
        rows, columns = height * factor / frame.window.height, width * factor / frame.window.width
        down = _table(places, frame.height, rows * frame.height, height)
        right = _table(places, frame.width, columns * frame.width, width)
        twice = _table(places, size // 2, size // 2, size)
        ramp_places = [[places.table(ramps(starts, size)) for starts in (one.rows, one.columns)] for one in levels]
        between = places.room(4 * 3 * max(frame.height * width, size // 2 * size))
        base = places.room(4 * 3 * height * width)
        tiles = places.room(8 * 3 * size * size * max(len(level.columns) for level in levels))
        drawn = [places.room(4 * 3 * math.prod(level.extent)) for level in levels]
        planes = [places.room(4 * level.region.height * level.region.width) for level in levels]
        with memory.in_use():
            memory.device.load_kernels()
            start = self._address = memory.lend(places.size, "the levels of a cascade")
            try:
                self._down, self._right, self._twice = (
                    _Taps(start + one.first, start + one.weights, one.taps, one.length, one.last)
                    for one in (down, right, twice)
                )
                self._ramps = [[start + place for place in pair] for pair in ramp_places]
                self._between, self._tiles = start + between, start + tiles
                self._base = _Picture(start + base, height, width)
                self._canvases = [
                    _Picture(start + place, *level.extent) for place, level in zip(drawn, levels, strict=True)
                ]
                self._planes = [start + place for place in planes]
                for offset, content in places.written:
                    memory.upload(start + offset, content)
                memory.device.clear(start + drawn[0], places.size - drawn[0], memory.stream)
                memory.queued()
            except BaseException:
                memory.take_back(start)
                raise
        self._number = -1
        self._painted: set[tuple[int, int]] = set()

    def __enter__(self) -> DeviceCascade:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gives the memory back. Safe to call twice, and after the session was closed."""
        self._memory.take_back(self._address)

    # -- the levels

    def coarse(
        self,
        image: NDArray[np.uint8],
        labels: NDArray[np.uint8],
        instances: NDArray[np.int32],
        mask: NDArray[np.uint8],
    ) -> None:
        """The edit of the whole window at the model's size, a batch of one, from which the first level starts."""
        memory, frame, base = self._memory, self._frame, self._base
        with memory.in_use():
            self._stage(image=image, labels=labels, instances=instances, mask=mask)
            self._edit(1)
            edited, row = memory.address("unrounded"), self._size * 3
            across = frame.height * base.width * 3
            self._resample(self._between, edited, self._right, row, 3, across, clip=False)
            self._resample(base.address, self._between, self._down, 0, base.width * 3, base.numbers, clip=True)
            memory.queued()

    def begin(self) -> None:
        """The next level."""
        self._number += 1
        self._painted = set()

    def paint(
        self,
        tiles: tuple[Tile, ...],
        image: NDArray[np.uint8],
        labels: NDArray[np.uint8],
        instances: NDArray[np.int32],
        mask: NDArray[np.uint8],
        *,
        refined: bool,
    ) -> None:
        """Tiles of the level, (B, size, size[, 3]) what the photo shows there; else than refined they are enlarged."""
        for start in range(0, len(tiles), self._most):
            part = slice(start, start + self._most)
            with self._memory.in_use():
                if refined:
                    self._stage(image=image[part], labels=labels[part], instances=instances[part], mask=mask[part])
                else:
                    self._stage(image=image[part], mask=mask[part])
                self._paint(tiles[part], refined)
                self._memory.queued()

    def levels(self) -> Iterator[PaintedLevel]:
        """What became of the levels, the coarsest first. Here and nowhere else pictures come back to the host."""
        for level, canvas, plane in zip(self._levels, self._canvases, self._planes, strict=True):
            picture = np.empty((canvas.height, canvas.width, 3), np.float32)
            distances = np.empty((level.region.height, level.region.width), np.float32)
            with self._memory.in_use():
                self._memory.download(canvas.address, picture.reshape(-1).view(np.uint8))
                self._memory.download(plane, distances.reshape(-1).view(np.uint8))
            yield PaintedLevel(picture, float(distances.sum(dtype=np.float64)))

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
        """Where a tile's picture is kept for its neighbours: those of two rows are."""
        return self._tiles + ((row % 2) * len(self._level.columns) + column) * 12 * self._size**2

    @property
    def _level(self) -> Level:
        return self._levels[self._number]

    def _cut(self, out: int, tile: Tile) -> None:
        """What the level before shows of a tile, at half size."""
        half, before, top, left = self._size // 2, self._base, 0, 0
        if self._number > 0:
            before, region = self._canvases[self._number - 1], self._levels[self._number - 1].region
            top, left = region.top, region.left
        top, left = tile.top // 2 - top, tile.left // 2 - left
        assert top >= 0 and left >= 0, (tile, top, left)
        rows, columns = min(half, before.height - top), min(half, before.width - left)
        self._kernel("cut", half * half * 3, out, before.address, before.width, top, left, rows, columns, half)

    def _enlarge(self, out: int, half: int) -> None:
        size = self._size
        self._resample(self._between, half, self._twice, size // 2 * 3, 3, size // 2 * size * 3, clip=False)
        self._resample(out, self._between, self._twice, 0, size * 3, size * size * 3, clip=True)

    def _resample(self, out: int, source: int, by: _Taps, row: int, inner: int, count: int, clip: bool) -> None:
        numbers = (by.taps, by.last, row, inner, by.length, int(clip))
        self._kernel("resample", count, out, source, by.first, by.weights, *numbers)

    def _blend(self, tile: Tile, picture: int, image: int, mask: int) -> None:
        region, canvas, size = self._level.region, self._canvases[self._number], self._size
        top, left = tile.top - region.top, tile.left - region.left
        rows, columns = min(size, canvas.height - top), min(size, canvas.width - left)
        down, right = (
            place + number * size * 4
            for place, number in zip(self._ramps[self._number], (tile.row, tile.column), strict=True)
        )
        place = (canvas.width, top * canvas.width + left)
        self._kernel(
            "blend", rows * columns * 3, canvas.address, picture, image, mask, down, right, *place, columns, size
        )

    def _compare(self, tile: Tile, picture: int, mask: int) -> None:
        """With the tiles on the left and above."""
        level, size = self._level, self._size
        region, plane = level.region, self._planes[self._number]
        at = (tile.top - region.top) * region.width + tile.left - region.left
        for row, column, down, right in level.neighbours(tile):
            if (row, column) in self._painted:
                both = Window(down, right, size - down, size - right)
                place = (region.width, at, down, right, both.width, size)
                other = self._tile(row, column)
                self._kernel("compare", both.height * both.width, plane, picture, other, mask, *place)

    def _kernel(self, name: str, threads: int, *arguments: int) -> None:
        self._memory.device.kernel(name, threads, self._memory.stream, *arguments)


def _table(places: _Places, have: int, reach: float, length: int) -> _Taps:
    """By offsets instead of addresses."""
    first, weights = canvas_taps(have, reach, length)
    return _Taps(places.table(first), places.table(weights), weights.shape[1], length, have - 1)
