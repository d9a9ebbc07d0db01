"""Background loading: worker threads prepare the next batches while the networks compute.

A batch is a function of its position alone, so the number of workers never changes what is trained on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class BackgroundLoader(Generic[T]):
    """Iterates over `load(start)`, `load(start + step)`, ... in order, prepared ahead by threads.

    Args:
        load: prepares the batch at a position; called from several threads.
        start: first position.
        step: distance of positions.
        workers: threads; 0 loads in the calling thread.
        end: no position from here on is loaded; None: without end.
    """

    def __init__(self, load: Callable[[int], T], start: int, step: int, workers: int, end: int | None = None) -> None:
        self._load = load
        self._step = step
        self._end = end
        self._next = start
        self._workers = workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="loader") if workers else None
        self._pending: deque[Future[T]] = deque()

    def __next__(self) -> T:
        """The next batch. Raises what `load` raised for it, and StopIteration at the end."""
        if self._pool is None:
            if self._at_end():
                raise StopIteration
            self._next += self._step
            return self._load(self._next - self._step)
        self._fill()
        if not self._pending:
            raise StopIteration
        batch = self._pending.popleft().result()
        self._fill()
        return batch

    def __iter__(self) -> BackgroundLoader[T]:
        return self

    def close(self) -> None:
        """Drops what was prepared ahead and ends the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()

    def _fill(self) -> None:
        assert self._pool is not None
        while len(self._pending) <= self._workers and not self._at_end():
            self._pending.append(self._pool.submit(self._load, self._next))
            self._next += self._step

    def _at_end(self) -> bool:
        return self._end is not None and self._next >= self._end
