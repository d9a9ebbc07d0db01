"""Batches on Ray nodes on this machine, and what is left after workers, nodes and the driver are killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from spmdeploy import cli
from spmdeploy.editing.batch import PreparedItem
from spmdeploy.editing.dispatch import Dispatcher
from spmdeploy.editing.manifest import read_manifest
from spmdeploy.editing.options import EditRequest
from spmdeploy.editing.status import STATUS_FILE, ItemStatus
from spmdeploy.errors import SpmDeployError, UnavailableError
from spmdeploy.remote import RemotePath, list_remote, write_remote

ray_batch = pytest.importorskip("spmdeploy.editing.ray_batch")
pytest.importorskip("ray", reason="needs the extra `ray`")
psutil = pytest.importorskip("psutil")

BACKEND = "onnxruntime"
COMMAND = [sys.executable, "-m", "spmdeploy", "batch", "--backend", BACKEND]

# Read by every Python process of the cluster: an item named "kill" ends its worker, "memory" asks for too much,
# "wait" and "slow" take longer.
CUSTOMIZE = """
import os, sys
if any("default_worker" in word for word in sys.orig_argv):
    import signal, time
    import numpy, spmdeploy.imaging.files as files
    read = files.read_photo
    def read_photo(path, *arguments):
        name = os.path.basename(str(path))
        if "kill" in name:
            os.kill(os.getpid(), signal.SIGKILL)
        if "memory" in name:
            numpy.ones(1 << 46)
        if "wait" in name:
            time.sleep(4)
        if "slow" in name:
            time.sleep(20)
        return read(path, *arguments)
    files.read_photo = read_photo
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two nodes of two and one cores."""
    from ray.cluster_utils import Cluster

    folder = tmp_path_factory.mktemp("customize")
    (folder / "sitecustomize.py").write_text(CUSTOMIZE)
    root = str(Path(__file__).parents[2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join((str(folder), root)))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        memory = {"object_store_memory": 200 << 20}
        running = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, **memory})
        running.add_node(num_cpus=1, **memory)
        yield running
        running.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    noise = np.random.default_rng(3)
    for number in range(12):
        Image.fromarray(noise.integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / f"{number}.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[10:30, 10:30] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path


def manifest(folder: Path, *names: str) -> Path:
    path = folder / "edits.csv"
    path.write_text("image,fill,mask\n" + "".join(f"{name}.png,road,mask.png\n" for name in names))
    return path


NUMBERS = [str(number) for number in range(12)]


def run(
    cluster: Any,
    path: Path | RemotePath,
    out: Path | RemotePath,
    progress: Callable[[ItemStatus], None] | None = None,
    **options: Any,
) -> list[ItemStatus]:
    fleet = ray_batch.FleetOptions(cluster.address, workers=options.pop("workers", None))
    return ray_batch.run_on_ray(
        None,
        read_manifest(path, out),
        out,
        fleet,
        backend=BACKEND,
        progress=progress or (lambda status: None),
        **options,
    )


def counts(statuses: list[ItemStatus]) -> dict[str, int]:
    return dict(Counter(status.status for status in statuses))


def final_events(out: Path) -> Counter[str]:
    """How often each output has a final status in the status file."""
    lines = [json.loads(line) for line in (out / STATUS_FILE).read_text().splitlines()]
    return Counter(line["output"] for line in lines if line["status"] != "started")


def workers() -> list[Any]:
    return [one for one in psutil.process_iter(["cmdline"]) if "ray::EditWorker" in " ".join(one.info["cmdline"] or ())]


def no_leftovers(out: Path) -> bool:
    return not [path for path in out.iterdir() if path.name.startswith(".")]


def test_run_on_ray_bad_item_fails_alone_and_bytes_are_those_of_a_local_batch(
    cluster: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = NUMBERS[:5]
    (folder / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    path = manifest(folder, *names)
    command = ["batch", str(path), "--backend", BACKEND, "--json", "--output-dir"]
    assert cli.main([*command, str(folder / "local")]) == 3
    local = json.loads(capsys.readouterr().out)
    assert cli.main([*command, str(folder / "out"), "--ray", cluster.address]) == 3
    fleet = json.loads(capsys.readouterr().out)
    assert fleet["counts"] == local["counts"] == {"done": 4, "skipped": 0, "failed": 1}
    assert [item["status"] for item in fleet["items"]] == [item["status"] for item in local["items"]]
    for name in (*names[:2], *names[3:]):
        assert (folder / f"out/{name}.png").read_bytes() == (folder / f"local/{name}.png").read_bytes()
    assert set(final_events(folder / "out").values()) == {1}
    assert counts(run(cluster, path, folder / "out", resume=True)) == {"skipped": 4, "failed": 1}


def test_worker_without_credentials_of_a_store_names_it(s3: str) -> None:
    """In a process of its own: this one has the credentials."""
    script = f"""
