"""Image files to upright images in memory, with limits on size and errors that name the file."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from spmdeploy.errors import InputError

FilePath: TypeAlias = str | os.PathLike[str]

# Cameras make 100 megapixels; 200 of them decoded are 600 MB. (Pillow itself stops at 179 for WebP.)
MAX_MEGAPIXELS = 200
EXIF_PREFIX = b"Exif\0\0"
_READERS: dict[str, type[ImageFile]] = {
    "PNG": PngImageFile,
    "JPEG": JpegImageFile,
    "WebP": WebPImageFile,
    "BMP": BmpImageFile,
}
_READABLE = "PNG, JPEG, WebP or BMP"


@dataclass(frozen=True, eq=False)
class DecodedFile:
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


def decode_image(path: FilePath, content: bytes | None) -> DecodedFile:
    """Read, check and turn upright. InputError for whatever a file can have wrong before its mode matters.

    content: the file's bytes where they are in memory already; `path` is then only what messages call it.
    """
    path = Path(path)
    with io_errors(path, "read"), path.open("rb") if content is None else io.BytesIO(content) as stream:
        start = stream.read(16)
        stream.seek(0)
        format = _format_of(start, path)
        # The reader's class instead of Image.open: no other plugin can be reached, and Pillow's limit for
        # decompression bombs, a global lower than ours, is left alone.
        with decode_errors(path):
            image = _READERS[format](stream)
        _check_extent(image, path)
        layout = _layout(image)
        with decode_errors(path):
            image.load()
    orientation, exif, notes = _metadata(image, path)
    turn = _TURNS.get(orientation)
    if turn is None:
        return DecodedFile(image, format, layout, exif, notes)
    turned = image.transpose(turn)
    return DecodedFile(turned, format, layout, exif, (f"{path} is turned upright (EXIF {orientation})", *notes))


def decode_ids(path: FilePath, content: bytes | None) -> DecodedFile:
    file = decode_image(path, content)
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
def io_errors(path: Path, verb: str) -> Iterator[None]:
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
def decode_errors(path: Path) -> Iterator[None]:
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
