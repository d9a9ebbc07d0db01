"""One edit from arrays to arrays: check the inputs, plan the windows, run them in batches, stitch the results.

Two promises hold for every session, because they are kept here and not left to the network: pixels outside the mask
come back bit for bit, and pixels under the mask never reach the session (see `model_inputs`), so nothing of what was
hidden shows in the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from spmdeploy.backends.base import Backend, LayoutRun, bind_layout
from spmdeploy.editing.harmonize import match_surroundings as match_part
from spmdeploy.editing.preprocess import EditRegion, image_input, layout_tensors, model_input, resize_mask, stacked
from spmdeploy.editing.pyramid import cascade
from spmdeploy.editing.report import EditReport, WindowReport, report_notes
from spmdeploy.editing.timing import PhaseTimer
from spmdeploy.errors import BundleError, InputError, UsageError
from spmdeploy.imaging.decode import MAX_MEGAPIXELS
from spmdeploy.imaging.files import check_mask
from spmdeploy.imaging.resize import resize_photo
from spmdeploy.labels import ClassTable, check_labels
from spmdeploy.tiling.letterbox import Letterbox, fit_letterbox
from spmdeploy.tiling.outpaint import OutpaintStep, Padding, extended_size, image_window, padding_mask, plan_extension
from spmdeploy.tiling.pyramid import plan_pyramid
from spmdeploy.tiling.stitching import stitch
from spmdeploy.tiling.windows import CROP_LIMIT, EditWindow, full_image_window, full_window, plan_windows
from spmdeploy.types import Image, LabelMap, LayoutInput, Mask, ModelInput, Progress

Tiling = Literal["auto", "off", "crop", "cascade"]

# Photo pixels under the mask over which the photo's surroundings pass over into the edit.
FEATHER = 3
# Windows or tiles per call of the session: enough to fill a small GPU, few enough for a CPU's memory.
BATCH_SIZE = 4


@dataclass(frozen=True, slots=True)
class InputNames:
    """What error messages call the inputs: file names where there are files."""

    image: str = "image"
    labels: str = "labels"
    mask: str = "mask"
    instances: str = "instances"


class EditResult(NamedTuple):
    """image: uint8 (H, W, 3) RGB, equal to the photo wherever the mask is not set."""

    image: Image
    report: EditReport


class Editor:
    """Edits photos of any size with one session; use it as a context manager or call `close`.

    choices: why it is this session, a line for each choice that was left open; first the signature, if one was checked.
    """

    def __init__(self, session: Backend, classes: ClassTable, choices: tuple[str, ...] = ()) -> None:
        self.session = session
        self.classes = classes
        self.choices = choices

    def edit(
        self,
        image: Image,
        labels: LabelMap,
        mask: NDArray[Any],
        instances: LabelMap | None = None,
        *,
        tiling: Tiling = "auto",
        feather: int = FEATHER,
        match_surroundings: bool = False,
        batch_size: int = BATCH_SIZE,
        progress: Progress | None = None,
        names: InputNames | None = None,
    ) -> EditResult:
        """Regenerate the pixels under the mask so that they show what the labels say.

        image: uint8 (H, W, 3) RGB. labels: integer (H, W). mask: bool or integer (H, W), 0 = keep, anything else =
        edit. instances: integer (H, W) or None, then the labels stand in. tiling: "off" runs the whole photo at once
        and wants it to have the model's size; "crop" edits a context window around every piece of the mask at the
        model's size, "cascade" carries windows larger than that up to their own; "auto" takes "off" where it fits,
        else "cascade" for windows beyond CROP_LIMIT if the session refines. feather: see `stitch`. match_surroundings:
        bring what was painted to the colors and the grain of the same classes beside it (see `matching`), for which
        the labels must be true of the known pixels too. progress(done, total) counts windows and tiles, from (0, total)
        on.

        Otherwise labels matter under the mask only, with one exception that is the network's own definition and was
        kept because it was trained that way: a masked pixel at the mask's rim counts as an object's edge if the
        instance (or label) of the known pixel next to it differs. Ids there are compared, never interpreted, and need
        not be valid.

        Raises InputError (arrays that do not fit each other, the model or the mode), UsageError (options), BundleError
        ("cascade" where the session does not refine).
        """
        names = names or InputNames()
        timer = PhaseTimer(progress)
        with timer.phase("validate"):
            _check_options(tiling, feather, batch_size)
            edit_mask = self._checked(image, labels, mask, instances, names)
        with timer.phase("plan"):
            plan = self._plan(tiling, edit_mask, names)
        scene = EditRegion(image.copy(), labels, edit_mask, instances)
        finish = _Finish(feather, match_surroundings)
        return self._execute(plan, scene, _batches(plan, batch_size), batch_size, finish, timer)

    def prepare(
        self,
        labels: LabelMap,
        mask: NDArray[Any],
        instances: LabelMap | None = None,
        *,
        tiling: Tiling = "auto",
        feather: int = FEATHER,
        match_surroundings: bool = False,
        batch_size: int = BATCH_SIZE,
        names: InputNames | None = None,
    ) -> PreparedEdit:
        """Everything about an edit that labels and mask decide, done once for many images of one size.

        Where the session keeps layouts that is, with a quarter masked, three tenths of the operations in ONNX Runtime
        on CPUs and more than half in PyTorch. What is kept takes memory, for the `paper` preset 50 and 150 MB a window;
        windows that are carried up keep nothing. The arguments and what is raised are those of `edit`; arrays that
        change later change nothing here.
        """
        names = names or InputNames()
        _check_options(tiling, feather, batch_size)
        edit_mask = self._checked_layout(labels, mask, instances, names, labels, names.labels)
        plan = self._plan(tiling, edit_mask, names)
        no_picture = np.broadcast_to(np.uint8(0), (*edit_mask.shape, 3))  # a single byte, whatever the size
        scene = EditRegion(no_picture, labels.copy(), edit_mask.copy(), None if instances is None else instances.copy())
        batches = [_with_layout(self.session, batch.windows, scene) for batch in _batches(plan, batch_size)]
        return PreparedEdit(self, plan, scene, batches, batch_size, _Finish(feather, match_surroundings), names)

    def extend(
        self,
        image: Image,
        labels: LabelMap,
        sides: Padding,
        instances: LabelMap | None = None,
        *,
        tiling: Tiling = "auto",
        feather: int = FEATHER,
        match_surroundings: bool = False,
        batch_size: int = BATCH_SIZE,
        progress: Progress | None = None,
        names: InputNames | None = None,
    ) -> EditResult:
        """Grow the picture beyond its borders so that what is new shows what the labels say.

        labels and instances have the size of the grown picture, sides.top + H + sides.bottom rows of sides.left + W +
        sides.right; they matter as in `edit`, the new pixels being the mask. Windows follow one another, each beside
        what the ones before have made, so that a picture may grow to any length and every step costs the same. The
        other arguments, what is returned and what is raised are those of `edit`, but that "off" does not exist.
        """
        names = names or InputNames()
        timer = PhaseTimer(progress)
        with timer.phase("validate"):
            _check_options(tiling, feather, batch_size)
            _check_photo(image, names.image)
            check_extension(sides, image.shape, names.image)
            scene = _grown(image, labels, sides, instances)
            for ids, name in ((labels, names.labels), (instances, names.instances)):
                _check_grown_size(ids, name, scene.picture, names.image)
            self._checked(scene.picture, labels, scene.mask, instances, names)
        with timer.phase("plan"):
            steps = list(plan_extension(image.shape[0], image.shape[1], sides, self.session.size))
            plan = self._plan_steps(tiling, steps, scene.mask)
        pixels = int(np.count_nonzero(scene.mask))
        timer.begin(sum(1 + window.tiles for window in plan.windows))
        done = []
        for step, window in zip(steps, plan.windows, strict=True):
            scene.mask[step.fresh.slices] = True  # what the step before made beyond its own part
            if window.levels:
                done.append(self._edit_coarse_to_fine(window, scene, feather, batch_size, timer))
            else:
                self._edit_single_pass(_Batch([window]), scene, feather, timer)
                done.append(window)
            if match_surroundings:
                self._match_surroundings(window.site, scene, timer)
            scene.mask[step.fresh.slices] = False
        return EditResult(scene.picture, self._report(plan, done, timer, feather, match_surroundings, pixels))

    def close(self) -> None:
        self.session.close()

    def __enter__(self) -> Editor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _checked(
        self, image: Image, labels: LabelMap, mask: NDArray[Any], instances: LabelMap | None, names: InputNames
    ) -> Mask:
        """The mask as bool (H, W), after everything about the four arrays has been checked."""
        _check_photo(image, names.image)
        return self._checked_layout(labels, mask, instances, names, image, names.image)

    def _checked_layout(
        self,
        labels: LabelMap,
        mask: NDArray[Any],
        instances: LabelMap | None,
        names: InputNames,
        like: NDArray[Any],
        like_name: str,
    ) -> Mask:
        """The same without the photo; like: an array that has the size which all of them must have."""
        _check_ids(labels, names.labels, "label")
        _check_mask_type(mask, names.mask)
        _check_same_size(labels, names.labels, like, like_name)
        _check_same_size(mask, names.mask, like, like_name)
        if instances is not None:
            _check_ids(instances, names.instances, "instance")
            _check_same_size(instances, names.instances, like, like_name)
            _check_instance_range(instances, names.instances)
        edit_mask = mask if mask.dtype == np.bool_ else mask != 0
        check_mask(edit_mask, names.mask)
        check_labels(labels, self.classes, names.labels, where=edit_mask)
        return edit_mask

    def _plan(self, tiling: Tiling, mask: Mask, names: InputNames) -> _Plan:
        size = self.session.size
        fits = mask.shape == (size, size)
        if tiling == "off" and not fits:
            problem = f"{names.image} is {_size(mask)}, but without tiling it must have the model's size, {size}×{size}"
            raise InputError(problem, "use tiling auto, crop or cascade")
        if fits and tiling in ("auto", "off"):
            reason = "asked for" if tiling == "off" else f"the photo has the model's size, {size}×{size}"
            return _Plan(
                "off", reason, [WindowReport(full_image_window(mask), fit_letterbox(full_window(size, size), size))]
            )
        # Of a window that is carried up all of the mask is, lest its levels have gaps, whichever site it belongs to.
        return self._plan_windows(tiling, ((site, mask[site.window.slices]) for site in plan_windows(mask, size)))

    def _plan_steps(self, tiling: Tiling, steps: Sequence[OutpaintStep], mask: Mask) -> _Plan:
        if tiling == "off":
            raise UsageError("an extension cannot run without tiling", "use tiling auto, crop or cascade")
        return self._plan_windows(tiling, ((step.site, step.site.mask_of(mask)) for step in steps))

    def _plan_windows(self, tiling: Tiling, holes: Iterable[tuple[EditWindow, Mask]]) -> _Plan:
        """Whether each window is edited at once or carried up. holes: sites and what is masked in their windows."""
        lack = self.session.refine_unsupported
        if tiling == "cascade" and lack is not None:
            raise BundleError(
                f"this model cannot cascade here: {lack.problem}", f"{lack.hint}; or use tiling auto or crop"
            )
        size = self.session.size
        limit = size if tiling == "cascade" else CROP_LIMIT * size
        cascades = tiling != "crop" and lack is None
        windows, large = [], 0
        for site, hole in holes:
            is_large = max(hole.shape) > limit
            large += is_large
            levels = plan_pyramid(site.window, hole, size) if cascades and is_large else ()
            windows.append(WindowReport(site, fit_letterbox(site.window, size), levels))
        if tiling in ("crop", "cascade"):
            return _Plan(tiling, "asked for", windows)
        if not large:
            return _Plan("crop", f"no window is larger than {limit:g} pixels", windows)
        reason = f"{large} of {len(windows)} windows larger than {limit:g} pixels"
        if lack is None:
            return _Plan("cascade", reason, windows)
        note = f"{reason} are not carried up to their own size: {lack.problem}; {lack.hint}"
        return _Plan("crop", f"{reason}, but {lack.problem}", windows, (note,))

    def _report(
        self,
        plan: _Plan,
        done: Sequence[WindowReport],
        timer: PhaseTimer,
        feather: int,
        match_surroundings: bool,
        edited_pixels: int,
    ) -> EditReport:
        session = self.session
        return EditReport(
            backend=session.backend,
            device=session.device,
            precision=session.precision,
            provider=session.provider,
            tiling=plan.tiling,
            tiling_reason=plan.reason,
            windows=tuple(done),
            batches=timer.batches,
            feather=feather,
            match_surroundings=match_surroundings,
            edited_pixels=edited_pixels,
            milliseconds=timer.milliseconds,
            notes=(*plan.notes, *report_notes(done), *session.notes),
        )

    def _execute(
        self,
        plan: _Plan,
        scene: EditRegion,
        batches: Sequence[_Batch],
        batch_size: int,
        finish: _Finish,
        timer: PhaseTimer,
    ) -> EditResult:
        """All of a plan, in the scene's picture. batches: its windows without levels."""
        timer.begin(sum(1 + window.tiles for window in plan.windows))
        for batch in batches:
            self._edit_single_pass(batch, scene, finish.feather, timer)
        done = [
            self._edit_coarse_to_fine(window, scene, finish.feather, batch_size, timer) if window.levels else window
            for window in plan.windows
        ]
        if finish.match_surroundings:
            for window in done:
                self._match_surroundings(window.site, scene, timer)
        pixels = int(np.count_nonzero(scene.mask))
        report = self._report(plan, done, timer, finish.feather, finish.match_surroundings, pixels)
        return EditResult(scene.picture, report)

    def _edit_single_pass(self, batch: _Batch, scene: EditRegion, feather: int, timer: PhaseTimer) -> None:
        """A batch of windows at the model's size, stitched into the scene's picture."""
        with timer.phase("prepare"):
            if batch.run is None:
                inputs = stacked([_frame_input(window.frame, scene) for window in batch.windows])
                run = partial(self.session.run, inputs)
            else:
                run = partial(batch.run, _frame_images(batch, scene))
        with timer.phase("run"):
            edited = run()
        with timer.phase("stitch"):
            _paste_batch(batch.windows, edited, scene, feather)
        timer.batches += 1
        timer.advance(len(batch.windows))

    def _edit_coarse_to_fine(
        self, planned: WindowReport, scene: EditRegion, feather: int, batch_size: int, timer: PhaseTimer
    ) -> WindowReport:
        """One window, coarse at first, then carried up to its own size and stitched into the scene's picture."""
        frame, levels = planned.frame, planned.levels
        with timer.phase("prepare"):
            inputs = stacked([_frame_input(frame, scene)])
        part = scene.cut(frame.window)
        carried = cascade(self.session, frame, inputs, levels, part, batch_size, timer)
        with timer.phase("stitch"):
            region = levels[-1].region.slices
            content = np.rint(carried.canvas, out=carried.canvas).astype(np.uint8)
            stitch(part.picture[region], content, planned.site.mask_of(scene.mask)[region], feather)
        return replace(planned, measured=carried.levels, between_levels=carried.between_levels, notes=carried.notes)

    @staticmethod
    def _match_surroundings(site: EditWindow, scene: EditRegion, timer: PhaseTimer) -> None:
        part = scene.cut(site.window)
        with timer.phase("stitch"):
            match_part(part.picture, part.labels, site.mask_of(scene.mask))


