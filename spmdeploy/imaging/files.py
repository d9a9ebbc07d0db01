"""The only place that touches image files, color order and mask polarity.

Photos are uint8 (H, W, 3) RGB, label maps uint8 (H, W), instance maps int32 (H, W), masks bool (H, W) with True = edit.
What a file holds and we cannot use as it is becomes an InputError that names the file; what we change about a photo
(turning it upright, gray to RGB) or cannot keep is said in a note. Every reader takes the file's bytes as `content`
where they are in memory already (a bundle's, whose hash was checked); the path then only names them in errors.
"""

from __future__ import annotations

import io
import math
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from spmdeploy.errors import InputError

FilePath: TypeAlias = str | os.PathLike[str]
Pixels: TypeAlias = NDArray[np.uint8]
Mask: TypeAlias = NDArray[np.bool_]
Integer = TypeVar("Integer", bound=np.generic)

# Cameras make 100 megapixels; 200 of them decoded are 600 MB. (Pillow itself stops at 179 for WebP.)
MAX_MEGAPIXELS = 200
# A mask value this near to 0 or 255 is taken for it: the ringing that JPEG puts around an edge at usual qualities.
BINARY_SLACK = 32
EXIF_PREFIX = b"Exif\0\0"
# A JPEG segment holds 65535 bytes, two of them its length. PNG and WebP have no such limit.
LARGEST_JPEG_EXIF = 65533

_READERS: dict[str, type[ImageFile]] = {
    "PNG": PngImageFile,
    "JPEG": JpegImageFile,
    "WebP": WebPImageFile,
    "BMP": BmpImageFile,
}
_READABLE = "PNG, JPEG, WebP or BMP"

# PNG level, measured on a 480x360 and a 4000x3000 photo (Pillow 13 with zlib-ng, CPU time and size):
#   level 1: 11 ms 207 kB, 0.91 s 16.7 MB   2: 12 ms 204 kB, 0.91 s 16.5 MB   3: 16 ms 195 kB, 1.28 s 16.0 MB
#   level 4: 22 ms 197 kB, 1.63 s 17.1 MB   5: 24 ms 193 kB, 2.06 s 16.7 MB   6: 42 ms 186 kB, 3.45 s 16.2 MB
# Level 2 costs what 1 does; what the slower ones save (3 % on the large photo) is not worth the wait.
_WRITE_OPTIONS: dict[str, dict[str, Any]] = {
    "PNG": {"compress_level": 2},
    "JPEG": {"quality": 95, "subsampling": 0},  # 4:4:4: no color bleeds over the edge of the mask
    # exact: otherwise the encoder changes pixels under full transparency. Least effort (measured as above):
    # 0.63 s and 11.2 MB for the large photo, where more takes 1.7 s for 11.1 MB and the default 8 s for 10.2 MB.
    "WebP": {"lossless": True, "exact": True, "quality": 0, "method": 0},
}
_SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WebP"}
_LONGEST_SIDE = {"JPEG": 65500, "WebP": 16383}
_BICUBIC = Image.Resampling.BICUBIC


# --------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, eq=False)
class Photo:
    """A decoded photo, upright, with what has to be written back beside its pixels."""

    pixels: Pixels  # uint8 (H, W, 3) RGB
    alpha: Pixels | None = None  # uint8 (H, W), 255 = opaque; None where the file has no transparency
    icc_profile: bytes | None = None  # of an RGB color space; the pixels are in that space, unconverted
    exif: bytes | None = None  # "Exif\0\0" and a TIFF block that says orientation 1 and holds no thumbnail
    notes: tuple[str, ...] = ()  # what reading changed or could not keep, a sentence each


