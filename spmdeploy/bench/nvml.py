"""What NVIDIA's management library says of the GPUs. Needs the package nvidia-ml-py; every answer may be missing.

Boards differ in what they tell (a Jetson next to nothing): each figure is asked for on its own, and is None where the
library refuses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

Answer = TypeVar("Answer")

# Bits of nvmlDeviceGetCurrentClocksEventReasons, by their meaning in nvml.h.
_REASONS = {
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
HARMLESS = frozenset({"idle", "application clocks", "display clocks"})


class NvmlMissingError(Exception):
    """NVML cannot be asked; the text says why."""


@dataclass(frozen=True)
class GpuRecord:
    """What does not change."""

    name: str
    sm: str | None
    """Compute capability, such as 8.6."""
    uuid_hash: str | None
    """The first 16 digits of the UUID's SHA-256: tells two GPUs apart without naming either."""
    driver: str | None
    memory_gb: float | None


@dataclass(frozen=True)
class GpuState:
    """What changes."""

    sm_mhz: int | None
    memory_mhz: int | None
    temperature_c: int | None
    watts: float | None
    watts_limit: float | None
    slowed_by: tuple[str, ...]
    """Why clocks are lower than they could be."""
    processes: int | None
    """That compute on it, ours among them."""

    @property
    def throttled(self) -> bool:
        return not HARMLESS.issuperset(self.slowed_by)


class Nvml:
    """The library, opened; use it as a context manager. Without `required`, a missing one has no GPUs."""

    def __init__(self, required: bool = False) -> None:
        self._required = required
        self._library: Any = None

    def __enter__(self) -> Nvml:
        try:
            import pynvml

            pynvml.nvmlInit()
            self._library = pynvml
        except ImportError:
            if self._required:
                raise NvmlMissingError("the package nvidia-ml-py is not installed") from None
        except Exception as error:  # its own class, which exists only where the import worked
            if self._required:
                raise NvmlMissingError(f"NVML does not answer: {error}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._library is not None:
            self._library.nvmlShutdown()
            self._library = None

    @property
    def usable(self) -> bool:
        return self._library is not None

    def facts(self) -> Iterator[GpuRecord]:
        for handle in self._handles():
            uuid = _text(self._ask("nvmlDeviceGetUUID", handle))
            sm = self._ask("nvmlDeviceGetCudaComputeCapability", handle)
            memory = self._ask("nvmlDeviceGetMemoryInfo", handle)
            yield GpuRecord(
                name=_text(self._ask("nvmlDeviceGetName", handle)) or "unnamed GPU",
                sm=None if sm is None else f"{sm[0]}.{sm[1]}",
                uuid_hash=None if uuid is None else hash_of(uuid),
                driver=_text(self._ask("nvmlSystemGetDriverVersion")),
                memory_gb=None if memory is None else round(memory.total / 1e9, 1),
            )

    def states(self) -> Iterator[GpuState]:
        library = self._library
        for handle in self._handles():
            power = self._ask("nvmlDeviceGetPowerUsage", handle)
            limit = self._ask("nvmlDeviceGetEnforcedPowerLimit", handle)
            reasons = self._ask("nvmlDeviceGetCurrentClocksEventReasons", handle)
            if reasons is None:  # the name before driver 535
                reasons = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
            processes = self._ask("nvmlDeviceGetComputeRunningProcesses", handle)
            yield GpuState(
                sm_mhz=self._ask("nvmlDeviceGetClockInfo", handle, library.NVML_CLOCK_SM),
                memory_mhz=self._ask("nvmlDeviceGetClockInfo", handle, library.NVML_CLOCK_MEM),
                temperature_c=self._ask("nvmlDeviceGetTemperature", handle, library.NVML_TEMPERATURE_GPU),
                watts=None if power is None else power / 1000,
                watts_limit=None if limit is None else limit / 1000,
                slowed_by=tuple(name for bit, name in _REASONS.items() if (reasons or 0) & bit),
                processes=None if processes is None else len(processes),
            )

    def meter(self, uuid: str) -> GpuMeter | None:
        """What counts energy and memory of the GPU with this UUID; None where it is not to be found."""
        handle = self._ask("nvmlDeviceGetHandleByUUID", uuid)
        return None if handle is None else GpuMeter(self._ask, handle)

    def _handles(self) -> Iterator[Any]:
        for index in range(self._ask("nvmlDeviceGetCount") or 0):
            handle = self._ask("nvmlDeviceGetHandleByIndex", index)
            if handle is not None:
                yield handle

    def _ask(self, function: str, *arguments: Any) -> Any:
        """The library's answer; None where it has none."""
        if self._library is None:
            return None
        try:
            return getattr(self._library, function)(*arguments)
        except (self._library.NVMLError, AttributeError):
            return None


class GpuMeter:
    """Energy and memory of one GPU."""

    def __init__(self, ask: Callable[..., Any], handle: Any) -> None:
        self._ask = ask
        self._handle = handle

    def joules(self) -> float | None:
        """Spent since the driver was loaded. Told by Volta and later."""
        millijoules = self._ask("nvmlDeviceGetTotalEnergyConsumption", self._handle)
        return None if millijoules is None else millijoules / 1000

    def memory_of(self, pid: int) -> int | None:
        """Bytes that a process holds on the GPU; None where it is not told, as inside a container."""
        processes = self._ask("nvmlDeviceGetComputeRunningProcesses", self._handle) or []
        return next((process.usedGpuMemory for process in processes if process.pid == pid), None)


def hash_of(uuid: str) -> str:
    return hashlib.sha256(uuid.encode()).hexdigest()[:16]


def _text(value: str | bytes | None) -> str | None:
    """Older versions of the package answer in bytes."""
    return value.decode() if isinstance(value, bytes) else value
