"""Everything that may be able to run the graphs on this machine, opened in one way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spmdeploy.bundle.bundle import Bundle
from spmdeploy.errors import UnavailableError
from spmdeploy.types import ModelInput

_EMPTY = (((3,), np.uint8), ((), np.uint8), ((), np.int32), ((), np.uint8))


@dataclass
class Runner:
    """A contender that is open."""

    run: Callable[..., NDArray[np.uint8]]
    """From host arrays (image, labels, instances, mask) to the edited pictures on the host."""
    facts: dict[str, Any]
    """Who it is, by its own words."""
    timed: Callable[..., float] | None = None
    """Milliseconds by the device's own clock for the same, copies included; None where nothing lets us measure it."""
    run_device: Callable[..., Any] | None = None
    """From CUDA tensors to CUDA tensors, where it can: (inputs, outputs, stream)."""
    notes: Callable[[], tuple[str, ...]] = field(default=lambda: ())
    refine: Callable[..., NDArray[np.float32]] | None = None
    """From host arrays (image, labels, instances, mask, coarse) to unrounded pictures, where it can."""
    session: Any = None
    """For large edits; None where it does not refine."""


@dataclass(frozen=True)
class Contender:
    """One way to run the graphs. `limits` names the bundle's limits that it must keep to."""

    name: str
    device: str
    """cuda:0 or cpu."""
    limits: str
    open: Callable[[Bundle, str], Any]


@contextmanager
def _torch(bundle: Bundle, device: str, half: bool = False, compiled: bool = False) -> Iterator[Runner]:
    import torch

    from spmdeploy.backends.pytorch import TorchSession, bundled_generator
    from spmdeploy.bench.torch_backends import AutocastSession, CompiledSession

    if device != "cpu" and not torch.cuda.is_available():
        raise UnavailableError(f"torch {torch.__version__} sees no GPU", "install a build of PyTorch with CUDA")
    # FP32 here means FP32: TF32, on by default for convolutions, keeps 10 bits of the mantissa.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    generator = bundled_generator(bundle)
    if compiled:
        session: TorchSession = CompiledSession(generator, device, "fp16" if half else "fp32")
    else:
        session = (AutocastSession if half else TorchSession)(generator, device)

    def timed(inputs: ModelInput) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        session.run(inputs)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    if compiled:
        try:
            session.run(ModelInput(*(np.zeros((1, 256, 256, *more), kind) for more, kind in _EMPTY)))
        except Exception as error:  # whatever the compiler lacks: Triton, a C compiler, this GPU
            raise UnavailableError(f"torch.compile does not work here: {' '.join(str(error).split())[:300]}") from error
    name = torch.cuda.get_device_name(0) if device != "cpu" else "the CPU"
    words = "compiled " * compiled + ("FP16 autocast" if half else "FP32")
    facts = {"provider": f"torch {torch.__version__}, {words}, on {name}"}
    refining = session if session.refines and not compiled else None  # a second graph takes minutes to compile
    refine = None if refining is None else refining.refine
    yield Runner(session.run, facts, None if device == "cpu" else timed, refine=refine, session=refining)


@contextmanager
def _session(bundle: Bundle, device: str, backend: str, precision: str) -> Iterator[Runner]:
    """Whatever `open_session` opens by name; engines are built first, by the pipeline that `spmdeploy build` uses."""
    from spmdeploy.backends.base import open_session

    facts: dict[str, Any] = {}
    if device != "cpu":
        _need_gpu()
    if backend.startswith("tensorrt"):
        facts["build"] = _build(bundle, backend, precision)
    started = time.perf_counter()
    opened = open_session(bundle, backend, device, precision)
    session: Any = opened.session
    facts |= {"provider": session.provider, "choices": opened.choices, "open_seconds": time.perf_counter() - started}
    try:
        engine = backend.startswith("tensorrt")
        yield Runner(
            session.run,
            facts,
            session.timed_run if engine else None,
            session.run_device if engine else None,
            lambda: tuple(session.notes),
            session.refine if session.refines else None,
            session if session.refines else None,
        )
    finally:
        session.close()


def _need_gpu() -> None:
    from spmdeploy.gpu.driver import visible_gpus

    try:
        count = visible_gpus()
    except OSError as error:
        raise UnavailableError(str(error)) from error
    if not count:
        raise UnavailableError("the driver shows no GPU")


def _build(bundle: Bundle, runtime: str, precision: str) -> dict[str, Any]:
    from spmdeploy.engines.build import EngineOptions, build_engines

    options = EngineOptions(runtime=runtime, precision=precision, place="bundle")  # type: ignore[arg-type]
    kept = ("version", "gpu", "targets", "flags", "fallback", "batch", "computes_in", "build_seconds")
    facts = {}
    for result in build_engines(bundle, options):
        record = result.record.to_json()
        told = {"built_now": result.built, "bytes": record["engine"]["bytes"]}
        facts[result.record.graph] = told | {name: record[name] for name in kept}
    return facts


def contenders(gpu: bool) -> list[Contender]:
    """The first is the reference, which the others are compared with."""

    def torch_on(device: str, **options: bool) -> Callable[..., Any]:
        return lambda bundle, _: _torch(bundle, device, **options)

    def session_on(device: str, backend: str, precision: str) -> Callable[..., Any]:
        return lambda bundle, _: _session(bundle, device, backend, precision)

    cuda, reference = "cuda:0", "cuda:0" if gpu else "cpu"
    made = [Contender("torch fp32", reference, "fp32", torch_on(reference))]
    if gpu:
        made.append(Contender("torch fp32 on the cpu", "cpu", "fp32", torch_on("cpu")))
    made += [
        Contender("onnxruntime cpu fp32", "cpu", "fp32", session_on("cpu", "onnxruntime", "fp32")),
        Contender("torch fp16 on cuda", cuda, "fp16", torch_on(cuda, half=True)),
        Contender("torch.compile fp32 on cuda", cuda, "fp32", torch_on(cuda, compiled=True)),
        Contender("torch.compile fp16 on cuda", cuda, "fp16", torch_on(cuda, half=True, compiled=True)),
    ]
    for backend in ("onnxruntime", "tensorrt", "tensorrt-rtx"):
        made += [
            Contender(f"{backend} {precision} on cuda", cuda, precision, session_on(cuda, backend, precision))
            for precision in ("fp32", "fp16")
        ]
    return made


def free_bytes() -> int | None:
    """Free memory of the first GPU; None where nothing can tell."""
    from spmdeploy.errors import SpmDeployError
    from spmdeploy.gpu.device import Device

    try:
        device = Device()
    except SpmDeployError:
        return None
    try:
        with device.current():
            return device.memory()[0]
    finally:
        device.close()
