"""Pictures to look at: before, labels, mask and after side by side."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from spmdeploy.labels import ClassTable, colourise

CELL_SIDE = 720
"""Longer side that a cell of a sheet is shrunk to when it is larger."""
_GAP, _CAPTION, _PAPER, _INK = 8, 26, (255, 255, 255), (40, 40, 40)
_MASK_TINT = np.array((255, 60, 60), np.float32)


def edit_sheet(
    photo: NDArray[np.uint8],
    labels: NDArray[np.uint8],
    mask: NDArray[np.bool_],
    edited: NDArray[np.uint8],
    classes: ClassTable,
) -> NDArray[np.uint8]:
    """One row: before / labels / mask / after. photo, edited: uint8 (H, W, 3). labels: uint8 (H, W). mask: bool (H, W).

    Labels are drawn over a darkened photo where the mask keeps it: there they have no influence.
    """
    layout = np.where(mask[..., None], colourise(labels, classes), photo // 3)
    tinted = photo.copy()
    tinted[mask] = (0.45 * photo[mask] + 0.55 * _MASK_TINT).astype(np.uint8)
    cells = {"before": photo, "labels under the mask": layout, "mask": tinted, "after": edited}
    return sheet([cells])


def sheet(rows: list[dict[str, NDArray[np.uint8]]]) -> NDArray[np.uint8]:
    """A grid of captioned pictures, one dict of caption: uint8 (H, W, 3) per row. Returns uint8 (H, W, 3) RGB."""
    drawn = [[(caption, _fitted(picture)) for caption, picture in row.items()] for row in rows]
    width = max(sum(picture.width + _GAP for _, picture in row) for row in drawn) + _GAP
    heights = [max(picture.height for _, picture in row) + _CAPTION + _GAP for row in drawn]
    page = Image.new("RGB", (width, sum(heights) + _GAP), _PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=16)
    top = _GAP
    for row, height in zip(drawn, heights, strict=True):
        left = _GAP
        for caption, picture in row:
            draw.text((left, top), caption, fill=_INK, font=font)
            page.paste(picture, (left, top + _CAPTION))
            left += picture.width + _GAP
        top += height
    return np.asarray(page)


def _fitted(picture: NDArray[np.uint8]) -> Image.Image:
    image = Image.fromarray(picture)
    image.thumbnail((CELL_SIDE, CELL_SIDE), Image.Resampling.BOX)
    return image
