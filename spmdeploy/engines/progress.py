"""Runs a long build on a separate thread, so that it can report progress and be canceled with Ctrl-C."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
BuildStatus = Callable[[str, float], None]
"""Called with what a build is doing, and the seconds since it started."""

PROGRESS_INTERVAL = 10.0
"""Interval of status reports while nothing changes, in seconds."""


class BuildMonitor:
    """Follows one build.

    The library's progress monitor reports here; without one there are only the periodic reports.
    """

    def __init__(self, report: BuildStatus, interval: float = PROGRESS_INTERVAL) -> None:
        self.canceled = False
        self._report, self._interval = report, interval
        self._started = time.perf_counter()
        self._phases: list[str] = []

    def report(self, status: str) -> None:
        """Report what the build is doing."""
        self._report(status, time.perf_counter() - self._started)

    def run(self, build: Callable[[], T]) -> T:
        """Return the result of `build`, or raise its exception.

        Ctrl-C asks the build to stop and is raised when it has stopped; a second one is raised at once.
        """
        result: list[T] = []
        failure: list[BaseException] = []

        def work() -> None:
            try:
                result.append(build())
            except BaseException as exc:  # raised again below
                failure.append(exc)

        thread = threading.Thread(target=work, name="engine build", daemon=True)
        thread.start()
        while thread.is_alive():
            try:
                thread.join(self._interval)
                if thread.is_alive():
                    self.report(self._phases[-1] if self._phases else "building")
            except KeyboardInterrupt:
                if self.canceled:
                    raise
                self.canceled = True
                self.report("canceling at the next step")
        if self.canceled:
            raise KeyboardInterrupt
        if failure:
            raise failure[0]
        return result[0]

    def phase_started(self, name: str) -> None:
        """Called by the library's monitor, on the thread that builds."""
        self._phases.append(name)
        if len(self._phases) == 2:  # the first is the whole build; deeper levels have hundreds
            self.report(name)

    def phase_finished(self, name: str) -> None:
        """Called by the library's monitor, on the thread that builds."""
        if name in self._phases:
            self._phases.remove(name)


def progress_monitor(library: Any, monitor: BuildMonitor) -> Any:
    """Return the library's own monitor that reports to `monitor`; None if the library has none (before 8.6)."""
    if not hasattr(library, "IProgressMonitor"):
        return None

    class Monitor(library.IProgressMonitor):  # type: ignore[misc]
        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            monitor.phase_started(phase_name)

        def phase_finish(self, phase_name: str) -> None:
            monitor.phase_finished(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return not monitor.canceled

    return Monitor()
