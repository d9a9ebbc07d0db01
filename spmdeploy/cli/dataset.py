"""The commands `dataset check` and `dataset prepare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from spmdeploy.cli.console import format_table, log_notes, print_result, progress_bar, require_extra
from spmdeploy.cli.options import Json, Overwrite
from spmdeploy.errors import InputError

dataset_app = typer.Typer(help="Prepare and check training data.", rich_markup_mode=None)


@dataset_app.command("check")
def dataset_check(
    data: Annotated[Path, typer.Argument(help="Folder with train/, test/ and labels.json.")],
    sheet: Annotated[
        Path | None, typer.Option("--sheet", help="Also draw masks of every kind on some training images.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Find what would stop or impair training.

    Missing pairs, wrong sizes, unknown ids, color maps, near-empty classes.
    """
    with require_extra("train"):
        from spmdeploy.datasets.check import check_dataset
        from spmdeploy.imaging.files import check_output, write_image
        from spmdeploy.training.contact_sheets import mask_sheet

    if sheet is not None:
        check_output(sheet, overwrite)
    with progress_bar("checking") as show:
        report = check_dataset(data, progress=show)
    total = sum(share.pixels for share in report.classes) or 1
    rows = [(str(share.id), share.name, f"{share.pixels / total:.2%}", str(share.pictures)) for share in report.classes]
    lines = [f"{data}: " + ", ".join(f"{count} {split}" for split, count in report.pictures.items())]
    lines += format_table(("id", "class", "share", "images"), rows)
    lines += [f"warning: {text}" for text in report.warnings] + [f"error: {text}" for text in report.errors]
    if sheet is not None and report.ok:
        write_image(sheet, mask_sheet(data), overwrite)
        lines.append(f"{sheet}: labels, then a mask of each kind")
    elif sheet is not None:
        log_notes([f"{sheet} was not written: fix the errors first"])
    hint = "fix these, then check again"
    failure = None if report.ok else InputError(f"{data}: {len(report.errors)} errors that stop training", hint)
    payload = {**report.to_json(), "sheet": str(sheet) if sheet is not None and report.ok else None}
    print_result("dataset-check", payload, lines, as_json, failure)


@dataset_app.command("prepare")
def dataset_prepare(
    kind: Annotated[Literal["cityscapes", "ade20k"], typer.Argument(help="Which official download.")],
    source: Annotated[Path, typer.Argument(help="Where it was unpacked.")],
    target: Annotated[Path, typer.Argument(help="The data folder to write.")],
    jobs: Annotated[int | None, typer.Option("--jobs", min=1, help="Processes; default: one per core.")] = None,
    as_json: Json = False,
) -> None:
    """Build the training layout from a download.

    Run it again after an interruption: complete files are kept.
    """
    with require_extra("train"):
        from spmdeploy.datasets.prepare import prepare

    with progress_bar("preparing") as show:
        prepared = prepare(kind, source, target, jobs, show)
    log_notes(prepared.notes)
    counts = ", ".join(f"{count} {split}" for split, count in prepared.pictures.items())
    print_result("dataset-prepare", prepared.to_json(), [f"{target}: {counts}; {prepared.made} made now"], as_json)
