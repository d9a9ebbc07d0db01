from __future__ import annotations

from datetime import timedelta

import pytest
import torch

from spmdeploy.errors import InputError, UnavailableError, UsageError
from spmdeploy.training import distributed as processes


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_local_device_single_process_is_the_requested_one(two_gpus: None) -> None:
    found = [processes.local_device(wanted) for wanted in ("cpu", "cuda", "cuda:1")]
    assert found == [torch.device("cpu"), torch.device("cuda:0"), torch.device("cuda:1")]


def test_local_device_under_torchrun_is_a_gpu_per_process(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert processes.local_device("cuda") == torch.device("cuda:1")
    assert processes.local_device("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match="2 processes cannot share cuda:0"):
        processes.local_device("cuda:0")


@pytest.mark.parametrize("wanted", ["cuda:2", "cuda:02"])
def test_local_device_missing_gpu_is_named(two_gpus: None, wanted: str) -> None:
    with pytest.raises(UnavailableError, match="cuda:2 was requested, but PyTorch sees 2"):
        processes.local_device(wanted)


@pytest.mark.parametrize("wanted", ["auto", "gpu", "cuda:", "cuda:x", "", "cpu:1"])
def test_local_device_unknown_name_is_refused(wanted: str) -> None:
    with pytest.raises(UsageError, match="unknown device"):
        processes.local_device(wanted)


def test_rank_before_init_is_read_from_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes.rank() == 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("RANK", "3")
    assert processes.rank() == 3


@pytest.mark.parametrize("device", ["cuda:1", "cpu"])
def test_init_waits_longer_than_a_validation(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, object]]] = []
    monkeypatch.setattr(processes.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(processes.dist, "init_process_group", lambda kind, **options: asked.append((kind, options)))
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    processes.init(torch.device(device))
    ((kind, options),) = asked
    assert options["timeout"] == timedelta(seconds=processes.TIMEOUT) >= timedelta(minutes=30)
    if device == "cpu":
        assert kind == "gloo" and "device_id" not in options
    else:
        assert kind == "nccl" and options["device_id"] == torch.device(device)


def test_job_is_the_name_given_to_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, expected in (("none", None), ("", None), ("street", "street")):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        assert processes.job() == expected
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not processes.was_restarted()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert processes.was_restarted()


def test_lost_peer_is_named_with_the_library_s_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Connection closed\nby peer [10.0.0.2]:29400")

    monkeypatch.setattr(processes, "world_size", lambda: 2)
    monkeypatch.setattr(processes.dist, "all_reduce", fail)
    monkeypatch.setattr(processes.dist, "broadcast_object_list", fail)
    for operation in (lambda: processes.average(torch.zeros(1)), lambda: processes.from_main(True)):
        with pytest.raises(processes.PeerLostError, match=r"lost the others: Connection closed by peer \[10") as raised:
            operation()
        assert raised.value.exit_code == 4


def test_check_equal_names_the_values_and_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    processes.check_equal(8, "checkpoints", "share the folder")
    monkeypatch.setattr(processes, "gather", lambda part: [*part, (0, "other")])
    with pytest.raises(InputError, match=r"different checkpoints: 8 on .+, 0 on other"):
        processes.check_equal(8, "checkpoints", "share the folder")