def read_photo(path: FilePath, content: bytes | None = None) -> Photo:
    """The 8-bit photo in a PNG, JPEG, WebP or BMP file.

    The EXIF orientation is applied to the pixels and reset. Gray and palette pictures become RGB. Transparency, the
    ICC profile and EXIF are kept. InputError for 16-bit, CMYK and other modes, animations, damaged or huge files.
    """
    file = _decode(path, content)
    notes = list(file.notes)
    if file.wide:
        raise InputError(f"{path} has 16 bits per channel; photos must have 8", "convert it to 8 bits first")
    if file.image.mode not in ("RGB", "RGBA", "L", "LA", "1", "P"):
        raise InputError(
            f"{path} is a {file.image.mode} picture; photos must be 8-bit RGB",
            "convert it to RGB with its color profile in a photo editor first",
        )
    if file.image.mode in ("L", "LA", "1"):
        notes.append(f"{path} is gray; it is edited and written as RGB")
    if file.image.mode == "P":
        notes.append(f"{path} is a palette picture; it is edited and written as RGB")
    pixels, alpha = _rgb_and_alpha(file.image)
    profile = file.image.info.get("icc_profile")
    # Bytes 16..20 of a profile name its color space. A gray one beside RGB pixels would make the file invalid.
    if profile and profile[16:20] != b"RGB ":
        notes.append(f"{path} has a color profile that is not for RGB; it is not kept")
        profile = None
    return Photo(pixels, alpha, profile or None, file.exif, tuple(notes))


def read_labels(path: FilePath, content: bytes | None = None) -> Pixels:
    """The class ids in a PNG file: uint8 (H, W).

    Gray PNGs of 1, 2, 4, 8 and 16 bits hold the ids as their values, palette PNGs as their indices: the colors of the
    palette play no part. InputError for color pictures, lossy files and ids above 255.
    """
    file = _decode_ids(path, content)
    if file.image.mode == "RGB":
        raise InputError(
            f"{path} is a color picture, not a map of class ids",
            "`spmdeploy labels convert` turns class colors into ids; "
            "if all three channels hold the id, save one of them as a gray PNG",
        )
    ids = _stored_values(file, path)
    if ids.dtype != np.uint8 and ids.size and int(ids.max()) > 255:
        above = np.unique(ids[ids > 255])
        raise InputError(f"{path} holds {_listed(above)}; class ids are 0 to 255", "is it an instance map?")
    return ids.astype(np.uint8)


def read_instances(path: FilePath, content: bytes | None = None) -> NDArray[np.int32]:
    """The instance ids in a PNG file: int32 (H, W).

    One channel (Cityscapes `instanceIds`, 16 bits): its values, or palette indices. RGB (ADE20K, where red is the class
    and blue is empty): the green channel. Three equal channels are read as one. InputError for other color pictures.
    """
    file = _decode_ids(path, content)
    if file.image.mode != "RGB" or file.wide:
        return _stored_values(file, path).astype(np.int32)
    rgb = np.asarray(file.image)
    if rgb[..., 2].any() and not _all_equal(rgb):
        raise InputError(
            f"{path} is no instance map as ADE20K has them (id in green, class in red): its blue channel is not empty",
            "save the instance ids as a 16-bit gray PNG",
        )
    return rgb[..., 1].astype(np.int32)


