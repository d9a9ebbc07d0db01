"""PyTorch baselines: reduced precision, `torch.compile`, and edits in GPU memory.

FP32 means FP32 here: TF32, which PyTorch enables for convolutions, is switched off unless the precision is tf32.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spmdeploy.backends.base import LayoutRun
from spmdeploy.backends.pytorch import TorchSession, bundled_generator
from spmdeploy.backends.threads import available_threads
from spmdeploy.bench.roofline import COPIED_BYTES, MATRIX_SIDE, PeakRates, best_seconds, rates_from
from spmdeploy.bundle.bundle import Bundle
from spmdeploy.errors import UnavailableError, UsageError
from spmdeploy.model.deploy import EditGraph, RefineGraph
from spmdeploy.model.generator import Generator
from spmdeploy.types import BackendPrecision, LayoutInput, ModelInput

PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class BaselineSession(TorchSession):
    """The deploy graph in eager PyTorch or under `torch.compile`, in any of `PRECISIONS`.

    Reduced precision: weights in FP16 or bf16, convolutions under autocast, instance norms in FP32. Reduced precision
    and GPUs use channels_last; GPUs use cuDNN's benchmark mode, and pinned memory for the one output that is returned.
    """

    def __init__(self, generator: Generator, device: str, precision: str, compiled: bool = False) -> None:
        """Changes global settings of PyTorch: one session for each process."""
        set_fp32_mode(allow_tf32=precision == "tf32")
        torch.backends.cudnn.benchmark = device != "cpu"
        dtype = _DTYPES.get(precision)
        if dtype is not None or device != "cpu":
            generator = generator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        super().__init__(generator if dtype is None else generator.to(dtype), device)
        self.backend = "torch-compile" if compiled else "torch"
        self.precision = cast(BackendPrecision, precision)
        settings = [] if precision == "fp32" else [precision]
        settings += ["channels_last"] * (dtype is not None or device != "cpu")
        self._compiled = compiled
        if dtype is not None:
            self.edit_graph: Any = (
                _Autocast(EditGraph(cast(Generator, _Fp32Output(generator))), dtype).to(device).eval()
            )
            self._refine: Any = _Autocast(RefineGraph(generator), dtype).to(device).eval() if self.refines else None
        if compiled:
            settings.append("torch.compile" if device == "cpu" else "torch.compile(max-autotune)")
            self.edit_graph = _compile(self.edit_graph, device)
            self._refine = None if self._refine is None else _compile(self._refine, device)
        self.provider = ", ".join([self.provider, *settings])

    def run(self, inputs: ModelInput) -> NDArray[np.uint8]:
        """Copies the edited images only, through pinned memory on a GPU."""
        edited = self.launch([self.upload(array) for array in inputs])
        if self.device == "cpu":
            return np.asarray(edited.numpy())
        host = torch.empty(edited.shape, dtype=edited.dtype, pin_memory=True)
        host.copy_(edited, non_blocking=True)
        torch.cuda.current_stream(self.device).synchronize()
        return np.asarray(host.numpy())

    def upload(self, array: NDArray[Any]) -> Tensor:
        """Copy an array to the session's device, through pinned memory on a GPU."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor if self.device == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)

    def launch(self, tensors: list[Tensor]) -> Tensor:
        """The edited images on the device; overwritten by the next launch with CUDA graphs."""
        try:
            with torch.inference_mode():
                if self._compiled:
                    torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
                return cast(Tensor, self.edit_graph(*tensors)[0])
        except torch._dynamo.exc.TorchDynamoException as exc:
            reason = " ".join(str(exc).split())[:300]
            raise UnavailableError(
                f"torch.compile cannot compile the graph here: {reason}", "it needs a C++ compiler, on GPUs Triton"
            ) from exc

    def bind_layout(self, layout: LayoutInput) -> LayoutRun:
        """Caches the layout in eager PyTorch only: a graph for every layout would be compiled for every layout."""
        if self._compiled:
            raise UnavailableError("torch.compile would compile a graph for every layout", "use --scope engine")
        return super().bind_layout(layout)


