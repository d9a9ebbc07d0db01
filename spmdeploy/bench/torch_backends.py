"""PyTorch with its compiler, and PyTorch's edits kept on the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spmdeploy.backends.base import LayoutRun
from spmdeploy.backends.pytorch import TorchSession, bundled_generator
from spmdeploy.bench.roofline import COPIED_BYTES, MATRIX_SIDE, PeakRates, best_seconds, rates_from
from spmdeploy.bundle.bundle import Bundle
from spmdeploy.errors import UnavailableError, UsageError
from spmdeploy.model.generator import Generator
from spmdeploy.types import LayoutInput, ModelInput, Precision


class CompiledSession(TorchSession):
    """The deploy graph under `torch.compile`; FP16 is autocast, on GPUs alone.

    It compiles at the first call with a batch size, which takes minutes on a CPU.
    """

    backend = "torch-compile"

    def __init__(self, generator: Generator, device: str, precision: Precision) -> None:
        super().__init__(generator, device)
        self.precision = precision
        self.provider = f"{self.provider}, torch.compile"
        self.edit_graph = _compiled(self.edit_graph, precision)
        if self._refine is not None:
            self._refine = _compiled(self._refine, precision)

    def bind_layout(self, layout: LayoutInput) -> LayoutRun:
        """Keeps nothing: a graph for every layout would be compiled for every layout."""
        return lambda image: self.run(ModelInput(image, *layout))

    def _outputs(self, graph: nn.Module, *inputs: NDArray[Any]) -> list[NDArray[Any]]:
        try:
            return super()._outputs(graph, *inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join(str(error).split())[:300]
            raise UnavailableError(
                f"torch.compile cannot compile the graph here: {reason}", "it needs a C++ compiler, on GPUs Triton"
            ) from error


class AutocastSession(TorchSession):
    """The deploy graph in eager PyTorch under FP16 autocast, on a GPU."""

    def __init__(self, generator: Generator, device: str) -> None:
        super().__init__(generator, device)
        self.precision = "fp16"
        self.provider = f"{self.provider}, FP16 autocast"
        self.edit_graph: Any = _InHalves(self.edit_graph)
        self._refine: Any = None if self._refine is None else _InHalves(self._refine)


class TorchDeviceRun:
    """An edit whose inputs and output stay on the GPU; see `backends.DeviceRun`."""

    def __init__(self, session: TorchSession, batch: ModelInput) -> None:
        self._edit = session.edit_graph
        self._inputs = [torch.from_numpy(array).to(session.device) for array in batch]
        self._outputs: list[Tensor] = []
        self.stream = int(torch.cuda.current_stream(session.device).cuda_stream)

    def launch(self) -> None:
        with torch.inference_mode():
            self._outputs = self._edit(*self._inputs)

    def fetch(self) -> NDArray[np.uint8]:
        edited: NDArray[np.uint8] = self._outputs[0].cpu().numpy()
        return edited


def open_compiled_session(bundle: Bundle, device: str, precision: str) -> CompiledSession:
    """device: auto, cpu or cuda:N. precision: auto, fp32 or fp16; auto is FP32. Raises as `open_torch_session`."""
    if device == "auto":
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    if precision not in ("auto", "fp32", "fp16"):
        raise UsageError(f"unknown precision {precision!r}", "choose from auto, fp32, fp16")
    if precision == "fp16" and device == "cpu":
        raise UnavailableError("torch.compile computes in fp32 on CPUs", "leave --precision fp16 to GPUs")
    return CompiledSession(bundled_generator(bundle), device, "fp16" if precision == "fp16" else "fp32")


def compute_settings(device: str) -> tuple[int | None, str]:
    """Threads of one call, on CPUs; and what a provider's name should say of how FP32 is computed on GPUs."""
    if device == "cpu":
        return torch.get_num_threads(), ""
    return None, ", TF32 in convolutions" if torch.backends.cudnn.allow_tf32 else ", no TF32"


def _compiled(graph: nn.Module, precision: Precision) -> Any:
    return torch.compile(_InHalves(graph) if precision == "fp16" else graph, dynamic=False)


class _InHalves(nn.Module):
    """Autocast inside the module, so that it is compiled with it."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        with torch.autocast("cuda", torch.float16):
            return list(self.graph(*inputs))


def torch_rates(device: str, precision: str, seconds: float) -> PeakRates:
    """What torch reaches on a device; see `floor`. TF32 stays off, as it is by default for products: it is not FP32."""
    kind = torch.float16 if precision == "fp16" else torch.float32
    matrix = torch.randn(MATRIX_SIDE, MATRIX_SIDE, device=device).to(kind)
    product = torch.empty_like(matrix)
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def wait() -> None:
        if device != "cpu":
            torch.cuda.synchronize(device)

    product_seconds = best_seconds(lambda: torch.matmul(matrix, matrix, out=product), seconds, wait)
    copy_seconds = best_seconds(lambda: target.copy_(source), seconds, wait)
    return rates_from(device, precision, f"torch {torch.__version__}", product_seconds, copy_seconds)
