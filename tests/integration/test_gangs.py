"""Warm gangs on a real local Ray: what they give back, and what happens when anything dies."""

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
import ray
import torch

from service import janitor
from service.cluster import Where, cluster
from service.gangs import GangPool
from service.trials import call
from tests.gang_desk import RESOURCES, Desk, open_pool, until, workers
from tests.models import assert_same_bits
from trainer.codec import dump
from trainer.data.shards import Dataset
from trainer.runtime.files import read_json, write_json
from trainer.specs.task import Departure

# Ray and its workers start slowly where the cores are busy with other work.
pytestmark = pytest.mark.timeout(900)

A = TypeVar("A")


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    with cluster(Where(None, 2), RESOURCES):
        yield


@pytest.fixture(scope="module")
def desk(
    local_ray: None, tiny_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Desk]:
    """One warm gang of two for most of the tests, which leave it up."""
    tmp = tmp_path_factory.mktemp("gangs")
    with open_pool(tmp) as pool:
        yield Desk(pool, tmp / "store" / "trainings", tiny_dataset.folder.resolve())
    assert janitor.remains(pool._all_controllers) == []


def told(pool: GangPool) -> list[dict[str, Any]]:
    """What the pool tells for the ledger; the end of each job comes beside it."""
    return [event for event in pool.events() if event["event"] != "job_ended"]


LONG = {"train__iterations": 200, "observe__log_every": 1, "observe__checkpoint_every": 20}


@pytest.fixture(scope="module")
def undisturbed(desk: Desk) -> dict[str, Any]:
    """The long training, straight through; the first of the gang's jobs."""
    desk.pool.events()
    outcome = desk.run(desk.job("undisturbed", **LONG))
    assert outcome["state"] == "succeeded"
    return outcome | {"events": told(desk.pool)}


def halted(
    desk: Desk, name: str, num_lines: int, ask: Callable[[dict[str, Any]], A]
) -> tuple[dict[str, Any], A, int]:
    """A long training of which one worker stands still once it has written so many lines: the job,
    who asked for it, the worker. One that was over before we looked is another's turn."""
    for number in itertools.count():
        job = desk.job(f"{name}-{number}", **LONG)
        asked = ask(job)
        until(lambda job=job: len(desk.lines(job["id"])) > num_lines)
        worker = workers().popitem()[1]
        os.kill(worker, signal.SIGSTOP)
        if job["id"] in desk.pool.running():
            return job, asked, worker
        os.kill(worker, signal.SIGCONT)
    raise AssertionError


def test_a_gang_says_what_it_runs_on_when_it_starts(undisturbed: dict[str, Any]):
    (started,) = undisturbed["events"]

    assert started["event"] == "gang_started"
    assert [node["torch"] for node in started["nodes"]] == [torch.__version__] * 2
    assert all(tflops > 0 for tflops in started["probe"]["tflops"])


def test_the_second_training_needs_no_new_workers(desk: Desk, undisturbed: dict[str, Any]):
    asked = [desk.start(desk.job(f"turn-{i}", observe__log_every=1)) for i in range(2)]
    assert [each.outcome()["state"] for each in asked] == ["succeeded"] * 2

    turns = sorted((desk.lines(f"turn-{i}") for i in range(2)), key=lambda lines: lines[0]["at"])
    first_end = turns[0][-1]["at"]
    first_step = next(line["at"] for line in turns[1] if line["step"] == 1)
    assert first_end < first_step
    assert told(desk.pool) == []  # no gang was started


def test_a_trunk_and_its_tail_equal_the_straight_training(desk: Desk, undisturbed: dict[str, Any]):
    state = desk.store.parent / "states" / "half"
    straight = desk.job("straight")
    departures = [[dump(Departure(step=6)), str(state)]]
    trunk = straight | {"id": "trunk", "kind": "trunk", "states": departures}
    tail = straight | {"id": "tail", "folder": str(desk.store / "tail"), "start": str(state)}

    outcomes = [
        desk.run(job)["state"]
        for job in (straight, trunk | {"folder": str(desk.store / "trunk")}, tail)
    ]

    assert outcomes == ["succeeded"] * 3
    assert desk.result("tail")["steps_computed"] == 6
    assert_same_bits(desk.bank("tail"), desk.bank("straight"))