def read_mask(path: FilePath, content: bytes | None = None) -> Mask:
    """The mask in an image file: bool (H, W), True = edit.

    Two-valued masks: 0 is kept, the other value, whatever it is, edited. Clearly binary ones (every value within 32 of
    0 or 255, some near 255: what JPEG makes of a mask) are cut at 128. RGB counts where its channels agree, a palette
    by its colors, so that what looks black is kept; where they decide nothing, index 0 is kept. An alpha channel must
    be opaque: tools disagree on whether transparent means edit or keep. InputError for everything else.
    An empty or full mask is returned as such; `check_mask` refuses it.
    """
    file = _decode(path, content)
    image = file.image
    if image.mode == "P":
        if _indices_decide(image):
            return np.asarray(np.asarray(image) != 0)
    elif image.mode == "I;16":
        return _binary_mask(np.asarray(image), path)
    elif file.wide or image.mode not in ("1", "L", "LA", "RGB", "RGBA"):
        raise InputError(
            f"{path} is no mask: it is a {image.mode} picture with {16 if file.wide else 8} bits", _MASK_HINT
        )
    if image.mode in ("1", "L") and "transparency" not in image.info:
        return _binary_mask(np.asarray(image.convert("L")), path)
    rgb, alpha = _rgb_and_alpha(image)
    if alpha is not None and (alpha != 255).any():
        raise InputError(
            f"{path} is partly transparent, and tools disagree on whether that means edit or keep", _MASK_HINT
        )
    if _all_equal(rgb):
        return _binary_mask(np.ascontiguousarray(rgb[..., 0]), path)
    edit = rgb >= 128
    if not _is_nearly_binary(rgb) or not _all_equal(edit):
        raise InputError(f"{path} is a colored picture, not a mask", _MASK_HINT)
    return np.ascontiguousarray(edit[..., 0])


def check_mask(mask: NDArray[Any], source: str) -> None:
    """InputError when a mask edits nothing or everything. mask: (H, W), bool or 0 / non-0; source: its name."""
    if not mask.any():
        raise InputError(f"{source} is empty: it marks no pixel to edit", "white (non-zero) pixels are edited")
    if mask.all():
        raise InputError(
            f"{source} is full: it marks every pixel, and nothing is left to take the style from",
            "white (non-zero) pixels are edited, black ones kept; is it inverted?",
        )


_MASK_HINT = "a mask is black (keep) and white (edit) without shades: save it as an 8-bit gray PNG without transparency"


@dataclass(frozen=True, eq=False)
class _Decoded:
    """A picture in memory, upright, and what Pillow's mode does not tell about how the file stores it."""

    image: Image.Image
    format: str  # a key of _READERS
    layout: str  # Pillow's raw mode: "L;4" is a 4-bit gray PNG, which arrives as mode "L", scaled
    exif: bytes | None
    notes: tuple[str, ...]

    @property
    def wide(self) -> bool:
        """Whether the file has 16 bits per channel (of RGB, Pillow silently keeps 8)."""
        return self.format == "PNG" and ";16" in self.layout


def _decode(path: FilePath, content: bytes | None) -> _Decoded:
    """Read, check and turn upright. InputError for whatever a file can have wrong before its mode matters.

    content: the file's bytes where they are in memory already; `path` is then only what messages call it.
    """
    path = Path(path)
    with _io_errors(path, "read"), path.open("rb") if content is None else io.BytesIO(content) as stream:
        start = stream.read(16)
        stream.seek(0)
        format = _format_of(start, path)
        # The reader's class instead of Image.open: no other plugin can be reached, and Pillow's limit for
        # decompression bombs, a global lower than ours, is left alone.
        with _decode_errors(path):
            image = _READERS[format](stream)
        _check_extent(image, path)
        layout = _layout(image)
        with _decode_errors(path):
            image.load()
    orientation, exif, notes = _metadata(image, path)
    turn = _TURNS.get(orientation)
    if turn is None:
        return _Decoded(image, format, layout, exif, notes)
    turned = image.transpose(turn)
    return _Decoded(turned, format, layout, exif, (f"{path} is turned upright (EXIF {orientation})", *notes))


def _decode_ids(path: FilePath, content: bytes | None) -> _Decoded:
    file = _decode(path, content)
    if file.format != "PNG":
        raise InputError(
            f"{path} is a {file.format} file; ids survive only in PNG",
            "save the map as PNG straight from where it is made: a lossy copy already holds wrong ids",
        )
    return file


