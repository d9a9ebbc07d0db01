"""The steps of an extension, by properties."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from spmdeploy.tiling.outpaint import OutpaintStep, plan_extension
from spmdeploy.tiling.windows import Window
from spmdeploy.types import Padding

quick = settings(max_examples=150, deadline=None)
lengths = st.sampled_from([0, 0, 1, 7, 40, 150, 333])
grown = st.builds(Padding, lengths, lengths, lengths, lengths)
native = 48


@quick
@given(st.integers(1, 200), st.integers(1, 200), grown)
def test_plan_extension_every_new_pixel_has_context(height: int, width: int, sides: Padding) -> None:
    there = np.zeros((sides.top + height + sides.bottom, sides.left + width + sides.right), bool)
    there[sides.top : sides.top + height, sides.left : sides.left + width] = True
    times = there * 2
    for step in plan_extension(height, width, sides, native):
        fresh, window = np.zeros_like(there), np.zeros_like(there)
        fresh[step.fresh.slices], window[step.window.slices] = True, True
        assert step.fresh.height > 0 and step.fresh.width > 0
        assert (fresh <= window).all()
        times += fresh
        assert times.max() <= 2
        again = np.argwhere(fresh & there)
        assert not again.size or min(np.ptp(again, axis=0)) < max(native, step.window.height, step.window.width) // 16
        assert (window & ~fresh <= there).all(), "nothing else in the window is still to come"
        assert (window & there).any()
        there |= fresh
    assert there.all()


@quick
@given(st.integers(1, 200), st.integers(1, 200), grown)
def test_plan_extension_windows_are_bounded(height: int, width: int, sides: Padding) -> None:
    longest = max(native, 2 * height, 2 * width)
    for step in plan_extension(height, width, sides, native):
        assert max(step.window.height, step.window.width) <= longest
        new = step.fresh.height * step.fresh.width
        assert new <= step.window.height * step.window.width * 9 / 16 or min(height, width) < native // 2


def steps(height: int, width: int, *sides: int) -> list[OutpaintStep]:
    return list(plan_extension(height, width, Padding(*sides), native))


@quick
@given(st.integers(30, 200), st.integers(30, 200), st.integers(1, 400))
def test_plan_extension_directions_are_symmetric(height: int, width: int, length: int) -> None:
    right = steps(height, width, 0, 0, length, 0)
    left = steps(height, width, length, 0, 0, 0)
    below = steps(width, height, 0, 0, 0, length)
    above = steps(width, height, 0, length, 0, 0)

    def mirrored(window: Window) -> Window:
        return Window(window.top, width + length - window.left - window.width, window.height, window.width)

    def turned(window: Window) -> Window:
        return Window(window.left, window.top, window.width, window.height)

    assert left == [OutpaintStep(mirrored(step.window), mirrored(step.fresh)) for step in right]
    assert below == [OutpaintStep(turned(step.window), turned(step.fresh)) for step in right]
    assert above == [OutpaintStep(turned(step.window), turned(step.fresh)) for step in left]


def test_plan_extension_window_size_does_not_depend_on_padding() -> None:
    sizes = [
        {(step.window.height, step.window.width) for step in plan_extension(360, 480, Padding(0, 0, length, 0))}
        for length in (180 * 3, 180 * 300)
    ]
    assert sizes == [{(360, 360)}] * 2


def test_plan_extension_short_padding_is_one_step() -> None:
    assert steps(200, 300, 0, 0, 60, 0) == [OutpaintStep(Window(0, 160, 200, 200), Window(0, 300, 200, 60))]


def test_plan_extension_far_border_is_repeated_by_the_next_step() -> None:
    found = steps(200, 300, 0, 0, 200, 0)
    assert [step.fresh for step in found] == [Window(0, 300, 200, 112), Window(0, 400, 200, 100)]
    assert [step.window for step in found] == [Window(0, 212, 200, 200), Window(0, 300, 200, 200)]


def test_plan_extension_above_a_panorama_has_several_windows() -> None:
    found = steps(100, 500, 0, 40, 0, 0)
    assert [step.window for step in found] == [Window(0, left, 140, 200) for left in (0, 100, 200, 300)]
    assert [step.fresh for step in found] == [
        Window(0, 0, 40, 200),
        Window(0, 200, 40, 100),
        Window(0, 300, 40, 100),
        Window(0, 400, 40, 100),
    ]


def test_plan_extension_without_padding_has_no_steps() -> None:
    assert steps(50, 50, 0, 0, 0, 0) == []
