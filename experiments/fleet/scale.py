"""Measures batches on Ray against the local batch on this machine, and simulates a large fleet from the result.

    python experiments/fleet/scale.py --output experiments/fleet/results/scale.json

Measured: edits per second of the local batch (all cores, two jobs) and of 1, 2, 4 and 8 workers of one thread, in
interleaved rounds, models opened and the cluster started before; the driver's time per item and per call, with items
that fail at once because their photo is missing. Simulated: 10^6 items on 1,000 workers with the dispatcher of the
package, service times drawn from the measured ones, the driver as one server with the measured times, and workers lost
at a rate that is assumed.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import spmdeploy
from spmdeploy.editing import dispatch, ray_batch
from spmdeploy.editing.batch import PreparedItem, run_batch
from spmdeploy.editing.dispatch import Dispatcher
from spmdeploy.editing.manifest import BatchItem, read_manifest
from spmdeploy.editing.options import EditRequest
from spmdeploy.editing.status import ItemStatus, StatusFile, open_status

WORKERS = (1, 2, 4, 8)
BACKEND = "onnxruntime"
LOSSES_PER_WORKER_HOUR = 1 / 24
"""Assumed: each worker is lost once a day."""
REPLACED_SECONDS = 30.0
"""Assumed: until a lost worker has a successor with an open model."""


class Fleet:
    """A cluster on this machine, on which runs with different numbers of workers follow one another."""

    def __init__(self) -> None:
        self.ray = ray_batch._import_ray()
        self.ray.init("local", num_cpus=max(WORKERS), log_to_driver=False, include_dashboard=False)
        content = ray_batch._packed(None, None)
        self.digest = ray_batch.hashlib.sha256(content).hexdigest()
        self.bundle = self.ray.put(np.frombuffer(content, np.uint8))

    def run(self, items: list[BatchItem], out: Path, workers: int) -> tuple[float, float]:
        """Seconds from the first item to the last, models opened before, and CPU seconds of the driver in them."""
        setup = ray_batch.WorkerSetup(self.digest, BACKEND, "cpu", "auto", None, None)
        fleet = ray_batch.FleetOptions(workers=workers)
        with open_status(out) as log:
            nothing: Any = lambda *arguments: None  # noqa: E731
            run = ray_batch._Run(self.ray, fleet, setup, self.bundle, log, nothing, nothing)
            run.open_all()
            start, cpu = time.perf_counter(), time.process_time()
            run.edit_all(items, out, resume=False)
            seconds = time.perf_counter() - start, time.process_time() - cpu
        for worker in run.workers:
            run._dismiss(worker)
        return seconds


def write_photos(folder: Path, count: int) -> Path:
    noise = np.random.default_rng(1)
    Image.fromarray(noise.integers(0, 256, (360, 480, 3), np.uint8)).save(folder / "photo.png")
    mask = np.zeros((360, 480), np.uint8)
    mask[120:240, 160:320] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    path = folder / "edits.csv"
    path.write_text("image,fill,mask,output\n" + "".join(f"photo.png,road,mask.png,{n}.png\n" for n in range(count)))
    return path


def missing_photos(folder: Path, count: int) -> Path:
    path = folder / "missing.csv"
    path.write_text("image,fill,mask,output\n" + "".join(f"none.png,road,mask.png,{n}.png\n" for n in range(count)))
    return path


def measure_throughput(rounds: int, count: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in ("local", *map(str, WORKERS))}
    with tempfile.TemporaryDirectory() as name:
        folder, fleet = Path(name), Fleet()
        path = write_photos(folder, count)
        with spmdeploy.open_editor(backend=BACKEND) as editor:
            run_batch(editor, read_manifest(path, folder / "warm"), folder / "warm", jobs=2)
            for turn in range(rounds):
                out = folder / f"local{turn}"
                items = read_manifest(path, out)
                start = time.perf_counter()
                run_batch(editor, items, out, jobs=2)
                seconds["local"].append(time.perf_counter() - start)
                for workers in WORKERS:
                    out = folder / f"ray{workers}-{turn}"
                    seconds[str(workers)].append(fleet.run(read_manifest(path, out), out, workers)[0])
                print({name: round(times[-1], 2) for name, times in seconds.items()}, flush=True)
        fleet.ray.shutdown()
    ratios = {
        name: statistics.median(local / one for local, one in zip(seconds["local"], times, strict=True))
        for name, times in seconds.items()
    }
    return {"items": count, "seconds": seconds, "against_local": ratios}


def measure_overhead(count: int) -> dict[str, Any]:
    """Wall and CPU time of the driver for items that fail at once, sent one by one and in the largest chunks."""
    wall, cpu = {}, {}
    with tempfile.TemporaryDirectory() as name:
        folder, fleet = Path(name), Fleet()
        path = missing_photos(folder, count)
        for size in (1, dispatch.MAX_CHUNK):
            out, (dispatch.MAX_CHUNK, kept) = folder / f"calls{size}", (size, dispatch.MAX_CHUNK)
            seconds, cpu_seconds = fleet.run(read_manifest(path, out), out, 2)
            wall[size], cpu[size] = 1e3 * seconds / count, 1e3 * cpu_seconds / count
            dispatch.MAX_CHUNK = kept
        fleet.ray.shutdown()
        with StatusFile(folder / "status") as log:
            start = time.process_time()
            for row in range(20_000):
                log.add(ItemStatus(row, f"{row}.png", "done"))
            event = 1e3 * (time.process_time() - start) / 20_000
    call = (cpu[1] - cpu[kept]) / (1 - 1 / kept)
    return {
        "items": count,
        "wall_ms_per_item_by_chunk": wall,
        "driver_cpu_ms_per_item_by_chunk": cpu,
        "driver_cpu_ms_per_call": call,
        "driver_cpu_ms_per_item": cpu[kept] - call / kept,
        "status_file_cpu_ms_per_event": event,
    }


def simulate(
    items: int, workers: int, service: float, call: float, per_item: float, chunk_seconds: float | None = None
) -> dict[str, Any]:
    """Run the dispatcher on a simulated fleet.

    Args:
        service: median seconds per item of a worker; drawn from a log-normal distribution of shape 0.3.
        call: seconds of the driver per chunk.
        per_item: seconds of the driver per item.
        chunk_seconds: of work per chunk; None: as the dispatcher chooses.
    """
    draw = random.Random(1)
    request = EditRequest(Path("a.png"), Path("b.png"), fill="road", mask=Path("m.png"))

    def prepared() -> Iterator[PreparedItem]:
        for row in range(items):
            yield PreparedItem(row, f"{row}.png", request)

    dispatcher = Dispatcher(prepared(), items)
    if chunk_seconds is not None:
        dispatcher._chunk_seconds = lambda workers: chunk_seconds  # type: ignore[method-assign]
    driver_free = driver_busy = worked = end = 0.0
    queued: list[list[list[PreparedItem]]] = [[] for _ in range(workers)]
    busy_until = [0.0] * workers
    events: list[tuple[float, int, int]] = []  # time, worker, 0: a result, 1: a new worker
    lost = done = calls = repeated = 0

    def feed(worker: int, now: float) -> None:
        nonlocal driver_free, driver_busy, worked, lost, calls
        while len(queued[worker]) < ray_batch._CALLS and (chunk := dispatcher.take(workers)):
            cost = call + per_item * len(chunk)
            driver_free = max(driver_free, now) + cost
            driver_busy += cost
            calls += 1
            times = sum(draw.lognormvariate(0, 0.3) * service for _ in chunk)
            start = max(busy_until[worker], driver_free)
            busy_until[worker] = start + times
            queued[worker].append(chunk)
            if draw.random() < times * LOSSES_PER_WORKER_HOUR / 3600:
                heapq.heappush(events, (start + times / 2, worker, 1))
            heapq.heappush(events, (busy_until[worker], worker, 0))
            worked += times

    for worker in range(workers):
        heapq.heappush(events, (0.0, worker, 2))
    generation = [0] * workers
    while events:
        now, worker, kind = heapq.heappop(events)
        if kind == 1:
            lost += 1
            generation[worker] += len(queued[worker])
            chunks, queued[worker] = queued[worker], []
            repeated += sum(map(len, chunks))
            dispatcher.lose([item for chunk in chunks for item in chunk], "lost")
            busy_until[worker] = now + REPLACED_SECONDS
            heapq.heappush(events, (busy_until[worker], worker, 2))
            continue
        if kind == 0:
            if generation[worker]:  # a result that was lost with its worker
                generation[worker] -= 1
                continue
            chunk = queued[worker].pop(0)
            dispatcher.record(len(chunk), service * len(chunk))
            done += len(chunk)
            end = max(end, now)
        feed(worker, now)
    return {
        "items": items,
        "workers": workers,
        "service_ms": 1e3 * service,
        "seconds": end,
        "items_done": done,
        "efficiency": items * service * 1.046 / (workers * end),  # 1.046: mean of the drawn times, of median 1
        "driver_utilization": driver_busy / end,
        "calls": calls,
        "workers_lost": lost,
        "items_repeated": repeated,
        "status_file_megabytes": items * 2 * 85 / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--items", type=int, default=24)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--parts", nargs="+", default=["throughput", "overhead", "simulation"])
    parser.add_argument("--service-ms", type=float, default=250.0, help="of an item in the simulation")
    options = parser.parse_args()
    result = json.loads(options.output.read_text()) if options.output.exists() else {}
    result["machine"] = {"cores": os.cpu_count(), "load_average": os.getloadavg()[0]}
    if "throughput" in options.parts:
        result["throughput"] = measure_throughput(options.rounds, options.items)
    if "overhead" in options.parts:
        result["overhead"] = measure_overhead(options.calls)
    if "simulation" in options.parts:
        result["simulation"] = simulations(result["overhead"], options.service_ms / 1e3)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def simulations(overhead: dict[str, Any], service: float) -> dict[str, Any]:
    driver = overhead["driver_cpu_ms_per_call"] / 1e3, overhead["driver_cpu_ms_per_item"] / 1e3
    return {
        f"{1e3 * seconds:.0f} ms an item, {chunks}": simulate(1_000_000, 1000, seconds, *driver, chunk_seconds)
        for seconds in (service, service / 5)
        for chunks, chunk_seconds in (("one item a call", 0.0), ("0.5 s a call", 0.5), ("as built", None))
    }


if __name__ == "__main__":
    main()
