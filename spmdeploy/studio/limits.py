"""Limits of the service and the ASGI middleware that enforces them before a request is read."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

from spmdeploy.studio.problems import problem_json

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

TOKEN_COOKIE = "spmdeploy_token"
SECURITY_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


@dataclass(frozen=True)
class Limits:
    """What one client may ask for."""

    request_bytes: int = 128 << 20
    """Size of a request."""
    megapixels: float = 50.0
    """Size of an image, checked in its header before it is decoded, and of an extended photo."""
    queue: int = 16
    """Edits that are received, wait or run at once; more are answered with 429."""
    seconds: float = 120.0
    """Time limit of one edit, waiting included."""
    upload_seconds: float = 60.0
    """Time in which a request must have arrived completely."""


@dataclass(frozen=True)
class Access:
    """Who may use the service."""

    hosts: frozenset[str]
    """Names in the Host header that are answered, in lower case, without the port; IP addresses always are. Other names
    are refused, so that a web page cannot reach the service under a name of its own (DNS rebinding)."""
    token: str | None = None
    """Required as `Authorization: Bearer TOKEN`, or once as `?token=TOKEN`, which sets a cookie; None: not required."""


class Guard:
    """ASGI middleware: host, origin, token, size and speed of a request, and security headers of every response."""

    def __init__(self, app: App, limits: Limits, access: Access) -> None:
        self._app = app
        self._limits = limits
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        cookie = self._new_cookie(scope)
        send = _with_headers(send, SECURITY_HEADERS | ({"set-cookie": cookie} if cookie else {}))
        refusal = self._refusal(scope, headers, cookie is not None)
        if refusal is not None:
            await _respond(send, *refusal)
            return
        started = False

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, self._bounded(receive), sending)
        except _BodyError as exc:
            if not started:
                await _respond(send, exc.status, exc.problem)

    def _refusal(self, scope: Scope, headers: dict[str, str], has_cookie: bool) -> tuple[int, str] | None:
        host = headers.get("host", "").lower()
        name = _without_port(host)
        if name not in self._access.hosts and not _is_address(name):
            return (
                421,
                f"this service does not answer for the host {host[:100]!r}; start it with --allow-host to add one",
            )
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host:
            return 403, f"requests from pages of {origin[:100]!r} are refused"
        if headers.get("sec-fetch-site") == "cross-site" and scope["method"] != "GET":
            return 403, "requests from pages of other sites are refused"
        if self._access.token is not None and not has_cookie and not self._is_authorized(headers):
            return 401, "a token is required: send Authorization: Bearer TOKEN, or open the page with ?token=TOKEN"
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdecimal()):
            return 400, "Content-Length is not a number"
        if int(length) > self._limits.request_bytes:
            return 413, f"the request has {length} bytes; at most {self._limits.request_bytes} are accepted"
        return None

    def _is_authorized(self, headers: dict[str, str]) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self._matches(given.strip()):
            return True
        try:
            cookies = SimpleCookie(headers.get("cookie", ""))
        except CookieError:
            return False
        return TOKEN_COOKIE in cookies and self._matches(cookies[TOKEN_COOKIE].value)

    def _matches(self, given: str) -> bool:
        assert self._access.token is not None
        return hmac.compare_digest(given.encode(), self._access.token.encode())

    def _new_cookie(self, scope: Scope) -> str | None:
        """A cookie for a page that is opened with the right token in its address."""
        if self._access.token is None or scope["path"] != "/":
            return None
        (given,) = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[:1]
        if not self._matches(given):
            return None
        return f"{TOKEN_COOKIE}={self._access.token}; HttpOnly; SameSite=Strict; Path=/"

    def _bounded(self, receive: Receive) -> Receive:
        """`receive`, which raises on bodies that are too large or too slow."""
        total, complete = 0, False
        deadline = time.monotonic() + self._limits.upload_seconds

        async def bounded() -> MutableMapping[str, Any]:
            nonlocal total, complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(deadline - time.monotonic(), 0))
            except asyncio.TimeoutError:
                seconds = self._limits.upload_seconds
                raise _BodyError(408, f"the request did not arrive within {seconds:g} seconds") from None
            if message["type"] == "http.request":
                total += len(message.get("body", b""))
                complete = not message.get("more_body", False)
                if total > self._limits.request_bytes:
                    limit = self._limits.request_bytes
                    raise _BodyError(413, f"the request has more than {limit} bytes, which is the limit")
            return message

        return bounded


class _BodyError(Exception):
    def __init__(self, status: int, problem: str) -> None:
        super().__init__(problem)
        self.status = status
        self.problem = problem


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


def _with_headers(send: Send, headers: dict[str, str]) -> Send:
    extra = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]

    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *extra]}
        await send(message)

    return sending


async def _respond(send: Send, status: int, problem: str) -> None:
    body = problem_json(status, problem)
    headers = [(b"content-type", b"application/problem+json"), (b"content-length", str(len(body)).encode())]
    if status in (408, 413):
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
