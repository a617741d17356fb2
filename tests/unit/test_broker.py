"""The broker's book-keeping: who gets which job, what a lost try costs, when a gang is given up."""

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from service.broker import Broker, doubts, unlike
from service.judge import AgainstReference
from service.specs import ReferenceCurve

PATIENCE_S = 240.0
RANK = {"torch": "2.13.0", "device": "H200", "tflops": 100.0, "skew_s": 0.0}


def make(**values: Any) -> Broker:
    words: dict[str, Any] = {"num_gangs": 1, "workers": 2, "infra_retries": 2, "judge": None}
    options: dict[str, Any] = {"one_each": False, "idle_s": 0.2}
    return Broker(**words | options | values)


def job(name: str, kind: str = "training") -> dict[str, Any]:
    return {"id": name, "kind": kind, "folder": f"store/{name}"}


def on_a_loop(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(asyncio.wait_for(test(), PATIENCE_S))

    run.__name__ = test.__name__
    return run


async def ask(broker: Broker, name: str, kind: str = "training") -> asyncio.Task[dict[str, Any]]:
    asked = asyncio.create_task(broker.run(job(name, kind)))
    await asyncio.sleep(0.01)
    return asked


@on_a_loop
async def test_jobs_are_handed_out_in_the_order_in_which_they_came():
    broker = make()
    asked = [await ask(broker, name) for name in "ab"]

    first = await broker.take("gang-0")
    await broker.finish("gang-0", "a", "succeeded")
    second = await broker.take("gang-0")
    await broker.finish("gang-0", "b", "succeeded")

    assert [first["id"], second["id"]] == ["a", "b"]
    assert [(await each)["state"] for each in asked] == ["succeeded"] * 2


@on_a_loop
async def test_asking_twice_for_a_job_does_it_once():
    broker = make()
    asked = [await ask(broker, "a") for _ in range(2)]
    await broker.take("gang-0")
    await broker.finish("gang-0", "a", "succeeded")

    assert (await asked[0]) == (await asked[1]) == await broker.run(job("a"))
    assert await broker.take("gang-0") is None


@on_a_loop
async def test_a_failed_job_is_done_again_when_it_is_asked_for_again():
    broker = make(meeting_s=0.05)
    asked = await ask(broker, "a")
    await broker.take("gang-0")
    assert not await broker.failed("gang-0", "a", 1, "no such file")  # rank 0 never says so
    assert (await asked)["reason"] == "no such file"

    again = await ask(broker, "a")
    await broker.take("gang-0")
    await broker.finish("gang-0", "a", "succeeded")

    assert (await again)["state"] == "succeeded"


@on_a_loop
async def test_a_failed_trunk_is_not_done_again_for_each_of_its_tails():
    broker = make(infra_retries=0)
    asked = await ask(broker, "t", "trunk")
    await broker.take("gang-0")
    await broker.fault("gang-0", "killed")
    first = await asked

    again = await asyncio.wait_for(broker.run(job("t", "trunk")), PATIENCE_S)

    assert (first["state"], first["tries"]) == ("failed", 1)
    assert again == {**first, "tries": 0, "occupied_s": 0.0}
    assert await broker.take("gang-0") is None


@on_a_loop
async def test_workers_that_were_lost_while_they_waited_take_no_job():
    broker = make(infra_retries=0, idle_s=PATIENCE_S)
    ghost = asyncio.create_task(broker.take("gang-0"))
    await asyncio.sleep(0.01)
    await broker.fault("gang-0", "rank 0: killed")
    assert await asyncio.wait_for(ghost, PATIENCE_S) is None
    assert await broker.hello("gang-0", [RANK, RANK]) is None

    waiting = asyncio.create_task(broker.take("gang-0"))
    await asyncio.sleep(0.01)
    asked = await ask(broker, "a")
    assert (await waiting)["id"] == "a"
    await broker.finish("gang-0", "a", "succeeded")

    outcome = await asked
    assert (outcome["state"], outcome["tries"]) == ("succeeded", 1)


@on_a_loop
async def test_new_workers_that_ask_for_a_job_end_the_waiting_of_the_former_ones():
    broker = make(infra_retries=0, idle_s=PATIENCE_S)
    ghost = asyncio.create_task(broker.take("gang-0"))
    await asyncio.sleep(0.01)
    waiting = asyncio.create_task(broker.take("gang-0"))
    assert await asyncio.wait_for(ghost, PATIENCE_S) is None

    asked = await ask(broker, "a")
    assert (await waiting)["id"] == "a"
    await broker.finish("gang-0", "a", "succeeded")
    assert (await asked)["tries"] == 1


@on_a_loop
async def test_once_new_workers_say_hello_a_job_is_theirs():
    broker = make(idle_s=PATIENCE_S)
    ghost = asyncio.create_task(broker.take("gang-0"))
    await asyncio.sleep(0.01)
    await broker.hello("gang-0", [RANK, RANK])
    asked = await ask(broker, "a")

    assert await asyncio.wait_for(ghost, PATIENCE_S) is None
    assert (await broker.take("gang-0"))["id"] == "a"
    asked.cancel()


@on_a_loop
async def test_a_job_that_comes_while_lost_workers_come_back_waits_for_them():
    broker = make(num_gangs=2, infra_retries=0, idle_s=PATIENCE_S)
    ghost = asyncio.create_task(broker.take("gang-0"))
    await asyncio.sleep(0.01)
    await broker.fault("gang-0", "rank 0: killed")
    asked = await ask(broker, "a")
    assert await ghost is None

    other = asyncio.create_task(broker.wait_for_work("gang-1"))
    await asyncio.sleep(0.01)
    assert not other.done()  # gang-0 is on its way up and takes it
    assert (await broker.take("gang-0"))["id"] == "a"
    await broker.finish("gang-0", "a", "succeeded")
    assert (await asked)["tries"] == 1
    await broker.close()
    assert not await other


@on_a_loop
async def test_a_gang_that_ended_leaves_nobody_waiting_in_its_name():
    broker = make(infra_retries=0, idle_s=PATIENCE_S)
    ghost = asyncio.create_task(broker.take("gang-0"))
    await asyncio.sleep(0.01)
    await broker.gang_ended("gang-0", None)
    asked = await ask(broker, "a")

    assert await asyncio.wait_for(broker.wait_for_work("gang-0"), PATIENCE_S)
    assert (await broker.take("gang-0"))["id"] == "a"
    assert await ghost is None
    asked.cancel()


@on_a_loop
async def test_a_caller_that_dies_leaves_its_job_to_the_next():
    broker = make()
    dying = await ask(broker, "a")
    await broker.take("gang-0")
    dying.cancel()
    asked = await ask(broker, "a")
    await broker.finish("gang-0", "a", "succeeded")

    assert (await asked)["tries"] == 1


@on_a_loop
async def test_a_gang_that_comes_back_gets_its_job_again_until_the_tries_are_used_up():
    broker = make(infra_retries=1)
    asked, other = await ask(broker, "a"), await ask(broker, "b")

    assert (await broker.take("gang-0"))["id"] == "a"
    await broker.fault("gang-0", "rank 1: killed")
    assert (await broker.take("gang-0"))["id"] == "a"
    await broker.fault("gang-0", "rank 0: killed again")
    assert (await broker.take("gang-0"))["id"] == "b"

    outcome = await asked
    assert (outcome["state"], outcome["tries"]) == ("failed", 2)
    assert "workers failed 2 times, last: rank 0: killed again" in outcome["reason"]
    assert not other.done()


@on_a_loop
async def test_time_held_is_summed_over_tries_and_not_counted_between_them():
    now_s = 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("service.broker.time", SimpleNamespace(monotonic=lambda: now_s))
        broker = make()
        asked = await ask(broker, "a")

        for _ in range(2):
            await broker.take("gang-0")
            now_s += 10.0
            await broker.fault("gang-0", "lost")
            now_s += 300.0
        await broker.take("gang-0")
        await broker.finish("gang-0", "a", "succeeded")

        assert (await asked)["occupied_s"] == 20.0


@on_a_loop
async def test_the_rank_that_failed_is_quoted_not_the_one_that_heard_of_it():
    broker = make()
    asked = await ask(broker, "a")
    await broker.take("gang-0")
    heard = "another worker of the gang failed; see its log"

    said = await asyncio.gather(
        broker.failed("gang-0", "a", 0, heard),
        broker.failed("gang-0", "a", 1, "shard 3: truncated"),
    )

    assert said == [True, True]
    assert (await asked)["reason"] == "shard 3: truncated"


@on_a_loop
async def test_what_ranks_only_heard_of_is_a_lost_try_and_no_failed_training():
    broker = make(meeting_s=PATIENCE_S)
    asked = await ask(broker, "a")
    await broker.take("gang-0")
    heard = "another worker of the gang failed; see its log"

    telling = asyncio.create_task(broker.failed("gang-0", "a", 1, heard))
    await asyncio.sleep(0.01)
    await broker.fault("gang-0", "rank 0: BackendError: could not ask whether to go on")
    assert not await asyncio.wait_for(telling, PATIENCE_S)
    assert not asked.done()
    await broker.take("gang-0")
    await broker.finish("gang-0", "a", "succeeded")

    outcome = await asked
    assert (outcome["state"], outcome["tries"]) == ("succeeded", 2)


@on_a_loop
async def test_ranks_that_only_heard_of_a_failure_settle_nothing_before_the_fault_is_known():
    broker = make(meeting_s=0.05)
    asked = await ask(broker, "a")
    await broker.take("gang-0")

    heard = "another worker of the gang failed; see its log"
    assert not await broker.failed("gang-0", "a", 1, heard)
    assert list(await broker.running()) == ["a"]
    asked.cancel()


@on_a_loop
async def test_a_failure_told_by_lost_workers_does_not_end_the_next_try():
    broker = make(meeting_s=PATIENCE_S)
    asked = await ask(broker, "a")
    await broker.take("gang-0")

    telling = asyncio.create_task(broker.failed("gang-0", "a", 1, "shard 3: truncated"))
    await asyncio.sleep(0.01)
    await broker.fault("gang-0", "rank 0: killed")
    assert not await telling
    assert (await broker.take("gang-0"))["id"] == "a"
    await broker.finish("gang-0", "a", "succeeded")

    assert (await asked)["state"] == "succeeded"


@on_a_loop
async def test_a_verdict_to_stop_ends_as_stopped_and_is_recorded_once():
    judge = AgainstReference(ReferenceCurve(training="ref"), {0: 1.0})
    broker = make(judge=judge)
    asked = await ask(broker, "a")
    await broker.take("gang-0")

    assert await broker.steer("a", 5, None) is None
    reason = await broker.steer("a", 10, 2.0)
    assert reason is not None
    assert await broker.steer("a", 10, 2.0) == reason  # a resumed training asks again
    await broker.finish("gang-0", "a", "stopped", reason)

    rung, ended = await broker.events()
    assert (rung["event"], rung["step"], rung["verdict"]) == ("rung", 10, "stop")
    assert (ended["event"], ended["job"], ended["tries"]) == ("job_ended", "a", 1)
    assert (await asked)["state"] == "stopped"


@on_a_loop
async def test_a_trunk_is_not_judged():
    judge = AgainstReference(ReferenceCurve(training="ref"), {0: 1.0})
    broker = make(judge=judge)
    asked = await ask(broker, "t", "trunk")
    await broker.take("gang-0")

    assert await broker.steer("t", 10, 2.0) is None
    assert await broker.events() == []
    asked.cancel()


@on_a_loop
async def test_a_stopped_broker_cancels_what_runs_what_waits_and_what_comes():
    broker = make()
    running, queued = await ask(broker, "a"), await ask(broker, "b")
    await broker.take("gang-0")

    await broker.stop("over budget")
    assert await broker.steer("a", 3, None) == "over budget"
    await broker.finish("gang-0", "a", "stopped", "over budget")

    for outcome in (await running, await queued, await broker.run(job("c"))):
        assert (outcome["state"], outcome["reason"]) == ("cancelled", "over budget")
    assert await broker.take("gang-0") is None


@on_a_loop
async def test_a_lost_worker_of_a_stopped_broker_is_not_tried_again():
    broker = make()
    running = await ask(broker, "a")
    await broker.take("gang-0")

    await broker.stop("over budget")
    await broker.fault("gang-0", "killed")

    assert (await running)["state"] == "cancelled"


@on_a_loop
async def test_a_gang_without_work_ends_and_is_called_again():
    broker = make(idle_s=0.05)
    assert await broker.take("gang-0") is None

    asked = await ask(broker, "a")
    assert await broker.wait_for_work("gang-0")
    assert (await broker.take("gang-0"))["id"] == "a"
    asked.cancel()


@on_a_loop
async def test_a_second_gang_starts_only_for_a_second_job():
    broker = make(num_gangs=2)
    asked = [await ask(broker, "a")]
    assert await broker.wait_for_work("gang-0")
    second = asyncio.create_task(broker.wait_for_work("gang-1"))
    await asyncio.sleep(0.05)
    assert not second.done()

    asked.append(await ask(broker, "b"))
    assert await second
    await broker.close()
    assert [(await each)["state"] for each in asked] == ["cancelled"] * 2


@on_a_loop
async def test_a_fresh_gang_does_one_job_and_ends():
    broker = make(one_each=True)
    asked = [await ask(broker, name) for name in "ab"]
    assert await broker.wait_for_work("gang-0")
    await broker.take("gang-0")
    await broker.finish("gang-0", "a", "succeeded")

    assert await broker.take("gang-0") is None
    await broker.gang_ended("gang-0", None)
    assert await broker.wait_for_work("gang-0")
    assert (await broker.take("gang-0"))["id"] == "b"
    asked[1].cancel()


@on_a_loop
async def test_a_gang_that_never_lives_to_a_job_is_given_up_and_so_are_its_jobs():
    broker = make(infra_retries=2)
    asked = await ask(broker, "a")

    for _ in range(3):
        assert await broker.wait_for_work("gang-0")
        await broker.gang_ended("gang-0", "ModuleNotFoundError: torch")

    assert not await broker.wait_for_work("gang-0")
    outcome = await asked
    assert outcome["state"] == "failed"
    assert "no worker lived to its first training: ModuleNotFoundError: torch" in outcome["reason"]


@on_a_loop
async def test_an_unplaced_gang_gives_up_only_if_no_other_has_a_place():
    broker = make(num_gangs=2)
    asked = [await ask(broker, name) for name in "abc"]
    assert await broker.wait_for_work("gang-0")
    assert await broker.wait_for_work("gang-1")
    await broker.take("gang-0")

    reason = "unschedulable: need 8 GPUs, free 7"
    await broker.gang_ended("gang-1", reason, unplaced=True, alone=False)
    assert await broker.wait_for_work("gang-1")
    await broker.gang_ended("gang-0", "lost")
    await broker.gang_ended("gang-1", reason, unplaced=True, alone=True)

    assert not await broker.wait_for_work("gang-1")
    for each in asked:
        assert (await each)["reason"] == reason


@on_a_loop
async def test_what_a_gang_finds_unfit_goes_to_another_gang_without_costing_a_try():
    broker = make(num_gangs=2)
    asked = await ask(broker, "a")
    await broker.take("gang-0")

    await broker.unfit("gang-0", "gang-0: the store is not writable")
    assert not await broker.wait_for_work("gang-0")
    assert await broker.wait_for_work("gang-1")
    await broker.take("gang-1")
    await broker.finish("gang-1", "a", "succeeded")

    assert (await asked)["tries"] == 1


@on_a_loop
async def test_ranks_of_two_kinds_are_refused_by_name():
    broker = make()
    asked = await ask(broker, "a")

    fault = await broker.hello("gang-0", [RANK, RANK | {"device": "A100"}])

    assert "rank 0 has H200, rank 1 has A100" in str(fault)
    assert "rank 0 has H200, rank 1 has A100" in (await asked)["reason"]


@pytest.mark.parametrize("key", ["torch", "device"])
def test_one_odd_rank_is_named(key: str):
    assert unlike([RANK, RANK]) is None
    assert f"differ in {key}" in str(unlike([RANK, RANK | {key: "other"}]))


def test_a_slow_rank_and_a_clock_that_is_off_are_doubts():
    slow, late = RANK | {"tflops": 40.0}, RANK | {"skew_s": -7.0}

    assert doubts([RANK, RANK, RANK]) == []
    found = doubts([RANK, slow, late])
    assert found[0] == "rank 1 reaches 40 TFLOP/s, the median is 100"
    assert found[1] == "rank 2's clock is -7.0 s off the driver's"
