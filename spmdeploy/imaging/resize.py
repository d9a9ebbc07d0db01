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
_EXACT_BLOCKS = {1 << exponent for exponent in range(17)}
"""Pixels of blocks whose means Pillow computes exactly, in a twentieth of the time: it multiplies by 2**24 / pixels."""


def resize_photo(pixels: Image, height: int, width: int) -> Image:
    """Resize an image: area average along axes that shrink, bicubic along axes that grow.

    The average is exact and weights pixels by the covered share, so a coarse pixel depends only on the pixels that it
    covers (`resize_mask_conservative` gives those that depend on a mask).

    Args:
        pixels: uint8 (H, W, 3).
        height: New height in pixels.
        width: New width in pixels.

    Returns:
        uint8 (height, width, 3).
    """
    coarse = _area_average(pixels, min(height, pixels.shape[0]), min(width, pixels.shape[1]))
    if coarse.shape[:2] == (height, width):
        return coarse
    return np.asarray(PilImage.fromarray(coarse).resize((width, height), _BICUBIC))


def resize_canvas(
    canvas: NDArray[np.float32], height: int, width: int, rows: float, columns: float
) -> NDArray[np.float32]:
    """Resize the upper left part of a canvas, bicubic, without rounding.

    Args:
        canvas: float32 (H, W, 3), 0..255.
        height: New height in pixels.
        width: New width in pixels.
        rows: Height of the part, which may be fractional and exceed the canvas; edge pixels are then repeated.
        columns: Width of the part, likewise.

    Returns:
        float32 (height, width, 3), 0..255.
    """
    more = [(0, max(math.ceil(need) - have, 0)) for need, have in zip((rows, columns), canvas.shape, strict=False)]
    padded = np.pad(canvas, [*more, (0, 0)], mode="edge")
    channels = []
    for channel in range(3):
        plane = PilImage.fromarray(np.ascontiguousarray(padded[..., channel]))
        # One axis after the other: from version 13 on Pillow chooses the order, which changes the last bits.
        wide = plane.resize((width, plane.height), _BICUBIC, (0, 0, columns, plane.height))
        channels.append(np.asarray(wide.resize((width, height), _BICUBIC, (0, 0, width, rows))))
    resized: NDArray[np.float32] = np.clip(np.stack(channels, axis=2), 0, 255)
    return resized


def canvas_taps(have: int, reach: float, length: int) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Filter taps of `resize_canvas` along one axis, for implementations on other devices.

    Args:
        have: Pixels along the axis.
        reach: Length of the part that is resized, in pixels.
        length: Number of output pixels.

    Returns:
        first, int32 (length,), and weights, float64 (length, taps): output pixel i is the sum over k of weights[i, k]
        times the input pixel first[i] + k, or the last input pixel if that exceeds the axis.
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
    return first.astype(np.int32), weights / weights.cumsum(axis=1)[:, -1:]  # summed sequentially, as Pillow does


def resize_labels(ids: NDArray[Integer], height: int, width: int) -> NDArray[Integer]:
    """Resize a map of ids, (H, W) of any dtype, to (height, width).

    Every pixel takes the id at its center (nearest neighbor), so no new ids appear.
    """
    rows = (2 * np.arange(height) + 1) * ids.shape[0] // (2 * height)
    columns = (2 * np.arange(width) + 1) * ids.shape[1] // (2 * width)
    return np.asarray(ids[rows[:, None], columns])


def resize_mask_conservative(mask: Mask, height: int, width: int) -> Mask:
    """Resize a mask so that it covers every pixel of `resize_photo` that depends on a masked pixel.

    Outside the result, the resized photo is bit for bit independent of the masked pixels.

    Args:
        mask: bool (H, W).
        height: New height in pixels.
        width: New width in pixels.

    Returns:
        bool (height, width).
    """
    return _max_pool(_max_pool(mask, height).T, width).T


def _area_average(pixels: Image, height: int, width: int) -> Image:
    rows, columns = (before // after for before, after in zip(pixels.shape, (height, width), strict=False))
    if pixels.shape[:2] == (rows * height, columns * width) and rows * columns in _EXACT_BLOCKS:
        return np.array(PilImage.fromarray(pixels).reduce((columns, rows)))
    # Every weight is a whole number of 1/height (1/width) pixels, so all sums are exact. In float, the rounding of far
    # pixels would leak into near ones.
    weight = pixels.shape[0] * pixels.shape[1]
    left, right, left_surplus, right_surplus = _coverage(pixels.shape[1], width)
    coarse = np.empty((height, width, 3), np.uint8)
    running = np.zeros((pixels.shape[1] + 1, 3), np.int64)
    # Row by row, because the 64-bit sums of a whole 12-megapixel photo would take 300 MB.
    for y, (top, bottom, top_surplus, bottom_surplus) in enumerate(zip(*_coverage(len(pixels), height), strict=True)):
        # 32 bits hold the sum of 16 million rows, and take half the time of 64.
        row = pixels[top : bottom + 1].sum(axis=0, dtype=np.uint32).astype(np.int64) * height
        # Widened explicitly: numpy 1 multiplies a small integer and a uint8 array in uint8.
        row -= top_surplus * pixels[top].astype(np.int64) + bottom_surplus * pixels[bottom].astype(np.int64)
        np.cumsum(row, axis=0, out=running[1:])
        sums = (running[right + 1] - running[left]) * width
        sums -= left_surplus[:, None] * row[left] + right_surplus[:, None] * row[right]
        coarse[y] = (sums + weight // 2) // weight
    return coarse


def _coverage(length: int, size: int) -> tuple[NDArray[np.int64], ...]:
    """The first and the last of `length` pixels that each of `size` <= length cells covers, and the part of these two
    outside the cell, in 1/size pixel; int64 (size,) each."""
    start = np.arange(size, dtype=np.int64) * length
    stop = start + length
    first, last = start // size, (stop - 1) // size
    return first, last, start - first * size, (last + 1) * size - stop


def _max_pool(mask: Mask, size: int) -> Mask:
    """bool (length, n) to bool (size, n): whether any masked pixel along axis 0 contributes to each cell."""
    length = len(mask)
    if size <= length:
        first, last, _, _ = _coverage(length, size)
    else:  # bicubic reaches two pixels to either side of a cell's center
        center = (2 * np.arange(size) + 1) * length  # in units of 1 / (2 * size) pixel
        first = np.maximum((center - 3 * size) // (2 * size), 0)
        last = np.minimum((center + 5 * size) // (2 * size), length) - 1
    return np.stack([mask[top : bottom + 1].any(axis=0) for top, bottom in zip(first, last, strict=True)])
