"""The exception tree: every error says what is wrong, usually what to do, and which exit code a command ends with."""

from __future__ import annotations


class SpmDeployError(Exception):
    """Base of every error raised on purpose.

    `problem` names the offending file or value; `hint` says what to do about it; `exit_code` is what the command line
    returns.
    """

    exit_code = 1

    def __init__(self, problem: str, hint: str | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.hint = hint


class UsageError(SpmDeployError):
    """Options that contradict each other or are missing."""

    exit_code = 2


class BatchItemsFailedError(SpmDeployError):
    """A batch ran to its end, but some of its items failed."""

    exit_code = 3


class UnavailableError(SpmDeployError):
    """This machine cannot do what was asked: no GPU, no driver, a library that is not installed."""

    exit_code = 4


class VerificationError(SpmDeployError):
    """A graph or engine ran, but its pictures differ from the reference by more than the limits allow."""

    exit_code = 5


class BundleError(SpmDeployError):
    """A bundle that is incomplete, altered, unsafe or made for something else."""

    exit_code = 6


class InputError(SpmDeployError):
    """A picture, label map, mask, checkpoint or manifest that cannot be used as it is."""

    exit_code = 7


class OutOfMemoryError(SpmDeployError):
    """The device or the host has too little memory for what was asked."""

    exit_code = 8
