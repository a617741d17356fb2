"""The outbox of notices: each is made once and kept until it has arrived."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.queue.database import open_database
from service.queue.deliveries import Deliveries
from tests import queues

BEST = ("best-7", "new_best", {"val_bpb": 1.06})
DONE = ("done", "done", {"state": "succeeded"})


@pytest.fixture
def deliveries(tmp_path: Path) -> Iterator[Deliveries]:
    engine = open_database(queues.sqlite_url(tmp_path))
    yield Deliveries(engine)
    engine.dispose()


def keys_due(deliveries: Deliveries, now: float) -> list[str]:
    return [delivery.key for delivery in deliveries.due(now, 10)]


def test_a_notice_waits_until_it_has_arrived(deliveries: Deliveries) -> None:
    assert deliveries.add("toy-1", *BEST)

    (delivery,) = deliveries.due(time.time(), 10)

    assert (delivery.sweep_id, delivery.key, delivery.kind) == ("toy-1", "best-7", "new_best")
    assert delivery.payload == {"val_bpb": 1.06}
    assert deliveries.num_waiting() == 1
    deliveries.delivered(delivery.id, time.time())
    assert deliveries.due(time.time() + 1e6, 10) == []
    assert deliveries.num_waiting() == 0


def test_a_notice_is_made_once(deliveries: Deliveries) -> None:
    assert deliveries.add("toy-1", *BEST)
    assert not deliveries.add("toy-1", *BEST)
    assert deliveries.add("toy-2", *BEST)

    deliveries.delivered(deliveries.due(time.time(), 1)[0].id, time.time())

    assert not deliveries.add("toy-1", *BEST), "one that has arrived is not made again"
    assert len(deliveries.due(time.time(), 10)) == 1


def test_a_failed_try_is_due_again_later(deliveries: Deliveries) -> None:
    deliveries.add("toy-1", *BEST)
    deliveries.add("toy-2", *DONE)
    now = time.time()
    first, _ = deliveries.due(now, 10)

    deliveries.failed(first.id, "connection refused", now + 60)

    assert keys_due(deliveries, now) == ["done"]
    assert keys_due(deliveries, now + 61) == ["best-7", "done"]
    again = deliveries.due(now + 61, 1)[0]
    assert (again.attempts, again.error) == (1, "connection refused")


def test_the_notices_of_a_sweep_wait_for_its_oldest_and_hide_no_others(
    deliveries: Deliveries,
) -> None:
    stuck = [(f"best-{number}", "new_best", {}) for number in range(30)]
    deliveries.add_all("toy-1", 30, stuck)
    deliveries.add("toy-2", *DONE)
    now = time.time()

    due = deliveries.due(now, 10)
    deliveries.failed(due[0].id, "connection refused", now + 60)

    assert [(row.sweep_id, row.key) for row in due] == [("toy-1", "best-0"), ("toy-2", "done")]
    assert keys_due(deliveries, now) == ["done"]
    deliveries.delivered(due[0].id, now)
    assert keys_due(deliveries, now) == ["best-1", "done"]


def test_what_nobody_waits_for_is_given_up_at_once(deliveries: Deliveries) -> None:
    deliveries.add_all("toy-1", 9, [(f"a:{number}", "new_best", {}) for number in range(40)])
    deliveries.add_all("toy-2", 9, [("b:done", "done", {}), ("b%:done", "done", {})])

    assert deliveries.give_up_others(["b:"], "gone") == 41
    assert keys_due(deliveries, time.time()) == ["b:done"]
    assert deliveries.give_up_others([], "gone") == 1
    assert deliveries.num_waiting() == 0


def test_what_has_arrived_stays_so(deliveries: Deliveries) -> None:
    deliveries.add("toy-1", *BEST)
    (delivery,) = deliveries.due(time.time(), 10)

    deliveries.delivered(delivery.id, time.time())
    deliveries.failed(delivery.id, "a late answer", time.time())

    assert deliveries.num_waiting() == 0


def test_the_cursor_moves_with_the_notices_and_never_back(deliveries: Deliveries) -> None:
    assert deliveries.seen("toy-1") == 0

    assert deliveries.add_all("toy-1", 12, [BEST]) == 1
    assert deliveries.add_all("toy-1", 20, [BEST, DONE]) == 1
    assert deliveries.add_all("toy-1", 5, []) == 0

    assert deliveries.seen("toy-1") == 20
    assert deliveries.seen("toy-2") == 0
    assert keys_due(deliveries, time.time()) == ["best-7"]
    assert deliveries.num_waiting() == 2


def test_notices_that_fail_midway_leave_neither_notice_nor_cursor(deliveries: Deliveries) -> None:
    def broken():
        yield BEST
        raise RuntimeError("the reader of the ledger broke")

    with pytest.raises(RuntimeError):
        deliveries.add_all("toy-1", 12, broken())

    assert deliveries.seen("toy-1") == 0
    assert deliveries.num_waiting() == 0


def test_several_makers_at_once_make_a_notice_once(deliveries: Deliveries) -> None:
    made: list[int] = []
    makers = [
        threading.Thread(target=lambda: made.append(deliveries.add_all("toy-1", 9, [BEST, DONE])))
        for _ in range(8)
    ]

    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()

    assert sum(made) == 2
    assert deliveries.num_waiting() == 2