class PreparedEdit:
    """What labels and mask decide, known already: for the frames of a video, or many photos of one view.

    Made by `Editor.prepare`, whose editor must stay open. `edit` may be called from several threads at once where the
    session's `run` may.
    """

    def __init__(
        self,
        editor: Editor,
        plan: _Plan,
        scene: EditRegion,
        batches: Sequence[_Batch],
        batch_size: int,
        finish: _Finish,
        names: InputNames,
    ) -> None:
        """scene: everything but the picture. batches: with their layouts."""
        self._editor = editor
        self._plan = plan
        self._scene = scene
        self._batches = batches
        self._batch_size = batch_size
        self._finish = finish
        self._names = names

    def edit(self, image: Image, *, progress: Progress | None = None) -> EditResult:
        """`Editor.edit` of this image with the prepared layout: the same picture, and a report of what was left to do.

        image: uint8 (H, W, 3) RGB of the size of the labels. Raises InputError.
        """
        names, timer = self._names, PhaseTimer(progress)
        with timer.phase("validate"):
            _check_photo(image, names.image)
            _check_same_size(image, names.image, self._scene.labels, names.labels)
        scene = self._scene._replace(picture=image.copy())
        return self._editor._execute(self._plan, scene, self._batches, self._batch_size, self._finish, timer)


