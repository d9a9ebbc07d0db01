"""The command `edit`."""

from __future__ import annotations

import threading
import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from spmdeploy.cli.console import closed_by_main, log, log_notes, print_result, progress_bar
from spmdeploy.cli.options import (
    BackendOption,
    Device,
    Json,
    Model,
    PrecisionOption,
    RequireSignature,
    Url,
    Verbose,
    device_from,
    open_editor_from_options,
    record_from,
    with_fields_of,
)
from spmdeploy.editing.options import EditOptions, EditRequest, option_fields
from spmdeploy.errors import UsageError
from spmdeploy.files import output_descriptor

if TYPE_CHECKING:
    from pathlib import Path

    from spmdeploy.editing.run import EditInputs, EditOutcome
    from spmdeploy.labels import ClassTable


@with_fields_of(EditRequest, EditOptions)
def edit(
    model: Model = None,
    backend: BackendOption = "auto",
    device: Device = "auto",
    url: Url = None,
    precision: PrecisionOption = "auto",
    require_signature: RequireSignature = None,
    verbose: Verbose = False,
    as_json: Json = False,
    **values: Any,
) -> None:
    """Edit one photo.

    --labels or --fill gives the content, --mask or --edited-from the region. All other pixels stay as they are. With
    --extend the photo grows beyond its borders; --labels is then a map of the extended photo. A session file (.zip) of
    the studio in place of the photo holds all of these and is replayed to the same bytes.
    """
    device = device_from(backend, device, url)
    if values["image"].suffix.lower() == ".zip":
        _replay(values, model, backend, device, precision, require_signature, verbose, as_json)
        return
    started = time.perf_counter()
    if as_json and output_descriptor(values["output"]) == 1:
        raise UsageError("--json and --output - would both write to standard output", "name a file for the image")
    request = record_from(EditRequest, values, options=record_from(EditOptions, values))
    with _Prefetcher(request) as prefetcher:
        editor = open_editor_from_options(
            model, backend, device, precision, require_signature, prefetcher.start, verbose
        )
        closed_by_main.enter_context(editor)
        opened = time.perf_counter()
        from spmdeploy.editing.run import run_edit

        prefetcher.start(editor.classes)
        with progress_bar("editing") as show:
            result = run_edit(editor, request, show, prefetcher.inputs)
        choices = editor.choices
    _print_outcome(result, choices, started, opened, as_json)


def _replay(
    values: dict[str, Any],
    model: Path | None,
    backend: str,
    device: str,
    precision: str,
    require_signature: str | None,
    verbose: bool,
    as_json: bool,
) -> None:
    """Run the edit of a session file."""
    from spmdeploy.editing.session import check_session_output, read_session, replay_session

    started = time.perf_counter()
    for one in (*option_fields(EditRequest), *option_fields(EditOptions)):
        name = one.field.name
        if name not in ("image", "output", "overwrite") and values[name] != one.field.default:
            raise UsageError(f"a session file has its own {one.column}", f"leave --{one.column.replace('_', '-')} out")
    session, output = read_session(values["image"]), values["output"]
    check_session_output(output, values["overwrite"])
    with open_editor_from_options(model, backend, device, precision, require_signature, verbose=verbose) as editor:
        opened = time.perf_counter()
        with progress_bar("editing") as show:
            result = replay_session(editor, session, output, values["overwrite"], show)
        choices = editor.choices
    _print_outcome(result, choices, started, opened, as_json)


def _print_outcome(result: EditOutcome, choices: tuple[str, ...], started: float, opened: float, as_json: bool) -> None:
    ended = time.perf_counter()
    log_notes(result.notes)
    seconds = {"open": round(opened - started, 4), "edit": round(ended - opened, 4)}
    payload = {**result.to_json(), "choices": list(choices), "seconds": seconds}
    windows = len(result.report.windows)
    summary = f"{result.output}: {result.report.edited_pixels} pixels in {windows} window{'s' * (windows != 1)}"
    if tiles := result.report.tiles:
        summary += f", {tiles} tile{'s' * (tiles != 1)}"
    lines = [f"{summary}, {result.report.provider}, {result.report.precision}, {ended - started:.2f} s"]
    lines += [f"{result.sheet}: before, labels, mask, after"] if result.sheet else []
    lines += [f"{result.explain}: windows and tiles"] if result.explain else []
    if output_descriptor(result.output) == 1:
        for line in lines:
            log(line)
    else:
        print_result("edit", payload, lines, as_json)


class _Prefetcher(AbstractContextManager["_Prefetcher"]):
    """Reads the files of an edit in a thread while the graph is being loaded. The thread ends with the block."""

    def __init__(self, request: EditRequest) -> None:
        self._request = request
        self._thread: threading.Thread | None = None
        self._inputs: EditInputs | None = None
        self._error: BaseException | None = None

    def start(self, classes: ClassTable) -> None:
        """Start reading; further calls do nothing."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._read, args=(classes,), name="spmdeploy files")
            self._thread.start()

    def inputs(self) -> EditInputs:
        """What was read. Raises what reading raised."""
        assert self._thread is not None
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._inputs is not None
        return self._inputs

    def _read(self, classes: ClassTable) -> None:
        try:
            from spmdeploy.editing.run import read_inputs

            self._inputs = read_inputs(self._request, classes)
        except BaseException as error:  # raised again by inputs()
            self._error = error

    def __exit__(self, *error: object) -> None:
        if self._thread is not None:
            self._thread.join()
