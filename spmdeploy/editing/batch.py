"""Many edits from a manifest, each with a status that survives an interruption."""

from __future__ import annotations

import csv
import io
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from spmdeploy.editing.editor import Editor
from spmdeploy.editing.options import EditRequest, parse_padding
from spmdeploy.editing.run import Tiling, run_edit_files
from spmdeploy.errors import InputError, OutOfMemoryError, SpmDeployError, UsageError
from spmdeploy.imaging import files as images
from spmdeploy.inputs import read_text
from spmdeploy.tiling.outpaint import Padding

STATUS_FILE = "status.jsonl"
COLUMNS = ("image", "output", "labels", "fill", "mask", "edited_from", "instances", "grow", "extend")


@dataclass(frozen=True)
class BatchItem:
    """One row of a manifest. Paths in a manifest are relative to it, `output` to the output folder."""

    row: int
    """Counted from 1, the heading of a CSV file aside."""
    files: EditRequest | None
    fault: SpmDeployError | None
    """Why the row is no edit; then `files` is None."""


@dataclass(frozen=True)
class ItemStatus:
    """What became of one row; only the status file ever says "started"."""

    row: int
    output: str | None
    """Relative to the output folder, so that the folder may move; None when the row names no usable one."""
    status: Literal["started", "done", "failed", "skipped"]
    error: str | None = None
    hint: str | None = None

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


class StatusFile:
    """`status.jsonl`: a line per event, on disk as soon as it happens. `add` may be called from several threads.

    It survives a killed run: a line cut off in the middle is passed over and never grown together with the next.
    """

    def __init__(self, output_dir: Path) -> None:
        """Creates the folder. Raises InputError when the file in it cannot be read and written."""
        self.path = output_dir / STATUS_FILE
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            written = self.path.read_bytes() if self.path.exists() else b""
            self._stream = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise InputError(f"{error.filename} cannot be written: {error.strerror}", "name another folder") from error
        if written and not written.endswith(b"\n"):
            self._stream.write("\n")
        self.earlier = _last_statuses(written)
        """The last status of each output in the runs before this one."""
        self._lock = threading.Lock()

    def __enter__(self) -> StatusFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()

    def add(self, status: ItemStatus) -> None:
        # ASCII: a file name that is not valid Unicode would otherwise have no form here.
        with self._lock:
            self._stream.write(json.dumps(status.to_json()) + "\n")
            self._stream.flush()