def test_a_hopeless_training_fails_with_its_reason_and_the_gang_lives_on(
    desk: Desk, undisturbed: dict[str, Any]
):
    before = workers()
    hopeless = desk.job("hopeless", model__vocab_size=64)

    failed, next_one = desk.run(hopeless), desk.run(desk.job("after-hopeless"))

    assert failed["state"] == "failed"
    assert "set model.vocab_size=320" in failed["reason"]
    assert failed["tries"] == 1
    assert next_one["state"] == "succeeded"
    assert workers() == before


def test_a_judged_training_stops_on_all_ranks_and_the_rung_is_recorded(
    desk: Desk, undisturbed: dict[str, Any]
):
    outcome = desk.run(desk.job("judged", observe__validate_every=4))

    (rung,) = told(desk.pool)
    assert outcome["state"] == "stopped"
    assert outcome["reason"] == rung["reason"]
    assert (rung["event"], rung["training"], rung["step"]) == ("rung", "judged", 4)
    assert rung["verdict"] == "stop"
    assert not (desk.store / "judged" / "result.json").exists()


def test_a_training_that_another_machine_began_is_told_with_both(
    desk: Desk, undisturbed: dict[str, Any]
):
    began = desk.job("began", observe__validate_every=4)
    desk.run(began)  # judged, and stopped after a checkpoint
    told(desk.pool)
    facts = desk.store / "began" / "facts.json"
    write_json(facts, {**read_json(facts), "torch": "2.9.1"})

    outcome = desk.run(desk.job("goes-on") | {"folder": began["folder"]})

    found = read_json(facts)
    assert outcome["state"] == "succeeded"
    assert desk.result("began")["steps_computed"] < desk.result("began")["steps"]
    assert found["torch"] == "2.9.1"
    assert [each["torch"] for each in found["resumed"]] == [torch.__version__]


def test_a_killed_caller_finds_its_job_under_way_and_it_is_done_once(
    desk: Desk, undisturbed: dict[str, Any]
):
    ask = ray.remote(num_cpus=0)(call)
    job, caller, worker = halted(
        desk, "attached", 5, lambda job: ask.remote(desk.pool.broker_name, job)
    )
    ray.cancel(caller, force=True)

    seconds = desk.pool.running()[job["id"]]
    os.kill(worker, signal.SIGCONT)
    outcome = desk.run(job)

    assert (outcome["state"], outcome["tries"]) == ("succeeded", 1)
    assert outcome["occupied_s"] > seconds > 0
    assert desk.result(job["id"])["steps_computed"] == 200


def test_a_job_that_is_done_is_not_done_again(desk: Desk, undisturbed: dict[str, Any]):
    again = desk.run(desk.job("undisturbed", **LONG))

    assert again["occupied_s"] == undisturbed["occupied_s"]


def test_a_killed_worker_costs_a_try_and_no_result(desk: Desk, undisturbed: dict[str, Any]):
    job, asked, worker = halted(desk, "killed", 80, desk.start)
    os.kill(worker, signal.SIGKILL)

    outcome = asked.outcome()

    assert (outcome["state"], outcome["tries"]) == ("succeeded", 2)
    assert desk.result(job["id"])["steps_computed"] <= 140  # went on from its checkpoint
    assert_same_bits(desk.bank(job["id"]), desk.bank("undisturbed"))


def test_what_does_not_fit_into_memory_fails_at_once_and_the_next_job_runs(
    desk: Desk, undisturbed: dict[str, Any]
):
    wide = 1 << 22
    model = {"model__dim": wide, "model__attention": {"num_heads": 2, "num_kv_heads": 1}}

    failed, next_one = desk.run(desk.job("wide", **model)), desk.run(desk.job("after-wide"))

    assert (failed["state"], failed["tries"]) == ("failed", 1)
    assert "out of memory" in failed["reason"]
    assert next_one["state"] == "succeeded"


def test_stopping_the_pool_cancels_what_runs_and_refuses_the_rest(
    local_ray: None, desk: Desk, undisturbed: dict[str, Any]
):
    endless = desk.job("endless", train__iterations=100_000, observe__log_every=1)
    asked = desk.start(endless)
    until(lambda: len(desk.lines("endless")) > 3)

    desk.pool.stop("the budget is used up")
    outcome, later = asked.outcome(), desk.run(desk.job("later"))

    assert (outcome["state"], outcome["reason"]) == ("cancelled", "the budget is used up")
    assert list((desk.store / "endless" / "checkpoint").glob("*/index.json"))
    assert (later["state"], later["tries"]) == ("cancelled", 0)
