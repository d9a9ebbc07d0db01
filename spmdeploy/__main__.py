"""Console entry point. Reports Ctrl-C and missing packages cleanly even while imports are still running."""

from __future__ import annotations

import json
import sys
from typing import NoReturn

_INTERRUPTED = 130


def entry() -> None:
    """Console entry point. Ends the process."""
    try:
        from spmdeploy.cli import entry
    except KeyboardInterrupt:
        _fail("interrupted", None, _INTERRUPTED)
    except ModuleNotFoundError as exc:
        if (exc.name or "").partition(".")[0] == "spmdeploy":
            raise
        _fail(f"spmdeploy needs the package {exc.name}", 'pip install "spmdeploy[cpu]"', 4)
    entry()


def _fail(problem: str, hint: str | None, exit_code: int) -> NoReturn:
    """Report an error of the imports themselves. Ends the process."""
    if "--json" in sys.argv:
        error = {"schema": "spmdeploy.error/1", "error": problem, "hint": hint, "exit_code": exit_code}
        print(json.dumps(error))
    else:
        print(f"error: {problem}", *([f"hint: {hint}"] if hint else []), sep="\n", file=sys.stderr)
    sys.exit(exit_code)


if __name__ == "__main__":
    entry()
