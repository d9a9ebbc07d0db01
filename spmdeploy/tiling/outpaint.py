"""Plans the ordered windows in which a photo is extended beyond its borders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from spmdeploy.tiling.windows import EditWindow, Window
from spmdeploy.types import NATIVE_SIZE, Mask, Padding

# The last pixels before a window's far border, this part of its side, are made once more by the next step: zero padding
# darkens what the network paints at its borders, and each step would go on from that.
_AHEAD = 16


@dataclass(frozen=True, slots=True)
class OutpaintStep:
    """One window of the extended image, and the part of it that this step makes; the rest exists already.

    Where the image is extended further, what is at the window's far border is made once more by the next step.
    """

    window: Window
    fresh: Window

    @property
    def edit_window(self) -> EditWindow:
        """The step as a window to edit: its new part is one box."""
        fresh = self.fresh
        return EditWindow(self.window, np.array([[fresh.top, fresh.left, fresh.bottom, fresh.right]]))


def extended_size(shape: tuple[int, ...], padding: Padding) -> tuple[int, int]:
    """Height and width of a photo of that shape, (height, width, ...), grown."""
    return padding.top + shape[0] + padding.bottom, padding.left + shape[1] + padding.right


def padding_mask(shape: tuple[int, ...], padding: Padding) -> Mask:
    """bool (H, W) of the extended image: everything but the photo of that shape."""
    mask = np.ones(extended_size(shape, padding), np.bool_)
    mask[image_window(shape, padding).slices] = False
    return mask


def image_window(shape: tuple[int, ...], padding: Padding) -> Window:
    """Where the photo of that shape is in the extended image."""
    return Window(padding.top, padding.left, shape[0], shape[1])


def plan_extension(height: int, width: int, padding: Padding, native: int = NATIVE_SIZE) -> Iterator[OutpaintStep]:
    """The steps that extend a photo, each next to what exists by then: left and right of it, then above and below.

    A window spans the side that grows, but at most twice the photo's depth there and at least `native`; no more than
    half of it is made for good in one step. Its size depends on the photo and not on how far it grows.

    Args:
        height: Rows of the photo.
        width: Columns of the photo.
        padding: Pixels to add on each side.
        native: Side of the model's input.

    Yields:
        Windows of the extended image, in the order in which they must be edited.
    """
    whole = padding.left + width + padding.right
    for step in _steps(width, height, padding.left, native):
        yield _placed(step, width, padding.top, padding.left, mirrored=True, upright=False)
    for step in _steps(width, height, padding.right, native):
        yield _placed(step, width, padding.top, padding.left, mirrored=False, upright=False)
    for step in _steps(height, whole, padding.top, native):
        yield _placed(step, height, padding.top, 0, mirrored=True, upright=True)
    for step in _steps(height, whole, padding.bottom, native):
        yield _placed(step, height, padding.top, 0, mirrored=False, upright=True)


def _steps(depth: int, band: int, length: int, native: int) -> Iterator[OutpaintStep]:
    """Those that extend an image of `band` rows and `depth` columns by `length` columns on its right."""
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
    """The step in the extended image, where the photo (or the band above and below it) begins at top, left."""

    def place(window: Window) -> Window:
        along = depth - window.left - window.width if mirrored else window.left
        if upright:
            return Window(top + along, left + window.top, window.width, window.height)
        return Window(top + window.top, left + along, window.height, window.width)

    return OutpaintStep(place(step.window), place(step.fresh))


def outpaint_windows(shape: tuple[int, ...], padding: Padding, native: int = NATIVE_SIZE) -> list[EditWindow]:
    """The windows that extend an image of that shape, in their order: each sees what those before have painted."""
    return [step.edit_window for step in plan_extension(shape[0], shape[1], padding, native)]
