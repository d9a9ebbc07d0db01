"""Edits of files in memory, and the session file that replays one."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from spmdeploy.editing.editor import Editor
from spmdeploy.editing.options import EditOptions
from spmdeploy.editing.report import EditReport
from spmdeploy.editing.run import EditOutcome, extend_photo
from spmdeploy.editing.validate import InputNames, check_padding
from spmdeploy.errors import InputError, UsageError
from spmdeploy.files import atomic_write
from spmdeploy.imaging import files as images
from spmdeploy.imaging.mask_files import read_mask_file
from spmdeploy.inputs import FilePath, read_input
from spmdeploy.serialization import Schema
from spmdeploy.types import Padding, Progress

MAX_SESSION_BYTES = 1 << 30
_SCHEMA = Schema(
    "spmdeploy.session/",
    1,
    "a session file of the studio",
    InputError,
    "download one on the page of `spmdeploy studio`",
)
_RECORD_FILE = "session.json"
_PARTS = {"photo": "photo", "labels": "labels.png", "mask": "mask.png", "instances": "instances.png"}


@dataclass(frozen=True, eq=False)
class Session:
    """One edit of one photo: all of its inputs except the model.

    Raises:
        UsageError: the fields contradict each other.
    """

    photo: bytes
    """An image file, as `read_photo` reads it."""
    photo_name: str = "photo"
    """File name of the photo, for messages."""
    labels: bytes | None = None
    """A label map, as `read_labels` reads it; None with `fill`."""
    fill: str | None = None
    """One class for the whole mask, by name or id."""
    mask: bytes | None = None
    """A mask, as `read_mask` reads it; None with `extend`."""
    instances: bytes | None = None
    """An instance map, as `read_instances` reads it."""
    extend: Padding | None = None
    """Pixels to extend the photo by; labels and instances then have the extended size."""
    options: EditOptions = field(default_factory=EditOptions)

    def __post_init__(self) -> None:
        if (self.labels is None) == (self.fill is None):
            raise UsageError("give either labels or fill", "labels is a label map, fill one class for the whole mask")
        if (self.mask is None) == (self.extend is None):
            raise UsageError("give either mask or extend", "to edit and to extend are two steps")
        if self.options.match_surroundings and self.labels is None:
            raise UsageError(
                "match_surroundings needs the labels of the photo's known pixels too", "give labels instead of fill"
            )


@dataclass(frozen=True, eq=False)
class SessionResult:
    """The edited photo as a PNG file, and how it was made."""

    png: bytes
    width: int
    height: int
    report: EditReport
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Record:
    """session.json."""

    photo_name: str
    fill: str | None
    extend: Padding | None
    options: EditOptions


def run_session(editor: Editor, session: Session, progress: Progress | None = None) -> SessionResult:
    """Edit the photo of a session.

    Args:
        editor: stays open.
        session: the inputs.
        progress: called with the windows and tiles done and their total.

    Returns:
        The bytes that `spmdeploy edit` writes to a .png for the same inputs.

    Raises:
        InputError, UsageError: as `Editor.edit`, naming the part of the session that is at fault.
    """
    photo = images.read_photo(session.photo_name, session.photo)
    names = InputNames(
        image=session.photo_name,
        labels="labels" if session.fill is None else f"fill {session.fill}",
        turned=photo.orientation > 4,
    )
    canvas = photo
    if session.extend is not None:
        check_padding(session.extend, photo.pixels.shape, session.photo_name)
        canvas = extend_photo(photo, session.extend)
    if session.labels is None:
        labels = np.full(canvas.pixels.shape[:2], editor.classes.find(str(session.fill)).id, np.uint8)
    else:
        labels = images.read_labels("labels", session.labels, editor.classes)
    instances = None if session.instances is None else images.read_instances("instances", session.instances)
    notes: tuple[str, ...] = ()
    if session.extend is not None:
        result = editor.extend(
            photo.pixels, labels, session.extend, instances, session.options, progress=progress, names=names
        )
    else:
        mask, notes = read_mask_file("mask", session.mask)
        result = editor.edit(photo.pixels, labels, mask, instances, session.options, progress=progress, names=names)
    png = images.encode_photo(replace(canvas, pixels=result.image))
    height, width = result.image.shape[:2]
    return SessionResult(png, width, height, result.report, (*photo.notes, *notes, *result.report.notes))


def replay_session(
    editor: Editor, session: Session, output: Path, overwrite: bool = False, progress: Progress | None = None
) -> EditOutcome:
    """Edit the photo of a session and write the result.

    Args:
        editor: stays open.
        session: the inputs.
        output: a .png file.
        overwrite: replace an existing file.
        progress: called with the windows and tiles done and their total.

    Raises:
        InputError, UsageError: as `run_session`, or the file cannot be written. Nothing has been written then.
    """
    check_session_output(output, overwrite)
    result = run_session(editor, session, progress)
    with atomic_write(output, overwrite) as stream:
        stream.write(result.png)
    return EditOutcome(output, None, None, (result.width, result.height), result.report, result.notes)


def check_session_output(output: Path, overwrite: bool) -> None:
    """Raise InputError unless a session's result can be written to the path."""
    if images.check_output(output, overwrite) != "PNG":
        raise InputError(f"{output}: a session is replayed to the bytes of a PNG file", "name the output .png")


def write_session(session: Session) -> bytes:
    """Return the session file: an uncompressed zip of the photo, the maps and session.json."""
    record = _Record(session.photo_name, session.fill, session.extend, session.options)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_entry(_RECORD_FILE), json.dumps({"schema": _SCHEMA.name, **asdict(record)}, indent=1))
        for name, file in _PARTS.items():
            content = getattr(session, name)
            if content is not None:
                archive.writestr(_entry(file), content)
    return stream.getvalue()


def _entry(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))  # no time stamp: equal sessions are equal files


def read_session(path: FilePath) -> Session:
    """Return the session in a file made by `write_session`.

    Raises:
        InputError: names what is missing or wrong in other files.
    """
    content = read_input(path, MAX_SESSION_BYTES)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
            if sum(sizes.values()) > MAX_SESSION_BYTES:
                raise InputError(f"{path} unpacks to more than {MAX_SESSION_BYTES >> 20} MiB", _SCHEMA.hint)
            parts = {name: archive.read(file) for name, file in _PARTS.items() if file in sizes}
            content = archive.read(_RECORD_FILE)
    except InputError:
        raise
    except Exception as exc:  # zipfile raises BadZipFile, KeyError, NotImplementedError, RuntimeError, zlib.error ...
        raise InputError(f"{path} is not {_SCHEMA.description}: {exc}", _SCHEMA.hint) from exc
    source = f"{path}: {_RECORD_FILE}"
    if "photo" not in parts:
        raise InputError(f"{path} holds no photo", _SCHEMA.hint)
    try:
        record = _SCHEMA.convert(_SCHEMA.parse(content, source), _Record, source)
        return Session(
            photo_name=record.photo_name, fill=record.fill, extend=record.extend, options=record.options, **parts
        )
    except UsageError as exc:
        raise InputError(f"{source}: {exc.problem}", _SCHEMA.hint) from exc
