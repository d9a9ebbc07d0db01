"""Answers failed requests with problem documents in JSON (RFC 9457)."""

from __future__ import annotations

import json

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from spmdeploy.errors import InputError, OutOfMemoryError, SpmDeployError, UnavailableError, UsageError
from spmdeploy.studio.jobs import ClientGoneError, QueueFullError, ShuttingDownError, TimeLimitError
from spmdeploy.studio.requests import PROBLEM

_CODES = {
    1: "error",
    2: "usage",
    4: "environment",
    5: "verification",
    6: "bundle",
    7: "invalid_input",
    8: "out_of_memory",
}


_STATUSES: tuple[tuple[type[SpmDeployError], int], ...] = (
    (QueueFullError, 429),
    (ClientGoneError, 499),
    (ShuttingDownError, 503),
    (TimeLimitError, 503),
    (InputError, 400),
    (UsageError, 400),
    (OutOfMemoryError, 503),
    (UnavailableError, 503),
)


def problem_of(exc: SpmDeployError) -> bytes:
    """The problem document of an error."""
    return problem_json(status_of(exc), exc.problem, exc.hint, _CODES.get(exc.exit_code))


def status_of(exc: SpmDeployError) -> int:
    """The HTTP status of an error."""
    return next((status for kind, status in _STATUSES if isinstance(exc, kind)), 500)


def add_error_handlers(app: FastAPI) -> None:
    """Let the application answer every error with a problem document."""

    async def ours(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, SpmDeployError)
        headers = {"retry-after": "1"} if isinstance(exc, QueueFullError) else None
        return Response(problem_of(exc), status_of(exc), headers, PROBLEM)

    async def http(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, HTTPException)
        return Response(problem_json(exc.status_code, str(exc.detail)), exc.status_code, exc.headers, PROBLEM)

    async def invalid(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, RequestValidationError)
        first = exc.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return Response(problem_json(422, f"{where}: {first['msg']}"), 422, None, PROBLEM)

    async def multipart(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, MultiPartException)
        return Response(problem_json(400, f"the form cannot be read: {exc.message}"), 400, None, PROBLEM)

    async def unexpected(request: Request, exc: Exception) -> Response:
        problem = problem_json(500, f"{type(exc).__name__}: {exc}", "this is a defect; the log has details", _CODES[1])
        return Response(problem, 500, None, PROBLEM)

    app.add_exception_handler(Exception, unexpected)
    app.add_exception_handler(SpmDeployError, ours)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(MultiPartException, multipart)


def problem_json(status: int, detail: str, hint: str | None = None, code: str | None = None) -> bytes:
    """A problem document in JSON (RFC 9457).

    Args:
        status: The HTTP status.
        detail: What is wrong.
        hint: What to do about it.
        code: The name of the exit code that the command line would end with.
    """
    document = {"type": "about:blank", "status": status, "detail": detail, "hint": hint, "code": code}
    return json.dumps({name: value for name, value in document.items() if value is not None}).encode()
