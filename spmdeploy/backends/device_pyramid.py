"""Coarse-to-fine refinement of one window in GPU memory, from the coarse edit to the last level.

The host sends the photo's part of each tile and reads when everything is done. In between, kernels (`gpu/kernels.cu`)
and the two graphs are queued in one stream, one launch each for a batch of tiles, while the host prepares the next one.
Not yet run on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spmdeploy.gpu.arrays import ALIGNMENT
from spmdeploy.gpu.buffers import EngineMemory
from spmdeploy.imaging.resize import canvas_taps
from spmdeploy.tiling.letterbox import Letterbox
from spmdeploy.tiling.pyramid import PyramidLevel, Tile, blend_windows, coarse_size
from spmdeploy.types import ModelInput

EnqueueBatch = Callable[[int], None]
"""Queues a graph on a number of items, from the inputs' places in the memory to the outputs'."""

NEIGHBOR = np.dtype([("slot", np.int32), ("down", np.int32), ("right", np.int32)])
TILE = np.dtype(
    [
        *((name, np.int32) for name in ("top", "left", "row", "column")),
        *((name, np.int32) for name in ("source_top", "source_left", "source_rows", "source_columns", "slot")),
        ("neighbors", NEIGHBOR, 2),
    ]
)
"""`Tile` of kernels.cu."""
EXTRA_BYTES = {"tiles": TILE.itemsize}
"""What the memory must have room for besides inputs and outputs, in bytes for each item."""


class LevelResult(NamedTuple):
    """One level.

    canvas: float32 (H, W, 3), the level's region as far as the window has it. mismatch: sum of the distances of
    neighboring tiles where both show the same masked pixel, in gray levels.
    """

    canvas: NDArray[np.float32]
    mismatch: float


@dataclass(frozen=True)
class _Canvas:
    """float32 (height, width, 3) at an offset in the allocation."""

    offset: int
    height: int
    width: int


@dataclass(frozen=True)
class _ResampleTable:
    """What `canvas_taps` returns, by offsets, and the last pixel of the source."""

    first: int
    weights: int
    taps: int
    length: int
    last: int


class _Layout:
    """Offsets in bytes of everything in one allocation, and its initial content."""

    def __init__(self, letterbox: Letterbox, levels: tuple[PyramidLevel, ...], batch: int) -> None:
        size = letterbox.size
        self.bytes = 0
        self.tables: list[tuple[int, NDArray[np.uint8]]] = []
        height, width, rows, columns = coarse_size(letterbox, levels[0])
        self.vertical = self._taps(letterbox.height, rows, height)
        self.horizontal = self._taps(letterbox.width, columns, width)
        self.doubling = self._taps(size // 2, size // 2, size)
        self.blend_windows = [
            tuple(self._table(blend_windows(starts, size)) for starts in (level.rows, level.columns))
            for level in levels
        ]
        # Between the two axes of a resampling: of the base, or of a batch of tiles.
        self.intermediate = self._room(4 * 3 * max(letterbox.height * width, batch * size // 2 * size))
        self.base = _Canvas(self._room(4 * 3 * height * width), height, width)
        # A tile's neighbors are among as many tiles before it as a row of the grid has, and one.
        self.slots = batch + 1 + max(len(level.columns) for level in levels)
        self.kept = self._room(self.slots * 4 * 3 * size * size)
        self.zeros = self.bytes  # what follows starts as zeros
        self.canvases = [_Canvas(self._room(4 * 3 * math.prod(level.extent)), *level.extent) for level in levels]
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
    """Refines one window; to be used as a context manager, also while other threads use the session.

    First `coarse`, then for each level `begin` and `paint` for its tiles row by row, then `levels`.
    """

    def __init__(
        self,
        memory: EngineMemory,
        edit: EnqueueBatch,
        refine: EnqueueBatch,
        max_batch: int,
        letterbox: Letterbox,
        levels: tuple[PyramidLevel, ...],
    ) -> None:
        """Allocate memory for all levels.

        Args:
            memory: Holds the inputs and outputs of both graphs, and `EXTRA_BYTES`.
            edit: Queues the edit graph.
            refine: Queues the refine graph.
            max_batch: Most items that one call of these takes.
            letterbox: The window in the model's input.
            levels: As planned for the window.

        Raises:
            OutOfMemoryError, UnavailableError: Nothing is left allocated.
        """
        self._memory, self._edit, self._refine, self._max_batch = memory, edit, refine, max_batch
        self._letterbox, self._levels, self._size = letterbox, levels, letterbox.size
        self._layout = layout = _Layout(letterbox, levels, max_batch)
        self._number = -1
        self._next_slot = 0
        self._slots: dict[tuple[int, int], int] = {}
        with memory.lock():
            memory.device.load_kernels()
            self._start = memory.allocate_temporary(layout.bytes, "the levels of a cascade")
            try:
                for offset, content in layout.tables:
                    memory.upload(self._start + offset, content)
                memory.device.clear(self._start + layout.zeros, layout.bytes - layout.zeros, memory.stream)
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
        """Free the memory. Safe to call twice, and after the session was closed."""
        self._memory.release_temporary(self._start)

    def coarse(self, inputs: ModelInput) -> None:
        """Queue the edit of the whole window at the model's size, a batch of one, which the first level starts from."""
        memory, layout = self._memory, self._layout
        base, intermediate = layout.base, self._start + layout.intermediate
        with memory.lock():
            memory.stage(inputs._asdict())
            self._edit(1)
            edited, row = memory.address("unrounded"), self._size * 3
            count = self._letterbox.height * base.width * 3
            self._resample(intermediate, edited, layout.horizontal, row, 3, count, clip=False)
            count = base.height * base.width * 3
            self._resample(
                self._start + base.offset, intermediate, layout.vertical, 0, base.width * 3, count, clip=True
            )

    def begin(self) -> None:
        """Go on to the next level."""
        self._number += 1
        self._slots = {}

    def paint(self, tiles: tuple[Tile, ...], inputs: ModelInput, *, refined: bool) -> None:
        """Queue tiles of the level.

        Args:
            tiles: In the order of the grid.
            inputs: What the photo shows there, a batch.
            refined: By the refine graph; else the tiles are enlarged from the level before.
        """
        for start in range(0, len(tiles), self._max_batch):
            part = slice(start, start + self._max_batch)
            staged = {name: array[part] for name, array in inputs._asdict().items() if refined or name in _READ}
            with self._memory.lock():
                records = self._records(tiles[part])
                self._memory.stage({**staged, "tiles": records.view(np.uint8)})
                self._paint(records, refined)

    def levels(self) -> Iterator[LevelResult]:
        """Yield the results, the coarsest level first. Only here images are copied to the host."""
        layout = self._layout
        for level, canvas, plane in zip(self._levels, layout.canvases, layout.planes, strict=True):
            image = np.empty((canvas.height, canvas.width, 3), np.float32)
            distances = np.empty((level.region.height, level.region.width), np.float32)
            with self._memory.lock():
                self._memory.download(self._start + canvas.offset, image.reshape(-1).view(np.uint8))
                self._memory.download(self._start + plane, distances.reshape(-1).view(np.uint8))
            yield LevelResult(image, float(distances.sum(dtype=np.float64)))

    def _records(self, tiles: tuple[Tile, ...]) -> NDArray[Any]:
        """`TILE` (tiles,): what the kernels need to know. Each tile gets the slot after the one before it."""
        level, region, layout = self._levels[self._number], self._levels[self._number].region, self._layout
        before, top, left = layout.base, 0, 0
        if self._number > 0:
            before, source = layout.canvases[self._number - 1], self._levels[self._number - 1].region
            top, left = source.top, source.left
        half = self._size // 2
        records = np.zeros(len(tiles), TILE)
        records["neighbors"]["slot"] = -1
        for record, tile in zip(records, tiles, strict=True):
            source_top, source_left = tile.top // 2 - top, tile.left // 2 - left
            assert source_top >= 0 and source_left >= 0, (tile, top, left)
            record["top"], record["left"] = tile.top - region.top, tile.left - region.left
            record["row"], record["column"] = tile.row, tile.column
            record["source_top"], record["source_left"] = source_top, source_left
            record["source_rows"] = min(half, before.height - source_top)
            record["source_columns"] = min(half, before.width - source_left)
            record["slot"] = self._next_slot
            overlapping = [one for one in level.neighbors(tile) if one[:2] in self._slots]
            for neighbor, (row, column, down, right) in zip(record["neighbors"], overlapping, strict=False):
                neighbor["slot"], neighbor["down"], neighbor["right"] = self._slots[row, column], down, right
            self._slots[tile.row, tile.column] = self._next_slot
            self._next_slot = (self._next_slot + 1) % layout.slots
        return records

    def _paint(self, records: NDArray[Any], refined: bool) -> None:
        memory, size, batch = self._memory, self._size, len(records)
        coarse, painted, tiles = (memory.address(name) for name in ("coarse", "unrounded", "tiles"))
        before = self._layout.canvases[self._number - 1] if self._number > 0 else self._layout.base
        numbers = _ints(before.width, size // 2)
        source = self._start + before.offset
        self._kernel("cut", 3 * (size // 2) ** 2, coarse, source, tiles, *numbers, blocks_y=batch)
        if refined:
            self._refine(batch)
        else:
            self._enlarge(painted, coarse, batch)
        self._keep(painted, int(records["slot"][0]), batch)
        self._blend(records, tiles)

    def _enlarge(self, out: int, half: int, batch: int) -> None:
        """Tiles at half size, (batch, size / 2, size / 2, 3), to full size."""
        size, doubling, between = self._size, self._layout.doubling, self._start + self._layout.intermediate
        self._resample(between, half, doubling, size // 2 * 3, 3, batch * size // 2 * size * 3, clip=False)
        self._resample(out, between, doubling, size // 2 * size * 3, size * 3, batch * size * size * 3, clip=True)

    def _keep(self, painted: int, slot: int, batch: int) -> None:
        """Copy the tiles' images to their slots, which are a ring."""
        memory, kept, tile = self._memory, self._start + self._layout.kept, 12 * self._size**2
        first = min(batch, self._layout.slots - slot)
        memory.device.copy_within(kept + slot * tile, painted, first * tile, memory.stream)
        if first < batch:
            memory.device.copy_within(kept, painted + first * tile, (batch - first) * tile, memory.stream)

    def _blend(self, records: NDArray[Any], tiles: int) -> None:
        """Blend the tiles over the canvas, and compare them with their neighbors, in the box around all of them."""
        memory, layout, size, level = self._memory, self._layout, self._size, self._levels[self._number]
        canvas, kept, batch = layout.canvases[self._number], self._start + layout.kept, len(records)
        image, mask = memory.address("image"), memory.address("mask")
        rows, columns = (self._start + offset for offset in layout.blend_windows[self._number])
        top, left = int(records["top"].min()), int(records["left"].min())
        bottom, right = int(records["top"].max()) + size, int(records["left"].max()) + size

        height, width = min(bottom, canvas.height) - top, min(right, canvas.width) - left
        numbers = _ints(batch, canvas.width, top, left, width, size, height * width)
        pointers = self._start + canvas.offset, kept, image, mask, rows, columns, tiles
        self._kernel("blend", height * width, *pointers, *numbers)

        height, width = bottom - top, right - left
        numbers = _ints(batch, level.region.width, top, left, width, size, height * width)
        plane = self._start + layout.planes[self._number]
        self._kernel("compare", height * width, plane, kept, mask, tiles, *numbers)

    def _resample(
        self, out: int, source: int, table: _ResampleTable, row: int, inner: int, count: int, clip: bool
    ) -> None:
        numbers = _ints(table.taps, table.last, row, inner, table.length, int(clip), count)
        tables = self._start + table.first, self._start + table.weights
        self._kernel("resample", count, out, source, *tables, *numbers)

    def _kernel(self, name: str, threads: int, *arguments: int | np.int32, blocks_y: int = 1) -> None:
        self._memory.device.kernel(name, threads, self._memory.stream, *arguments, blocks_y=blocks_y)


_READ = ("image", "mask")
"""Inputs that are read of tiles that are only enlarged."""


def _ints(*numbers: int) -> tuple[np.int32, ...]:
    """Kernel arguments of the type int."""
    return tuple(map(np.int32, numbers))
