"""Times the phases of one edit and reports its progress."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from spmdeploy.types import Progress

Phase = Literal["validate", "plan", "prepare", "run", "stitch"]


class PhaseTimer:
    """Milliseconds by phase, added up over windows and tiles; calls of the session; steps done of all."""

    def __init__(self, progress: Progress | None = None) -> None:
        """progress(done, total) is told of every step, from (0, total) on."""
        self.milliseconds: dict[str, float] = dict.fromkeys(("validate", "plan", "prepare", "run", "stitch"), 0.0)
        self.batches = 0
        self._progress = progress
        self._done = self._total = 0

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.milliseconds[name] += (time.perf_counter() - start) * 1000

    def begin(self, total: int) -> None:
        self._total = total
        self.advance(0)

    def advance(self, steps: int) -> None:
        self._done += steps
        if self._progress is not None:
            self._progress(self._done, self._total)
