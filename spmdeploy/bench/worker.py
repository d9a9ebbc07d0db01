"""A process for each backend: its memory is its own, its crash ends nobody else, and its turns come when it is told.

`BackendProcess` lives in the process and does the work; `Worker` is its handle outside.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from spmdeploy.backends.base import Session, SupportsLayoutCache
from spmdeploy.backends.onnxruntime import OnnxRuntimeSession
from spmdeploy.backends.tensorrt import TensorRtSession
from spmdeploy.backends.verify import GoldenResult, verify_edits
from spmdeploy.bench.backends import REFERENCE_BACKEND, describe, loaded_bytes, open_backend
from spmdeploy.bench.nvml import GpuMeter, Nvml
from spmdeploy.bench.onnxruntime_profile import profiled_in_onnxruntime
from spmdeploy.bench.profile import Profile
from spmdeploy.bench.racer import BackendCrashedError, FirstRun, MemoryUsage
from spmdeploy.bench.resident import DeviceRun, device_run, time_on_device
from spmdeploy.bench.results import BackendInfo
from spmdeploy.bench.schedule import Round
from spmdeploy.bench.workloads import EditBatch, EditCase, write_case
from spmdeploy.bundle.bundle import open_bundle
from spmdeploy.editing.editor import Editor
from spmdeploy.editing.run import EditOutcome, run_edit_files
from spmdeploy.errors import OutOfMemoryError, SpmDeployError, UnavailableError, VerificationError
from spmdeploy.gpu.device import Device
from spmdeploy.gpu.driver import gpu_uuid
from spmdeploy.imaging import files as images

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class Timed(Protocol):
    """What one iteration is."""

    def __call__(self) -> float:
        """Runs it once; returns milliseconds."""


# ------------------------------------------------------------------------------------------------- inside the process


class BackendProcess:
    """One backend on one bundle, ready to be timed."""

    def __init__(self, bundle: Path, backend: str, device: str, precision: str) -> None:
        self._resources = ExitStack()
        self._bundle = open_bundle(bundle)
        self._backend = backend
        self._session: Session = open_backend(self._bundle, backend, device, precision)
        self._resources.callback(self._session.close)
        self._timed: list[Timed] = []
        self._phases: list[dict[str, float]] = []
        self._launches: list[float] = []
        self._ready = _resident_bytes("VmRSS")
        self._device: Device | None = None
        self._meter: GpuMeter | None = None
        if self._session.device != "cpu":
            ordinal = int(self._session.device.removeprefix("cuda:"))
            self._device = Device(ordinal)
            self._resources.callback(self._device.close)
            self._meter = self._resources.enter_context(Nvml()).meter(gpu_uuid(ordinal))
        self._case = self._resources.enter_context(ExitStack())  # the last, so that it is closed before the device

    def describe(self) -> BackendInfo:
        return describe(self._session, self._bundle)

    def verify(self) -> list[GoldenResult]:
        return verify_edits(self._session, self._bundle)  # refining would load a graph that is not timed here

    def prepare_engine(self, batch: EditBatch, streams: int) -> FirstRun:
        """The graph alone, from arrays to arrays; on a GPU with both in its memory."""
        self._end_case()
        started = time.perf_counter()
        if self._device is None:
            picture = self._session.run(*batch.arrays)
            self._timed = [_timed_on_host(lambda: self._session.run(*batch.arrays))] * streams
        else:
            sessions = self._sessions(streams)
            edits = [device_run(one, batch, self._device, self._case) for one in sessions]
            for session in sessions:  # at the end of the case nobody works any more when the first is given back
                if isinstance(session, TensorRtSession):
                    self._case.callback(session.synchronize)
            picture = _first_picture(edits, self._device)
            self._timed = [self._timed_on_device(edit, self._device) for edit in edits]
        modes: dict[str, str | int] = {"inputs": "on the GPU", "CUDA graphs": "no"} if self._device else {}
        return FirstRun(batch.image, picture, time.perf_counter() - started, modes)

    def _sessions(self, count: int) -> list[Session]:
        """So many, until the end of the case: each has a stream, contexts and weights of its own, and none waits for
        another. Raises UnavailableError for PyTorch, whose calls would share a stream."""
        session = self._session
        if count > 1 and not isinstance(session, TensorRtSession | OnnxRuntimeSession):
            raise UnavailableError(
                f"{self._backend} is measured with one stream on a GPU", "several are for engines and ONNX Runtime"
            )
        others = []
        for _ in range(count - 1):
            others.append(open_backend(self._bundle, self._backend, session.device, session.precision))
            self._case.callback(others[-1].close)
        return [session, *others]

    def prepare_frame(self, batch: EditBatch, streams: int) -> FirstRun:
        """The graph for one image more under a layout that the session keeps, from arrays to arrays."""
        self._end_case()
        session = self._session
        if self._device is not None or not isinstance(session, SupportsLayoutCache):
            raise UnavailableError("it keeps no layouts: every frame costs what an edit costs", "see the engine scope")
        started = time.perf_counter()
        run = session.cache_layout_run(batch.labels, batch.instances, batch.mask)
        kept = time.perf_counter() - started
        picture = run(batch.image)
        self._timed = [_timed_on_host(lambda: run(batch.image))] * streams
        notes: dict[str, str | int] = {"milliseconds to keep the layout": round(kept * 1000)}
        return FirstRun(batch.image, picture, time.perf_counter() - started, notes)

    def prepare_edit(self, case: EditCase) -> FirstRun:
        """A photo file, a label file and a mask file become an edited PNG file."""
        self._end_case()
        folder = Path(self._case.enter_context(tempfile.TemporaryDirectory()))
        files = write_case(case, folder)
        editor = Editor(self._session, self._bundle.manifest.classes)

        def edit() -> EditOutcome:
            done = run_edit_files(editor, files)
            self._phases.append(done.report.milliseconds)
            return done

        started = time.perf_counter()
        report = edit().report
        seconds = time.perf_counter() - started
        self._timed = [_timed_on_host(edit)]
        notes: dict[str, str | int] = {
            "tiling": report.tiling,
            "windows": len(report.windows),
            "tiles": report.tiles,
            "calls": report.batches,
        }
        if kept := {window.between_levels for window in report.windows if window.between_levels}:
            notes["between levels"] = " and ".join(sorted(kept))
        photo, picture = (images.read_photo(path).pixels[None] for path in (files.image, files.output))
        return FirstRun(photo, picture, seconds, notes)

    def turn(self, seconds: float, iterations: int) -> Round:
        """Runs what was prepared last until both are reached; several streams run at once."""
        joules = None if self._meter is None else self._meter.joules()
        samples, elapsed = _together([partial(_repeated, timed, seconds, iterations) for timed in self._timed])
        spent = None if self._meter is None else self._meter.joules()
        energy = None if joules is None or spent is None else spent - joules
        return Round(tuple(samples), elapsed, energy)

    def forget(self) -> None:
        """What ran so far does not count for `medians`."""
        self._phases.clear()
        self._launches.clear()

    def medians(self) -> dict[str, float]:
        """Where the time of an edit went: medians in milliseconds by phase; and of launching, on a GPU."""
        names = self._phases[0] if self._phases else {}
        medians = {name: float(np.median([phases[name] for phases in self._phases])) for name in names}
        return medians | ({"launch": float(np.median(self._launches))} if self._launches else {})

    def profile(self, batch: EditBatch) -> Profile:
        """One profiled batch. Takes memory and time of its own: ask after everything has been measured."""
        self._end_case()
        session = self._session
        if session.backend == "onnxruntime":
            return profiled_in_onnxruntime(self._bundle, session, batch)
        if session.backend == REFERENCE_BACKEND:
            from spmdeploy.bench.torch_profile import profiled_in_torch

            return profiled_in_torch(session, batch)
        raise UnavailableError(f"{session.backend} is not profiled by part", "profile onnxruntime or torch")

    def memory(self) -> MemoryUsage:
        device = None if self._meter is None else self._meter.memory_of(os.getpid())
        activations = self._session.activation_bytes if isinstance(self._session, TensorRtSession) else None
        loaded = loaded_bytes(self._session, self._bundle)
        return MemoryUsage(self._ready, _resident_bytes("VmHWM"), device, activations, loaded)

    def close(self) -> None:
        self._resources.close()

    def _end_case(self) -> None:
        """Gives back what the last case needed, and lets the peak of memory begin anew."""
        self._timed = []
        self._case.close()
        self.forget()
        _forget_peak()

    def _timed_on_device(self, edit: DeviceRun, device: Device) -> Timed:
        def timed() -> float:
            passed, launching = time_on_device(edit, device)
            self._launches.append(launching)
            return passed

        return timed


def _timed_on_host(run: Callable[[], object]) -> Timed:
    def timed() -> float:
        started = time.perf_counter()
        run()
        return (time.perf_counter() - started) * 1000

    return timed


def _repeated(timed: Timed, seconds: float, iterations: int) -> list[float]:
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < iterations or time.perf_counter() < end:
        samples.append(timed())
    return samples


def _first_picture(edits: list[DeviceRun], device: Device) -> NDArray[np.uint8]:
    """What all make of it, by one after the other. Raises VerificationError where they do not agree."""
    pictures = []
    for edit in edits:
        time_on_device(edit, device)
        pictures.append(edit.fetch())
    if not all(np.array_equal(picture, pictures[0]) for picture in pictures):
        raise VerificationError("one and the same edit comes out differently in another stream", "report it")
    return pictures[0]


def _together(loops: list[Callable[[], list[float]]]) -> tuple[list[float], float]:
    """Runs all loops at once, each in a thread of its own; one alone in this thread. Raises what any of them raises.

    Returns what they return, and the seconds from the moment when all were ready until the last had ended.
    """
    if len(loops) == 1:
        started = time.perf_counter()
        return loops[0](), time.perf_counter() - started
    results: list[list[float] | BaseException] = [[] for _ in loops]
    began: list[float] = []
    ready = threading.Barrier(len(loops), action=lambda: began.append(time.perf_counter()))

    def run(place: int) -> None:
        ready.wait()
        try:
            results[place] = loops[place]()
        except BaseException as error:
            results[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(loops))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - began[0]
    samples: list[float] = []
    for result in results:
        if isinstance(result, BaseException):
            raise result
        samples += result
    return samples, elapsed


def _resident_bytes(field: str) -> int | None:
    """VmRSS (now) or VmHWM (largest) of this process.

    Not getrusage: its maximum survives exec, so that a child starts with the size of its parent.
    """
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _forget_peak() -> None:
    """Makes VmHWM start again from what is resident now, where the system lets us."""
    with suppress(OSError):
        _CLEAR.write_text("5")


def _serve(connection: Connection, bundle: Path, backend: str, device: str, precision: str) -> None:
    """The process: makes a Bench, then calls what it is told to until the other side closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    os.dup2(sys.stderr.fileno(), 1)  # stdout is for one JSON object, whatever a library prints
    bench: BackendProcess | None = None
    with suppress(EOFError, BrokenPipeError):
        bench = _answered(connection, partial(BackendProcess, bundle, backend, device, precision))
        while bench is not None:
            name, arguments = connection.recv()
            _answered(connection, partial(getattr(bench, name), *arguments))
    if bench is not None:
        bench.close()


