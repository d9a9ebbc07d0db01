"""Many edits from a manifest, each with a status that survives an interruption."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from spmdeploy.edit_files import EditFiles, Tiling, edit_files
from spmdeploy.editor import Editor
from spmdeploy.errors import InputError, OutOfMemory, SpmDeployError, UsageError

STATUS_FILE = "status.jsonl"
COLUMNS = ("image", "output", "labels", "fill", "mask", "edited_from", "instances", "grow")


@dataclass(frozen=True)
class BatchItem:
    """One row of a manifest. Paths in a manifest are relative to it, `output` to the output folder."""

    row: int
    """Counted from 1, the heading of a CSV file aside."""
    files: EditFiles | None
    fault: str | None
    """Why the row is no edit; then `files` is None."""


@dataclass(frozen=True)
class ItemStatus:
    """What became of one row."""

    row: int
    output: str | None
    status: Literal["done", "failed", "skipped"]
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {"row": self.row, "output": self.output, "status": self.status, "error": self.error}


def read_manifest(path: Path, output_dir: Path, overwrite: bool = False) -> list[BatchItem]:
    """The rows of a CSV file with a heading, or of a JSONL file with an object per line (by suffix).

    Columns: image and output, labels or fill, mask or edited_from; instances and grow may be given. Without output the
    result takes the image's stem, as PNG. Raises InputError when the file as a whole cannot be read, has an unknown
    column, or two rows would write the same file.
    """
    items = []
    for number, row in enumerate(_rows(path), start=1):
        try:
            files = _edit_of_row(row, path.parent, output_dir, overwrite)
            items.append(BatchItem(number, files, None))
        except SpmDeployError as error:
            items.append(BatchItem(number, None, error.problem))
    if not items:
        raise InputError(f"{path} holds no rows", f"columns are {', '.join(COLUMNS)}")
    _check_outputs_differ(items, path)
    return items


def run_batch(
    editor: Editor,
    items: list[BatchItem],
    output_dir: Path,
    *,
    tiling: Tiling = "auto",
    jobs: int = 1,
    resume: bool = False,
    progress: Callable[[ItemStatus], None] = lambda status: None,
) -> list[ItemStatus]:
    """Edits every item and appends its status to `status.jsonl` in the output folder as soon as it is known.

    resume: rows whose output is there and was recorded as done are skipped. jobs: edits under way at once; the session
    is shared. A failed row does not stop the others, running out of memory does.
    """
    if jobs < 1:
        raise UsageError(f"jobs is {jobs}; at least one is needed")
    finished = _finished_outputs(output_dir / STATUS_FILE) if resume else set()
    statuses = []
    with open(output_dir / STATUS_FILE, "a", encoding="utf-8") as log:
        for status in _in_order_of_completion(editor, items, finished, tiling, jobs):
            log.write(json.dumps(status.to_json(), ensure_ascii=False) + "\n")
            log.flush()
            progress(status)
            statuses.append(status)
    return sorted(statuses, key=lambda status: status.row)


def _in_order_of_completion(
    editor: Editor, items: list[BatchItem], finished: set[str], tiling: Tiling, jobs: int
) -> Iterator[ItemStatus]:
    def work(item: BatchItem) -> ItemStatus:
        if item.files is None:
            return ItemStatus(item.row, None, "failed", item.fault)
        output = str(item.files.output)
        if output in finished and item.files.output.exists():
            return ItemStatus(item.row, output, "skipped")
        try:
            edit_files(editor, item.files, tiling)
        except OutOfMemory:
            raise
        except SpmDeployError as error:
            return ItemStatus(item.row, output, "failed", error.problem)
        return ItemStatus(item.row, output, "done")

    with ThreadPoolExecutor(jobs) as pool:
        waiting = iter(items)
        running: set[Future[ItemStatus]] = {pool.submit(work, item) for item in islice(waiting, jobs)}
        try:
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                running |= {pool.submit(work, item) for item in islice(waiting, len(done))}
                for future in done:
                    yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}", "give a CSV or JSONL file in UTF-8") from error
    if path.suffix.lower() == ".jsonl":
        yield from _jsonl_rows(text, path)
    elif path.suffix.lower() == ".csv":
        yield from _csv_rows(text, path)
    else:
        raise InputError(f"{path} is neither .csv nor .jsonl", "the suffix says how it is read")


def _csv_rows(text: str, path: Path) -> Iterator[dict[str, Any]]:
    reader = csv.DictReader(text.splitlines(), strict=True)
    _check_columns(reader.fieldnames or (), path)
    try:
        for row in reader:
            if None in row:
                raise InputError(f"{path} line {reader.line_num}: more cells than the heading has")
            yield {name: value for name, value in row.items() if value}
    except csv.Error as error:
        raise InputError(f"{path} line {reader.line_num}: {error}") from error


def _jsonl_rows(text: str, path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path} line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise InputError(f"{path} line {number} is not an object: {line[:60]}")
        _check_columns(row, path)
        yield {name: value for name, value in row.items() if value is not None}


def _check_columns(names: Any, path: Path) -> None:
    unknown = [name for name in names if name not in COLUMNS]
    if unknown:
        raise InputError(f"{path} has an unknown column {unknown[0]!r}", f"columns are {', '.join(COLUMNS)}")


def _edit_of_row(row: dict[str, Any], folder: Path, output_dir: Path, overwrite: bool) -> EditFiles:
    if "image" not in row:
        raise InputError("no image is given")

    def path(name: str) -> Path | None:
        return folder / str(row[name]) if name in row else None

    image = folder / str(row["image"])
    output = output_dir / str(row.get("output", f"{image.stem}.png"))
    if not output.resolve().is_relative_to(output_dir.resolve()):
        raise InputError(f"output {row['output']!r} leads out of the output folder", "give a path inside it")
    output.parent.mkdir(parents=True, exist_ok=True)
    return EditFiles(
        image=image,
        output=output,
        labels=path("labels"),
        fill=None if "fill" not in row else str(row["fill"]),
        mask=path("mask"),
        edited_from=path("edited_from"),
        instances=path("instances"),
        grow=_whole_number(row["grow"]) if "grow" in row else None,
        overwrite=overwrite,
    )


def _whole_number(value: object) -> int:
    try:
        return int(str(value))
    except ValueError as error:
        raise InputError(f"grow is {value!r}, not a whole number of pixels") from error


def _check_outputs_differ(items: list[BatchItem], path: Path) -> None:
    rows: dict[Path, int] = {}
    for item in items:
        if item.files is None:
            continue
        output = item.files.output.resolve()
        if output in rows:
            raise InputError(
                f"{path}: rows {rows[output]} and {item.row} would both write {item.files.output}",
                "give them different names in the output column",
            )
        rows[output] = item.row


def _finished_outputs(log: Path) -> set[str]:
    """Outputs whose last recorded status is done or skipped. A half-written line of a killed run is passed over."""
    last: dict[str, str] = {}
    if log.exists():
        for line in log.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
                last[record["output"]] = record["status"]
            except (ValueError, KeyError, TypeError):
                continue
    return {output for output, status in last.items() if status in ("done", "skipped")}
