"""A coarse edit of a large window carried up to its own size: level by level, each in tiles of the model's size.

Every tile starts from the level before, which is one shared picture, so that structure and color agree between tiles;
what still differs is blended over their overlap. Between levels the picture stays in floats, and its known pixels are
the photo's. A level whose known pixels have no detail of its size, as in photos that were enlarged or are out of focus,
is enlarged from the one before instead: the network would make up streaks where the photo is smooth.

Where the session can, the picture stays in its GPU's memory from the coarse edit to the last level
(`runtime.device_cascade`); else numpy does the same between two calls of the session.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from spmdeploy.backends.base import SupportsDevicePyramid
from spmdeploy.editing.preprocess import EditRegion, model_input, stacked
from spmdeploy.editing.timing import PhaseTimer
from spmdeploy.errors import OutOfMemoryError, UnavailableError
from spmdeploy.imaging.resize import resize_canvas
from spmdeploy.tiling.letterbox import Letterbox, pad_by_reflection
from spmdeploy.tiling.pyramid import PyramidLevel, Tile, coarse_size, high_frequency_energy
from spmdeploy.tiling.seams import border_lines, seam_score
from spmdeploy.tiling.windows import Window
from spmdeploy.types import Canvas, Mask, ModelInput

if TYPE_CHECKING:
    from spmdeploy.backends.base import Backend
    from spmdeploy.backends.device_pyramid import DeviceCascade

# Mean gray levels of `high_frequency_energy` below which a photo has none. Photos at their own size have 0.5 (at
# night) to 4, enlarged twice 0.2 to 0.4, further 0.1: the rounding to whole gray levels.
LEAST_DETAIL = 0.25
# So many tiles of a level are looked at for it, at most.
_MAX_SAMPLED_TILES = 16

# float32 (H, W, 3) in 0..255.


@dataclass(frozen=True, slots=True)
class LevelReport:
    """What one level did. height, width: of the whole window in this level."""

    height: int
    width: int
    tiles: int
    refined: bool
    """By the network; else enlarged, because the photo has no detail of this size."""
    seam_score: float | None
    """Gray levels by which steps across the tiles' borders exceed steps elsewhere; None where no border is masked."""
    tile_mismatch: float | None
    """Mean distance in gray levels of two neighboring tiles where both show the same masked pixels, before blending;
    None where none does."""

    def to_json(self) -> dict[str, Any]:
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(self).items()}


def coarse_canvas(frame: Letterbox, edited: NDArray[np.float32], level: PyramidLevel) -> Canvas:
    """The picture from which the first level starts: the coarse edit at half that level's size.

    frame: the window in the model's input; edited: float32 (size, size, 3), what the session made of it.
    """
    return resize_canvas(edited[: frame.height, : frame.width], *coarse_size(frame, level))


class RefinedWindow(NamedTuple):
    """A window at its own size.

    canvas: over the last level's region, as far as the window has it. between_levels: where the picture was kept.
    notes: why not on the device, where the session could have.
    """

    canvas: Canvas
    levels: tuple[LevelReport, ...]
    between_levels: Literal["device", "host"]
    notes: tuple[str, ...] = ()


def cascade(
    session: Backend,
    frame: Letterbox,
    inputs: ModelInput,
    levels: tuple[PyramidLevel, ...],
    scene: EditRegion,
    batch_size: int,
    timer: PhaseTimer,
) -> RefinedWindow:
    """A window, edited at the model's size and carried up to its own.

    inputs: the window in its frame, a batch of one. scene: the window's part of the photo.
    """
    device, notes = _on_device(session, frame, levels, batch_size)
    if device is None:
        with timer.phase("run"):
            edited = session.run_unrounded(inputs)[0]
        timer.batches += 1
        timer.advance(1)
        canvas, reports = refine_on_host(
            session, levels, coarse_canvas(frame, edited, levels[0]), scene, batch_size, timer
        )
        return RefinedWindow(canvas, reports, "host", notes)
    with device:
        with timer.phase("run"):
            device.coarse(inputs)
        timer.batches += 1
        timer.advance(1)
        canvas, reports = _refine_levels(_DeviceRenderer(device, timer), levels, scene, batch_size, timer)
        return RefinedWindow(canvas, reports, "device")


