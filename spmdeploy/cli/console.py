"""Prints results to stdout, notes and progress to stderr, and errors as text or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import typer

from spmdeploy.errors import SpmDeployError, UnavailableError, printable
from spmdeploy.files import translated

closed_by_main = ExitStack()
"""What a command opened; `main` closes it, unless the process ends."""


@contextmanager
def require_extra(extra: str) -> Iterator[None]:
    """Turn a missing package into an error with the command that installs it."""
    try:
        yield
    except ModuleNotFoundError as exc:
        raise UnavailableError(f"this needs the package {exc.name}", f'pip install "spmdeploy[{extra}]"') from exc


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on stderr if that is a terminal and there is more than one step."""
    bar: Any = None

    def show(done: int, total: int) -> None:
        nonlocal bar
        if total < 2 or not sys.stderr.isatty():
            return
        if bar is None:
            bar = typer.progressbar(length=total, label=title, file=sys.stderr)
            bar.__enter__()
        bar.update(done - bar.pos)

    try:
        yield show
    finally:
        if bar is not None:
            bar.__exit__(None, None, None)


@contextmanager
def status_line() -> Iterator[Callable[[str, float], None]]:
    """Print one line per step to stderr, with a percentage if stderr is a terminal."""
    current = ""

    def show(step: str, share: float) -> None:
        nonlocal current
        live = sys.stderr.isatty()
        if step != current:
            print(("\n" if live and current else "") + step, end="" if live else "\n", file=sys.stderr, flush=True)
            current = step
        if live and share:
            print(f"\r{step} {share:.0%}", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        if current and sys.stderr.isatty():
            print(file=sys.stderr)


def log(text: str) -> None:
    """Print a line to stderr."""
    print(printable(text), file=sys.stderr)


def log_notes(notes: Sequence[str]) -> None:
    """Print notes to stderr, a line each."""
    for note in notes:
        log(f"note: {note}")


def print_result(
    command: str, payload: dict[str, Any], lines: Sequence[str], as_json: bool, failure: SpmDeployError | None = None
) -> None:
    """Print the result to stdout, as lines or as one JSON object.

    Args:
        command: Names the JSON schema, spmdeploy.COMMAND/1.
        payload: Fields of the JSON object.
        lines: The result as text.
        as_json: Print the object, not the text.
        failure: Becomes part of the same object, or is printed to stderr, and ends the command.

    Raises:
        typer.Exit: With the exit code of `failure`.
    """
    if as_json:
        error = {} if failure is None else error_fields(failure, failure.exit_code)
        print_json({"schema": f"spmdeploy.{command}/1", **payload, **error})
    else:
        _print(printable("\n".join(lines)))
        if failure is not None:
            report_error(failure)
    if failure is not None:
        raise typer.Exit(failure.exit_code)


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object to stdout, in ASCII."""
    # ASCII only: invalid Unicode in file names, and terminals without UTF-8, would raise otherwise.
    _print(json.dumps(value, ensure_ascii=True))


def _print(text: str) -> None:
    """Print to stdout now, not at the end of the process. Raises InputError if the disk behind it is full."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as exc:
        raise translated(exc, "standard output", "write to") from exc


def format_table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table whose columns are aligned on the left."""
    widths = [max(len(row[column]) for row in (heading, *rows)) for column in range(len(heading))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (heading, *rows)
    ]


def error_fields(error: SpmDeployError, exit_code: int) -> dict[str, Any]:
    """The fields of a JSON object that describe an error."""
    return {"error": error.problem, "hint": error.hint, "exit_code": exit_code}


def report_error(error: SpmDeployError) -> None:
    """Print an error and its hint to stderr."""
    log(f"error: {error.problem}")
    if error.hint:
        log(f"hint: {error.hint}")


def format_db(psnr: float | None) -> str:
    """A PSNR in decibels as text; None is that of equal images."""
    return "identical" if psnr is None else f"{psnr:.1f} dB"
