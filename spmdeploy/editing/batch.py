"""Runs the edits of a manifest, each with a status on disk that survives an interruption."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from itertools import islice
from pathlib import Path

from spmdeploy.editing.editor import Editor
from spmdeploy.editing.manifest import BatchItem
from spmdeploy.editing.options import EditRequest
from spmdeploy.editing.run import run_edit
from spmdeploy.editing.status import ItemStatus, StatusFile
from spmdeploy.errors import InputError, OutOfMemoryError, SpmDeployError, UsageError
from spmdeploy.imaging import files as images


def run_batch(
    editor: Editor,
    items: list[BatchItem],
    output_dir: Path,
    *,
    jobs: int = 1,
    resume: bool = False,
    progress: Callable[[ItemStatus], None] = lambda status: None,
) -> list[ItemStatus]:
    """Edit every item, and append its status to `status.jsonl` in the output folder as soon as it is known.

    A failed row does not stop the others; running out of memory does.

    Args:
        editor: shared by all jobs.
        items: the rows.
        output_dir: where `status.jsonl` is written.
        jobs: edits in progress at once.
        resume: skip rows whose output exists and was recorded as done.
        progress: called with each final status.

    Returns:
        The statuses by row.
    """
    if jobs < 1:
        raise UsageError(f"jobs is {jobs}; at least one is needed")
    statuses = []
    with StatusFile(output_dir) as log:
        earlier = log.earlier if resume else {}

        def work(item: BatchItem) -> ItemStatus:
            # Recorded here and not where results are collected: after Ctrl-C running edits still end, uncollected.
            status = _edit_item(editor, item, output_dir, earlier, log)
            log.add(status)
            return status

        for status in _in_order_of_completion(work, items, jobs):
            progress(status)
            statuses.append(status)
    return sorted(statuses, key=lambda status: status.row)


def _edit_item(
    editor: Editor, item: BatchItem, output_dir: Path, earlier: dict[str, str], log: StatusFile
) -> ItemStatus:
    if item.request is None:
        assert item.error is not None
        return ItemStatus(item.row, None, "failed", item.error.problem, item.error.hint)
    request, output = item.request, item.request.output.relative_to(output_dir).as_posix()
    before = earlier.get(output)
    if before in ("done", "skipped") and request.output.exists():
        return ItemStatus(item.row, output, "skipped")
    if before == "started":
        # A killed run may have written the output (completely, as always) without recording it: it may be replaced.
        request = replace(request, overwrite=True)
    try:
        _prepare_output(request)
        log.add(ItemStatus(item.row, output, "started"))
        run_edit(editor, request)
    except (OutOfMemoryError, MemoryError):
        raise
    except SpmDeployError as exc:
        return ItemStatus(item.row, output, "failed", exc.problem, exc.hint)
    except Exception as exc:  # a defect must not stop a long batch
        return ItemStatus(item.row, output, "failed", f"unexpected {type(exc).__name__}: {exc}")
    return ItemStatus(item.row, output, "done")


def _prepare_output(request: EditRequest) -> None:
    try:
        request.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise InputError(f"the folder of {request.output} cannot be made: {exc.strerror}") from exc
    images.check_output(request.output, request.overwrite)


def _in_order_of_completion(
    work: Callable[[BatchItem], ItemStatus], items: list[BatchItem], jobs: int
) -> Iterator[ItemStatus]:
    with ThreadPoolExecutor(jobs) as pool:
        waiting = iter(items)
        running: set[Future[ItemStatus]] = {pool.submit(work, item) for item in islice(waiting, jobs)}
        try:
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                running |= {pool.submit(work, item) for item in islice(waiting, len(done))}
                for future in done:
                    yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)
