"""Measures cold start: a whole process of `spmdeploy edit`, from its start to its end."""

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

from spmdeploy.bench.backend_process import BackendCrashedError, FirstRun
from spmdeploy.bench.results import MemoryUsage
from spmdeploy.bench.schedule import Round
from spmdeploy.editing.options import EditRequest
from spmdeploy.errors import SpmDeployError
from spmdeploy.imaging import files as images

_HERE = Path(__file__).parents[2]
"""Folder of this package, searched first by `python -m`: the same package is measured."""


@dataclass(frozen=True)
class Run:
    """One process, in milliseconds; the phases add up to the total."""

    total: float
    phases: dict[str, float]
    """start (interpreter, imports of the command line), open (libraries and graph; the files are read meanwhile), edit
    (to a file), end."""
    peak_bytes: int | None


class ColdStart:
    """`Measurable` that starts the command editing one photo with one backend."""

    def __init__(self, files: EditRequest, options: Sequence[str]) -> None:
        """options: the options for model, backend, device and precision. All paths are absolute."""
        self._files = files
        arguments = ["edit", files.image, "--labels", files.labels, "--mask", files.mask, "--output", files.output]
        self._arguments = [*map(str, arguments), *options, "--overwrite", "--json"]
        self._runs: list[Run] = []

    def first(self) -> FirstRun:
        """Runs it once, which fills the page cache and compiles Python files."""
        run = self._start()
        photo, edited = (images.read_photo(path).pixels[None] for path in (self._files.image, self._files.output))
        return FirstRun(photo, edited, run.total / 1000, {})

    def reset(self) -> None:
        """Discards earlier runs from `phase_medians` and `memory`."""
        self._runs.clear()

    def turn(self, seconds: float, iterations: int) -> Round:
        """Runs whole processes until both `seconds` have passed and `iterations` are done; samples in milliseconds."""
        started = time.perf_counter()
        runs: list[Run] = []
        while len(runs) < iterations or time.perf_counter() - started < seconds:
            runs.append(self._start())
        self._runs += runs
        return Round(tuple(run.total for run in runs), time.perf_counter() - started)

    def phase_medians(self) -> dict[str, float]:
        """Median milliseconds by phase, and import times, which are part of `start` and `open`.

        Import times come from one further run under `-X importtime`, which is slower: only their proportions count.
        """
        names = self._runs[0].phases if self._runs else {}
        phases = {name: statistics.median(run.phases[name] for run in self._runs) for name in names}
        return phases | {f"import {name}": spent for name, spent in self._imports().items() if spent >= 1}

    def memory(self) -> MemoryUsage:
        """Largest resident set of all runs."""
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
            output = process.stdout.readline()  # printed when the file is written
            written = time.perf_counter()
            error = process.stderr.read().decode(errors="replace")
            peak = _wait(process)
            ended = time.perf_counter()
        result = _parsed(output, process.returncode, error)
        opened, edited = (float(result["seconds"][name]) * 1000 for name in ("open", "edit"))
        total = (ended - started) * 1000
        before = (written - started) * 1000 - opened - edited
        phases = {"start": before, "open": opened, "edit": edited, "end": (ended - written) * 1000}
        return Run(total, phases, peak)

    def _process(self, *interpreter: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, *interpreter, "-m", "spmdeploy", *self._arguments]
        # pip installs compiled modules; from a checkout the first run writes them unless this variable forbids it.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=_HERE, env=environment)


def import_times(text: str) -> dict[str, float]:
    """Milliseconds by top-level package, from the output of `-X importtime`: lines `self us | cumulative | name`."""
    spent: defaultdict[str, float] = defaultdict(float)
    for own, name in re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)$", text, re.MULTILINE):
        package = name.partition(".")[0]
        spent["python" if package in sys.stdlib_module_names else package] += int(own) / 1000
    return dict(sorted(spent.items(), key=lambda item: -item[1]))


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    """Waits for the end of the process; returns its largest resident set in bytes, None if unavailable."""
    if not hasattr(os, "wait4"):
        process.wait()
        return None
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _parsed(output: bytes, code: int, error: str) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(output)
    except ValueError:
        raise BackendCrashedError(f"`spmdeploy edit` printed no JSON and ended with {code}: {error[-300:]}") from None
    if code:
        kind = BackendCrashedError if code == 1 else SpmDeployError
        raise kind(f"`spmdeploy edit` ended with {code}: {result.get('error')}", result.get("hint"))
    return result
