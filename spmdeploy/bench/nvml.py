"""Describes NVIDIA GPUs and reads their state, energy and memory through NVML (the package nvidia-ml-py)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from spmdeploy.gpu.driver import gpu_facts, gpu_uuid, visible_gpus

# Bits of nvmlDeviceGetCurrentClocksEventReasons, as documented in nvml.h.
_SLOWDOWN_REASONS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal slowdown (driver)",
    0x40: "thermal slowdown (hardware)",
    0x80: "power brake",
    0x100: "display clocks",
}
_HARMLESS_REASONS = frozenset({"idle", "application clocks", "display clocks"})


@dataclass(frozen=True)
class GpuRecord:
    """Constant properties of one GPU."""

    name: str
    sm: str | None
    """Compute capability, such as 8.6."""
    uuid_hash: str | None
    """First 16 digits of the UUID's SHA-256: distinguishes GPUs without identifying them."""
    driver: str | None
    memory_gb: float | None


@dataclass(frozen=True)
class GpuState:
    """Changing properties of one GPU; None where the board does not report them."""

    sm_mhz: int | None
    memory_mhz: int | None
    temperature_c: int | None
    watts: float | None
    watts_limit: float | None
    slowed_by: tuple[str, ...]
    """Reasons for lowered clocks."""
    processes: int | None
    """Processes that compute on it, this one included."""

    @property
    def throttled(self) -> bool:
        """Whether the GPU was slowed down by heat or power, not by idleness or a setting."""
        return not _HARMLESS_REASONS.issuperset(self.slowed_by)


class Nvml:
    """NVML through nvidia-ml-py. Boards differ in what they report: every unsupported query returns None."""

    def __init__(self, library: Any, note: str | None = None) -> None:
        self.library = library
        self.note = note
        """Why NVML is unavailable; None if it is available."""

    def query(self, function: str, *arguments: Any) -> Any:
        """The result of an NVML function; None where NVML, the function or the value is missing."""
        if self.library is None:
            return None
        try:
            result = getattr(self.library, function)(*arguments)
        except (self.library.NVMLError, AttributeError):
            return None
        return result.decode() if isinstance(result, bytes) else result  # bytes in older versions of the package

    def handles(self) -> Iterator[Any]:
        """NVML's handles of the GPUs that answer, in NVML's order."""
        for index in range(self.query("nvmlDeviceGetCount") or 0):
            handle = self.query("nvmlDeviceGetHandleByIndex", index)
            if handle is not None:
                yield handle

    def meter(self, uuid: str) -> GpuMeter | None:
        """Energy and memory meter of the GPU with this UUID; None if it is not found."""
        handle = self.query("nvmlDeviceGetHandleByUUID", uuid)
        return None if handle is None else GpuMeter(self, handle)


@contextmanager
def nvml() -> Iterator[Nvml]:
    """NVML, initialized while the context is open. Never raises: `note` has the reason why it is unavailable."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except ImportError:
        yield Nvml(None, "the package nvidia-ml-py is not installed")
        return
    except Exception as exc:  # pynvml.NVMLError, which cannot be named where the import failed
        yield Nvml(None, f"NVML does not respond: {exc}")
        return
    try:
        yield Nvml(pynvml)
    finally:
        pynvml.nvmlShutdown()


class GpuMeter:
    """Energy and memory of one GPU."""

    def __init__(self, library: Nvml, handle: Any) -> None:
        self._nvml = library
        self._handle = handle

    def joules(self) -> float | None:
        """Energy used since the driver was loaded; reported from Volta on."""
        millijoules = self._nvml.query("nvmlDeviceGetTotalEnergyConsumption", self._handle)
        return None if millijoules is None else millijoules / 1000

    def memory_of(self, pid: int) -> int | None:
        """Bytes of GPU memory used by a process; None where this is hidden, as in containers."""
        processes = self._nvml.query("nvmlDeviceGetComputeRunningProcesses", self._handle) or []
        return next((process.usedGpuMemory for process in processes if process.pid == pid), None)


def describe_gpus() -> tuple[tuple[GpuRecord, ...], str | None]:
    """The GPUs, and why not all their properties are known."""
    with nvml() as library:
        if library.note is None:
            return tuple(_gpu_records(library)), None
    try:
        found = [(gpu_facts(index), hash_uuid(gpu_uuid(index))) for index in range(visible_gpus())]
    except OSError as exc:
        return (), str(exc)
    records = (GpuRecord(gpu.name, gpu.compute_capability, uuid, gpu.driver, None) for gpu, uuid in found)
    return tuple(records), library.note


def _gpu_records(library: Nvml) -> Iterator[GpuRecord]:
    for handle in library.handles():
        uuid = library.query("nvmlDeviceGetUUID", handle)
        sm = library.query("nvmlDeviceGetCudaComputeCapability", handle)
        memory = library.query("nvmlDeviceGetMemoryInfo", handle)
        yield GpuRecord(
            name=library.query("nvmlDeviceGetName", handle) or "unnamed GPU",
            sm=None if sm is None else f"{sm[0]}.{sm[1]}",
            uuid_hash=None if uuid is None else hash_uuid(uuid),
            driver=library.query("nvmlSystemGetDriverVersion"),
            memory_gb=None if memory is None else round(memory.total / 1e9, 1),
        )


def gpu_states(library: Nvml) -> Iterator[GpuState]:
    """Clocks, temperature, power and number of processes of each GPU."""
    constants = library.library
    for handle in library.handles():
        power = library.query("nvmlDeviceGetPowerUsage", handle)
        limit = library.query("nvmlDeviceGetEnforcedPowerLimit", handle)
        reasons = library.query("nvmlDeviceGetCurrentClocksEventReasons", handle)
        if reasons is None:  # its name before driver 535
            reasons = library.query("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
        processes = library.query("nvmlDeviceGetComputeRunningProcesses", handle)
        yield GpuState(
            sm_mhz=library.query("nvmlDeviceGetClockInfo", handle, constants.NVML_CLOCK_SM),
            memory_mhz=library.query("nvmlDeviceGetClockInfo", handle, constants.NVML_CLOCK_MEM),
            temperature_c=library.query("nvmlDeviceGetTemperature", handle, constants.NVML_TEMPERATURE_GPU),
            watts=None if power is None else power / 1000,
            watts_limit=None if limit is None else limit / 1000,
            slowed_by=tuple(name for bit, name in _SLOWDOWN_REASONS.items() if (reasons or 0) & bit),
            processes=None if processes is None else len(processes),
        )


def hash_uuid(uuid: str) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a UUID, so that records compare GPUs without naming them."""
    return hashlib.sha256(uuid.encode()).hexdigest()[:16]
