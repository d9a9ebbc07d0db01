"""Checks of `spmdeploy verify --thorough`: same results and bounded memory over many runs, batches and sessions.

Each check runs on every backend where it makes sense, CPUs included; one that does not apply is reported with the
reason. The checks of GPUs have run on simulated devices only.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spmdeploy.backends.base import Backend, SupportsDevicePyramid, SupportsLayoutCache
from spmdeploy.backends.tensorrt import TensorRtSession
from spmdeploy.backends.verify import GoldenSample, limits_of, measure_deviation, read_golden
from spmdeploy.bundle.bundle import Bundle
from spmdeploy.editing.editor import Editor
from spmdeploy.editing.preprocess import EditRegion
from spmdeploy.errors import SpmDeployError, UnavailableError
from spmdeploy.gpu.device import Device
from spmdeploy.types import LayoutInput, ModelInput

CPU_RUNS, GPU_RUNS = 3, 100
REOPENED_SESSIONS = 3
MEMORY_TOLERANCE = 4 << 20
"""Bytes by which free GPU memory may differ between two queries: drivers allocate in units of 2 MiB."""


@dataclass(frozen=True)
class Check:
    """Result of one check."""

    name: str
    status: str
    """passed, failed, or skipped where it does not apply."""
    reason: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether the check ran and failed."""
        return self.status == "failed"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as `verify --thorough --json` prints them."""
        return asdict(self)


def run_thorough(bundle: Bundle, session: Backend, reopen: Callable[[], Backend]) -> Iterator[Check]:
    """Runs all checks, in order.

    Args:
        bundle: The bundle of the session, with at least one golden edit.
        session: Open on the backend to check.
        reopen: Opens another session on the same backend and device.
    """
    golden = read_golden(bundle, bundle.manifest.golden[0])
    checks: dict[str, Callable[[], Check]] = {
        "repeatability": lambda: check_repeatability(session, golden),
        "batches": lambda: check_batches(session, golden, bundle),
        "cached layout": lambda: check_cached_layout(session, golden, bundle),
        "large edit": lambda: check_large_edit(session, golden, bundle),
        "CUDA graphs": lambda: check_cuda_graphs(session, golden),
        "beside PyTorch": lambda: check_beside_torch(session, golden),
        "memory after closing": lambda: check_reopening(session, golden, reopen),
    }
    for name, check in checks.items():
        try:
            yield check()
        except (UnavailableError, ModuleNotFoundError) as exc:
            yield Check(name, "skipped", str(exc))
        except SpmDeployError as exc:
            yield Check(name, "failed", exc.problem)
        except Exception as exc:  # of any library: reported, and the other checks still run
            yield Check(name, "failed", f"{type(exc).__name__}: {exc}"[:600])


def check_repeatability(session: Backend, golden: GoldenSample) -> Check:
    """The same bytes in every run, and no growing GPU memory."""
    runs = GPU_RUNS if session.device.startswith("cuda:") else CPU_RUNS
    digests, free = set(), []
    for number in range(runs):
        digests.add(hashlib.sha256(session.run(golden.inputs).tobytes()).hexdigest())
        if session.device.startswith("cuda:") and number in (min(9, runs - 1), runs - 1):
            free.append(free_gpu_bytes(session.device))
    lost = free[0] - free[-1] if free and free[0] is not None and free[-1] is not None else None
    faults = [f"{len(digests)} different results in {runs} runs"] if len(digests) > 1 else []
    faults += (
        [f"{lost:,} bytes of GPU memory lost in {runs} runs"] if lost is not None and lost > MEMORY_TOLERANCE else []
    )
    return _check("repeatability", faults, runs=runs, results=len(digests), bytes_lost=lost)


def check_batches(session: Backend, golden: GoldenSample, bundle: Bundle) -> Check:
    """Every image of a batch is edited like a single one, within the bundle's limits."""
    single = session.run(golden.inputs)
    repeated = {name: np.repeat(array, 3, axis=0) for name, array in golden.inputs._asdict().items()}
    batch = session.run(ModelInput(**repeated))
    limits = limits_of(bundle, session.precision)
    deviation = measure_deviation(batch, np.repeat(single, 3, axis=0), np.repeat(golden.inputs.mask, 3, axis=0))
    return _check("batches", deviation.problems(limits), **deviation.to_json())


