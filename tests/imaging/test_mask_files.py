"""Mask files: two-valued images are read, doubtful ones refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spmdeploy.errors import InputError
from spmdeploy.imaging.mask_files import check_mask, read_mask
from tests.imaging.test_files import HALF, SCENE, palette_png, png_bytes, save


@pytest.mark.parametrize("value", [1, 2, 127, 128, 254, 255])
def test_read_mask_two_values_nonzero_edits(value: int, tmp_path: Path) -> None:
    gray = HALF.astype(np.uint8) * np.uint8(value)
    np.testing.assert_array_equal(read_mask(save(tmp_path / "gray.png", gray)), HALF)
    np.testing.assert_array_equal(read_mask(save(tmp_path / "rgb.png", np.dstack([gray] * 3))), HALF)
    np.testing.assert_array_equal(read_mask(save(tmp_path / "wide.png", gray.astype(np.uint16) * 257)), HALF)
    opaque = np.dstack([gray, gray, gray, np.full_like(gray, 255)])
    np.testing.assert_array_equal(read_mask(save(tmp_path / "rgba.png", opaque)), HALF)
    np.testing.assert_array_equal(read_mask(save(tmp_path / "bits.png", Image.fromarray(HALF))), HALF)


@pytest.mark.parametrize(
    ("colors", "indices"),
    [
        ([(0, 0, 0), (255, 255, 255)], HALF),
        ([(0, 0, 0), (128, 0, 0)], HALF),
        ([(0, 0, 0), (1, 1, 1)], HALF),
        ([(0, 0, 0), (0, 0, 0)], HALF),
        ([(200, 30, 30), (30, 200, 30)], HALF),
        ([(255, 255, 255), (0, 0, 0)], ~HALF),  # as written by PNG optimizers for a black and white image
        ([(9, 9, 9), (0, 0, 0), (255, 255, 255)], HALF + 1),
    ],
)
def test_read_mask_palette_black_is_kept(
    colors: list[tuple[int, int, int]], indices: np.ndarray, tmp_path: Path
) -> None:
    np.testing.assert_array_equal(read_mask(palette_png(tmp_path / "p.png", indices, colors)), HALF)


@pytest.mark.parametrize("image", [HALF * np.uint8(255), np.dstack([HALF * np.uint8(255)] * 3)])
def test_read_mask_jpeg_is_cut_at_128(image: np.ndarray, tmp_path: Path) -> None:
    path = save(tmp_path / "mask.jpg", np.roll(image, 3, axis=1), quality=75)  # an edge inside JPEG's blocks: it rings
    with Image.open(path) as written:
        assert len(written.getcolors() or []) > 2
    np.testing.assert_array_equal(read_mask(path), np.roll(HALF, 3, axis=1))


def test_read_mask_not_a_mask_is_refused(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(32, dtype=np.uint8) * 8, (16, 1))
    white = HALF * np.uint8(255)
    cases = {
        r"32 values \(0, 8, 16, 24, 32, 40, 48, 56, …\)": save(tmp_path / "ramp.png", ramp),
        r"3 values \(0, 1, 2\)": save(tmp_path / "ids.png", np.arange(12, dtype=np.uint8).reshape(3, 4) % 3),
        r"2 values \(10, 20\)": save(tmp_path / "no_zero.png", 10 + HALF.astype(np.uint8) * np.uint8(10)),
        r"3 values \(0, 1, 65535\)": save(tmp_path / "wide.png", np.array([[0, 1, 65535]], np.uint16)),
        "color image": save(tmp_path / "scene.png", SCENE),
        "a color image": save(tmp_path / "red.png", np.dstack([white, white * 0, white * 0])),
        "partly transparent": save(tmp_path / "alpha.png", np.dstack([white, white, white, white])),
        "CMYK": save(tmp_path / "cmyk.jpg", Image.new("CMYK", (8, 8))),
    }
    (tmp_path / "rgb16.png").write_bytes(png_bytes(16, 2, 1, 1, b"\0" + bytes(6)))
    cases["16 bits"] = tmp_path / "rgb16.png"
    half_clear = palette_png(tmp_path / "clear.png", HALF, [(0, 0, 0), (255, 255, 255)], transparency=b"\0\xff")
    cases["is partly transparent"] = half_clear
    for problem, path in cases.items():
        with pytest.raises(InputError, match=problem) as caught:
            read_mask(path)
        assert str(path) in caught.value.problem and caught.value.hint


def test_check_mask_empty_or_full_is_refused(tmp_path: Path) -> None:
    for value, text in ((0, "empty"), (1, "full"), (255, "full")):
        mask = read_mask(save(tmp_path / f"{value}.png", np.full((4, 4), value, np.uint8)))
        with pytest.raises(InputError, match=rf"^m\.png is {text}: "):
            check_mask(mask, "m.png")
    check_mask(HALF, "m.png")
    check_mask(HALF.astype(np.uint8) * np.uint8(7), "array")
