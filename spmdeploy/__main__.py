"""Console entry point. Reports Ctrl-C cleanly even while imports are still running."""

from __future__ import annotations

import json
import sys

_INTERRUPTED = 130


def entry() -> None:
    """The console script."""
    try:
        from spmdeploy.cli import entry
    except KeyboardInterrupt:
        if "--json" in sys.argv:
            error = {"schema": "spmdeploy.error/1", "error": "interrupted", "hint": None, "exit_code": _INTERRUPTED}
            print(json.dumps(error))
        else:
            print("error: interrupted", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    entry()


if __name__ == "__main__":
    entry()