def check_cached_layout(session: Backend, golden: GoldenSample, bundle: Bundle) -> Check:
    """A cached layout changes no byte of the result; in OpenVINO and in engines it stays within the limits.

    These fuse other operations where the graph ends, and so round in other places.
    """
    if not isinstance(session, SupportsLayoutCache):
        return Check("cached layout", "skipped", f"{session.backend} caches no layouts")
    if isinstance(session, TensorRtSession) and session.layout_unsupported is not None:
        return Check("cached layout", "skipped", session.layout_unsupported.problem)
    inputs = golden.inputs
    run = session.bind_layout(LayoutInput(inputs.labels, inputs.instances, inputs.mask))
    difference = measure_deviation(run(inputs.image), session.run(inputs), inputs.mask)
    if session.backend == "openvino" or session.device != "cpu":
        faults = difference.problems(limits_of(bundle, session.precision))
    elif difference.max_grey:
        faults = [f"differs from the plain run by up to {difference.max_grey} gray levels"]
    else:
        faults = []
    return _check("cached layout", faults, **difference.to_json())


def check_large_edit(session: Backend, golden: GoldenSample, bundle: Bundle) -> Check:
    """An edit refined coarse-to-fine keeps the known pixels; on a GPU it equals the same edit by way of the host."""
    if not session.refines:
        return Check("large edit", "skipped", "the bundle does not refine on this device")
    region = large_region(golden)
    photo, _, mask, _ = region
    result = _edit(Editor(session, bundle.manifest.classes), region)
    (between,) = {window.between_levels for window in result.report.windows}
    faults = []
    if not np.array_equal(result.image[~mask], photo[~mask]):
        faults.append("pixels outside the mask were changed")
    if session.device.startswith("cuda:") and isinstance(session, SupportsDevicePyramid):
        by_host = _edit(Editor(_WithoutDevicePyramid(session), bundle.manifest.classes), region)
        if not np.array_equal(by_host.image, result.image):
            faults.append("differs from the same edit by way of the host")
        if between != "device":
            faults.append(f"it did not stay on the device: {'; '.join(result.report.notes)}")
    levels = [level.to_json() for window in result.report.windows for level in window.levels]
    return _check("large edit", faults, tiles=result.report.tiles, between_levels=between, levels=levels)


def check_cuda_graphs(session: Backend, golden: GoldenSample) -> Check:
    """Replaying a CUDA graph gives the bytes of launching every kernel."""
    if not isinstance(session, TensorRtSession):
        return Check("CUDA graphs", "skipped", f"{session.backend} on {session.device} does not use ours")
    from contextlib import ExitStack

    from spmdeploy.bench.backends import device_run

    device = Device(int(session.device.removeprefix("cuda:")))
    with ExitStack() as stack:
        stack.callback(device.close)
        outputs = []
        for graphs in (False, True):
            run = device_run(session, golden.inputs, device, stack, cuda_graphs=graphs)
            for _ in range(4):  # captured at the third call with the same addresses
                with device.current():
                    run.launch()
                    device.synchronize(run.stream)
                outputs.append(run.fetch())
    same = all(np.array_equal(output, outputs[0]) for output in outputs)
    return _check("CUDA graphs", [] if same else ["other results than without CUDA graphs"])