class _Plan(NamedTuple):
    tiling: Literal["off", "crop", "cascade"]
    reason: str
    windows: list[WindowReport]
    notes: tuple[str, ...] = ()


class _Finish(NamedTuple):
    """What becomes of a window once the network has drawn it."""

    feather: int
    match_surroundings: bool


class _Batch(NamedTuple):
    """Windows for one call of the session; if prepared, with the call that knows their layouts."""

    windows: list[WindowReport]
    holes: tuple[Mask, ...] = ()
    run: LayoutRun | None = None


def _batches(plan: _Plan, batch_size: int) -> list[_Batch]:
    at_once = [window for window in plan.windows if not window.levels]
    return [_Batch(at_once[start : start + batch_size]) for start in range(0, len(at_once), batch_size)]


# ---- checks ----


def _check_options(tiling: str, feather: int, batch_size: int) -> None:
    if tiling not in get_args(Tiling):
        raise UsageError(f"tiling {tiling!r} does not exist", f"choose one of {', '.join(get_args(Tiling))}")
    if feather < 0:
        raise UsageError(f"feather {feather} is negative", "give a number of pixels, 0 for none")
    if batch_size < 1:
        raise UsageError(f"batch size {batch_size} is too small", "give 1 or more")


def _check_photo(image: Image, name: str) -> None:
    _check_array(image, name)
    if image.dtype != np.uint8:
        raise InputError(f"{name} has type {image.dtype}, expected uint8", "convert it to 8 bits, 0..255")
    if image.ndim != 3 or image.shape[2] != 3:
        raise InputError(f"{name} has shape {image.shape}, expected (height, width, 3)", "convert it to RGB")
    if image.size == 0:
        raise InputError(f"{name} is {_size(image)}, it has no pixels")


