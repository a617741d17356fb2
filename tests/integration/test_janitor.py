"""Gangs that find no place, and placement groups that nobody owns: nothing is left, none hangs."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from service import janitor
from service.cluster import Where, cluster
from tests.gang_desk import RESOURCES, Desk, open_pool, until
from trainer.data.shards import Dataset

pytestmark = pytest.mark.timeout(900)

# How long a gang waits for its place here is set with the cluster, for one test waits it out.
IMPATIENT = replace(RESOURCES, start_timeout_s=15)


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    with cluster(Where(None, 2), IMPATIENT):
        yield


@pytest.fixture
def store(local_ray: None, tiny_dataset: Dataset, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    yield tmp_path / "store", tiny_dataset.folder.resolve()
    assert janitor.groups() == []
    assert janitor.remains(set()) == []


@pytest.fixture
def one_cpu_taken(local_ray: None) -> Iterator[Any]:
    """Of the two CPUs, one is another's."""
    group = placement_group([{"CPU": 1}])
    ray.get(group.ready())
    yield group
    remove_placement_group(group)


@ray.remote(num_cpus=0)
class Leaker:
    """Makes a placement group and dies without removing it."""

    def pid(self) -> int:
        return os.getpid()

    def make(self, cpus: int) -> str:
        self.group = placement_group([{"CPU": cpus}])
        return self.group.id.hex()


@pytest.mark.parametrize("cpus", [1, 64], ids=["created", "pending"])
def test_what_a_killed_actor_leaves_is_found_and_removed(local_ray: None, cpus: int):
    leaker = Leaker.remote()
    group = ray.get(leaker.make.remote(cpus))
    until(lambda: [g.is_waiting for g in janitor.groups()] == [cpus == 64])
    assert janitor.leftovers() == []  # its maker lives

    os.kill(ray.get(leaker.pid.remote()), signal.SIGKILL)

    (line,) = until(janitor.leftovers)
    assert group in line
    assert janitor.sweep() == 1
    until(lambda: janitor.groups() == [])


def test_groups_of_a_living_driver_are_left_alone(one_cpu_taken: Any):
    assert janitor.sweep() == 0
    assert [g.id for g in janitor.groups()] == [one_cpu_taken.id.hex()]


def test_a_gang_that_cannot_fit_says_what_it_waits_for_then_gives_up_and_leaves_nothing(
    store: tuple[Path, Path], one_cpu_taken: Any, tmp_path: Path
):
    with open_pool(tmp_path, start_timeout_s=15) as pool:
        desk = Desk(pool, *store)
        outcomes = [desk.start(desk.job(name)) for name in ("one", "two")]
        reasons = {asked.outcome()["reason"] for asked in outcomes}
        (waiting,) = [e for e in pool.events() if e["event"] != "job_ended"]
        num_tries = len(pool._all_controllers)
        later = desk.run(desk.job("later"))

        assert waiting == {"event": "waiting", "reason": "need 2 CPUs, free 1"}
        (reason,) = reasons
        assert reason.startswith("unschedulable: need 2 CPUs, free 1 after 15 s")
        assert (later["state"], later["reason"]) == ("failed", reason)
        assert len(pool._all_controllers) == num_tries  # does not wait for what was not there
        remove_placement_group(one_cpu_taken)


def test_a_pool_that_is_left_while_its_gang_waits_leaves_nothing(
    store: tuple[Path, Path], one_cpu_taken: Any, tmp_path: Path
):
    with open_pool(tmp_path) as pool:
        desk = Desk(pool, *store)
        asked = desk.start(desk.job("waits"))
        until(lambda: any(group.is_waiting for group in janitor.groups()))
        left_at = time.monotonic()

    assert time.monotonic() - left_at < 10  # before the gang would have given up by itself
    assert asked.outcome()["state"] == "cancelled"
    remove_placement_group(one_cpu_taken)
    until(lambda: janitor.groups() == [])


def test_two_gangs_where_one_fits_take_turns(store: tuple[Path, Path], tmp_path: Path):
    with open_pool(tmp_path, num_gangs=2, gang="fresh") as pool:
        desk = Desk(pool, *store)
        asked = [desk.start(desk.job(name)) for name in ("left", "right")]
        states = [each.outcome()["state"] for each in asked]
        gangs = [event["gang"] for event in pool.events() if event["event"] == "gang_started"]

    assert states == ["succeeded"] * 2
    assert len(gangs) == 2


def test_a_dataset_that_is_not_there_is_told_before_the_first_step(
    store: tuple[Path, Path], tmp_path: Path
):
    with open_pool(tmp_path) as pool:
        desk = Desk(pool, store[0], tmp_path / "nowhere")
        outcome = desk.run(desk.job("blind"))

    assert (outcome["state"], outcome["tries"]) == ("failed", 0)
    assert f"{tmp_path / 'nowhere' / 'manifest.json'}: no such file" in outcome["reason"]
