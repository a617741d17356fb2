"""The dispatcher on real processes: it starts, watches and ends sweeps, and may die meanwhile."""

import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.control import read_order
from service.jobs.dispatcher import Patience
from service.jobs.runner import Job, JobState
from service.queue.records import Quota, Role, User, Verb
from service.states import ACTS, State
from tests.dispatching import ALICE, ROOT, Home, Killable, kill_group, local_runner, wait_until
from tests.ledgers import Sweep
from trainer.errors import BackendError, DataError

pytestmark = pytest.mark.timeout(400)

BOB = User("bob", Role.SUBMITTER)
ENDED = tuple(state for state in State if state.is_final())


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    home = Home(tmp_path / "home")
    yield home
    home.close()


def kill(home: Home, name: str) -> None:
    begun = home.files(name).begun()
    assert begun is not None
    kill_group(begun.pid)


def test_a_sweep_runs_to_its_end_and_the_queue_tells_how_far_it_is(home: Home):
    home.submit("one", holds=["training", "finals"])
    seen = [State.QUEUED]

    def has_ended() -> bool:
        if home.state("one") != seen[-1]:
            seen.append(home.state("one"))
            for state, place in ((State.RUNNING, "training"), (State.FINALIZING, "finals")):
                if seen[-1] == state:
                    home.let_go(place)
        return seen[-1].is_final()

    home.tick_until(has_ended)

    assert seen == ["queued", "starting", "running", "finalizing", "succeeded"]
    record = home.record("one")
    assert (record.attempt, record.gangs_held, record.restarts) == (1, 0, 0)
    summary = record.summary
    assert (summary.trainings_done, summary.trainings_total) == (2, 2)
    assert summary.finals_total == 16
    assert summary.best_bpb is not None
    assert summary.best_bytes <= summary.cap_bytes
    assert summary.gpu_seconds > 0
    assert "-S limits.max_concurrent=1" in home.log("one")


def test_a_sweep_whose_gang_has_no_place_says_why_it_waits(home: Home):
    home.submit("one", holds=["gang", "training"])

    record = home.tick_until_state("one", State.WAITING)

    assert record.reason == "need 2 GPUs, free 0"
    assert record.gangs_held == 1
    home.let_go("gang")
    assert home.tick_until_state("one", State.RUNNING).reason is None


def test_sweeps_wait_for_gangs_with_the_reason_and_then_start(home: Home):
    home.submit("one", gangs=2)
    home.submit("two")
    home.dispatcher.tick()

    assert home.record("two").reason == "2 of 2 gangs are in use"
    assert home.tick_until_state("two", *ENDED).state == State.SUCCEEDED
    assert home.starts() == {("one", 1): 1, ("two", 1): 1}


@pytest.mark.parametrize(
    ("verb", "state", "reason"),
    [
        (Verb.PAUSE, State.PAUSED, "paused by alice"),
        (Verb.STOP, State.STOPPED, "stopped by alice"),
        (Verb.CANCEL, State.CANCELLED, "cancelled by alice"),
    ],
)
def test_a_running_sweep_obeys(home: Home, verb: Verb, state: State, reason: str):
    home.submit("one", seconds=30)
    home.tick_until_state("one", State.RUNNING)

    home.queue.ask(home.record("one").sweep_id, verb, ALICE)
    home.tick_until(lambda: home.state("one") not in ACTS)

    record = home.record("one")
    assert (record.state, record.reason, record.gangs_held) == (state, reason, 0)
    assert home.ledger_state("one") in (State.STOPPED, State.CANCELLED)


def test_a_paused_sweep_goes_on_where_it_stopped(home: Home):
    home.submit("one", holds=["training"])
    home.tick_until(lambda: home.record("one").summary.trainings_done == 1)
    home.queue.ask(home.record("one").sweep_id, Verb.PAUSE, ALICE)
    paused = home.tick_until_state("one", State.PAUSED)

    home.let_go("training")
    home.queue.ask(paused.sweep_id, Verb.RESUME, ALICE)
    record = home.tick_until_state("one", *ENDED)

    assert (record.state, record.attempt, record.restarts) == (State.SUCCEEDED, 2, 0)
    assert read_order(home.paths.sweep(record.sweep_id)) is None
    assert home.starts() == {("one", 1): 1, ("one", 2): 1}


