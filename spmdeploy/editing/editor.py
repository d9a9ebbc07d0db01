"""Edits arrays: validates the inputs, plans windows, runs them in batches, pastes the results.

Two guarantees hold for every session, because they are enforced here and not left to the network: pixels outside the
mask are returned bit for bit, and pixels under the mask never reach the session (see `preprocess`), so that nothing
hidden shows in the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spmdeploy.backends.base import Backend, bind_layout
from spmdeploy.editing.harmonize import MatchingDecision, decide_matching, match_surroundings
from spmdeploy.editing.options import EditOptions
from spmdeploy.editing.plan import EditPlan, EditStep, PlannedWindow, WindowBatch, plan_edit
from spmdeploy.editing.preprocess import (
    EditRegion,
    extend_canvas,
    image_input,
    layout_tensors,
    letterbox_input,
    resize_mask,
    stacked,
)
from spmdeploy.editing.report import EditReport, PhaseTimer, WindowReport, report_notes
from spmdeploy.editing.validate import InputNames, check_image, check_layout, check_padding
from spmdeploy.imaging.resize import resize_photo
from spmdeploy.labels import ClassTable
from spmdeploy.tiling.outpaint import outpaint_windows, padding_mask
from spmdeploy.tiling.stitching import stitch
from spmdeploy.tiling.windows import EditWindow
from spmdeploy.types import Image, LabelMap, LayoutInput, Mask, Padding, Progress

DEFAULT_OPTIONS = EditOptions()


class EditResult(NamedTuple):
    """An edited image and how it was made."""

    image: Image
    """uint8 (H, W, 3) RGB, equal to the input wherever the mask is not set."""
    report: EditReport


class Editor:
    """Edits images of any size with one session. Use it as a context manager, or call `close`.

    Attributes:
        session: the opened backend.
        classes: the model's classes.
        choices: why this session was chosen, one line for each choice that was left open; first the signature, if one
            was checked.
        notices: those of the choices that the user should see unasked: a signature that was checked, and what is here
            but cannot be used.
    """

    def __init__(
        self,
        session: Backend,
        classes: ClassTable,
        choices: tuple[str, ...] = (),
        notices: tuple[str, ...] = (),
    ) -> None:
        self.session = session
        self.classes = classes
        self.choices = choices
        self.notices = notices

    def edit(
        self,
        image: Image,
        labels: LabelMap,
        mask: NDArray[Any],
        instances: LabelMap | None = None,
        options: EditOptions = DEFAULT_OPTIONS,
        *,
        windows: Sequence[EditWindow] | None = None,
        progress: Progress | None = None,
        names: InputNames | None = None,
        **changes: Any,
    ) -> EditResult:
        """Repaint the pixels under the mask so that they show what the labels say.

        Labels matter under the mask only, with one exception that is part of the network's definition: a masked pixel
        at the mask's rim counts as an object's edge if the instance (or label) of the known pixel next to it differs.
        Ids there are compared, never interpreted, and need not be valid.

        Args:
            image: uint8 (H, W, 3), RGB.
            labels: integer (H, W), class ids.
            mask: bool or integer (H, W), 0 = keep, anything else = edit.
            instances: integer (H, W), ids of objects; None: the labels are used instead.
            options: how to edit.
            windows: context windows to edit in this order, each seeing what those before have painted, as an extension
                needs it (`tiling.outpaint`); None: planned around the mask.
            progress: called with the windows and tiles done and their total, first with (0, total).
            names: how error messages name the arrays.
            **changes: fields of `options` to replace, for example `tiling="crop"`.

        Returns:
            The edited image and a report.

        Raises:
            InputError: the arrays do not fit each other, the model or the tiling.
            UsageError: an option is out of its range.
            BundleError: tiling is "cascade" and the model cannot refine.
        """
        options, names, timer = replace(options, **changes), names or InputNames(), PhaseTimer(progress)
        with timer.phase("validate"):
            check_image(image, names.image)
            edit_mask = check_layout(labels, mask, instances, self.classes, names, image, options.dilate or 0)
        with timer.phase("plan"):
            plan = plan_edit(edit_mask, self.session, options, windows, names)
        return self._execute(plan, EditRegion(image.copy(), labels, edit_mask.copy(), instances), options, timer)

    def extend(
        self,
        image: Image,
        labels: LabelMap,
        padding: Padding,
        instances: LabelMap | None = None,
        options: EditOptions = DEFAULT_OPTIONS,
        *,
        progress: Progress | None = None,
        names: InputNames | None = None,
        **changes: Any,
    ) -> EditResult:
        """Extend the image beyond its borders so that the new pixels show what the labels say.

        An edit of the image on a larger canvas, with the new pixels as the mask, in windows that follow one another: an
        image can be extended to any length, and every step costs the same.

        Args:
            image: uint8 (H, W, 3), RGB.
            labels: integer (top + H + bottom, left + W + right), class ids of the extended image.
            padding: pixels to add on each side.
            instances: integer, of the labels' size; None: the labels are used instead.
            options: how to edit; tiling "off" and `dilate` do not apply.
            progress: as in `edit`.
            names: as in `edit`.
            **changes: as in `edit`.

        Returns:
            The extended image and a report.

        Raises:
            InputError, UsageError, BundleError: as `edit`; UsageError also for padding that makes no sense.
        """
        names = names or InputNames()
        check_image(image, names.image)
        check_padding(padding, image.shape, names.image)
        canvas, mask = extend_canvas(image, padding), padding_mask(image.shape, padding)
        windows = outpaint_windows(image.shape, padding, self.session.size)
        names = replace(names, extended=True)
        return self.edit(
            canvas, labels, mask, instances, options, windows=windows, progress=progress, names=names, **changes
        )

    def prepare(
        self,
        labels: LabelMap,
        mask: NDArray[Any],
        instances: LabelMap | None = None,
        options: EditOptions = DEFAULT_OPTIONS,
        *,
        names: InputNames | None = None,
        **changes: Any,
    ) -> PreparedEdit:
        """Compute once what labels and mask decide, for many images of one size.

        Where the session caches layouts that is, with a quarter masked, three tenths of the operations in ONNX Runtime
        on CPUs and more than half in PyTorch. A cached layout takes memory, 50 to 150 MB per window with the `paper`
        preset; windows that are refined cache nothing. Arrays that are changed later have no effect.

        Args:
            labels: as in `edit`.
            mask: as in `edit`.
            instances: as in `edit`.
            options: how to edit.
            names: as in `edit`.
            **changes: as in `edit`.

        Returns:
            An object whose `edit` takes images of the size of the labels.

        Raises:
            InputError, UsageError, BundleError: as `edit`.
        """
        options, names = replace(options, **changes), names or InputNames()
        edit_mask = check_layout(labels, mask, instances, self.classes, names, dilation=options.dilate or 0)
        plan = plan_edit(edit_mask, self.session, options, None, names)
        no_image = np.broadcast_to(np.uint8(0), (*edit_mask.shape, 3))  # a single byte, whatever the size
        region = EditRegion(no_image, labels.copy(), edit_mask.copy(), None if instances is None else instances.copy())
        steps = tuple(
            replace(step, batches=tuple(_with_layout(self.session, batch.windows, region) for batch in step.batches))
            for step in plan.steps
        )
        return PreparedEdit(self, replace(plan, steps=steps), region, options, names)

    def close(self) -> None:
        """Free the session's memory. Safe to call twice."""
        self.session.close()

    def __enter__(self) -> Editor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _execute(self, plan: EditPlan, region: EditRegion, options: EditOptions, timer: PhaseTimer) -> EditResult:
        """Run the plan and paste its results into `region.image`. Changes `region.mask` if there are several steps."""
        with timer.phase("plan"):
            matching = decide_matching(options.match_surroundings, region.image, region.labels, region.mask)
        timer.begin(plan.total_runs)
        mask = region.mask.copy() if len(plan.steps) > 1 else region.mask
        edited_pixels = int(np.count_nonzero(mask))
        done: list[WindowReport] = []
        for step in plan.steps:
            if len(plan.steps) > 1:
                # An earlier step may have painted beyond its own part, for the far border of its windows only.
                _mark(region, step, mask, masked=True)
            done += self._execute_step(step, region, options, matching.matches, timer)
            if len(plan.steps) > 1:
                _mark(region, step, mask, masked=False)
        return EditResult(region.image, self._report(plan, done, options, matching, edited_pixels, timer))

    def _execute_step(
        self, step: EditStep, region: EditRegion, options: EditOptions, matches: bool, timer: PhaseTimer
    ) -> list[WindowReport]:
        for batch in step.batches:
            self._edit_single_pass(batch, region, options, matches, timer)
        done = [
            self._edit_coarse_to_fine(window, region, options, matches, timer)
            if window.levels
            else WindowReport(window)
            for window in step.windows
        ]
        if matches:
            with timer.phase("stitch"):
                for window in step.windows:
                    edit_window = window.edit_window
                    part = region.cut(edit_window.window)
                    match_surroundings(part.image, part.labels, edit_window.mask_of(region.mask))
        return done

    def _edit_single_pass(
        self, batch: WindowBatch, region: EditRegion, options: EditOptions, matches: bool, timer: PhaseTimer
    ) -> None:
        """Edit a batch of windows at the model's size."""
        with timer.phase("prepare"):
            if batch.run is None:
                inputs = stacked([letterbox_input(window.letterbox, region) for window in batch.windows])
                run = partial(self.session.run, inputs)
            else:
                run = partial(batch.run, _batch_images(batch, region))
        with timer.phase("run"):
            edited = run()
        with timer.phase("stitch"):
            _paste_batch(batch.windows, edited, region, options.feather, matches)
        timer.batches += 1
        timer.advance(len(batch.windows))

    def _edit_coarse_to_fine(
        self, window: PlannedWindow, region: EditRegion, options: EditOptions, matches: bool, timer: PhaseTimer
    ) -> WindowReport:
        """Edit one large window: first at the model's size, then refined to full resolution."""
        from spmdeploy.editing.pyramid import refine_window  # which most edits do not need

        letterbox, levels = window.letterbox, window.levels
        with timer.phase("prepare"):
            inputs = stacked([letterbox_input(letterbox, region)])
        part = region.cut(letterbox.window)
        refined = refine_window(self.session, letterbox, inputs, levels, part, options.batch_size, timer)
        with timer.phase("stitch"):
            inside = levels[-1].region.slices
            content = np.rint(refined.canvas, out=refined.canvas).astype(np.uint8)
            mask = window.edit_window.mask_of(region.mask)[inside]
            stitch(part.image[inside], content, mask, options.feather, part.labels[inside] if matches else None)
        return WindowReport(window, refined.levels, refined.between_levels, refined.notes)

    def _report(
        self,
        plan: EditPlan,
        done: Sequence[WindowReport],
        options: EditOptions,
        matching: MatchingDecision,
        edited_pixels: int,
        timer: PhaseTimer,
    ) -> EditReport:
        session = self.session
        return EditReport(
            backend=session.backend,
            device=session.device,
            precision=session.precision,
            provider=session.provider,
            options=options,
            tiling=plan.tiling,
            tiling_reason=plan.reason,
            match_surroundings=matching.matches,
            match_surroundings_reason=matching.reason,
            windows=tuple(done),
            batches=timer.batches,
            edited_pixels=edited_pixels,
            milliseconds=timer.milliseconds,
            notes=(*plan.notes, *report_notes(done), *session.notes),
        )


