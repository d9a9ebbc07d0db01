"""Resizing of images, label maps, masks and float canvases."""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PilImage

from spmdeploy.types import Image, Mask

Integer = TypeVar("Integer", bound=np.generic)
_BICUBIC = PilImage.Resampling.BICUBIC


def resize_photo(pixels: Image, height: int, width: int) -> Image:
    """uint8 (H, W, 3) to uint8 (height, width, 3): area average where an axis shrinks, bicubic where it grows.

    The average is exact and weights pixels by the share that is covered, so a coarse pixel depends on the pixels under
    it and on no others (`resize_mask_conservative` says which depend on a mask).
    """
    coarse = _area_average(pixels, min(height, pixels.shape[0]), min(width, pixels.shape[1]))
    if coarse.shape[:2] == (height, width):
        return coarse
    return np.asarray(PilImage.fromarray(coarse).resize((width, height), _BICUBIC))


def resize_canvas(
    canvas: NDArray[np.float32], height: int, width: int, rows: float, columns: float
) -> NDArray[np.float32]:
    """float32 (H, W, 3) in 0..255 to float32 (height, width, 3), bicubic, of the upper left rows by columns.

    These may be fractions and reach beyond the canvas, whose last pixels are then repeated. Nothing is rounded.
    """
    more = [(0, max(math.ceil(need) - have, 0)) for need, have in zip((rows, columns), canvas.shape, strict=False)]
    padded = np.pad(canvas, [*more, (0, 0)], mode="edge")
    channels = []
    for channel in range(3):
        picture = PilImage.fromarray(np.ascontiguousarray(padded[..., channel]))
        # One axis after the other: from version 13 on Pillow chooses which comes first, and the last bits go by that.
        wide = picture.resize((width, picture.height), _BICUBIC, (0, 0, columns, picture.height))
        channels.append(np.asarray(wide.resize((width, height), _BICUBIC, (0, 0, width, rows))))
    resized: NDArray[np.float32] = np.clip(np.stack(channels, axis=2), 0, 255)
    return resized


def canvas_taps(have: int, reach: float, length: int) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """What `resize_canvas` computes along one axis, for whoever does it elsewhere: of `have` pixels the first `reach`
    become `length`.

    Returns first (length,) and weights (length, taps): pixel i is the sum over k of weights[i, k] times the pixel
    first[i] + k, or the last one where that lies beyond.
    """
    scale = float(np.float32(reach)) / length  # Pillow keeps the box in single precision
    wider = max(scale, 1.0)
    middle = (np.arange(length) + 0.5) * scale
    first = np.maximum(np.trunc(middle - 2 * wider + 0.5), 0)
    end = np.minimum(np.trunc(middle + 2 * wider + 0.5), max(math.ceil(reach), have))
    tap = np.arange(math.ceil(2 * wider) * 2 + 1)
    x = np.abs((tap + first[:, None] - middle[:, None] + 0.5) * (1 / wider))
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    weights[tap >= (end - first)[:, None]] = 0
    return first.astype(np.int32), weights / weights.cumsum(axis=1)[:, -1:]  # one after the other, as Pillow adds


def resize_labels(ids: NDArray[Integer], height: int, width: int) -> NDArray[Integer]:
    """(H, W) to (height, width) of any dtype: every pixel takes the id under its center, so no new ids appear."""
    rows = (2 * np.arange(height) + 1) * ids.shape[0] // (2 * height)
    columns = (2 * np.arange(width) + 1) * ids.shape[1] // (2 * width)
    return np.asarray(ids[rows[:, None], columns])


def resize_mask_conservative(mask: Mask, height: int, width: int) -> Mask:
    """bool (H, W) to bool (height, width): True wherever a masked pixel can touch that pixel of `resize_photo`.

    Outside it, the resized photo is the same bit for bit, whatever the photo holds under the mask.
    """
    return _max_pool(_max_pool(mask, height).T, width).T


def _area_average(pixels: Image, height: int, width: int) -> Image:
    if pixels.shape[:2] == (height, width):
        return pixels.copy()
    # Every weight is a whole number of 1/height (1/width) pixels, so all sums are exact. In float, the rounding of far
    # pixels would leak into near ones.
    weight = pixels.shape[0] * pixels.shape[1]
    left, right, left_surplus, right_surplus = _covered(pixels.shape[1], width)
    coarse = np.empty((height, width, 3), np.uint8)
    running = np.zeros((pixels.shape[1] + 1, 3), np.int64)
    # Row by row, because the 64-bit sums of a whole 12-megapixel photo would take 300 MB.
    for y, (top, bottom, top_surplus, bottom_surplus) in enumerate(zip(*_covered(len(pixels), height), strict=True)):
        # 32 bits hold the sum of 16 million rows, and take half the time of 64.
        row = pixels[top : bottom + 1].sum(axis=0, dtype=np.uint32).astype(np.int64) * height
        # Widened by hand: numpy 1 multiplies a small integer and an array of bytes in bytes.
        row -= top_surplus * pixels[top].astype(np.int64) + bottom_surplus * pixels[bottom].astype(np.int64)
        np.cumsum(row, axis=0, out=running[1:])
        sums = (running[right + 1] - running[left]) * width
        sums -= left_surplus[:, None] * row[left] + right_surplus[:, None] * row[right]
        coarse[y] = (sums + weight // 2) // weight
    return coarse


def _covered(length: int, size: int) -> tuple[NDArray[np.int64], ...]:
    """Which of `length` pixels each of `size` <= length cells covers, int64 (size,) each: the first and the last one,
    and how much of these two lies outside the cell, in 1/size pixel."""
    start = np.arange(size, dtype=np.int64) * length
    stop = start + length
    first, last = start // size, (stop - 1) // size
    return first, last, start - first * size, (last + 1) * size - stop


def _max_pool(mask: Mask, size: int) -> Mask:
    """bool (length, n) to bool (size, n): whether any masked pixel along axis 0 contributes to each cell."""
    length = len(mask)
    if size <= length:
        first, last, _, _ = _covered(length, size)
    else:  # bicubic reaches two pixels to either side of a cell's center
        center = (2 * np.arange(size) + 1) * length  # in units of 1 / (2 * size) pixel
        first = np.maximum((center - 3 * size) // (2 * size), 0)
        last = np.minimum((center + 5 * size) // (2 * size), length) - 1
    return np.stack([mask[top : bottom + 1].any(axis=0) for top, bottom in zip(first, last, strict=True)])