def _format_of(start: bytes, path: Path) -> str:
    if not start:
        raise InputError(f"{path} is an empty file (0 bytes)", "copy or export it again")
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if start.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if start.startswith(b"RIFF") and start[8:12] == b"WEBP":
        return "WebP"
    if start.startswith(b"BM"):
        return "BMP"
    raise InputError(f"{path} is no {_READABLE} picture, whatever its name says", "convert it to PNG")


def _check_extent(image: ImageFile, path: Path) -> None:
    width, height = image.size
    if width * height > MAX_MEGAPIXELS * 1_000_000:
        raise InputError(
            f"{path} is {width}×{height}, {width * height / 1e6:.0f} megapixels; at most {MAX_MEGAPIXELS} are read",
            "crop or shrink it first",
        )
    if getattr(image, "is_animated", False):
        raise InputError(f"{path} is an animation with several frames", "save the frame you mean as a picture")


def _layout(image: ImageFile) -> str:
    """The raw mode that the file's pixels are in; "" where Pillow does not decode in tiles (WebP)."""
    if not image.tile:
        return ""
    arguments = image.tile[0].args
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)


@contextmanager
def _io_errors(path: Path, verb: str) -> Iterator[None]:
    """Turns what the operating system refuses into an InputError about the file."""
    try:
        yield
    except FileNotFoundError as exc:
        raise InputError(f"there is no file {path}", f"looked in {path.absolute().parent}") from exc
    except IsADirectoryError as exc:
        raise InputError(f"{path} is a folder, not a picture", "name a file in it") from exc
    except PermissionError as exc:
        raise InputError(f"permission to {verb} {path} is denied", "check its owner and mode") from exc
    except (OSError, ValueError) as exc:  # ValueError: a zero byte in the name
        raise InputError(f"cannot {verb} {path}: {getattr(exc, 'strerror', None) or exc}") from exc


@contextmanager
def _decode_errors(path: Path) -> Iterator[None]:
    """Turns a decoder's error into an InputError about the file."""
    try:
        yield
    except MemoryError:
        raise
    except Image.DecompressionBombError as exc:
        raise InputError(f"{path} has too many pixels: {exc}", "crop or shrink it first") from exc
    except Exception as exc:  # on hostile bytes decoders raise anything: OSError, SyntaxError, struct.error, zlib.error
        raise InputError(f"{path} is truncated or damaged: {exc}", "copy or export it again") from exc


# Which transposition undoes which EXIF orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION, _THUMBNAIL_AT, _THUMBNAIL_LENGTH = 0x0112, 0x0201, 0x0202


def _metadata(image: ImageFile, path: Path) -> tuple[int, bytes | None, tuple[str, ...]]:
    """The orientation, the EXIF block as it is written back, and notes on what is lost."""
    notes = []
    if image.info.get("xmp") or image.info.get("XML:com.adobe.xmp"):
        notes.append(f"the XMP metadata of {path} is not kept")
    if "mp" in image.info:
        notes.append(f"{path} holds further pictures (a preview or depth map) after the first; they are not kept")
    block = image.info.get("exif")
    if not block:
        return 1, None, tuple(notes)
    try:
        orientation, exif = _upright_exif(block)
    except (KeyError, struct.error):
        notes.append(f"the EXIF metadata of {path} is damaged and is not kept")
        return 1, None, tuple(notes)
    return orientation, exif, tuple(notes)


def _upright_exif(block: bytes) -> tuple[int, bytes]:
    """The orientation that an EXIF block states, and the block with orientation 1 and without its thumbnail.

    The block is changed in place instead of written anew, because camera makers' notes hold absolute offsets. The
    thumbnail goes because it would go on showing what the edit removed. KeyError or struct.error on damage.
    """
    while block.startswith(EXIF_PREFIX):
        block = block[len(EXIF_PREFIX) :]
    tiff = bytearray(block)
    order = {b"II*\0": "<", b"MM\0*": ">"}[bytes(tiff[:4])]
    (first,) = struct.unpack_from(f"{order}I", tiff, 4)
    entries, next_at = _directory(tiff, order, first)
    orientation = 1
    if _ORIENTATION in entries:
        (orientation,) = struct.unpack_from(f"{order}H", tiff, entries[_ORIENTATION])
        struct.pack_into(f"{order}H", tiff, entries[_ORIENTATION], 1)
    if next_at + 4 <= len(tiff):
        (thumbnail,) = struct.unpack_from(f"{order}I", tiff, next_at)
        struct.pack_into(f"{order}I", tiff, next_at, 0)
        if thumbnail:
            _blank_thumbnail(tiff, order, thumbnail)
    return orientation, EXIF_PREFIX + bytes(tiff)


