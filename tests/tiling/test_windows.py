"""Mask components and context windows, by properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spmdeploy.tiling import windows
from spmdeploy.tiling.windows import Window, mask_components
from spmdeploy.tiling.windows import plan_windows as plan_sites
from tests.tiling.strategies import quick, small_masks


@st.composite
def masks(draw: st.DrawFn, longest: int = 1500) -> np.ndarray:
    """Photos of any shape with up to six rectangles to edit, borders and single pixels included."""
    height, width = draw(st.integers(1, longest)), draw(st.integers(1, longest))
    mask = np.zeros((height, width), bool)
    for _ in range(draw(st.integers(1, 6))):
        top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        mask[top : top + draw(st.integers(1, 300)), left : left + draw(st.integers(1, 300))] = True
    return mask


def brute_components(mask: np.ndarray, reach: int) -> list[tuple[int, int, int, int]]:
    """Bounding boxes of the groups of masked pixels that are linked by steps of at most `reach` rows and columns."""
    left_over = set(zip(*(axis.tolist() for axis in np.nonzero(mask)), strict=True))
    boxes = []
    while left_over:
        open_ends = [left_over.pop()]
        component = list(open_ends)
        while open_ends:
            y, x = open_ends.pop()
            near = [at for at in left_over if abs(at[0] - y) <= reach and abs(at[1] - x) <= reach]
            left_over.difference_update(near)
            open_ends += near
            component += near
        rows, columns = zip(*component, strict=True)
        boxes.append((min(rows), min(columns), max(rows) + 1, max(columns) + 1))
    return sorted(boxes)


@quick
@given(small_masks(), st.integers(2, 5))
def test_mask_components_are_between_touching_pixels_and_a_block_apart(mask: np.ndarray, block: int) -> None:
    """No two touching pixels are torn apart, and nothing is joined that lies two blocks apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "BLOCK", block)
        boxes = {tuple(box) for box in mask_components(mask).tolist()}
    for top, left, bottom, right in brute_components(mask, 1):
        assert any(a <= top and b <= left and c >= bottom and d >= right for a, b, c, d in boxes)
    for a, b, c, d in boxes:
        assert any(t <= a and u <= b and v >= c and w >= d for t, u, v, w in brute_components(mask, 2 * block - 1))


@quick
@given(small_masks())
def test_mask_components_blocks_of_one_pixel_are_connected_components(mask: np.ndarray) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "BLOCK", 1)
        assert sorted(tuple(box) for box in mask_components(mask).tolist()) == brute_components(mask, 1)


def test_mask_components_boxes_are_exact() -> None:
    mask = np.zeros((900, 700), bool)
    mask[3, 5] = mask[100:305, 450:451] = mask[304, 200:451] = True
    assert mask_components(mask).tolist() == [[3, 5, 4, 6], [100, 200, 305, 451]]


def test_mask_components_diagonal_line_is_one() -> None:
    for line in (np.eye(512, dtype=bool), np.eye(512, dtype=bool)[:, ::-1]):
        assert mask_components(line).tolist() == [[0, 0, 512, 512]]


def test_mask_components_many_specks_are_found() -> None:
    mask = np.zeros((4000, 6000), bool)
    mask[::9, ::9] = True
    assert mask_components(mask).tolist() == [[0, 0, 3997, 5995]]
    assert plan_windows(mask) == [Window(0, 0, 4000, 6000)]


@quick
@given(st.integers(1, 60), st.lists(st.tuples(st.integers(0, 59), st.integers(0, 59)), max_size=60))
def test_connected_groups_equal_a_plain_search(count: int, links: list[tuple[int, int]]) -> None:
    links = [(a % count, b % count) for a, b in links]
    group = list(range(count))
    for _ in range(count):
        for a, b in links:
            group[a] = group[b] = min(group[a], group[b])
    numbers = {root: number for number, root in enumerate(sorted(set(group)))}
    first, second = np.array([a for a, _ in links], np.intp), np.array([b for _, b in links], np.intp)
    assert windows.connected_groups(count, first, second).tolist() == [numbers[root] for root in group]


def test_connected_groups_long_shuffled_chain_is_one() -> None:
    order = np.random.default_rng(1).permutation(20_000)
    assert not windows.connected_groups(20_000, order[:-1], order[1:]).any()


def plan_windows(mask: np.ndarray) -> list[Window]:
    return [site.window for site in plan_sites(mask)]


@quick
@given(masks())
def test_plan_windows_every_masked_pixel_is_edited_once(mask: np.ndarray) -> None:
    height, width = mask.shape
    covered = np.zeros(mask.shape, np.uint8)
    for site in plan_sites(mask):
        window = site.window
        assert window.top >= 0 and window.left >= 0
        assert window.top + window.height <= height and window.left + window.width <= width
        assert window.height >= min(256, height) and window.width >= min(256, width)
        part = site.mask_of(mask)
        assert part.any() and not (part & ~mask[window.slices]).any()
        covered[window.slices] += part
    np.testing.assert_array_equal(covered, mask)


