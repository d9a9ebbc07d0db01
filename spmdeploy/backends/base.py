"""Protocol that every inference backend implements."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from spmdeploy.errors import UsageError
from spmdeploy.types import BackendPrecision, LayoutInput, ModelInput

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from spmdeploy.backends.device_pyramid import DeviceCascade
    from spmdeploy.tiling.letterbox import Letterbox
    from spmdeploy.tiling.pyramid import PyramidLevel


class Unsupported(NamedTuple):
    """What a session cannot do, and what to do about it."""

    problem: str
    hint: str


class Backend(Protocol):
    """A graph loaded on one device. Attributes describe it as opened, not as requested."""

    backend: str
    """Its name in the registry."""
    device: str
    """cpu or cuda:N."""
    precision: BackendPrecision
    """Of the arithmetic, as the library reports it."""
    provider: str
    """Who computes, as the library itself names it, with its version."""
    size: int
    """Height and width of the images that the graph takes."""
    refines: bool
    """Whether `refine` can be called: the bundle holds a `refine` graph for this device in this precision."""
    refine_unsupported: Unsupported | None
    """Why it cannot be; None where it can."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Problems that did not affect the results. May grow with use."""

    def run(self, inputs: ModelInput) -> NDArray[np.uint8]:
        """Edits a batch.

        Args:
            inputs: A batch: image (B, size, size, 3); labels, instances and mask (B, size, size).

        Returns:
            uint8 (B, size, size, 3) RGB, equal to the image bit for bit where the mask is 0.
        """

    def run_unrounded(self, inputs: ModelInput) -> NDArray[np.float32]:
        """`run` before its result is rounded: float32 (B, size, size, 3) RGB in 0..255, to be refined."""

    def refine(self, inputs: ModelInput, coarse: NDArray[np.float32]) -> NDArray[np.float32]:
        """Refines a result at twice its size: `run_unrounded`, but content and colors come from `coarse`.

        The graph is loaded at the first call.

        Args:
            inputs: A batch as for `run`; the image is read outside the mask only.
            coarse: float32 (B, size/2, size/2, 3), RGB in 0..255, the result at half size; read under the mask and one
                of its pixels around it.

        Returns:
            float32 (B, size, size, 3), RGB in 0..255.

        Raises:
            BundleError: `refines` is false.
        """

    def close(self) -> None:
        """Frees the device's memory. Safe to call twice."""


LayoutRun: TypeAlias = "Callable[[NDArray[np.uint8]], NDArray[np.uint8]]"
"""`Backend.run` for a layout that is known: takes the images, (B, size, size, 3), and returns the edited ones."""


@runtime_checkable
class SupportsLayoutCache(Protocol):
    """A session that can compute once what many images share."""

    def bind_layout(self, layout: LayoutInput) -> LayoutRun:
        """Computes now what depends on labels, instances and mask alone.

        Args:
            layout: Arrays (B, size, size).

        Returns:
            A function with the results of `run` for the same arguments; in OpenVINO rounded in other places.
        """


@runtime_checkable
class SupportsDevicePyramid(Protocol):
    """A session that can keep the image of a cascade in the memory of its GPU from one level to the next."""

    def device_cascade(self, frame: Letterbox, levels: tuple[PyramidLevel, ...], batch: int) -> DeviceCascade | None:
        """Prepares the refinement of one window; images and scores are those of the same steps on the host.

        Args:
            frame: The window in the model's input.
            levels: Of the window, the coarsest first.
            batch: Tiles at once, at most.

        Returns:
            The refinement, a context manager; None where the session is on the CPU.

        Raises:
            OutOfMemoryError: The levels do not fit beside the graphs.
            UnavailableError: The GPU cannot run it.
        """


def bind_layout(session: Backend, layout: LayoutInput) -> LayoutRun:
    """The session's function for a known layout; one that passes the layout with every image where it caches none."""
    if isinstance(session, SupportsLayoutCache):
        return session.bind_layout(layout)
    return lambda image: session.run(ModelInput(image, *layout))


@dataclass(frozen=True)
class OpenedBackend:
    """A session, and why it is this one: a line for each choice that the caller left open."""

    session: Backend
    choices: tuple[str, ...]
    notices: tuple[str, ...] = ()
    """Those of the choices that were made because something better, which is here, cannot be used."""


@dataclass(frozen=True)
class Check:
    """One capability of this machine, as `doctor` reports it."""

    name: str
    usable: bool
    reason: str
    remedy: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as `doctor --json` prints them."""
        return {"name": self.name, "usable": self.usable, "reason": self.reason, "remedy": self.remedy}


def check_device(device: str) -> None:
    """Raises UsageError unless `device` is cpu or cuda:N."""
    if device != "cpu" and not re.fullmatch(r"cuda:\d{1,2}", device):
        raise UsageError(f"unknown device {device!r}", "choose from auto, cpu, cuda:0, cuda:1, ...")
