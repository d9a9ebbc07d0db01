"""TensorRT 10, TensorRT 11 and TensorRT-RTX: one API in two modules, imported when an engine is at hand.

Of TensorRT only what all of 10.3 (JetPack 6), 10.16 and 11.4 have may be used, of either no more than the other has,
but for what is guarded where it is used.
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
    "tensorrt-rtx": 'pip install "spmdeploy[tensorrt-rtx]"',
}


def import_engine_library(runtime: EngineRuntime) -> Any:
    """The module, or UnavailableError with what to do."""
    try:
        return importlib.import_module(_MODULES[runtime])
    except (ImportError, OSError) as error:  # OSError: the package is there, a library that it loads is not
        words = " ".join(str(error).split())
        raise UnavailableError(f"{runtime} cannot be imported: {words}", _REMEDIES[runtime]) from error


def is_installed(runtime: EngineRuntime) -> bool:
    """Whether there is such a module, without importing it: it may still turn out to be broken."""
    return importlib.util.find_spec(_MODULES[runtime]) is not None


def local_host(device: int = 0) -> EngineHost:
    """What decides on this machine, with its GPU of that number, whether an engine can run."""
    versions = {}
    for runtime in ENGINE_RUNTIMES:
        try:
            versions[runtime] = str(import_engine_library(runtime).__version__)
        except UnavailableError:
            continue
    return EngineHost.with_gpu(local_gpu(device), versions)


def local_gpu(device: int = 0) -> Gpu | None:
    """The GPU of that number, None without a driver or GPU."""
    try:
        facts = gpu_facts(device)
    except OSError:
        return None
    return Gpu(facts.name, facts.compute_capability)


# --------------------------------------------------------------------------------------- what the libraries have to say

Listener = Callable[[str, str], None]
"""Is told severity (INTERNAL_ERROR, ERROR, WARNING, INFO or VERBOSE) and text of a message, on any thread."""

_loggers: dict[str, tuple[Any, list[Listener]]] = {}


def library_logger(library: Any) -> Any:
    """The one logger of the library: it keeps the first that it is given for as long as the process lives."""
    return _logger_and_listeners(library)[0]


@contextmanager
def capture_log(library: Any, listener: Listener) -> Iterator[None]:
    """Tells `listener` what the library says meanwhile."""
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
