"""The commands of `labels`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spmdeploy.cli.console import format_table, log_notes, print_result
from spmdeploy.cli.options import Classes, Json, Overwrite
from spmdeploy.errors import UsageError

labels_app = typer.Typer(help="Check, show and convert label maps.", rich_markup_mode=None)


@labels_app.command("check")
def labels_check(
    path: Annotated[Path, typer.Argument(help="A label map.")],
    classes: Classes = "street",
    as_json: Json = False,
) -> None:
    """Show which classes a label map holds.

    Ids that are not in the class table are an error.
    """
    from spmdeploy.imaging.files import read_labels
    from spmdeploy.labels import check_labels, class_table, count_labels

    table, ids = class_table(classes), read_labels(path)
    counts = count_labels(ids)
    check_labels(ids, table, str(path))
    names = {label: table.classes[label].name if label < len(table) else "void" for label in counts}
    rows = [(str(i), names[i], str(n), f"{n / ids.size:.1%}") for i, n in counts.items()]
    found = [{"id": i, "name": names[i], "pixels": n} for i, n in counts.items()]
    payload = {"path": str(path), "table": table.name, "height": ids.shape[0], "width": ids.shape[1], "labels": found}
    print_result("labels-check", payload, format_table(("id", "class", "pixels", "share"), rows), as_json)


@labels_app.command("show")
def labels_show(
    path: Annotated[Path, typer.Argument(help="A label map.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The colored image.")],
    classes: Classes = "street",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a label map in class colors."""
    from spmdeploy import labels
    from spmdeploy.imaging import files as images

    table, ids = labels.class_table(classes), images.read_labels(path)
    images.write_image(output, labels.colorize(ids, table), overwrite)
    unknown = [i for i in labels.count_labels(ids) if i >= len(table) and i != table.void_id]
    notes = [f"{table.name} has no class {', '.join(map(str, unknown))}: painted white"] if unknown else []
    log_notes(notes)
    print_result("labels-show", {"output": str(output), "notes": notes}, [str(output)], as_json)


@labels_app.command("convert")
def labels_convert(
    path: Annotated[Path, typer.Argument(help="A colored label map; with --offset a map of ids.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The map of ids, as a gray PNG.")],
    classes: Classes = "street",
    offset: Annotated[
        int | None, typer.Option("--offset", help="Add this to every id instead of reading colors.")
    ] = None,
    void: Annotated[int | None, typer.Option("--void", help="With --offset: an id that stays as it is.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Turn class colors into ids, or shift ids."""
    from spmdeploy import labels
    from spmdeploy.imaging import files as images

    table = labels.class_table(classes)
    if offset is None:
        if void is not None:
            raise UsageError("--void needs --offset", "colors are looked up, not shifted")
        ids = labels.labels_from_colors(images.read_photo(path).pixels, table, str(path))
    else:
        ids = labels.offset_labels(images.read_labels(path), offset, str(path), void)
    images.write_image(output, ids, overwrite)
    counts = labels.count_labels(ids)
    notes = (
        []
        if offset is not None
        else [
            f"{' and '.join(entry.name for entry in owners)} share the color {color}: taken for {owners[0].name}"
            for color, owners in labels.shared_colors(table).items()
            if owners[0].id in counts
        ]
    )
    log_notes(notes)
    payload = {"output": str(output), "labels": {str(i): n for i, n in counts.items()}, "notes": notes}
    print_result("labels-convert", payload, [f"{output}: {len(counts)} classes"], as_json)
