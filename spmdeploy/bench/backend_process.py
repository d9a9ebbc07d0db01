"""Opens, verifies, times and profiles one backend; runs in a process of its own, behind `bench.worker.Worker`."""

from __future__ import annotations

import os
import re
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from spmdeploy.backends.base import Backend, SupportsLayoutCache
from spmdeploy.backends.onnxruntime import OnnxRuntimeSession
from spmdeploy.backends.tensorrt import TensorRtSession
from spmdeploy.backends.verify import GoldenResult, limits_of, read_golden, run_golden
from spmdeploy.bench.backends import (
    REFERENCE_BACKEND,
    DeviceRun,
    describe,
    device_run,
    graph_of,
    loaded_bytes,
    open_backend,
    time_on_device,
)
from spmdeploy.bench.nvml import GpuMeter, nvml
from spmdeploy.bench.profile import Profile, profile_onnxruntime, profile_torch
from spmdeploy.bench.results import BackendInfo, MemoryUsage
from spmdeploy.bench.schedule import Round, Timeable
from spmdeploy.bench.workloads import EditCase, write_case
from spmdeploy.bundle.bundle import open_bundle
from spmdeploy.editing.editor import Editor
from spmdeploy.editing.run import EditOutcome, run_edit
from spmdeploy.errors import SpmDeployError, UnavailableError, VerificationError
from spmdeploy.gpu.device import Device
from spmdeploy.gpu.driver import gpu_uuid
from spmdeploy.imaging import files as images
from spmdeploy.types import LayoutInput, ModelInput

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
PLAIN_RUNS = 20
"""Runs without CUDA graphs, for comparison."""


class BackendCrashedError(SpmDeployError):
    """The backend failed with an unexpected exception, or its process died."""


@dataclass(frozen=True)
class FirstRun:
    """The first run of a case, before any warm-up."""

    photo: NDArray[np.uint8]
    """The input images, uint8 (B, S, S, 3) RGB; decoded from the file where there is one."""
    edited: NDArray[np.uint8]
    """The output, same shape."""
    seconds: float
    notes: dict[str, str | int]
    """Facts for `Result.notes`."""


class Measurable(Timeable, Protocol):
    """A `Timeable` that reports time by phase and memory."""

    def reset(self) -> None:
        """Discards earlier runs from `phase_medians` and `memory`."""

    def phase_medians(self) -> dict[str, float]:
        """Median milliseconds by phase."""

    def memory(self) -> MemoryUsage:
        """Memory so far, in bytes; None where it cannot be measured."""


Timed = Callable[[], float]
"""Runs one iteration; returns milliseconds."""


