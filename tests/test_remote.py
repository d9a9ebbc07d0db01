"""URLs: how they are joined and shown, and reading and writing S3 and web servers on loopback."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from spmdeploy.errors import InputError, UnavailableError
from spmdeploy.inputs import read_input
from spmdeploy.remote import RemotePath, as_path, check_readable, list_remote, read_remote, remove_remote, write_remote

SIGNED = "https://user:secret@host.example/photos/a%20b.png?X-Amz-Signature=secret"


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of a web server, and the folder that it serves."""
    folder = tmp_path_factory.mktemp("web")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("folder", "relative", "joined"),
    [
        ("s3://b", "x/y.png", "s3://b/x/y.png"),
        ("s3://b/k/", "./y?.png", "s3://b/k/y?.png"),
        ("s3://b/k/m", "../y.png", "s3://b/k/y.png"),
        ("http://h:80/k", "a b#.png", "http://h:80/k/a%20b%23.png"),
    ],
)
def test_remote_path_joined_stays_below_its_root(folder: str, relative: str, joined: str) -> None:
    assert (RemotePath(folder) / relative).url == joined


@pytest.mark.parametrize("relative", ["/x.png", "../../x.png"])
def test_remote_path_joined_out_of_its_root_is_refused(relative: str) -> None:
    with pytest.raises(InputError):
        RemotePath("s3://b/k") / relative


def test_remote_path_hides_secrets_in_messages_only() -> None:
    path = as_path(SIGNED)
    assert str(path) == "https://host.example/photos/a%20b.png" and os.fspath(path) == SIGNED
    assert isinstance(path, RemotePath) and (path.name, path.stem, path.suffix) == ("a b.png", "a b", ".png")
    assert path.parent.url == "https://user:secret@host.example/photos"


def test_as_path_file_url_is_a_path_and_other_schemes_are_refused() -> None:
    assert as_path("file:///a%20b/c.png") == Path("/a b/c.png")
    assert as_path("c:/x") == Path("c:/x")
    for text in ("ftp://h/x", "file://other/x"):
        with pytest.raises(InputError):
            as_path(text)


def test_store_objects_are_written_listed_read_and_removed(s3: str) -> None:
    folder = RemotePath(f"{s3}/objects")
    path = folder / "x/a#b?.png"
    write_remote(path, b"12345")
    write_remote(folder / "empty", b"")
    assert list_remote(folder) == {"x/a#b?.png", "empty"}
    assert read_input(path, 5) == b"12345" and read_input(folder / "empty", 5) == b""
    with pytest.raises(InputError, match="larger than"):
        read_remote(path, 4)
    with pytest.raises(InputError, match="exists already"):
        write_remote(path, b"other")
    assert read_remote(path, 9) == b"12345"
    write_remote(path, b"other", overwrite=True)
    assert read_remote(path, 9) == b"other"
    remove_remote([path, folder / "empty"])
    assert list_remote(folder) == set()
    with pytest.raises(InputError, match="there is no object"):
        read_remote(path, 9)
    with pytest.raises(InputError, match="there is no bucket"):
        write_remote(RemotePath("s3://no-such-bucket/x"), b"")


def test_store_without_credentials_is_unavailable(s3: str) -> None:
    code = (
        "from spmdeploy.remote import *\n"
        "try: check_readable(RemotePath('s3://bucket/x'))\n"
        "except Exception as exc: print(type(exc).__name__, exc)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_A", "AWS_S"))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("UnavailableError no valid credentials for s3://bucket")


def test_web_files_are_read_up_to_the_limit_and_never_written(web: tuple[str, Path]) -> None:
    pytest.importorskip("aiohttp")
    pytest.importorskip("fsspec")
    address, folder = web
    (folder / "a b.bin").write_bytes(b"x" * 100)
    path = RemotePath(address) / "a b.bin"
    assert read_input(path, 100) == b"x" * 100
    check_readable(path)
    for action, problem in (
        (lambda: read_remote(path, 99), "larger than"),
        (lambda: read_remote(path.parent / "none", 99), "there is no object"),
        (lambda: write_remote(path, b""), "cannot be written"),
    ):
        with pytest.raises(InputError, match=problem):
            action()
    with pytest.raises(UnavailableError, match="cannot be reached"):
        read_remote(RemotePath("http://127.0.0.1:1/x"), 9)


def test_store_without_its_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(UnavailableError, match="s3:// needs the package s3fs") as raised:
        check_readable(RemotePath("s3://b/x"))
    assert raised.value.hint == 'pip install "spmdeploy[storage]"'
