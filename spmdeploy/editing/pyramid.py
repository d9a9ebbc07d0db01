"""Coarse-to-fine refinement of a large window: pyramid levels up to full resolution, each in tiles of the model's size.

Every tile starts from the level before, which is one shared image, so that structure and color agree between tiles;
remaining differences are blended over the tiles' overlap. Between levels the image stays in floats, and its known
pixels are the photo's. A level at whose size the known pixels have no detail, as in upsampled or blurred photos, is
upsampled instead of refined: the network would invent streaks where the photo is smooth.

Where the session supports it, the image stays in GPU memory from the coarse edit to the last level
(`backends.device_pyramid`); else numpy does the same between two calls of the session.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from spmdeploy.backends.base import SupportsDevicePyramid
from spmdeploy.editing.preprocess import EditRegion, model_input, stacked
from spmdeploy.editing.report import LevelReport, PhaseTimer
from spmdeploy.errors import OutOfMemoryError, UnavailableError
from spmdeploy.imaging.resize import resize_canvas
from spmdeploy.tiling.letterbox import Letterbox, pad_by_reflection
from spmdeploy.tiling.pyramid import PyramidLevel, Tile, coarse_size, high_frequency_energy
from spmdeploy.tiling.seams import border_lines, mean_of_channels, seam_score
from spmdeploy.tiling.windows import Window
from spmdeploy.types import Canvas, Mask, ModelInput

if TYPE_CHECKING:
    from spmdeploy.backends.base import Backend
    from spmdeploy.backends.device_pyramid import DeviceCascade

# Mean gray levels of `high_frequency_energy` below which a photo has no detail. Photos at full resolution have 0.5 (at
# night) to 4, upsampled twice 0.2 to 0.4, further 0.1: the rounding to whole gray levels.
MIN_DETAIL = 0.25
# Tiles of a level that are sampled for it, at most.
_MAX_SAMPLED_TILES = 16


def coarse_canvas(letterbox: Letterbox, edited: NDArray[np.float32], level: PyramidLevel) -> Canvas:
    """The image from which the first level starts: the coarse edit at half that level's size.

    Args:
        letterbox: The window in the model's input.
        edited: float32 (size, size, 3), RGB in 0..255, the session's result for it.
        level: The coarsest level.
    """
    return resize_canvas(edited[: letterbox.height, : letterbox.width], *coarse_size(letterbox, level))


class RefinedWindow(NamedTuple):
    """A window at full resolution.

    canvas: of the last level's region, as far as it is inside the window. between_levels: where the image was kept
    between levels. notes: why not on the device, where the session supports that.
    """

    canvas: Canvas
    levels: tuple[LevelReport, ...]
    between_levels: Literal["device", "host"]
    notes: tuple[str, ...] = ()


def refine_window(
    session: Backend,
    letterbox: Letterbox,
    inputs: ModelInput,
    levels: tuple[PyramidLevel, ...],
    region: EditRegion,
    batch_size: int,
    timer: PhaseTimer,
) -> RefinedWindow:
    """Edit a window at the model's size, then refine it to full resolution.

    Args:
        session: Must refine.
        letterbox: The window in the model's input.
        inputs: The window in its letterbox, a batch of one.
        levels: Of the window, the coarsest first.
        region: The window's part of the photo.
        batch_size: Tiles per call of the session, at most.
        timer: Gets the time of each phase and the progress.
    """
    device, notes = _on_device(session, letterbox, levels, batch_size)
    if device is None:
        with timer.phase("run"):
            edited = session.run_unrounded(inputs)[0]
        timer.batches += 1
        timer.advance(1)
        canvas, reports = refine_on_host(
            session, levels, coarse_canvas(letterbox, edited, levels[0]), region, batch_size, timer
        )
        return RefinedWindow(canvas, reports, "host", notes)
    with device:
        with timer.phase("run"):
            device.coarse(inputs)
        timer.batches += 1
        timer.advance(1)
        canvas, reports = _refine_levels(_DeviceRenderer(device, timer), levels, region, batch_size, timer)
        return RefinedWindow(canvas, reports, "device")


def _on_device(
    session: Backend, letterbox: Letterbox, levels: tuple[PyramidLevel, ...], batch_size: int
) -> tuple[DeviceCascade | None, tuple[str, ...]]:
    """The session's pyramid in GPU memory; None on the CPU or where the GPU cannot hold it, with the reason."""
    if not isinstance(session, SupportsDevicePyramid):
        return None, ()
    try:
        return session.device_cascade(letterbox, levels, batch_size), ()
    except (OutOfMemoryError, UnavailableError) as exc:
        return None, (f"between levels the image went through host memory: {exc.problem}",)


