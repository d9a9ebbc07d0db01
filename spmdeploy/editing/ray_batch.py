"""Runs a batch on the nodes of a Ray cluster: one editor for each GPU or group of cores, opened once and kept.

The driver reads the manifest and writes the status file; the nodes read inputs and write outputs. An item is recorded
as started before a node gets it, and its final status once, when a node returns it or when it is given up.
"""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import spmdeploy
from spmdeploy.bundle.bundle import open_bundle
from spmdeploy.bundle.signature import PublicKey, read_public_key
from spmdeploy.editing.batch import PreparedItem, prepare_items
from spmdeploy.editing.dispatch import Dispatcher
from spmdeploy.editing.manifest import BatchItem, stores_read
from spmdeploy.editing.options import EditRequest
from spmdeploy.editing.ray_worker import ChunkResult, EditWorker, Opened, WorkerSetup, describe_node
from spmdeploy.editing.status import STATUS_FILE, ItemStatus, StatusLog, open_status
from spmdeploy.engines.pack import pack
from spmdeploy.errors import SpmDeployError, UnavailableError
from spmdeploy.inputs import LocalOrRemote
from spmdeploy.remote import RemotePath

DEFAULT_ADDRESS = "default"
"""RAY_ADDRESS, else a cluster that runs on this machine, else a new one on this machine."""
_CALLS = 2
"""Chunks that a worker has at once, so that it never waits for the driver."""
_OPEN_SECONDS = 300.0
_LONELY_SECONDS = 120.0
"""Time without any worker after which the batch ends."""
_LOOK_SECONDS = 1.0
_MAX_LOSSES = 3
"""Workers that a node may lose while they open the model."""
_log = logging.getLogger("spmdeploy")


@dataclass(frozen=True)
class FleetOptions:
    """How a batch uses a cluster."""

    address: str = DEFAULT_ADDRESS
    """As `ray.init` takes it, or `DEFAULT_ADDRESS`."""
    cores: int = 1
    """Of each editor."""
    workers: int | None = None
    """Editors at most; None: as many as the cluster has room for."""


@dataclass(eq=False)
class _Worker:
    """An actor, its node, and the chunks that it has."""

    handle: Any
    node_id: str
    node: str
    is_open: bool = False
    chunks: dict[int, list[PreparedItem]] = field(default_factory=dict)
    since: float = 0.0
    """When its last result came, or its first chunk was sent."""
    withdrawing: bool = False


def run_on_ray(
    model: str | Path | None,
    items: list[BatchItem],
    output_dir: LocalOrRemote,
    fleet: FleetOptions,
    *,
    backend: str = "auto",
    device: str = "auto",
    precision: str = "auto",
    require_signature: str | None = None,
    resume: bool = False,
    progress: Callable[[ItemStatus], None] = lambda status: None,
    on_open: Callable[[str, tuple[str, ...], tuple[str, ...]], None] = lambda node, facts, choices: None,
) -> list[ItemStatus]:
    """Edit every item on a cluster; statuses, outputs and their bytes are those of `run_batch`.

    A failed item does not stop the others, nor does one that runs out of memory or ends its worker, which is given up
    after three attempts. Nodes may leave and join.

    Args:
        model: a bundle of this machine; None: the built-in one. Each node gets it once.
        items: the rows. Paths are the same on all nodes.
        output_dir: a store, or a folder on a file system that all nodes share.
        fleet: which cluster, and how it is divided.
        backend: as for `open_editor`, like `device`, `precision` and `require_signature`.
        resume: skip rows whose output exists and was recorded as done.
        progress: called with each final status.
        on_open: called for each node on which a worker has opened the model, with its name, what is used there
            (backend, provider, device, precision) and why.

    Raises:
        UnavailableError: there is no such cluster, or a node (which the message names) lacks something or differs from
            the others. No item has been started then. Or all nodes have left.
    """
    ray = _import_ray()
    with open_status(output_dir) as log:
        _connect(ray, fleet.address)
        try:
            shared, stores = None, stores_read(items)
            if isinstance(output_dir, RemotePath):
                stores.append(output_dir)
            else:
                shared = Path(os.path.abspath(output_dir / STATUS_FILE))
            _check_nodes(ray, shared)
            key = None if require_signature is None else read_public_key(require_signature)
            content = _packed(model, key)
            setup = WorkerSetup(
                hashlib.sha256(content).hexdigest(),
                backend,
                device,
                precision,
                None if key is None else key.line,
                shared,
                tuple(stores),
            )
            run = _Run(ray, fleet, setup, ray.put(np.frombuffer(content, np.uint8)), log, progress, on_open)
            run.open_all()
            return run.edit_all(items, output_dir, resume)
        finally:
            ray.shutdown()


