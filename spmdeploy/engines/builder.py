"""One ONNX file to one engine: what drives TensorRT 10 and 11 and TensorRT-RTX, with the module as a parameter.

Precision is stated by the graph, and networks are strongly typed: what the graph says is what the engine computes in.
`weakly_typed` is for TensorRT before 10.12 alone, whose strong typing is incomplete: 10.3 on JetPack 6.
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

CURRENT = "CURRENT"
"""The member of ComputeCapability that stands for the GPU at hand."""

_DTYPES = {"FLOAT": "float32", "HALF": "float16"}


@dataclass(frozen=True)
class BuildRequest:
    """What to build."""

    graph: Path
    """A file in a real folder: weights that it keeps in another file are looked for beside it."""
    batch: BatchRange
    targets: tuple[str, ...] = ()
    """Members of TensorRT-RTX's ComputeCapability; empty for TensorRT, which builds for the GPU at hand."""
    weakly_typed: bool = False
    """Let TensorRT choose FP16 where it is faster, whatever the graph's types."""
    workspace: int | None = None
    """Bytes that a layer may use for itself; None: what the device has."""
    timing_cache: bytes | None = None
    """An earlier build's; empty to start one; None for none."""


@dataclass(frozen=True)
class BuiltEngine:
    """An engine in memory, and what is known of it without loading it."""

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
    """The library's messages in a file, and those that matter in memory."""

    def __init__(self, path: Path, kept_as: Path) -> None:
        """kept_as: where the file will be found if the build fails."""
        self.path, self.kept_as = path, kept_as
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def __call__(self, severity: str, text: str) -> None:
        if severity == "VERBOSE":  # tens of thousands, of use to nobody but NVIDIA
            return
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self.errors.append(" ".join(text.split()))
        if severity == "WARNING":
            self.warnings.append(" ".join(text.split()))
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(f"[{severity}] {text}\n")

    @property
    def words(self) -> str:
        """The errors, shortened: the first usually causes the others."""
        return "; ".join(dict.fromkeys(self.errors[:3]))[:600] or "no reason given"


def build_engine(library: Any, request: BuildRequest, log: BuildLog, watch: BuildMonitor) -> BuiltEngine:
    """Builds on a thread of its own; `watch` is told how it goes.

    Raises BundleError for a graph that cannot be parsed, OutOfMemory, UnavailableError with the library's own words for
    whatever else it cannot do, KeyboardInterrupt when cancelled.
    """
    with capture_log(library, log):
        return watch.run(lambda: _build(library, request, log, watch))


def _build(library: Any, request: BuildRequest, log: BuildLog, watch: BuildMonitor) -> BuiltEngine:
    logger = library_logger(library)
    builder = _create_or_raise(lambda: library.Builder(logger), library, log)
    network = builder.create_network(_network_flags(library, request))
    _parse(library, network, logger, request.graph, log)
    inputs = tuple(_port(network.get_input(index)) for index in range(network.num_inputs))
    outputs = tuple(_port(network.get_output(index)) for index in range(network.num_outputs))
    _check_batch(request.graph, inputs, outputs)

    config = builder.create_builder_config()
    _add_profile(builder, config, inputs, request, log)
    flags = _set_flags(library, config, request)
    config.profiling_verbosity = library.ProfilingVerbosity.DETAILED  # or the inspector tells names alone
    if request.workspace is not None:
        config.set_memory_pool_limit(library.MemoryPoolType.WORKSPACE, request.workspace)
    _set_targets(library, config, request.targets)
    cache_used = _set_timing_cache(config, request.timing_cache)
    monitor = progress_monitor(library, watch)
    if monitor is not None:
        config.progress_monitor = monitor

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
    """Bits, by the names of the version at hand: their numbers differ. TensorRT 11 and RTX know strong typing alone."""
    return 0 if request.weakly_typed else 1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _parse(library: Any, network: Any, logger: Any, graph: Path, log: BuildLog) -> None:
    parser = library.OnnxParser(network, logger)
    if parser.parse_from_file(str(graph)):
        return
    faults = [parser.get_error(index) for index in range(parser.num_errors)]
    words = "; ".join(_parser_errors(fault) for fault in faults) or log.words
    raise BundleError(f"{graph.name} cannot be parsed by {_name(library)}: {words}", _log_hint(log))


def _parser_errors(fault: Any) -> str:
    """The first line that tells what a parser error is about, and the node."""
    lines = fault.desc().strip().splitlines() or ["no reason given"]
    words = (lines[1] if lines[0].startswith("Invalid Node") and len(lines) > 1 else lines[0])[:300]
    node = f" at the node {fault.node_name()} ({fault.node_operator()})" if fault.node_name() else ""
    return f"{words}{node}"


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


def _add_profile(builder: Any, config: Any, inputs: Sequence[Port], request: BuildRequest, log: BuildLog) -> None:
    profile = builder.create_optimization_profile()
    batch = request.batch
    for port in inputs:
        profile.set_shape(port.name, *((size, *port.shape[1:]) for size in (batch.min, batch.opt, batch.max)))
    if config.add_optimization_profile(profile) < 0:
        raise UnavailableError(f"batch sizes {batch} are refused: {log.words}", _log_hint(log))


def _set_flags(library: Any, config: Any, request: BuildRequest) -> tuple[str, ...]:
    """Sets the builder's flags and returns the names of all that are set then."""
    # On by default, and a half's precision under the name of FP32: more drift than the limits of FP32 allow.
    config.clear_flag(library.BuilderFlag.TF32)
    if hasattr(library.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        # TensorRT-RTX: or it may allocate while it runs, and then nothing can be captured as a CUDA graph.
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
    """Whether `content` is taken; one of another version or device is not, and the build starts its own."""
    if content is None:
        return False
    cache = config.create_timing_cache(content)
    if content and cache is not None and config.set_timing_cache(cache, False):
        return True
    config.set_timing_cache(config.create_timing_cache(b""), False)
    return False


def _failure(library: Any, graph: Path, log: BuildLog) -> SpmDeployError:
    said = " ".join(log.errors).lower()
    if "out of memory" in said or "outofmemory" in said or "cudaerrormemoryallocation" in said:
        problem = f"{_name(library)} ran out of memory building from {graph.name}: {log.words}"
        return OutOfMemoryError(problem, "close other programs, or build for fewer pictures at once: --max-batch 1")
    return UnavailableError(f"{_name(library)} cannot build from {graph.name}: {log.words}", _log_hint(log))


def _create_or_raise(make: Callable[[], Any], library: Any, log: BuildLog) -> Any:
    """What `make` makes. The bindings turn a factory that returns nothing into a TypeError without a reason."""
    try:
        return make()
    except (TypeError, RuntimeError) as exc:
        words = log.words if log.errors else str(exc)
        raise UnavailableError(f"{_name(library)} does not start: {words}", "see `spmdeploy doctor`") from exc


def _name(library: Any) -> str:
    return f"{library.__name__} {library.__version__}"


def _log_hint(log: BuildLog) -> str:
    return f"the library's own messages are in {log.kept_as}"
