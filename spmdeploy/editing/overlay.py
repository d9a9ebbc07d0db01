"""Draws the windows and tiles of an edit over the photo."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from spmdeploy.editing.report import WindowReport
from spmdeploy.imaging.contact_sheet import MASK_TINT, fitted, sheet, with_mask
from spmdeploy.imaging.resize import resize_labels
from spmdeploy.tiling.windows import Window

Rgb = NDArray[np.uint8]

CELL_SIDE = 900
_SINGLE_PASS, _REFINED, _TILE = (255, 190, 0), (255, 255, 255), (0, 200, 255)
_SHADE, _FILL = 90, 40  # of 255: the black line behind every line, the color inside a tile


def explain_sheet(photo: Rgb, mask: NDArray[np.bool_], windows: Sequence[WindowReport]) -> Rgb:
    """Draw the windows of an edit, then for each pyramid level the tiles that ran at it.

    Args:
        photo: uint8 (H, W, 3), RGB.
        mask: bool (H, W), True = edit.
        windows: Of the edit's report.

    Returns:
        uint8 (H', W', 3), RGB: a contact sheet.
    """
    small = fitted(photo, CELL_SIDE)
    background = with_mask(small, resize_labels(mask, *small.shape[:2]))
    cells = {_windows_caption(windows): _draw_windows(background, windows, photo.shape[1])}
    factors = sorted({level.factor for window in windows for level in window.plan.levels}, reverse=True)
    for factor in factors:
        tiles = [tile for window in windows for tile in _tiles_at(window, factor)]
        size = "full size" if factor == 1 else f"1/{factor} of the size"
        caption = f"{size}: {len(tiles)} tile{'s' * (len(tiles) != 1)}"
        cells[caption] = _draw_tiles(background, tiles, photo.shape[1])
    names = [("mask", MASK_TINT), ("single pass", _SINGLE_PASS), ("refined", _REFINED), ("tile", _TILE)]
    captions = list(cells)
    rows = [{caption: cells[caption] for caption in captions[start : start + 2]} for start in range(0, len(cells), 2)]
    return sheet(rows, names if factors else names[:2], CELL_SIDE)


def _windows_caption(windows: Sequence[WindowReport]) -> str:
    refined = sum(bool(window.plan.levels) for window in windows)
    count = f"{len(windows)} window{'s' * (len(windows) != 1)}"
    return f"{count}, {refined} of them refined" if refined and len(windows) > 1 else count


def _tiles_at(window: WindowReport, factor: int) -> list[Window]:
    """The tiles of one level as rectangles of the photo, cut at the window's end."""
    whole, found = window.plan.edit_window.window, []
    for level in window.plan.levels:
        if level.factor == factor:
            for tile in level.tiles:
                block = level.source_window(tile)
                height, width = min(block.height, whole.height - block.top), min(block.width, whole.width - block.left)
                found.append(Window(whole.top + block.top, whole.left + block.left, height, width))
    return found


def _draw_windows(background: Rgb, windows: Sequence[WindowReport], photo_width: int) -> Rgb:
    image = Image.fromarray(background)
    draw, font = ImageDraw.Draw(image, "RGBA"), ImageFont.load_default(size=14)
    for number, window in enumerate(windows, start=1):
        color = _REFINED if window.plan.levels else _SINGLE_PASS
        left, top, *_ = box = _box(window.plan.edit_window.window, background.shape[1] / photo_width)
        draw.rectangle(box, outline=(0, 0, 0, _SHADE), width=4)
        draw.rectangle(box, outline=color, width=2)
        draw.text((left + 6, top + 4), str(number), fill=color, font=font, stroke_width=2, stroke_fill=(0, 0, 0))
    return np.asarray(image)


def _draw_tiles(background: Rgb, tiles: Sequence[Window], photo_width: int) -> Rgb:
    image = Image.fromarray(background)
    draw = ImageDraw.Draw(image, "RGBA")
    boxes = [_box(tile, background.shape[1] / photo_width) for tile in tiles]
    for box in boxes:
        draw.rectangle(box, fill=(*_TILE, _FILL))
    for box in boxes:
        draw.rectangle(box, outline=(*_TILE, 200))
    return np.asarray(image)


def _box(window: Window, scale: float) -> tuple[int, int, int, int]:
    """Left, top, right and bottom in the image, the last two inside."""
    right, bottom = window.left + window.width, window.top + window.height
    left, top, right, bottom = (round(side * scale) for side in (window.left, window.top, right, bottom))
    return left, top, max(right - 1, left), max(bottom - 1, top)
