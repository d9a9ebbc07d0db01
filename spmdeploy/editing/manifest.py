"""Reads the manifest of a batch: one edit a row, in CSV or JSONL."""

from __future__ import annotations

import csv
import io
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, get_args

from spmdeploy.editing.editor import DEFAULT_OPTIONS
from spmdeploy.editing.options import EditOptions, EditRequest, OptionField, option_fields
from spmdeploy.errors import InputError, SpmDeployError
from spmdeploy.inputs import LocalOrRemote, input_name, is_stream, read_text
from spmdeploy.remote import RemotePath, as_path, check_readable, is_url
from spmdeploy.serialization import parse_json

_REQUEST_COLUMNS = {one.column: one for one in option_fields(EditRequest) if one.option.is_column}
_OPTION_COLUMNS = {one.column: one for one in option_fields(EditOptions) if one.option.is_column}
COLUMNS = (*_REQUEST_COLUMNS, *_OPTION_COLUMNS)


@dataclass(frozen=True)
class BatchItem:
    """One row of a manifest. Paths in a manifest are relative to it, `output` to the output folder."""

    row: int
    """Counted from 1, the heading of a CSV file aside."""
    request: EditRequest | None
    error: SpmDeployError | None
    """Why the row is not an edit; `request` is None then."""


def read_manifest(
    path: LocalOrRemote, output_dir: LocalOrRemote, overwrite: bool = False, options: EditOptions = DEFAULT_OPTIONS
) -> list[BatchItem]:
    """Read the rows of a CSV file with a heading, or of a JSONL file with one object per line (by suffix).

    Args:
        path: "-" for standard input, whose first character decides. Columns are the fields of `EditRequest`
            and `EditOptions` (see COLUMNS). Without `output` the result is named like the image, as PNG.
        output_dir: where outputs go.
        overwrite: whether outputs may replace files.
        options: of every row, unless the row has a column for it.

    Raises:
        InputError: the file as a whole cannot be read or has an unknown column, two rows would write the same file, or
            one would overwrite a file that another one reads.
        UnavailableError: the package for a store that a row names, or its credentials, are missing.
    """
    items = []
    folder = Path() if is_stream(path) else path.parent
    if isinstance(output_dir, RemotePath):
        output_dir.check_writable()
    for number, row in enumerate(_rows(path), start=1):
        try:
            items.append(BatchItem(number, _request_of_row(row, folder, output_dir, overwrite, options), None))
        except SpmDeployError as exc:
            items.append(BatchItem(number, None, exc))
    if not items:
        raise InputError(f"{input_name(path)} holds no rows", _COLUMNS_HINT)
    _check_outputs(items, path, output_dir)
    for path in stores_read(items):
        check_readable(path)
    return items


def _rows(path: LocalOrRemote) -> Iterator[dict[str, Any]]:
    if not is_stream(path) and path.suffix.lower() not in (".csv", ".jsonl"):
        raise InputError(f"{path} is neither .csv nor .jsonl", "the suffix decides how it is read")
    text = read_text(path)
    is_jsonl = text.lstrip().startswith("{") if is_stream(path) else path.suffix.lower() == ".jsonl"
    yield from _jsonl_rows(text, path) if is_jsonl else _csv_rows(text, path)


def _csv_rows(text: str, path: LocalOrRemote) -> Iterator[dict[str, Any]]:
    """The rows that hold anything. Spreadsheets write empty columns and rows, and headings with capitals and blanks."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    names: list[str] | None = None
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if names is None:
                names = [re.sub(r"[\s_-]+", "_", cell.strip().lower()) for cell in cells]
                _check_columns([name for name in names if name], path)
                continue
            row = list(zip_longest(names, cells, fillvalue=""))
            if surplus := [cell for name, cell in row if cell.strip() and not name]:
                raise InputError(f"{path} line {reader.line_num}: {surplus[0]!r} is in a column without a heading")
            yield {name: cell for name, cell in row if cell.strip()}
    except csv.Error as exc:
        raise InputError(f"{path} line {reader.line_num}: {exc}") from exc


def _jsonl_rows(text: str, path: LocalOrRemote) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would cut strings at U+2028
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as exc:
            raise InputError(f"{path} line {number} is not JSON: {exc}") from exc
        if not isinstance(row, dict):
            raise InputError(f"{path} line {number} is not an object: {line[:60]}")
        _check_columns(list(row), path)
        yield {name: value for name, value in row.items() if value is not None}


def _check_columns(names: list[str], path: LocalOrRemote) -> None:
    for name, times in Counter(names).items():
        if name not in COLUMNS:
            raise InputError(f"{path} has an unknown column {name!r}", _COLUMNS_HINT)
        if times > 1:
            raise InputError(f"{path} has the column {name!r} {times} times", _COLUMNS_HINT)


_COLUMNS_HINT = f"columns are {', '.join(COLUMNS)}; in a CSV file commas are between them"


def _request_of_row(
    row: dict[str, Any], folder: LocalOrRemote, output_dir: LocalOrRemote, overwrite: bool, options: EditOptions
) -> EditRequest:
    if "image" not in row:
        raise InputError("no image is given", _COLUMNS_HINT)
    name = str(row.get("output", f"{as_path(str(row['image'])).stem}.png"))
    if not _is_below(name, output_dir):
        raise InputError(f"output {name!r} leads out of the output folder", "give a path relative to that folder")
    output = output_dir / name
    request, options_of_row = (
        {one.field.name: _value(one, row[column], folder) for column, one in columns.items() if column in row}
        for columns in (_REQUEST_COLUMNS, _OPTION_COLUMNS)
    )
    options = replace(options, **options_of_row)
    return EditRequest(**request | {"output": output, "options": options, "overwrite": overwrite})


def _value(column: OptionField, value: object, folder: LocalOrRemote) -> Any:
    """A cell's value in the type of its field. value: text, or any JSON value."""
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    if column.option.parse is not None:
        return column.option.parse(text)
    types = get_args(column.type) or (column.type,)
    if Path in types:
        return _input_path(folder, text)
    if bool in types:
        if text.lower() not in _FLAGS:
            raise InputError(f"{column.column} is {value!r}, neither true nor false")
        return _FLAGS[text.lower()]
    if int in types:
        if not re.fullmatch(r"[+-]?[0-9]{1,9}", text.strip()):
            raise InputError(f"{column.column} is {value!r}, not a whole number")
        return int(text)
    return text