def refine_on_host(
    session: Backend,
    levels: tuple[PyramidLevel, ...],
    base: Canvas,
    region: EditRegion,
    batch_size: int,
    timer: PhaseTimer,
) -> tuple[Canvas, tuple[LevelReport, ...]]:
    """Refine `base` to full resolution with numpy between the calls of the session.

    Args:
        session: Must refine.
        levels: Of the window, the coarsest first.
        base: Half the size of the first level; see `coarse_canvas`.
        region: The window's part of the photo.
        batch_size: Tiles per call of the session, at most.
        timer: Gets the time of each phase and the progress.

    Returns:
        The canvas of the last level's region, as far as it is inside the window, and a report for each level.
    """
    return _refine_levels(_HostRenderer(session, base, timer), levels, region, batch_size, timer)


class _Renderer(Protocol):
    """Builds one pyramid level from the previous one; numpy and GPU memory implement it."""

    def begin(self, level: PyramidLevel, refined: bool) -> None: ...

    def paint(self, tiles: tuple[Tile, ...], inputs: ModelInput) -> None: ...

    def end(self) -> None: ...

    def finished(self) -> tuple[Canvas, tuple[LevelReport, ...]]:
        """The last level's canvas, and a report for each level."""


def _refine_levels(
    renderer: _Renderer, levels: tuple[PyramidLevel, ...], region: EditRegion, batch_size: int, timer: PhaseTimer
) -> tuple[Canvas, tuple[LevelReport, ...]]:
    for level in levels:
        with timer.phase("prepare"):
            sampled = _sample_tiles(level, region)
            refined = _has_high_frequencies(list(sampled.values()))
        renderer.begin(level, refined)
        for start in range(0, len(level.tiles), batch_size):
            tiles = level.tiles[start : start + batch_size]
            with timer.phase("prepare"):
                inputs = stacked(
                    [sampled.pop(tile) if tile in sampled else _tile_input(level, tile, region) for tile in tiles]
                )
            renderer.paint(tiles, inputs)
            timer.batches += 1
            timer.advance(len(tiles))
        with timer.phase("stitch"):
            renderer.end()
    with timer.phase("stitch"):
        return renderer.finished()


