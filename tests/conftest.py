"""Fixtures of several test files: the shared folder, an empty cache and a small real bundle."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("spmdeploy", deadline=None)  # on a busy machine an example may take any time
settings.load_profile("spmdeploy")

SHARED = Path(__file__).resolve().parents[1] / "../shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the tests so that one exports the bundle while another process runs those that do not need it."""
    exported = [item for item in items if "street_bundle" in getattr(item, "fixturenames", ())]
    for item in exported:
        item.add_marker(pytest.mark.exported)
    needing = set(exported)
    others = [item for item in items if item not in needing]
    items[:] = [*exported[:1], *others, *exported[1:]]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` next to the repository: recorded outputs of the original network, data sets, design pages."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent: what is recorded there cannot be compared")
    return SHARED.resolve()


@pytest.fixture(scope="session", autouse=True)
def empty_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Use an empty cache, so that the user's cached engines do not affect the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPMDEPLOY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_bf16() -> Iterator[None]:
    """`auto` is the same on every machine that runs the tests: without bf16, which not every processor has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spmdeploy.backends.openvino.cpu_features", lambda: "x86_64 avx2")
        yield


@pytest.fixture(scope="session")
def street_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real bundle, FP32 and FP16: a very small generator with the `street` classes and random weights.

    Next to it are the checkpoint, `tiny.safetensors`, and the output of the command, `export.stdout`. It is exported
    once per run, by the first process that needs it: tests must not write into it.
    """
    return exported_once(_run_folder(tmp_path_factory) / "street_bundle")


def _run_folder(factory: pytest.TempPathFactory) -> Path:
    """The temporary folder of the run, the same for all processes of pytest-xdist."""
    own = factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def exported_once(folder: Path) -> Path:
    """`folder`/tiny.spm, exported unless another process did so or is doing so."""
    pytest.importorskip("torch", reason="bundles are exported with torch, which an edge install lacks")
    fcntl = pytest.importorskip("fcntl", reason="the lock between test processes needs POSIX")
    folder.mkdir(exist_ok=True)
    bundle = folder / "tiny.spm"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not bundle.exists():
            _export(folder / "tiny.safetensors", bundle)
    return bundle


def _export(checkpoint: Path, bundle: Path) -> None:
    import torch

    from spmdeploy.labels import class_table
    from spmdeploy.model.checkpoint import save_generator
    from spmdeploy.model.generator import Generator, GeneratorConfig

    with torch.random.fork_rng():
        torch.manual_seed(2)
        save_generator(Generator(GeneratorConfig(len(class_table("street")), width=2, hidden=8)), checkpoint)
    args = ["export", checkpoint, "--output", bundle, "--classes", "street", "--licence", "random weights", "--json"]
    command = [sys.executable, "-m", "spmdeploy", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    bundle.with_name("export.stdout").write_text(done.stdout)


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The URL of a bucket on a server of S3 on loopback, which is the store of this process and its children."""
    pytest.importorskip("s3fs", reason="s3:// needs the extra `storage`")
    server = pytest.importorskip("moto.server", reason="the server of S3 is moto")
    import logging

    import s3fs

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    running.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*running.get_host_and_port()))
        for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
            patch.setenv(f"AWS_{name}", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        s3fs.S3FileSystem().mkdir("bucket")
        yield "s3://bucket"
    running.stop()
