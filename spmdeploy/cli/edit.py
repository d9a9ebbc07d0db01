"""The command `edit`."""

from __future__ import annotations

import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from spmdeploy.cli.console import log_notes, print_result, progress_bar
from spmdeploy.cli.options import (
    BackendOption,
    Device,
    Json,
    MatchSurroundings,
    Model,
    Overwrite,
    PrecisionOption,
    RequireSignature,
    Tiling,
    open_editor_from_options,
)

if TYPE_CHECKING:
    from spmdeploy.editing.options import EditRequest
    from spmdeploy.editing.run import EditInputs
    from spmdeploy.labels import ClassTable


def edit(
    image: Annotated[Path, typer.Argument(help="The photo: 8-bit PNG, JPEG, WebP or BMP.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The edited photo; .png keeps known pixels exactly.")],
    labels: Annotated[Path | None, typer.Option("--labels", help="Label map: what the picture shall show.")] = None,
    fill: Annotated[str | None, typer.Option("--fill", help="One class for the whole mask, by name or id.")] = None,
    mask: Annotated[Path | None, typer.Option("--mask", help="White is edited, black is kept.")] = None,
    mask_threshold: Annotated[
        int | None, typer.Option("--mask-threshold", help="Edit where the mask has at least this value, 1 to 255.")
    ] = None,
    mask_alpha: Annotated[
        Literal["opaque", "transparent"] | None,
        typer.Option("--mask-alpha", metavar="opaque|transparent", help="Edit this part of the mask's alpha channel."),
    ] = None,
    edited_from: Annotated[
        Path | None, typer.Option("--edited-from", help="The labels before the change: the mask is what differs.")
    ] = None,
    extend: Annotated[
        str | None,
        typer.Option(
            "--extend", metavar="LEFT,TOP,RIGHT,BOTTOM", help="Grow the picture by so many pixels: these are the mask."
        ),
    ] = None,
    instances: Annotated[Path | None, typer.Option("--instances", help="Instance map, for the outlines.")] = None,
    grow: Annotated[
        int | None,
        typer.Option("--grow", help="Grow the mask by so many pixels. Default: 8 with --edited-from, else 0."),
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option("--sheet", help="Also write before / labels / mask / after side by side.")
    ] = None,
    explain: Annotated[
        Path | None, typer.Option("--explain", help="Also write a picture of the windows and tiles over the photo.")
    ] = None,
    model: Model = None,
    backend: BackendOption = "auto",
    device: Device = "auto",
    precision: PrecisionOption = "auto",
    tiling: Tiling = "auto",
    match_surroundings: MatchSurroundings = False,
    require_signature: RequireSignature = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Edit one photo.

    What it shall show comes from --labels or --fill, where it may change from --mask or --edited-from. All other pixels
    stay as they are. With --extend the picture grows; --labels is then a map of the grown picture.
    """
    from spmdeploy.editing.options import EditRequest, parse_padding

    started = time.perf_counter()
    files = EditRequest(
        image=image,
        output=output,
        labels=labels,
        fill=fill,
        mask=mask,
        mask_threshold=mask_threshold,
        mask_alpha=mask_alpha,
        edited_from=edited_from,
        extend=None if extend is None else parse_padding(extend),
        instances=instances,
        grow=grow,
        sheet=sheet,
        explain=explain,
        overwrite=overwrite,
        match_surroundings=match_surroundings,
    )
    with (
        _Prefetcher(files) as ahead,
        open_editor_from_options(
            model,
            backend,
            device,
            precision,
            require_signature,
            ahead.start,
        ) as editor,
    ):
        opened = time.perf_counter()
        from spmdeploy.editing.run import run_edit_files

        ahead.start(editor.classes)
        with progress_bar("editing") as show:
            result = run_edit_files(editor, files, tiling, show, ahead.inputs)
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
    print_result("edit", payload, lines, as_json)


class _Prefetcher(AbstractContextManager["_Prefetcher"]):
    """Reads the files of an edit in a thread while the graph is being loaded. The thread ends with the block."""

    def __init__(self, files: EditRequest) -> None:
        self._files = files
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

            self._inputs = read_inputs(self._files, classes)
        except BaseException as error:  # raised again by inputs()
            self._error = error

    def __exit__(self, *error: object) -> None:
        if self._thread is not None:
            self._thread.join()
