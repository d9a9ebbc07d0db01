"""The command `batch`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from spmdeploy.cli.console import log, print_result, progress_bar
from spmdeploy.cli.options import (
    BackendOption,
    Device,
    Json,
    Model,
    Overwrite,
    PrecisionOption,
    RequireSignature,
    Url,
    Verbose,
    device_from,
    open_editor_from_options,
    record_from,
    with_fields_of,
)
from spmdeploy.editing.options import EditOptions
from spmdeploy.errors import BatchItemsFailedError, UsageError
from spmdeploy.remote import as_path


@with_fields_of(EditOptions)
def batch(
    manifest: Annotated[str, typer.Argument(help="The edits, .csv or .jsonl, a path or URL; - for standard input.")],
    output_dir: Annotated[
        str, typer.Option("--output-dir", metavar="PATH", help="Results and status.jsonl go here: a folder or URL.")
    ],
    model: Model = None,
    backend: BackendOption = "auto",
    device: Device = "auto",
    url: Url = None,
    precision: PrecisionOption = "auto",
    require_signature: RequireSignature = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Edits under way at once.")] = 1,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="[ADDRESS]",
            help="Edit on a Ray cluster: HOST:PORT, or auto for one that runs here; without an address, one is started "
            "where none runs.",
        ),
    ] = None,
    cores: Annotated[int, typer.Option("--cores", min=1, help="With --ray: CPU cores of each editor.")] = 1,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="With --ray: editors at most.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Skip what is done already.")] = False,
    overwrite: Overwrite = False,
    verbose: Verbose = False,
    as_json: Json = False,
    **values: Any,
) -> None:
    """Edit many photos, with a status for each.

    The manifest is a CSV file with a heading, or JSONL with an object a line: image; labels or fill; mask, edited_from
    or extend; optionally output, instances, mask_threshold, mask_alpha,
    and any of the options below. Its paths are relative to it; outputs are relative to the
    output folder, and without one the result is named like the image, as PNG. All may be URLs: s3://, gs://, and for
    reading http:// and https://.
    """
    from spmdeploy.editing.batch import run_batch
    from spmdeploy.editing.manifest import read_manifest
    from spmdeploy.editing.status import STATUS_FILE, ItemStatus

    device, folder = device_from(backend, device, url), as_path(output_dir)
    items = read_manifest(as_path(manifest), folder, overwrite, record_from(EditOptions, values))
    done = 0
    with progress_bar("editing") as show:

        def progress(status: ItemStatus) -> None:
            nonlocal done
            done += 1
            show(done, len(items))
            if status.error:
                log(f"row {status.row}: {status.error}" + (f" ({status.hint})" if status.hint else ""))

        if ray is None:
            with open_editor_from_options(
                model, backend, device, precision, require_signature, verbose=verbose
            ) as editor:
                statuses = run_batch(editor, items, folder, jobs=jobs, resume=resume, progress=progress)
        else:
            from spmdeploy.editing.ray_batch import FleetOptions, run_on_ray

            if jobs > 1:
                raise UsageError("--jobs is for one machine", "with --ray, --cores and --workers divide the cluster")
            statuses = run_on_ray(
                model,
                items,
                folder,
                FleetOptions(ray, cores, workers),
                backend=backend,
                device=device,
                precision=precision,
                require_signature=require_signature,
                resume=resume,
                progress=progress,
                on_open=lambda node, facts, choices: log(
                    "\n".join((f"{node}: {', '.join(facts)}", *choices * verbose))
                ),
            )
    counts = {name: sum(status.status == name for status in statuses) for name in ("done", "skipped", "failed")}
    payload = {"counts": counts, "items": [status.to_json() for status in statuses]}
    line = ", ".join(f"{count} {name}" for name, count in counts.items())
    failure = BatchItemsFailedError(
        f"{counts['failed']} of {len(statuses)} items failed", f"see {folder / STATUS_FILE}"
    )
    print_result("batch", payload, [f"{folder}: {line}"], as_json, failure if counts["failed"] else None)
