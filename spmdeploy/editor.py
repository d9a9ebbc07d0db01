"""One edit from arrays to arrays: check the inputs, plan the windows, run them in batches, stitch the results.

Two promises hold for every session, because they are kept here and not left to the network: pixels outside the mask
come back bit for bit, and pixels under the mask never reach the session (see `_model_input`), so nothing of what was
hidden shows in the result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from spmdeploy.errors import InputError, UsageError
from spmdeploy.images import check_mask, resize_mask_covering, resize_photo
from spmdeploy.labels import ClassTable, check_labels
from spmdeploy.tiling.frames import Frame, frame_of, layout_positions, pad_by_reflection
from spmdeploy.tiling.pieces import Mask, Picture
from spmdeploy.tiling.stitching import extend_known, stitch
from spmdeploy.tiling.windows import plan_windows, whole_photo

if TYPE_CHECKING:
    from spmdeploy.runtime.session import Session

Ids = NDArray[np.integer[Any]]
Progress = Callable[[int, int], None]
Tiling = Literal["auto", "off", "crop"]

# Photo pixels under the mask over which the photo's surroundings pass over into the edit.
FEATHER = 3
# Windows per call of the session: enough to fill a small GPU, few enough for a CPU's memory.
BATCH_SIZE = 4
# A window is said to lose detail when it is shrunk by more than this.
DETAIL_LOST_BELOW = 1 / 1.5
# What the session gets in place of hidden pixels: the known ones continued for a few pixels, then the grey that stands
# for "nothing here" in the network (0 in its [-1, 1]). The network halves its picture before it blanks the hole, so
# that it sees one pixel deep into the mask; the rest of the continuation is a safety margin for other networks.
HIDDEN_GREY = 128
CONTINUED = 4
# Stands for ids outside the mask that do not fit into a byte; under it `check_labels` lets none through.
_UNKNOWN = 255


@dataclass(frozen=True, slots=True)
class InputNames:
    """What error messages call the inputs: file names where there are files."""

    image: str = "image"
    labels: str = "labels"
    mask: str = "mask"
    instances: str = "instances"


@dataclass(frozen=True, slots=True)
class EditReport:
    """How an edit was made.

    tiling is the mode that ran ("auto" is resolved, tiling_reason says why); windows hold their place in the photo and
    their scale in the model; milliseconds has an entry per phase: validate, plan, prepare, run (the session alone),
    stitch.
    """

    backend: str
    device: str
    precision: str
    provider: str
    tiling: Literal["off", "crop"]
    tiling_reason: str
    windows: tuple[Frame, ...]
    batches: int
    feather: int
    edited_pixels: int
    milliseconds: dict[str, float]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "backend": self.backend,
            "device": self.device,
            "precision": self.precision,
            "provider": self.provider,
            "tiling": self.tiling,
            "tiling_reason": self.tiling_reason,
            "windows": [_window_json(frame) for frame in self.windows],
            "batches": self.batches,
            "feather": self.feather,
            "edited_pixels": self.edited_pixels,
            "milliseconds": {phase: round(spent, 3) for phase, spent in self.milliseconds.items()},
            "notes": list(self.notes),
        }


def _window_json(frame: Frame) -> dict[str, Any]:
    window = frame.window
    place = {"top": window.top, "left": window.left, "height": window.height, "width": window.width}
    return {**place, "scale": round(frame.scale, 4)}


class EditResult(NamedTuple):
    """image: uint8 (H, W, 3) RGB, equal to the photo wherever the mask is not set."""

    image: Picture
    report: EditReport


class Editor:
    """Edits photos of any size with one session; use it as a context manager or call `close`.

    choices: why it is this session, a line for each choice that was left open; first the signature, if one was checked.
    """

    def __init__(self, session: Session, classes: ClassTable, choices: tuple[str, ...] = ()) -> None:
        self.session = session
        self.classes = classes
        self.choices = choices

    def edit(
        self,
        image: Picture,
        labels: Ids,
        mask: NDArray[Any],
        instances: Ids | None = None,
        *,
        tiling: Tiling = "auto",
        feather: int = FEATHER,
        batch_size: int = BATCH_SIZE,
        progress: Progress | None = None,
        names: InputNames | None = None,
    ) -> EditResult:
        """Regenerate the pixels under the mask so that they show what the labels say.

        image: uint8 (H, W, 3) RGB. labels: integer (H, W). mask: bool or integer (H, W), 0 = keep, anything else =
        edit. instances: integer (H, W) or None, then the labels stand in. tiling: "off" runs the whole photo at once
        and wants it to have the model's size, "crop" edits a context window around every piece of the mask, "auto"
        takes "off" where it fits. feather: see `stitch`. progress(done, total) counts windows, from (0, total) on.

        Labels matter under the mask only, with one exception that is the network's own definition and was kept because
        it was trained that way: a masked pixel at the mask's rim counts as an object's edge if the instance (or label)
        of the known pixel next to it differs. Ids there are compared, never interpreted, and need not be valid.

        Raises InputError (arrays that do not fit each other, the model or the mode), UsageError (options).
        """
        names = names or InputNames()
        clock = _Stopwatch()
        with clock.phase("validate"):
            _check_options(tiling, feather, batch_size)
            edit_mask = self._checked(image, labels, mask, instances, names)
        with clock.phase("plan"):
            mode, reason = self._choose(tiling, image, names)
            frames = self._frames(mode, edit_mask)
        result = image.copy()
        batches = [frames[start : start + batch_size] for start in range(0, len(frames), batch_size)]
        _tell(progress, 0, len(frames))
        for number, batch in enumerate(batches):
            with clock.phase("prepare"):
                inputs = _stacked([_model_input(frame, result, labels, edit_mask, instances) for frame in batch])
            with clock.phase("run"):
                edited = self.session.run(*inputs)
            with clock.phase("stitch"):
                _put_back(batch, edited, result, edit_mask, feather)
            _tell(progress, number * batch_size + len(batch), len(frames))
        session = self.session
        report = EditReport(
            backend=session.backend,
            device=session.device,
            precision=session.precision,
            provider=session.provider,
            tiling=mode,
            tiling_reason=reason,
            windows=tuple(frames),
            batches=len(batches),
            feather=feather,
            edited_pixels=int(np.count_nonzero(edit_mask)),
            milliseconds=clock.milliseconds,
            notes=_notes(frames),
        )
        return EditResult(result, report)

    def close(self) -> None:
        self.session.close()

    def __enter__(self) -> Editor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _checked(
        self, image: Picture, labels: Ids, mask: NDArray[Any], instances: Ids | None, names: InputNames
    ) -> Mask:
        """The mask as bool (H, W), after everything about the four arrays has been checked."""
        _check_photo(image, names.image)
        _check_ids(labels, names.labels, "label")
        _check_mask_type(mask, names.mask)
        _check_same_size(labels, names.labels, image, names.image)
        _check_same_size(mask, names.mask, image, names.image)
        if instances is not None:
            _check_ids(instances, names.instances, "instance")
            _check_same_size(instances, names.instances, image, names.image)
            _check_instance_range(instances, names.instances)
        edit_mask = mask if mask.dtype == np.bool_ else mask != 0
        check_mask(edit_mask, names.mask)
        check_labels(labels, self.classes, names.labels, where=edit_mask)
        return edit_mask

    def _choose(self, tiling: Tiling, image: Picture, names: InputNames) -> tuple[Literal["off", "crop"], str]:
        size = self.session.size
        fits = image.shape[:2] == (size, size)
        if tiling == "off" and not fits:
            problem = (
                f"{names.image} is {_size(image)}, but without tiling it must have the model's size, {size}×{size}"
            )
            raise InputError(problem, "use tiling auto or crop")
        if tiling != "auto":
            return tiling, "asked for"
        if fits:
            return "off", f"the photo has the model's size, {size}×{size}"
        return "crop", f"the photo is {_size(image)}, not the model's {size}×{size}"

    def _frames(self, mode: Literal["off", "crop"], mask: Mask) -> list[Frame]:
        size = self.session.size
        windows = [whole_photo(*mask.shape)] if mode == "off" else plan_windows(mask, size)
        return [frame_of(window, size) for window in windows]


# ---- checks ----


def _check_options(tiling: str, feather: int, batch_size: int) -> None:
    if tiling not in get_args(Tiling):
        raise UsageError(f"tiling {tiling!r} does not exist", f"choose one of {', '.join(get_args(Tiling))}")
    if feather < 0:
        raise UsageError(f"feather {feather} is negative", "give a number of pixels, 0 for none")
    if batch_size < 1:
        raise UsageError(f"batch size {batch_size} is too small", "give 1 or more")


def _check_photo(image: Picture, name: str) -> None:
    _check_array(image, name)
    if image.dtype != np.uint8:
        raise InputError(f"{name} has type {image.dtype}, expected uint8", "convert it to 8 bits, 0..255")
    if image.ndim != 3 or image.shape[2] != 3:
        raise InputError(f"{name} has shape {image.shape}, expected (height, width, 3)", "convert it to RGB")
    if image.size == 0:
        raise InputError(f"{name} is {_size(image)}, it has no pixels")


def _check_ids(ids: Ids, name: str, kind: str) -> None:
    _check_array(ids, name)
    if ids.ndim != 2:
        hint = "turn a colour label map into ids first: spmdeploy labels convert" if ids.ndim == 3 else None
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


def _check_array(array: object, name: str) -> None:
    if not isinstance(array, np.ndarray):
        raise InputError(f"{name} is a {type(array).__name__}, expected a numpy array")


def _check_same_size(array: NDArray[Any], name: str, image: Picture, image_name: str) -> None:
    if array.shape[:2] != image.shape[:2]:
        problem = f"{name}: {_size(array)}, but {image_name}: {_size(image)}; the sizes must match"
        raise InputError(problem, f"resize {name} with nearest-neighbour")


def _check_instance_range(instances: Ids, name: str) -> None:
    limits = np.iinfo(np.int32)
    lowest, highest = int(instances.min()), int(instances.max())
    if lowest < limits.min or highest > limits.max:
        raise InputError(f"{name} holds ids from {lowest} to {highest}, which do not fit into 32 bits")


def _size(array: NDArray[Any]) -> str:
    """Width×height, the way picture sizes are written."""
    return f"{array.shape[1]}×{array.shape[0]}"


# ---- from the photo to the model and back ----


class _ModelInput(NamedTuple):
    """What the deploy graph takes, for one window (size, size[, 3]) or a batch of them (B, size, size[, 3])."""

    image: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    instances: NDArray[np.int32]
    mask: NDArray[np.uint8]


def _model_input(frame: Frame, picture: Picture, labels: Ids, mask: Mask, instances: Ids | None) -> _ModelInput:
    """One window in the model's frame, without the pixels that the mask hides."""
    window = frame.window.slices
    hole, ids = mask[window], labels[window]
    things = ids if instances is None else instances[window]
    if frame.shrinks:
        hole = resize_mask_covering(mask[window], frame.height, frame.width)
        rows, columns = layout_positions(mask[window], hole)
        ids, things = ids[rows, columns], things[rows, columns]
        photo = np.array(resize_photo(picture[window], frame.height, frame.width))
    else:
        photo = picture[window].copy()
    photo[hole] = HIDDEN_GREY
    extend_known(photo, hole, CONTINUED)
    class_ids = _byte_ids(ids)
    things = class_ids if instances is None else things
    return _ModelInput(
        image=pad_by_reflection(photo, frame.size),
        labels=pad_by_reflection(class_ids, frame.size),
        instances=pad_by_reflection(things.astype(np.int32), frame.size),
        mask=pad_by_reflection(hole.astype(np.uint8), frame.size),
    )


