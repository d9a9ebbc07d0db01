"""Runs the edits of a manifest, each with a status on disk that survives an interruption."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import islice

from spmdeploy.editing.editor import Editor
from spmdeploy.editing.manifest import BatchItem
from spmdeploy.editing.options import EditRequest
from spmdeploy.editing.run import run_edit
from spmdeploy.editing.status import ItemStatus, StatusLog, open_status
from spmdeploy.errors import InputError, OutOfMemoryError, SpmDeployError, UsageError
from spmdeploy.files import EXISTS_HINT
from spmdeploy.imaging import files as images
from spmdeploy.inputs import LocalOrRemote
from spmdeploy.remote import RemotePath


@dataclass(frozen=True)
class PreparedItem:
    """A row whose output may be written, and which is recorded as started."""

    row: int
    output: str
    """Relative to the output folder."""
    request: EditRequest


def run_batch(
    editor: Editor,
    items: list[BatchItem],
    output_dir: LocalOrRemote,
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
    with open_status(output_dir) as log:

        def work(item: PreparedItem | ItemStatus) -> ItemStatus:
            # Recorded here and not where results are collected: after Ctrl-C running edits still end, uncollected.
            status = edit_item(editor, item) if isinstance(item, PreparedItem) else item
            log.add(status)
            return status

        for status in _in_order_of_completion(work, prepare_items(items, output_dir, log, resume), jobs):
            progress(status)
            statuses.append(status)
    return sorted(statuses, key=lambda status: status.row)


def prepare_items(
    items: Iterable[BatchItem], output_dir: LocalOrRemote, log: StatusLog, resume: bool
) -> Iterator[PreparedItem | ItemStatus]:
    """Yield the rows to edit, recorded as started, and the final statuses of the others, not yet recorded.

    Args:
        items: The rows of the manifest in order.
        output_dir: Folder of the outputs; paths in the statuses are relative to it.
        log: Receives the status "started", for `log.group` rows at once.
        resume: Skip rows that earlier runs have finished and whose output exists.
    """
    waiting = iter(items)
    while group := list(islice(waiting, log.group)):
        prepared = [_prepare_item(item, output_dir, log, resume) for item in group]
        if started := [
            ItemStatus(item.row, item.output, "started") for item in prepared if isinstance(item, PreparedItem)
        ]:
            log.add(*started)
        yield from prepared


def edit_item(editor: Editor, item: PreparedItem) -> ItemStatus:
    """Edit one row and return its status. Raises nothing but OutOfMemoryError and MemoryError."""
    try:
        run_edit(editor, item.request)
    except (OutOfMemoryError, MemoryError):
        raise
    except SpmDeployError as exc:
        return ItemStatus(item.row, item.output, "failed", exc.problem, exc.hint)
    except Exception as exc:  # a defect must not stop a long batch
        return ItemStatus(item.row, item.output, "failed", f"unexpected {type(exc).__name__}: {exc}")
    return ItemStatus(item.row, item.output, "done")


def _prepare_item(
    item: BatchItem, output_dir: LocalOrRemote, log: StatusLog, resume: bool
) -> PreparedItem | ItemStatus:
    if item.request is None:
        assert item.error is not None
        return ItemStatus(item.row, None, "failed", item.error.problem, item.error.hint)
    request, output = item.request, _relative(item.request.output, output_dir)
    before = log.earlier.get(output) if resume else None
    if before in ("done", "skipped") and log.exists(output):
        return ItemStatus(item.row, output, "skipped")
    if before == "started":
        # A killed run may have written the output (completely, as always) without recording it: it may be replaced.
        request = replace(request, overwrite=True)
    try:
        _prepare_output(request, log.exists(output))
    except SpmDeployError as exc:
        return ItemStatus(item.row, output, "failed", exc.problem, exc.hint)
    except Exception as exc:  # a defect must not stop a long batch
        return ItemStatus(item.row, output, "failed", f"unexpected {type(exc).__name__}: {exc}")
    return PreparedItem(item.row, output, request)


def _relative(output: LocalOrRemote, output_dir: LocalOrRemote) -> str:
    if isinstance(output, RemotePath):
        return output.url[len(str(output_dir).rstrip("/")) + 1 :]
    assert not isinstance(output_dir, RemotePath)
    return output.relative_to(output_dir).as_posix()


def _prepare_output(request: EditRequest, exists: bool) -> None:
    output = request.output
    if isinstance(output, RemotePath):
        if exists and not request.overwrite:
            raise InputError(f"{output} exists already", EXISTS_HINT)
    else:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise InputError(f"the folder of {output} cannot be made: {exc.strerror}") from exc
    images.check_output(output, request.overwrite)


def _in_order_of_completion(
    work: Callable[[PreparedItem | ItemStatus], ItemStatus], waiting: Iterator[PreparedItem | ItemStatus], jobs: int
) -> Iterator[ItemStatus]:
    with ThreadPoolExecutor(jobs) as pool:
        running: set[Future[ItemStatus]] = {pool.submit(work, item) for item in islice(waiting, jobs)}
        try:
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                results = [future.result() for future in done]  # raises before another item begins
                running |= {pool.submit(work, item) for item in islice(waiting, len(done))}
                yield from results
        finally:
            pool.shutdown(cancel_futures=True)