class _Run:
    """A batch in progress. All state is used by one thread; results of Ray arrive in a queue."""

    def __init__(
        self,
        ray: Any,
        fleet: FleetOptions,
        setup: WorkerSetup,
        bundle: Any,
        log: StatusLog,
        progress: Callable[[ItemStatus], None],
        on_open: Callable[[str, tuple[str, ...], tuple[str, ...]], None],
    ) -> None:
        self.ray, self.fleet, self.setup, self.bundle = ray, fleet, setup, bundle
        self.log, self.progress, self.on_open = log, progress, on_open
        self.workers: list[_Worker] = []
        self.facts: tuple[str, ...] | None = None
        self.statuses: list[ItemStatus] = []
        self._events: queue.SimpleQueue[tuple[_Worker, str, int, Any]] = queue.SimpleQueue()
        self._refused: set[str] = set()
        self._losses: Counter[str] = Counter()
        self._looked = 0.0
        self._calls = 0
        self._opened_on: set[str] = set()

    def open_all(self) -> None:
        """Open the model on all nodes. Raises UnavailableError if one cannot, or has chosen another backend."""
        self._hire()
        if not self.workers:
            needed = "a GPU" if self._uses_gpus() else f"{self.fleet.cores} cores"
            raise UnavailableError(f"no node of the cluster has {needed}", "lower --cores, or add nodes")
        deadline = time.monotonic() + _OPEN_SECONDS
        while not all(worker.is_open for worker in self.workers):
            event = self._next_event(deadline - time.monotonic())
            if event is None:
                break
            worker, _, _, result = event
            self._check_opened(worker, result)
        self.workers = [worker for worker in self.workers if worker.is_open or self._dismiss(worker)]
        if not self.workers:
            raise UnavailableError(
                f"no node of the cluster had a free place within {_OPEN_SECONDS:.0f} s", "end other jobs, or add nodes"
            )

    def edit_all(self, items: list[BatchItem], output_dir: LocalOrRemote, resume: bool) -> list[ItemStatus]:
        dispatcher = Dispatcher(self._to_edit(prepare_items(items, output_dir, self.log, resume)), len(items))
        lonely_since: float | None = None
        while True:
            exhausted = self._feed(dispatcher)
            if exhausted and not any(worker.chunks for worker in self.workers):
                break
            event = self._next_event(_LOOK_SECONDS)
            if event is not None:
                self._handle(dispatcher, *event)
            if time.monotonic() - self._looked > _LOOK_SECONDS:
                self._hire()
                if exhausted:
                    self._withdraw(dispatcher)
            if any(worker.is_open for worker in self.workers):
                lonely_since = None
            elif lonely_since is None:
                lonely_since = time.monotonic()
            elif time.monotonic() - lonely_since > _LONELY_SECONDS:
                raise UnavailableError(
                    f"no node has been left for {_LONELY_SECONDS:.0f} s", "add nodes and continue with --resume"
                )
        return sorted(self.statuses, key=lambda status: status.row)

    def _to_edit(self, prepared: Iterable[PreparedItem | ItemStatus]) -> Iterator[PreparedItem]:
        for item in prepared:
            if isinstance(item, ItemStatus):
                self._finish([item])
            else:
                yield replace(item, request=_absolute(item))

    def _finish(self, statuses: list[ItemStatus]) -> None:
        self.log.add(*statuses)
        self.statuses += statuses
        for status in statuses:
            self.progress(status)

    def _feed(self, dispatcher: Dispatcher) -> bool:
        """Give chunks to workers that have room, the emptiest first. Returns whether no item waits."""
        ready = [worker for worker in self.workers if worker.is_open]
        for room in range(_CALLS):
            for worker in ready:
                if len(worker.chunks) > room:
                    continue
                chunk = dispatcher.take(len(ready))
                if not chunk:
                    return True
                if not worker.chunks:
                    worker.since = time.monotonic()
                self._calls += 1
                worker.chunks[self._calls] = chunk
                self._watch(worker, "run", self._calls, worker.handle.run.remote(chunk))
        return False

    def _handle(self, dispatcher: Dispatcher, worker: _Worker, kind: str, call: int, result: Any) -> None:
        if worker not in self.workers:
            return  # an answer of a worker that was lost in the meantime
        if isinstance(result, Exception):
            self._lose(dispatcher, worker, result)
        elif kind == "open":
            try:
                self._check_opened(worker, result)
            except UnavailableError as exc:
                _log.warning("%s is not used: %s", worker.node, exc.problem)
                self._refused.add(worker.node_id)
                self._dismiss(worker)
                self.workers.remove(worker)
        elif kind == "withdraw":
            worker.withdrawing = False
            rows = set(result)
            # Later chunks may hold a row again that was given back by a result that overtook this answer.
            for number in [number for number in worker.chunks if number <= call]:
                chunk = worker.chunks[number]
                dispatcher.give_back([item for item in chunk if item.row in rows])
                worker.chunks[number] = [item for item in chunk if item.row not in rows]
        else:
            assert isinstance(result, ChunkResult)
            worker.since = time.monotonic()
            done = {status.row for status in result.statuses}
            dispatcher.give_back([item for item in worker.chunks.pop(call) if item.row not in done])
            dispatcher.record(len(result.statuses), result.seconds)
            self._finish(result.statuses)

    def _lose(self, dispatcher: Dispatcher, worker: _Worker, cause: Exception) -> None:
        self.workers.remove(worker)
        self._dismiss(worker)
        alive = any(node["NodeID"] == worker.node_id for node in self._nodes())
        reason = f"{_first_line(cause)} (node {worker.node})"
        if not worker.is_open:
            self._losses[worker.node_id] += 1
            if self._losses[worker.node_id] >= _MAX_LOSSES:
                self._refused.add(worker.node_id)
        _log.warning("a worker was lost: %s", reason)
        items = [item for chunk in worker.chunks.values() for item in chunk]
        self._finish(dispatcher.lose(items, reason, counts=alive))

    def _withdraw(self, dispatcher: Dispatcher) -> None:
        """At the end of a batch, take from slow workers what they have not begun, for those that are idle."""
        if all(worker.chunks for worker in self.workers if worker.is_open):
            return
        usual = dispatcher.seconds_per_item or 0.0
        for worker in self.workers:
            waits = sum(map(len, worker.chunks.values()))
            late = time.monotonic() - worker.since > max(_LOOK_SECONDS, 2 * usual)
            if waits > 1 and late and not worker.withdrawing:
                worker.withdrawing = True
                self._watch(worker, "withdraw", self._calls, worker.handle.withdraw.remote())

    def _hire(self) -> None:
        """Start workers on all nodes that have places left."""
        self._looked = time.monotonic()
        gpus = self._uses_gpus()
        for node in self._nodes():
            if node["NodeID"] in self._refused:
                continue
            places = int(
                node["Resources"].get("GPU", 0) if gpus else node["Resources"].get("CPU", 0) / self.fleet.cores
            )
            taken = sum(worker.node_id == node["NodeID"] for worker in self.workers)
            for _ in range(places - taken):
                if self.fleet.workers is not None and len(self.workers) >= self.fleet.workers:
                    return
                self._start(node, gpus)

    def _start(self, node: dict[str, Any], gpus: bool) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        actor = self.ray.remote(EditWorker).options(
            num_cpus=0 if gpus else self.fleet.cores,
            num_gpus=1 if gpus else 0,
            max_concurrency=_CALLS + 2,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(self.fleet.cores)}},
        )
        worker = _Worker(actor.remote(), node["NodeID"], _node_name(node))
        self.workers.append(worker)
        self._watch(worker, "open", 0, worker.handle.open.remote(self.bundle, self.setup))

    def _watch(self, worker: _Worker, kind: str, call: int, reference: Any) -> None:
        def arrived(future: Any) -> None:
            result = future.exception()
            self._events.put((worker, kind, call, future.result() if result is None else result))

        reference.future().add_done_callback(arrived)

    def _next_event(self, seconds: float) -> tuple[_Worker, str, int, Any] | None:
        try:
            return self._events.get(timeout=max(seconds, 0))
        except queue.Empty:
            return None

    def _check_opened(self, worker: _Worker, result: Opened | Exception) -> None:
        if isinstance(result, Exception):
            raise UnavailableError(f"node {worker.node}: {_first_line(result)}", "see the logs of Ray on that node")
        if result.problem is not None:
            raise UnavailableError(f"node {worker.node}: {result.problem}", result.hint)
        if self.facts is not None and result.facts != self.facts:
            raise UnavailableError(
                f"node {worker.node} would use {', '.join(result.facts)}, others {', '.join(self.facts)}",
                "choose what all have, with --backend, --device and --precision",
            )
        self.facts, worker.is_open = result.facts, True
        if worker.node_id not in self._opened_on:
            self._opened_on.add(worker.node_id)
            self.on_open(worker.node, result.facts, result.choices)

    def _dismiss(self, worker: _Worker) -> bool:
        with suppress(Exception):
            self.ray.kill(worker.handle)
        return False

    def _uses_gpus(self) -> bool:
        has_gpus = any(node["Resources"].get("GPU", 0) for node in self._nodes())
        return self.setup.device.startswith("cuda") or (self.setup.device == "auto" and has_gpus)

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self.ray.nodes() if node["Alive"]]


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError as exc:
        raise UnavailableError(f"this needs the package {exc.name}", 'pip install "spmdeploy[ray]"') from exc
    return ray


