"""A build that takes minutes: on a thread of its own, so that it can be watched, and cancelled with Ctrl-C."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
Tell = Callable[[str, float], None]
"""Is told what a build is doing, and for how many seconds the build has been going on."""

HEARTBEAT = 10.0
"""Seconds after which a build says that it is still at it."""


class BuildMonitor:
    """Follows one build. The library's progress monitor reports here; without one there is the heartbeat alone."""

    def __init__(self, tell: Tell, heartbeat: float = HEARTBEAT) -> None:
        self.cancelled = False
        self._tell, self._heartbeat = tell, heartbeat
        self._started = time.perf_counter()
        self._phases: list[str] = []

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def say(self, words: str) -> None:
        self._tell(words, self.seconds)

    def run(self, build: Callable[[], T]) -> T:
        """The result of `build`, or its exception. Ctrl-C asks the build to stop and is raised when it has."""
        outcome: list[T] = []
        failure: list[BaseException] = []

        def work() -> None:
            try:
                outcome.append(build())
            except BaseException as exc:  # raised again below
                failure.append(exc)

        thread = threading.Thread(target=work, name="engine build", daemon=True)
        thread.start()
        while thread.is_alive():
            try:
                thread.join(self._heartbeat)
                if thread.is_alive():
                    self.say(self._phases[-1] if self._phases else "building")
            except KeyboardInterrupt:
                if self.cancelled:
                    raise
                self.cancelled = True
                self.say("cancelling at the next step")
        if self.cancelled:
            raise KeyboardInterrupt
        if failure:
            raise failure[0]
        return outcome[0]

    # -- called by the library's monitor, on the thread that builds

    def phase_started(self, name: str) -> None:
        self._phases.append(name)
        if len(self._phases) == 2:  # the first is the whole build; further down there are hundreds
            self.say(name)

    def phase_finished(self, name: str) -> None:
        if name in self._phases:
            self._phases.remove(name)


def progress_monitor(library: Any, watch: BuildMonitor) -> Any:
    """The library's monitor that reports to `watch`; None where the library has none (before TensorRT 8.6)."""
    if not hasattr(library, "IProgressMonitor"):
        return None

    class Monitor(library.IProgressMonitor):  # type: ignore[misc]
        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            watch.phase_started(phase_name)

        def phase_finish(self, phase_name: str) -> None:
            watch.phase_finished(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return not watch.cancelled

    return Monitor()
