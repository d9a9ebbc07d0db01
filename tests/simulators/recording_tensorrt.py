"""TensorRT in Python: it builds nothing, has exactly the members of one version's bindings, and records every call.

The fakes below know more than any version does; `recording_tensorrt` cuts them down to the recorded API of one.
"""

from __future__ import annotations

import enum
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

IMAGE = (-1, 256, 256, 3)
MAP = (-1, 256, 256)
INPUTS = {"image": ("UINT8", IMAGE), "labels": ("UINT8", MAP), "instances": ("INT32", MAP), "mask": ("UINT8", MAP)}


@dataclass
class Behavior:
    """Behavior of the fake; by default that of a GPU with a valid graph."""

    typed_builds: bool = True
    parses: bool = True
    builds: bool = True
    loads: bool = True
    messages: list[tuple[str, str]] = field(default_factory=list)
    inspected: Callable[[str], str] | None = None
    """JSON of the inspector for the precision that was built; None: as the version writes it."""
    chooses: str = "Half"
    """What a weakly typed build with FP16 allowed comes out as."""
    takes_cache: bool = True
    starts: bool = True
    during: Callable[[Any], None] | None = None
    """Called in the build, with the progress monitor."""
    profile_index: int = 0


def recording_tensorrt(
    version: str, api: dict[str, list[str]], behavior: Behavior | None = None, name: str = "tensorrt"
) -> Any:
    """A module for the builder. `calls` has all calls in order, as (Class.member, arguments)."""
    do = behavior or Behavior()
    calls: list[tuple[str, tuple[Any, ...]]] = []
    library = SimpleNamespace(__name__=f"{name}_{version}_{id(calls)}", __version__=version, calls=calls, behavior=do)

    def enumeration(name: str) -> Any:
        members = [member for member in api[name] if member not in ("name", "value", "itemsize")]
        return enum.IntEnum(name, members, start=0)

    for enumerated in (
        *("BuilderFlag", "NetworkDefinitionCreationFlag", "MemoryPoolType", "ProfilingVerbosity", "DataType"),
        *("LayerInformationFormat", "LayerType", "TensorIOMode"),
    ):
        setattr(library, enumerated, enumeration(enumerated))

    def strict(fake: type) -> type:
        """The class with those members that the version has; any other is an AttributeError."""
        allowed = set(api[fake.__name__])
        members = {key: value for key, value in vars(fake).items() if key.startswith("_") or key in allowed}

        def set_member(self: Any, key: str, value: Any) -> None:
            if not key.startswith("_") and key not in allowed:
                raise AttributeError(f"{fake.__name__} of {version} has no {key}")
            if not key.startswith("_") and fake.__name__ in ("IBuilderConfig", "EngineInspector"):  # set from outside
                calls.append((f"{fake.__name__}.{key}", (value,)))
            object.__setattr__(self, key, value)

        members["__setattr__"] = set_member
        for key in ("__dict__", "__weakref__"):
            members.pop(key, None)
        made = type(fake.__name__, (), members)
        setattr(library, fake.__name__, made)
        return made

    def note(member: str, *arguments: Any) -> None:
        calls.append((member, arguments))

    class ILogger:
        Severity = enum.IntEnum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"])  # type: ignore[misc]

        def log(self, severity: Any, text: str) -> None:
            raise NotImplementedError

    class IProgressMonitor:
        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            raise NotImplementedError

        def phase_finish(self, phase_name: str) -> None:
            raise NotImplementedError

        def step_complete(self, phase_name: str, step: int) -> bool:
            raise NotImplementedError

    for base in (ILogger, IProgressMonitor):
        assert base.__name__ in api
        setattr(library, base.__name__, base)

    class ITensor:
        def __init__(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
            self.name, self.dtype, self.shape = name, library.DataType[dtype], shape

    class ILayer:
        def __init__(self, kind: str, dtype: str) -> None:
            self.type, self._dtype, self.num_outputs = library.LayerType[kind], dtype, 1

        def get_output(self, index: int) -> Any:
            return library.ITensor("", self._dtype, MAP)

    class INetworkDefinition:
        def __init__(self, flags: int) -> None:
            self._flags, self._dtype = flags, "FLOAT"

        @property
        def num_inputs(self) -> int:
            return len(INPUTS)

        def get_input(self, index: int) -> Any:
            name = list(INPUTS)[index]
            return library.ITensor(name, *INPUTS[name])

        @property
        def num_outputs(self) -> int:
            return 1

        def get_output(self, index: int) -> Any:
            return library.ITensor("edited", "UINT8", IMAGE)

        @property
        def num_layers(self) -> int:
            return 5

        def get_layer(self, index: int) -> Any:
            kinds = [("CONSTANT", "FLOAT"), ("CAST", "FLOAT"), ("CONVOLUTION", self._dtype), ("SHAPE", "INT64")]
            return library.ILayer(*[*kinds, ("CONVOLUTION", self._dtype)][index])

    class ParserError:
        def desc(self) -> str:
            return "Invalid Node - enc1/Conv\nkernel is of the wrong size\nand more"

        def node_name(self) -> str:
            return "enc1/Conv"

        def node_operator(self) -> str:
            return "Conv"

    class OnnxParser:
        def __init__(self, network: Any, logger: Any) -> None:
            self._network = network

        def parse_from_file(self, path: str) -> bool:
            assert Path(path).is_file()
            note("OnnxParser.parse_from_file", Path(path).name)
            self._network._dtype = "HALF" if "fp16" in path else "FLOAT"
            return do.parses

        @property
        def num_errors(self) -> int:
            return 1

        def get_error(self, index: int) -> Any:
            return library.ParserError()

    class IOptimizationProfile:
        def set_shape(self, name: str, least: Any, best: Any, most: Any) -> None:
            note("IOptimizationProfile.set_shape", name, tuple(least), tuple(best), tuple(most))

    class ITimingCache:
        def __init__(self, content: bytes) -> None:
            self._content = content

        def serialize(self) -> bytes:
            return self._content + b"+"

    class IBuilderConfig:
        def __init__(self) -> None:
            self._flags = {library.BuilderFlag.TF32}
            self._monitor: Any = None
            self._cache: Any = None

        def clear_flag(self, flag: Any) -> None:
            note("IBuilderConfig.clear_flag", flag.name)
            self._flags.discard(flag)

        def set_flag(self, flag: Any) -> None:
            note("IBuilderConfig.set_flag", flag.name)
            self._flags.add(flag)

        def get_flag(self, flag: Any) -> bool:
            return flag in self._flags

        def add_optimization_profile(self, profile: Any) -> int:
            note("IBuilderConfig.add_optimization_profile")
            return do.profile_index

        def set_memory_pool_limit(self, pool: Any, limit: int) -> None:
            note("IBuilderConfig.set_memory_pool_limit", pool.name, limit)

        def create_timing_cache(self, content: bytes) -> Any:
            note("IBuilderConfig.create_timing_cache", content)
            return library.ITimingCache(content)

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            note("IBuilderConfig.set_timing_cache", cache._content, ignore_mismatch)
            if cache._content and not do.takes_cache:
                return False
            self._cache = cache
            return True

        def get_timing_cache(self) -> Any:
            return self._cache

    class Builder:
        def __init__(self, logger: Any) -> None:
            if not do.starts:
                logger.log(ILogger.Severity.ERROR, "CUDA initialization failure with error: 35")
                raise TypeError("pybind11::init(): factory function returned nullptr")
            self._logger = logger

        def create_network(self, flags: int) -> Any:
            note("Builder.create_network", flags)
            return library.INetworkDefinition(flags)

        def create_builder_config(self) -> Any:
            return library.IBuilderConfig()

        def create_optimization_profile(self) -> Any:
            return library.IOptimizationProfile()

        def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
            note("Builder.build_serialized_network", threading.current_thread().name)
            for severity, text in do.messages:
                self._logger.log(ILogger.Severity[severity], text)
            monitor = getattr(config, "progress_monitor", None)
            if monitor is not None:
                monitor.phase_start("Building engine", None, 2)
                monitor.phase_start("Timing tactics", "Building engine", 1)
                if do.during is None and not monitor.step_complete("Timing tactics", 0):
                    return None
            if do.during is not None:
                do.during(monitor)
            if monitor is not None:
                monitor.phase_finish("Timing tactics")
                monitor.phase_finish("Building engine")
            typed = bool(network._flags) or version.startswith("11")
            if not do.builds or (typed and not do.typed_builds):
                return None
            allowed = not typed and "FP16" in {flag.name for flag in config._flags}
            kind = do.chooses if allowed else {"HALF": "Half", "FLOAT": "Float"}[network._dtype]
            return json.dumps({"fake engine": kind}).encode()

    class IExecutionContext:
        def set_input_shape(self, name: str, shape: Any) -> None:
            note("IExecutionContext.set_input_shape", name, tuple(shape))

    class EngineInspector:
        def __init__(self, kind: str) -> None:
            self._kind = kind

        def get_engine_information(self, form: Any) -> str:
            assert form is library.LayerInformationFormat.JSON
            known = any(call == "EngineInspector.execution_context" for call, _ in calls)
            if do.inspected is not None:
                return do.inspected(self._kind)
            return inspector_json(version, self._kind if known else None)

    class ICudaEngine:
        def __init__(self, content: bytes) -> None:
            self._kind = json.loads(content)["fake engine"]

        def create_engine_inspector(self) -> Any:
            return library.EngineInspector(self._kind)

        def create_execution_context(self) -> Any:
            return library.IExecutionContext()

        @property
        def num_io_tensors(self) -> int:
            return len(INPUTS) + 1

        def get_tensor_name(self, index: int) -> str:
            return [*INPUTS, "edited"][index]

        def get_tensor_mode(self, name: str) -> Any:
            return library.TensorIOMode["INPUT" if name in INPUTS else "OUTPUT"]

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return INPUTS[name][1]

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self._logger = logger

        def deserialize_cuda_engine(self, content: bytes) -> Any:
            if not do.loads:
                self._logger.log(ILogger.Severity.ERROR, "no kernel image is available")
                return None
            return library.ICudaEngine(content)

    for fake in (
        *(ITensor, ILayer, INetworkDefinition, ParserError, OnnxParser, IOptimizationProfile, ITimingCache),
        *(IBuilderConfig, Builder, IExecutionContext, EngineInspector, ICudaEngine, Runtime),
    ):
        strict(fake)
    return library


def inspector_json(version: str, kind: str | None) -> str:
    """What the inspector of TensorRT 10 or 11 writes; kind: Half, Float, or None for shapes that are not known."""

    def tensor(kind: str | None) -> dict[str, Any]:
        if version.startswith("11"):
            return {"Name": "x", "DataType": kind, "Format": "kLINEAR"} if kind else {"Name": "x"}
        formats = {
            "Half": "Row major linear FP16 format",
            "Float": "Row major linear FP32",
            None: "N/A due to dynamic shapes",
        }
        return {"Name": "x", "Location": "Device", "Format/Datatype": formats[kind]}

    layers: list[Any] = [
        {"Name": "in", "LayerType": "Reformat", "Inputs": [tensor("Float")], "Outputs": [tensor("Float")]},
        {
            "Name": "enc1",
            "LayerType": "CaskConvolution",
            "Outputs": [tensor(kind)],
            "Weights": {"Type": kind, "Count": 9},
        },
        {"Name": "act", "LayerType": "kgen", "Inputs": [tensor(kind)], "Outputs": [tensor(kind)]},
        {
            "Name": "shape",
            "LayerType": "kgen",
            "Outputs": [{"Name": "i", "Format/Datatype": "Int32", "DataType": "Int32"}],
        },
    ]
    if kind is None:
        del layers[1]["Weights"]
    return json.dumps({"Layers": layers})
