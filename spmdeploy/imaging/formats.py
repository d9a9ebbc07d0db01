"""Recognizes image formats by content, and repairs defects that viewers tolerate but decoders refuse."""

from __future__ import annotations

import re
import struct
import zlib
from typing import NamedTuple

from spmdeploy.errors import InputError
from spmdeploy.inputs import FilePath

READABLE = "PNG, JPEG, WebP or BMP"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
LARGE_TEXT = 1024
"""Bytes of a text chunk above which a note reports that it is not kept: workflows and prompts are that long."""
MAX_ICC_BYTES = 64 << 20
# Cameras and web servers write up to about 12 scans. 2,500 scans in a file of 1 MB take a minute to decode.
MAX_JPEG_SCANS = 100
# Pixels times scans. 200 megapixels in 12 scans take about as long as this.
MAX_JPEG_WORK = 2_500_000_000

_EXPORT = "open it in an image editor and export it as PNG"
_OTHER_FORMATS: tuple[tuple[re.Pattern[bytes], str, str], ...] = (
    (re.compile(rb"II\*\0|MM\0\*|II\+\0|MM\0\+"), "a TIFF file", _EXPORT),
    (re.compile(rb"GIF8[79]a"), "a GIF file", _EXPORT),
    (re.compile(rb".{4}ftyp(?:heic|heix|hevc|hevx|heim|heis|mif1|msf1)", re.DOTALL), "a HEIC file", _EXPORT),
    (re.compile(rb".{4}ftypavi[fs]", re.DOTALL), "an AVIF file", _EXPORT),
    (re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "), "a JPEG XL file", _EXPORT),
    (re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"), "a JPEG 2000 file", _EXPORT),
    (re.compile(rb"8BPS"), "a Photoshop file", _EXPORT),
    (re.compile(rb"%PDF-"), "a PDF document", _EXPORT),
    (re.compile(rb"\s*(?:<\?xml[^>]*>\s*)?<svg", re.IGNORECASE), "an SVG drawing", _EXPORT),
    (re.compile(rb"version https://git-lfs"), "a Git LFS pointer, not the file itself", "fetch it: git lfs pull"),
    (
        re.compile(rb"\s*<(?:!doctype html|html|head)", re.IGNORECASE),
        "a web page, not an image: the download was answered with a page",
        "download the file itself",
    ),
    (re.compile(rb"PK\x03\x04"), "a zip archive", "unpack it first"),
)


class Sanitized(NamedTuple):
    """An image file that decoders accept."""

    content: bytes
    icc_profile: bytes | None
    """Of a PNG, decompressed; None for other formats or where there is none."""
    notes: tuple[str, ...]


def format_of(content: bytes, path: FilePath) -> str:
    """Return "PNG", "JPEG", "WebP" or "BMP".

    Raises:
        InputError: It is none of them; names the format if it is a known one.
    """
    if not content:
        raise InputError(f"{path} is an empty file (0 bytes)", "copy or export it again")
    if content.startswith(PNG_SIGNATURE):
        return "PNG"
    if content.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return "WebP"
    if content.startswith(b"BM"):
        return "BMP"
    for pattern, kind, hint in _OTHER_FORMATS:
        if pattern.match(content[:512]):
            raise InputError(f"{path} is {kind}; {READABLE} is read", hint)
    raise InputError(f"{path} is not a {READABLE} image, whatever its name says", "convert it to PNG")


def sanitize(content: bytes, format: str, path: FilePath) -> Sanitized:
    """Remove parts that viewers ignore but strict decoders refuse, and limit the work of decoding.

    PNG: ancillary chunks with a wrong checksum are dropped with a note, text chunks are dropped, and the ICC profile
    is read here because Pillow limits its size to that of text. JPEG: scans are counted; a missing end marker is added
    by `complete_jpeg`.

    Raises:
        InputError: the file is a JPEG with more scans than the limits allow, which would take minutes to decode.
    """
    if format == "PNG":
        return _sanitize_png(content, path)
    if format == "JPEG":
        _check_scans(content, path)
    return Sanitized(content, None, ())


def _sanitize_png(content: bytes, path: FilePath) -> Sanitized:
    kept, notes, profile, at, start = [], [], None, len(PNG_SIGNATURE), 0
    while at + 12 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        end = at + 12 + length
        if end > len(content):
            break
        data = content[at + 8 : end - 4]
        drop = False
        if kind[0] & 0x20:  # an ancillary chunk; critical ones are left to the decoder
            name = kind.decode("ascii", "replace")
            if zlib.crc32(data, zlib.crc32(kind)) != int.from_bytes(content[end - 4 : end], "big"):
                drop = True
                notes.append(f"the {name} chunk of {path} has a wrong checksum and is ignored")
            elif kind == b"iCCP":
                drop, profile = True, _icc_profile(data)
                if profile is None:
                    notes.append(f"the color profile of {path} is damaged and is not kept")
            elif kind in (b"tEXt", b"zTXt", b"iTXt"):
                drop = True  # text is not written back, and Pillow refuses files with more than 1 MB of text
                notes += _text_note(data, path)
        if drop:
            kept.append(content[start:at])
            start = end
        at = end
    if not start:
        return Sanitized(content, profile, tuple(notes))
    kept.append(content[start:])
    return Sanitized(b"".join(kept), profile, tuple(notes))


def _icc_profile(data: bytes) -> bytes | None:
    """The profile of an iCCP chunk: a name, a zero byte, the compression method 0 and a zlib stream."""
    _, separator, rest = data.partition(b"\0")
    if not separator or rest[:1] != b"\0":
        return None
    inflate = zlib.decompressobj()
    try:
        profile = inflate.decompress(rest[1:], MAX_ICC_BYTES)
    except zlib.error:
        return None
    return profile if inflate.eof else None


def _text_note(data: bytes, path: FilePath) -> list[str]:
    """Notes about a text chunk that is dropped: none for short ones."""
    keyword = data.split(b"\0", 1)[0]
    if keyword == b"XML:com.adobe.xmp":
        return [f"the XMP metadata of {path} is not kept"]
    if keyword == b"Raw profile type exif":
        return [
            f"{path} holds EXIF in a text chunk, as old versions of ImageMagick write it; it is not kept, and the "
            "image is not turned by it"
        ]
    if len(data) > LARGE_TEXT:
        return [f"the text {keyword.decode('latin-1')[:79]!r} of {path} is not kept"]
    return []


_SEGMENT_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}


def _check_scans(content: bytes, path: FilePath) -> None:
    scans, pixels, at = 0, 0, 2
    marker = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
    while at + 4 <= len(content) and scans <= MAX_JPEG_SCANS:
        if content[at] != 0xFF:
            found = marker.search(content, at)  # entropy-coded data: every 0xFF in it is followed by 0 or a restart
            if found is None:
                break
            at = found.start()
            continue
        kind = content[at + 1]
        if kind == 0xFF:
            at += 1
            continue
        if kind == 0xD9:
            break
        if kind in _SEGMENT_WITHOUT_LENGTH or kind == 0x00:
            at += 2
            continue
        (length,) = struct.unpack_from(">H", content, at + 2)
        if kind in (0xC0, 0xC1, 0xC2) and at + 9 <= len(content):
            height, width = struct.unpack_from(">HH", content, at + 5)
            pixels = height * width
        if kind == 0xDA:
            scans += 1
            found = marker.search(content, at + 2 + max(length, 2))
            if found is None:
                break
            at = found.start()
            continue
        at += 2 + max(length, 2)
    if scans > MAX_JPEG_SCANS or scans * pixels > MAX_JPEG_WORK:
        count = f"more than {MAX_JPEG_SCANS}" if scans > MAX_JPEG_SCANS else str(scans)
        raise InputError(
            f"{path} is a JPEG with {count} scans; decoding it would take minutes", "save it as PNG or as baseline JPEG"
        )


def complete_jpeg(content: bytes) -> tuple[bytes, bytes] | None:
    """Return two versions of a JPEG that lacks its end marker, or None if it has one.

    Both get the marker, the second also some bits before it. A decoder that has all image data ignores these, so equal
    pixels prove that only the marker was missing.
    """
    if b"\xff\xd9" in content[-64:]:
        return None
    body = content[:-1] if content.endswith(b"\xff") else content
    return body + b"\xff\xd9", body + b"\x55\xaa\x33\xcc" * 16 + b"\xff\xd9"
