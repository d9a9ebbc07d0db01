"""Exceptions with the problem, a hint and the exit code of the command."""

from __future__ import annotations


def printable(text: str) -> str:
    """Escapes control characters and direction overrides, which text from files may contain."""
    if text.isprintable():
        return text
    # Lone surrogates stay: they stand for bytes of file names, and output streams escape them.
    return "".join(c if c.isprintable() or c in "\n\t" or 0xD800 <= ord(c) < 0xE000 else repr(c)[1:-1] for c in text)


class SpmDeployError(Exception):
    """Base of all errors that the package raises.

    Attributes:
        problem: What is wrong, with the file or value.
        hint: How to fix it.
        exit_code: Exit code of the command line.
    """

    exit_code = 1

    def __init__(self, problem: str, hint: str | None = None) -> None:
        super().__init__(printable(problem))
        self.problem = printable(problem)
        self.hint = None if hint is None else printable(hint)


class UsageError(SpmDeployError):
    """Options that contradict each other or are missing."""

    exit_code = 2


class BatchItemsFailedError(SpmDeployError):
    """A batch ran to its end, but some of its items failed."""

    exit_code = 3


class UnavailableError(SpmDeployError):
    """This machine lacks something: a GPU, a driver, a library."""

    exit_code = 4


class VerificationError(SpmDeployError):
    """A graph or engine ran, but its results deviate from the reference by more than the limits allow."""

    exit_code = 5


class BundleError(SpmDeployError):
    """A bundle is incomplete, corrupt, unsafe or made for something else."""

    exit_code = 6


class InputError(SpmDeployError):
    """An image, label map, mask, checkpoint or manifest cannot be used as it is."""

    exit_code = 7


class OutOfMemoryError(SpmDeployError):
    """The device or the host has too little memory."""

    exit_code = 8
