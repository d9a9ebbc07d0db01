"""What `spmdeploy edit` does once its command line has been read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import spmdeploy
from spmdeploy.cli.talk import log, log_notes, print_result, progress_bar, require_extra

if TYPE_CHECKING:
    from spmdeploy.editing.editor import Editor, Tiling
    from spmdeploy.editing.options import EditRequest
    from spmdeploy.editing.run import EditInputs
    from spmdeploy.labels import ClassTable


@dataclass(frozen=True)
class EditOptions:
    """The arguments and options of `edit`, with the values that they have where they are left out."""

    image: Path
    output: Path
    labels: Path | None = None
    fill: str | None = None
    mask: Path | None = None
    edited_from: Path | None = None
    extend: str | None = None
    instances: Path | None = None
    grow: int | None = None
    sheet: Path | None = None
    explain: Path | None = None
    model: Path | None = None
    backend: str = "auto"
    device: str = "auto"
    precision: str = "auto"
    tiling: Tiling = "auto"
    match_surroundings: bool = False
    require_signature: str | None = None
    overwrite: bool = False
    as_json: bool = False


def run_edit(options: EditOptions) -> None:
    """Edits, and prints the result."""
    from spmdeploy.editing.options import EditRequest, parse_padding

    started = time.perf_counter()
    output, sheet, explain = options.output, options.sheet, options.explain
    files = EditRequest(
        image=options.image,
        output=output,
        labels=options.labels,
        fill=options.fill,
        mask=options.mask,
        edited_from=options.edited_from,
        extend=None if options.extend is None else parse_padding(options.extend),
        instances=options.instances,
        grow=options.grow,
        sheet=sheet,
        explain=explain,
        overwrite=options.overwrite,
        match_surroundings=options.match_surroundings,
    )
    with (
        _Prefetcher(files) as ahead,
        open_editor_from_options(
            options.model,
            options.backend,
            options.device,
            options.precision,
            options.require_signature,
            ahead.start,
        ) as editor,
    ):
        opened = time.perf_counter()
        from spmdeploy.editing.run import run_edit_files

        ahead.start(editor.classes)
        with progress_bar("editing") as show:
            result = run_edit_files(editor, files, options.tiling, show, ahead.inputs)
        choices = editor.choices
    ended = time.perf_counter()
    log_notes(result.notes)
    seconds = {"open": round(opened - started, 4), "edit": round(ended - opened, 4)}
    payload = {**result.to_json(), "choices": list(choices), "seconds": seconds}
    windows = len(result.report.windows)
    summary = f"{output}: {result.report.edited_pixels} pixels in {windows} window{'s' * (windows != 1)}"
    if tiles := result.report.tiles:
        summary += f", {tiles} tile{'s' * (tiles != 1)}"
    lines = [f"{summary}, {result.report.provider}, {result.report.precision}, {ended - started:.2f} s"]
    lines += [f"{sheet}: before, labels, mask, after"] if sheet else []
    lines += [f"{explain}: windows and tiles"] if explain else []
    print_result("edit", payload, lines, options.as_json)


def open_editor_from_options(
    model: Path | None,
    backend: str,
    device: str,
    precision: str,
    require_signature: str | None,
    on_loading: Callable[[ClassTable], None] = lambda classes: None,
) -> Editor:
    """The editor, its choices told on stderr."""
    with require_extra("export"):
        editor = spmdeploy.open_editor(model, backend, device, precision, require_signature, on_loading)
    for choice in editor.choices:
        log(choice)
    return editor


class _Prefetcher(AbstractContextManager["_Prefetcher"]):
    """The files of an edit, read by a thread of its own while the graph is loaded. With the block that thread ends."""

    def __init__(self, files: EditRequest) -> None:
        self._files = files
        self._thread: threading.Thread | None = None
        self._inputs: EditInputs | None = None
        self._error: BaseException | None = None

    def start(self, classes: ClassTable) -> None:
        """Only the first call counts."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._read, args=(classes,), name="spmdeploy files")
            self._thread.start()

    def inputs(self) -> EditInputs:
        """What was read; raises what reading raised."""
        assert self._thread is not None
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._inputs is not None
        return self._inputs

    def _read(self, classes: ClassTable) -> None:
        try:
            from spmdeploy.editing.run import read_inputs

            self._inputs = read_inputs(self._files, classes)
        except BaseException as error:  # of which kind is for the caller
            self._error = error

    def __exit__(self, *error: object) -> None:
        if self._thread is not None:
            self._thread.join()
