"""Cold start: `spmdeploy edit` as a user starts it, from the start of the process to its end, its file on disk."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spmdeploy.bench.racer import BackendCrashedError, FirstRun, MemoryUsage
from spmdeploy.bench.schedule import Round
from spmdeploy.editing.options import EditRequest
from spmdeploy.errors import SpmDeployError
from spmdeploy.imaging import files as images

_HERE = Path(__file__).parents[2]
"""Where the package was imported from. `python -m` looks here first, so that the command is that of the same one."""


@dataclass(frozen=True)
class Run:
    """One start. Milliseconds; the phases in between add up to the whole."""

    whole: float
    phases: dict[str, float]
    """start (the interpreter, what the command line imports), open (libraries, graph; the files are read beside it),
    edit (to a file), end."""
    peak_bytes: int | None


class ColdStart:
    """The command that edits one photo with one backend, to be started again and again."""

    def __init__(self, files: EditRequest, choice: Sequence[str]) -> None:
        """choice: the options for model, backend, device and precision. All paths are absolute."""
        self._files = files
        words = ["edit", files.image, "--labels", files.labels, "--mask", files.mask, "--output", files.output]
        self._words = [*map(str, words), *choice, "--overwrite", "--json"]
        self._runs: list[Run] = []

    def first(self) -> FirstRun:
        """Starts it once, which fills the page cache and compiles what is not compiled yet."""
        run = self._start()
        photo, picture = (images.read_photo(path).pixels[None] for path in (self._files.image, self._files.output))
        return FirstRun(photo, picture, run.whole / 1000, {})

    def forget(self) -> None:
        """What was started so far does not count for `medians` and `peak`."""
        self._runs.clear()

    def turn(self, seconds: float, iterations: int) -> Round:
        started = time.perf_counter()
        runs: list[Run] = []
        while len(runs) < iterations or time.perf_counter() - started < seconds:
            runs.append(self._start())
        self._runs += runs
        return Round(tuple(run.whole for run in runs), time.perf_counter() - started)

    def medians(self) -> dict[str, float]:
        """Median milliseconds by phase; then what imports took, which is part of `start` and `open`.

        These come from one further start under `-X importtime`, which is slower: read their proportions.
        """
        names = self._runs[0].phases if self._runs else {}
        phases = {name: statistics.median(run.phases[name] for run in self._runs) for name in names}
        return phases | {f"import {name}": spent for name, spent in self._imports().items() if spent >= 1}

    def memory(self) -> MemoryUsage:
        """The largest resident set of all starts."""
        peaks = [run.peak_bytes for run in self._runs if run.peak_bytes is not None]
        return MemoryUsage(None, max(peaks, default=None), None)

    def _imports(self) -> dict[str, float]:
        with self._process("-X", "importtime") as process:
            text = process.communicate()[1]
        return import_times(text.decode(errors="replace"))

    def _start(self) -> Run:
        started = time.perf_counter()
        with self._process() as process:
            assert process.stdout is not None and process.stderr is not None
            told = process.stdout.readline()  # comes when the file is there
            written = time.perf_counter()
            error = process.stderr.read().decode(errors="replace")
            peak = _wait(process)
            ended = time.perf_counter()
        result = _parsed(told, process.returncode, error)
        opened, edited = (float(result["seconds"][name]) * 1000 for name in ("open", "edit"))
        whole = (ended - started) * 1000
        before = (written - started) * 1000 - opened - edited
        phases = {"start": before, "open": opened, "edit": edited, "end": (ended - written) * 1000}
        return Run(whole, phases, peak)

    def _process(self, *interpreter: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, *interpreter, "-m", "spmdeploy", *self._words]
        # Compiled modules are what pip installs; from a checkout the first start writes them, unless forbidden here.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=_HERE, env=environment)


def import_times(text: str) -> dict[str, float]:
    """Milliseconds by top-level package from what `-X importtime` prints: lines `self us | cumulative | name`."""
    spent: defaultdict[str, float] = defaultdict(float)
    for own, name in re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)$", text, re.MULTILINE):
        package = name.partition(".")[0]
        spent["python" if package in sys.stdlib_module_names else package] += int(own) / 1000
    return dict(sorted(spent.items(), key=lambda item: -item[1]))


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    """Waits for the end; returns the largest resident set in bytes, where the system tells."""
    if not hasattr(os, "wait4"):
        process.wait()
        return None
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _parsed(told: bytes, code: int, error: str) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(told)
    except ValueError:
        raise BackendCrashedError(f"`spmdeploy edit` printed no JSON and ended with {code}: {error[-300:]}") from None
    if code:
        kind = BackendCrashedError if code == 1 else SpmDeployError
        raise kind(f"`spmdeploy edit` ended with {code}: {result.get('error')}", result.get("hint"))
    return result