@quick
@given(masks())
def test_plan_windows_keep_context_around_the_mask(mask: np.ndarray) -> None:
    """Known margins on all sides up to the photo's border, and at least the context factor where the photo has it."""
    for site in plan_sites(mask):
        window, part = site.window, site.mask_of(mask)
        rows, columns = np.flatnonzero(part.any(axis=1)), np.flatnonzero(part.any(axis=0))
        longer = max(int(np.ptp(rows)), int(np.ptp(columns))) + 1
        for used, start, side, photo in (
            (rows, window.top, window.height, mask.shape[0]),
            (columns, window.left, window.width, mask.shape[1]),
        ):
            assert used[0] >= 32 or start == 0
            assert used[-1] + 32 < side or start + side == photo
            assert side >= min(photo, 1.5 * longer)


@quick
@given(masks())
def test_plan_windows_masks_of_different_windows_never_touch(mask: np.ndarray) -> None:
    """By far: the feather of one would otherwise be made from what the other still hides."""
    owner = np.full(mask.shape, -1)
    for number, site in enumerate(plan_sites(mask)):
        owner[site.window.slices][site.mask_of(mask)] = number
    for axis in (0, 1):
        for shift in range(1, min(33, mask.shape[axis])):
            one = owner.take(range(shift, mask.shape[axis]), axis)
            other = owner.take(range(mask.shape[axis] - shift), axis)
            assert ((one == other) | (one < 0) | (other < 0)).all()


@quick
@given(masks())
def test_plan_windows_are_square_and_in_reading_order(mask: np.ndarray) -> None:
    windows = plan_windows(mask)
    for window in windows:
        longer = max(window.height, window.width)
        assert window.height == min(longer, mask.shape[0]) and window.width == min(longer, mask.shape[1])
    assert windows == sorted(windows, key=lambda window: (window.top, window.left))


@quick
@given(masks(600), st.integers(0, 700), st.integers(0, 700))
def test_plan_windows_translation_translates_windows(mask: np.ndarray, down: int, right: int) -> None:
    """On a photo so large that no window reaches its border."""
    height, width = mask.shape
    one, other = np.zeros((2, height + 3200, width + 3200), bool)
    one[1000 : 1000 + height, 1000 : 1000 + width] = mask
    other[1000 + down : 1000 + down + height, 1000 + right : 1000 + right + width] = mask
    moved = [Window(w.top + down, w.left + right, w.height, w.width) for w in plan_windows(one)]
    assert plan_windows(other) == moved


def test_plan_windows_near_components_share_a_window() -> None:
    mask = np.zeros((1000, 3000), bool)
    mask[500, 200] = mask[500, 400] = mask[500, 2000] = True
    assert plan_windows(mask) == [Window(350, 150, 302, 302), Window(373, 1873, 256, 256)]


def test_plan_windows_merging_ends_without_overlap() -> None:
    """Two components whose common window reaches a third that neither of them reached alone."""
    places = (1500, 1000), (1500, 1200), (1235, 1100)

    def windows_of(*chosen: int) -> list[Window]:
        mask = np.zeros((3000, 3000), bool)
        for number in chosen:
            mask[places[number]] = True
        return [site.window for site in plan_sites(mask, crop_limit=2)]

    assert [len(windows_of(0, 1)), len(windows_of(0, 2)), len(windows_of(1, 2))] == [1, 2, 2]
    assert windows_of(0, 1, 2) == [Window(1169, 901, 399, 399)]


def test_plan_windows_components_far_apart_keep_their_own() -> None:
    mask = np.zeros((1000, 3000), bool)
    mask[400:600, 200:400] = mask[400:600, 480:680] = True
    left, right = plan_sites(mask)
    assert [left.window, right.window] == [Window(350, 150, 300, 300), Window(350, 430, 300, 300)]
    assert left.window.overlaps(right.window)
    assert left.mask_of(mask).sum() == right.mask_of(mask).sum() == 40_000


def test_plan_windows_scattered_specks_are_edited_at_full_resolution() -> None:
    rng = np.random.default_rng(2)
    mask = np.zeros((3000, 4000), bool)
    for top, left in zip(rng.integers(0, 2990, 300).tolist(), rng.integers(0, 3990, 300).tolist(), strict=True):
        mask[top : top + 6, left : left + 6] = True
    sites = plan_sites(mask)
    assert 200 < len(sites) < 300, "some share a window"
    assert all(max(site.window.height, site.window.width) <= 384 for site in sites)


def test_window_overlaps_adjacent_is_false() -> None:
    mask = np.zeros((256, 512), bool)
    mask[128, 127] = mask[128, 384] = True
    assert plan_windows(mask) == [Window(0, 0, 256, 256), Window(0, 256, 256, 256)]
    assert not Window(0, 0, 256, 256).overlaps(Window(0, 256, 256, 256))
    assert Window(0, 0, 256, 257).overlaps(Window(0, 256, 256, 256))


def test_plan_windows_thousands_of_components_are_all_edited() -> None:
    mask = np.zeros((6000, 6000), bool)
    mask[100::500, 100::500] = True
    windows = plan_windows(mask)
    assert len(windows) == 144
    assert sum(int(mask[window.slices].sum()) for window in windows) == 144


def test_plan_windows_empty_mask_has_none() -> None:
    assert plan_windows(np.zeros((5, 5), bool)) == []
