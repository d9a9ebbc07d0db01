"""The HTTP application: edits, checks of uploads, samples, metrics and the pages of the studio."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartParser

from spmdeploy.assets.samples import SAMPLE_EDITS
from spmdeploy.bundle.manifest import Manifest
from spmdeploy.editing.editor import Editor
from spmdeploy.editing.report import EditReport
from spmdeploy.editing.session import Session, SessionResult, run_session, write_session
from spmdeploy.errors import InputError, OutOfMemoryError, SpmDeployError
from spmdeploy.imaging import files as images
from spmdeploy.imaging.decode import image_size
from spmdeploy.labels import check_labels, labels_from_colors
from spmdeploy.studio.docs_page import docs_page
from spmdeploy.studio.jobs import Job, JobQueue
from spmdeploy.studio.limits import Access, Guard, Limits
from spmdeploy.studio.problems import add_error_handlers, problem_of
from spmdeploy.studio.requests import (
    EDIT_BODY,
    EDIT_RESPONSES,
    FILE_BODY,
    decode_json_fields,
    responses,
    session_from_fields,
)
from spmdeploy.version import __version__

STATIC = Path(__file__).parent / "static"


class Served(NamedTuple):
    """The model behind the service."""

    editor: Editor
    manifest: Manifest


def create_app(served: Served, limits: Limits, access: Access, on_ready: Callable[[], None] = lambda: None) -> FastAPI:
    """Return the ASGI application. It closes its queue, not the editor, when the server shuts down.

    Args:
        served: the model.
        limits: what a request may ask for.
        access: who may use the service.
        on_ready: called when the server starts.
    """
    queue = JobQueue(limits.queue, limits.seconds)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        on_ready()
        yield
        await asyncio.to_thread(queue.close)

    # Uploads stay in memory: the parser would move parts of more than 1 MB into temporary files.
    MultiPartParser.spool_max_size = limits.request_bytes + 1
    app = FastAPI(
        title="spmdeploy",
        version=__version__,
        description="Semantic image editing: pixels under the mask come back showing what the labels say.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    service = _Service(served, limits, queue)
    service.add_routes(app)
    add_error_handlers(app)
    app.add_middleware(_Measured, service=service)
    app.add_middleware(Guard, limits=limits, access=access)  # the outermost: added last
    return app


class _Service:
    def __init__(self, served: Served, limits: Limits, queue: JobQueue) -> None:
        self.editor, self.manifest = served
        self.limits = limits
        self.queue = queue
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "spmdeploy_requests", "Requests by route and status.", ("route", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "spmdeploy_request_seconds", "Time to answer, by route.", ("route",), registry=self.registry
        )
        self.phases = Counter(
            "spmdeploy_edit_seconds", "Time spent in edits, by phase.", ("phase",), registry=self.registry
        )
        depth = Gauge("spmdeploy_queue_depth", "Edits that wait or run.", registry=self.registry)
        depth.set_function(lambda: float(queue.depth))
        self.last_milliseconds: float | None = None

    def add_routes(self, app: FastAPI) -> None:
        app.add_api_route("/v1/edits", self.edit, methods=["POST"], openapi_extra=EDIT_BODY, responses=EDIT_RESPONSES)
        app.add_api_route(
            "/v1/sessions",
            self.session,
            methods=["POST"],
            openapi_extra=EDIT_BODY,
            responses=responses("application/zip"),
        )
        app.add_api_route(
            "/v1/photos",
            self.check_photo,
            methods=["POST"],
            openapi_extra=FILE_BODY,
            responses=responses("application/json"),
        )
        app.add_api_route(
            "/v1/labels",
            self.check_labels,
            methods=["POST"],
            openapi_extra=FILE_BODY,
            responses=responses("application/octet-stream"),
        )
        app.add_api_route("/v1/model", self.model, methods=["GET"])
        app.add_api_route("/v1/health", self.health, methods=["GET"])
        app.add_api_route("/v1/samples", self.samples, methods=["GET"])
        app.add_api_route(
            "/v1/samples/{name}/{part}",
            self.sample,
            methods=["GET"],
            responses=responses("image/png"),
            response_class=Response,
        )
        app.add_api_route("/metrics", self.metrics, methods=["GET"], include_in_schema=False)
        app.add_api_route("/docs", lambda: docs_page(app.openapi()), methods=["GET"], include_in_schema=False)
        app.add_api_route("/", self.page, methods=["GET"], include_in_schema=False)
        app.mount("/static", StaticFiles(directory=STATIC), name="static")

    # Routes. The docstrings are what /docs and openapi.json show.

    async def edit(self, request: Request) -> Response:
        """Edit a photo.

        `image` and either `labels` or `fill`, either `mask` or `extend`. Answers with the edited photo as a PNG, with
        JSON that holds it in base64 beside the report (`Accept: application/json`), or with a line of JSON for each
        step and the same JSON at the end (`Accept: application/x-ndjson`).
        """
        accept = request.headers.get("accept", "")
        steps: asyncio.Queue[tuple[int, int]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def report(done: int, total: int) -> None:
            loop.call_soon_threadsafe(steps.put_nowait, (done, total))

        with self.queue.reserve():
            session = await self._session(request)
            job = self.queue.submit(partial(self._run, session), report)
        if "application/x-ndjson" in accept:
            return StreamingResponse(self._stream(job, steps, request), media_type="application/x-ndjson")
        result = await self._result(job, request)
        if "application/json" in accept:
            return JSONResponse(_edit_json(result))
        return Response(result.png, media_type="image/png", headers={"server-timing": _server_timing(result)})

    async def session(self, request: Request) -> Response:
        """Pack an edit into a session file, which `spmdeploy edit SESSION.zip` replays to the same bytes.

        Takes what `/v1/edits` takes; nothing is edited.
        """
        with self.queue.reserve():
            content = await asyncio.to_thread(write_session, await self._session(request))
        return Response(
            content, media_type="application/zip", headers={"content-disposition": 'attachment; filename="session.zip"'}
        )

    async def check_photo(self, request: Request) -> JSONResponse:
        """Check a photo (the body is the file) and return its size and what reading it would change."""
        name = request.headers.get("x-file-name", "photo")
        with self.queue.reserve():
            photo = await asyncio.to_thread(self._read_photo, await request.body(), name)
        return JSONResponse(
            {"width": photo.pixels.shape[1], "height": photo.pixels.shape[0], "notes": list(photo.notes)}
        )

    async def check_labels(self, request: Request, colors: bool = False) -> Response:
        """Check a label map (the body is the file) and return its ids, a byte a pixel, row by row.

        The headers `x-width` and `x-height` give the size. With `colors` the map is drawn in class colors.
        """
        name = request.headers.get("x-file-name", "labels")
        with self.queue.reserve():
            ids = await asyncio.to_thread(self._read_labels, await request.body(), name, colors)
        headers = {"x-width": str(ids.shape[1]), "x-height": str(ids.shape[0])}
        return Response(ids.tobytes(), media_type="application/octet-stream", headers=headers)

    async def model(self) -> JSONResponse:
        """Describe the model: classes, sizes, license, and where and how it runs."""
        backend = self.editor.session
        return JSONResponse(
            {
                "schema": "spmdeploy.model/1",
                "name": self.manifest.name,
                "license": self.manifest.licence,
                "classes": self.editor.classes.to_json(),
                "native_size": backend.size,
                "refines": backend.refines,
                "backend": backend.backend,
                "device": backend.device,
                "precision": backend.precision,
                "provider": backend.provider,
                "choices": list(self.editor.choices),
                "notes": list(backend.notes),
                "last_milliseconds": self.last_milliseconds,
                "limits": {
                    "request_bytes": self.limits.request_bytes,
                    "megapixels": self.limits.megapixels,
                    "queue": self.limits.queue,
                    "seconds": self.limits.seconds,
                },
                "version": __version__,
            }
        )

    async def health(self) -> JSONResponse:
        """Say that the service answers, and how many edits wait or run."""
        return JSONResponse({"status": "ok", "queue": self.queue.depth, "capacity": self.queue.capacity})

    async def samples(self) -> JSONResponse:
        """List the photos that come with the package."""
        return JSONResponse([{"name": sample.name, "title": sample.title} for sample in SAMPLE_EDITS])

    async def sample(self, name: str, part: Literal["photo", "labels", "mask"]) -> Response:
        """Return the photo, the label map (ids of the model's classes) or the mask of a sample."""
        for sample in SAMPLE_EDITS:
            if sample.name == name:
                if part == "photo":
                    return FileResponse(sample.photo, media_type="image/jpeg")
                _, labels, mask = await asyncio.to_thread(sample.read, self.editor.classes)
                content = images.encode_ids(labels if part == "labels" else mask * np.uint8(255))
                return Response(content, media_type="image/png")
        raise HTTPException(404, f"there is no sample {name!r}")

    async def metrics(self) -> Response:
        return Response(generate_latest(self.registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def page(self) -> FileResponse:
        return FileResponse(STATIC / "index.html", headers={"cache-control": "no-cache"})

    # Work in threads

    def _run(self, session: Session, progress: Callable[[int, int], None]) -> SessionResult:
        started = time.perf_counter()
        try:
            result = run_session(self.editor, session, progress)
        except MemoryError as exc:
            raise OutOfMemoryError("out of memory", "send a smaller photo") from exc
        self.last_milliseconds = round((time.perf_counter() - started) * 1000, 1)
        for phase, milliseconds in result.report.milliseconds.items():
            self.phases.labels(phase).inc(milliseconds / 1000)
        return result

    def _read_photo(self, content: bytes, name: str) -> images.Photo:
        self._check_size(content, name)
        return images.read_photo(name, content)

    def _read_labels(self, content: bytes, name: str, colors: bool) -> images.Pixels:
        self._check_size(content, name)
        classes = self.editor.classes
        if colors:
            return labels_from_colors(images.read_photo(name, content).pixels, classes, name)
        ids = images.read_labels(name, content, classes)
        check_labels(ids, classes, name)
        return ids

    def _check_sizes(self, session: Session) -> None:
        width, height = self._check_size(session.photo, session.photo_name)
        for name in ("labels", "mask", "instances"):
            content = getattr(session, name)
            if content is not None:
                self._check_size(content, name)
        if session.extend is not None:
            left, top, right, bottom = session.extend
            self._check_pixels("the extended photo", left + width + right, top + height + bottom)

    def _check_size(self, content: bytes, name: str) -> tuple[int, int]:
        width, height = image_size(name, content)
        self._check_pixels(name, width, height)
        return width, height

    def _check_pixels(self, name: str, width: int, height: int) -> None:
        if width * height > self.limits.megapixels * 1e6:
            raise InputError(
                f"{name} is {width}×{height}, {width * height / 1e6:.1f} megapixels; this service accepts "
                f"{self.limits.megapixels:g}",
                "shrink it, or start the service with a larger --max-megapixels",
            )

    # Requests

    async def _session(self, request: Request) -> Session:
        """The edit that a request asks for, from a form or JSON. Raises UsageError, InputError."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        fields: dict[str, Any]
        if kind == "application/json":
            fields = decode_json_fields(await request.body())
        elif kind == "multipart/form-data":
            async with request.form(max_files=8, max_fields=16, max_part_size=self.limits.request_bytes) as form:
                fields = {
                    name: (await value.read(), value.filename) if isinstance(value, UploadFile) else value
                    for name, value in form.items()
                }
        else:
            raise HTTPException(415, "send multipart/form-data, or application/json with files in base64")
        session = session_from_fields(fields)
        await asyncio.to_thread(self._check_sizes, session)
        return session

    async def _result(self, job: Job[SessionResult], request: Request) -> SessionResult:
        """Return what the job returns; it is canceled when the client leaves."""

        async def watch() -> None:
            while not await request.is_disconnected():
                await asyncio.sleep(0.25)
            job.cancel()

        watching = asyncio.create_task(watch())
        try:
            return await job.result
        finally:
            watching.cancel()
            _discard_error(job)

    async def _stream(
        self, job: Job[SessionResult], steps: asyncio.Queue[tuple[int, int]], request: Request
    ) -> AsyncIterator[bytes]:
        """Lines of JSON: the steps done, then the result or a problem. The job is canceled when the client leaves."""
        try:
            while not (job.result.done() and steps.empty()):
                with suppress(asyncio.TimeoutError):
                    done, total = await asyncio.wait_for(steps.get(), 0.05)
                    yield json.dumps({"done": done, "total": total}).encode() + b"\n"
                    continue
                if await request.is_disconnected():
                    return
            try:
                yield json.dumps(_edit_json(job.result.result())).encode() + b"\n"
            except SpmDeployError as exc:
                yield problem_of(exc) + b"\n"
        finally:
            job.cancel()  # without effect once it is done
            _discard_error(job)


def _discard_error(job: Job[SessionResult]) -> None:
    """Retrieve the exception of a job whose client has left, which asyncio would log as never retrieved."""
    job.result.add_done_callback(lambda result: result.cancelled() or result.exception())


def _edit_json(result: SessionResult) -> dict[str, Any]:
    return {
        "schema": "spmdeploy.service.edit/1",
        "image": base64.b64encode(result.png).decode(),
        "width": result.width,
        "height": result.height,
        "report": result.report.to_json(),
        "tiles": _tiles(result.report),
        "notes": list(result.notes),
    }


def _tiles(report: EditReport) -> list[dict[str, int]]:
    """The tiles of each window's last level, in pixels of the photo."""
    return [
        {"top": entry.window.top + tile.top, "left": entry.window.left + tile.left, "size": level.size}
        for entry in report.windows
        for level in entry.plan.levels[-1:]
        for tile in level.tiles
    ]


def _server_timing(result: SessionResult) -> str:
    return ", ".join(f"{phase};dur={value:.1f}" for phase, value in result.report.milliseconds.items())


class _Measured:
    """ASGI middleware: counts and times requests by route."""

    def __init__(self, app: Callable[..., Awaitable[None]], service: _Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def sending(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, sending)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._service.requests.labels(route, str(status)).inc()
            self._service.seconds.labels(route).observe(time.perf_counter() - started)
