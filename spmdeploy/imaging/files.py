"""Reads and writes photos, label maps, instance maps and masks, and converts color order and mask polarity.

Photos are uint8 (H, W, 3) RGB, label maps uint8 (H, W), instance maps int32 (H, W), masks bool (H, W) with True = edit.
A file that cannot be used raises an InputError that names it. Changes to a photo (turned upright, gray to RGB) and
metadata that cannot be kept are reported as notes. Every reader takes the file's bytes as `content` if they are in
memory already, such as those of a bundle, whose hash was checked; the path is then only used in messages.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PilImage

from spmdeploy.errors import InputError
from spmdeploy.files import EXISTS_HINT, atomic_write, missing_folder, output_descriptor, write_descriptor
from spmdeploy.imaging.decode import DecodedFile, decode_errors, decode_ids, decode_image
from spmdeploy.inputs import FilePath
from spmdeploy.labels import ClassTable
from spmdeploy.remote import RemotePath, write_remote
from spmdeploy.types import Image

Pixels: TypeAlias = NDArray[np.uint8]
"""uint8 (H, W)."""

# A JPEG segment holds 65535 bytes, two of them its length. PNG and WebP have no such limit.
MAX_JPEG_EXIF = 65533

# PNG level, measured on a 480x360 and a 4000x3000 photo (Pillow 13 with zlib-ng, CPU time and size):
#   level 1: 11 ms 207 kB, 0.91 s 16.7 MB   2: 12 ms 204 kB, 0.91 s 16.5 MB   3: 16 ms 195 kB, 1.28 s 16.0 MB
#   level 4: 22 ms 197 kB, 1.63 s 17.1 MB   5: 24 ms 193 kB, 2.06 s 16.7 MB   6: 42 ms 186 kB, 3.45 s 16.2 MB
# Level 2 costs as much as 1; slower levels save little (3 % on the large photo).
_WRITE_OPTIONS: dict[str, dict[str, Any]] = {
    "PNG": {"compress_level": 2},
    "JPEG": {"quality": 95, "subsampling": 0},  # 4:4:4: no color bleeds over the edge of the mask
    # exact: otherwise the encoder changes pixels under full transparency. Least effort (measured as above):
    # 0.63 s and 11.2 MB for the large photo, where more takes 1.7 s for 11.1 MB and the default 8 s for 10.2 MB.
    "WebP": {"lossless": True, "exact": True, "quality": 0, "method": 0},
}
_SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WebP"}
_STRIP = 256
"""Rows that are converted at a time."""
_MAX_SIDE = {"JPEG": 65500, "WebP": 16383}


@dataclass(frozen=True, eq=False)
class Photo:
    """A decoded upright photo, with the metadata that is written back with its pixels."""

    pixels: Image  # uint8 (H, W, 3) RGB
    alpha: Pixels | None = None  # uint8 (H, W), 255 = opaque; None where the file has no transparency
    icc_profile: bytes | None = None  # of an RGB color space; the pixels are in that space, unconverted
    exif: bytes | None = None  # "Exif\0\0" and a TIFF block that says orientation 1 and holds no thumbnail
    orientation: int = 1  # EXIF orientation, 1..8, by which the pixels have been turned
    notes: tuple[str, ...] = ()  # changes made by reading, and metadata that is not kept


def read_photo(path: FilePath, content: bytes | None = None) -> Photo:
    """Read the 8-bit photo in a PNG, JPEG, WebP or BMP file.

    The EXIF orientation is applied to the pixels and reset. Gray and palette images become RGB. Transparency, the ICC
    profile and EXIF are kept.

    Args:
        path: the file, "-" for standard input.
        content: the bytes of the file if they are in memory already.

    Raises:
        InputError: for 16-bit, CMYK and other modes, animations, damaged and huge files.
    """
    file = decode_image(path, content)
    notes = list(file.notes)
    if file.wide:
        raise InputError(f"{path} has 16 bits per channel; photos must have 8", "convert it to 8 bits first")
    if file.image.mode not in ("RGB", "RGBA", "L", "LA", "1", "P"):
        raise InputError(
            f"{path} is a {file.image.mode} image; photos must be 8-bit RGB",
            "convert it to RGB with its color profile in a photo editor first",
        )
    if file.image.mode in ("L", "LA", "1"):
        notes.append(f"{path} is gray; it is edited and written as RGB")
    if file.image.mode == "P":
        notes.append(f"{path} is a palette image; it is edited and written as RGB")
    pixels, alpha = rgb_and_alpha(file, path)
    if alpha is not None and file.format == "BMP" and not alpha.any():
        notes.append(
            f"{path} is a BMP with alpha zero everywhere, as programs without alpha write it; it is read as opaque"
        )
        alpha = None
    profile = file.icc_profile
    # Bytes 16..20 of a profile name its color space. A gray profile with RGB pixels would make the file invalid.
    if profile and profile[16:20] != b"RGB ":
        notes.append(f"{path} has a color profile that is not for RGB; it is not kept")
        profile = None
    return Photo(pixels, alpha, profile or None, file.exif, file.orientation, tuple(notes))


def read_labels(path: FilePath, content: bytes | None = None, table: ClassTable | None = None) -> Pixels:
    """Return the class ids in a PNG file.

    Gray PNGs of 1, 2, 4, 8 and 16 bits hold the ids as their values, palette PNGs as their indices, and color PNGs in
    three equal channels. An alpha channel must be opaque.

    Args:
        path: the file, "-" for standard input.
        content: the bytes of the file if they are in memory already.
        table: the classes of the model. With it, a palette is refused if its colors are all class colors, but of other
            classes than its indices: image programs reorder palettes, and the indices are then meaningless.

    Returns:
        uint8 (H, W).

    Raises:
        InputError: for color images, lossy files, ids above 255 and reordered palettes.
    """
    file = decode_ids(path, content)
    if file.image.mode in ("RGB", "RGBA", "LA") and not file.wide:
        rgb, alpha = rgb_and_alpha(file, path)
        if alpha is not None and (alpha != 255).any():
            raise InputError(
                f"{path} is partly transparent; a map of class ids is not", "save it without an alpha channel"
            )
        if not channels_equal(rgb):
            raise InputError(
                f"{path} is a color image, not a map of class ids",
                "`spmdeploy labels convert` turns class colors into ids",
            )
        return np.ascontiguousarray(rgb[..., 0])
    if table is not None and file.image.mode == "P":
        _check_palette(file.image, table, path)
    ids = _stored_values(file, path)
    if ids.dtype != np.uint8 and ids.size and int(ids.max()) > 255:
        above = np.unique(ids[ids > 255])
        raise InputError(f"{path} holds {format_values(above)}; class ids are 0 to 255", "is it an instance map?")
    return ids.astype(np.uint8)


def _check_palette(image: PilImage.Image, table: ClassTable, path: FilePath) -> None:
    """Raise InputError if the palette shows all used indices in class colors, but of other classes."""
    used = np.flatnonzero(np.asarray(image.histogram()))
    palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    owners: dict[tuple[int, ...], set[int]] = {}
    for label in table.classes:
        owners.setdefault(label.color, set()).add(label.id)
    shown = {int(i): owners.get(tuple(map(int, palette[i])), set()) for i in used if i < len(palette)}
    wrong = {index: ids for index, ids in shown.items() if index not in ids}
    if not wrong or not all(shown.values()) or len(shown) < len(used):
        return  # the colors are those of the classes, or unrelated to the table
    index, ids = next(iter(wrong.items()))
    raise InputError(
        f"the palette of {path} was reordered: index {index} is shown in the color of {table.classes[min(ids)].name} "
        f"(id {min(ids)} in {table.name})",
        "`spmdeploy labels convert` turns the colors into ids",
    )


def read_instances(path: FilePath, content: bytes | None = None) -> NDArray[np.int32]:
    """Read the instance ids in a PNG file.

    One channel (Cityscapes `instanceIds`, 16 bits): its values, or palette indices. RGB (ADE20K, where red is the class
    and blue is empty): the green channel. Three equal channels are read as one.

    Returns:
        int32 (H, W).

    Raises:
        InputError: for other color images.
    """
    file = decode_ids(path, content)
    if file.image.mode != "RGB" or file.wide:
        return _stored_values(file, path).astype(np.int32)
    rgb = np.asarray(file.image)
    if rgb[..., 2].any() and not channels_equal(rgb):
        raise InputError(
            f"{path} is no instance map as ADE20K has them (id in green, class in red): its blue channel is not empty",
            "save the instance ids as a 16-bit gray PNG",
        )
    return rgb[..., 1].astype(np.int32)


def rgb_and_alpha(file: DecodedFile, path: FilePath) -> tuple[Image, Pixels | None]:
    """uint8 (H, W, 3) and, where the file has any transparency, uint8 (H, W)."""
    image = file.image
    width, height = image.size
    transparent = image.mode in ("RGBA", "LA") or "transparency" in image.info
    rgb = np.empty((height, width, 3), np.uint8)
    alpha = np.empty((height, width), np.uint8) if transparent else None
    with decode_errors(Path(path)):  # raises for palettes that are too short
        for top in range(0, height, _STRIP):  # converted at once, a photo would take three times as much memory
            strip = image.crop((0, top, width, min(top + _STRIP, height)))
            values = np.asarray(strip.convert("RGBA" if transparent else "RGB"))
            rgb[top : top + _STRIP] = values[..., :3]
            if alpha is not None:
                alpha[top : top + _STRIP] = values[..., 3]
    return rgb, alpha


def channels_equal(rgb: NDArray[Any]) -> bool:
    """Whether the three channels of (H, W, 3) are equal."""
    return np.array_equal(rgb[..., 0], rgb[..., 1]) and np.array_equal(rgb[..., 1], rgb[..., 2])


def format_values(values: NDArray[Any], limit: int = 8) -> str:
    """Format values as in "3 values (0, 7, 255)"."""
    shown = ", ".join(map(str, values[:limit])) + (", …" if len(values) > limit else "")
    return f"{len(values)} {'value' if len(values) == 1 else 'values'} ({shown})"


def _stored_values(file: DecodedFile, path: FilePath) -> NDArray[np.uint8 | np.uint16]:
    """The numbers that a single-channel PNG stores: palette indices, or gray values as they are in the file."""
    # Pillow stretches gray values of 2 and 4 bits to 0..255; here they are ids.
    stretch = {"1": 1, "L;2": 85, "L;4": 17, "L": 1, "I;16B": 1, "P;1": 1, "P;2": 1, "P;4": 1, "P": 1}
    if file.layout not in stretch:
        channels = "with transparency " if file.image.mode in ("LA", "RGBA") else ""
        raise InputError(
            f"{path} is a {16 if file.wide else 8}-bit color or gray image {channels}and no map of ids",
            "save the ids as a gray or palette PNG of one channel",
        )
    values = np.asarray(file.image)
    if values.dtype == np.bool_:
        return values.astype(np.uint8)
    return np.asarray(values // values.dtype.type(stretch[file.layout]))


def write_photo(path: FilePath, photo: Photo, overwrite: bool = False) -> tuple[str, ...]:
    """Write a photo with its transparency, ICC profile and EXIF.

    The suffix decides: .png and .webp are exact, .jpg (quality 95, 4:4:4) is not. The file is written atomically. "-"
    writes a PNG to standard output.

    Returns:
        Notes on what the format cannot hold.

    Raises:
        InputError: As `check_output`, or the operating system refuses.
    """
    format = check_output(path, overwrite, allow_stream=True)
    options = _WRITE_OPTIONS[format] | {"icc_profile": photo.icc_profile}
    notes = []
    exif = photo.exif
    if format == "JPEG":
        notes.append(f"{path} is JPEG: pixels outside the mask are close to the photo's, not equal; .png keeps them")
        if exif is not None and len(exif) > MAX_JPEG_EXIF:
            notes.append(f"{path} is JPEG, which cannot hold the photo's {len(exif)} bytes of EXIF; they are not kept")
            exif = None
    if format == "JPEG" and photo.alpha is not None and (photo.alpha != 255).any():
        notes.append(f"{path} is JPEG, which has no transparency: the photo's is lost; .png keeps it")
    if exif is not None:
        options["exif"] = exif
    pixels = photo.pixels if format == "JPEG" else _with_alpha(photo)
    _write(path, pixels, format, options, overwrite)
    return tuple(notes)


def encode_photo(photo: Photo) -> bytes:
    """Return the bytes of the PNG file that `write_photo` writes."""
    options = _WRITE_OPTIONS["PNG"] | {"icc_profile": photo.icc_profile}
    if photo.exif is not None:
        options["exif"] = photo.exif
    return _encode(_with_alpha(photo), options)


def encode_ids(ids: Pixels) -> bytes:
    """Return a gray PNG file of ids or a mask, uint8 (H, W)."""
    return _encode(ids, _WRITE_OPTIONS["PNG"])


def _encode(pixels: NDArray[np.uint8], options: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    PilImage.fromarray(np.ascontiguousarray(pixels)).save(stream, "PNG", **options)
    return stream.getvalue()


def _with_alpha(photo: Photo) -> NDArray[np.uint8]:
    return photo.pixels if photo.alpha is None else np.dstack([photo.pixels, photo.alpha])


def write_image(path: FilePath, pixels: Image | Pixels, overwrite: bool = False) -> None:
    """Write a plain image atomically.

    Args:
        path: Of the file, .png for label maps.
        pixels: uint8 (H, W, 3), RGB, or uint8 (H, W) such as a label map.
        overwrite: Replace an existing file.

    Raises:
        InputError: As `write_photo`.
    """
    format = check_output(path, overwrite)
    if pixels.ndim == 2 and format != "PNG":
        raise InputError(f"{path}: an image of one channel survives only in PNG", "name the output .png")
    _write(path, pixels, format, dict(_WRITE_OPTIONS[format]), overwrite)


def write_instances(path: FilePath, instances: NDArray[np.integer[Any]], overwrite: bool = False) -> None:
    """Write instance ids as the 16-bit gray PNG that `read_instances` reads, atomically.

    Args:
        path: Of the file.
        instances: integer (H, W), 0..65535.
        overwrite: Replace an existing file.

    Raises:
        InputError: As `write_photo`, and for ids that do not fit into 16 bits.
    """
    if check_output(path, overwrite) != "PNG":
        raise InputError(f"{path}: instance ids survive only in PNG", "name the output .png")
    if instances.size and (instances.min() < 0 or instances.max() > 65535):
        raise InputError(f"{path}: instance ids from {instances.min()} to {instances.max()}; 16 bits hold 0 to 65535")
    _write(path, instances.astype(np.uint16), "PNG", dict(_WRITE_OPTIONS["PNG"]), overwrite)


def check_output(path: FilePath, overwrite: bool, *, allow_stream: bool = False) -> str:
    """Return the format that the suffix stands for: "PNG", "JPEG" or "WebP". Call it before the work, not after it.

    Args:
        path: the output.
        overwrite: whether it may replace a file.
        allow_stream: whether it may be "-", /dev/stdout or a process substitution, which are PNG.

    Raises:
        InputError: The suffix is unknown, the folder is missing or not writable, or the file exists (unless
            `overwrite`).
    """
    path = path if isinstance(path, RemotePath) else Path(path)
    if allow_stream and output_descriptor(path) is not None:
        return "PNG"
    format = _SUFFIXES.get(path.suffix.lower())
    if format is None:
        raise InputError(
            f"{path} has no suffix of an image format that can be written: {path.suffix!r}",
            f"use {', '.join(_SUFFIXES)}",
        )
    if isinstance(path, RemotePath):  # whether it exists is checked by the request that writes it
        return format
    if not path.parent.is_dir():
        raise missing_folder(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder", "name a file in it")
    if not overwrite and os.path.lexists(path):
        raise InputError(f"{path} exists already", EXISTS_HINT)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise InputError(f"permission to write into {path.parent} is denied", "check its owner and mode")
    return format


def check_output_size(path: FilePath, height: int, width: int) -> None:
    """Raise InputError if the format of the suffix cannot hold images of that size."""
    path = path if isinstance(path, RemotePath) else Path(path)
    format = "PNG" if output_descriptor(path) is not None else _SUFFIXES[path.suffix.lower()]
    longest = max(height, width)
    if longest > _MAX_SIDE.get(format, longest):
        raise InputError(
            f"{path}: {format} holds at most {_MAX_SIDE[format]} pixels per side, not {longest}", "use .png"
        )


def _write(
    path: FilePath, pixels: NDArray[np.uint8 | np.uint16], format: str, options: dict[str, Any], overwrite: bool
) -> None:
    check_output_size(path, *pixels.shape[:2])
    image = PilImage.fromarray(np.ascontiguousarray(pixels))
    if isinstance(path, RemotePath) or output_descriptor(path) is not None:
        buffer = io.BytesIO()
        image.save(buffer, format, **options)
        if isinstance(path, RemotePath):
            write_remote(path, buffer.getvalue(), overwrite)
        else:
            write_descriptor(path, buffer.getvalue())
        return
    with atomic_write(path, overwrite) as stream:
        image.save(stream, format, **options)
