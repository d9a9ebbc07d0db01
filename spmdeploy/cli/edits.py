"""edit and batch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spmdeploy.cli.choices import Backend, PrecisionChoice, TilingChoice
from spmdeploy.cli.one_edit import EditOptions, open_editor_from_options, run_edit
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
)
from spmdeploy.cli.talk import log, print_result, progress_bar
from spmdeploy.errors import BatchItemsFailedError


def edit(
    image: Annotated[Path, typer.Argument(help="The photo: 8-bit PNG, JPEG, WebP or BMP.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The edited photo; .png keeps known pixels exactly.")],
    labels: Annotated[Path | None, typer.Option("--labels", help="Label map: what the picture shall show.")] = None,
    fill: Annotated[str | None, typer.Option("--fill", help="One class for the whole mask, by name or id.")] = None,
    mask: Annotated[Path | None, typer.Option("--mask", help="White is edited, black is kept.")] = None,
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
    backend: BackendOption = Backend.auto,
    device: Device = "auto",
    precision: PrecisionOption = PrecisionChoice.auto,
    tiling: Tiling = TilingChoice.auto,
    match_surroundings: MatchSurroundings = False,
    require_signature: RequireSignature = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Edit one photo.

    What it shall show comes from --labels or --fill, where it may change from --mask or --edited-from. All other pixels
    stay as they are. With --extend the picture grows; --labels is then a map of the grown picture.
    """
    run_edit(
        EditOptions(
            image=image,
            output=output,
            labels=labels,
            fill=fill,
            mask=mask,
            edited_from=edited_from,
            extend=extend,
            instances=instances,
            grow=grow,
            sheet=sheet,
            explain=explain,
            model=model,
            backend=backend.value,
            device=device,
            precision=precision.value,
            tiling=tiling.value,
            match_surroundings=match_surroundings,
            require_signature=require_signature,
            overwrite=overwrite,
            as_json=as_json,
        )
    )


def batch(
    manifest: Annotated[Path, typer.Argument(help="The edits, .csv or .jsonl.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", help="Results and status.jsonl go here.")],
    model: Model = None,
    backend: BackendOption = Backend.auto,
    device: Device = "auto",
    precision: PrecisionOption = PrecisionChoice.auto,
    tiling: Tiling = TilingChoice.auto,
    match_surroundings: MatchSurroundings = False,
    require_signature: RequireSignature = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Edits under way at once.")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Skip what is done already.")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Edit many photos, with a status for each.

    The manifest is a CSV file with a heading, or JSONL with an object a line: image; labels or fill; mask, edited_from
    or extend; and if you like output, instances and grow. Its paths are relative to it; outputs are relative to the
    output folder, and without one the result is named like the image, as PNG.
    """
    from spmdeploy.editing.batch import STATUS_FILE, ItemStatus, read_manifest, run_batch

    items = read_manifest(manifest, output_dir, overwrite, match_surroundings)
    with (
        open_editor_from_options(model, backend.value, device, precision.value, require_signature) as editor,
        progress_bar("editing") as show,
    ):
        done = 0

        def progress(status: ItemStatus) -> None:
            nonlocal done
            done += 1
            show(done, len(items))
            if status.error:
                log(f"row {status.row}: {status.error}" + (f" ({status.hint})" if status.hint else ""))

        statuses = run_batch(
            editor, items, output_dir, tiling=tiling.value, jobs=jobs, resume=resume, progress=progress
        )
    counts = {name: sum(status.status == name for status in statuses) for name in ("done", "skipped", "failed")}
    payload = {"counts": counts, "items": [status.to_json() for status in statuses]}
    line = ", ".join(f"{count} {name}" for name, count in counts.items())
    failure = BatchItemsFailedError(
        f"{counts['failed']} of {len(statuses)} items failed", f"see {output_dir / STATUS_FILE}"
    )
    print_result("batch", payload, [f"{output_dir}: {line}"], as_json, failure if counts["failed"] else None)
