"""A coarse edit of a large window carried up to its own size: level by level, each in tiles of the model's size.

Every tile starts from the level before, which is one shared picture, so that structure and colour agree between tiles;
what still differs is blended over their overlap. Between levels the picture stays in floats, and its known pixels are
the photo's. A level whose known pixels have no detail of its size, as in photos that were enlarged or are out of focus,
is enlarged from the one before instead: the network would make up streaks where the photo is smooth.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spmdeploy.images import resize_canvas
from spmdeploy.model_inputs import ModelInput, Scene, model_input, stacked
from spmdeploy.tally import Tally
from spmdeploy.tiling.detail import finest_detail
from spmdeploy.tiling.frames import Frame, pad_by_reflection
from spmdeploy.tiling.levels import Level, Tile
from spmdeploy.tiling.pieces import Mask
from spmdeploy.tiling.seams import border_lines, seam_score
from spmdeploy.tiling.windows import Window

if TYPE_CHECKING:
    from spmdeploy.runtime.session import Session

# Mean grey levels of `finest_detail` below which a photo has none. Photos at their own size have 0.5 (at night) to 4,
# enlarged twice 0.2 to 0.4, further 0.1: the rounding to whole grey levels.
LEAST_DETAIL = 0.25
# So many tiles of a level are looked at for it, at most.
_LOOKED_AT = 16

# float32 (H, W, 3) in 0..255.
Canvas = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LevelReport:
    """What one level did. height, width: of the whole window in this level."""

    height: int
    width: int
    tiles: int
    refined: bool
    """By the network; else enlarged, because the photo has no detail of this size."""
    seam_score: float | None
    """Grey levels by which steps across the tiles' borders exceed steps elsewhere; None where no border is masked."""
    tile_mismatch: float | None
    """Mean distance in grey levels of two neighbouring tiles where both show the same masked pixels, before blending;
    None where none does."""

    def to_json(self) -> dict[str, Any]:
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(self).items()}