def _connect(ray: Any, address: str) -> None:
    host, _, port = address.rpartition(":")
    hint = "`ray status --address` shows whether it runs; --ray alone starts one on this machine"
    if "://" not in address and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as exc:
            raise UnavailableError(f"no Ray cluster answers at {address}: {exc.strerror or exc}", hint) from exc
    chosen = None if address == DEFAULT_ADDRESS else address
    try:
        ray.init(chosen, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
    except Exception as exc:  # ConnectionError, RuntimeError for another version, errors of gRPC
        raise UnavailableError(f"no Ray cluster can be used at {address}: {_first_line(exc)}", hint) from exc


def _check_nodes(ray: Any, shared: Path | None) -> None:
    """UnavailableError if a node lacks this package, has another version of it or of Ray, or not the output folder."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    describe = ray.remote(describe_node(None if shared is None else str(shared)))
    answers = [
        describe.options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote()
        for node in nodes
    ]
    for node, answer in zip(nodes, answers, strict=True):
        name = _node_name(node)
        try:
            facts = ray.get(answer, timeout=_OPEN_SECONDS)
        except Exception as exc:
            raise UnavailableError(f"node {name} does not answer: {_first_line(exc)}", "remove or restart it") from exc
        check_versions(name, facts, {"spmdeploy": spmdeploy.__version__, "ray": ray.__version__})
        if not facts["shared"]:
            raise UnavailableError(
                f"node {name} does not have the folder {shared.parent if shared else ''}",
                "name a folder on a file system that all nodes share, or s3://",
            )


def check_versions(node: str, found: dict[str, Any], expected: dict[str, str]) -> None:
    """Raise UnavailableError if the packages of a node differ from those of the driver."""
    for package, version in expected.items():
        if found[package] is None:
            raise UnavailableError(
                f"node {node} lacks {package}: {found.get('missing')}", f"pip install {package} there"
            )
        if found[package] != version:
            raise UnavailableError(
                f"node {node} has {package} {found[package]}, this machine {version}",
                "install the same version on both",
            )


def _packed(model: str | Path | None, key: PublicKey | None) -> bytes:
    """The bundle as one file, every hash and the signature checked."""
    bundle = open_bundle(spmdeploy.default_model() if model is None else model, key)
    with tempfile.TemporaryDirectory() as folder:
        return pack(bundle, Path(folder) / "bundle.spm").read_bytes()


def _absolute(item: PreparedItem) -> EditRequest:
    """The request with absolute paths: nodes have working directories of their own."""
    changes: dict[str, Any] = {
        name: Path(os.path.abspath(path))
        for name in ("image", "output", "labels", "mask", "edited_from", "instances")
        if isinstance(path := getattr(item.request, name), Path)
    }
    return replace(item.request, **changes)


def _node_name(node: dict[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node['NodeID'][:8]})"


def _first_line(exc: BaseException) -> str:
    """The kind of an exception of Ray and the start of its text, which goes on for pages."""
    if isinstance(exc, SpmDeployError):
        return exc.problem
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return f"{type(exc).__name__}: {lines[0][:200]}" if lines else type(exc).__name__
