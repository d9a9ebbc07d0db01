"""Reads and writes objects that are named by a URL, with fsspec, in one request each."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from spmdeploy.errors import InputError, SpmDeployError, UnavailableError

SCHEMES = ("s3", "gs", "http", "https")
_READ_ONLY = ("http", "https")
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://.*", re.DOTALL)
"""A scheme of one letter is a drive of Windows."""
_PACKAGES = {"s3": ("s3fs", "storage"), "gs": ("gcsfs", "gs"), "http": ("aiohttp", "storage")}
_SECONDS = 60.0
"""Time limit for a web server that sends nothing."""
_CHUNK = 1 << 20
_SINGLE_PUT = 2 << 30
"""s3fs splits what is larger into parts. The images that can be read are smaller."""
_NO_CREDENTIALS = {
    # Of botocore and google-auth, by name: neither is imported here.
    "NoCredentialsError",
    "PartialCredentialsError",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
    "DefaultCredentialsError",
    "RefreshError",
    # Codes in answers of S3.
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
}
_UNREACHABLE = {"ClientConnectorError", "ConnectTimeoutError", "EndpointConnectionError"}


@dataclass(frozen=True)
class RemotePath(os.PathLike[str]):
    """A file or folder of a store. As text it lacks user, password and query, which may hold secrets."""

    url: str

    def __fspath__(self) -> str:
        return self.url

    def __str__(self) -> str:
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}/{self._key}" if self._key else self.url

    @property
    def scheme(self) -> str:
        """In lower case, such as "s3"."""
        return self.url.partition("://")[0].lower()

    @property
    def root(self) -> str:
        """Scheme and bucket or host."""
        scheme, _, rest = self.url.partition("://")
        return f"{scheme}://{rest.partition('/')[0]}"

    @property
    def name(self) -> str:
        """Without the escapes of a web address."""
        name = self._key.rstrip("/").rpartition("/")[2]
        return unquote(name) if self.scheme in _READ_ONLY else name

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        """With its dot; empty where the name has none."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        """The folder that contains this object; of a bucket or host, itself."""
        folder = self._key.rstrip("/").rpartition("/")[0]
        return RemotePath(f"{self.root}/{folder}" if folder else self.root)

    def __truediv__(self, relative: str) -> RemotePath:
        """Raises InputError if `relative` is absolute or leads out of the bucket or host."""
        if relative.startswith("/"):
            raise InputError(
                f"{relative!r} is a path of one machine, and {self} is not", "give a URL or a relative path"
            )
        parts = [part for part in self._key.split("/") if part]
        for part in relative.split("/"):
            if part == ".." and not parts:
                raise InputError(f"{relative!r} leads out of {self.root}", "give a whole URL")
            if part == "..":
                parts.pop()
            elif part not in ("", "."):
                parts.append(quote(part, safe="%!$&'()*+,;=:@~?") if self.scheme in _READ_ONLY else part)
        return RemotePath("/".join((self.root, *parts)))

    def check_writable(self) -> None:
        """Raises InputError if nothing can be written to this kind of store."""
        if self.scheme in _READ_ONLY:
            raise InputError(f"{self} cannot be written: {self.scheme} is for reading", "name a folder, s3:// or gs://")

    @property
    def _key(self) -> str:
        """What follows bucket or host. In a store "?" and "#" are characters like others."""
        key = self.url[len(self.root) :].lstrip("/")
        return re.split("[?#]", key)[0] if self.scheme in _READ_ONLY else key


def is_url(text: str) -> bool:
    """Whether the text has the form SCHEME://REST."""
    return _URL.fullmatch(text) is not None


def as_path(text: str) -> Path | RemotePath:
    """Return what a path or URL stands for; file:// is a path.

    Raises:
        InputError: The scheme is not supported.
    """
    if not is_url(text):
        return Path(text)
    path = RemotePath(text)
    if path.scheme == "file":
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost"):
            raise InputError(f"{text} is a file of another machine", "file:// needs three slashes: file:///folder/name")
        from urllib.request import url2pathname  # imports the HTTP client: 30 ms of every command

        return Path(url2pathname(parts.path))
    if path.scheme not in SCHEMES:
        raise InputError(f"{path} has a scheme that is not supported", f"use a path, or {', '.join(SCHEMES)}")
    return path


def read_remote(path: RemotePath, max_bytes: int) -> bytes:
    """Return the content of an object, of which at most `max_bytes` and one are requested.

    Raises:
        InputError: there is no such object, or it is larger.
        UnavailableError: the package for the store is missing, or its credentials.
    """
    with _remote_errors(path, "read"):
        store = _store(path)
        if path.scheme in _READ_ONLY:
            content = _read_web(store, path.url, max_bytes)
        else:
            content = _read_start(store, path.url, max_bytes + 1)
    if len(content) > max_bytes:
        raise InputError(f"{path} is larger than {max_bytes >> 20} MiB, the limit", "is it the right file?")
    return content


