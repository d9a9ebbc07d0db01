"""Decodes image files into upright images, with limits on size and errors that name the file."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image as PilImage
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from spmdeploy.errors import InputError
from spmdeploy.imaging.formats import complete_jpeg, format_of, sanitize
from spmdeploy.inputs import IMAGE_BYTES, FilePath, input_name, read_input

# Cameras make 100 megapixels; 200 of them decoded are 600 MB. (Pillow itself stops at 179 for WebP.)
MAX_MEGAPIXELS = 200
EXIF_PREFIX = b"Exif\0\0"
_READERS: dict[str, type[ImageFile]] = {
    "PNG": PngImageFile,
    "JPEG": JpegImageFile,
    "WebP": WebPImageFile,
    "BMP": BmpImageFile,
}


@dataclass(frozen=True, eq=False)
class DecodedFile:
    """An upright image in memory, and facts about the file that Pillow's mode does not hold."""

    image: PilImage.Image
    format: str  # a key of _READERS
    layout: str  # Pillow's raw mode: "L;4" is a 4-bit gray PNG, which arrives as mode "L", scaled
    exif: bytes | None  # as it is written back
    icc_profile: bytes | None
    orientation: int  # of the EXIF block, 1..8; the image has been turned by it
    notes: tuple[str, ...]

    @property
    def wide(self) -> bool:
        """Whether the file has 16 bits per channel (of RGB, Pillow silently keeps 8)."""
        return self.format == "PNG" and ";16" in self.layout


def decode_image(path: FilePath, content: bytes | None = None) -> DecodedFile:
    """Read an image file, check it and turn it upright.

    Args:
        path: a PNG, JPEG, WebP or BMP file, "-" for standard input.
        content: the bytes of the file if they are in memory already; `path` is then only used in messages.

    Raises:
        InputError: the file cannot be read or decoded, is too large, or is animated.
    """
    name = input_name(path)
    content = read_input(path, IMAGE_BYTES) if content is None else content
    format = format_of(content, name)
    file = sanitize(content, format, name)
    notes = list(file.notes)
    # The reader's class instead of PilImage.open: no other plugin can be reached, and Pillow's limit for decompression
    # bombs, a global lower than ours, is left alone.
    with decode_errors(name):
        image = _READERS[format](io.BytesIO(file.content))
    _check_extent(image, name)
    layout = _layout(image)
    with decode_errors(name):
        try:
            image.load()
        except OSError:
            complete = _without_end_marker(file.content, format)
            if complete is None:
                raise
            image = complete
            notes.append(f"{name} lacks the marker at its end; all of its pixels are there")
    orientation, exif, more = _metadata(image, name)
    notes += more
    profile = file.icc_profile if format == "PNG" else image.info.get("icc_profile")
    turn = _TURNS.get(orientation)
    if turn is not None:
        notes.insert(0, f"{name} is turned upright (EXIF {orientation})")
    upright = image if turn is None else image.transpose(turn)
    return DecodedFile(upright, format, layout, exif, profile, orientation, tuple(notes))


def image_size(path: FilePath, content: bytes) -> tuple[int, int]:
    """Return width and height of an image file as its header states them, without decoding its pixels.

    Raises:
        InputError: as `decode_image`, for everything that shows before the pixels are decoded.
    """
    name = input_name(path)
    format = format_of(content, name)
    file = sanitize(content, format, name)
    with decode_errors(name):
        image = _READERS[format](io.BytesIO(file.content))
    _check_extent(image, name)
    width, height = image.size
    return width, height


def _without_end_marker(content: bytes, format: str) -> ImageFile | None:
    """The image of a JPEG that lacks nothing but its end marker; None for other files."""
    versions = complete_jpeg(content) if format == "JPEG" else None
    if versions is None:
        return None
    first, second = (JpegImageFile(io.BytesIO(version)) for version in versions)
    return first if first.tobytes() == second.tobytes() else None


def decode_ids(path: FilePath, content: bytes | None) -> DecodedFile:
    """Decode a PNG whose values are ids.

    Args:
        path: Of the file, for messages and, without `content`, for reading.
        content: Of the file, where it has been read.

    Raises:
        InputError: As `decode_image`, and for formats that do not keep ids.
    """
    file = decode_image(path, content)
    if file.format != "PNG":
        raise InputError(
            f"{path} is a {file.format} file; ids survive only in PNG",
            "save the original map as PNG: a lossy copy already holds wrong ids",
        )
    return file


def _check_extent(image: ImageFile, path: FilePath) -> None:
    width, height = image.size
    if width * height > MAX_MEGAPIXELS * 1_000_000:
        raise InputError(
            f"{path} is {width}×{height}, {width * height / 1e6:.0f} megapixels; at most {MAX_MEGAPIXELS} are read",
            "crop or shrink it first",
        )
    if getattr(image, "is_animated", False):
        raise InputError(f"{path} is an animation with several frames", "save one frame as an image")


