"""Sends edits to a Triton Inference Server, or to several that share the work, over gRPC.

Served are the models that `spmdeploy export-triton` writes: NAME with the `edit` graph, NAME_refine with the `refine`
graph. Each image of a batch is a request of its own; all are in flight at once, and the server groups those that arrive
together. There is no fallback: what a server cannot do ends the edit.
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spmdeploy.backends.base import Check, OpenedBackend, Unsupported
from spmdeploy.bundle.bundle import Bundle
from spmdeploy.bundle.manifest import EDIT, ON_CPU, REFINE
from spmdeploy.errors import BundleError, UnavailableError, UsageError
from spmdeploy.serialization import shorten
from spmdeploy.types import BackendPrecision, ModelInput, Precision

URL_HINT = "give --url HOST:PORT, HOST:PORT,HOST:PORT for several servers, or HOST:PORT/MODEL"
OPEN_SECONDS = 10.0
"""Time limit for each question while a session is opened."""
RUN_SECONDS = 120.0
"""Time limit for each edit, its wait in the server's queue included."""
MAX_IN_FLIGHT = 64
"""Requests of a session at once, over all servers."""
GRAPH, PRECISION, CONTENT = "spmdeploy_graph", "spmdeploy_precision", "spmdeploy_sha256"
"""Parameters of a served model: what it computes, as `export-triton` writes them."""
_TYPES = {"uint8": "UINT8", "int32": "INT32", "float32": "FP32"}
_ADDRESS = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):(\d{1,5})")


def open_triton(bundle: Bundle, url: str, precision: str) -> OpenedBackend:
    """Connect to the servers and check that their models are those of the bundle.

    Args:
        bundle: What the servers are compared with; its graphs are not loaded.
        url: HOST:PORT, several separated by commas, then optionally /MODEL; without it the model is named like the
            bundle. A name that stands for several addresses, as of a headless service of Kubernetes, is as many
            servers.
        precision: auto (that of the served model), or a precision, which the served model must have.

    Raises:
        UsageError: The URL has another form.
        UnavailableError: A server cannot be reached, lacks the model, or has one of another bundle or precision. The
            message names URL, model and reason.
    """
    addresses, model = parse_url(url)
    session = TritonSession(bundle, url, addresses, model or bundle.manifest.name)
    if precision not in ("auto", session.precision):
        session.close()
        raise UnavailableError(
            f"Triton server {url}, model {session.model}: computes in {session.precision}, not in {precision}",
            f"leave --precision out, or serve another model: spmdeploy export-triton --precision {precision}",
        )
    chosen = (f"precision {session.precision}: that of the served model",) if precision == "auto" else ()
    servers = (f"servers {', '.join(session.addresses)}",) if len(session.addresses) > 1 else ()
    return OpenedBackend(session, (*servers, *chosen))


def parse_url(url: str) -> tuple[tuple[str, ...], str | None]:
    """Return the addresses, each HOST:PORT, and the model if one is named. Raises UsageError."""
    places, slash, model = url.partition("/")
    addresses = tuple(places.split(","))
    for address in addresses:
        found = _ADDRESS.fullmatch(address)
        if found is None or not 0 < int(found[2]) < 65536:
            raise UsageError(f"{url!r} is no address of a Triton server", URL_HINT)
    if slash and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", model):
        raise UsageError(f"{url!r} names no model behind the /", URL_HINT)
    return addresses, model or None


def check_triton(bundle: Bundle, url: str) -> Check:
    """Report whether the servers are there and have the bundle's models."""
    name = f"triton {url}"
    try:
        session = open_triton(bundle, url, "auto").session
    except UnavailableError as exc:
        return Check(name, False, exc.problem, exc.hint)
    session.close()
    lacking = session.refine_unsupported
    refine = "" if lacking is None else f"; large windows are not refined: {lacking.problem}"
    return Check(name, True, f"{session.provider}, {session.precision}{refine}")


@dataclass(frozen=True)
class _ServedModel:
    """What the configuration of a model says."""

    graph: str
    precision: Precision
    backend: str
    """Name of Triton's backend."""


