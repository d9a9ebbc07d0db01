"""Image files: exact reading, refused files, and atomic writing."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageCms

from spmdeploy.errors import InputError
from spmdeploy.imaging import decode
from spmdeploy.imaging.files import (
    Photo,
    check_output,
    read_instances,
    read_labels,
    read_photo,
    write_image,
    write_instances,
    write_photo,
)
from spmdeploy.imaging.mask_files import read_mask

READERS: tuple[Callable[..., object], ...] = (read_photo, read_labels, read_instances, read_mask)
# A smooth image with four different corners: JPEG nearly preserves it, and every rotation differs.
SCENE = np.stack([*np.meshgrid(np.arange(40) * 5, np.arange(24) * 9, indexing="xy"), np.full((24, 40), 60)], -1)
SCENE = SCENE.astype(np.uint8)
HALF = np.zeros((16, 32), bool)
HALF[:, 16:] = True
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def save(path: Path, image: np.ndarray | Image.Image, **options: Any) -> Path:
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def refusal(read: Callable[..., object], path: Path) -> InputError | None:
    """The InputError of a reader, or None if it reads the file. Other exceptions fail the test."""
    try:
        read(path)
    except InputError as exc:
        return exc
    return None


def palette_png(path: Path, indices: np.ndarray, colors: list[tuple[int, int, int]], **options: Any) -> Path:
    image = Image.fromarray(indices.astype(np.uint8), "L")
    image.putpalette([channel for color in colors for channel in color])
    return save(path, image, **options)


def png_bytes(depth: int, color_type: int, width: int, height: int, rows: bytes) -> bytes:
    """A PNG of a bit depth that Pillow does not write. rows: a filter byte and the data each."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def exif_block(order: str, orientation: int, thumbnail: bytes = b"") -> bytes:
    """An EXIF block with a camera maker, an orientation and a thumbnail in the second directory."""
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8)
    second = 8 + 2 + 2 * 12 + 4
    first = struct.pack(order + "H", 2)
    first += struct.pack(order + "HHI4s", 0x010F, 2, 4, b"Cam\0")
    first += struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0)
    first += struct.pack(order + "I", second if thumbnail else 0)
    if not thumbnail:
        return b"Exif\0\0" + head + first
    rest = struct.pack(order + "H", 2)
    rest += struct.pack(order + "HHII", 0x0201, 4, 1, second + 2 + 2 * 12 + 4)
    rest += struct.pack(order + "HHII", 0x0202, 4, 1, len(thumbnail))
    return b"Exif\0\0" + head + first + rest + bytes(4) + thumbnail


