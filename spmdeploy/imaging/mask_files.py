"""Reads mask files: white pixels, or a part of the alpha channel, are edited; doubtful files are refused.

Masks are bool (H, W) with True = edit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PilImage

from spmdeploy.errors import InputError
from spmdeploy.imaging.decode import DecodedFile, decode_errors, decode_image
from spmdeploy.imaging.files import channels_equal, format_values, rgb_and_alpha
from spmdeploy.inputs import FilePath
from spmdeploy.types import Mask, MaskAlpha

# Mask values this close to 0 or 255 count as 0 or 255: the amplitude of JPEG ringing at usual qualities.
BINARY_TOLERANCE = 32


class MaskFile(NamedTuple):
    """A mask, and notes on how it was derived from the file."""

    mask: Mask
    notes: tuple[str, ...]


def read_mask(path: FilePath, content: bytes | None = None) -> Mask:
    """Return the mask in an image file, bool (H, W), True = edit, as `read_mask_file` does with its defaults."""
    return read_mask_file(path, content).mask


def read_mask_file(
    path: FilePath, content: bytes | None = None, *, threshold: int | None = None, alpha: MaskAlpha | None = None
) -> MaskFile:
    """Return the mask in an image file.

    In a two-valued mask, 0 is kept and the other value is edited. Masks are thresholded at 128 if every value is within
    32 of 0 or 255 (JPEG), or if all other values are next to edges (antialiasing). RGB is accepted if its channels
    agree. A palette is read by its colors, so that black is kept; if the colors are not conclusive, index 0 is kept. If
    all colors are equal, opaque pixels are edited; otherwise an alpha channel must be opaque, because programs disagree
    on the meaning of transparent.

    Args:
        path: the file, "-" for standard input.
        content: the bytes of the file if they are in memory already.
        threshold: 1 to 255; pixels whose gray value (or alpha) is at least this are edited.
        alpha: use this part of the alpha channel as the mask.

    Returns:
        bool (H, W), True = edit, and notes. Empty and full masks are returned too; `check_mask` refuses them.

    Raises:
        InputError: the image is not clearly a mask.
    """
    file = decode_image(path, content)
    if alpha is not None:
        return _alpha_mask(file, path, alpha, threshold)
    if threshold is not None:
        with decode_errors(Path(path)):
            gray = np.asarray(file.image.convert("L")) if not file.wide else np.asarray(file.image) >> 8
        return MaskFile(np.asarray(gray >= threshold), ())
    image = file.image
    if image.mode == "P":
        if _indices_decide(image):
            return MaskFile(np.asarray(np.asarray(image) != 0), ())
    elif image.mode == "I;16":
        return _binary_mask(np.asarray(image), path)
    elif file.wide or image.mode not in ("1", "L", "LA", "RGB", "RGBA"):
        raise InputError(
            f"{path} is not a mask: it is a {image.mode} image with {16 if file.wide else 8} bits", _MASK_HINT
        )
    if image.mode in ("1", "L") and "transparency" not in image.info:
        return _binary_mask(np.asarray(image.convert("L")), path)
    rgb, transparency = rgb_and_alpha(file, path)
    if transparency is not None and (transparency != 255).any():
        if (rgb == rgb[0, 0]).all():
            mask, notes = _binary_mask(transparency, path)
            return MaskFile(mask, (*notes, f"{path} has one color; its opaque pixels are used as the mask"))
        raise InputError(
            f"{path} is partly transparent, and programs disagree on whether that means edit or keep",
            "--mask-alpha transparent edits its transparent pixels, --mask-alpha opaque the others",
        )
    if channels_equal(rgb):
        return _binary_mask(np.ascontiguousarray(rgb[..., 0]), path)
    edit = rgb >= 128
    if not _is_nearly_binary(rgb) or not channels_equal(edit):
        raise InputError(f"{path} is a color image, not a mask", _MASK_HINT)
    return MaskFile(np.ascontiguousarray(edit[..., 0]), ())


def _alpha_mask(file: DecodedFile, path: FilePath, part: MaskAlpha, threshold: int | None) -> MaskFile:
    _, alpha = rgb_and_alpha(file, path)
    if alpha is None:
        raise InputError(f"{path} has no alpha channel to take the mask from", "leave --mask-alpha out")
    found = MaskFile(np.asarray(alpha >= threshold), ()) if threshold is not None else _binary_mask(alpha, path)
    return found if part == "opaque" else found._replace(mask=~found.mask)


def check_mask(mask: NDArray[Any], source: str) -> None:
    """Check that a mask has pixels to edit and pixels to keep.

    Args:
        mask: (H, W), bool or 0 / non-0.
        source: Its name in errors.

    Raises:
        InputError: The mask is empty or full.
    """
    if not mask.any():
        raise InputError(f"{source} is empty: it marks no pixel to edit", "white (non-zero) pixels are edited")
    if mask.all():
        raise InputError(
            f"{source} is full: it marks every pixel, and nothing is left to take the style from",
            "white (non-zero) pixels are edited, black ones kept; is it inverted?",
        )


_MASK_HINT = (
    "a mask is black (keep) and white (edit): save it as an 8-bit gray PNG without transparency, "
    "or give the smallest value that is edited with --mask-threshold N"
)


def _indices_decide(image: PilImage.Image) -> bool:
    """Whether a palette mask is two-valued by its indices: 0 and another one, and the colors do not contradict.

    They contradict if the other index is black and 0 is not (optimizers write white first), or if one is transparent.
    """
    used = np.flatnonzero(np.asarray(image.histogram()))
    if len(used) != 2 or used[0] != 0 or "transparency" in image.info:
        return False
    palette = np.zeros((256, 3), np.uint8)
    colors = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    palette[: len(colors)] = colors
    return not palette[0].any() or bool(palette[used[1]].any())


def _binary_mask(values: NDArray[np.uint8 | np.uint16], path: FilePath) -> MaskFile:
    """Threshold one channel of a mask file. Raises InputError if it is neither two-valued nor clearly binary."""
    # Pillow counts 8-bit values in place; numpy would need 8 bytes for each.
    distinct = np.flatnonzero(PilImage.fromarray(values).histogram()) if values.dtype == np.uint8 else np.unique(values)
    if len(distinct) == 1 or (len(distinct) == 2 and distinct[0] == 0):
        return MaskFile(np.asarray(values != 0), ())
    if values.dtype == np.uint8 and distinct[-1] >= 128:
        if _is_nearly_binary(distinct):
            return MaskFile(np.asarray(values >= 128), ())
        between = _between(values)
        if not (between & ~(_dilate(values <= BINARY_TOLERANCE) & _dilate(values >= 255 - BINARY_TOLERANCE))).any():
            note = (
                f"{path} has {np.count_nonzero(between)} gray pixels along the edges of its mask; the threshold is 128"
            )
            return MaskFile(np.asarray(values >= 128), (note,))
    raise InputError(
        f"{path} is not a mask: it holds {format_values(distinct)} instead of 0 and one other value", _MASK_HINT
    )


def _between(values: NDArray[Any]) -> Mask:
    """True for values that are neither near 0 nor near 255."""
    return np.asarray((values > BINARY_TOLERANCE) & (values < 255 - BINARY_TOLERANCE))


def _dilate(mask: Mask, reach: int = 2) -> Mask:
    """Pixels at most `reach` rows and columns away from one of the mask."""
    for _ in range(reach):
        padded = np.pad(mask, 1)
        rows = padded[:-2] | padded[1:-1] | padded[2:]
        mask = rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]
    return mask


def _is_nearly_binary(values: NDArray[Any]) -> bool:
    return not _between(values).any()
