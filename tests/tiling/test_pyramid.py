"""Levels, tiles and blend weights, by properties: no model, no files."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from spmdeploy.tiling.pyramid import BASE_ENLARGED, PyramidLevel, blend_windows, plan_pyramid, tile_starts
from spmdeploy.tiling.windows import Window, plan_windows

quick = settings(max_examples=60, deadline=None)


@st.composite
def lines(draw: st.DrawFn) -> tuple[int, int, int, int, int]:
    """What is masked of a line (first, end), its length, the size of a tile and the least overlap, both even."""
    length = draw(st.integers(1, 3000))
    first = draw(st.integers(0, length - 1))
    size = 2 * draw(st.integers(4, 128))
    return first, draw(st.integers(first + 1, length)), length, size, 2 * draw(st.integers(1, size // 4))


@settings(max_examples=500)
@given(lines())
def test_plan_pyramid_tiles_cover_mask_and_margin(line: tuple[int, int, int, int, int]) -> None:
    first, end, length, size, overlap = line
    starts = tile_starts(first, end, length, size, overlap)
    assert starts[0] <= max(first - 32, 0) and starts[-1] + size >= min(end + 32, length)
    assert starts[0] >= 0 and all(start % 2 == 0 for start in starts)
    assert starts[-1] + size <= max(length + length % 2, size)
    assert all(0 < after - start <= size - overlap for start, after in pairwise(starts))


@settings(max_examples=500)
@given(lines())
def test_plan_pyramid_tiles_are_few_and_evenly_spread(line: tuple[int, int, int, int, int]) -> None:
    starts = tile_starts(*line)
    *_, size, overlap = line
    span = starts[-1] + size - starts[0]
    assert span <= len(starts) * (size - overlap) + overlap
    assert len(starts) == 1 or span > (len(starts) - 1) * (size - overlap) + overlap
    gaps = {after - start for start, after in pairwise(starts)}
    assert not gaps or max(gaps) - min(gaps) <= 2


@settings(max_examples=500)
@given(lines())
def test_blend_windows_weights_sum_to_one(line: tuple[int, int, int, int, int]) -> None:
    starts, size = tile_starts(*line), line[3]
    weights = blend_windows(starts, size)
    assert weights.shape == (len(starts), size) and weights.dtype == np.float32
    assert (weights >= 0).all()
    total = np.zeros(starts[-1] + size)
    for start, part in zip(starts, weights, strict=True):
        total[start : start + size] += part
    np.testing.assert_allclose(total[starts[0] :], 1, atol=1e-6)


def test_blend_windows_fade_towards_neighbors_only() -> None:
    first, middle, last = blend_windows((0, 40, 80), 64)
    assert (first[:40] == 1).all() and (last[24:] == 1).all()
    assert (np.diff(first[40:]) < 0).all() and first[-1] < 0.01
    np.testing.assert_array_equal(middle, middle[::-1])
    np.testing.assert_allclose(first, last[::-1], atol=1e-7)


@st.composite
def masks_in_photos(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """A mask with a few rectangles, and the size of a model so small that its windows need several levels."""
    height, width = draw(st.integers(1, 500)), draw(st.integers(1, 500))
    mask = np.zeros((height, width), bool)
    for _ in range(draw(st.integers(1, 3))):
        top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        mask[top : top + draw(st.integers(1, 300)), left : left + draw(st.integers(1, 300))] = True
    return mask, draw(st.sampled_from([32, 48, 64]))


def planned(mask: np.ndarray, size: int) -> list[tuple[PyramidLevel, ...]]:
    return [plan_pyramid(site.window, mask[site.window.slices], size) for site in plan_windows(mask, size)]


@quick
@given(masks_in_photos())
def test_plan_pyramid_levels_double_up_to_full_resolution(case: tuple[np.ndarray, int]) -> None:
    mask, size = case
    for site, levels in zip(plan_windows(mask, size), planned(mask, size), strict=True):
        window = site.window
        longer = max(window.height, window.width)
        assert [level.factor for level in levels] == [2**power for power in reversed(range(len(levels)))]
        assert bool(levels) == (longer > size)
        if levels:
            assert (levels[-1].height, levels[-1].width) == (window.height, window.width)
            assert longer / 2 ** len(levels) <= BASE_ENLARGED * size
            assert len(levels) == 1 or longer / 2 ** (len(levels) - 1) > BASE_ENLARGED * size


@quick
@given(masks_in_photos())
def test_plan_pyramid_weights_of_masked_pixels_sum_to_one(
    case: tuple[np.ndarray, int],
) -> None:
    """By the tiles that run; and each of these has something to do."""
    mask, size = case
    for levels in planned(mask, size):
        for level in levels:
            total = np.zeros((level.height + 2 * size, level.width + 2 * size))
            covering = covered_cells(mask[level.window.slices], level.factor)
            assert covering.shape == (level.height, level.width)
            for tile in level.tiles:
                assert (tile.top, tile.left) == (level.rows[tile.row], level.columns[tile.column])
                assert covering[tile.top : tile.top + size, tile.left : tile.left + size].any()
                total[tile.top : tile.top + size, tile.left : tile.left + size] += level.weights(tile)
            np.testing.assert_allclose(total[: level.height, : level.width][covering], 1, atol=1e-6)


def covered_cells(mask: np.ndarray, factor: int) -> np.ndarray:
    """bool: whether each cell of factor by factor pixels holds a masked one."""
    padded = np.pad(mask, [(0, -length % factor) for length in mask.shape])
    cells = padded.reshape(padded.shape[0] // factor, factor, padded.shape[1] // factor, factor)
    return cells.any(axis=(1, 3))


@quick
@given(masks_in_photos())
def test_plan_pyramid_level_is_covered_by_the_previous_one(case: tuple[np.ndarray, int]) -> None:
    mask, size = case
    for levels in planned(mask, size):
        for coarse, fine in pairwise(levels):
            for starts, places, length in (
                (coarse.rows, fine.rows, coarse.height),
                (coarse.columns, fine.columns, coarse.width),
            ):
                assert all(place // 2 >= starts[0] for place in places)
                assert (places[-1] + size) // 2 <= starts[-1] + size or places[-1] // 2 + size // 2 >= length


@quick
@given(masks_in_photos(), st.integers(0, 300), st.integers(0, 300))
def test_plan_pyramid_translation_translates_tiles(case: tuple[np.ndarray, int], down: int, right: int) -> None:
    """On a photo so large that no window reaches its border."""
    mask, size = case
    height, width = mask.shape
    one, other = np.zeros((2, height + 1300, width + 1300), bool)
    one[500 : 500 + height, 500 : 500 + width] = mask
    other[500 + down : 500 + down + height, 500 + right : 500 + right + width] = mask
    for before, after in zip(planned(one, size), planned(other, size), strict=True):
        for level, moved in zip(before, after, strict=True):
            window = level.window
            assert moved.window == Window(window.top + down, window.left + right, window.height, window.width)
            assert (moved.rows, moved.columns, moved.tiles) == (level.rows, level.columns, level.tiles)


def test_plan_pyramid_cost_follows_the_mask() -> None:
    counts = []
    for height, width in ((1024, 1024), (2160, 3840), (9000, 11000)):
        mask = np.zeros((height, width), bool)
        mask[300:707, 300:707] = True
        (levels,) = planned(mask, 256)
        counts.append([len(level.tiles) for level in levels])
    assert counts == [[9]] * 3


def test_plan_pyramid_thin_line_has_tiles_along_it_only() -> None:
    mask = np.zeros((2000, 2000), bool)
    mask[np.arange(100, 1900), np.arange(100, 1900)] = True
    ((*_, last),) = planned(mask, 256)
    assert len(last.tiles) <= 3 * len(last.rows) < len(last.rows) * len(last.columns)