def check_beside_torch(session: Backend, golden: GoldenSample) -> Check:
    """The session and PyTorch do not disturb each other on one GPU, and engines accept PyTorch's tensors."""
    if not session.device.startswith("cuda:"):
        return Check("beside PyTorch", "skipped", "only GPUs are shared")
    import torch

    if not torch.cuda.is_available():
        raise UnavailableError(f"torch {torch.__version__} sees no GPU")
    alone = session.run(golden.inputs)
    factor = torch.arange(1 << 20, device=session.device, dtype=torch.float32).reshape(1024, 1024) % 7
    product, stream, faults = factor @ factor, torch.cuda.current_stream().cuda_stream, set()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    for _ in range(5):
        with torch.cuda.stream(side):
            again = factor @ factor
        if not np.array_equal(session.run(golden.inputs), alone):
            faults.add("other results beside PyTorch")
        torch.cuda.synchronize()
        if not torch.equal(again, product):
            faults.add("PyTorch computes something else beside it")
        if torch.cuda.current_stream().cuda_stream != stream:
            faults.add("PyTorch's current stream was changed")
    if isinstance(session, TensorRtSession) and not _accepts_tensors(session, golden.inputs, alone):
        faults.add("other results from PyTorch's tensors")
    return _check("beside PyTorch", sorted(faults))


def check_reopening(session: Backend, golden: GoldenSample, reopen: Callable[[], Backend]) -> Check:
    """Opening, running and closing further sessions returns all GPU memory."""
    if free_gpu_bytes(session.device) is None:
        return Check("memory after closing", "skipped", f"no GPU memory is counted on {session.device}")
    free = []
    for _ in range(REOPENED_SESSIONS):
        further = reopen()
        try:
            further.run(golden.inputs)
        finally:
            further.close()
        _release_torch_memory()
        free.append(free_gpu_bytes(session.device) or 0)
    lost = free[0] - free[-1]
    faults = (
        [f"{lost:,} bytes of GPU memory lost in {REOPENED_SESSIONS - 1} sessions"] if lost > MEMORY_TOLERANCE else []
    )
    return _check("memory after closing", faults, free_bytes=free, bytes_lost=lost)


def large_region(golden: GoldenSample) -> EditRegion:
    """The golden photo tiled four by five, with a square mask over several tiles.

    It has detail in every pixel, so every pyramid level is refined.
    """
    inputs = golden.inputs
    side = inputs.mask.shape[1]
    image, labels, instances = (
        np.tile(array[0], (4, 5, 1)[: array[0].ndim]) for array in (inputs.image, inputs.labels, inputs.instances)
    )
    mask = np.zeros(labels.shape, np.bool_)
    mask[3 * side // 4 : 13 * side // 4, side : 7 * side // 2] = True
    return EditRegion(image, labels, mask, instances)


def free_gpu_bytes(device: str) -> int | None:
    """Free memory of a GPU; None for other devices and without a package to query it."""
    if not device.startswith("cuda:"):
        return None
    try:
        opened = Device(int(device.removeprefix("cuda:")))
    except SpmDeployError:
        return None
    try:
        with opened.current():
            return opened.memory()[0]
    finally:
        opened.close()


class _WithoutDevicePyramid:
    """A session without `device_cascade`: levels pass through the host."""

    def __init__(self, session: Backend) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        if name == "device_cascade":
            raise AttributeError(name)
        return getattr(self._session, name)


def _edit(editor: Editor, region: EditRegion) -> Any:
    return editor.edit(*region, tiling="cascade", match_surroundings=False)


def _accepts_tensors(session: TensorRtSession, inputs: ModelInput, expected: NDArray[np.uint8]) -> bool:
    import torch

    tensors = {name: torch.from_numpy(array).cuda() for name, array in inputs._asdict().items()}
    edited = torch.zeros(expected.shape, dtype=torch.uint8, device="cuda")
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        edited.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            session.run_device(tensors, {"edited": edited}, stream.cuda_stream)
            result = edited.clone()
        torch.cuda.synchronize()
        if not np.array_equal(result.cpu().numpy(), expected):
            return False
    return True


def _release_torch_memory() -> None:
    import gc

    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _check(name: str, faults: list[str], **facts: Any) -> Check:
    return Check(name, "failed" if faults else "passed", "; ".join(faults) or None, facts)
