"""Plans the engines of a bundle: chooses the library, the GPUs to build for and the batch sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spmdeploy.engines.library import import_engine_library, is_installed
from spmdeploy.engines.record import (
    ENGINE_RUNTIMES,
    BatchRange,
    EngineRuntime,
    Gpu,
)
from spmdeploy.engines.store import Place
from spmdeploy.errors import UnavailableError, UsageError
from spmdeploy.gpu.driver import GpuFacts, gpu_facts
from spmdeploy.types import Precision

ALL_GRAPHS = "all"
CACHED_LAYOUT = "cached-layout"
"""The two graphs that together are `edit`, split so that a layout is computed once for many images."""

MAX_BATCH = 64
"""The graphs are exported for batches up to this."""

PROFILE_BATCHES = (1, 4, 8)
"""Batch sizes with an optimization profile each: one edit, the editor's batch of tiles, and the default maximum."""


@dataclass(frozen=True)
class EngineOptions:
    """Options of a build. None and `auto` leave the choice to `plan_engines` and `choose_place`."""

    runtime: str = "auto"
    precision: Precision = "fp16"
    graph: str = ALL_GRAPHS
    """edit, refine, `ALL_GRAPHS` (both) or `CACHED_LAYOUT`."""
    max_batch: int = 8
    opt_batch: int | None = None
    """One optimization profile for all batch sizes, best at this one. None: a profile for each of `PROFILE_BATCHES`."""
    opt_level: int | None = None
    """`builder_optimization_level`, 0 to 5; None: the library's default."""
    targets: Sequence[str] = ()
    timing_cache: Path | None = None
    """A folder with a file for each library version and GPU. None: in the cache folder."""
    workspace_mb: int | None = None
    place: Place | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class EnginePlan:
    """Library, GPU and batch sizes, which are the same for all graphs."""

    runtime: EngineRuntime
    library: Any
    gpu: GpuFacts | None
    """The GPU of this machine."""
    targets: tuple[str, ...]
    """As sm86; empty: for the GPU of this machine."""
    profiles: tuple[BatchRange, ...]
    why: str

    @property
    def version(self) -> str:
        """Version of the TensorRT library."""
        return str(self.library.__version__)

    @property
    def batch(self) -> BatchRange:
        """All batch sizes of the profiles."""
        return BatchRange(self.profiles[0].min, self.profiles[0].opt, self.profiles[-1].max)

    @property
    def built_for(self) -> Gpu | None:
        """The GPU that the engines will be bound to; None for `targets`."""
        return None if self.targets or self.gpu is None else Gpu(self.gpu.name, self.gpu.compute_capability)

    @property
    def description(self) -> str:
        """For messages."""
        target = self.built_for or ", ".join(self.targets)
        return f"{self.runtime} {self.version} for {target}: {self.why}"


def plan_engines(options: EngineOptions) -> EnginePlan:
    """Choose library, GPU and batch sizes.

    Raises:
        UsageError: Options contradict each other or the libraries.
        UnavailableError: There is no library or no GPU for them.
    """
    profiles = batch_profiles(options.max_batch, options.opt_batch)
    if options.opt_level is not None and not 0 <= options.opt_level <= 5:
        raise UsageError(f"there is no optimization level {options.opt_level}", "choose from 0 (quick to build) to 5")
    try:
        gpu, no_gpu = gpu_facts(), ""
    except OSError as exc:
        gpu, no_gpu = None, str(exc)
    runtime, library, why = _choose_library(options, gpu, no_gpu)
    if options.timing_cache is not None and runtime == "tensorrt-rtx":
        raise UsageError(
            "TensorRT-RTX keeps no timing cache", "leave --timing-cache out: it does not measure when it builds"
        )
    targets = _targets(library, options.targets, gpu) if runtime == "tensorrt-rtx" else ()
    return EnginePlan(runtime, library, gpu, targets, profiles, why)


