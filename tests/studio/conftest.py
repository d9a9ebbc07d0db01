"""A service on a fake backend, in this process or behind a socket."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import spmdeploy
from spmdeploy.backends.base import Unsupported
from spmdeploy.bundle.bundle import open_bundle
from spmdeploy.editing.editor import Editor
from spmdeploy.labels import class_table
from spmdeploy.types import ModelInput

pytest.importorskip("fastapi", reason="the extra [studio] is not installed")
import uvicorn

from spmdeploy.studio.app import Served, create_app
from spmdeploy.studio.limits import Access, Limits
from spmdeploy.studio.server import _Protocol

LOCAL = Access(frozenset({"localhost"}))


@dataclass
class Painter:
    """A backend that paints every class in a gray of its own. Waits for `gate` before each call."""

    gate: threading.Event = field(default_factory=threading.Event)
    calls: int = 0
    failure: BaseException | None = None
    backend: str = "onnxruntime"
    device: str = "cpu"
    precision: str = "fp32"
    provider: str = "painter"
    size: int = 256
    refines: bool = False
    refine_unsupported: Unsupported | None = field(
        default=Unsupported("the model has no refine graph", "export it again")
    )
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.gate.set()

    def run(self, inputs: ModelInput) -> NDArray[np.uint8]:
        self.calls += 1
        assert self.gate.wait(20)
        if self.failure is not None:
            raise self.failure
        color = (inputs.labels * np.uint8(20) + np.uint8(10))[..., None]
        return np.where(inputs.mask[..., None] != 0, color, inputs.image)

    def run_unrounded(self, inputs: ModelInput) -> NDArray[np.float32]:
        return self.run(inputs).astype(np.float32)

    def refine(self, inputs: ModelInput, coarse: NDArray[np.float32]) -> NDArray[np.float32]:
        return self.run_unrounded(inputs)

    def close(self) -> None:
        pass


@pytest.fixture
def painter() -> Painter:
    return Painter()


@pytest.fixture
def served(painter: Painter) -> Served:
    manifest = open_bundle(spmdeploy.default_model()).manifest
    return Served(Editor(painter, class_table("street")), manifest)  # type: ignore[arg-type]


def png(pixels: NDArray[Any]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@dataclass(frozen=True)
class Files:
    photo: bytes
    labels: bytes
    mask: bytes

    def form(self, **changes: Any) -> dict[str, Any]:
        parts = {"image": self.photo, "labels": self.labels, "mask": self.mask} | changes
        return {
            name: (f"{name}.png", value) if isinstance(value, bytes) else (None, value)
            for name, value in parts.items()
            if value is not None
        }


@pytest.fixture
def files() -> Files:
    random = np.random.default_rng(3)
    mask = np.zeros((40, 60), np.uint8)
    mask[10:20, 10:30] = 255
    photo = random.integers(0, 256, (40, 60, 3), np.uint8)
    return Files(png(photo), png(np.full((40, 60), 5, np.uint8)), png(mask))


@contextmanager
def running(served: Served, limits: Limits = Limits(), access: Access = LOCAL) -> Iterator[str]:  # noqa: B008
    """The URL of the service on a free port of this machine."""
    ready = threading.Event()
    config = uvicorn.Config(
        create_app(served, limits, access, ready.set), port=0, http=_Protocol, ws="none", log_level="warning"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    wait_until(lambda: server.started or not thread.is_alive())
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.01)