@pytest.mark.parametrize("read", READERS)
def test_read_other_content_names_what_it_is(read: Callable[[Path], object], tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("I am a text, and long enough to have a signature\n")
    (tmp_path / "moving.gif").write_bytes(b"GIF89a" + bytes(40))
    problems = {
        "none.png": "there is no file",
        ".": "is a folder",
        "empty.png": r"empty file \(0 bytes\)",
        "text.png": "is not a PNG, JPEG, WebP or BMP image",
        "moving.gif": "is a GIF file",
    }
    for name, problem in problems.items():
        with pytest.raises(InputError, match=problem) as caught:
            read(tmp_path / name)
        assert str(tmp_path / name) in caught.value.problem and caught.value.hint
        assert caught.value.exit_code == 7


def test_read_content_in_memory_ignores_path(tmp_path: Path) -> None:
    ids = save(tmp_path / "ids.png", SCENE[..., 0]).read_bytes()
    mask = save(tmp_path / "mask.png", Image.fromarray(HALF)).read_bytes()
    np.testing.assert_array_equal(read_photo("no.zip/a.png", ids).pixels[..., 0], SCENE[..., 0])
    np.testing.assert_array_equal(read_labels("no.zip/a.png", ids), SCENE[..., 0])
    np.testing.assert_array_equal(read_instances("no.zip/a.png", ids), SCENE[..., 0])
    np.testing.assert_array_equal(read_mask("no.zip/a.png", mask), HALF)
    for read in READERS:
        with pytest.raises(InputError, match=r"^no\.zip/a\.png is truncated or damaged"):
            read("no.zip/a.png", ids[:60])


def test_read_without_permission_names_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(path: Path, *_: object) -> None:  # instead of chmod, which does not stop root
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", deny)
    with pytest.raises(InputError, match=r"permission to read .*a\.png is denied"):
        read_photo(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_read_truncated_file_is_refused_unless_complete(suffix: str, data: st.DataObject, tmp_path: Path) -> None:
    whole = save(tmp_path / f"whole.{suffix}", SCENE).read_bytes()
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(whole[: data.draw(st.integers(1, len(whole) - 1))])
    error = refusal(read_photo, path)
    if error is None:  # a cut behind the last pixel may be accepted, a missing pixel never
        np.testing.assert_array_equal(read_photo(path).pixels, read_photo(tmp_path / f"whole.{suffix}").pixels)
    else:
        assert str(path) in error.problem and error.hint


def test_read_half_a_photo_is_refused(tmp_path: Path) -> None:
    for suffix in ("png", "jpg", "webp", "bmp"):
        path = save(tmp_path / f"a.{suffix}", SCENE)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(InputError, match="truncated or damaged"):
            read_photo(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(8, 200), value=st.integers(0, 255), suffix=st.sampled_from(["png", "jpg", "webp", "bmp"]))
def test_read_damaged_bytes_raises_only_input_error(at: int, value: int, suffix: str, tmp_path: Path) -> None:
    content = bytearray(save(tmp_path / f"whole.{suffix}", SCENE).read_bytes())
    assume(at < len(content))
    content[at] = value
    path = tmp_path / f"damaged.{suffix}"
    path.write_bytes(content)
    for read in READERS:
        error = refusal(read, path)
        assert error is None or str(path) in error.problem


@pytest.mark.parametrize("read", READERS)
def test_read_decompression_bomb_is_refused(read: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_bytes(8, 0, 20000, 10001, b""))
    with pytest.raises(InputError, match=r"20000×10001, 200 megapixels; at most 200"):
        read(path)


def test_read_hundred_megapixels_succeeds(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(png_bytes(1, 0, 10000, 10000, (b"\0" + b"\x0f" * 1250) * 10000))
    mask = read_mask(path)  # one bit per pixel keeps the test fast
    assert mask.shape == (10000, 10000) and mask[:, 4:8].all() and not mask[:, :4].any()


PEAK = (
    "import resource, sys\nfrom spmdeploy.imaging.files import read_photo\n"
    "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
    "read_photo('small.png'); before = peak(); read_photo('large.png'); print(peak() - before)"
)


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of the peak differs")
@pytest.mark.parametrize(("kind", "channels"), [(2, 3), (6, 4)], ids=["RGB", "RGBA"])
def test_read_photo_takes_little_more_memory_than_its_pixels(kind: int, channels: int, tmp_path: Path) -> None:
    for name, side in (("small", 8), ("large", 4000)):
        (tmp_path / f"{name}.png").write_bytes(
            png_bytes(8, kind, side, side, (b"\0" + b"\x55" * side * channels) * side)
        )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", PEAK], cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert int(done.stdout) * 1024 < 10 * 4000 * 4000  # Pillow has 4 bytes for a pixel, the result 3 or 4


def test_read_webp_bomb_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(SCENE).save(buffer, "WebP", lossless=True)
    content = bytearray(buffer.getvalue())
    content[21:25] = struct.pack("<I", (16383 - 1) | (16383 - 1) << 14)  # VP8L: 14 bits of width, 14 of height
    path = tmp_path / "bomb.webp"
    path.write_bytes(content)
    with pytest.raises(InputError, match="pixels"):
        read_photo(path)


@pytest.mark.parametrize("suffix", ["png", "webp"])
@pytest.mark.parametrize("read", READERS)
def test_read_animation_is_refused(read: Callable[[Path], object], suffix: str, tmp_path: Path) -> None:
    frames = [Image.fromarray(SCENE), Image.fromarray(SCENE[::-1].copy())]
    path = save(tmp_path / f"a.{suffix}", frames[0], save_all=True, append_images=frames[1:])
    with pytest.raises(InputError, match="animation"):
        read(path)


@pytest.mark.parametrize("suffix", ["png", "webp", "bmp"])
def test_read_photo_lossless_is_exact(suffix: str, tmp_path: Path) -> None:
    photo = read_photo(save(tmp_path / f"a.{suffix}", SCENE, **({"lossless": True} if suffix == "webp" else {})))
    np.testing.assert_array_equal(photo.pixels, SCENE)
    assert photo.pixels.flags.writeable and photo.pixels.dtype == np.uint8
    assert (photo.alpha, photo.icc_profile, photo.exif, photo.notes) == (None, None, None, ())


def test_read_photo_color_order_is_rgb(tmp_path: Path) -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    image[..., 0] = 255
    (tmp_path / "red.png").write_bytes(png_bytes(8, 2, 1, 1, b"\0\xff\0\0"))
    assert read_photo(tmp_path / "red.png").pixels.tolist() == [[[255, 0, 0]]]
    write_image(tmp_path / "out.png", image)
    with Image.open(tmp_path / "out.png") as written:
        assert written.getpixel((0, 0)) == (255, 0, 0)


def test_read_photo_gray_or_palette_becomes_rgb_with_note(tmp_path: Path) -> None:
    gray = read_photo(save(tmp_path / "gray.png", SCENE[..., 0]))
    np.testing.assert_array_equal(gray.pixels, np.repeat(SCENE[..., :1], 3, axis=2))
    assert "is gray" in gray.notes[0]
    colors = [(1, 2, 3), (250, 128, 7)]
    palette = read_photo(palette_png(tmp_path / "p.png", np.eye(4), colors))
    np.testing.assert_array_equal(palette.pixels, np.array(colors, np.uint8)[np.eye(4, dtype=int)])
    assert "palette" in palette.notes[0]
    (tmp_path / "bits.png").write_bytes(png_bytes(1, 0, 8, 1, b"\0\x0f"))
    assert read_photo(tmp_path / "bits.png").pixels[0, :, 2].tolist() == [0] * 4 + [255] * 4


def test_read_photo_transparency_is_kept(tmp_path: Path) -> None:
    alpha = (np.arange(24 * 40).reshape(24, 40) % 256).astype(np.uint8)
    for name, image in {"rgba": np.dstack([SCENE, alpha]), "la": np.dstack([SCENE[..., 1], alpha])}.items():
        photo = read_photo(save(tmp_path / f"{name}.png", image))
        np.testing.assert_array_equal(photo.alpha, alpha)
        np.testing.assert_array_equal(photo.pixels[..., 1], SCENE[..., 1])
    keyed = read_photo(save(tmp_path / "key.png", SCENE, transparency=(0, 0, 60)))
    assert keyed.alpha is not None and (keyed.alpha == 0).sum() == 1 and keyed.alpha[0, 0] == 0
    palette = read_photo(palette_png(tmp_path / "p.png", np.eye(4), [(1, 2, 3), (4, 5, 6)], transparency=b"\x07\xff"))
    assert palette.alpha is not None and palette.alpha[0].tolist() == [255, 7, 7, 7]


def test_read_photo_unsupported_mode_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "cmyk.jpg", Image.new("CMYK", (8, 8)))
    save(tmp_path / "grey16.png", np.zeros((8, 8), np.uint16))
    (tmp_path / "rgb16.png").write_bytes(png_bytes(16, 2, 1, 1, b"\0" + bytes(6)))
    (tmp_path / "rgba16.png").write_bytes(png_bytes(16, 6, 1, 1, b"\0" + bytes(8)))
    problems = {"cmyk.jpg": "CMYK", "grey16.png": "16 bits", "rgb16.png": "16 bits", "rgba16.png": "16 bits"}
    for name, problem in problems.items():
        with pytest.raises(InputError, match=problem) as caught:
            read_photo(tmp_path / name)
        assert caught.value.hint and "convert" in caught.value.hint


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_read_photo_exif_orientation_is_applied(orientation: int, order: str, tmp_path: Path) -> None:
    upright = {
        1: SCENE,
        2: SCENE[:, ::-1],
        3: SCENE[::-1, ::-1],
        4: SCENE[::-1],
        5: SCENE.swapaxes(0, 1),
        6: SCENE.swapaxes(0, 1)[:, ::-1],  # a quarter turn clockwise
        7: SCENE.swapaxes(0, 1)[::-1, ::-1],
        8: SCENE.swapaxes(0, 1)[::-1],
    }[orientation]
    photo = read_photo(save(tmp_path / "a.png", SCENE, exif=exif_block(order, orientation)))
    np.testing.assert_array_equal(photo.pixels, upright)
    assert photo.exif == exif_block(order, 1)
    assert any("upright" in note for note in photo.notes) == (orientation != 1)


def test_read_maps_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = exif_block("<", 6)
    mask = np.zeros((4, 6), np.uint8)
    mask[0, 1] = 9
    path = save(tmp_path / "mask.png", mask, exif=exif)
    turned = np.rot90(mask, -1)
    np.testing.assert_array_equal(read_mask(path), turned == 9)
    np.testing.assert_array_equal(read_labels(path), turned)
    np.testing.assert_array_equal(read_instances(path), turned)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_write_photo_metadata_is_kept(suffix: str, tmp_path: Path) -> None:
    source = save(tmp_path / "in.jpg", SCENE, exif=exif_block(">", 6), icc_profile=SRGB)
    photo = read_photo(source)
    write_photo(tmp_path / f"out.{suffix}", photo)
    again = read_photo(tmp_path / f"out.{suffix}")
    assert again.icc_profile == SRGB
    assert again.exif == exif_block(">", 1)
    assert again.notes == ()  # upright already: it is not turned a second time
    with Image.open(tmp_path / f"out.{suffix}") as written:
        assert written.getexif()[0x010F] == "Cam"


def test_write_photo_exif_thumbnail_is_blanked(tmp_path: Path) -> None:
    secret = b"\xff\xd8 the removed car \xff\xd9"
    exif = exif_block("<", 1, secret)
    assert secret in exif
    photo = read_photo(save(tmp_path / "a.jpg", SCENE, exif=exif))
    assert photo.exif is not None and secret not in photo.exif and len(photo.exif) == len(exif)
    write_photo(tmp_path / "b.jpg", photo)
    assert secret not in (tmp_path / "b.jpg").read_bytes()
    with Image.open(tmp_path / "b.jpg") as written:
        assert written.getexif()[0x010F] == "Cam" and not written.getexif().get_ifd(1)


@given(st.binary(max_size=80))
def test_metadata_damaged_exif_is_dropped_with_note(tail: bytes) -> None:
    for block in (exif_block("<", 6, b"thumbnail")[: 6 + 8 + len(tail)] + tail, tail, b"Exif\0\0II*\0" + tail):
        image = Image.fromarray(SCENE)
        image.info["exif"] = block
        orientation, exif, notes = decode._metadata(image, Path("a.jpg"))  # type: ignore[arg-type]
        assert isinstance(orientation, int)
        assert exif is not None or notes or not block


def test_read_photo_lost_metadata_is_noted(tmp_path: Path) -> None:
    grey_profile = SRGB[:16] + b"GRAY" + SRGB[20:]
    cases = {
        "XMP": save(tmp_path / "xmp.jpg", SCENE, xmp=b"<x:xmpmeta/>"),
        "color profile": save(tmp_path / "gray.png", SCENE[..., 0], icc_profile=grey_profile),
        "EXIF metadata": save(tmp_path / "exif.jpg", SCENE, exif=b"Exif\0\0nonsense"),
        "further images": save(
            tmp_path / "two.mpo",
            Image.fromarray(SCENE),
            format="MPO",
            save_all=True,
            append_images=[Image.new("RGB", (8, 8))],
        ),
    }
    for text, path in cases.items():
        photo = read_photo(path)
        assert photo.pixels.shape == SCENE.shape
        assert any(text in note and "not kept" in note for note in photo.notes), (text, photo.notes)
        assert photo.icc_profile is None and photo.exif is None


@given(ids=hnp.arrays(np.uint8, (3, 5)))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_labels_write_then_read_is_identical(ids: np.ndarray, tmp_path: Path) -> None:
    write_image(tmp_path / "ids.png", ids, overwrite=True)
    np.testing.assert_array_equal(read_labels(tmp_path / "ids.png"), ids)
    np.testing.assert_array_equal(read_instances(tmp_path / "ids.png"), ids)
    save(tmp_path / "wide.png", ids.astype(np.uint16))
    np.testing.assert_array_equal(read_labels(tmp_path / "wide.png"), ids)


def test_read_labels_palette_returns_indices(tmp_path: Path) -> None:
    indices = np.arange(12).reshape(3, 4) % 5
    for k, colors in enumerate(([(255, 255, 255)] * 5, [(90 + i, 7, 200 - i) for i in range(5)])):
        path = palette_png(tmp_path / f"{k}.png", indices, colors)
        with Image.open(path) as written:
            assert written.mode == "P"
        np.testing.assert_array_equal(read_labels(path), indices)
        np.testing.assert_array_equal(read_instances(path), indices)


@pytest.mark.parametrize("color_type", [0, 3])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_read_labels_few_bits_are_not_scaled(depth: int, color_type: int, tmp_path: Path) -> None:
    ids = list(range(2**depth))
    packed = int("".join(f"{i:0{depth}b}" for i in ids).ljust(8, "0"), 2).to_bytes(max(len(ids) * depth // 8, 1), "big")
    content = png_bytes(depth, color_type, len(ids), 1, b"\0" + packed)
    if color_type == 3:
        plte = b"PLTE" + bytes(range(3 * len(ids)))
        plte = struct.pack(">I", 3 * len(ids)) + plte + struct.pack(">I", zlib.crc32(plte))
        content = content.replace(content[33:], plte + content[33:])
    (tmp_path / "few.png").write_bytes(content)
    assert read_labels(tmp_path / "few.png").tolist() == [ids]
    assert read_instances(tmp_path / "few.png").tolist() == [ids]


def test_read_labels_not_a_map_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "color.png", SCENE)
    save(tmp_path / "alpha.png", np.dstack([SCENE, SCENE[..., 0]]))
    save(tmp_path / "la.png", np.dstack([SCENE[..., 0], SCENE[..., 0]]))
    save(tmp_path / "lossy.jpg", SCENE[..., 0])
    save(tmp_path / "high.png", np.array([[3, 256, 26001]], np.uint16))
    (tmp_path / "rgb16.png").write_bytes(png_bytes(16, 2, 1, 1, b"\0" + bytes(6)))
    cases = {
        "color.png": "color image",
        "alpha.png": "partly transparent",
        "la.png": "partly transparent",
        "lossy.jpg": "only in PNG",
        "high.png": r"2 values \(256, 26001\)",
        "rgb16.png": "16-bit color or gray",
    }
    for name, problem in cases.items():
        with pytest.raises(InputError, match=problem) as caught:
            read_labels(tmp_path / name)
        assert name in caught.value.problem and caught.value.hint
    with pytest.raises(InputError) as caught:
        read_labels(tmp_path / "color.png")
    assert caught.value.hint and "spmdeploy labels convert" in caught.value.hint


def test_read_instances_both_datasets_are_read(tmp_path: Path) -> None:
    wide = np.array([[7, 26001], [33018, 65535]], np.uint16)
    instances = read_instances(save(tmp_path / "cityscapes.png", wide))
    assert instances.dtype == np.int32
    np.testing.assert_array_equal(instances, wide)
    ade = np.zeros((2, 2, 3), np.uint8)
    ade[..., 0], ade[..., 1] = 40, [[0, 1], [2, 3]]
    assert read_instances(save(tmp_path / "ade.png", ade)).tolist() == [[0, 1], [2, 3]]
    thrice = np.repeat(ade[..., 1:2], 3, axis=2)
    assert read_instances(save(tmp_path / "thrice.png", thrice)).tolist() == [[0, 1], [2, 3]]
    with pytest.raises(InputError, match="blue channel is not empty"):
        read_instances(save(tmp_path / "scene.png", SCENE))
    with pytest.raises(InputError, match="only in PNG"):
        read_instances(save(tmp_path / "lossy.jpg", SCENE))


@given(
    pixels=hnp.arrays(np.uint8, (5, 7, 3)),
    alpha=st.none() | hnp.arrays(np.uint8, (5, 7)),
    suffix=st.sampled_from([".png", ".webp", ".PNG"]),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_write_photo_png_and_webp_are_exact(
    pixels: np.ndarray, alpha: np.ndarray | None, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"a{suffix}"
    assert write_photo(path, Photo(pixels, alpha), overwrite=True) == ()
    again = read_photo(path)
    np.testing.assert_array_equal(again.pixels, pixels)
    if suffix != ".webp" or (alpha is not None and (alpha != 255).any()):  # WebP drops an opaque alpha channel
        np.testing.assert_array_equal(again.alpha, alpha)


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_write_photo_transparent_pixels_are_exact(suffix: str, tmp_path: Path) -> None:
    alpha = np.zeros(SCENE.shape[:2], np.uint8)
    alpha[4:9, 4:9] = 200
    write_photo(tmp_path / f"a.{suffix}", Photo(SCENE, alpha))
    np.testing.assert_array_equal(read_photo(tmp_path / f"a.{suffix}").pixels, SCENE)


def test_write_photo_jpeg_notes_what_is_lost(tmp_path: Path) -> None:
    photo = Photo(SCENE, np.full(SCENE.shape[:2], 9, np.uint8), exif=b"Exif\0\0" + bytes(70000))
    notes = write_photo(tmp_path / "a.jpg", photo)
    for text, note in zip(("not equal", "EXIF", "transparency"), notes, strict=True):
        assert text in note
    assert np.abs(read_photo(tmp_path / "a.jpg").pixels.astype(int) - SCENE).max() <= 8
    with Image.open(tmp_path / "a.jpg") as written:
        assert written.layer[0][1:3] == written.layer[1][1:3] == (1, 1)  # type: ignore[attr-defined]  # 4:4:4
    opaque = replace(photo, alpha=np.full(SCENE.shape[:2], 255, np.uint8), exif=None)
    assert len(write_photo(tmp_path / "b.jpeg", opaque)) == 1


def test_check_output_unusable_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken.png").write_bytes(b"mine")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    cases = {
        "taken.png": "exists already",
        "dangling.png": "exists already",
        "folder.png": "is a folder",
        "missing/a.png": "does not exist",
        "a.gif": "'.gif'",
        "a": "''",
    }
    for name, problem in cases.items():
        for write in (
            lambda path: write_photo(path, Photo(SCENE)),
            lambda path: write_image(path, SCENE),
            lambda path: check_output(path, False),
        ):
            with pytest.raises(InputError, match=problem) as caught:
                write(tmp_path / name)
            assert str(tmp_path / name) in caught.value.problem and caught.value.hint
    assert (tmp_path / "taken.png").read_bytes() == b"mine"
    with pytest.raises(InputError, match="one channel survives only in PNG"):
        write_image(tmp_path / "ids.jpg", SCENE[..., 0])
    with pytest.raises(InputError, match="at most 16383 pixels"):
        write_image(tmp_path / "long.webp", np.zeros((1, 16384, 3), np.uint8))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling.png", "folder.png", "taken.png"]


def test_instances_write_then_read_is_identical(tmp_path: Path) -> None:
    ids = np.array([[0, 7, 255, 256], [26001, 33999, 65534, 65535]], np.int32)
    write_instances(tmp_path / "ids.png", ids)
    assert (tmp_path / "ids.png").read_bytes()[24:26] == bytes([16, 0])  # bit depth, gray
    np.testing.assert_array_equal(read_instances(tmp_path / "ids.png"), ids)
    with pytest.raises(InputError, match="exists already"):
        write_instances(tmp_path / "ids.png", ids)
    for wrong in (-1, 65536):
        with pytest.raises(InputError, match=f"{wrong}.*16 bits hold 0 to 65535"):
            write_instances(tmp_path / "wrong.png", np.array([[wrong, 5]], np.int32))
    with pytest.raises(InputError, match="survive only in PNG"):
        write_instances(tmp_path / "ids.jpg", ids)
    assert [path.name for path in tmp_path.iterdir()] == ["ids.png"]


def test_write_overwrite_replaces_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"mine")
    write_image(path, SCENE, overwrite=True)
    np.testing.assert_array_equal(read_photo(path).pixels, SCENE)
    assert list(tmp_path.iterdir()) == [path]


def test_write_new_file_has_usual_mode(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    write_image(tmp_path / "a.png", SCENE)
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("taken", [False, True])
def test_write_failure_leaves_nothing(
    error: BaseException, taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Image.Image, stream: io.BytesIO, *_: object, **__: object) -> None:
        stream.write(b"half a pict")
        raise error

    path = tmp_path / "a.png"
    if taken:
        path.write_bytes(b"mine")
    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises((InputError, KeyboardInterrupt)) as caught:
        write_photo(path, Photo(SCENE), overwrite=True)
    if isinstance(error, OSError):
        assert isinstance(caught.value, InputError) and "the disk is full" in caught.value.problem
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == ([b"mine"] if taken else [])


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("late", [True, False])
def test_write_file_that_appears_meanwhile_is_kept(
    links: bool, late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    save_image = Image.Image.save

    def slow_save(self: Image.Image, *arguments: Any, **options: Any) -> None:
        save_image(self, *arguments, **options)
        if late:
            path.write_bytes(b"theirs")

    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Image.Image, "save", slow_save)
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    if late:
        with pytest.raises(InputError, match="exists already"):
            write_image(path, SCENE)
        assert path.read_bytes() == b"theirs"
    else:
        write_image(path, SCENE)
        np.testing.assert_array_equal(read_photo(path).pixels, SCENE)
    assert list(tmp_path.iterdir()) == [path]
