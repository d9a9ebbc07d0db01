"""Runs each backend in its own process, so that memory is measured separately and a crash is contained.

`Worker` is the handle in the parent process; `BackendProcess` does the work in the other one.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

from spmdeploy.backends.registry import BackendEntry, backends, register
from spmdeploy.backends.verify import GoldenResult
from spmdeploy.bench.backend_process import BackendCrashedError, BackendProcess, FirstRun
from spmdeploy.bench.profile import Profile
from spmdeploy.bench.results import BackendInfo, MemoryUsage
from spmdeploy.bench.schedule import Round
from spmdeploy.bench.workloads import EditCase
from spmdeploy.errors import OutOfMemoryError, SpmDeployError
from spmdeploy.types import ModelInput

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_SHUTDOWN_SECONDS = 10


_backend: BackendProcess | None = None
"""The backend that this process runs; None in the parent."""


def _start_process(entries: tuple[BackendEntry, ...]) -> None:
    for entry in entries:
        register(entry)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process
    os.dup2(sys.stderr.fileno(), 1)  # stdout is for one JSON object, whatever libraries print
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Ends this process when the parent was killed: a pool's processes would wait for it forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _open(bundle: Path, backend: str, device: str, precision: str) -> int:
    """Opens the backend; returns the id of the process."""
    global _backend
    _backend = _contained(BackendProcess, bundle, backend, device, precision)
    return os.getpid()


def _call(method: str, *arguments: Any) -> Any:
    assert _backend is not None
    return _contained(getattr(_backend, method), *arguments)


def _contained(function: Callable[..., Any], *arguments: Any) -> Any:
    """Turns exceptions of libraries into errors that can be sent to the parent and belong to one row."""
    try:
        return function(*arguments)
    except SpmDeployError:
        raise
    except MemoryError:
        raise OutOfMemoryError("the backend's process ran out of memory", "close other programs") from None
    except Exception as exc:
        raise BackendCrashedError(f"{type(exc).__name__}: {exc}") from None


class Worker:
    """A `BackendProcess` in its own process; close it, or use it as a context manager.

    Every method raises what the method of `BackendProcess` raises, and `BackendCrashedError`.
    """

    def __init__(self, bundle: Path, backend: str, device: str, precision: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=_start_process, initargs=(backends(),))
        self._process: Any = None
        try:
            pid = self._submit(_open, bundle, backend, device, precision)
        except BaseException:
            self.close()
            raise
        self._process = next(child for child in multiprocessing.active_children() if child.pid == pid)

    @property
    def pid(self) -> int:
        """The process's id."""
        return int(self._process.pid)

    def describe(self) -> BackendInfo:
        """What was opened: device, precision, provider."""
        return self._call(BackendProcess.describe)

    def verify(self) -> list[GoldenResult]:
        """Repeats the golden edits of the bundle."""
        return self._call(BackendProcess.verify)

    def prepare_engine(self, batch: ModelInput, streams: int) -> FirstRun:
        """Prepares the graph from arrays to arrays, (B, S, S[, 3]), with `streams` concurrent calls; runs it once."""
        return self._call(BackendProcess.prepare_engine, batch, streams)

    def prepare_cached_layout(self, batch: ModelInput, streams: int) -> FirstRun:
        """Prepares further images, (B, S, S, 3), under a cached layout, with `streams` concurrent calls; runs one."""
        return self._call(BackendProcess.prepare_cached_layout, batch, streams)

    def prepare_edit(self, case: EditCase) -> FirstRun:
        """Prepares an edit from files to a file; runs it once."""
        return self._call(BackendProcess.prepare_edit, case)

    def turn(self, seconds: float, iterations: int) -> Round:
        """Runs the prepared case until `seconds` have passed and `iterations` are done; samples in milliseconds."""
        return self._call(BackendProcess.turn, seconds, iterations)

    def reset(self) -> None:
        """Discards earlier runs from `phase_medians`."""
        self._call(BackendProcess.reset)

    def phase_medians(self) -> dict[str, float]:
        """Median milliseconds by phase."""
        return self._call(BackendProcess.phase_medians)

    def profile(self, batch: ModelInput) -> Profile:
        """Profiles one batch, (B, S, S[, 3]), by part of the network; call after all measurements."""
        return self._call(BackendProcess.profile, batch)

    def memory(self) -> MemoryUsage:
        """Memory of the process and its GPU, in bytes; None where it cannot be measured."""
        return self._call(BackendProcess.memory)

    def close(self) -> None:
        """Ends the process; safe to call twice."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(SpmDeployError, RuntimeError):  # already dead
                self._pool.submit(_call, "close")
        self._pool.shutdown(wait=process is None)
        if process is not None:
            process.join(timeout=_SHUTDOWN_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(
        self,
        method: Callable[Concatenate[BackendProcess, Arguments], Result],
        *arguments: Arguments.args,
        **_: Arguments.kwargs,
    ) -> Result:
        result: Result = self._submit(_call, method.__name__, *arguments)
        return result

    def _submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return self._pool.submit(function, *arguments).result()
        except BrokenProcessPool as exc:
            raise BackendCrashedError(
                f"its process ended with {self._exit_status()}", "run `spmdeploy verify` with this backend"
            ) from exc

    def _exit_status(self) -> str:
        if self._process is None:
            return "no result while it loaded the model"
        self._process.join(timeout=_SHUTDOWN_SECONDS)
        code = self._process.exitcode
        return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
