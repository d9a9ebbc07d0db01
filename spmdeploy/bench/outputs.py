"""The files that a run leaves: whole or not at all, and nothing in the place of another unless that was allowed."""

from __future__ import annotations

import os
from pathlib import Path

from spmdeploy.bench.plot import plot
from spmdeploy.bench.results import Record, record_text
from spmdeploy.bench.tables import markdown
from spmdeploy.errors import InputError
from spmdeploy.files import EXISTS_HINT, atomic_write
from spmdeploy.imaging import files as images


def check_outputs(record: Path | None, picture: Path | None, report: Path | None, overwrite: bool) -> None:
    """Before the work, not after it. Raises InputError."""
    for path, suffix in ((record, ".json"), (picture, ".png"), (report, ".md")):
        if path is not None:
            _check(path, suffix, overwrite)


def write_outputs(
    record: Record, text: Path | None, picture: Path | None, report: Path | None, overwrite: bool
) -> None:
    """The record itself, a picture and a report of it, each where it was asked for. Raises InputError."""
    if text is not None:
        _write(text, record_text(record))
    if picture is not None:
        images.write_picture(picture, plot(record), overwrite)
    if report is not None:
        _write(report, markdown(record))


def _check(path: Path, suffix: str, overwrite: bool) -> None:
    if path.suffix != suffix:
        raise InputError(f"{path} does not end in {suffix}", f"name it {path.with_suffix(suffix).name}")
    if not path.parent.is_dir():
        raise InputError(f"the folder of {path} does not exist", f"mkdir -p {path.parent}")
    if path.is_dir():
        raise InputError(f"{path} is a folder", "name a file in it")
    if os.path.lexists(path) and not overwrite:
        raise InputError(f"{path} exists already", EXISTS_HINT)


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as stream:
        stream.write(text.encode())