def write_remote(path: RemotePath, content: bytes, overwrite: bool = False) -> None:
    """Store an object by one request, so that it is complete at any time that it exists.

    Raises:
        InputError: it exists already and `overwrite` is not set, or the store refuses.
        UnavailableError: the package for the store is missing, or its credentials.
    """
    path.check_writable()
    with _remote_errors(path, "write"):
        options = {"chunksize": _SINGLE_PUT} if path.scheme == "s3" else {}
        _store(path).pipe_file(path.url, content, mode="overwrite" if overwrite else "create", **options)


def list_remote(folder: RemotePath) -> set[str]:
    """Return the names of all objects below a folder, relative to it. Raises as `read_remote`."""
    with _remote_errors(folder, "list"):
        start = folder.url.partition("://")[2].rstrip("/") + "/"
        return {name[len(start) :] for name in _store(folder).find(folder.url) if name.startswith(start)}


def remove_remote(paths: list[RemotePath]) -> None:
    """Delete objects. Raises as `write_remote`."""
    if paths:
        with _remote_errors(paths[0], "delete"):
            _store(paths[0]).rm([path.url for path in paths])


def check_readable(path: RemotePath) -> None:
    """Check that a store can be read from; whether the object exists, and may be read, is not checked.

    Raises:
        UnavailableError: The package for the store of `path`, its credentials or the store itself are missing.
    """
    try:
        with _remote_errors(path, "read"):
            store = _store(path)
            if path.scheme not in _READ_ONLY:
                store.info(path.url)
    except InputError:
        return


def _store(path: RemotePath) -> Any:
    """The file system of fsspec. Listings are not cached: other processes write there."""
    import fsspec

    protocol = "http" if path.scheme in _READ_ONLY else path.scheme
    options: dict[str, Any] = {}
    if protocol == "http":
        import aiohttp

        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(sock_connect=_SECONDS, sock_read=_SECONDS)}
    return fsspec.filesystem(protocol, use_listings_cache=False, **options)


def _read_start(store: Any, url: str, size: int) -> bytes:
    try:
        return bytes(store.cat_file(url, start=0, end=size))
    except OSError as exc:
        if "InvalidRange" in _codes(exc):  # the object is empty
            return b""
        raise


def _read_web(store: Any, url: str, max_bytes: int) -> bytes:
    """At most one chunk more than `max_bytes`, whatever the server says about the size."""
    content = b""
    with store.open(url, "rb", block_size=0) as stream:
        while len(content) <= max_bytes and (chunk := stream.read(_CHUNK)):
            content += chunk
    return content


@contextmanager
def _remote_errors(path: RemotePath, verb: str) -> Iterator[None]:
    package, extra = _PACKAGES["http" if path.scheme in _READ_ONLY else path.scheme]
    try:
        yield
    except SpmDeployError:
        raise
    except ImportError as exc:
        raise UnavailableError(
            f"{path.scheme}:// needs the package {package}", f'pip install "spmdeploy[{extra}]"'
        ) from exc
    except Exception as exc:  # each store has exceptions of its own
        raise _translated(exc, path, verb) from exc


def _translated(exc: Exception, path: RemotePath, verb: str) -> SpmDeployError:
    names = {type(exc).__name__, *_codes(exc)}
    if names & _NO_CREDENTIALS:
        return UnavailableError(
            f"no valid credentials for {path.root}: {exc}",
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
            if path.scheme == "s3"
            else "GOOGLE_APPLICATION_CREDENTIALS names a key file",
        )
    if names & _UNREACHABLE:
        return UnavailableError(f"{path.root} cannot be reached: {exc}", "check its name and the network")
    if "NoSuchBucket" in names:
        return InputError(f"there is no bucket {path.root}", "create it first")
    if isinstance(exc, FileNotFoundError):
        return InputError(f"there is no object {path}", "check bucket and name")
    if names & {"FileExistsError", "PreconditionFailed", "ConditionalRequestConflict"}:
        return InputError(f"{path} exists already", "choose another name, or allow it with --overwrite")
    if isinstance(exc, PermissionError):
        return InputError(f"permission to {verb} {path} is denied", "check the rights of these credentials")
    return InputError(f"cannot {verb} {path}: {type(exc).__name__}: {exc}", "try again")


def _codes(exc: BaseException) -> Iterator[str]:
    """Names of the exception's causes, and the codes of S3 in them."""
    seen: BaseException | None = exc
    while seen is not None:
        yield type(seen).__name__
        answer = getattr(seen, "response", None)
        if isinstance(answer, dict):
            yield str(answer.get("Error", {}).get("Code"))
        seen = seen.__cause__ or seen.__context__
