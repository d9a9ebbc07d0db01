"""Load, slow and vanishing clients, and the end of the service, over real sockets."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from spmdeploy.assets.samples import SAMPLE_EDITS
from spmdeploy.studio import server
from spmdeploy.studio.app import Served
from spmdeploy.studio.limits import Limits
from tests.studio.conftest import Files, Painter, running, wait_until

httpx = pytest.importorskip("httpx", reason="the client of the tests is httpx")


def connect(url: str) -> socket.socket:
    address = urlsplit(url)
    return socket.create_connection((address.hostname, address.port), timeout=20)


def post_edit(url: str, files: Files, **options: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/edits", files=files.form(**options), timeout=20, trust_env=False)


def queued(url: str) -> int:
    return httpx.get(f"{url}/v1/health", trust_env=False).json()["queue"]


def test_full_queue_is_answered_with_429_and_retry_after(served: Served, files: Files, painter: Painter) -> None:
    painter.gate.clear()
    with running(served, Limits(queue=2)) as url, ThreadPoolExecutor(2) as pool:
        accepted = [pool.submit(post_edit, url, files) for _ in range(2)]
        wait_until(lambda: queued(url) == 2)
        refused = post_edit(url, files)
        painter.gate.set()
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert [one.result().status_code for one in accepted] == [200, 200]
        assert queued(url) == 0


def test_client_that_leaves_cancels_its_waiting_edit(served: Served, files: Files, painter: Painter) -> None:
    painter.gate.clear()
    with running(served) as url, ThreadPoolExecutor(1) as pool:
        first = pool.submit(post_edit, url, files)
        wait_until(lambda: painter.calls == 1)
        for accept in ("image/png", "application/x-ndjson"):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(
                    f"{url}/v1/edits", files=files.form(), headers={"accept": accept}, timeout=0.5, trust_env=False
                ).read()
        wait_until(lambda: queued(url) == 1)
        painter.gate.set()
        assert first.result().status_code == 200
        assert post_edit(url, files).status_code == 200
    assert painter.calls == 2


def test_edit_that_takes_too_long_ends_with_503(served: Served, files: Files, painter: Painter) -> None:
    painter.gate.clear()
    with running(served, Limits(seconds=0.2)) as url, ThreadPoolExecutor(1) as pool:
        slow = pool.submit(post_edit, url, files)
        wait_until(lambda: painter.calls == 1)
        time.sleep(0.3)
        painter.gate.set()
        assert slow.result().status_code == 503 and "took longer" in slow.result().json()["detail"]


def test_slow_body_ends_with_408(served: Served) -> None:
    with running(served, Limits(upload_seconds=0.5)) as url, connect(url) as client:
        client.sendall(b"POST /v1/edits HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        client.sendall(b'Content-Length: 1000\r\n\r\n{"image"')
        for _ in range(2):  # a byte now and then does not prolong it
            time.sleep(0.2)
            client.sendall(b" ")
        assert b" 408 " in client.recv(1000)
        assert queued(url) == 0


def test_slow_header_is_cut_off(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEADER_SECONDS", 0.2)
    with running(served) as url, connect(url) as client:
        client.sendall(b"GET / HTTP/1.1\r\nX-A: ")
        started = time.monotonic()
        assert client.recv(100) == b"" and time.monotonic() - started < 5


def test_body_that_breaks_off_leaves_no_edit_behind(served: Served, painter: Painter) -> None:
    with running(served) as url:
        with connect(url) as client:
            client.sendall(b"POST /v1/edits HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
            client.sendall(b"Content-Length: 1000\r\n\r\n{")
            wait_until(lambda: queued(url) == 1)
        wait_until(lambda: queued(url) == 0)
    assert painter.calls == 0


@pytest.mark.parametrize("junk", [b"\0\xff\r\n\r\n", b"GET / HTTP/1.1\r\nHost\r\n\r\n"])
def test_malformed_http_is_answered_with_400(served: Served, junk: bytes) -> None:
    with running(served) as url:
        with connect(url) as client:
            client.sendall(junk)
            assert b" 400 " in client.recv(1000)
        assert queued(url) == 0


def test_shutdown_finishes_what_was_accepted(served: Served, files: Files, painter: Painter) -> None:
    painter.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        with running(served) as url:
            accepted = [pool.submit(post_edit, url, files) for _ in range(2)]
            wait_until(lambda: queued(url) == 2)
            threading.Timer(0.5, painter.gate.set).start()
        assert [one.result().status_code for one in accepted] == [200, 200]


@pytest.mark.skipif(os.name != "posix", reason="SIGTERM is of POSIX")
def test_command_serves_the_built_in_model_and_ends_on_sigterm(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "spmdeploy", "studio", "--port", "0", "--backend", "onnxruntime"]
    sample = SAMPLE_EDITS[0]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            files = {"image": sample.photo.read_bytes(), "mask": sample.mask.read_bytes()}

            def edit() -> httpx.Response:
                return httpx.post(f"{url}v1/edits", files=files, data={"fill": "road"}, timeout=60, trust_env=False)

            with ThreadPoolExecutor(1) as pool:
                pending = pool.submit(edit)
                wait_until(lambda: queued(url.rstrip("/")) == 1)
                process.send_signal(signal.SIGTERM)
                answer = pending.result()
            assert process.wait(60) in (0, -signal.SIGTERM)
        finally:
            process.kill()
    assert answer.status_code == 200
    output = tmp_path / "edited.png"
    edit_command = [sys.executable, "-m", "spmdeploy", "edit", sample.photo, "--backend", "onnxruntime"]
    edit_command += ["--mask", sample.mask, "--fill", "road", "-o", output]
    subprocess.run(edit_command, check=True, capture_output=True)
    assert output.read_bytes() == answer.content


def test_command_needs_a_token_for_other_machines() -> None:
    command = [sys.executable, "-m", "spmdeploy", "studio", "--host"]
    environment = {name: value for name, value in os.environ.items() if name != "SPMDEPLOY_TOKEN"}
    done = subprocess.run([*command, "0.0.0.0"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2 and "that needs a token" in done.stderr
    environment["SPMDEPLOY_TOKEN"] = "short"
    done = subprocess.run([*command, "0.0.0.0"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2 and "16 ASCII characters" in done.stderr


def test_command_taken_port_is_an_error_of_the_environment() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [sys.executable, "-m", "spmdeploy", "studio", "--port", str(taken.getsockname()[1])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 4 and "cannot listen at 127.0.0.1 port" in done.stderr


def test_openapi_document_names_every_field(served: Served) -> None:
    with running(served) as url:
        document = json.loads(httpx.get(f"{url}/openapi.json", trust_env=False).text)
    body = document["paths"]["/v1/edits"]["post"]["requestBody"]["content"]
    assert set(body) == {"multipart/form-data", "application/json"}
    assert {"image", "labels", "fill", "mask", "extend", "dilate"} <= set(
        body["application/json"]["schema"]["properties"]
    )
