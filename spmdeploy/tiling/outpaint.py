"""Plans the ordered windows in which a photo is extended beyond its borders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from spmdeploy.tiling.windows import EditWindow, Window
from spmdeploy.types import NATIVE_SIZE, Mask

# The last pixels before a window's far border, this part of its side, are made once more by the next step: zero padding
# darkens what the network paints at its borders, and each step would go on from that.
_AHEAD = 16


class Padding(NamedTuple):
    """Pixels to grow by, on each side."""

    left: int
    top: int
    right: int
    bottom: int


@dataclass(frozen=True, slots=True)
class OutpaintStep:
    """One window of the grown picture, and the part of it that is made in this step; the rest is there already.

    Where the picture grows on, what lies at the window's far border is made once more by the next step.
    """

    window: Window
    fresh: Window

    @property
    def site(self) -> EditWindow:
        bottom, right = self.fresh.top + self.fresh.height, self.fresh.left + self.fresh.width
        return EditWindow(self.window, np.array([[self.fresh.top, self.fresh.left, bottom, right]]))


def extended_size(shape: tuple[int, ...], sides: Padding) -> tuple[int, int]:
    """Height and width of a photo of that shape, (height, width, ...), grown."""
    return sides.top + shape[0] + sides.bottom, sides.left + shape[1] + sides.right


def padding_mask(shape: tuple[int, ...], sides: Padding) -> Mask:
    """bool (H, W) of the grown picture: everything but the photo of that shape."""
    mask = np.ones(extended_size(shape, sides), np.bool_)
    mask[image_window(shape, sides).slices] = False
    return mask


def image_window(shape: tuple[int, ...], sides: Padding) -> Window:
    """Where the photo of that shape lies in the grown picture."""
    return Window(sides.top, sides.left, shape[0], shape[1])


def plan_extension(height: int, width: int, sides: Padding, native: int = NATIVE_SIZE) -> Iterator[OutpaintStep]:
    """The steps that grow a photo, each beside what is there by then: left and right of it, then above and below.

    A window spans the side that grows, but at most twice the photo's depth there and at least `native`; no more than
    half of it is made for good in one step. Its size depends on the photo and not on how far it grows.
    """
    whole = sides.left + width + sides.right
    for step in _steps(width, height, sides.left, native):
        yield _placed(step, width, sides.top, sides.left, mirrored=True, upright=False)
    for step in _steps(width, height, sides.right, native):
        yield _placed(step, width, sides.top, sides.left, mirrored=False, upright=False)
    for step in _steps(height, whole, sides.top, native):
        yield _placed(step, height, sides.top, 0, mirrored=True, upright=True)
    for step in _steps(height, whole, sides.bottom, native):
        yield _placed(step, height, sides.top, 0, mirrored=False, upright=True)


def _steps(depth: int, band: int, length: int, native: int) -> Iterator[OutpaintStep]:
    """Those that grow a picture of `band` rows and `depth` columns by `length` columns on its right."""
    side = max(native, min(band, 2 * depth))
    ahead = side // _AHEAD
    for near, far in pairwise(_equal_steps(depth, depth + length, side // 2)):
        right, made = min(far + ahead, depth + length), 0
        start = max(right - side, 0)
        for end in _equal_steps(min(side, band), band, side // 2):
            top = max(end - side, 0)
            window = Window(top, start, end - top, right - start)
            yield OutpaintStep(window, Window(made, near, end - made, right - near))
            made = end


def _equal_steps(first: int, last: int, max_step: int) -> list[int]:
    """first ... last in equal steps of at most `max_step`; one number where they are equal."""
    count = -(-(last - first) // max_step)
    return [first + (last - first) * step // max(count, 1) for step in range(count + 1)]


def _placed(step: OutpaintStep, depth: int, top: int, left: int, *, mirrored: bool, upright: bool) -> OutpaintStep:
    """The step in the grown picture, where the photo (or the band above and below it) begins at top, left."""

    def place(window: Window) -> Window:
        along = depth - window.left - window.width if mirrored else window.left
        if upright:
            return Window(top + along, left + window.top, window.width, window.height)
        return Window(top + window.top, left + along, window.height, window.width)

    return OutpaintStep(place(step.window), place(step.fresh))
