"""Runs the HTTP application with uvicorn on one address until a signal stops it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from spmdeploy.errors import UnavailableError
from spmdeploy.studio.app import Served, create_app
from spmdeploy.studio.limits import Access, Limits

HEADER_SECONDS = 10.0
MAX_CONNECTIONS = 512


def serve(
    served: Served, limits: Limits, access: Access, host: str, port: int, on_ready: Callable[[str], None]
) -> None:
    """Answer requests until SIGINT or SIGTERM; accepted edits are finished then.

    Args:
        served: the model; its editor stays open.
        limits: what a request may ask for.
        access: who may use the service.
        host: name or address to listen at.
        port: 0 for any that is free.
        on_ready: called with the URL once requests are answered.

    Raises:
        UnavailableError: the address cannot be listened at.
    """
    listener = _listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{listener.getsockname()[1]}/"
    config = uvicorn.Config(
        create_app(served, limits, access, lambda: on_ready(url)),
        http=_Protocol,
        ws="none",
        lifespan="on",
        log_level="warning",
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=round(limits.seconds + limits.upload_seconds) + 1,
    )
    uvicorn.Server(config).run([listener])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError, UnicodeError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise UnavailableError(f"cannot listen at {host} port {port}: {reason}", "choose another --port") from exc
    return listener


class _Protocol(H11Protocol):
    """Closes connections whose next request has not begun, or has not sent all of its headers, within a time limit.

    uvicorn 0.54 has no such limit: a client that sends a header every few seconds would keep its connection for ever.
    """

    _idle_cycle: object = None
    _idle_check: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._idle_check = self.loop.call_later(HEADER_SECONDS, self._close_if_idle, True)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._idle_check is not None:
            self._idle_check.cancel()
        super().connection_lost(exc)

    def _close_if_idle(self, was_idle: bool) -> None:
        idle = self.cycle is None or self.cycle.response_complete
        if idle and was_idle and self.cycle is self._idle_cycle:
            self.transport.close()
            return
        self._idle_cycle = self.cycle
        self._idle_check = self.loop.call_later(HEADER_SECONDS, self._close_if_idle, idle)