def _on_device(
    session: Backend, frame: Letterbox, levels: tuple[PyramidLevel, ...], batch_size: int
) -> tuple[DeviceCascade | None, tuple[str, ...]]:
    """Where the session can keep the picture; None where it is on the CPU, or cannot, and then why."""
    if not isinstance(session, SupportsDevicePyramid):
        return None, ()
    try:
        return session.device_cascade(frame, levels, batch_size), ()
    except (OutOfMemoryError, UnavailableError) as error:
        return None, (f"between levels the picture went through the host's memory: {error.problem}",)


def refine_on_host(
    session: Backend,
    levels: tuple[PyramidLevel, ...],
    base: Canvas,
    scene: EditRegion,
    batch_size: int,
    timer: PhaseTimer,
) -> tuple[Canvas, tuple[LevelReport, ...]]:
    """The result at the window's own size, over the last level's region as far as the window has it, by numpy.

    base: see `coarse_canvas`. scene: the window's part of the photo.
    """
    return _refine_levels(_HostRenderer(session, base, timer), levels, scene, batch_size, timer)


class _Renderer(Protocol):
    """What the picture of a level is painted on, starting from the level before."""

    def begin(self, level: PyramidLevel, refined: bool) -> None: ...

    def paint(self, tiles: tuple[Tile, ...], inputs: ModelInput) -> None: ...

    def end(self) -> None: ...

    def finished(self) -> tuple[Canvas, tuple[LevelReport, ...]]:
        """The last level's picture, and how each came out."""


def _refine_levels(
    easel: _Renderer, levels: tuple[PyramidLevel, ...], scene: EditRegion, batch_size: int, timer: PhaseTimer
) -> tuple[Canvas, tuple[LevelReport, ...]]:
    for level in levels:
        with timer.phase("prepare"):
            refined = _has_high_frequencies(level, scene)
        easel.begin(level, refined)
        for start in range(0, len(level.tiles), batch_size):
            tiles = level.tiles[start : start + batch_size]
            with timer.phase("prepare"):
                blocks = [scene.cut(level.source_window(tile)) for tile in tiles]
                inputs = stacked([model_input(block, level.size, level.size, level.size) for block in blocks])
            easel.paint(tiles, inputs)
            timer.batches += 1
            timer.advance(len(tiles))
        with timer.phase("stitch"):
            easel.end()
    with timer.phase("stitch"):
        return easel.finished()


