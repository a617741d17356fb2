"""The file by which a sweep under way is told what to do, and what answers it without a Ray."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.broker import Broker
from service.control import Orders, cancellable, clear_order, read_order, write_order
from service.ledger import Ledger
from service.paths import Paths, SweepPaths
from service.queue.records import Want
from service.states import State
from trainer.errors import DataError, UsageError

NOBODY_S = 240.0


@pytest.fixture
def sweep(tmp_path: Path) -> SweepPaths:
    return Paths(tmp_path).sweep("s-1")


@pytest.fixture
def handlers() -> Iterator[None]:
    """Signals as they were, whatever the test has made of them."""
    known = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in known.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("want", "state", "reason"),
    [
        (Want.PAUSE, State.STOPPED, "paused by alice"),
        (Want.STOP, State.STOPPED, "stopped by alice"),
        (Want.CANCEL, State.CANCELLED, "cancelled by alice"),
    ],
)
def test_an_order_says_how_and_why_its_sweep_ends(sweep: SweepPaths, want, state, reason):
    write_order(sweep, want, "alice")

    order = read_order(sweep)

    assert order is not None
    assert (order.want, order.by, order.state, order.reason) == (want, "alice", state, reason)


def test_an_order_that_is_cleared_is_gone(sweep: SweepPaths):
    write_order(sweep, "stop", "alice")
    clear_order(sweep)
    clear_order(sweep)

    assert read_order(sweep) is None


def test_what_cannot_be_asked_is_refused_by_name(sweep: SweepPaths):
    with pytest.raises(UsageError, match="'resume' cannot be asked of a sweep; ask for pause"):
        write_order(sweep, "resume", "alice")


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"want": "run", "by": "a", "at": 1}', '{"want": "stop", "by": 1, "at": 1}',
     '{"want": ["stop"], "by": "a", "at": 1}', '{"want": "stop", "by": "a", "at": true}'],
)  # fmt: skip
def test_a_file_that_is_no_order_is_named_and_not_obeyed(sweep: SweepPaths, text: str, caplog):
    sweep.root.mkdir(parents=True)
    sweep.control.write_text(text)
    orders = Orders(sweep.control, since=0.0)

    with pytest.raises(DataError, match=r"control\.json"):
        read_order(sweep)
    assert [orders.now(), orders.now()] == [None, None]
    assert len(caplog.records) == 1  # not at every look


def test_an_order_that_comes_while_a_run_is_under_way_is_seen_and_so_is_the_next(sweep):
    orders = Orders(sweep.control, since=time.time())
    seen = [orders.now()]
    for want in ("pause", "cancel"):
        write_order(sweep, want, "bob")
        seen.append(orders.now())
    clear_order(sweep)

    assert [order and order.want for order in [*seen, orders.now()]] == [
        None,
        "pause",
        "cancel",
        None,
    ]


def test_an_order_to_an_earlier_run_is_removed_and_one_to_this_run_is_kept(sweep: SweepPaths):
    write_order(sweep, "cancel", "alice")
    later = Orders(sweep.control, since=time.time() + 1)
    assert later.now() is None
    later.forget_older()
    assert not sweep.control.exists()

    write_order(sweep, "pause", "alice")
    Orders(sweep.control, since=time.time() - 60).forget_older()
    assert read_order(sweep) is not None


def test_a_cancelled_block_is_interrupted_once_so_that_it_can_end_in_order(
    sweep: SweepPaths, handlers: None
):
    orders = Orders(sweep.control, since=time.time())
    threading.Timer(0.2, write_order, [sweep, "cancel", "alice"]).start()
    tidied = []

    def work() -> None:
        try:
            time.sleep(NOBODY_S)
        finally:
            time.sleep(1.5)  # looks go on meanwhile
            tidied.append(orders.cancelled())

    with pytest.raises(KeyboardInterrupt), cancellable(orders):
        work()

    assert tidied == [read_order(sweep)]


@pytest.mark.parametrize("want", ["pause", "stop"])
def test_only_a_cancellation_interrupts(sweep: SweepPaths, handlers: None, want: str):
    write_order(sweep, want, "alice")

    with cancellable(Orders(sweep.control, since=0.0)):
        time.sleep(0.8)


def test_sigterm_is_an_interrupt_like_ctrl_c(sweep: SweepPaths, handlers: None):
    orders = Orders(sweep.control, since=0.0)

    def work() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(NOBODY_S)

    with pytest.raises(KeyboardInterrupt), cancellable(orders):
        work()


def test_a_ledger_whose_append_was_interrupted_goes_on_with_the_next_number(tmp_path: Path):
    path = tmp_path / "events.jsonl"
    with Ledger(path) as ledger:
        ledger.append("sweep_started", sweep_id="s-1")
        whole = path.read_bytes()
        with path.open("ab") as file:
            file.write(b'{"seq": 2, "at": 17')  # as far as the append came
        ledger.recover()
        assert path.read_bytes() == whole

        ledger.append("sweep_finished", state="cancelled", cache_hits=0, reason="interrupted")

    with Ledger(path) as again:
        assert (again.view.events, again.view.state) == (2, State.CANCELLED)
        assert (again.view.reason, again.view.order) == ("interrupted", None)


def test_a_drained_broker_ends_what_was_begun_and_starts_nothing_else():
    def job(name: str, training: str) -> dict[str, Any]:
        return {"id": name, "for": training, "kind": "training", "folder": f"store/{name}"}

    async def drain() -> list[dict[str, Any]]:
        broker = Broker(1, 1, 0, None, one_each=False, idle_s=0.2)
        asked = []
        for what in (job("trunk", "a"), job("b", "b")):
            asked.append(asyncio.create_task(broker.run(what)))
            await asyncio.sleep(0.01)
        await broker.take("gang-0")
        await broker.drain("stopped by alice")
        await broker.finish("gang-0", "trunk", "succeeded")
        asked.append(asyncio.create_task(broker.run(job("c", "c"))))
        asked.append(asyncio.create_task(broker.run(job("a", "a"))))  # the tail of what was begun
        assert await broker.wait_for_work("gang-0")
        taken = await broker.take("gang-0")
        assert taken is not None
        await broker.finish("gang-0", taken["id"], "succeeded")
        return [await each for each in asked]

    trunk, other, later, tail = asyncio.run(asyncio.wait_for(drain(), NOBODY_S))

    assert [trunk["state"], tail["state"]] == ["succeeded", "succeeded"]
    for refused in (other, later):
        assert (refused["state"], refused["reason"]) == ("cancelled", "stopped by alice")
        assert refused["tries"] == 0