def test_an_attempt_is_not_judged_by_how_the_one_before_it_ended(home: Home):
    home.submit("one", seconds=30)
    sweep_id = home.tick_until_state("one", State.RUNNING).sweep_id
    home.queue.ask(sweep_id, Verb.PAUSE, ALICE)
    home.tick_until_state("one", State.PAUSED)
    home.job("one").bundle.rename(home.paths.submissions / "gone")

    home.queue.ask(sweep_id, Verb.RESUME, ALICE)
    record = home.tick_until_state("one", *ENDED)

    assert (record.state, record.attempt) == (State.FAILED, 2)
    assert record.reason.endswith("/one: No such file or directory; submit it again")


def test_a_sweep_resumed_while_it_pauses_goes_on(home: Home):
    home.submit("one", holds=["training"])
    sweep_id = home.tick_until_state("one", State.RUNNING).sweep_id
    home.queue.ask(sweep_id, Verb.PAUSE, ALICE)
    home.dispatcher.tick()
    home.queue.ask(sweep_id, Verb.RESUME, ALICE)
    home.let_go("training")

    record = home.tick_until_state("one", *ENDED)

    assert (record.state, record.restarts) == (State.SUCCEEDED, 0)


def test_a_cancelled_job_that_is_deaf_is_ended(home: Home):
    home.restarted(local_runner(stop_s=0.3)).patience = Patience(cancel_s=0.2)
    home.submit("one", seconds=60, is_deaf=True)
    home.tick_until_state("one", State.RUNNING)

    home.queue.ask(home.record("one").sweep_id, Verb.CANCEL, ALICE)

    assert home.tick_until_state("one", *ENDED).reason == "cancelled by alice"
    assert home.files("one").state().phase == "ended"


def test_a_job_that_does_not_leave_after_its_sweep_finished_is_ended(home: Home):
    home.dispatcher.patience = Patience(finish_s=0.2)
    home.submit("one", lingers_s=60)

    assert home.tick_until_state("one", *ENDED).state == State.SUCCEEDED


def test_a_sweep_cancelled_before_its_job_begins_never_runs(home: Home):
    record = home.submit("one")
    home.queue.claim(record.sweep_id, 1)
    home.queue.ask(record.sweep_id, Verb.CANCEL, ALICE)

    assert home.tick_until_state("one", *ENDED).state == State.CANCELLED
    home.runner.start(home.job("one"))
    assert home.starts() == {}


def test_a_sweep_that_is_refused_fails_with_its_own_words(home: Home):
    home.submit("one", dies={"1": 2})

    record = home.tick_until_state("one", *ENDED)

    assert record.state == State.FAILED
    assert record.reason == "train.iterations=0: at least one; use 1 or more"


def test_a_lost_job_is_started_again_and_goes_on(home: Home):
    home.submit("one", dies={"1": "kill", "2": 1})

    record = home.tick_until_state("one", *ENDED)

    assert (record.state, record.attempt, record.restarts) == (State.SUCCEEDED, 3, 0)
    reasons = [event.facts.get("reason") for event in home.queue.events(sweep_id=record.sweep_id)]
    assert "its job was lost (killed by SIGKILL); restart 1 of 2" in reasons
    assert "its job was lost (ended with exit code 1); restart 2 of 2" in reasons


def test_a_sweep_that_gets_on_between_its_losses_is_not_given_up(home: Home):
    home.submit("one", dies={"1": "kill", "2": "kill"}, dies_late={"3": "kill"})

    def ends_between_ticks() -> bool:
        phase = home.files("one", home.record("one").attempt).state().phase
        wait_until(lambda: home.files("one", home.record("one").attempt).state().phase != "running")
        return phase == "ended" and home.state("one") in ENDED

    home.tick_until(ends_between_ticks)

    assert (home.state("one"), home.record("one").attempt) == (State.SUCCEEDED, 4)


