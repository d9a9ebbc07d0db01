"""Builds one engine from one ONNX file, with TensorRT 10, TensorRT 11 or TensorRT-RTX.

The graph states the precision, and networks are strongly typed: the engine computes in the graph's types. Weak typing
is for TensorRT before 10.12 only, whose strong typing is incomplete (10.3 on JetPack 6).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spmdeploy.engines.library import capture_log, library_logger
from spmdeploy.engines.precision import network_fp16_share
from spmdeploy.engines.progress import BuildMonitor, progress_monitor
from spmdeploy.engines.record import BATCH, BatchRange, Port
from spmdeploy.errors import BundleError, OutOfMemoryError, SpmDeployError, UnavailableError

_DTYPES = {"FLOAT": "float32", "HALF": "float16"}


@dataclass(frozen=True)
class BuildRequest:
    """The graph and the options of one build."""

    graph: Path
    """A file in a real folder: external data is read from the same folder."""
    profiles: tuple[BatchRange, ...]
    """Batch sizes of each optimization profile."""
    targets: tuple[str, ...] = ()
    """Members of TensorRT-RTX's ComputeCapability; empty for TensorRT, which builds for the GPU of this machine."""
    weakly_typed: bool = False
    """Let TensorRT choose FP16 where it is faster, whatever the graph's types."""
    opt_level: int | None = None
    """`builder_optimization_level`, 0 (quick to build) to 5 (quick to run); None: the library's default."""
    workspace: int | None = None
    """Bytes of scratch memory for one layer; None: as much as the device has."""
    timing_cache: bytes | None = None
    """Of an earlier build; empty to start one; None for none."""