def base_of(frame: Frame, edited: NDArray[np.float32], level: Level) -> Canvas:
    """The picture from which the first level starts: the coarse edit at half that level's size.

    frame: the window in the model's input; edited: float32 (size, size, 3), what the session made of it.
    """
    content, factor = edited[: frame.height, : frame.width], 2 * level.factor
    height, width = (-(-side // factor) for side in (frame.window.height, frame.window.width))
    # A pixel of the base is `factor` photo pixels, which the window's sides need not be multiples of.
    rows, columns = height * factor / frame.window.height, width * factor / frame.window.width
    return resize_canvas(content, height, width, rows * frame.height, columns * frame.width)


def carry_up(
    session: Session, levels: tuple[Level, ...], base: Canvas, scene: Scene, batch_size: int, tally: Tally
) -> tuple[Canvas, tuple[LevelReport, ...]]:
    """The result at the window's own size, over the last level's region as far as the window has it.

    base: see `base_of`. scene: the window's part of the photo.
    """
    canvas, origin = base, (0, 0)
    reports = []
    for level in levels:
        painter = _Painter(level)
        with tally.phase("prepare"):
            refined = _has_detail(level, scene)
        for start in range(0, len(level.tiles), batch_size):
            tiles = level.tiles[start : start + batch_size]
            with tally.phase("prepare"):
                blocks = [scene.cut(level.photo_block(tile)) for tile in tiles]
                inputs = stacked([model_input(block, level.size, level.size, level.size) for block in blocks])
                coarse = np.stack([_half(canvas, origin, tile, level.size // 2) for tile in tiles])
            with tally.phase("run"):
                painted = session.refine(*inputs, coarse) if refined else _enlarged(coarse, level.size)
            with tally.phase("stitch"):
                painter.add(tiles, painted, inputs)
            tally.batches += 1
            tally.advance(len(tiles))
        with tally.phase("stitch"):
            reports.append(painter.report(refined))
        canvas, origin = painter.canvas, (level.region.top, level.region.left)
    return canvas, tuple(reports)


def _has_detail(level: Level, scene: Scene) -> bool:
    """Whether the known pixels in some of the level's tiles do; also where none is known."""
    total, count = 0.0, 0
    for tile in level.tiles[:: -(-len(level.tiles) // _LOOKED_AT)]:
        seen = model_input(scene.cut(level.photo_block(tile)), level.size, level.size, level.size)
        detail, pixels = finest_detail(seen.image, seen.mask == 0)
        total, count = total + detail, count + pixels
    return count == 0 or total >= LEAST_DETAIL * count


def _enlarged(coarse: Canvas, size: int) -> Canvas:
    """float32 (B, size / 2, size / 2, 3) to (B, size, size, 3)."""
    return np.stack([resize_canvas(half, size, size, *half.shape[:2]) for half in coarse])


def _half(canvas: Canvas, origin: tuple[int, int], tile: Tile, size: int) -> Canvas:
    """What the level before shows of a tile: float32 (size, size, 3). origin: the canvas's place in that level."""
    part = Window(tile.top // 2 - origin[0], tile.left // 2 - origin[1], size, size)
    assert part.top >= 0 and part.left >= 0, (tile, origin)
    return pad_by_reflection(canvas[part.slices], size, size)


class _Painter:
    """One level as it fills up with tiles, which come row by row."""

    def __init__(self, level: Level) -> None:
        region = level.region
        height, width = min(region.height, level.height - region.top), min(region.width, level.width - region.left)
        self._level = level
        self.canvas: Canvas = np.zeros((height, width, 3), np.float32)
        self._mask = np.zeros((height, width), np.bool_)
        self._raw: dict[tuple[int, int], Canvas] = {}
        self._mismatch, self._compared = 0.0, 0

    def add(self, tiles: tuple[Tile, ...], painted: Canvas, inputs: ModelInput) -> None:
        """painted: float32 (B, size, size, 3), what the session made of the inputs."""
        region = self._level.region
        for tile, picture, image, hole in zip(tiles, painted, inputs.image, inputs.mask != 0, strict=True):
            place = Window(tile.top - region.top, tile.left - region.left, self._level.size, self._level.size).slices
            canvas, mask = self.canvas[place], self._mask[place]
            inside = np.s_[: canvas.shape[0], : canvas.shape[1]]
            weighted = self._level.weights(tile)[..., None] * picture
            np.add(canvas, weighted[inside], out=canvas, where=hole[inside][..., None])
            np.copyto(canvas, image[inside], where=~hole[inside][..., None])
            mask |= hole[inside]
            self._compare(tile, picture, hole)

    def _compare(self, tile: Tile, picture: Canvas, hole: Mask) -> None:
        """With the tiles on the left and above, while these are remembered."""
        rows, columns, size = self._level.rows, self._level.columns, self._level.size
        for row, column in ((tile.row, tile.column - 1), (tile.row - 1, tile.column)):
            other = self._raw.get((row, column))
            if other is not None:
                down, right = tile.top - rows[row], tile.left - columns[column]
                both = np.s_[: size - down, : size - right]
                distance = np.abs(picture[both] - other[down:, right:]).mean(axis=2)[hole[both]]
                self._mismatch += float(distance.sum(dtype=np.float64))
                self._compared += distance.size
        self._raw[tile.row, tile.column] = picture
        self._raw = {at: kept for at, kept in self._raw.items() if at >= (tile.row - 1, tile.column)}

    def report(self, refined: bool) -> LevelReport:
        level = self._level
        lines = border_lines(level.rows, level.size), border_lines(level.columns, level.size)
        return LevelReport(
            height=level.height,
            width=level.width,
            tiles=len(level.tiles),
            refined=refined,
            seam_score=seam_score(self.canvas, self._mask, *lines),
            tile_mismatch=self._mismatch / self._compared if self._compared else None,
        )