def test_a_lost_job_rests_before_it_is_started_again_unless_somebody_resumes_it(home: Home):
    home.dispatcher.patience = Patience(restarts_s=(60.0,))
    home.submit("one", dies={"1": "kill"})
    lost = home.tick_until_state("one", State.QUEUED, State.STARTING)
    home.tick_until(lambda: home.record("one").restarts == 1)

    for _ in range(3):
        home.dispatcher.tick()
    assert (home.state("one"), home.record("one").attempt) == (State.QUEUED, 1)

    home.queue.ask(lost.sweep_id, Verb.PAUSE, ALICE)
    home.queue.ask(lost.sweep_id, Verb.RESUME, ALICE)
    assert home.tick_until_state("one", *ENDED).attempt == 2


def test_a_sweep_whose_jobs_are_lost_again_and_again_is_lost(home: Home):
    home.submit("one", dies={"1": "kill", "2": "kill", "3": "kill"})

    record = home.tick_until_state("one", *ENDED)

    assert (record.state, record.attempt) == (State.LOST, 3)
    assert record.reason.startswith("its job was lost 3 times, last: killed by SIGKILL")


def test_a_sweep_interrupted_by_somebody_else_is_started_again(home: Home):
    home.submit("one", holds=["training"])
    home.tick_until_state("one", State.RUNNING)

    home.runner.stop(home.job("one"))  # as when the machine is shut down
    wait_until(lambda: home.files("one").state().phase == "ended")
    assert home.ledger_state("one") == State.CANCELLED
    home.tick_until(lambda: home.record("one").attempt == 2)

    home.let_go("training")
    assert home.tick_until_state("one", *ENDED).state == State.SUCCEEDED


def test_a_claimed_sweep_that_was_not_started_is_started_by_the_next_service(home: Home):
    record = home.submit("one")
    home.queue.claim(record.sweep_id, 1)  # and here the service dies

    record = home.tick_until_state("one", *ENDED)

    assert (record.state, record.attempt) == (State.SUCCEEDED, 1)
    assert home.starts() == {("one", 1): 1}


def test_what_finished_while_the_service_was_away_is_told_at_once(home: Home):
    home.submit("one")
    home.submit("two", dies={"1": 2})
    home.dispatcher.tick()  # the only one that this service lives to see
    wait_until(lambda: all(home.files(n).state().phase == "ended" for n in ("one", "two")))

    home.restarted(local_runner()).tick()

    assert [home.state(name) for name in ("one", "two")] == [State.SUCCEEDED, State.FAILED]


def test_a_job_of_a_sweep_that_has_ended_is_stopped(home: Home):
    record = home.submit("one", seconds=60)
    home.queue.ask(record.sweep_id, Verb.CANCEL, ALICE)
    home.runner.start(home.job("one"))  # by a service that didn't know
    wait_until(lambda: home.starts() != {})

    home.restarted(local_runner()).tick()

    wait_until(lambda: home.files("one").state().phase == "ended")
    assert home.state("one") == State.CANCELLED


def test_an_older_attempt_ends_before_a_new_one_begins(home: Home):
    home.dispatcher.tick()  # what it looks for at first is looked for
    record = home.submit("one", seconds=60, is_deaf=True)
    home.restarted(local_runner(stop_s=1.0)).tick()
    claimed = home.record("one")
    wait_until(lambda: home.starts() != {})
    assert home.queue.advance(claimed, state=State.QUEUED, reason="restored from a copy")
    bundle = home.paths.submissions / "one" / "sweep.yaml"
    bundle.write_text(f'{{"sweep_id": "{record.sweep_id}"}}')

    home.tick_until(lambda: home.record("one").attempt == 2)
    waiting = home.tick_until_state("one", State.STARTING)

    assert waiting.reason == "attempt 1 has still to end"
    assert home.tick_until_state("one", *ENDED).state == State.SUCCEEDED


def test_who_has_spent_their_gpu_hours_is_paused(home: Home):
    home.quotas.put(Quota("bob", gpu_hours=1.0))
    home.submit("his", user=BOB, seconds=60)
    home.submit("hers", seconds=60)
    home.tick_until_state("his", State.RUNNING)
    assert home.state("hers") in ACTS

    for name in ("his", "hers"):
        record = home.record(name)
        spent = type(record.summary)(worker_seconds=3600.0, num_events=record.summary.num_events)
        assert home.queue.advance(record, summary=spent)
    record = home.tick_until_state("his", State.PAUSED)

    assert record.reason == "paused by quota"
    assert home.state("hers") in ACTS