class PreparedEdit:
    """An edit whose layout is computed already, for the frames of a video or many photos of one view.

    Made by `Editor.prepare`, whose editor must stay open. `edit` may be called from several threads at once where the
    session's `run` may.
    """

    def __init__(
        self, editor: Editor, plan: EditPlan, region: EditRegion, options: EditOptions, names: InputNames
    ) -> None:
        """plan: its batches have their layouts. region: everything but the image."""
        self._editor = editor
        self._plan = plan
        self._region = region
        self._options = options
        self._names = names

    def edit(self, image: Image, *, progress: Progress | None = None) -> EditResult:
        """Edit one image with the prepared layout; the result is that of `Editor.edit`.

        Args:
            image: uint8 (H, W, 3), RGB, of the size of the labels.
            progress: called with the windows and tiles done and their total.

        Returns:
            The edited image, and a report of what was left to do.

        Raises:
            InputError: the image is no such array.
        """
        names, timer = self._names, PhaseTimer(progress)
        with timer.phase("validate"):
            check_image(image, names.image, self._region.labels, names.labels)
        region = self._region._replace(image=image.copy())
        return self._editor._execute(self._plan, region, self._options, timer)


def _mark(region: EditRegion, step: EditStep, mask: Mask, *, masked: bool) -> None:
    """Set the step's own pixels in `region.mask`. mask: of the whole edit."""
    for window in step.windows:
        part, own = region.mask[window.edit_window.window.slices], window.edit_window.mask_of(mask)
        part[own] = masked