def _last_statuses(written: bytes) -> dict[str, str]:
    last: dict[str, str] = {}
    for line in written.split(b"\n"):
        try:
            record = json.loads(line)
            last[record["output"]] = record["status"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return last


def read_manifest(
    path: Path, output_dir: Path, overwrite: bool = False, match_surroundings: bool = False
) -> list[BatchItem]:
    """The rows of a CSV file with a heading, or of a JSONL file with an object per line (by suffix).

    Columns: image and output; labels or fill; mask, edited_from or extend; instances and grow may be given. Without
    output the result takes the image's stem, as PNG. match_surroundings: for every edit. Raises InputError when the
    file as a whole cannot be read, has an unknown column, or two rows would write the same file.
    """
    items = []
    for number, row in enumerate(_rows(path), start=1):
        try:
            files = _edit_of_row(row, path.parent, output_dir, overwrite)
            items.append(BatchItem(number, replace(files, match_surroundings=match_surroundings), None))
        except SpmDeployError as error:
            items.append(BatchItem(number, None, error))
    if not items:
        raise InputError(f"{path} holds no rows", _COLUMNS_HINT)
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
    """Edits every item and appends what becomes of it to `status.jsonl` in the output folder as soon as it is known.

    resume: rows whose output is there and was recorded as done are skipped. jobs: edits under way at once; the session
    is shared. A failed row does not stop the others, running out of memory does. Returns the statuses by row.
    """
    if jobs < 1:
        raise UsageError(f"jobs is {jobs}; at least one is needed")
    statuses = []
    with StatusFile(output_dir) as log:
        earlier = log.earlier if resume else {}

        def work(item: BatchItem) -> ItemStatus:
            # Recorded here and not where the results are gathered: after Ctrl-C nobody gathers, but edits still end.
            status = _edit_item(editor, item, output_dir, tiling, earlier, log)
            log.add(status)
            return status

        for status in _in_order_of_completion(work, items, jobs):
            progress(status)
            statuses.append(status)
    return sorted(statuses, key=lambda status: status.row)


def _edit_item(
    editor: Editor, item: BatchItem, output_dir: Path, tiling: Tiling, earlier: dict[str, str], log: StatusFile
) -> ItemStatus:
    if item.files is None:
        assert item.fault is not None
        return ItemStatus(item.row, None, "failed", item.fault.problem, item.fault.hint)
    files, output = item.files, item.files.output.relative_to(output_dir).as_posix()
    before = earlier.get(output)
    if before in ("done", "skipped") and files.output.exists():
        return ItemStatus(item.row, output, "skipped")
    if before == "started":
        # A killed run may have written it (whole, as always) without living to say so: it is ours to replace.
        files = replace(files, overwrite=True)
    try:
        _make_room(files)
        log.add(ItemStatus(item.row, output, "started"))
        run_edit_files(editor, files, tiling)
    except (OutOfMemoryError, MemoryError):
        raise
    except SpmDeployError as error:
        return ItemStatus(item.row, output, "failed", error.problem, error.hint)
    except Exception as error:  # a defect; but a night's work does not stop for it, and --resume would meet it again
        return ItemStatus(item.row, output, "failed", f"unexpected {type(error).__name__}: {error}")
    return ItemStatus(item.row, output, "done")


def _make_room(files: EditRequest) -> None:
    try:
        files.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder of {files.output} cannot be made: {error.strerror}") from error
    images.check_output(files.output, files.overwrite)


def _in_order_of_completion(
    work: Callable[[BatchItem], ItemStatus], items: list[BatchItem], jobs: int
) -> Iterator[ItemStatus]:
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
    text = read_text(path)
    if path.suffix.lower() == ".jsonl":
        yield from _jsonl_rows(text, path)
    elif path.suffix.lower() == ".csv":
        yield from _csv_rows(text, path)
    else:
        raise InputError(f"{path} is neither .csv nor .jsonl", "the suffix says how it is read")


def _csv_rows(text: str, path: Path) -> Iterator[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        _check_columns(list(reader.fieldnames or ()), path)
        for row in reader:
            if None in row:
                raise InputError(f"{path} line {reader.line_num}: more cells than the heading has")
            yield {name: value for name, value in row.items() if value}
    except csv.Error as error:
        raise InputError(f"{path} line {reader.line_num}: {error}") from error


def _jsonl_rows(text: str, path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would cut strings at U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise InputError(f"{path} line {number} is not an object: {line[:60]}")
        _check_columns(list(row), path)
        yield {name: value for name, value in row.items() if value is not None}


def _check_columns(names: list[str], path: Path) -> None:
    for name, times in Counter(names).items():
        if name not in COLUMNS:
            raise InputError(f"{path} has an unknown column {name!r}", _COLUMNS_HINT)
        if times > 1:
            raise InputError(f"{path} has the column {name!r} {times} times", _COLUMNS_HINT)


_COLUMNS_HINT = f"columns are {', '.join(COLUMNS)}; in a CSV file commas are between them"


def _edit_of_row(row: dict[str, Any], folder: Path, output_dir: Path, overwrite: bool) -> EditRequest:
    if "image" not in row:
        raise InputError("no image is given", _COLUMNS_HINT)

    def path(name: str) -> Path | None:
        return folder / str(row[name]) if name in row else None

    image = folder / str(row["image"])
    name = str(row.get("output", f"{image.stem}.png"))
    output = output_dir / name
    if Path(name).is_absolute() or not _is_below(output, output_dir):
        raise InputError(f"output {name!r} leads out of the output folder", "give a path relative to that folder")
    return EditRequest(
        image=image,
        output=output,
        labels=path("labels"),
        fill=None if "fill" not in row else str(row["fill"]),
        mask=path("mask"),
        edited_from=path("edited_from"),
        instances=path("instances"),
        grow=_whole_number(row["grow"]) if "grow" in row else None,
        extend=_sides(row["extend"]) if "extend" in row else None,
        overwrite=overwrite,
    )


def _is_below(path: Path, folder: Path) -> bool:
    """Whether `path` is inside `folder`, links and `..` resolved."""
    try:
        return path.resolve() != folder.resolve() and path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # a zero byte in the name, a circle of links
        return False


def _whole_number(value: object) -> int:
    try:
        return int(str(value))
    except ValueError as error:
        raise InputError(f"grow is {value!r}, not a whole number of pixels") from error


def _sides(value: object) -> Padding:
    """From "0,0,256,0", or from a list of four numbers in JSONL."""
    return parse_padding(",".join(map(str, value)) if isinstance(value, list) else str(value))


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