def _check_ids(ids: LabelMap, name: str, kind: str) -> None:
    _check_array(ids, name)
    if ids.ndim != 2:
        hint = "turn a color label map into ids first: spmdeploy labels convert" if ids.ndim == 3 else None
        raise InputError(f"{name} has shape {ids.shape}, expected (height, width) with one {kind} id a pixel", hint)
    if not np.issubdtype(ids.dtype, np.integer):
        raise InputError(f"{name} has type {ids.dtype}, expected integer {kind} ids")


def _check_mask_type(mask: NDArray[Any], name: str) -> None:
    _check_array(mask, name)
    if mask.ndim != 2:
        raise InputError(f"{name} has shape {mask.shape}, expected (height, width)", "a mask has one channel")
    if mask.dtype != np.bool_ and not np.issubdtype(mask.dtype, np.integer):
        hint = "decide what is edited, for example mask > 0.5"
        raise InputError(f"{name} has type {mask.dtype}, expected bool or integers (0 = keep)", hint)


def check_extension(sides: Padding, shape: tuple[int, ...], name: str) -> None:
    """UsageError unless a photo of that shape can grow by so much. name: what the error calls it."""
    hint = "give the pixels to add on the left, top, right and bottom, for example 0,0,256,0"
    if min(sides) < 0:
        raise UsageError(f"{name} cannot grow by {min(sides)} pixels", hint)
    if not any(sides):
        raise UsageError(f"{name} grows by 0 pixels on every side: nothing would be new", hint)
    height, width = extended_size(shape, sides)
    if height * width > MAX_MEGAPIXELS * 1_000_000:
        problem = f"{name} would grow to {width}×{height}, {height * width / 1e6:.0f} megapixels"
        raise UsageError(f"{problem}; at most {MAX_MEGAPIXELS} are made", "let it grow by less")