def _stacked(inputs: list[_ModelInput]) -> _ModelInput:
    return _ModelInput(*(np.stack(parts) for parts in zip(*inputs, strict=True)))


def _byte_ids(ids: Ids) -> NDArray[np.uint8]:
    return np.where((ids >= 0) & (ids <= _UNKNOWN), ids, _UNKNOWN).astype(np.uint8)


def _put_back(frames: list[Frame], edited: Picture, picture: Picture, mask: Mask, feather: int) -> None:
    """Stitch a batch of results, uint8 (B, size, size, 3), into the picture, in place."""
    expected = (len(frames), frames[0].size, frames[0].size, 3)
    assert edited.shape == expected and edited.dtype == np.uint8, (edited.shape, edited.dtype, expected)
    for frame, square in zip(frames, edited, strict=True):
        content = square[: frame.height, : frame.width]
        if frame.shrinks:
            content = resize_photo(content, frame.window.height, frame.window.width)
        stitch(picture[frame.window.slices], content, mask[frame.window.slices], feather)


# ---- what the report says ----


def _notes(frames: list[Frame]) -> tuple[str, ...]:
    return tuple(
        f"window {number} of {len(frames)} is {frame.window.width}×{frame.window.height} pixels and is edited at "
        f"{frame.width}×{frame.height}: detail is lost"
        for number, frame in enumerate(frames, start=1)
        if frame.scale < DETAIL_LOST_BELOW
    )


def _tell(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)


class _Stopwatch:
    """Milliseconds by phase, added up over the windows."""

    def __init__(self) -> None:
        self.milliseconds = dict.fromkeys(("validate", "plan", "prepare", "run", "stitch"), 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.milliseconds[name] += (time.perf_counter() - start) * 1000