def _layout(image: ImageFile) -> str:
    """The raw mode that the file's pixels are in; "" where Pillow does not decode in tiles (WebP)."""
    if not image.tile:
        return ""
    arguments = image.tile[0].args
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)


@contextmanager
def io_errors(path: Path, verb: str) -> Iterator[None]:
    """Translate errors of the operating system into an InputError about the file."""
    try:
        yield
    except FileNotFoundError as exc:
        raise InputError(f"there is no file {path}", f"looked in {path.absolute().parent}") from exc
    except IsADirectoryError as exc:
        raise InputError(f"{path} is a folder, not an image", "name a file in it") from exc
    except PermissionError as exc:
        raise InputError(f"permission to {verb} {path} is denied", "check its owner and mode") from exc
    except (OSError, ValueError) as exc:  # ValueError: a zero byte in the name
        raise InputError(f"cannot {verb} {path}: {getattr(exc, 'strerror', None) or exc}") from exc


@contextmanager
def decode_errors(path: FilePath) -> Iterator[None]:
    """Translate errors of a decoder into an InputError about the file."""
    try:
        yield
    except (MemoryError, InputError):
        raise
    except PilImage.DecompressionBombError as exc:
        raise InputError(f"{path} has too many pixels: {exc}", "crop or shrink it first") from exc
    except (
        Exception
    ) as exc:  # on hostile bytes decoders raise many types: OSError, SyntaxError, struct.error, zlib.error
        raise InputError(f"{path} is truncated or damaged: {exc}", "copy or export it again") from exc


# The transposition that undoes each EXIF orientation.
_TURNS = {
    2: PilImage.Transpose.FLIP_LEFT_RIGHT,
    3: PilImage.Transpose.ROTATE_180,
    4: PilImage.Transpose.FLIP_TOP_BOTTOM,
    5: PilImage.Transpose.TRANSPOSE,
    6: PilImage.Transpose.ROTATE_270,
    7: PilImage.Transpose.TRANSVERSE,
    8: PilImage.Transpose.ROTATE_90,
}
# The TIFF types that hold an integer: BYTE, SHORT, LONG, SLONG.
_INTEGERS = {1: "B", 3: "H", 4: "I", 9: "i"}
_ORIENTATION, _THUMBNAIL_AT, _THUMBNAIL_LENGTH = 0x0112, 0x0201, 0x0202


def _metadata(image: ImageFile, path: FilePath) -> tuple[int, bytes | None, tuple[str, ...]]:
    """The orientation, the EXIF block as it is written back, and notes on what is lost."""
    notes = []
    if image.info.get("xmp"):
        notes.append(f"the XMP metadata of {path} is not kept")
    if "mp" in image.info:
        notes.append(f"{path} holds further images (a preview or depth map) after the first; they are not kept")
    block = image.info.get("exif")
    if not block:
        return 1, None, tuple(notes)
    try:
        orientation, exif = _upright_exif(block)
    except (KeyError, struct.error):
        notes.append(f"the EXIF metadata of {path} is damaged and is not kept")
        return 1, None, tuple(notes)
    if orientation not in range(1, 9):
        notes.append(f"the EXIF orientation of {path} is {orientation}, which is undefined; it is not turned")
        orientation = 1
    return orientation, exif, tuple(notes)


def _upright_exif(block: bytes) -> tuple[int, bytes]:
    """The orientation that an EXIF block states, and the block with orientation 1 and without its thumbnail.

    The block is changed in place, not rewritten, because maker notes hold absolute offsets. The thumbnail is removed
    because it would still show what the edit removed. Raises KeyError or struct.error for damaged blocks.
    """
    while block.startswith(EXIF_PREFIX):
        block = block[len(EXIF_PREFIX) :]
    tiff = bytearray(block)
    order = {b"II*\0": "<", b"MM\0*": ">"}[bytes(tiff[:4])]
    (first,) = struct.unpack_from(f"{order}I", tiff, 4)
    entries, next_at = _directory(tiff, order, first)
    orientation = 1
    if _ORIENTATION in entries:
        at = entries[_ORIENTATION]
        (kind,) = struct.unpack_from(f"{order}H", tiff, at - 6)
        form = order + _INTEGERS.get(kind, "H")
        (orientation,) = struct.unpack_from(form, tiff, at)
        tiff[at : at + 4] = struct.pack(form, 1).ljust(4, b"\0")
    if next_at + 4 <= len(tiff):
        (thumbnail,) = struct.unpack_from(f"{order}I", tiff, next_at)
        struct.pack_into(f"{order}I", tiff, next_at, 0)
        if thumbnail:
            _blank_thumbnail(tiff, order, thumbnail)
    return orientation, EXIF_PREFIX + bytes(tiff)


def _directory(tiff: bytearray, order: str, at: int) -> tuple[dict[int, int], int]:
    """Offsets of the value field of every tag of a TIFF directory, and of the pointer to the next directory."""
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
