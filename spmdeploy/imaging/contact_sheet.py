"""Contact sheets: captioned grids of images with a legend of classes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from spmdeploy.imaging.resize import resize_labels
from spmdeploy.labels import ClassTable, colorize, count_labels

CELL_SIDE = 640
"""Longest side of a cell of a sheet, in pixels; larger images are shrunk."""
_GAP, _CAPTION, _FONT_SIZE = 10, 28, 16
_PAPER, _INK = (255, 255, 255), (40, 40, 40)
MASK_TINT = (255, 40, 70)
_OUTLINE = (255, 255, 255)

Rgb = NDArray[np.uint8]
Color = tuple[int, int, int]


def edit_sheet(photo: Rgb, labels: NDArray[np.uint8], mask: NDArray[np.bool_], edited: Rgb, classes: ClassTable) -> Rgb:
    """Draw one row of images: before, labels, mask, after, with a legend of the classes under the mask.

    Labels are drawn only under the mask, where they matter; elsewhere the photo is shown in pale gray.

    Args:
        photo: uint8 (H, W, 3), RGB.
        labels: uint8 (H, W), class ids.
        mask: bool (H, W), True = edit.
        edited: uint8 (H, W, 3), RGB.
        classes: Names and colors of the class ids.

    Returns:
        uint8 (height, width, 3), RGB.
    """
    used = [classes.classes[i] for i in count_labels(labels[mask]) if i < len(classes)]
    before, after = fitted(photo), fitted(edited)
    labels, mask = resize_labels(labels, *before.shape[:2]), resize_labels(mask, *before.shape[:2])
    layout = np.where(mask[..., None], colorize(labels, classes), _faded(before))
    layout[_outline(mask)] = _OUTLINE
    tinted = with_mask(before, mask)
    cells = {"before": before, "labels under the mask": layout, "mask": tinted, "after": after}
    return sheet([cells], [(entry.name, entry.color) for entry in used])


def sheet(rows: list[dict[str, Rgb]], legend: list[tuple[str, Color]] | None = None, cell_side: int = CELL_SIDE) -> Rgb:
    """Draw a grid of captioned images.

    Args:
        rows: For each row the images by caption, uint8 (H, W, 3), RGB.
        legend: Names and RGB colors, drawn below the images.
        cell_side: Longest side of an image in pixels; larger ones are shrunk.

    Returns:
        uint8 (height, width, 3), RGB.
    """
    drawn = [[(caption, _fitted(image, cell_side)) for caption, image in row.items()] for row in rows]
    width = max(sum(image.width + _GAP for _, image in row) for row in drawn) + _GAP
    heights = [max(image.height for _, image in row) + _CAPTION + _GAP for row in drawn]
    key = _legend(legend or [], width)
    page = Image.new("RGB", (width, sum(heights) + _GAP + key.height), _PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=_FONT_SIZE)
    top = _GAP
    for row, height in zip(drawn, heights, strict=True):
        left = _GAP
        for caption, image in row:
            draw.text((left, top), caption, fill=_INK, font=font)
            page.paste(image, (left, top + _CAPTION))
            left += image.width + _GAP
        top += height
    page.paste(key, (0, top))
    return np.asarray(page)


def with_mask(photo: Rgb, mask: NDArray[np.bool_]) -> Rgb:
    """The photo, uint8 (H, W, 3), with the mask, bool (H, W), tinted and outlined."""
    tinted = photo.copy()
    tinted[mask] = (0.5 * photo[mask] + 0.5 * np.array(MASK_TINT, np.float32)).astype(np.uint8)
    tinted[_outline(mask)] = _OUTLINE
    return tinted


def fitted(image: Rgb, side: int = CELL_SIDE) -> Rgb:
    """The image, shrunk if its longer side has more than `side` pixels. uint8 (H, W, 3), RGB."""
    return np.asarray(_fitted(image, side))


def _legend(entries: list[tuple[str, Color]], width: int) -> Image.Image:
    """Squares of the colors followed by their names, wrapped at `width` pixels."""
    font = ImageFont.load_default(size=_FONT_SIZE)
    places, left, top = [], _GAP, 0
    for name, color in entries:
        length = _FONT_SIZE + 6 + int(font.getlength(name))
        if left > _GAP and left + length > width:
            left, top = _GAP, top + _CAPTION
        places.append((left, top, name, color))
        left += length + 2 * _GAP
    key = Image.new("RGB", (width, top + _CAPTION if entries else 0), _PAPER)
    draw = ImageDraw.Draw(key)
    for left, top, name, color in places:
        draw.rectangle((left, top + 2, left + _FONT_SIZE, top + 2 + _FONT_SIZE), fill=color, outline=_INK)
        draw.text((left + _FONT_SIZE + 6, top), name, fill=_INK, font=font)
    return key


def _faded(photo: Rgb) -> Rgb:
    """The photo in pale gray. uint8 (H, W, 3)."""
    gray = photo.astype(np.uint16).sum(axis=2) // 3
    return np.repeat((128 + gray * 3 // 8).astype(np.uint8)[..., None], 3, axis=2)


def _outline(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels of the mask next to a pixel outside it. bool (H, W)."""
    inside = Image.fromarray(mask.astype(np.uint8)).filter(ImageFilter.MinFilter(3))
    outline: NDArray[np.bool_] = mask & (np.asarray(inside) == 0)
    return outline


def _fitted(image: Rgb, side: int) -> Image.Image:
    fitted = Image.fromarray(image)
    fitted.thumbnail((side, side), Image.Resampling.BOX)
    return fitted