class BackendProcess:
    """One backend with one bundle, inside its own process."""

    def __init__(self, bundle: Path, backend: str, device: str, precision: str) -> None:
        self._resources = ExitStack()
        self._bundle = open_bundle(bundle)
        self._backend = backend
        self._session: Backend = open_backend(self._bundle, backend, device, precision)
        self._resources.callback(self._session.close)
        self._timed: list[Timed] = []
        self._phases: list[dict[str, float]] = []
        self._launches: list[float] = []
        self._ready = _resident_bytes("VmRSS")
        self._device: Device | None = None
        self._meter: GpuMeter | None = None
        if self._session.device.startswith("cuda:"):
            ordinal = int(self._session.device.removeprefix("cuda:"))
            self._device = Device(ordinal)
            self._resources.callback(self._device.close)
            self._meter = self._resources.enter_context(nvml()).meter(gpu_uuid(ordinal))
        self._case = self._resources.enter_context(ExitStack())  # entered last: closed before the device

    def describe(self) -> BackendInfo:
        """What was opened: device, precision, provider."""
        return describe(self._session, self._bundle)

    def verify(self) -> list[GoldenResult]:
        """The golden edits; verifying `refine` would load a graph that is not timed."""
        limits = limits_of(self._bundle, self._session.precision)
        edits = ((read_golden(self._bundle, edit), edit.name) for edit in self._bundle.manifest.golden)
        return [run_golden(self._session, golden, name, limits) for golden, name in edits]

    def prepare_engine(self, batch: ModelInput, streams: int) -> FirstRun:
        """Prepares the edit graph alone, from arrays to arrays; on a GPU both stay in its memory."""
        self._end_case()
        notes: dict[str, str | int] = {}
        if self._device is not None:
            notes["inputs"] = "on the GPU"
            if isinstance(self._session, TensorRtSession):
                notes["microseconds without CUDA graphs"] = self._without_cuda_graphs(batch, self._device)
        started = time.perf_counter()
        if self._device is None:
            edited = self._session.run(batch)
            self._timed = [_timed_on_host(lambda: self._session.run(batch))] * streams
        else:
            sessions = self._sessions(streams)
            runs = [device_run(session, batch, self._device, self._case) for session in sessions]
            for session in sessions:  # all work must be finished before the first session is closed
                if isinstance(session, TensorRtSession):
                    self._case.callback(session.synchronize)
            edited = _first_output(runs, self._device)
            self._timed = [self._timed_on_device(run, self._device) for run in runs]
        return FirstRun(batch.image, edited, time.perf_counter() - started, notes)

    def _without_cuda_graphs(self, batch: ModelInput, device: Device) -> int:
        """Median time on the device when every kernel is launched by itself."""
        with ExitStack() as stack:
            run = device_run(self._session, batch, device, stack, cuda_graphs=False)
            times = [time_on_device(run, device)[0] for _ in range(PLAIN_RUNS)]
            return round(float(np.median(times)) * 1000)

    def _sessions(self, count: int) -> list[Backend]:
        """`count` sessions with their own stream, contexts and weights, until the end of the case.

        Raises UnavailableError for PyTorch, whose calls would share a stream.
        """
        session = self._session
        if count > 1 and not isinstance(session, TensorRtSession | OnnxRuntimeSession):
            raise UnavailableError(
                f"{self._backend} supports one stream on a GPU", "use engines or ONNX Runtime for several streams"
            )
        others = []
        for _ in range(count - 1):
            others.append(open_backend(self._bundle, self._backend, session.device, session.precision))
            self._case.callback(others[-1].close)
        return [session, *others]

    def prepare_cached_layout(self, batch: ModelInput, streams: int) -> FirstRun:
        """Prepares the graph for further images under a layout that the session caches, from arrays to arrays.

        Args:
            batch: Arrays (B, S, S[, 3]).
            streams: Calls that run concurrently.

        Raises:
            UnavailableError: The session caches no layouts.
        """
        self._end_case()
        session = self._session
        if not isinstance(session, SupportsLayoutCache):
            raise UnavailableError(f"{self._backend} caches no layouts", "use --scope engine")
        if isinstance(session, TensorRtSession) and session.layout_unsupported is not None:
            raise UnavailableError(*session.layout_unsupported)
        started = time.perf_counter()
        run = session.bind_layout(LayoutInput(batch.labels, batch.instances, batch.mask))
        caching = time.perf_counter() - started
        edited = run(batch.image)
        self._timed = [_timed_on_host(lambda: run(batch.image))] * streams
        notes: dict[str, str | int] = {"milliseconds to cache the layout": round(caching * 1000)}
        if self._device is not None:
            notes["inputs"] = "on the host"
        return FirstRun(batch.image, edited, time.perf_counter() - started, notes)

    def prepare_edit(self, case: EditCase) -> FirstRun:
        """Prepares an edit of files: photo, label and mask file to a PNG file."""
        self._end_case()
        folder = Path(self._case.enter_context(tempfile.TemporaryDirectory()))
        files = write_case(case, folder)
        editor = Editor(self._session, self._bundle.manifest.classes)

        def edit() -> EditOutcome:
            outcome = run_edit(editor, files)
            self._phases.append(outcome.report.milliseconds)
            return outcome

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
        if between := {window.between_levels for window in report.windows if window.between_levels}:
            notes["between levels"] = " and ".join(sorted(between))
        photo, edited = (images.read_photo(path).pixels[None] for path in (files.image, files.output))
        return FirstRun(photo, edited, seconds, notes)

    def turn(self, seconds: float, iterations: int) -> Round:
        """Runs the prepared case until both limits are reached; several streams run concurrently."""
        before = None if self._meter is None else self._meter.joules()
        samples, elapsed = _run_concurrently([partial(_repeat, timed, seconds, iterations) for timed in self._timed])
        after = None if self._meter is None else self._meter.joules()
        joules = None if before is None or after is None else after - before
        return Round(tuple(samples), elapsed, joules)

    def reset(self) -> None:
        """Discards earlier runs from `phase_medians`."""
        self._phases.clear()
        self._launches.clear()

    def phase_medians(self) -> dict[str, float]:
        """Median milliseconds by phase of an edit; on a GPU also of the launch."""
        names = self._phases[0] if self._phases else {}
        medians = {name: float(np.median([phases[name] for phases in self._phases])) for name in names}
        return medians | ({"launch": float(np.median(self._launches))} if self._launches else {})

    def profile(self, batch: ModelInput) -> Profile:
        """Profiles one batch. Needs time and memory of its own: call after all measurements."""
        self._end_case()
        session = self._session
        if session.backend == "onnxruntime":
            record = graph_of(session, self._bundle)
            assert record is not None
            return profile_onnxruntime(self._bundle.read_graph(record), session.provider.partition(" ")[0], batch)
        if self._backend == REFERENCE_BACKEND:
            from spmdeploy.backends.pytorch import TorchSession

            assert isinstance(session, TorchSession)
            return profile_torch(session, batch)
        raise UnavailableError(f"{self._backend} is not profiled by part", "profile onnxruntime or torch")

    def memory(self) -> MemoryUsage:
        """Memory of this process and its GPU, in bytes; None where it cannot be measured."""
        device = None if self._meter is None else self._meter.memory_of(os.getpid())
        activations = self._session.activation_bytes if isinstance(self._session, TensorRtSession) else None
        loaded = loaded_bytes(self._session, self._bundle)
        return MemoryUsage(self._ready, _resident_bytes("VmHWM"), device, activations, loaded)

    def close(self) -> None:
        """Ends the case and closes session, device and meter."""
        self._resources.close()

    def _end_case(self) -> None:
        """Releases the resources of the last case and resets the peak of memory."""
        self._timed = []
        self._case.close()
        self.reset()
        with suppress(OSError):  # Linux, where permitted: VmHWM restarts from the current resident set
            _CLEAR_REFS.write_text("5")

    def _timed_on_device(self, run: DeviceRun, device: Device) -> Timed:
        def timed() -> float:
            on_device, launch = time_on_device(run, device)
            self._launches.append(launch)
            return on_device

        return timed