class _HostRenderer:
    """By numpy, with a call of the session for every batch."""

    def __init__(self, session: Backend, base: Canvas, timer: PhaseTimer) -> None:
        self._session, self._tally = session, timer
        self._canvas, self._origin = base, (0, 0)
        self._reports: list[LevelReport] = []

    def begin(self, level: PyramidLevel, refined: bool) -> None:
        self._level, self._refined, self._painter = level, refined, _TileBlender(level)

    def paint(self, tiles: tuple[Tile, ...], inputs: ModelInput) -> None:
        size = self._level.size
        with self._tally.phase("prepare"):
            coarse = np.stack([_half(self._canvas, self._origin, tile, size // 2) for tile in tiles])
        with self._tally.phase("run"):
            painted = self._session.refine(inputs, coarse) if self._refined else _upsample_bilinear(coarse, size)
        with self._tally.phase("stitch"):
            self._painter.add(tiles, painted, inputs)

    def end(self) -> None:
        self._reports.append(self._painter.report(self._refined))
        self._canvas, self._origin = self._painter.canvas, (self._level.region.top, self._level.region.left)

    def finished(self) -> tuple[Canvas, tuple[LevelReport, ...]]:
        return self._canvas, tuple(self._reports)


class _DeviceRenderer:
    """In the memory of the session's GPU; the host looks at the levels when all are done."""

    def __init__(self, device: DeviceCascade, timer: PhaseTimer) -> None:
        self._device, self._tally = device, timer
        self._seen: list[_MaskCoverage] = []

    def begin(self, level: PyramidLevel, refined: bool) -> None:
        self._seen.append(_MaskCoverage(level, refined))
        self._device.begin()

    def paint(self, tiles: tuple[Tile, ...], inputs: ModelInput) -> None:
        with self._tally.phase("run"):
            self._device.paint(tiles, inputs, refined=self._seen[-1].refined)
        with self._tally.phase("stitch"):
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
    """What the host knows of a level that is painted elsewhere: what is masked, and how much tiles share of it."""

    def __init__(self, level: PyramidLevel, refined: bool) -> None:
        self.level, self.refined = level, refined
        self.mask = np.zeros(level.extent, np.bool_)
        self.compared = 0
        self._tiles: set[tuple[int, int]] = set()

    def add(self, tiles: tuple[Tile, ...], inputs: ModelInput) -> None:
        level, size = self.level, self.level.size
        for tile, hole in zip(tiles, inputs.mask != 0, strict=True):
            mask = self.mask[level.place(tile)]
            mask |= hole[: mask.shape[0], : mask.shape[1]]
            for row, column, down, right in level.neighbors(tile):
                if (row, column) in self._tiles:
                    self.compared += int(np.count_nonzero(hole[: size - down, : size - right]))
            self._tiles.add((tile.row, tile.column))


def _has_high_frequencies(level: PyramidLevel, scene: EditRegion) -> bool:
    """Whether the known pixels in some of the level's tiles do; also where none is known."""
    total, count = 0.0, 0
    for tile in level.tiles[:: -(-len(level.tiles) // _MAX_SAMPLED_TILES)]:
        seen = model_input(scene.cut(level.source_window(tile)), level.size, level.size, level.size)
        detail, pixels = high_frequency_energy(seen.image, seen.mask == 0)
        total, count = total + detail, count + pixels
    return count == 0 or total >= LEAST_DETAIL * count


def _upsample_bilinear(coarse: Canvas, size: int) -> Canvas:
    """float32 (B, size / 2, size / 2, 3) to (B, size, size, 3)."""
    return np.stack([resize_canvas(half, size, size, *half.shape[:2]) for half in coarse])


def _half(canvas: Canvas, origin: tuple[int, int], tile: Tile, size: int) -> Canvas:
    """What the level before shows of a tile: float32 (size, size, 3). origin: the canvas's place in that level."""
    part = Window(tile.top // 2 - origin[0], tile.left // 2 - origin[1], size, size)
    assert part.top >= 0 and part.left >= 0, (tile, origin)
    return pad_by_reflection(canvas[part.slices], size, size)


class _TileBlender:
    """One level as it fills up with tiles, which come row by row."""

    def __init__(self, level: PyramidLevel) -> None:
        self._level = level
        self.canvas: Canvas = np.zeros((*level.extent, 3), np.float32)
        self._mask = np.zeros(level.extent, np.bool_)
        self._raw: dict[tuple[int, int], Canvas] = {}
        self._mismatch, self._compared = 0.0, 0

    def add(self, tiles: tuple[Tile, ...], painted: Canvas, inputs: ModelInput) -> None:
        """painted: float32 (B, size, size, 3), what the session made of the inputs."""
        for tile, picture, image, hole in zip(tiles, painted, inputs.image, inputs.mask != 0, strict=True):
            place = self._level.place(tile)
            canvas, mask = self.canvas[place], self._mask[place]
            inside = np.s_[: canvas.shape[0], : canvas.shape[1]]
            weighted = self._level.weights(tile)[..., None] * picture
            np.add(canvas, weighted[inside], out=canvas, where=hole[inside][..., None])
            np.copyto(canvas, image[inside], where=~hole[inside][..., None])
            mask |= hole[inside]
            self._compare(tile, picture, hole)

    def _compare(self, tile: Tile, picture: Canvas, hole: Mask) -> None:
        """With the tiles on the left and above, while these are remembered."""
        size = self._level.size
        for row, column, down, right in self._level.neighbors(tile):
            other = self._raw.get((row, column))
            if other is not None:
                both = np.s_[: size - down, : size - right]
                distance = np.abs(picture[both] - other[down:, right:]).mean(axis=2)[hole[both]]
                self._mismatch += float(distance.sum(dtype=np.float64))
                self._compared += distance.size
        self._raw[tile.row, tile.column] = picture
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