def _input_path(folder: LocalOrRemote, text: str) -> LocalOrRemote:
    """The file of a cell; if there is none, the one whose name is the same in another Unicode normalization (macOS)."""
    path = as_path(text) if is_url(text) else folder / text
    if isinstance(folder, RemotePath) and not isinstance(path, RemotePath):
        raise InputError(
            f"{text} is a file of this machine, which {folder} may not name", "give a relative path or a URL"
        )
    if isinstance(path, RemotePath) or isinstance(folder, RemotePath):
        return path
    if is_stream(text) or is_stream(path):
        raise InputError(f"a row cannot read {text}", "name a file")
    if not os.path.lexists(path):
        for form in ("NFC", "NFD"):
            other = folder / unicodedata.normalize(form, text)
            if os.path.lexists(other):
                return other
    return path


_FLAGS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def _is_below(name: str, folder: LocalOrRemote) -> bool:
    """Whether `name`, relative to `folder`, is inside it, links and `..` resolved."""
    if isinstance(folder, RemotePath):
        parts = name.split("/")
        return name.isprintable() and not is_url(name) and not {"", ".", ".."} & set(parts)
    path = folder / name
    try:
        if Path(name).is_absolute():
            return False
        return path.resolve() != folder.resolve() and path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # a zero byte in the name, a cycle of links
        return False


def _check_outputs(items: list[BatchItem], manifest: LocalOrRemote, output_dir: LocalOrRemote) -> None:
    """InputError if two rows would write the same file, or one would overwrite a file that another one reads."""
    requests = [(item.row, item.request) for item in items if item.request is not None]
    ignores_case = not isinstance(output_dir, RemotePath) and _ignores_case(output_dir)
    outputs: dict[str, int] = {}
    for row, request in requests:
        first = outputs.setdefault(_file_key(request.output, ignores_case), row)
        if first != row:
            raise InputError(
                f"{manifest}: rows {first} and {row} would both write {request.output}",
                "give them different names in the output column",
            )
    for row, request in requests:
        for path in request.inputs:
            writer = outputs.get(_file_key(path, ignores_case))
            if request.overwrite and writer not in (None, row):
                raise InputError(
                    f"{manifest}: row {writer} would overwrite {path}, which row {row} reads",
                    "name another output folder, or other names in the output column",
                )


def stores_read(items: Sequence[BatchItem]) -> list[RemotePath]:
    """One path in each store that the rows read."""
    found: dict[str, RemotePath] = {}
    for item in items:
        for path in () if item.request is None else item.request.inputs:
            if isinstance(path, RemotePath):
                found.setdefault(path.root, path)
    return list(found.values())


def _file_key(path: LocalOrRemote, ignores_case: bool) -> str:
    """The same for all paths of one file: links are resolved, and names folded where the file system ignores case."""
    if isinstance(path, RemotePath):
        return path.url
    try:
        real = os.path.realpath(path)
    except ValueError:  # a zero byte in the name, which reading the file reports
        real = str(path)
    return unicodedata.normalize("NFC", real).casefold() if ignores_case else real


def _ignores_case(folder: Path) -> bool:
    """Whether the file system of a folder, or of its nearest parent that exists, ignores case in names."""
    folder = Path(os.path.realpath(folder))
    for part in (folder, *folder.parents):
        other = part.with_name(part.name.swapcase()) if part.name else part
        if other != part and part.exists():
            return other.exists() and os.path.samefile(part, other)
    return False