def _answered(connection: Connection, work: Callable[[], Any]) -> Any:
    """Sends what `work` returns or why it failed; returns it too, None for a failure."""
    try:
        result = work()
    except SpmDeployError as error:
        connection.send(("failed", error))
        return None
    except MemoryError:
        connection.send(("failed", OutOfMemoryError("the backend's process ran out of memory", "close other programs")))
        return None
    except Exception as error:  # whatever a library throws is one row's misfortune, not the end of the run
        connection.send(("failed", BackendCrashedError(f"{type(error).__name__}: {error}")))
        return None
    connection.send(("done", None if isinstance(result, BackendProcess) else result))
    return result


# ------------------------------------------------------------------------------------------------ outside the process


class Worker:
    """A `BackendProcess` in a process of its own; close it, or use it as a context manager.

    Every method may raise what the one of `BackendProcess` raises, and `BackendCrashedError`.
    """

    def __init__(self, bundle: Path, backend: str, device: str, precision: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        arguments = (other, bundle, backend, device, precision)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        other.close()
        try:
            self._result()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def describe(self) -> BackendInfo:
        return self._call(BackendProcess.describe)

    def verify(self) -> list[GoldenResult]:
        return self._call(BackendProcess.verify)

    def prepare_engine(self, batch: EditBatch, streams: int) -> FirstRun:
        return self._call(BackendProcess.prepare_engine, batch, streams)

    def prepare_frame(self, batch: EditBatch, streams: int) -> FirstRun:
        return self._call(BackendProcess.prepare_frame, batch, streams)

    def prepare_edit(self, case: EditCase) -> FirstRun:
        return self._call(BackendProcess.prepare_edit, case)

    def turn(self, seconds: float, iterations: int) -> Round:
        return self._call(BackendProcess.turn, seconds, iterations)

    def forget(self) -> None:
        self._call(BackendProcess.forget)

    def medians(self) -> dict[str, float]:
        return self._call(BackendProcess.medians)

    def profile(self, batch: EditBatch) -> Profile:
        return self._call(BackendProcess.profile, batch)

    def memory(self) -> MemoryUsage:
        return self._call(BackendProcess.memory)

    def close(self) -> None:
        """Ends the process; safe to call twice."""
        self._connection.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

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
        try:
            self._connection.send((method.__name__, arguments))
        except OSError as error:
            raise self._ended() from error
        result: Result = self._result()
        return result

    def _result(self) -> Any:
        try:
            kind, value = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._ended() from error
        if kind == "failed":
            raise value
        return value

    def _ended(self) -> BackendCrashedError:
        self._process.join(timeout=10)
        code = self._process.exitcode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return BackendCrashedError(f"its process ended with {how}", "run `spmdeploy verify` with this backend")