@dataclass(frozen=True)
class BuiltEngine:
    """An engine in memory, and what is known about it without loading it."""

    content: bytes
    flags: tuple[str, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    network_fp16_share: float
    timing_cache: bytes | None
    """As the build left it."""
    timing_cache_used: bool
    """Whether the given one was accepted."""


class BuildLog:
    """Writes the library's messages to a file, and keeps errors and warnings in memory."""

    def __init__(self, path: Path, kept_as: Path) -> None:
        """Write to `path`; messages name `kept_as`, where the file is moved to if the build fails."""
        self.path, self.kept_as = path, kept_as
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def __call__(self, severity: str, text: str) -> None:
        if severity == "VERBOSE":  # tens of thousands
            return
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self.errors.append(" ".join(text.split()))
        if severity == "WARNING":
            self.warnings.append(" ".join(text.split()))
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(f"[{severity}] {text}\n")

    @property
    def error_summary(self) -> str:
        """The first errors, shortened: the first one usually causes the others."""
        return "; ".join(dict.fromkeys(self.errors[:3]))[:600] or "no reason given"


def build_engine(library: Any, request: BuildRequest, log: BuildLog, monitor: BuildMonitor) -> BuiltEngine:
    """Build an engine on a separate thread.

    Args:
        library: The module `tensorrt` or `tensorrt_rtx`.
        request: The graph and the options.
        log: Receives the library's messages.
        monitor: Receives the progress, and can cancel the build.

    Raises:
        BundleError: The graph cannot be parsed.
        OutOfMemoryError: The build needs more memory.
        UnavailableError: Anything else that the library cannot do, with its messages.
        KeyboardInterrupt: The build was canceled.
    """
    with capture_log(library, log):
        return monitor.run(lambda: _build(library, request, log, monitor))


def _build(library: Any, request: BuildRequest, log: BuildLog, monitor: BuildMonitor) -> BuiltEngine:
    logger = library_logger(library)
    builder = _create_or_raise(lambda: library.Builder(logger), library, log)
    network = builder.create_network(_network_flags(library, request))
    _parse(library, network, logger, request.graph, log)
    inputs = tuple(_port(network.get_input(index)) for index in range(network.num_inputs))
    outputs = tuple(_port(network.get_output(index)) for index in range(network.num_outputs))
    _check_batch(request.graph, inputs, outputs)

    config = builder.create_builder_config()
    for batch in request.profiles:
        _add_profile(builder, config, inputs, batch, log)
    flags = _set_flags(library, config, request)
    config.profiling_verbosity = library.ProfilingVerbosity.DETAILED  # else the inspector reports names only
    if request.opt_level is not None:
        config.builder_optimization_level = request.opt_level
    if request.workspace is not None:
        config.set_memory_pool_limit(library.MemoryPoolType.WORKSPACE, request.workspace)
    _set_targets(library, config, request.targets)
    cache_used = _set_timing_cache(config, request.timing_cache)
    library_monitor = progress_monitor(library, monitor)
    if library_monitor is not None:
        config.progress_monitor = library_monitor

    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise _failure(library, request.graph, log)
    return BuiltEngine(
        content=bytes(serialized),
        flags=flags,
        inputs=inputs,
        outputs=outputs,
        network_fp16_share=network_fp16_share(network),
        timing_cache=None if request.timing_cache is None else bytes(config.get_timing_cache().serialize()),
        timing_cache_used=cache_used,
    )


def _network_flags(library: Any, request: BuildRequest) -> int:
    """Bits by name: their numbers differ between versions. TensorRT 11 and RTX are always strongly typed."""
    return 0 if request.weakly_typed else 1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _parse(library: Any, network: Any, logger: Any, graph: Path, log: BuildLog) -> None:
    parser = library.OnnxParser(network, logger)
    if parser.parse_from_file(str(graph)):
        return
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    text = "; ".join(_parser_error(error) for error in errors) or log.error_summary
    raise BundleError(f"{graph.name} cannot be parsed by {_name(library)}: {text}", _log_hint(log))


def _parser_error(error: Any) -> str:
    """The first error message, and the node."""
    lines = error.desc().strip().splitlines() or ["no reason given"]
    text = (lines[1] if lines[0].startswith("Invalid Node") and len(lines) > 1 else lines[0])[:300]
    node = f" at the node {error.node_name()} ({error.node_operator()})" if error.node_name() else ""
    return f"{text}{node}"


def _port(tensor: Any) -> Port:
    name = tensor.dtype.name
    return Port(tensor.name, _DTYPES.get(name, name.lower()), tuple(int(size) for size in tensor.shape))


def _check_batch(graph: Path, inputs: Sequence[Port], outputs: Sequence[Port]) -> None:
    for port in (*inputs, *outputs):
        if port.shape[:1] != (BATCH,) or BATCH in port.shape[1:]:
            raise BundleError(
                f"{graph.name}: {port.name} has the shape {port.shape}; all but the batch must be known",
                "export the bundle again",
            )
    if not inputs or not outputs:
        raise BundleError(f"{graph.name}: a graph without inputs or outputs", "export the bundle again")


def _add_profile(builder: Any, config: Any, inputs: Sequence[Port], batch: BatchRange, log: BuildLog) -> None:
    profile = builder.create_optimization_profile()
    for port in inputs:
        profile.set_shape(port.name, *((size, *port.shape[1:]) for size in (batch.min, batch.opt, batch.max)))
    if config.add_optimization_profile(profile) < 0:
        raise UnavailableError(f"batch sizes {batch} are refused: {log.error_summary}", _log_hint(log))


def _set_flags(library: Any, config: Any, request: BuildRequest) -> tuple[str, ...]:
    """Set the builder's flags and return the names of all flags that are set then."""
    # TF32 is on by default, with the mantissa of FP16: it deviates more than the FP32 limits allow.
    config.clear_flag(library.BuilderFlag.TF32)
    if hasattr(library.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        # TensorRT-RTX: else it may allocate while it runs, and then its work cannot be captured as a CUDA graph.
        config.set_flag(library.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if request.weakly_typed:
        # Normalization stays in FP32 regardless (INormalizationLayer.compute_precision in TensorRT 10's documentation).
        config.set_flag(library.BuilderFlag.FP16)
    return tuple(name for name, flag in library.BuilderFlag.__members__.items() if config.get_flag(flag))


def _set_targets(library: Any, config: Any, targets: Sequence[str]) -> None:
    if not targets:
        return
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        config.set_compute_capability(library.ComputeCapability.__members__[target.upper()], index)


def _set_timing_cache(config: Any, content: bytes | None) -> bool:
    """Whether `content` is accepted; a cache of another version or device is not, and the build starts a new one."""
    if content is None:
        return False
    cache = config.create_timing_cache(content)
    if cache is not None and config.set_timing_cache(cache, False):
        return bool(content)
    config.set_timing_cache(config.create_timing_cache(b""), False)
    return False


def _failure(library: Any, graph: Path, log: BuildLog) -> SpmDeployError:
    text = " ".join(log.errors).lower()
    if "out of memory" in text or "outofmemory" in text or "cudaerrormemoryallocation" in text:
        problem = f"{_name(library)} ran out of memory building from {graph.name}: {log.error_summary}"
        return OutOfMemoryError(problem, "close other programs, or build for smaller batches: --max-batch 1")
    return UnavailableError(f"{_name(library)} cannot build from {graph.name}: {log.error_summary}", _log_hint(log))


def _create_or_raise(make: Callable[[], Any], library: Any, log: BuildLog) -> Any:
    """Call a factory. The bindings turn one that returns nothing into a TypeError without a reason."""
    try:
        return make()
    except (TypeError, RuntimeError) as exc:
        text = log.error_summary if log.errors else str(exc)
        raise UnavailableError(f"{_name(library)} does not start: {text}", "see `spmdeploy doctor`") from exc


def _name(library: Any) -> str:
    return f"{library.__name__} {library.__version__}"


def _log_hint(log: BuildLog) -> str:
    return f"the library's own messages are in {log.kept_as}"