def _check_grown_size(ids: LabelMap | None, name: str, grown: Image, image_name: str) -> None:
    if isinstance(ids, np.ndarray) and ids.shape[:2] != grown.shape[:2]:
        problem = f"{name}: {_size(ids)}, but {image_name} grows to {_size(grown)}; the sizes must match"
        raise InputError(problem, "give a map of the whole grown picture: what is new has labels too")


def _check_array(array: object, name: str) -> None:
    if not isinstance(array, np.ndarray):
        raise InputError(f"{name} is a {type(array).__name__}, expected a numpy array")


def _check_same_size(array: NDArray[Any], name: str, image: NDArray[Any], image_name: str) -> None:
    if array.shape[:2] != image.shape[:2]:
        problem = f"{name}: {_size(array)}, but {image_name}: {_size(image)}; the sizes must match"
        raise InputError(problem, f"resize {name} with nearest-neighbor")


def _check_instance_range(instances: LabelMap, name: str) -> None:
    limits = np.iinfo(np.int32)
    lowest, highest = int(instances.min()), int(instances.max())
    if lowest < limits.min or highest > limits.max:
        raise InputError(f"{name} holds ids from {lowest} to {highest}, which do not fit into 32 bits")


def _size(array: NDArray[Any]) -> str:
    """Width×height, the way picture sizes are written."""
    return f"{array.shape[1]}×{array.shape[0]}"


