"""What `spmdeploy edit` does once its command line has been read."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import spmdeploy
from spmdeploy.cli.talk import needs, print_result, progress_bar, say, say_notes

if TYPE_CHECKING:
    from spmdeploy.editor import Editor, Tiling


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
    from spmdeploy.edit_files import EditFiles, edit_files, parse_sides

    started = time.perf_counter()
    output, sheet, explain = options.output, options.sheet, options.explain
    files = EditFiles(
        image=options.image,
        output=output,
        labels=options.labels,
        fill=options.fill,
        mask=options.mask,
        edited_from=options.edited_from,
        extend=None if options.extend is None else parse_sides(options.extend),
        instances=options.instances,
        grow=options.grow,
        sheet=sheet,
        explain=explain,
        overwrite=options.overwrite,
        match_surroundings=options.match_surroundings,
    )
    with opened_editor(
        options.model, options.backend, options.device, options.precision, options.require_signature
    ) as editor:
        opened = time.perf_counter()
        with progress_bar("editing") as show:
            result = edit_files(editor, files, options.tiling, show)
        choices = editor.choices
    ended = time.perf_counter()
    say_notes(result.notes)
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


def opened_editor(
    model: Path | None, backend: str, device: str, precision: str, require_signature: str | None
) -> Editor:
    """The editor, its choices told on stderr."""
    with needs("export"):
        editor = spmdeploy.open_editor(model, backend, device, precision, require_signature)
    for choice in editor.choices:
        say(choice)
    return editor