class TritonSession:
    """The bundle's models on one or several servers; may be used from several threads at once."""

    backend = "triton"
    notes: tuple[str, ...] = ()

    def __init__(self, bundle: Bundle, url: str, addresses: tuple[str, ...], model: str) -> None:
        """See `open_triton`."""
        self.device, self.model = url, model
        self.size = bundle.manifest.native_size
        self._lock = threading.Lock()
        self._servers = [_Server(one, url) for address in addresses for one in _resolve(address, url)]
        self._pool: ThreadPoolExecutor | None = ThreadPoolExecutor(MAX_IN_FLIGHT, "spmdeploy triton")
        try:
            versions = dict.fromkeys(server.version() for server in self._servers)
            served = [server.served_model(bundle, model, EDIT) for server in self._servers]
            found = [server.served_model(bundle, self._refine_model, REFINE, True) for server in self._servers]
        except BaseException:
            self.close()
            raise
        edits = [one for one in served if one is not None]
        self.precision: BackendPrecision = edits[0].precision
        for server, one in zip(self._servers, edits, strict=True):
            self._check_precision(server, model, one)
        for server, other in zip(self._servers, found, strict=True):
            if other is not None:
                self._check_precision(server, self._refine_model, other)
        kinds = dict.fromkeys(one.backend for one in edits)
        self.provider = f"Triton {', '.join(versions)} ({', '.join(kinds)}, model {model})"
        lacking = [server.address for server, other in zip(self._servers, found, strict=True) if other is None]
        self.refines = not lacking
        problem = f"the server {', '.join(lacking)} has no model {self._refine_model}"
        hint = f"serve it too: spmdeploy export-triton --graph refine --name {self._refine_model}"
        self.refine_unsupported = Unsupported(problem, hint) if lacking else None

    @property
    def addresses(self) -> tuple[str, ...]:
        """Of the servers, as numbers."""
        return tuple(server.address for server in self._servers)

    @property
    def _refine_model(self) -> str:
        return f"{self.model}_{REFINE}"

    def run(self, inputs: ModelInput) -> NDArray[np.uint8]:
        edited: NDArray[np.uint8] = self._infer(self.model, inputs._asdict(), "edited", np.dtype(np.uint8))
        return edited

    def run_unrounded(self, inputs: ModelInput) -> NDArray[np.float32]:
        unrounded: NDArray[np.float32] = self._infer(self.model, inputs._asdict(), "unrounded", np.dtype(np.float32))
        return unrounded

    def refine(self, inputs: ModelInput, coarse: NDArray[np.float32]) -> NDArray[np.float32]:
        if self.refine_unsupported is not None:
            raise BundleError(*self.refine_unsupported)
        tensors = {**inputs._asdict(), "coarse": coarse}
        refined: NDArray[np.float32] = self._infer(self._refine_model, tensors, "unrounded", np.dtype(np.float32))
        return refined

    def close(self) -> None:
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(cancel_futures=True)
            for server in self._servers:
                server.close()

    def _check_precision(self, server: _Server, model: str, served: _ServedModel) -> None:
        if served.precision != self.precision:
            self.close()
            raise server.error(
                model, f"computes in {served.precision}, other models in {self.precision}", "serve all in one precision"
            )

    def _infer(self, model: str, inputs: Mapping[str, NDArray[Any]], output: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        """One output for a batch, requested image by image."""
        pool = self._pool
        if pool is None:
            raise UnavailableError("the session was closed", "open another")
        shape = (1, self.size, self.size, 3)

        def one(index: int) -> NDArray[Any]:
            tensors = {name: np.ascontiguousarray(array[index : index + 1]) for name, array in inputs.items()}
            with self._least_busy() as server:
                return server.infer(model, tensors, output, shape, dtype)

        requests = [pool.submit(partial(one, index)) for index in range(len(inputs["image"]))]
        try:
            return np.concatenate([request.result() for request in requests])
        finally:  # after a failure
            for request in requests:
                request.cancel()

    @contextmanager
    def _least_busy(self) -> Iterator[_Server]:
        with self._lock:
            server = min(self._servers, key=lambda one: one.in_flight)
            server.in_flight += 1
        try:
            yield server
        finally:
            with self._lock:
                server.in_flight -= 1


class _Server:
    """A connection to one server."""

    def __init__(self, address: str, url: str) -> None:
        """address: HOST:PORT, HOST as numbers. url: as given, for messages."""
        import tritonclient.grpc

        self._library = tritonclient.grpc
        self.address, self._url = address, url
        self.in_flight = 0
        self._client = self._library.InferenceServerClient(address)

    def version(self) -> str:
        """Of the server. Raises UnavailableError if it cannot be reached."""
        with self._translated_errors(None, OPEN_SECONDS):
            return str(self._client.get_server_metadata(client_timeout=OPEN_SECONDS).version)

    def served_model(self, bundle: Bundle, model: str, graph: str, optional: bool = False) -> _ServedModel | None:
        """Read what a model computes and check that it is the bundle's graph; None if there is none and it may lack.

        graph: EDIT or REFINE. Raises UnavailableError.
        """
        with self._translated_errors(model, OPEN_SECONDS):
            if optional and not self._is_ready(model):
                return None
            config = self._client.get_model_config(model, client_timeout=OPEN_SECONDS).config
        facts = {key: value.string_value for key, value in config.parameters.items()}
        again = "serve the bundle's: spmdeploy export-triton BUNDLE REPOSITORY"
        if GRAPH not in facts:
            raise self.error(model, "was not written by spmdeploy export-triton of this version", again)
        if facts[GRAPH] not in (graph, ON_CPU[graph]):
            raise self.error(model, f"has the graph {shorten(facts[GRAPH])}, not {graph}", again)
        for record in bundle.manifest.graphs:
            if (record.graph, record.precision) == (facts[GRAPH], facts.get(PRECISION)):
                if bundle.graph_digests(record) == facts.get(CONTENT):
                    return _ServedModel(record.graph, record.precision, config.backend)
                break
        raise self.error(model, f"is not of the bundle {bundle.path.name}: other graph or weights", again)

    def infer(
        self, model: str, inputs: Mapping[str, NDArray[Any]], output: str, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> NDArray[Any]:
        """Run one request and return one output, which must have this shape and dtype. Raises UnavailableError."""
        tensors = []
        for name, array in inputs.items():
            tensor = self._library.InferInput(name, list(array.shape), _TYPES[array.dtype.name])
            tensors.append(tensor.set_data_from_numpy(array))
        wanted = [self._library.InferRequestedOutput(output)]
        with self._translated_errors(model, RUN_SECONDS):
            result = self._client.infer(model, tensors, outputs=wanted, client_timeout=RUN_SECONDS).as_numpy(output)
        if result is None or result.shape != shape or result.dtype != dtype:
            got = "nothing" if result is None else f"{result.dtype} {result.shape}"
            raise self.error(model, f"gave {got} for {output}, not {dtype} {shape}", "serve the bundle's model")
        return np.asarray(result)

    def close(self) -> None:
        self._client.close()

    def error(self, model: str | None, reason: str, hint: str) -> UnavailableError:
        """An error that names URL, server and model."""
        where = self._url if self._url.startswith(self.address) else f"{self._url} ({self.address})"
        return UnavailableError(f"Triton server {where}{f', model {model}' if model else ''}: {reason}", hint)

    def _is_ready(self, model: str) -> bool:
        return bool(self._client.is_model_ready(model, client_timeout=OPEN_SECONDS))

    @contextmanager
    def _translated_errors(self, model: str | None, seconds: float) -> Iterator[None]:
        from tritonclient.utils import InferenceServerException

        try:
            yield
        except InferenceServerException as exc:
            status = str(exc.status()).removeprefix("StatusCode.")
            if status == "DEADLINE_EXCEEDED":
                raise self.error(model, f"no answer within {seconds:g} s", "is the server overloaded?") from exc
            reason = " ".join(str(exc.message()).split())[:300]
            if status == "UNAVAILABLE" and model is None:
                hint = "does it run, and is the port that of gRPC (8001)?"
            elif status in ("NOT_FOUND", "UNAVAILABLE"):
                hint = "does the server run, and has it loaded the model? spmdeploy export-triton writes models"
            else:
                hint = "see the server's log"
            raise self.error(model, f"{status}: {reason}", hint) from exc
        except ValueError as exc:  # of an answer whose bytes do not fit its shape, or of a channel that was closed
            raise self.error(model, f"no usable answer: {exc}", "see the server's log") from exc


def _resolve(address: str, url: str) -> list[str]:
    """The addresses as numbers that a name stands for: those of IPv4 where there are any.

    gRPC would send all requests to the first of them.
    """
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except OSError as exc:
        raise UnavailableError(
            f"Triton server {url}: {host} cannot be resolved: {exc.strerror or exc}", "check its name"
        ) from exc
    numbers = {family: [str(place[0]) for kind, *_, place in found if kind == family] for family, *_ in found}
    if socket.AF_INET in numbers:
        return [f"{number}:{port}" for number in dict.fromkeys(numbers[socket.AF_INET])]
    return [f"[{number}]:{port}" for number in dict.fromkeys(numbers[socket.AF_INET6])]
