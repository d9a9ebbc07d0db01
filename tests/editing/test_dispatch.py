"""Which items the workers of a fleet get, in chunks, once, and again after a loss."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from spmdeploy.editing.batch import PreparedItem
from spmdeploy.editing.dispatch import MAX_ATTEMPTS, MAX_CHUNK, Dispatcher
from spmdeploy.editing.options import EditRequest


def items(count: int) -> Iterator[PreparedItem]:
    for row in range(1, count + 1):
        request = EditRequest(Path("a.png"), Path(f"out/{row}.png"), fill="road", mask=Path("m.png"))
        yield PreparedItem(row, f"{row}.png", request)


def rows(chunk: list[PreparedItem]) -> list[int]:
    return [item.row for item in chunk]


def test_dispatcher_chunks_grow_with_measured_speed_and_shrink_at_the_end() -> None:
    dispatcher = Dispatcher(items(1000), 1000)
    assert rows(dispatcher.take(4)) == [1]
    dispatcher.record(1, 0.1)
    assert rows(dispatcher.take(4)) == [2, 3, 4, 5, 6]
    for _ in range(100):
        dispatcher.record(1, 0.001)
    sizes = []
    while chunk := dispatcher.take(4):
        sizes.append(len(chunk))
    assert sum(sizes) == 994 and sizes[0] == MAX_CHUNK and sizes[-8:] == [1] * 8
    assert sizes == sorted(sizes, reverse=True)


def test_dispatcher_slow_items_are_sent_one_at_a_time() -> None:
    dispatcher = Dispatcher(items(9), 9)
    dispatcher.record(1, 30.0)
    assert rows(dispatcher.take(1)) == [1]


def test_dispatcher_items_given_back_keep_their_request() -> None:
    dispatcher = Dispatcher(items(1), 1)
    chunk = dispatcher.take(1)
    dispatcher.give_back(chunk)
    assert dispatcher.take(1) == chunk and dispatcher.take(1) == []


def test_dispatcher_lost_items_are_repeated_alone_and_then_given_up() -> None:
    dispatcher = Dispatcher(items(3), 3)
    dispatcher.record(1, 0.001)
    chunk = [item for _ in range(3) for item in dispatcher.take(1)]
    assert dispatcher.lose(chunk, "killed") == []
    again = [dispatcher.take(1) for _ in range(3)]
    assert [rows(one) for one in again] == [[1], [2], [3]]
    assert all(one[0].request.overwrite for one in again)
    for _ in range(MAX_ATTEMPTS - 2):
        assert dispatcher.lose(again[1], "killed") == []
        again[1] = dispatcher.take(1)
    (status,) = dispatcher.lose(again[1], "killed")
    assert (status.row, status.status) == (2, "failed") and str(status.error).endswith("killed")


def test_dispatcher_loss_of_a_node_is_not_held_against_items() -> None:
    dispatcher = Dispatcher(items(1), 1)
    for _ in range(2 * MAX_ATTEMPTS):
        assert dispatcher.lose(dispatcher.take(1), "gone", counts=False) == []
    assert rows(dispatcher.take(1)) == [1]