# ---- from the photo to the model and back ----


def _grown(image: Image, labels: LabelMap, sides: Padding, instances: LabelMap | None) -> EditRegion:
    """The photo in a larger picture, of which the rest is to be made."""
    picture = np.zeros((*extended_size(image.shape, sides), 3), np.uint8)
    picture[image_window(image.shape, sides).slices] = image
    return EditRegion(picture, labels, padding_mask(image.shape, sides), instances)


def _frame_input(frame: Letterbox, scene: EditRegion) -> ModelInput:
    return model_input(scene.cut(frame.window), frame.height, frame.width, frame.size)


def _with_layout(session: Backend, windows: list[WindowReport], scene: EditRegion) -> _Batch:
    """A batch whose layouts the session has been given. scene: of which the picture is not read."""
    holes, layouts = [], []
    for window in windows:
        frame = window.frame
        part = scene.cut(frame.window)
        holes.append(resize_mask(part.mask, frame.height, frame.width))
        layouts.append(layout_tensors(part, holes[-1], frame.size))
    return _Batch(windows, tuple(holes), bind_layout(session, LayoutInput(*map(np.stack, zip(*layouts, strict=True)))))


def _frame_images(batch: _Batch, scene: EditRegion) -> NDArray[np.uint8]:
    """The images of a prepared batch: uint8 (B, size, size, 3)."""
    frames = [window.frame for window in batch.windows]
    parts = [scene.cut(frame.window).picture for frame in frames]
    return np.stack(
        [image_input(part, hole, it.size) for part, hole, it in zip(parts, batch.holes, frames, strict=True)]
    )


def _paste_batch(windows: list[WindowReport], edited: Image, scene: EditRegion, feather: int) -> None:
    """Stitch a batch of results, uint8 (B, size, size, 3), into the scene's picture, in place."""
    size = windows[0].frame.size
    expected = (len(windows), size, size, 3)
    assert edited.shape == expected and edited.dtype == np.uint8, (edited.shape, edited.dtype, expected)
    for window, square in zip(windows, edited, strict=True):
        frame, site = window.frame, window.site
        content = square[: frame.height, : frame.width]
        if frame.shrinks:
            content = resize_photo(content, frame.window.height, frame.window.width)
        stitch(scene.picture[site.window.slices], content, site.mask_of(scene.mask), feather)