def _timed_on_host(run: Callable[[], object]) -> Timed:
    def timed() -> float:
        started = time.perf_counter()
        run()
        return (time.perf_counter() - started) * 1000

    return timed


def _repeat(timed: Timed, seconds: float, iterations: int) -> list[float]:
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < iterations or time.perf_counter() < end:
        samples.append(timed())
    return samples


def _first_output(runs: list[DeviceRun], device: Device) -> NDArray[np.uint8]:
    """The output, which must be the same in every stream. Raises VerificationError."""
    outputs = []
    for run in runs:
        time_on_device(run, device)
        outputs.append(run.fetch())
    if not all(np.array_equal(output, outputs[0]) for output in outputs):
        raise VerificationError("the same edit gives different results in different streams", "report this")
    return outputs[0]


def _run_concurrently(loops: list[Callable[[], list[float]]]) -> tuple[list[float], float]:
    """Runs all loops at once, each in a thread; a single one in this thread. Raises what any of them raises.

    Returns all samples, and the seconds from the start of all loops to the end of the last.
    """
    if len(loops) == 1:
        started = time.perf_counter()
        return loops[0](), time.perf_counter() - started
    results: list[list[float] | BaseException] = [[] for _ in loops]
    began: list[float] = []
    ready = threading.Barrier(len(loops), action=lambda: began.append(time.perf_counter()))

    def run(index: int) -> None:
        ready.wait()
        try:
            results[index] = loops[index]()
        except BaseException as exc:
            results[index] = exc

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(loops))]
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
    """VmRSS (current) or VmHWM (peak) of this process; None outside Linux.

    psutil reports no peak on Linux, and the maximum of getrusage survives exec: a child would start with its parent's.
    """
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