class _HostRenderer:
    """Renders with numpy, and one call of the session per batch."""

    def __init__(self, session: Backend, base: Canvas, timer: PhaseTimer) -> None:
        self._session, self._timer = session, timer
        self._canvas, self._origin = base, (0, 0)
        self._reports: list[LevelReport] = []

    def begin(self, level: PyramidLevel, refined: bool) -> None:
        self._level, self._refined, self._blender = level, refined, _TileBlender(level)

    def paint(self, tiles: tuple[Tile, ...], inputs: ModelInput) -> None:
        size = self._level.size
        with self._timer.phase("prepare"):
            coarse = np.stack([_half(self._canvas, self._origin, tile, size // 2) for tile in tiles])
        with self._timer.phase("run"):
            painted = self._session.refine(inputs, coarse) if self._refined else _upsample_bilinear(coarse, size)
        with self._timer.phase("stitch"):
            self._blender.add(tiles, painted, inputs)

    def end(self) -> None:
        self._reports.append(self._blender.report(self._refined))
        self._canvas, self._origin = self._blender.canvas, (self._level.region.top, self._level.region.left)

    def finished(self) -> tuple[Canvas, tuple[LevelReport, ...]]:
        return self._canvas, tuple(self._reports)


class _DeviceRenderer:
    """Renders in the memory of the session's GPU; the host reads the levels when all are done."""

    def __init__(self, device: DeviceCascade, timer: PhaseTimer) -> None:
        self._device, self._timer = device, timer
        self._seen: list[_MaskCoverage] = []

    def begin(self, level: PyramidLevel, refined: bool) -> None:
        self._seen.append(_MaskCoverage(level, refined))
        self._device.begin()

    def paint(self, tiles: tuple[Tile, ...], inputs: ModelInput) -> None:
        with self._timer.phase("run"):
            self._device.paint(tiles, inputs, refined=self._seen[-1].refined)
        with self._timer.phase("stitch"):
            self._seen[-1].add(tiles, inputs)

    def end(self) -> None:
        """Nothing: the host does not wait."""

    def finished(self) -> tuple[Canvas, tuple[LevelReport, ...]]:
        reports = []
        for seen, painted in zip(self._seen, self._device.levels(), strict=True):
            canvas = painted.canvas
            reports.append(_level_report(seen.level, seen.refined, canvas, seen.mask, painted.mismatch, seen.compared))
        return canvas, tuple(reports)


class _MaskCoverage:
    """Masked pixels of a level that is rendered on the GPU, and how many of them neighboring tiles share."""

    def __init__(self, level: PyramidLevel, refined: bool) -> None:
        self.level, self.refined = level, refined
        self.mask = np.zeros(level.extent, np.bool_)
        self.compared = 0
        self._tiles: set[tuple[int, int]] = set()

    def add(self, tiles: tuple[Tile, ...], inputs: ModelInput) -> None:
        level, size = self.level, self.level.size
        for tile, mask in zip(tiles, inputs.mask != 0, strict=True):
            covered = self.mask[level.place(tile)]
            covered |= mask[: covered.shape[0], : covered.shape[1]]
            for row, column, down, right in level.neighbors(tile):
                if (row, column) in self._tiles:
                    self.compared += int(np.count_nonzero(mask[: size - down, : size - right]))
            self._tiles.add((tile.row, tile.column))


def _sample_tiles(level: PyramidLevel, region: EditRegion) -> dict[Tile, ModelInput]:
    """Inputs of some of the level's tiles, spread over it."""
    return {
        tile: _tile_input(level, tile, region) for tile in level.tiles[:: -(-len(level.tiles) // _MAX_SAMPLED_TILES)]
    }


def _tile_input(level: PyramidLevel, tile: Tile, region: EditRegion) -> ModelInput:
    return model_input(region.cut(level.source_window(tile)), level.size, level.size, level.size)


def _has_high_frequencies(sampled: list[ModelInput]) -> bool:
    """Whether the known pixels of the sampled tiles have detail; True where no pixel is known."""
    total, count = 0.0, 0
    for inputs in sampled:
        energy, pixels = high_frequency_energy(inputs.image, inputs.mask == 0)
        total, count = total + energy, count + pixels
    return count == 0 or total >= MIN_DETAIL * count


def _upsample_bilinear(coarse: Canvas, size: int) -> Canvas:
    """float32 (B, size / 2, size / 2, 3) to (B, size, size, 3)."""
    return np.stack([resize_canvas(half, size, size, *half.shape[:2]) for half in coarse])


def _half(canvas: Canvas, origin: tuple[int, int], tile: Tile, size: int) -> Canvas:
    """The previous level under a tile: float32 (size, size, 3). origin: row and column of the canvas in that level."""
    part = Window(tile.top // 2 - origin[0], tile.left // 2 - origin[1], size, size)
    assert part.top >= 0 and part.left >= 0, (tile, origin)
    return pad_by_reflection(canvas[part.slices], size, size)


class _TileBlender:
    """Blends the tiles of one level, which come row by row, and measures how much neighbors differ."""

    def __init__(self, level: PyramidLevel) -> None:
        self._level = level
        self.canvas: Canvas = np.zeros((*level.extent, 3), np.float32)
        self._mask = np.zeros(level.extent, np.bool_)
        self._raw: dict[tuple[int, int], Canvas] = {}
        self._mismatch, self._compared = 0.0, 0

    def add(self, tiles: tuple[Tile, ...], painted: Canvas, inputs: ModelInput) -> None:
        """painted: float32 (B, size, size, 3), the session's results for the inputs."""
        for tile, content, image, mask in zip(tiles, painted, inputs.image, inputs.mask != 0, strict=True):
            place = self._level.place(tile)
            canvas = self.canvas[place]
            inside = np.s_[: canvas.shape[0], : canvas.shape[1]]
            weighted = self._level.weights(tile)[..., None] * content
            painted_here = np.repeat(mask[inside][..., None], 3, axis=2)  # three times as fast as broadcast
            canvas[:] = np.where(painted_here, canvas + weighted[inside], image[inside])
            self._mask[place] |= mask[inside]
            self._compare(tile, content, mask)

    def _compare(self, tile: Tile, content: Canvas, mask: Mask) -> None:
        """Add the tile's distance from those on the left and above, which are still in memory."""
        size = self._level.size
        for row, column, down, right in self._level.neighbors(tile):
            other = self._raw.get((row, column))
            if other is not None:
                both = np.s_[: size - down, : size - right]
                distance = mean_of_channels(np.abs(content[both] - other[down:, right:]))[mask[both]]
                self._mismatch += float(distance.sum(dtype=np.float64))
                self._compared += distance.size
        self._raw[tile.row, tile.column] = content
        self._raw = {at: kept for at, kept in self._raw.items() if at >= (tile.row - 1, tile.column)}

    def report(self, refined: bool) -> LevelReport:
        return _level_report(self._level, refined, self.canvas, self._mask, self._mismatch, self._compared)


def _level_report(
    level: PyramidLevel, refined: bool, canvas: Canvas, mask: Mask, mismatch: float, compared: int
) -> LevelReport:
    """mask: bool (H, W) of the canvas. mismatch: distances of neighboring tiles, added up over `compared` pixels."""
    lines = border_lines(level.rows, level.size), border_lines(level.columns, level.size)
    return LevelReport(
        height=level.height,
        width=level.width,
        tiles=len(level.tiles),
        refined=refined,
        seam_score=seam_score(canvas, mask, *lines),
        tile_mismatch=mismatch / compared if compared else None,
    )
