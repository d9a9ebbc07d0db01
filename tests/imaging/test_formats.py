"""Image files as other programs write them, and files that are something else."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, PngImagePlugin

from spmdeploy.errors import InputError
from spmdeploy.imaging import formats
from spmdeploy.imaging.files import read_labels, read_photo
from spmdeploy.imaging.mask_files import read_mask_file
from spmdeploy.labels import class_table

SCENE = np.stack([*np.meshgrid(np.arange(40) * 5, np.arange(24) * 9, indexing="xy"), np.full((24, 40), 60)], -1)
SCENE = SCENE.astype(np.uint8)


def encoded(pixels: np.ndarray, format: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format, **options)
    return stream.getvalue()


def chunk(kind: bytes, data: bytes, checksum: int | None = None) -> bytes:
    checksum = zlib.crc32(kind + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def with_chunk(content: bytes, extra: bytes) -> bytes:
    """The PNG with a further chunk after its header."""
    return content[:33] + extra + content[33:]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"II*\0" + bytes(20), "a TIFF file"),
        (b"GIF89a" + bytes(20), "a GIF file"),
        (b"\0\0\0\x18ftypheic" + bytes(20), "a HEIC file"),
        (b"\0\0\0\x18ftypavif" + bytes(20), "an AVIF file"),
        (b"%PDF-1.7\n", "a PDF document"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>", "a web page"),
        (b"PK\x03\x04", "a zip archive"),
    ],
)
def test_format_of_other_content_names_the_format(content: bytes, kind: str) -> None:
    with pytest.raises(InputError, match=kind) as caught:
        read_photo("a.png", content)
    assert caught.value.hint


def test_read_photo_large_text_chunk_is_dropped_with_note() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 3_000_000, zip=True)
    photo = read_photo("a.png", encoded(SCENE, pnginfo=text))
    np.testing.assert_array_equal(photo.pixels, SCENE)
    assert photo.notes == ("the text 'workflow' of a.png is not kept",)


def test_read_photo_large_icc_profile_is_kept() -> None:
    profile = bytes(16) + b"RGB " + np.random.default_rng(0).integers(0, 255, 2_000_000, np.uint8).tobytes()
    assert read_photo("a.png", encoded(SCENE, icc_profile=profile)).icc_profile == profile


def test_read_photo_bad_checksum_of_ancillary_chunk_is_noted() -> None:
    photo = read_photo("a.png", with_chunk(encoded(SCENE), chunk(b"iCCP", b"p\0\0damaged", checksum=1)))
    np.testing.assert_array_equal(photo.pixels, SCENE)
    assert photo.icc_profile is None
    assert photo.notes == ("the iCCP chunk of a.png has a wrong checksum and is ignored",)


def test_read_photo_bad_checksum_of_critical_chunk_is_refused() -> None:
    content = bytearray(encoded(SCENE))
    content[29] ^= 1  # the checksum of IHDR
    with pytest.raises(InputError, match="truncated or damaged"):
        read_photo("a.png", bytes(content))


def test_read_photo_raw_profile_exif_is_noted() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Raw profile type exif", "\nexif\n  4\n49492a00\n")
    (note,) = read_photo("a.png", encoded(SCENE, pnginfo=text)).notes
    assert "not turned" in note


def test_read_photo_exif_orientation_as_long_is_applied() -> None:
    block = b"Exif\0\0II*\0" + struct.pack("<IHHHIII", 8, 1, 0x0112, 4, 1, 6, 0)
    photo = read_photo("a.jpg", encoded(SCENE, "JPEG", exif=block))
    assert photo.pixels.shape == (40, 24, 3) and photo.orientation == 6
    assert photo.exif == b"Exif\0\0II*\0" + struct.pack("<IHHHIII", 8, 1, 0x0112, 4, 1, 1, 0)


def test_read_photo_exif_orientation_out_of_range_is_noted_and_reset() -> None:
    block = b"Exif\0\0II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, 77, 0, 0)
    photo = read_photo("a.jpg", encoded(SCENE, "JPEG", exif=block))
    assert photo.pixels.shape == (24, 40, 3) and "orientation of a.jpg is 77" in photo.notes[0]
    assert photo.exif is not None and photo.exif[-8:-6] == b"\x01\0"


@pytest.mark.parametrize("progressive", [False, True])
def test_read_photo_jpeg_without_end_marker_is_read_with_note(progressive: bool) -> None:
    whole = encoded(SCENE, "JPEG", progressive=progressive)
    photo = read_photo("a.jpg", whole[:-2])
    np.testing.assert_array_equal(photo.pixels, read_photo("a.jpg", whole).pixels)
    assert photo.notes == ("a.jpg lacks the marker at its end; all of its pixels are there",)


@pytest.mark.parametrize("missing", [6, 20, 60])
def test_read_photo_jpeg_without_last_pixels_is_refused(missing: int) -> None:
    with pytest.raises(InputError, match="truncated"):
        read_photo("a.jpg", encoded(SCENE, "JPEG")[:-missing])


def test_read_photo_jpeg_with_thousands_of_scans_is_refused() -> None:
    content = encoded(SCENE, "JPEG", progressive=True)
    start = content.index(b"\xff\xda")
    scan = content[start : content.index(b"\xff\xda", start + 2)]
    with pytest.raises(InputError, match="more than 100 scans"):
        read_photo("a.jpg", content[:start] + scan * 2500 + content[start:])


def test_sanitize_many_pixels_and_scans_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_JPEG_WORK", 40 * 24 * 3)
    with pytest.raises(InputError, match="scans"):
        read_photo("a.jpg", encoded(SCENE, "JPEG", progressive=True))
    read_photo("a.jpg", encoded(SCENE, "JPEG"))


def test_read_photo_bmp_with_empty_alpha_is_opaque() -> None:
    header = b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + 108)
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    info = struct.pack("<IiiHHIIiiII", 108, 2, -1, 1, 32, 3, 0, 0, 0, 0, 0) + masks
    content = header + info + bytes(14 + 108 - len(header) - len(info)) + bytes([1, 2, 3, 0, 4, 5, 6, 0])
    photo = read_photo("a.bmp", content)
    assert photo.alpha is None and photo.pixels.tolist() == [[[3, 2, 1], [6, 5, 4]]]
    assert "read as opaque" in photo.notes[0]


def test_read_photo_more_transparency_than_palette_is_refused() -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 8, 3, 0, 0, 0)) + chunk(b"PLTE", bytes(3))
    body = chunk(b"tRNS", bytes(70_000)) + chunk(b"IDAT", zlib.compress(b"\0\0\xff")) + chunk(b"IEND", b"")
    with pytest.raises(InputError, match="damaged"):
        read_photo("a.png", formats.PNG_SIGNATURE + header + body)


def reordered_map(order: list[int]) -> bytes:
    """A palette PNG of classes in their colors, with index k standing for class `order[k]`."""
    table = class_table("street")
    indices = np.arange(len(order), dtype=np.uint8)[None].repeat(4, axis=0)
    image = Image.fromarray(indices, "P")
    image.putpalette([channel for label in order for channel in table.classes[label].color])
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def test_read_labels_reordered_palette_is_refused() -> None:
    table = class_table("street")
    assert read_labels("a.png", reordered_map([0, 1, 2, 3]), table)[0].tolist() == [0, 1, 2, 3]
    with pytest.raises(InputError, match=r"index 0 is shown in the color of pole \(id 2 in street\)") as caught:
        read_labels("a.png", reordered_map([2, 1, 0, 3]), table)
    assert caught.value.hint and "labels convert" in caught.value.hint


def test_read_labels_three_equal_channels_are_ids() -> None:
    ids = np.arange(12, dtype=np.uint8).reshape(3, 4)
    rgb = np.dstack([ids, ids, ids])
    for pixels in (rgb, np.dstack([rgb, np.full_like(ids, 255)])):
        np.testing.assert_array_equal(read_labels("a.png", encoded(pixels)), ids)


def circle(side: int = 64) -> Image.Image:
    """An antialiased disk, drawn four times as large and shrunk."""
    image = Image.new("L", (4 * side, 4 * side))
    ImageDraw.Draw(image).ellipse((40, 40, 200, 200), fill=255)
    return image.resize((side, side), Image.Resampling.BOX)


def test_read_mask_antialiased_edge_is_cut_with_note() -> None:
    values = np.asarray(circle())
    mask, notes = read_mask_file("a.png", encoded(values))
    np.testing.assert_array_equal(mask, values >= 128)
    assert len(notes) == 1 and "threshold is 128" in notes[0]


def test_read_mask_wide_gradient_needs_a_threshold() -> None:
    ramp = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (8, 1))
    with pytest.raises(InputError, match="not a mask") as caught:
        read_mask_file("a.png", encoded(ramp))
    assert caught.value.hint and "--mask-threshold" in caught.value.hint
    np.testing.assert_array_equal(read_mask_file("a.png", encoded(ramp), threshold=100).mask, ramp >= 100)


def test_read_mask_shape_in_alpha_of_one_color_is_the_mask() -> None:
    alpha = np.where(np.asarray(circle()) >= 128, 255, 0).astype(np.uint8)
    black = np.zeros_like(alpha)
    mask, notes = read_mask_file("a.png", encoded(np.dstack([black, black, black, alpha])))
    np.testing.assert_array_equal(mask, alpha == 255)
    assert "opaque pixels" in notes[0]


def test_read_mask_transparent_part_of_a_photo_needs_an_option() -> None:
    alpha = np.full(SCENE.shape[:2], 255, np.uint8)
    alpha[4:9, 6:12] = 0
    content = encoded(np.dstack([SCENE, alpha]))
    with pytest.raises(InputError, match="partly transparent") as caught:
        read_mask_file("a.png", content)
    assert caught.value.hint and "--mask-alpha transparent" in caught.value.hint
    np.testing.assert_array_equal(read_mask_file("a.png", content, alpha="transparent").mask, alpha == 0)
    np.testing.assert_array_equal(read_mask_file("a.png", content, alpha="opaque").mask, alpha == 255)
    with pytest.raises(InputError, match="no alpha channel"):
        read_mask_file("a.png", encoded(SCENE), alpha="opaque")


def test_read_photo_path_stands_for_content(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(SCENE))
    np.testing.assert_array_equal(read_photo(tmp_path / "a.png").pixels, SCENE)
