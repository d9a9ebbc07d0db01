"""The command `studio`."""

from __future__ import annotations

import ipaddress
import socket
from typing import Annotated

import typer

import spmdeploy
from spmdeploy.cli.console import log, require_extra
from spmdeploy.cli.options import (
    BackendOption,
    Device,
    Model,
    PrecisionOption,
    RequireSignature,
    Url,
    device_from,
    open_editor_from_options,
)
from spmdeploy.errors import UsageError


def studio(
    model: Model = None,
    backend: BackendOption = "auto",
    device: Device = "auto",
    url: Url = None,
    precision: PrecisionOption = "auto",
    require_signature: RequireSignature = None,
    host: Annotated[str, typer.Option(help="Address to listen at; others than this machine's own need --token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8490,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="SPMDEPLOY_TOKEN",
            help="Required of every request: Authorization: Bearer TOKEN, or ?token=TOKEN once to open the page. At "
            "least 16 characters. Other users can see command lines; the environment variable is safer.",
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A further name under which clients may reach the service. Repeatable.")
    ] = None,
    max_request: Annotated[int, typer.Option(min=1, metavar="MIB", help="Largest request.")] = 128,
    max_megapixels: Annotated[float, typer.Option(min=0.1, max=200, help="Largest image, checked in its header.")] = 50,
    queue: Annotated[
        int, typer.Option(min=1, max=1024, help="Edits received, waiting or running at once; more are refused (429).")
    ] = 16,
    timeout: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="For one edit, waiting included.")] = 120,
    upload_timeout: Annotated[
        float, typer.Option(min=1, metavar="SECONDS", help="Time in which a request must arrive.")
    ] = 60,
) -> None:
    """Edit photos in a web browser; serve edits over HTTP.

    Paint what should be there and see it: the page works offline. Programs use POST /v1/edits, described at /docs.
    Uploads stay in memory. SIGTERM finishes accepted edits.
    """
    device = device_from(backend, device, url)
    access_token = _checked_token(host, token)
    with require_extra("studio"):
        from spmdeploy.studio.app import Served
        from spmdeploy.studio.limits import Access, Limits
        from spmdeploy.studio.server import serve
    from spmdeploy.bundle.bundle import open_bundle

    limits = Limits(max_request << 20, max_megapixels, queue, timeout, upload_timeout)
    names = {"localhost", host.lower(), socket.gethostname().lower(), *(name.lower() for name in allow_host or ())}
    access = Access(frozenset(names), access_token)
    manifest = open_bundle(model or spmdeploy.default_model()).manifest
    with open_editor_from_options(model, backend, device, precision, require_signature) as editor:
        serve(Served(editor, manifest), limits, access, host, port, _announce)


def _announce(url: str) -> None:
    print(url, flush=True)
    log("open this address in a browser; Ctrl+C stops the service")


def _checked_token(host: str, token: str | None) -> str | None:
    if token is not None and (len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token):
        raise UsageError(
            "the token must have at least 16 ASCII characters, without spaces",
            'SPMDEPLOY_TOKEN=$(python -c "import secrets; print(secrets.token_urlsafe())")',
        )
    if token is None and not _is_loopback(host):
        raise UsageError(
            f"other machines could reach {host}; that needs a token",
            'SPMDEPLOY_TOKEN=$(python -c "import secrets; print(secrets.token_urlsafe())") spmdeploy studio ...',
        )
    return token


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
