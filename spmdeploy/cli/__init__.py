"""The command line: parse, call, print. Results go to stdout, talk and progress to stderr.

Everything but typer and the exceptions is imported inside the commands: `spmdeploy COMMAND --help` must stay instant.
An edit as it is mostly written does without typer too.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from io import TextIOWrapper

from spmdeploy.cli.one_edit import run_edit
from spmdeploy.cli.plain_edit import plain_edit
from spmdeploy.cli.talk import error_fields, print_json, report_error
from spmdeploy.errors import OutOfMemoryError, SpmDeployError

_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; the only place where errors become words."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in arguments
    try:
        exit_code = _run(arguments)
        if exit_code == _INTERRUPTED:  # typer's own answer to Ctrl-C
            return _fail(SpmDeployError("interrupted"), as_json, _INTERRUPTED)
        sys.stdout.flush()
        return exit_code
    except KeyboardInterrupt:
        return _fail(SpmDeployError("interrupted"), as_json, _INTERRUPTED)
    except SpmDeployError as error:
        return _fail(error, as_json)
    except MemoryError:
        return _fail(OutOfMemoryError("out of memory", "use a smaller photo or close other programs"), as_json)
    except BrokenPipeError:
        return 1  # as in `spmdeploy inspect X | head -1`: nobody is left to tell
    except Exception as error:
        unexpected = SpmDeployError(
            f"{type(error).__name__}: {error}", "this is a defect; SPMDEPLOY_DEBUG=1 shows where"
        )
        return _fail(unexpected, as_json)


def _run(arguments: Sequence[str]) -> int:
    options = plain_edit(arguments)
    if options is not None:
        run_edit(options)
        return 0
    from spmdeploy.cli.commands import run_command

    return run_command(arguments)


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
    """The console script. It ends the process."""
    is_edit = sys.argv[1:2] == ["edit"]
    if is_edit and not any("torch" in word for word in sys.argv):
        # Importing numpy starts a thread for each core, which take turns in waiting for matrices; here there are none.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names hold anything, terminals do not
    exit_code = main()
    try:
        sys.stdout.flush()
    except OSError:
        # The interpreter's own flush at the end would fail again, with an exit code of its own.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if is_edit and not (sys.gettrace() or sys.getprofile()):
        # Its files are written and its session is closed. To take the interpreter down as well, module by module,
        # takes a twentieth of a second and changes nothing.
        with suppress(OSError):
            sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)
