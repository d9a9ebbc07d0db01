"""Distributed training: each process takes its part of every batch, gradients and losses are averaged.

Started by torchrun. The networks need no wrapper: weights start equal (same seed or same checkpoint) and stay equal,
since every process takes the same optimizer step.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spmdeploy.errors import InputError, UnavailableError, UsageError

T = TypeVar("T")

TIMEOUT = 1800.0
"""Seconds that a process waits for the others, e.g. while the main one writes a checkpoint to a slow disk."""
_NO_JOB = ("", "none")
"""What torchrun calls a job that was given no name."""


class PeerLostError(UnavailableError):
    """Other processes of the run ended, or cannot be reached."""


def local_device(wanted: str) -> torch.device:
    """The device of this process.

    Args:
        wanted: "cpu", "cuda" (under torchrun each process takes a GPU of its own) or "cuda:N".

    Raises:
        UsageError: It is none of these, or several processes would share one GPU.
        UnavailableError: PyTorch does not see that GPU.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    given = re.fullmatch(r"cuda(?::(\d{1,2}))?", wanted)
    if given is None:
        raise UsageError(f"unknown device {wanted!r}", "choose from cpu, cuda, cuda:0, cuda:1, ...")
    neighbors = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if given[1] and neighbors > 1:
        raise UsageError(f"{neighbors} processes cannot share {wanted}", "--device cuda gives each its own GPU")
    index = int(given[1] or os.environ.get("LOCAL_RANK", "0"))
    if index >= (available := torch.cuda.device_count()):
        raise UnavailableError(
            f"cuda:{index} was requested, but PyTorch sees {available} CUDA devices", "use --device cpu"
        )
    return torch.device("cuda", index)


def init(device: torch.device, timeout: float = TIMEOUT) -> None:
    """Joins the process group of torchrun; does nothing in a process started alone.

    Args:
        device: Of this process.
        timeout: Seconds that a joint operation waits for the other processes, at most.

    Raises:
        PeerLostError: They do not come.
    """
    if dist.is_available() and dist.is_torchelastic_launched() and not dist.is_initialized():
        # Its functions have the process group as a default argument. First imported later (PyTorch's optimizers do),
        # they would hold the group for good: its threads would outlive `shutdown` and could abort the process's exit.
        import torch.distributed.nn.functional

        limit = timedelta(seconds=timeout)
        with _joint_operation():
            if device.type == "cuda":
                torch.cuda.set_device(device)
                dist.init_process_group("nccl", timeout=limit, device_id=device)
            else:
                dist.init_process_group("gloo", timeout=limit)


def shutdown() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, also before `init` and after `shutdown`."""
    return int(os.environ["RANK"]) if dist.is_available() and dist.is_torchelastic_launched() else 0


def job() -> str | None:
    """The name of torchrun's job (--rdzv-id), which is the same after it has restarted its processes."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return None if name in _NO_JOB else name


def was_restarted() -> bool:
    """Whether torchrun has started this process in place of one that failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def from_main(value: T) -> T:
    """The value that the main process has, in every process."""
    if world_size() == 1:
        return value
    values: list[Any] = [value]
    with _joint_operation():
        dist.broadcast_object_list(values, src=0)
    shared: T = values[0]
    return shared


def check_equal(value: int, what: str, hint: str) -> None:
    """Raises InputError naming hosts unless all processes have the same value."""
    found = gather([(value, socket.gethostname())])
    if len({number for number, _ in found}) > 1:
        listed = ", ".join(f"{number} on {host}" for number, host in found)
        raise InputError(f"the processes have different {what}: {listed}", hint)


@contextmanager
def _joint_operation() -> Iterator[None]:
    """Errors of the libraries as PeerLostError: nothing else makes a joint operation fail."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as exc:  # of gloo, of NCCL and of the store
        reason = " ".join(str(exc).split())[:200]
        raise PeerLostError(f"process {rank()} has lost the others: {reason}", "see the messages of all nodes") from exc


def shard(positions: range) -> range:
    """This process's samples of a batch.

    Raises:
        InputError: The batch size is not a multiple of the number of processes.
    """
    if len(positions) % world_size():
        raise InputError(
            f"a batch of {len(positions)} does not divide over {world_size()} processes", "change the batch size"
        )
    size = len(positions) // world_size()
    return positions[rank() * size : (rank() + 1) * size]


def gather(part: Sequence[T]) -> list[T]:
    """The elements of all processes, in the order in which `range(n)[rank()::world_size()]` takes them from a list."""
    if world_size() == 1:
        return list(part)
    parts: list[Any] = [None] * world_size()
    with _joint_operation():
        dist.all_gather_object(parts, list(part))
    longest = max(map(len, parts))
    return [other[index] for index in range(longest) for other in parts if index < len(other)]


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replaces every gradient by its mean over the processes, in one all-reduce."""
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    with _joint_operation():
        dist.all_reduce(flat)
    flat /= world_size()
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()


def average(values: Tensor) -> Tensor:
    """The mean over the processes, without gradients."""
    values = values.detach().clone()
    if world_size() > 1:
        with _joint_operation():
            dist.all_reduce(values)
        values /= world_size()
    return values
