"""Plans an edit: mask to context windows, pyramid levels and batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from spmdeploy.backends.base import Backend, LayoutRun
from spmdeploy.editing.options import EditOptions
from spmdeploy.editing.validate import InputNames, check_windows, format_size
from spmdeploy.errors import BundleError, InputError, UsageError
from spmdeploy.tiling.letterbox import Letterbox, fit_letterbox
from spmdeploy.tiling.pyramid import PyramidLevel, plan_pyramid
from spmdeploy.tiling.windows import CROP_LIMIT, EditWindow, full_image_window, plan_windows
from spmdeploy.types import Mask, Tiling


@dataclass(frozen=True, slots=True)
class PlannedWindow:
    """One context window, how it is placed in the model's input, and the pyramid levels it is refined through."""

    edit_window: EditWindow
    letterbox: Letterbox
    levels: tuple[PyramidLevel, ...] = ()
    """From coarse to fine; none where the window is edited in a single pass."""

    @property
    def tiles(self) -> int:
        """Over all levels."""
        return sum(len(level.tiles) for level in self.levels)


class WindowBatch(NamedTuple):
    """Windows for one call of the session; if prepared, with the call that knows their layouts."""

    windows: tuple[PlannedWindow, ...]
    masks: tuple[Mask, ...] = ()
    """Of the windows, at the model's scale."""
    run: LayoutRun | None = None


@dataclass(frozen=True, slots=True)
class EditStep:
    """Windows that do not depend on each other. What one step paints is known to the next."""

    windows: tuple[PlannedWindow, ...]
    batches: tuple[WindowBatch, ...]
    """Those of the windows that have no levels."""


@dataclass(frozen=True, slots=True)
class EditPlan:
    """All windows of an edit, and the mode that was chosen for them."""

    tiling: Literal["off", "crop", "cascade"]
    reason: str
    steps: tuple[EditStep, ...]
    notes: tuple[str, ...] = ()

    @property
    def total_runs(self) -> int:
        """Windows and tiles, as progress counts them."""
        return sum(1 + window.tiles for step in self.steps for window in step.windows)


def plan_edit(
    mask: Mask,
    session: Backend,
    options: EditOptions,
    windows: Sequence[EditWindow] | None,
    names: InputNames,
) -> EditPlan:
    """Decide where and at which resolutions the masked pixels are edited.

    Args:
        mask: bool (H, W), not empty.
        session: its size and whether it can refine.
        options: tiling and batch size.
        windows: to be edited one after the other, each a step of its own; None: planned around the mask, in one step.
        names: for messages.

    Raises:
        InputError: the image does not have the model's size and tiling is off.
        UsageError: windows are given and tiling is off, or the windows do not cover the mask.
        BundleError: tiling is "cascade" and the session cannot refine.
    """
    if windows is not None:
        if options.tiling == "off":
            raise UsageError("an extension cannot run without tiling", "use tiling auto, crop or cascade")
        check_windows(windows, mask)
        # The mask of a window's levels is that of its own step: what earlier steps painted is known.
        plan, planned = _plan_windows(session, options.tiling, ((one, one.mask_of(mask)) for one in windows))
        return replace(plan, steps=tuple(_step([window], options.batch_size) for window in planned))
    size = session.size
    fits = mask.shape == (size, size)
    if options.tiling == "off" and not fits:
        expected = f"without tiling it must have the model's size, {size}×{size}"
        raise InputError(f"{names.image} is {format_size(mask)}, but {expected}", "use tiling auto, crop or cascade")
    if fits and options.tiling in ("auto", "off"):
        reason = "asked for" if options.tiling == "off" else f"the photo has the model's size, {size}×{size}"
        whole = full_image_window(mask)
        planned = [PlannedWindow(whole, fit_letterbox(whole.window, size))]
        return EditPlan("off", reason, (_step(planned, options.batch_size),))
    # All masked pixels of a large window are refined, whichever window edits them: its levels must have no gaps.
    around = ((one, mask[one.window.slices]) for one in plan_windows(mask, size))
    plan, planned = _plan_windows(session, options.tiling, around)
    return replace(plan, steps=(_step(planned, options.batch_size),))


def _plan_windows(
    session: Backend, tiling: Tiling, windows: Iterable[tuple[EditWindow, Mask]]
) -> tuple[EditPlan, list[PlannedWindow]]:
    """The levels of each window, and a plan without steps. windows: with their masks."""
    unsupported = session.refine_unsupported
    if tiling == "cascade" and unsupported is not None:
        raise BundleError(
            f"this model cannot cascade here: {unsupported.problem}",
            f"{unsupported.hint}; or use tiling auto or crop",
        )
    size = session.size
    limit = size if tiling == "cascade" else CROP_LIMIT * size
    refines = tiling != "crop" and unsupported is None
    planned, large = [], 0
    for edit_window, mask in windows:
        is_large = max(mask.shape) > limit
        large += is_large
        levels = plan_pyramid(edit_window.window, mask, size) if refines and is_large else ()
        planned.append(PlannedWindow(edit_window, fit_letterbox(edit_window.window, size), levels))
    return _explain_tiling(session, tiling, large, len(planned), limit), planned


def _explain_tiling(session: Backend, tiling: Tiling, large: int, count: int, limit: float) -> EditPlan:
    """The mode that runs, and why. large: windows above the limit in pixels, of `count`."""
    if tiling in ("crop", "cascade"):
        return EditPlan(tiling, "asked for", ())
    if not large:
        return EditPlan("crop", f"no window is larger than {limit:g} pixels", ())
    reason = f"{large} of {count} windows larger than {limit:g} pixels"
    unsupported = session.refine_unsupported
    if unsupported is None:
        return EditPlan("cascade", reason, ())
    note = f"{reason} are not refined at full resolution: {unsupported.problem}; {unsupported.hint}"
    return EditPlan("crop", f"{reason}, but {unsupported.problem}", (), (note,))


def _step(windows: Sequence[PlannedWindow], batch_size: int) -> EditStep:
    single_pass = [window for window in windows if not window.levels]
    batches = [single_pass[start : start + batch_size] for start in range(0, len(single_pass), batch_size)]
    return EditStep(tuple(windows), tuple(WindowBatch(tuple(batch)) for batch in batches))
