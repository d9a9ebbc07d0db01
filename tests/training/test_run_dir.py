from __future__ import annotations

import errno
import os
import shutil
import signal
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from spmdeploy.errors import InputError, UsageError
from spmdeploy.model.checkpoint import load_checkpoint
from spmdeploy.model.generator import Generator, GeneratorConfig
from spmdeploy.training.config import TrainConfig
from spmdeploy.training.run_dir import RunDirectory


def state_of(value: torch.Tensor) -> dict[str, object]:
    parts = ("progress", "generator", "averaged", "discriminators", "generator_optimizer", "discriminator_optimizer")
    return {**{name: {} for name in parts}, "random": value}


def test_start_existing_run_is_refused(tmp_path: Path, tiny: TrainConfig) -> None:
    run = RunDirectory(tmp_path / "run")
    run.start(tiny)
    assert RunDirectory(tmp_path / "run").config() == tiny
    with pytest.raises(UsageError, match="already holds a run"):
        run.start(tiny)


def test_lock_second_process_is_refused(tmp_path: Path) -> None:
    held = RunDirectory(tmp_path).lock
    with held(), pytest.raises(UsageError, match="another process is training in"), held():
        raise AssertionError("both are in")
    with held():
        pass


def test_config_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run to resume"):
        RunDirectory(tmp_path).config()
    assert RunDirectory(tmp_path).load_checkpoint() is None


def test_drop_metrics_after_keeps_records_up_to_the_checkpoint(tmp_path: Path, tiny: TrainConfig) -> None:
    run = RunDirectory(tmp_path / "run")
    run.start(tiny)
    for images in (2, 4, 6):
        run.log(images=images)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"images": 8, "los')  # cut by a kill
    assert [line["images"] for line in run.metrics()] == [2, 4, 6]
    run.drop_metrics_after(4)
    run.log(images=6)
    assert [line["images"] for line in run.metrics()] == [2, 4, 6]


def test_save_checkpoint_interrupted_keeps_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(tmp_path)
    run.save_checkpoint(state_of(torch.ones(3)))

    def killed_halfway(state: object, stream: BinaryIO) -> None:
        stream.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed_halfway)
    with pytest.raises(KeyboardInterrupt):
        run.save_checkpoint(state_of(torch.zeros(3)))
    state = run.load_checkpoint()
    assert state is not None
    assert torch.equal(state["random"], torch.ones(3))


def test_save_checkpoint_full_disk_keeps_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    run = RunDirectory(tmp_path)
    run.save_checkpoint(state_of(torch.ones(3)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"cannot write .*checkpoint\.pt: larger than the system allows"):
            run.save_checkpoint(state_of(torch.zeros(1_000_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    state = run.load_checkpoint()
    assert state is not None and torch.equal(state["random"], torch.ones(3))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_log_full_disk_names_the_metrics(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"cannot write .*metrics\.jsonl: the disk is full"):
        RunDirectory(tmp_path).log(images=2)


def test_export_full_disk_keeps_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, generator = RunDirectory(tmp_path), Generator(GeneratorConfig(3, 2, 2))
    path = run.export(generator, "best")
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}

    def flush(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", flush)
    with pytest.raises(InputError, match=r"cannot write .*incoming\.safetensors: the disk is full"):
        run.export(generator, "best")
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_load_checkpoint_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(InputError, match=r"checkpoint\.pt: (truncated|refused)"):
        RunDirectory(tmp_path).load_checkpoint()


def test_load_checkpoint_of_another_program_is_refused(tmp_path: Path) -> None:
    torch.save({"netG": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match="not a checkpoint of this program"):
        RunDirectory(tmp_path).load_checkpoint()


def test_export_is_read_by_load_checkpoint(tmp_path: Path) -> None:
    generator = Generator(GeneratorConfig(3, 2, 2))
    path = RunDirectory(tmp_path).export(generator, "export")
    assert sorted(file.name for file in path.parent.iterdir()) == ["generator.json", "generator.safetensors"]
    loaded = load_checkpoint(path).generator
    assert all(torch.equal(value, generator.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_sample_sheet_deleted_folder_is_made_again(tmp_path: Path, tiny: TrainConfig) -> None:
    run = RunDirectory(tmp_path / "run")
    run.start(tiny)
    sheet = run.sample_sheet(12)
    sheet.write_bytes(b"")
    shutil.rmtree(sheet.parent)
    assert run.sample_sheet(12).parent.is_dir()
