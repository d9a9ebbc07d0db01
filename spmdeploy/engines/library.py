"""Imports TensorRT or TensorRT-RTX, two modules with one API, and collects their log messages.

Only members that 10.3 (JetPack 6), 10.16, 11.4 and TensorRT-RTX all have may be used, except where the use is guarded.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from spmdeploy.engines.record import ENGINE_RUNTIMES, EngineHost, EngineRuntime, Gpu
from spmdeploy.errors import UnavailableError
from spmdeploy.gpu.driver import gpu_facts

_MODULES: dict[EngineRuntime, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_REMEDIES: dict[EngineRuntime, str] = {
    "tensorrt": 'pip install "spmdeploy[tensorrt]" where NVIDIA\'s package index can be reached; JetPack brings '
    "TensorRT along: make the environment with --system-site-packages",
    "tensorrt-rtx": 'pip install "spmdeploy[tensorrt-rtx]"; with a driver for CUDA 12 "spmdeploy[tensorrt-rtx-cu12]"',
}


def import_engine_library(runtime: EngineRuntime) -> Any:
    """Import TensorRT or TensorRT-RTX.

    Raises:
        UnavailableError: It is not installed or does not load; the hint is the remedy.
    """
    try:
        return importlib.import_module(_MODULES[runtime])
    except (ImportError, OSError) as exc:  # OSError: the package is installed, but a library that it loads is missing
        text = " ".join(str(exc).split())
        raise UnavailableError(f"{runtime} cannot be imported: {text}", _REMEDIES[runtime]) from exc


def is_installed(runtime: EngineRuntime) -> bool:
    """Return whether the module exists, without importing it: it may still fail to import."""
    return importlib.util.find_spec(_MODULES[runtime]) is not None


def local_host(device: int = 0) -> EngineHost:
    """Describe the properties of this machine that decide which engines run on GPU number `device`."""
    versions = {}
    for runtime in ENGINE_RUNTIMES:
        try:
            versions[runtime] = str(import_engine_library(runtime).__version__)
        except UnavailableError:
            continue
    return EngineHost.with_gpu(local_gpu(device), versions)


def local_gpu(device: int = 0) -> Gpu | None:
    """Return the GPU of that number; None without a driver or GPU."""
    try:
        facts = gpu_facts(device)
    except OSError:
        return None
    return Gpu(facts.name, facts.compute_capability)


Listener = Callable[[str, str], None]
"""Called with severity (INTERNAL_ERROR, ERROR, WARNING, INFO or VERBOSE) and text of a message, on any thread."""

_loggers: dict[str, tuple[Any, list[Listener]]] = {}


def library_logger(library: Any) -> Any:
    """Return the one logger of the library, which keeps its first logger until the process ends."""
    return _logger_and_listeners(library)[0]


@contextmanager
def capture_log(library: Any, listener: Listener) -> Iterator[None]:
    """Pass the library's messages to `listener` inside the context."""
    listeners = _logger_and_listeners(library)[1]
    listeners.append(listener)
    try:
        yield
    finally:
        listeners.remove(listener)


def _logger_and_listeners(library: Any) -> tuple[Any, list[Listener]]:
    if library.__name__ not in _loggers:
        listeners: list[Listener] = []

        class Logger(library.ILogger):  # type: ignore[misc]
            def log(self, severity: Any, text: str) -> None:
                for listener in tuple(listeners):
                    listener(severity.name, text)

        _loggers[library.__name__] = (Logger(), listeners)
    return _loggers[library.__name__]
