"""How the networks of a run are executed: device, memory format, bfloat16 and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from spmdeploy.errors import UnavailableError, UsageError
from spmdeploy.model.layout import LayoutPyramid
from spmdeploy.training.config import TrainConfig

Network = TypeVar("Network", bound=nn.Module)


class Execution:
    """Places and runs networks as configured.

    Args:
        config: Its `compile`, `channels_last` and `bf16` apply.
        device: Of this process.

    Raises:
        UsageError: The options exclude each other on this device.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        if config.compile and config.channels_last and device.type == "cpu":
            # torch 2.13: the backward of replicate padding returns another memory format than the compiler expects.
            raise UsageError("compile and channels_last exclude each other on a CPU", "leave one of them out")
        self._device = device
        self._compile, self._bf16 = config.compile, config.bf16
        self._memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self._compiled: dict[nn.Module, Callable[..., Tensor]] = {}

    def run(self, network: nn.Module, image: Tensor, layout: LayoutPyramid) -> Tensor:
        """Runs a network; with `compile` through torch.compile, which compiles it at the first call.

        Raises:
            UnavailableError: torch.compile does not work on this machine.
        """
        if not self._compile:
            output: Tensor = network(self.reorder(image), layout)
            return output
        if network not in self._compiled:
            # Static shapes: code for any batch size may round differently from what a resumed run compiles for its own.
            # On a CPU the compiler must keep memory formats, see `__init__`.
            untouched: dict[str, str | int | bool | Callable[..., Any]] = {"layout_optimization": False}
            options = untouched if self._device.type == "cpu" else None
            self._compiled[network] = torch.compile(network, dynamic=False, options=options)
        try:
            return self._compiled[network](self.reorder(image), layout)
        except torch._dynamo.exc.BackendCompilerFailed as exc:
            reason = " ".join(str(exc).split())[:200]
            raise UnavailableError(
                f"torch.compile does not work here: {reason}",
                "it needs a C++ compiler, on a GPU also Triton; or leave compile out",
            ) from exc

    def place(self, network: Network) -> Network:
        """Moves a network to the device, in the memory format of the run."""
        network.to(self._device)
        network.to(memory_format=self._memory_format)  # type: ignore[call-overload]  # missing from torch's stubs
        return network

    def reorder(self, image: Tensor) -> Tensor:
        """An image, (N, C, H, W), in the memory format of the run."""
        return image.contiguous(memory_format=self._memory_format)

    def autocast(self) -> torch.autocast:
        """The context in which networks compute in bfloat16, where the run does."""
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16)