import numpy as np
from spmdeploy.editing.ray_worker import EditWorker, WorkerSetup
from spmdeploy.remote import RemotePath
setup = WorkerSetup("0" * 64, "onnxruntime", "cpu", "auto", None, None, (RemotePath("{s3}/out"),))
opened = EditWorker().open(np.empty(0, np.uint8), setup)
print(opened.problem, "|", opened.hint)
"""
    environment = {name: value for name, value in os.environ.items() if "ACCESS_KEY" not in name}
    environment["AWS_CONFIG_FILE"] = environment["AWS_SHARED_CREDENTIALS_FILE"] = os.devnull
    process = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60
    )
    assert s3 in process.stdout and "credentials" in process.stdout, (process.stdout, process.stderr)


@pytest.mark.slow
def test_run_on_ray_in_a_store_leaves_only_outputs_and_statuses(cluster: Any, folder: Path, s3: str) -> None:
    store = RemotePath(f"{s3}/{folder.name}")
    manifest(folder, *NUMBERS[:3])
    for path in folder.glob("*.*"):
        write_remote(store / path.name, path.read_bytes())
    # The workers of a cluster that runs already do not have the environment of this process, a new cluster has.
    done = subprocess.run(
        [*COMMAND, f"{store.url}/edits.csv", "--output-dir", f"{store.url}/out", "--ray", "local", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["counts"] == {"done": 3, "skipped": 0, "failed": 0}
    assert list_remote(store / "out") == {"0.png", "1.png", "2.png", STATUS_FILE}


@pytest.mark.slow
def test_run_on_ray_killed_worker_is_replaced(cluster: Any, folder: Path) -> None:
    killed = []

    def kill_one(status: ItemStatus) -> None:
        if not killed:
            killed.append(workers()[0])
            killed[0].kill()

    out = folder / "out"
    assert counts(run(cluster, manifest(folder, *NUMBERS), out, kill_one)) == {"done": 12}
    assert killed and set(final_events(out).values()) == {1} and no_leftovers(out)


@pytest.mark.slow
def test_run_on_ray_killed_node_is_replaced_by_one_that_joins(cluster: Any, folder: Path) -> None:
    changed = []
    third = cluster.add_node(num_cpus=1, object_store_memory=200 << 20)

    def change(status: ItemStatus) -> None:
        if not changed:
            changed.append(third)
            cluster.remove_node(third, allow_graceful=False)
            cluster.add_node(num_cpus=1, object_store_memory=200 << 20)

    out = folder / "out"
    long = ["slow0", *(f"wait{number}" for number in range(3))]
    for name in long:
        shutil.copy(folder / "0.png", folder / f"{name}.png")
    opened: list[str] = []
    statuses = run(
        cluster,
        manifest(folder, *NUMBERS, *long),
        out,
        change,
        on_open=lambda node, facts, choices: opened.append(node),
    )
    assert counts(statuses) == {"done": 16} and set(final_events(out).values()) == {1} and no_leftovers(out)
    assert len(opened) == 4  # three at first, and the one that joined


@pytest.mark.slow
def test_run_on_ray_killed_driver_is_resumed(cluster: Any, folder: Path) -> None:
    long = [f"wait{number}" for number in range(3)]
    for name in long:
        shutil.copy(folder / "0.png", folder / f"{name}.png")
    path, out = manifest(folder, *NUMBERS, *long), folder / "out"
    command = [*COMMAND, str(path), "--output-dir", str(out), "--ray", cluster.address]
    driver = subprocess.Popen(command, stderr=subprocess.PIPE)
    while not (out / STATUS_FILE).exists() or '"done"' not in (out / STATUS_FILE).read_text():
        assert driver.poll() is None, driver.stderr and driver.stderr.read()
        time.sleep(0.1)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert driver.stderr is not None
    driver.stderr.close()
    statuses = run(cluster, path, out, resume=True)
    assert set(counts(statuses)) == {"done", "skipped"} and len(statuses) == 15
    assert len(list(out.glob("*.png"))) == 15 and no_leftovers(out)


@pytest.mark.slow
def test_run_on_ray_items_that_kill_their_worker_or_need_too_much_memory_fail_alone(cluster: Any, folder: Path) -> None:
    for name in ("kill", "memory"):
        shutil.copy(folder / "0.png", folder / f"{name}.png")
    out = folder / "out"
    statuses = run(cluster, manifest(folder, *NUMBERS[:4], "kill", "memory", *NUMBERS[4:]), out)
    assert counts(statuses) == {"done": 12, "failed": 2}
    problems = {status.output: str(status.error) for status in statuses if status.error}
    assert "3 workers were lost" in problems["kill.png"] and "out of memory" in problems["memory.png"]
    assert set(final_events(out).values()) == {1} and no_leftovers(out)


@pytest.mark.slow
def test_run_on_ray_slow_item_holds_up_only_itself(cluster: Any, folder: Path) -> None:
    shutil.copy(folder / "0.png", folder / "slow.png")
    order: list[str | None] = []
    names = [*NUMBERS[:6], "slow", *NUMBERS[6:]]
    run(cluster, manifest(folder, *names), folder / "out", lambda status: order.append(status.output))
    assert order[-1] == "slow.png" and len(order) == 13


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounts a small file system")
def test_run_on_ray_full_disk_fails_items_and_is_resumed(cluster: Any, folder: Path) -> None:
    out = folder / "out"
    out.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80k", "tmpfs", str(out)], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        path = manifest(folder, *NUMBERS)
        statuses = run(cluster, path, out)
        failed = [status for status in statuses if status.status == "failed"]
        assert 0 < len(failed) < 12 and all("the disk is full" in str(status.error) for status in failed)
        assert no_leftovers(out)
        subprocess.run(["mount", "-o", "remount,size=9m", str(out)], check=True)
        again = run(cluster, path, out, resume=True)
        assert counts(again) == {"skipped": 12 - len(failed), "done": len(failed)}
    finally:
        subprocess.run(["umount", str(out)], check=False)


def test_run_on_ray_without_a_cluster_at_the_address_is_unavailable(folder: Path) -> None:
    fleet = ray_batch.FleetOptions("127.0.0.1:1")
    out = folder / "out"
    with pytest.raises(UnavailableError, match=r"no Ray cluster answers at 127\.0\.0\.1:1"):
        ray_batch.run_on_ray(None, read_manifest(manifest(folder, "0"), out), out, fleet)
    assert not (out / STATUS_FILE).read_text()


@pytest.mark.slow
def test_run_on_ray_node_without_the_backend_is_named(cluster: Any, folder: Path) -> None:
    out = folder / "out"
    fleet = ray_batch.FleetOptions(cluster.address)
    with pytest.raises(SpmDeployError, match=r"^node .*\(") as raised:
        ray_batch.run_on_ray(None, read_manifest(manifest(folder, "0"), out), out, fleet, backend="tensorrt")
    assert raised.value.exit_code == 4 and not (out / STATUS_FILE).read_text()


def test_withdrawn_rows_are_handed_out_once_whichever_answer_comes_first() -> None:
    nothing: Any = None
    request = EditRequest(Path("a.png"), Path("out/1.png"), fill="road", mask=Path("m.png"))
    item = PreparedItem(1, "1.png", request)
    dispatcher = Dispatcher(iter(()), 0)
    run = ray_batch._Run(nothing, nothing, nothing, nothing, nothing, nothing, nothing)
    worker = ray_batch._Worker(None, "id", "node", is_open=True, chunks={1: [item]})
    run.workers.append(worker)
    run._handle(dispatcher, worker, "withdraw", 0, [1])
    assert worker.chunks == {1: [item]} and dispatcher.take(1) == []
    run._handle(dispatcher, worker, "withdraw", 1, [1])
    assert worker.chunks == {1: []} and dispatcher.take(1) == [item]


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        ({"spmdeploy": None, "missing": "No module named 'spmdeploy'", "ray": "1"}, "node n lacks spmdeploy"),
        ({"spmdeploy": "2", "ray": "1"}, "node n has spmdeploy 2, this machine 1"),
        ({"spmdeploy": "1", "ray": "2"}, "node n has ray 2, this machine 1"),
    ],
)
def test_check_versions_names_node_and_package(found: dict[str, Any], problem: str) -> None:
    with pytest.raises(UnavailableError, match=problem):
        ray_batch.check_versions("n", found, {"spmdeploy": "1", "ray": "1"})
    ray_batch.check_versions("n", {"spmdeploy": "1", "ray": "1"}, {"spmdeploy": "1", "ray": "1"})