def test_what_runs_counts_towards_the_gpu_hours_before_it_ends(home: Home):
    home.quotas.put(Quota("bob", gpu_hours=8 * 0.5 / 3600))  # half a second of its 8 workers
    home.submit("his", user=BOB, seconds=60)
    home.tick_until_state("his", State.RUNNING)

    record = home.tick_until_state("his", State.PAUSED)

    assert record.reason == "paused by quota"
    assert record.summary.worker_seconds == 0.0


def test_what_was_spent_by_hand_before_the_submission_is_not_charged(home: Home):
    by_hand = Sweep(home.paths.home, sweep_id="one-0123456789ab")
    with by_hand.open() as ledger:
        by_hand.start(ledger)
        by_hand.train(ledger, by_hand.train_points()[0])
        by_hand.finish(ledger)
    home.submit("one")

    total_s = home.tick_until_state("one", *ENDED).summary.worker_seconds

    assert home.queue.usage(time.time())["alice"] == (0, pytest.approx(total_s - 8 * 600.0))


def test_an_order_is_given_again_to_a_driver_whose_clock_is_ahead(home: Home):
    home.submit("one", seconds=60, is_deaf=True)
    sweep_id = home.tick_until_state("one", State.RUNNING).sweep_id
    home.queue.ask(sweep_id, Verb.PAUSE, ALICE)
    home.dispatcher.tick()
    control = home.paths.sweep(sweep_id).control
    first = json.loads(control.read_text())
    home.dispatcher.tick()
    assert json.loads(control.read_text()) == first

    control.write_text(json.dumps(first | {"at": first["at"] - 40.0}))
    home.dispatcher.tick()

    assert json.loads(control.read_text())["at"] >= first["at"]


def test_a_sweep_that_cannot_be_looked_at_keeps_no_other_waiting(home: Home):
    home.submit("one", seconds=60)
    home.submit("two")
    sweep_id = home.tick_until_state("one", State.RUNNING).sweep_id
    kill(home, "one")
    wait_until(lambda: home.files("one").state().phase == "ended")
    record = home.paths.sweep(sweep_id).jobs / "1.json"
    whole = record.read_text()
    record.write_text("{")
    home.restarted()  # which looks for strays as well

    def two_has_ended() -> bool:
        with pytest.raises(DataError, match=r"1\.json: not readable"):
            home.dispatcher.tick()
        return home.state("two") in ENDED

    try:
        wait_until(two_has_ended)
    finally:
        record.write_text(whole)

    assert home.state("two") == State.SUCCEEDED


def test_a_start_leaves_the_reasons_of_those_that_wait_behind_as_they_are(home: Home):
    home.restarted(Idle())
    for number in range(8):
        home.submit(f"sweep{number}")
    home.dispatcher.tick()
    before = home.queue.last_event_id()
    first = next(record for record in home.queue.acting() if record.name == "sweep0")
    home.queue.advance(first, state=State.SUCCEEDED)

    home.dispatcher.tick()

    changed = {event.sweep_id.partition("-")[0] for event in home.queue.events(before)}
    assert changed == {"sweep0", "sweep2", "sweep3"}  # ended, started, and now first in line


def test_a_damaged_ledger_fails_its_own_sweep_and_no_other(home: Home):
    home.submit("one", seconds=60)
    home.submit("two")
    sweep_id = home.tick_until_state("one", State.RUNNING).sweep_id
    ledger = home.paths.sweep(sweep_id).ledger
    ledger.write_bytes(b"{}\n" + ledger.read_bytes())
    home.restarted()
    home.tick_until_state("two", State.SUCCEEDED)

    kill(home, "one")

    record = home.tick_until_state("one", *ENDED)
    assert record.state == State.FAILED
    assert "line 1 is damaged" in record.reason


class Idle:
    """A runner that starts nothing and says that all of it runs."""

    name = "idle"

    def check(self) -> None: ...

    def start(self, job: Job) -> None: ...

    def state(self, job: Job) -> JobState:
        return JobState("running")

    def stop(self, job: Job) -> None: ...