def _directory(tiff: bytearray, order: str, at: int) -> tuple[dict[int, int], int]:
    """Where the value field of every tag of a TIFF directory lies, and where the offset of the next directory."""
    (count,) = struct.unpack_from(f"{order}H", tiff, at)
    tags = {struct.unpack_from(f"{order}H", tiff, at + 2 + 12 * k)[0]: at + 10 + 12 * k for k in range(count)}
    return tags, at + 2 + 12 * count


def _blank_thumbnail(tiff: bytearray, order: str, at: int) -> None:
    entries, _ = _directory(tiff, order, at)
    if _THUMBNAIL_AT in entries and _THUMBNAIL_LENGTH in entries:
        (start,) = struct.unpack_from(f"{order}I", tiff, entries[_THUMBNAIL_AT])
        (length,) = struct.unpack_from(f"{order}I", tiff, entries[_THUMBNAIL_LENGTH])
        stop = min(start + length, len(tiff))
        tiff[start:stop] = bytes(max(stop - start, 0))


def _rgb_and_alpha(image: Image.Image) -> tuple[Pixels, Pixels | None]:
    """uint8 (H, W, 3) and, where the picture has any transparency, uint8 (H, W)."""
    if image.mode in ("RGBA", "LA") or "transparency" in image.info:
        rgba = np.asarray(image.convert("RGBA"))
        return np.ascontiguousarray(rgba[..., :3]), np.ascontiguousarray(rgba[..., 3])
    return np.array(image.convert("RGB")), None  # a copy: what Pillow lends is read-only


