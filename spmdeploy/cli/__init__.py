"""The command line: parse, call, print. Results go to stdout, talk and progress to stderr.

Everything but typer and the exceptions is imported inside the commands: `spmdeploy COMMAND --help` must stay instant.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from io import TextIOWrapper
from typing import Annotated

import typer

import spmdeploy
from spmdeploy.cli.benchmarks import bench_app
from spmdeploy.cli.bundles import bundle_app, doctor, inspect, verify
from spmdeploy.cli.edits import batch, edit
from spmdeploy.cli.exports import build, export, export_triton
from spmdeploy.cli.label_maps import labels_app
from spmdeploy.cli.talk import error_fields, print_json, report_error
from spmdeploy.cli.training import dataset_app, evaluate, train
from spmdeploy.errors import OutOfMemory, SpmDeployError, UsageError

app = typer.Typer(
    name="spmdeploy",
    help="Semantic image editing: a photo, a label map and a mask go in, what is under the mask comes back repainted.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(edit)
app.command()(batch)
app.command()(export)
app.command()(inspect)
app.command()(build)
app.command()(verify)
app.command("export-triton")(export_triton)
app.command()(doctor)
app.command()(train)
app.command()(evaluate)
app.add_typer(bundle_app, name="bundle")
app.add_typer(labels_app, name="labels")
app.add_typer(bench_app, name="bench")
app.add_typer(dataset_app, name="dataset")


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        print(spmdeploy.__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; the only place where errors become words."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in arguments
    try:
        exit_code = int(app(arguments, prog_name="spmdeploy", standalone_mode=False) or 0)
        if exit_code == _INTERRUPTED:  # typer's own answer to Ctrl-C
            return _fail(SpmDeployError("interrupted"), as_json, _INTERRUPTED)
        sys.stdout.flush()
        return exit_code
    except KeyboardInterrupt:
        return _fail(SpmDeployError("interrupted"), as_json, _INTERRUPTED)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        hint = f"see {context.command_path} --help" if context else None
        return _fail(UsageError(error.format_message().replace("Value error, ", ""), hint), as_json)
    except SpmDeployError as error:
        return _fail(error, as_json)
    except MemoryError:
        return _fail(OutOfMemory("out of memory", "use a smaller photo or close other programs"), as_json)
    except BrokenPipeError:
        return 1  # as in `spmdeploy inspect X | head -1`: nobody is left to tell
    except Exception as error:
        unexpected = SpmDeployError(
            f"{type(error).__name__}: {error}", "this is a defect; SPMDEPLOY_DEBUG=1 shows where"
        )
        return _fail(unexpected, as_json)


def _fail(error: SpmDeployError, as_json: bool, exit_code: int | None = None) -> int:
    exit_code = error.exit_code if exit_code is None else exit_code
    if os.environ.get("SPMDEPLOY_DEBUG") == "1" and sys.exc_info()[0] is not None:
        traceback.print_exc()
    if as_json:
        with suppress(OSError):  # a full disk behind stdout, say: the exit code still tells
            print_json({"schema": "spmdeploy.error/1", **error_fields(error, exit_code)})
    else:
        report_error(error)
    return exit_code


def entry() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names hold anything, terminals do not
    exit_code = main()
    try:
        sys.stdout.flush()
    except OSError:
        # The interpreter's own flush at the end would fail again, with an exit code of its own.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(exit_code)
