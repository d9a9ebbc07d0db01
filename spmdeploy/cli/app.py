"""The command-line application: collects the commands, runs one, turns exceptions into messages and exit codes.

Only the module of the command that is run is imported, and it imports nothing heavy at the top.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer

from spmdeploy.cli.console import closed_by_main, error_fields, print_json, report_error, require_extra
from spmdeploy.errors import InputError, OutOfMemoryError, SpmDeployError, UnavailableError, UsageError
from spmdeploy.files import translated
from spmdeploy.version import __version__

_INTERRUPTED = 130

_COMMANDS = {
    "edit": "edit.edit",
    "batch": "batch.batch",
    "studio": "studio.studio",
    "export": "export.export",
    "inspect": "bundle.inspect",
    "build": "build.build",
    "verify": "bundle.verify",
    "export-triton": "export.export_triton",
    "doctor": "doctor.doctor",
    "train": "train.train",
    "evaluate": "train.evaluate",
    "bundle": "bundle.bundle_app",
    "labels": "labels.labels_app",
    "bench": "bench.bench_app",
    "dataset": "dataset.dataset_app",
}
"""The module in this package and the function, or the application of subcommands, for each name."""


def build_app(only: str | None = None) -> typer.Typer:
    """The application with all commands. only: the one name that is wanted; no other module is then imported."""
    app = typer.Typer(
        name="spmdeploy",
        help="Semantic image editing: repaints the masked part of a photo so that it shows what a label map says.",
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback(invoke_without_command=True)(root)
    for name, place in _COMMANDS.items():
        if only in (None, name):
            module, _, attribute = place.partition(".")
            command = getattr(importlib.import_module(f"spmdeploy.cli.{module}"), attribute)
            if isinstance(command, typer.Typer):
                app.add_typer(command, name=name)
            else:
                app.command(name)(command)
    return app


def root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        print(__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


def run_command(arguments: Sequence[str]) -> int:
    """Run the command in `arguments` and return its exit code. Raises UsageError if they cannot be parsed."""
    app = build_app(arguments[0] if arguments and arguments[0] in _COMMANDS else None)
    try:
        return int(app(_with_addresses(arguments), prog_name="spmdeploy", standalone_mode=False) or 0)
    except typer.TyperException as exc:
        context = getattr(exc, "ctx", None)
        hint = f"see {context.command_path} --help" if context else None
        raise UsageError(exc.format_message().replace("Value error, ", ""), hint) from exc


def _with_addresses(arguments: Sequence[str]) -> list[str]:
    """The arguments with a value for each `--ray` that has none: typer has no options with optional values."""
    following = [*arguments[1:], "-"]
    return [
        "--ray=default" if argument == "--ray" and after.startswith("-") else argument
        for argument, after in zip(arguments, following, strict=False)
    ]


def main(arguments: Sequence[str] | None = None, *, process_ends: bool = False) -> int:
    """Run one command and return its exit code. The only place where exceptions become messages.

    process_ends: leave closing what the command opened to the system.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in arguments
    try:
        _refuse_zip()
        with require_extra("cpu"), nullcontext() if process_ends else closed_by_main:
            exit_code = run_command(arguments)
        if exit_code == _INTERRUPTED:  # typer turns Ctrl-C into this exit code
            return _fail(SpmDeployError("interrupted"), as_json, _INTERRUPTED)
        sys.stdout.flush()
        return exit_code
    except KeyboardInterrupt:
        return _fail(SpmDeployError("interrupted"), as_json, _INTERRUPTED)
    except SpmDeployError as exc:
        return _fail(exc, as_json)
    except MemoryError:
        return _fail(OutOfMemoryError("out of memory", "use a smaller photo or close other programs"), as_json)
    except BrokenPipeError:
        return 1  # stdout was closed, as in `spmdeploy inspect X | head -1`
    except OSError as exc:
        return _fail(_os_error(exc), as_json)
    except Exception as exc:
        unexpected = SpmDeployError(f"{type(exc).__name__}: {exc}", "this is a defect; SPMDEPLOY_DEBUG=1 shows where")
        return _fail(unexpected, as_json)


def _refuse_zip() -> None:
    """Raise UnavailableError where the package is imported from a zip file, as one that `python -m zipapp` makes.

    Its model and class tables are then no files, and libraries open files alone.
    """
    archive = next((path for path in Path(__file__).parents if path.is_file()), None)
    if archive is not None:
        problem = f"the package is inside the file {archive}, where its model and class tables cannot be opened"
        raise UnavailableError(problem, f"unpack it: python -m zipfile -e {archive} FOLDER; then run: python FOLDER")


def _os_error(error: OSError) -> SpmDeployError:
    """The error for an OSError raised outside the reading and writing of named files."""
    if error.filename is None and error.errno == errno.ENOENT:  # from os.getcwd()
        return InputError("the current directory no longer exists", "cd to a directory that exists")
    return translated(error, error.filename or "standard output or a file", "write to")


def _fail(error: SpmDeployError, as_json: bool, exit_code: int | None = None) -> int:
    exit_code = error.exit_code if exit_code is None else exit_code
    if os.environ.get("SPMDEPLOY_DEBUG") == "1" and sys.exc_info()[0] is not None:
        traceback.print_exc()
    if as_json:
        try:
            print_json({"schema": "spmdeploy.error/1", **error_fields(error, exit_code)})
        except (SpmDeployError, OSError):  # for example a full disk behind stdout
            report_error(error)
    else:
        report_error(error)
    return exit_code


def _open_closed_streams() -> None:
    """Open the null device for standard streams that were closed, as by `>&-` or a daemon.

    Otherwise the next file to be opened would get their descriptor, and printed text would end up in it.
    """
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            with suppress(OSError):
                os.fstat(descriptor)
                continue  # open, but not usable by Python
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115  open until the process ends
            if stream.fileno() != descriptor:
                os.dup2(stream.fileno(), descriptor)
            setattr(sys, name, stream)


def entry() -> None:
    """Console entry point. Ends the process."""
    is_edit = sys.argv[1:2] == ["edit"]
    if is_edit and not any("torch" in argument for argument in sys.argv):
        # Importing numpy starts an OpenBLAS thread per core, which busy-wait; an edit multiplies no matrices.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for file names that the terminal cannot encode
    exit_code = main(process_ends=is_edit)
    try:
        sys.stdout.flush()
    except OSError:
        # The interpreter's own flush at the end would fail again, with an exit code of its own.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if is_edit and not (sys.gettrace() or sys.getprofile()):
        # All files are written. Closing the session and shutting down the interpreter would take another 0.05 s, with
        # OpenVINO 0.15 s; the system frees the memory of a process at once.
        with suppress(OSError):
            sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)