def _stored_values(file: _Decoded, path: FilePath) -> NDArray[np.uint8 | np.uint16]:
    """The numbers that a single-channel PNG stores: palette indices, or gray values as they are in the file."""
    # Pillow stretches gray values of 2 and 4 bits to 0..255; here they are ids.
    stretch = {"1": 1, "L;2": 85, "L;4": 17, "L": 1, "I;16B": 1, "P;1": 1, "P;2": 1, "P;4": 1, "P": 1}
    if file.layout not in stretch:
        channels = "with transparency " if file.image.mode in ("LA", "RGBA") else ""
        raise InputError(
            f"{path} is a {16 if file.wide else 8}-bit color or gray picture {channels}and no map of ids",
            "save the ids as a gray or palette PNG of one channel",
        )
    values = np.asarray(file.image)
    if values.dtype == np.bool_:
        return values.astype(np.uint8)
    return np.asarray(values // values.dtype.type(stretch[file.layout]))


def _indices_decide(image: Image.Image) -> bool:
    """Whether a palette mask is two-valued by its indices: 0 and another one, and the colors do not contradict.

    They do where the other index is black and 0 is not (optimizers write white first), or where one is transparent.
    """
    used = np.flatnonzero(np.asarray(image.histogram()))
    if len(used) != 2 or used[0] != 0 or "transparency" in image.info:
        return False
    palette = np.zeros((256, 3), np.uint8)
    colors = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    palette[: len(colors)] = colors
    return not palette[0].any() or bool(palette[used[1]].any())


def _binary_mask(values: NDArray[np.uint8 | np.uint16], path: FilePath) -> Mask:
    """One channel of a mask file as bool, True = edit; InputError where it is neither two-valued nor clearly binary."""
    # Pillow counts 8-bit values in place; numpy would need 8 bytes for each.
    distinct = np.flatnonzero(Image.fromarray(values).histogram()) if values.dtype == np.uint8 else np.unique(values)
    if len(distinct) == 1 or (len(distinct) == 2 and distinct[0] == 0):
        return np.asarray(values != 0)
    if values.dtype == np.uint8 and _is_nearly_binary(distinct) and distinct[-1] >= 128:
        return np.asarray(values >= 128)
    raise InputError(f"{path} is no mask: it holds {_listed(distinct)} instead of 0 and one other value", _MASK_HINT)


def _is_nearly_binary(values: NDArray[Any]) -> bool:
    return not ((values > BINARY_SLACK) & (values < 255 - BINARY_SLACK)).any()


def _all_equal(rgb: NDArray[Any]) -> bool:
    """Whether the three channels of (H, W, 3) hold the same picture."""
    return np.array_equal(rgb[..., 0], rgb[..., 1]) and np.array_equal(rgb[..., 1], rgb[..., 2])


def _listed(values: NDArray[Any], most: int = 8) -> str:
    """ "3 values (0, 7, 255)" """
    shown = ", ".join(map(str, values[:most])) + (", …" if len(values) > most else "")
    return f"{len(values)} {'value' if len(values) == 1 else 'values'} ({shown})"


# --------------------------------------------------------------------------------------------------------- writing


def write_photo(path: FilePath, photo: Photo, overwrite: bool = False) -> tuple[str, ...]:
    """Write a photo with its transparency, ICC profile and EXIF; returns notes on what the format does not hold.

    The suffix decides: .png and .webp are exact, .jpg (quality 95, 4:4:4) is not. The file appears whole or not at all.
    InputError as `check_output` has it, and when the system refuses.
    """
    format = check_output(path, overwrite)
    options = _WRITE_OPTIONS[format] | {"icc_profile": photo.icc_profile}
    notes = []
    pixels, exif = photo.pixels, photo.exif
    if format == "JPEG":
        notes.append(f"{path} is JPEG: pixels outside the mask are close to the photo's, not equal; .png keeps them")
        if exif is not None and len(exif) > LARGEST_JPEG_EXIF:
            notes.append(f"{path} is JPEG, which cannot hold the photo's {len(exif)} bytes of EXIF; they are not kept")
            exif = None
    if photo.alpha is not None and format != "JPEG":
        pixels = np.dstack([pixels, photo.alpha])
    elif photo.alpha is not None and (photo.alpha != 255).any():
        notes.append(f"{path} is JPEG, which has no transparency: the photo's is lost; .png keeps it")
    if exif is not None:
        options["exif"] = exif
    _write(Path(path), pixels, format, options, overwrite)
    return tuple(notes)


def write_picture(path: FilePath, pixels: Pixels, overwrite: bool = False) -> None:
    """Write a plain picture: uint8 (H, W, 3) RGB, or uint8 (H, W) such as a label map, which must be .png.

    The file appears whole or not at all. InputError as for `write_photo`.
    """
    format = check_output(path, overwrite)
    if pixels.ndim == 2 and format != "PNG":
        raise InputError(f"{path}: a picture of one channel survives only in PNG", "name the output .png")
    _write(Path(path), pixels, format, dict(_WRITE_OPTIONS[format]), overwrite)


def write_instances(path: FilePath, instances: NDArray[np.integer[Any]], overwrite: bool = False) -> None:
    """Write instance ids, integers (H, W) of 0..65535, as the 16-bit gray PNG that `read_instances` reads.

    The file appears whole or not at all. InputError as for `write_photo`, and for ids that 16 bits do not hold.
    """
    if check_output(path, overwrite) != "PNG":
        raise InputError(f"{path}: instance ids survive only in PNG", "name the output .png")
    if instances.size and (instances.min() < 0 or instances.max() > 65535):
        raise InputError(f"{path}: instance ids from {instances.min()} to {instances.max()}; 16 bits hold 0 to 65535")
    _write(Path(path), instances.astype(np.uint16), "PNG", dict(_WRITE_OPTIONS["PNG"]), overwrite)


def check_output(path: FilePath, overwrite: bool) -> str:
    """The format that a suffix asks for: "PNG", "JPEG" or "WebP". Ask before the work, not after it.

    InputError for another suffix, a folder that is missing or closed to us, a path that is taken (unless `overwrite`).
    """
    path = Path(path)
    format = _SUFFIXES.get(path.suffix.lower())
    if format is None:
        raise InputError(f"{path} has no suffix of a picture we write: {path.suffix!r}", f"use {', '.join(_SUFFIXES)}")
    if not path.parent.is_dir():
        raise InputError(f"the folder of {path} does not exist", f"mkdir -p {path.parent}")
    if path.is_dir():
        raise InputError(f"{path} is a folder", "name a file in it")
    if not overwrite and os.path.lexists(path):
        raise _exists(path)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise InputError(f"permission to write into {path.parent} is denied", "check its owner and mode")
    return format


def check_output_size(path: FilePath, height: int, width: int) -> None:
    """InputError where the format that the suffix asks for does not hold pictures of that size."""
    format = _SUFFIXES[Path(path).suffix.lower()]
    longest = max(height, width)
    if longest > _LONGEST_SIDE.get(format, longest):
        raise InputError(
            f"{path}: {format} holds at most {_LONGEST_SIDE[format]} pixels a side, not {longest}", "use .png"
        )


def _exists(path: Path) -> InputError:
    return InputError(f"{path} exists already", "choose another name, or allow it with --overwrite")


def _write(
    path: Path, pixels: NDArray[np.uint8 | np.uint16], format: str, options: dict[str, Any], overwrite: bool
) -> None:
    check_output_size(path, *pixels.shape[:2])
    temporary = path.with_name(f".{os.urandom(8).hex()}.tmp")
    try:
        # Not tempfile: its files are for the owner alone, while this one is to get the mode that any new file gets.
        with _io_errors(path, "write"), temporary.open("xb") as stream:
            Image.fromarray(np.ascontiguousarray(pixels)).save(stream, format, **options)
        with _io_errors(path, "write"):
            _atomic_write(temporary, path, overwrite)
    finally:
        temporary.unlink(missing_ok=True)


def _atomic_write(temporary: Path, path: Path, overwrite: bool) -> None:
    """Give the finished file its name; without `overwrite` never in the place of another, however late it came."""
    if overwrite:
        os.replace(temporary, path)
        return
    try:
        os.link(temporary, path)
    except FileExistsError as exc:
        raise _exists(path) from exc
    except OSError:  # a file system without hard links, such as FAT: claim the name with an empty file instead
        try:
            path.open("xb").close()
        except FileExistsError as exc:
            raise _exists(path) from exc
        os.replace(temporary, path)


# -------------------------------------------------------------------------------------------------------- resizing


def resize_photo(pixels: Pixels, height: int, width: int) -> Pixels:
    """uint8 (H, W, 3) to uint8 (height, width, 3): area average where an axis shrinks, bicubic where it grows.

    The average is exact and weights pixels by the share that is covered, so a coarse pixel depends on the pixels under
    it and on no others (`resize_mask_conservative` says which depend on a mask).
    """
    coarse = _area_average(pixels, min(height, pixels.shape[0]), min(width, pixels.shape[1]))
    if coarse.shape[:2] == (height, width):
        return coarse
    return np.asarray(Image.fromarray(coarse).resize((width, height), _BICUBIC))


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
        picture = Image.fromarray(np.ascontiguousarray(padded[..., channel]))
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


def _area_average(pixels: Pixels, height: int, width: int) -> Pixels:
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