def _with_layout(session: Backend, windows: tuple[PlannedWindow, ...], region: EditRegion) -> WindowBatch:
    """A batch whose layouts the session has been given. region: its image is not read."""
    masks, layouts = [], []
    for window in windows:
        letterbox = window.letterbox
        part = region.cut(letterbox.window)
        masks.append(resize_mask(part.mask, letterbox.height, letterbox.width))
        layouts.append(layout_tensors(part, masks[-1], letterbox.size))
    return WindowBatch(
        windows, tuple(masks), bind_layout(session, LayoutInput(*map(np.stack, zip(*layouts, strict=True))))
    )


def _batch_images(batch: WindowBatch, region: EditRegion) -> NDArray[np.uint8]:
    """The images of a prepared batch: uint8 (B, size, size, 3)."""
    boxes = [window.letterbox for window in batch.windows]
    parts = [region.cut(box.window).image for box in boxes]
    return np.stack(
        [image_input(part, mask, box.size) for part, mask, box in zip(parts, batch.masks, boxes, strict=True)]
    )


def _paste_batch(
    windows: Sequence[PlannedWindow], edited: Image, region: EditRegion, feather: int, by_class: bool
) -> None:
    """Paste a batch of results, uint8 (B, size, size, 3), into the region's image, in place.

    Args:
        windows: Of the batch.
        edited: Their results.
        region: Its image is changed.
        feather: Width of the transition.
        by_class: Whether the labels are true of the known pixels; the transition is then inside classes only.
    """
    size = windows[0].letterbox.size
    expected = (len(windows), size, size, 3)
    assert edited.shape == expected and edited.dtype == np.uint8, (edited.shape, edited.dtype, expected)
    for window, square in zip(windows, edited, strict=True):
        letterbox, edit_window = window.letterbox, window.edit_window
        content = square[: letterbox.height, : letterbox.width]
        if letterbox.shrinks:
            content = resize_photo(content, letterbox.window.height, letterbox.window.width)
        inside = edit_window.window.slices
        labels = region.labels[inside] if by_class else None
        stitch(region.image[inside], content, edit_window.mask_of(region.mask), feather, labels)
