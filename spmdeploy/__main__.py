"""Where the process begins. Importing the command line takes a tenth of a second: Ctrl-C ends in words then too."""

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
            told = {"schema": "spmdeploy.error/1", "error": "interrupted", "hint": None, "exit_code": _INTERRUPTED}
            print(json.dumps(told))
        else:
            print("error: interrupted", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    entry()


if __name__ == "__main__":
    entry()
