"""What can be timed and asked about it: a backend's process, or a command that is started again and again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from spmdeploy.bench.schedule import Timeable
from spmdeploy.errors import SpmDeployError


class BackendCrashedError(SpmDeployError):
    """A backend failed in a way that nobody foresaw."""


@dataclass(frozen=True)
class FirstRun:
    """The first run of a case, before any warm-up."""

    photo: NDArray[np.uint8]
    """What the backend was given: uint8 (B, S, S, 3) RGB, as its file holds it where there is one."""
    picture: NDArray[np.uint8]
    """What it made of it."""
    seconds: float
    notes: dict[str, str | int]
    """What the editor reports of how it went about it."""


@dataclass(frozen=True)
class MemoryUsage:
    """Of the process, in bytes; None where the system does not tell."""

    ready: int | None
    """Resident when the backend was loaded and had run nothing yet."""
    peak: int | None
    """The largest resident set since the row began."""
    device: int | None
    """Held on the GPU after the row."""
    activations: int | None = None
    """What the library has for intermediate results."""
    loaded: int | None = None
    """The files of the graphs or engines that are loaded after the row: `refine` among them once it was used."""


class Measurable(Timeable, Protocol):
    """A contestant that can tell where its time and memory went."""

    def forget(self) -> None:
        """What ran so far does not count for `medians` and `memory`."""

    def medians(self) -> dict[str, float]:
        """Median milliseconds by phase."""

    def memory(self) -> MemoryUsage: ...
