"""Eager PyTorch, the reference that other backends are compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn

from spmdeploy.backends.base import LayoutRun, OpenedBackend, Unsupported, check_device
from spmdeploy.backends.threads import available_threads
from spmdeploy.bundle.bundle import Bundle, GraphFiles
from spmdeploy.bundle.manifest import EDIT, EDIT_ON_CPU
from spmdeploy.errors import BundleError, UnavailableError, UsageError
from spmdeploy.model.deploy import EditGraph, RefineGraph, cache_layout
from spmdeploy.model.generator import Generator, GeneratorConfig
from spmdeploy.types import NATIVE_SIZE, BackendPrecision, LayoutInput, ModelInput


class TorchSession:
    """The deploy graph in eager PyTorch, in FP32."""

    backend = "torch"
    notes: tuple[str, ...] = ()
    precision: BackendPrecision = "fp32"
    size = NATIVE_SIZE

    def __init__(self, generator: Generator, device: str = "cpu") -> None:
        """device: cpu or cuda:N. The generator is moved there."""
        if device != "cpu" and int(device.removeprefix("cuda:")) >= (count := torch.cuda.device_count()):
            raise UnavailableError(f"{device} was asked for, but PyTorch sees {count} CUDA devices", "use --device cpu")
        self.device = device
        self.provider = f"torch {torch.__version__}"
        self.refines = len(generator.stages) > 1
        problem = Unsupported(
            "a generator of one stage has nothing to refine", "use --tiling crop, or a model of several stages"
        )
        self.refine_unsupported = None if self.refines else problem
        self.edit_graph = EditGraph(generator).to(device).eval()
        self._refine = RefineGraph(generator).to(device).eval() if self.refines else None

    def run(self, inputs: ModelInput) -> NDArray[np.uint8]:
        edited: NDArray[np.uint8] = self._outputs(self.edit_graph, *inputs)[0]
        return edited

    def run_unrounded(self, inputs: ModelInput) -> NDArray[np.float32]:
        unrounded: NDArray[np.float32] = self._outputs(self.edit_graph, *inputs)[1]
        return unrounded

    def refine(self, inputs: ModelInput, coarse: NDArray[np.float32]) -> NDArray[np.float32]:
        if self._refine is None:
            assert self.refine_unsupported is not None
            raise BundleError(*self.refine_unsupported)
        unrounded: NDArray[np.float32] = self._outputs(self._refine, *inputs, coarse)[1]
        return unrounded

    def bind_layout(self, layout: LayoutInput) -> LayoutRun:
        with torch.inference_mode(), full_fp32(self.precision == "fp32"):
            tensors = [torch.from_numpy(np.ascontiguousarray(ids)).to(self.device) for ids in layout]
            graph = cache_layout(self.edit_graph, *tensors)
        return lambda image: np.asarray(self._outputs(graph, image, *layout)[0])

    def _outputs(self, graph: nn.Module, *inputs: NDArray[Any]) -> list[NDArray[Any]]:
        tensors = [torch.from_numpy(np.ascontiguousarray(array)).to(self.device) for array in inputs]
        with torch.inference_mode(), full_fp32(self.precision == "fp32"):
            return [output.cpu().numpy() for output in graph(*tensors)]

    def close(self) -> None:
        """Nothing to do: the weights go with the object."""


@contextlib.contextmanager
def full_fp32(wanted: bool = True) -> Iterator[None]:
    """Without TF32, which PyTorch allows in convolutions by default and which keeps ten bits of the mantissa.

    Args:
        wanted: False leaves PyTorch's settings as they are.
    """
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    if wanted:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags


def open_torch(bundle: Bundle, device: str = "auto", precision: str = "auto") -> OpenedBackend:
    """Opens the bundle's own weights, read back from its FP32 graph, in eager PyTorch.

    Args:
        bundle: Holds the graph.
        device: auto, cpu or cuda:N.
        precision: auto or fp32.

    Raises:
        UnavailableError: PyTorch has no such device.
        UsageError: The device or precision is unknown.
        BundleError: The bundle has no FP32 graph.
    """
    if precision not in ("auto", "fp32"):
        raise UsageError(f"the torch backend computes in fp32, not {precision!r}", "leave --precision out")
    choices = []
    if device == "auto":
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
        choices.append(f"device {device}: torch.cuda.is_available() is {torch.cuda.is_available()}")
    check_device(device)
    torch.set_num_threads(min(torch.get_num_threads(), available_threads()))
    return OpenedBackend(TorchSession(bundled_generator(bundle), device), tuple(choices))


def bundled_generator(bundle: Bundle) -> Generator:
    """The generator that a bundle was made from.

    Raises:
        BundleError: No FP32 graph holds its weights.
    """
    facts = bundle.manifest.generator
    # Both FP32 graphs that edit hold the weights under the same names; a bundle may hold one of them only.
    there = {record.graph: record for record in bundle.manifest.graphs if record.precision == "fp32"}
    graph = bundle.read_graph(there.get(EDIT_ON_CPU) or bundle.graph(EDIT, "fp32"))
    config = GeneratorConfig(facts.classes, facts.width, facts.hidden, facts.modulation, facts.stages)
    return generator_from_graph(graph, config)


def generator_from_graph(graph: GraphFiles, config: GeneratorConfig) -> Generator:
    """The generator whose weights an exported `edit` graph holds, in FP32.

    Args:
        graph: Path of an ONNX file in FP32.
        config: Of the generator.

    Raises:
        BundleError: Names a weight that is missing or has another shape.
    """
    stored = {tensor.name: tensor for tensor in onnx.load_from_string(graph.content).graph.initializer}
    with torch.device("meta"):
        generator = Generator(config)
    state = {}
    for name, expected in generator.state_dict().items():
        tensor = stored.get(name) or stored.get(f"{name}.half")
        if tensor is None or tuple(tensor.dims) != tuple(expected.shape):
            raise BundleError(f"the graph holds no weight {name} of shape {tuple(expected.shape)}", "export it again")
        state[name] = torch.from_numpy(_values(tensor, graph.weights).astype(np.float32))
    generator.load_state_dict(state, assign=True)
    return generator.eval().requires_grad_(False)


def _values(tensor: onnx.TensorProto, weights: Mapping[str, bytes]) -> NDArray[Any]:
    """The values of a tensor, wherever they are kept. Raises BundleError when they are not all there."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor)
    entry = {part.key: part.value for part in tensor.external_data}
    inline = onnx.TensorProto(dims=tensor.dims, data_type=tensor.data_type)
    try:
        start, length = int(entry["offset"]), int(entry["length"])
        inline.raw_data = weights[entry["location"]][start : start + length]
        return numpy_helper.to_array(inline)
    except (KeyError, ValueError) as exc:
        raise BundleError(f"the weights file does not hold all of {tensor.name}: {exc}", "export it again") from exc