class TorchDeviceRun:
    """An edit whose inputs and output stay on the GPU; see `backends.DeviceRun`."""

    def __init__(self, session: BaselineSession, batch: ModelInput) -> None:
        self._session = session
        self._inputs = [session.upload(array) for array in batch]
        self._edited = torch.empty(0)
        self.stream = int(torch.cuda.current_stream(session.device).cuda_stream)

    def launch(self) -> None:
        """Queue the edit; its result stays on the GPU."""
        self._edited = self._session.launch(self._inputs)

    def fetch(self) -> NDArray[np.uint8]:
        """The edited images of the last launch: uint8 (B, S, S, 3), RGB."""
        edited: NDArray[np.uint8] = self._edited.cpu().numpy()
        return edited


def open_baseline(bundle: Bundle, name: str, device: str, precision: str) -> BaselineSession:
    """Opens the bundle's generator in PyTorch.

    Args:
        bundle: Holds the weights.
        name: torch or torch-compile.
        device: auto, cpu or cuda:N.
        precision: auto (fp32) or one of `PRECISIONS`.

    Raises:
        UnavailableError: This machine does not compute in that precision, or has no such device.
        UsageError: The precision or the device is unknown.
        BundleError: The bundle has no FP32 graph.
    """
    if device == "auto":
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    if precision not in ("auto", *PRECISIONS):
        raise UsageError(f"unknown precision {precision!r}", f"choose from auto, {', '.join(PRECISIONS)}")
    if precision in ("fp16", "tf32") and device == "cpu":
        raise UnavailableError(f"PyTorch does not compute in {precision} on CPUs", "use fp32 or bf16")
    precision = "fp32" if precision == "auto" else precision
    torch.set_num_threads(min(torch.get_num_threads(), available_threads()))
    return BaselineSession(bundled_generator(bundle), device, precision, compiled=name == "torch-compile")


def set_fp32_mode(allow_tf32: bool = False) -> None:
    """Whether FP32 convolutions and products may use TF32, which keeps 10 bits of the mantissa."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow_tf32


def threads_of(device: str) -> int | None:
    """Threads of one call on CPUs."""
    return torch.get_num_threads() if device == "cpu" else None


def _compile(graph: nn.Module, device: str) -> Any:
    if device == "cpu":  # max-autotune takes an hour there
        return torch.compile(graph, dynamic=False)
    return torch.compile(graph, dynamic=False, mode="max-autotune")  # includes CUDA graphs


class _Autocast(nn.Module):
    """Autocast inside the module, so that it is compiled with it. Weights in the same type are not converted again."""

    def __init__(self, graph: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.graph = graph
        self._dtype = dtype

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(inputs[0].device.type, self._dtype):
            return tuple(self.graph(*inputs))


class _Fp32Output(nn.Module):
    """A generator with FP32 output: arithmetic on 8-bit pixels needs more than the mantissa of bf16."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator
        self.config = generator.config
        self.stages = generator.stages

    def forward(self, image: Tensor, layout: Any) -> Any:
        return SimpleNamespace(raw=[self.generator(image, layout).raw[-1].float()])


def torch_rates(device: str, precision: str, seconds: float) -> PeakRates:
    """Peak rates of torch on a device. TF32 only for the precision tf32."""
    set_fp32_mode(allow_tf32=precision == "tf32")
    dtype = _DTYPES.get(precision, torch.float32)
    matrix = torch.randn(MATRIX_SIDE, MATRIX_SIDE, device=device).to(dtype)
    product = torch.empty_like(matrix)
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def wait() -> None:
        if device != "cpu":
            torch.cuda.synchronize(device)

    product_seconds = best_seconds(lambda: torch.matmul(matrix, matrix, out=product), seconds, wait)
    copy_seconds = best_seconds(lambda: target.copy_(source), seconds, wait)
    return rates_from(device, precision, f"torch {torch.__version__}", product_seconds, copy_seconds)