class OutOfReach:
    """A runner of a cluster that does not answer, until it does."""

    name = "away"

    def __init__(self) -> None:
        self.real = local_runner()
        self.is_away = True

    def check(self) -> None:
        if self.is_away:
            raise BackendError("Ray at http://127.0.0.1:8265: no answer")

    def start(self, job: Job) -> None:
        self.check()
        self.real.start(job)

    def state(self, job: Job) -> JobState:
        self.check()
        return self.real.state(job)

    def stop(self, job: Job) -> None:
        self.check()
        self.real.stop(job)


def test_while_the_cluster_is_out_of_reach_nothing_is_claimed_or_lost(home: Home):
    runner = OutOfReach()
    dispatcher = home.restarted(runner)
    home.submit("one")
    stop = threading.Event()
    thread = threading.Thread(target=dispatcher.run_forever, args=(stop,))
    thread.start()
    try:
        wait_until(lambda: dispatcher.trouble is not None)
        assert "no answer" in str(dispatcher.trouble)
        assert home.record("one").attempt == 0

        runner.is_away = False

        wait_until(lambda: home.state("one") == State.SUCCEEDED)
        assert dispatcher.trouble is None
    finally:
        stop.set()
        thread.join()


def test_jobs_out_of_reach_are_noticed_although_none_is_to_be_started(home: Home):
    with pytest.raises(BackendError, match="no answer"):
        home.restarted(OutOfReach()).tick()


def test_what_runs_is_followed_by_its_files_while_the_cluster_is_out_of_reach(home: Home):
    home.submit("one", holds=["training"])
    home.tick_until_state("one", State.RUNNING)
    dispatcher = home.restarted(OutOfReach())
    home.let_go("training")

    def has_ended() -> bool:
        with pytest.raises(BackendError, match="no answer"):
            dispatcher.tick()
        return home.state("one").is_final()

    wait_until(has_ended)

    assert home.state("one") == State.SUCCEEDED


NUM_KILLS, NUM_SWEEPS = 30, 14


def test_a_dispatcher_killed_thirty_times_loses_no_sweep_and_starts_none_twice(home: Home):
    moments = random.Random(6)
    names = [f"sweep{number}" for number in range(NUM_SWEEPS)]
    home.slots = 3
    killable = Killable(home)
    paused: set[str] = set()
    try:
        for number in range(NUM_KILLS):
            if number % 2 == 0 and number // 2 < NUM_SWEEPS:
                home.submit(names[number // 2], seconds=moments.uniform(0.5, 1.5))
            if number in (10, 20):  # the one just submitted has not ended
                paused.add(pause_one(home))
            known = [record.name for record in home.queue.page().items]
            ended = [name for name in known if home.files(name).state().phase == "ended"]
            pid = killable.start()
            killable.wait_until_ticked()
            assert_told(home, ended, paused)
            time.sleep(moments.uniform(0.0, 0.35))
            os.kill(pid, signal.SIGKILL)
            time.sleep(moments.uniform(0.0, 0.3))
        pid = killable.start()
        for name in paused:
            wait_until(lambda name=name: home.state(name) in (State.PAUSED, State.SUCCEEDED))
            if home.state(name) == State.PAUSED:
                home.queue.ask(home.record(name).sweep_id, Verb.RESUME, ALICE)
        wait_until(lambda: all(home.state(name).is_final() for name in names))
        os.kill(pid, signal.SIGKILL)
    finally:
        killable.end()

    records = [home.record(name) for name in names]
    assert {record.state for record in records} == {State.SUCCEEDED}
    assert {record.restarts for record in records} == {0}
    assert {record.attempt for record in records if record.name not in paused} == {1}
    starts = home.starts()
    assert set(starts.values()) == {1}
    # Of a sweep that was paused an attempt may have been called off before it began.
    assert all((record.name, record.attempt) in starts for record in records)


def pause_one(home: Home) -> str:
    """Ask a sweep that is under way, or waits, to pause; return its name."""
    record = next(r for r in home.queue.page().items if not r.state.is_final())
    home.queue.ask(record.sweep_id, Verb.PAUSE, ALICE)
    return record.name


def assert_told(home: Home, ended: list[str], paused: set[str]) -> None:
    """The queue knows of every job that had ended by the time the dispatcher started."""
    for name in ended:
        if name not in paused:
            assert home.state(name) == State.SUCCEEDED, name
