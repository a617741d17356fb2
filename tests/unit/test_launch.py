"""How a sweep's driver answers orders that come before, while and after its trainings run."""

import asyncio
import io
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from service.broker import Broker
from service.cluster import Where
from service.control import Orders, clear_order, read_order, write_order
from service.identity import inputs_of
from service.launch import Launcher, Site
from service.ledger import Ledger
from service.paths import Paths
from service.plan import make_plan
from service.recorder import Recorder
from service.states import State
from service.store import Store
from service.sweep import load_sweep
from service.talk import Talk
from trainer.data.shards import Dataset

SWEEP = """\
name: ordered
recipe: tiny
space:
  train.optimizer.matrix.lr: {values: [0.01]}
seeds: {search: [7]}
"""
NOBODY_S = 240.0


class Gangs:
    """A pool of gangs whose broker is in this process, with one gang that is not up yet."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.broker = Broker(1, 1, 0, None, one_each=False, idle_s=NOBODY_S)

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, NOBODY_S))

    def events(self) -> list[dict[str, Any]]:
        return self.do(self.broker.events())

    def running(self) -> dict[str, float]:
        return self.do(self.broker.running())

    def stop(self, reason: str) -> None:
        self.do(self.broker.stop(reason))

    def drain(self, reason: str) -> None:
        self.do(self.broker.drain(reason))


class Driver:
    """A sweep of one training, which Ray Tune has been handed and is still starting."""

    def __init__(self, root: Path, dataset: Dataset) -> None:
        file = root / "sweep.yaml"
        file.write_text(SWEEP)
        sweep, paths, talk = load_sweep(file), Paths(root), Talk(Console(file=io.StringIO()))
        plan = make_plan(sweep, inputs_of(dataset), str(file))
        self.folder = paths.sweep(plan.sweep_id)
        self.ledger = Ledger(self.folder.ledger)
        self.ledger.append("sweep_started", sweep_id=plan.sweep_id)
        store = Store(paths.store)
        self.recorder = Recorder(self.ledger, store, talk, sweep.constraints, sweep.clocks)
        self.gangs = Gangs()
        orders, site = Orders(self.folder.control, time.time()), Site(paths, dataset, Where())
        self.launcher = Launcher(sweep, plan, site, self.recorder, talk, orders)
        (self.training,) = plan.trainings
        self.recorder.expect(self.training)

    def look(self) -> None:
        self.launcher.attend(self.gangs)

    def start(self) -> asyncio.Task[dict[str, Any]]:
        """The trial is up: it asks for its training."""
        self.recorder.training_started(self.training)
        what = {"id": self.training.id, "kind": "training", "folder": "folder"}
        asked = self.gangs.loop.create_task(self.gangs.broker.run(what))
        self.gangs.do(asyncio.sleep(0.01))
        return asked

    def do(self) -> None:
        """A gang does the training."""
        self.gangs.do(self.gangs.broker.take("gang-0"))
        self.gangs.do(self.gangs.broker.finish("gang-0", self.training.id, State.SUCCEEDED))

    def end(self, asked: asyncio.Task[dict[str, Any]]) -> State:
        """The trial reports what became of its training."""
        outcome = self.gangs.do(asyncio.wait_for(asked, NOBODY_S))
        self.recorder.training_finished(self.training, {**outcome, "cached": False, "result": None})
        return outcome["state"]


@pytest.fixture
def driver(tmp_path: Path, tiny_dataset: Dataset) -> Iterator[Driver]:
    driver = Driver(tmp_path, tiny_dataset)
    yield driver
    driver.ledger.close()
    driver.gangs.loop.close()


@pytest.mark.parametrize(
    ("want", "reason"), [("pause", "paused by alice"), ("stop", "stopped by alice")]
)
def test_an_order_before_the_last_training_is_up_is_obeyed_before_the_gangs_refuse_it(
    driver: Driver, want: str, reason: str
):
    write_order(driver.folder, want, "alice")
    driver.look()
    asked = driver.start()
    driver.look()

    assert driver.end(asked) == State.CANCELLED
    assert driver.launcher.obeyed == read_order(driver.folder)
    assert driver.launcher.refusals == [reason]


def test_an_order_that_is_taken_back_before_a_training_is_up_stops_nothing(driver: Driver):
    write_order(driver.folder, "pause", "alice")
    driver.look()
    clear_order(driver.folder)
    asked = driver.start()
    driver.look()
    driver.do()

    assert driver.end(asked) == State.SUCCEEDED
    assert (driver.launcher.obeyed, driver.launcher.refusals) == (None, [])


@pytest.mark.parametrize("want", ["pause", "stop"])
def test_an_order_after_the_last_training_has_ended_keeps_nothing_from_going_on(
    driver: Driver, want: str
):
    asked = driver.start()
    driver.do()
    state = driver.end(asked)
    write_order(driver.folder, want, "alice")
    driver.look()

    assert state == State.SUCCEEDED
    assert (driver.launcher.obeyed, driver.launcher.refusals) == (None, [])
