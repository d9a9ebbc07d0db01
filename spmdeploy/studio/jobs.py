"""Runs edits one after the other from a bounded queue, with time limits and cancellation."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from spmdeploy.errors import SpmDeployError
from spmdeploy.types import Progress

T = TypeVar("T")
Work = Callable[[Progress], T]


class QueueFullError(SpmDeployError):
    """More edits are waiting than the queue holds."""


class TimeLimitError(SpmDeployError):
    """An edit took longer than it may."""


class ClientGoneError(SpmDeployError):
    """The client left before its edit was done."""


class ShuttingDownError(SpmDeployError):
    """The service accepts nothing more."""


@dataclass(eq=False)
class Job(Generic[T]):
    """One accepted edit. `result` is awaited by the request; `cancel` may be called from any thread."""

    work: Work[T]
    deadline: float
    """In seconds of `time.monotonic`."""
    report: Callable[[int, int], None]
    """Called in the worker's thread with steps done and the total."""
    result: asyncio.Future[T]
    loop: asyncio.AbstractEventLoop
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Ask the edit to end at its next step; safe to call at any time and twice."""
        self.cancelled.set()

    def run(self) -> None:
        """Do the work and deliver what it returns or raises."""

        def progress(done: int, total: int) -> None:
            self._check()
            self.report(done, total)

        try:
            self._check()
            value = self.work(progress)
        except BaseException as exc:
            self._deliver(self.result.set_exception, exc)
        else:
            self._deliver(self.result.set_result, value)

    def _check(self) -> None:
        if self.cancelled.is_set():
            raise ClientGoneError("the client left before the edit was done")
        if time.monotonic() > self.deadline:
            raise TimeLimitError(
                "the edit took longer than this service allows", "edit a smaller region, or raise --timeout"
            )

    def _deliver(self, setter: Callable[..., None], value: object) -> None:
        def deliver() -> None:
            if not self.result.done():
                setter(value)

        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(deliver)


class JobQueue:
    """A bounded queue and the thread that works through it.

    One thread, because a session uses all cores or the whole GPU by itself. Requests are not merged into batches: their
    windows differ in number and size.
    """

    def __init__(self, capacity: int, seconds: float) -> None:
        """capacity: edits that are received, wait or run at once. seconds: limit of one edit, waiting included."""
        self.capacity = capacity
        self._seconds = seconds
        self._reserved = 0
        self._waiting: deque[Job[Any]] = deque()
        self._running = 0
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="spmdeploy edits", daemon=True)
        self._thread.start()

    @contextmanager
    def reserve(self) -> Iterator[None]:
        """Keep a place for an edit whose request is being received, so that memory for uploads is bounded too.

        Raises:
            QueueFullError, ShuttingDownError: there is none.
        """
        with self._changed:
            if self._closing:
                raise ShuttingDownError("the service is shutting down", "try another instance")
            if self._depth() >= self.capacity:
                raise QueueFullError(f"{self.capacity} edits are in progress, the limit", "try again later")
            self._reserved += 1
        try:
            yield
        finally:
            with self._changed:
                self._reserved -= 1

    def submit(self, work: Work[T], report: Progress = lambda done, total: None) -> Job[T]:
        """Accept an edit for which a place is reserved. To be called in the event loop."""
        loop = asyncio.get_running_loop()
        job = Job(work, time.monotonic() + self._seconds, report, loop.create_future(), loop)
        with self._changed:
            self._waiting.append(job)
            self._changed.notify()
        return job

    @property
    def depth(self) -> int:
        """Edits that are received, wait or run."""
        with self._changed:
            return self._depth()

    def _depth(self) -> int:
        return self._reserved + self._running + sum(not job.cancelled.is_set() for job in self._waiting)

    def close(self) -> None:
        """Finish what was accepted, then end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closing:
                    self._changed.wait()
                if not self._waiting:
                    return
                job = self._waiting.popleft()
                self._running = 1
            try:
                job.run()
            finally:
                del job  # its upload is not needed while the thread waits
                with self._changed:
                    self._running = 0