def batch_profiles(max_batch: int, opt_batch: int | None = None) -> tuple[BatchRange, ...]:
    """Return the optimization profiles for batches of 1 to `max_batch`.

    Args:
        max_batch: The largest batch size, 1 to 64.
        opt_batch: One profile, best at this batch size; None: one best at each of `PROFILE_BATCHES` and at the largest.

    Raises:
        UsageError: The batch sizes are not possible.
    """
    if not 1 <= (opt_batch or 1) <= max_batch <= MAX_BATCH:
        raise UsageError(
            f"batches of 1 to {max_batch}, best at {opt_batch or 1}, are not possible",
            f"the best one must be among them, and the graphs take at most {MAX_BATCH}",
        )
    if opt_batch is not None:
        return (BatchRange(1, opt_batch, max_batch),)
    ends = sorted({size for size in PROFILE_BATCHES if size < max_batch} | {max_batch})
    return tuple(BatchRange(before + 1, end, end) for before, end in zip((0, *ends), ends, strict=False))


def _choose_library(options: EngineOptions, gpu: GpuFacts | None, no_gpu: str) -> tuple[EngineRuntime, Any, str]:
    """The imported library, and why it was chosen."""
    if options.runtime != "auto" and options.runtime not in ENGINE_RUNTIMES:
        raise UsageError(f"unknown runtime {options.runtime!r}", f"choose from auto, {', '.join(ENGINE_RUNTIMES)}")
    if options.runtime == "tensorrt-rtx":
        return "tensorrt-rtx", import_engine_library("tensorrt-rtx"), "as requested"
    if options.runtime == "tensorrt":
        if options.targets:
            raise UsageError(
                "TensorRT builds for the GPU of this machine only", "leave --target out, or use tensorrt-rtx"
            )
        library = import_engine_library("tensorrt")
        if gpu is None:
            raise UnavailableError(
                f"TensorRT builds for the GPU of this machine, and there is none: {no_gpu}",
                "build on the device itself, or with --runtime tensorrt-rtx --target ...",
            )
        return "tensorrt", library, "as requested"
    if options.targets:
        return "tensorrt-rtx", import_engine_library("tensorrt-rtx"), "only TensorRT-RTX builds for listed targets"
    why = "TensorRT is not installed" if gpu else f"TensorRT needs a GPU ({no_gpu})"
    if gpu is not None and is_installed("tensorrt"):
        try:
            library = import_engine_library("tensorrt")
            return "tensorrt", library, "TensorRT is installed, which optimizes for this GPU"
        except UnavailableError as exc:
            if not is_installed("tensorrt-rtx"):
                raise
            why = exc.problem
    if is_installed("tensorrt-rtx"):
        return "tensorrt-rtx", import_engine_library("tensorrt-rtx"), why
    raise UnavailableError(
        "neither TensorRT nor TensorRT-RTX is installed",
        'pip install "spmdeploy[tensorrt-rtx]", or "spmdeploy[tensorrt]" on a machine with the GPU',
    )


def _targets(library: Any, wanted: Sequence[str], gpu: GpuFacts | None) -> tuple[str, ...]:
    """Names of compute capabilities to build for, each known to the library."""
    known = sorted((name.lower() for name in library.ComputeCapability.__members__ if name[:2] == "SM"), key=_number)
    supported = f"TensorRT-RTX {library.__version__} builds for {', '.join(known)}"
    unknown = [target for target in wanted if target not in known]
    if unknown:
        raise UsageError(
            f"no target {unknown[0]!r}: {supported}",
            "engines for Jetson and for data-center GPUs are built on the device itself, with --runtime tensorrt",
        )
    if wanted:
        return tuple(sorted(set(wanted), key=_number))
    if gpu is None:
        raise UnavailableError(
            "there is no GPU here to build for", f"name what to build for, as in --target sm86; {supported}"
        )
    here = Gpu(gpu.name, gpu.compute_capability)
    if here.target not in known:
        raise UnavailableError(
            f"{supported}, not for {here}", "build with --runtime tensorrt on this machine: TensorRT supports its GPU"
        )
    return (here.target,)


def _number(target: str) -> int:
    return int(target[2:])
