"""The queue's promises, on SQLite and on a real PostgreSQL where one is installed."""

import itertools
import json
import random
import shutil
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine
from sqlalchemy.event import listen

from service.paths import Paths
from service.queue import schema
from service.queue.database import VERSION_TABLE, default_url, is_reachable, open_database
from service.queue.queue import Queue
from service.queue.quotas import Quotas
from service.queue.records import (
    Conflict,
    Forbidden,
    Quota,
    Summary,
    SweepRecord,
    UnknownSweep,
    Verb,
    Want,
)
from service.states import ACTS, State
from tests import queues
from tests.queues import ADMIN, ANN, BEN, READER, every, new_sweep
from trainer.errors import BackendError, UsageError


@pytest.fixture(scope="module")
def postgres() -> Iterator[queues.PostgresServer]:
    tools = queues.postgres_tools()
    if tools is None:
        pytest.skip("no PostgreSQL server (initdb) is installed here")
    with queues.postgres_server(tools) as server:
        yield server


@pytest.fixture(scope="module")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database file with empty tables, to be copied."""
    folder = tmp_path_factory.mktemp("migrated")
    open_database(queues.sqlite_url(folder)).dispose()
    return folder


@pytest.fixture(scope="module")
def postgres_engine(postgres: queues.PostgresServer) -> Iterator[Engine]:
    engine = open_database(postgres.empty_database())
    yield engine
    engine.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path: Path, migrated: Path) -> Iterator[Engine]:
    """A database with empty tables."""
    if request.param == "postgresql":
        engine = request.getfixturevalue("postgres_engine")
        queues.empty_tables(engine)
        yield engine
    else:
        shutil.copytree(migrated, tmp_path, dirs_exist_ok=True)
        engine = open_database(queues.sqlite_url(tmp_path))
        yield engine
        engine.dispose()


@pytest.fixture
def queue(engine: Engine) -> Queue:
    return Queue(engine)


@pytest.fixture
def running(queue: Queue) -> SweepRecord:
    """Ann's sweep in its first attempt."""
    return started(queue)


def started(queue: Queue, label: object = 0) -> SweepRecord:
    queue.submit(new_sweep(label), ANN)
    record = queue.claim(f"toy-{label}", 1)
    assert record is not None
    assert queue.advance(record, state=State.RUNNING)
    return queue.get(record.sweep_id)


def events_of(queue: Queue) -> list[str]:
    return [event.event for event in queue.events()]


# -- Submitting


def test_a_submitted_sweep_is_queued_as_it_was_told(queue: Queue) -> None:
    new = new_sweep(gangs=2, priority=3)

    record, is_new = queue.submit(new, ANN)

    assert is_new
    assert (record.owner, record.state, record.attempt) == ("ann", State.QUEUED, 0)
    assert (record.gangs, record.priority, record.plan) == (2, 3, new.plan)
    assert record.assignments == new.assignments
    assert queue.get(new.sweep_id) == record
    assert events_of(queue) == ["submitted"]


def test_the_same_sweep_is_queued_once(queue: Queue) -> None:
    first, _ = queue.submit(new_sweep(), ANN)

    again, is_new = queue.submit(new_sweep(), BEN)

    assert (again, is_new) == (first, False)
    assert events_of(queue) == ["submitted"]


def test_a_sweep_submitted_again_takes_the_new_priority_while_it_waits(queue: Queue) -> None:
    queue.submit(new_sweep(), ANN)
    urgent = replace(new_sweep(), priority=7)

    record, is_new = queue.submit(urgent, ANN)

    assert (record.priority, is_new, queue.get("toy-0").priority) == (7, False, 7)
    assert events_of(queue) == ["submitted", "submitted"]
    with pytest.raises(Forbidden, match="ann may give up to 10"):
        queue.submit(replace(new_sweep(), priority=11), ANN)
    assert queue.submit(replace(new_sweep(), priority=1), BEN)[0].priority == 7, "it is ann's"
    queue.claim("toy-0", 1)
    assert queue.submit(replace(new_sweep(), priority=1), ANN)[0].priority == 7


def test_the_reasons_of_all_that_wait_are_written_in_one_transaction(queue: Queue) -> None:
    records = [queue.submit(new_sweep(label), ANN)[0] for label in range(20)]
    claimed = queue.claim("toy-3", 1)
    begun: list[object] = []
    listen(queue._engine, "begin", begun.append)

    queue.hold([(record, "no room") for record in records])

    assert len(begun) == 1
    found = {record.sweep_id: record for record in every(queue)}
    assert found.pop("toy-3") == replace(claimed, plan={})
    assert {(r.state, r.reason) for r in found.values()} == {(State.WAITING, "no room")}
    last = queue.last_event_id()
    queue.hold([(record, "no room") for record in found.values()])
    assert queue.last_event_id() == last


def test_losses_count_in_a_row_only(queue: Queue, running: SweepRecord) -> None:
    assert queue.advance(running, state=State.QUEUED, reason="lost")
    again = queue.claim(running.sweep_id, 1)
    assert again is not None
    assert again.restarts == 1

    assert queue.advance(again, summary=Summary(trainings_done=1))
    assert queue.get(running.sweep_id).restarts == 0
    assert queue.advance(again, state=State.QUEUED, reason="lost", summary=Summary(finals_done=2))
    assert queue.get(running.sweep_id).restarts == 1


def test_what_was_spent_before_the_first_attempt_is_nobodys(
    queue: Queue, running: SweepRecord
) -> None:
    queue.advance(running, summary=Summary(num_events=5, worker_seconds=100.0), earlier_s=90.0)
    queue.advance(running, summary=Summary(num_events=9, worker_seconds=130.0), earlier_s=90.0)

    assert queue.usage(time.time())["ann"] == (1, 40.0)


def test_a_key_returns_what_its_first_call_returned(queue: Queue) -> None:
    queue.submit(new_sweep("a"), ANN, "monday")

    record, is_new = queue.submit(new_sweep("a"), ANN, "monday")

    assert (record.sweep_id, is_new) == ("toy-a", False)
    with pytest.raises(Conflict, match="'monday' was used for another request"):
        queue.submit(new_sweep("b"), ANN, "monday")
    assert queue.submit(new_sweep("b"), BEN, "monday")[1], "a key is its user's own"


def test_fifty_threads_with_one_key_make_one_sweep(queue: Queue) -> None:
    made: list[bool] = []

    def submit() -> None:
        made.append(queue.submit(new_sweep(), ANN, "retry")[1])

    threads = [threading.Thread(target=submit) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert Counter(made) == {False: 49, True: 1}
    assert events_of(queue) == ["submitted"]


def test_another_request_for_a_resting_sweep_takes_its_place(queue: Queue) -> None:
    record = started(queue)
    queue.advance(record, state=State.FAILED, reason="boom")

    more = new_sweep(digest="more budget", bundle="other", plan={"n": 2}, priority=1)
    again, is_new = queue.submit(more, ANN)

    assert not is_new
    assert (again.state, again.reason, again.ended_at) == (State.QUEUED, None, None)
    assert (again.digest, again.bundle, again.plan) == ("more budget", "other", {"n": 2})
    assert (again.attempt, again.seq, again.priority) == (1, record.seq, 1)
    assert queue.get("toy-0") == again


def test_another_request_for_an_acting_sweep_is_refused(queue: Queue, running: SweepRecord) -> None:
    with pytest.raises(Conflict, match="pause it first"):
        queue.submit(new_sweep(digest="more budget"), ANN)

    assert queue.get("toy-0") == running


def test_nobody_changes_the_request_of_anothers_sweep(queue: Queue) -> None:
    queue.submit(new_sweep(), ANN)

    with pytest.raises(Forbidden, match="ann's"):
        queue.submit(new_sweep(digest="hostile"), BEN)
    record, _ = queue.submit(new_sweep(digest="helpful"), ADMIN)

    assert (record.owner, record.digest) == ("ann", "helpful")


def test_a_reader_submits_nothing(queue: Queue) -> None:
    with pytest.raises(Forbidden, match="rae may only read"):
        queue.submit(new_sweep(), READER)

    assert queue.page().items == ()


def test_a_priority_over_the_quota_is_refused(queue: Queue, engine: Engine) -> None:
    Quotas(engine).put(Quota("ann", max_priority=2))

    with pytest.raises(Forbidden, match="priority=3: ann may give up to 2"):
        queue.submit(new_sweep(priority=3), ANN)

    assert queue.submit(new_sweep(priority=2), ANN)[1]


# -- Asking


@pytest.mark.parametrize(
    ("verb", "state"),
    [
        (Verb.PAUSE, State.PAUSED),
        (Verb.STOP, State.STOPPED),
        (Verb.CANCEL, State.CANCELLED),
        (Verb.RESUME, State.QUEUED),
    ],
)
def test_a_waiting_sweep_obeys_at_once(queue: Queue, verb: Verb, state: State) -> None:
    queue.submit(new_sweep(), ANN)

    record = queue.ask("toy-0", verb, ANN)

    assert record.state == state
    assert (record.ended_at is not None) == state.is_final()
    assert queue.claim("toy-0", 1) is None or state == State.QUEUED


def test_an_acting_sweep_is_told_and_its_job_obeys(queue: Queue, running: SweepRecord) -> None:
    record = queue.ask("toy-0", Verb.PAUSE, ANN)

    assert (record.state, record.want, record.wanted_by) == (State.RUNNING, Want.PAUSE, "ann")
    assert queue.advance(running, state=State.PAUSED, reason="paused by ann")
    record = queue.get("toy-0")
    assert (record.state, record.want, record.gangs_held) == (State.PAUSED, Want.RUN, 0)


def test_what_was_asked_is_only_ever_raised(queue: Queue, running: SweepRecord) -> None:
    wants = [queue.ask("toy-0", verb, ANN).want for verb in (Verb.PAUSE, Verb.STOP, Verb.CANCEL)]

    assert wants == [Want.PAUSE, Want.STOP, Want.CANCEL]
    for verb in (Verb.STOP, Verb.PAUSE, Verb.RESUME):
        with pytest.raises(Conflict, match="told to cancel by ann"):
            queue.ask("toy-0", verb, ANN)


@pytest.mark.parametrize("verb", [Verb.PAUSE, Verb.STOP, Verb.CANCEL])
@pytest.mark.parametrize("is_acting", [False, True])
def test_asking_again_changes_nothing(queue: Queue, verb: Verb, is_acting: bool) -> None:
    queue.submit(new_sweep(), ANN)
    if is_acting:
        queue.claim("toy-0", 1)
    first = queue.ask("toy-0", verb, ANN)
    last = queue.last_event_id()

    assert queue.ask("toy-0", verb, ADMIN) == first
    assert queue.last_event_id() == last


@pytest.mark.parametrize("verb", list(Verb))
def test_nothing_can_be_asked_of_a_succeeded_sweep(
    queue: Queue, running: SweepRecord, verb: Verb
) -> None:
    queue.advance(running, state=State.SUCCEEDED)

    with pytest.raises(Conflict, match="succeeded"):
        queue.ask("toy-0", verb, ANN)


@pytest.mark.parametrize("state", [State.FAILED, State.LOST, State.STOPPED, State.INFEASIBLE])
def test_a_sweep_that_ended_badly_can_be_resumed(
    queue: Queue, running: SweepRecord, state: State
) -> None:
    queue.advance(running, state=state, reason="boom")

    record = queue.ask("toy-0", Verb.RESUME, ANN)

    assert (record.state, record.reason, record.ended_at) == (State.QUEUED, None, None)
    assert queue.claim("toy-0", 1) is not None


def test_only_owners_and_admins_control_a_sweep(queue: Queue) -> None:
    queue.submit(new_sweep(), ANN)

    with pytest.raises(Forbidden, match="rae may only read"):
        queue.ask("toy-0", Verb.CANCEL, READER)
    with pytest.raises(Forbidden, match="toy-0 is ann's"):
        queue.ask("toy-0", Verb.CANCEL, BEN)
    with pytest.raises(UnknownSweep, match="toy-9"):
        queue.ask("toy-9", Verb.CANCEL, ADMIN)

    assert queue.get("toy-0").state == State.QUEUED
    assert queue.ask("toy-0", Verb.CANCEL, ADMIN).reason == "cancelled by ada"


# -- Running


def test_a_claim_begins_an_attempt(queue: Queue) -> None:
    queue.submit(new_sweep(gangs=4), ANN)

    record = queue.claim("toy-0", 2)

    assert record is not None
    assert (record.state, record.attempt, record.gangs_held) == (State.STARTING, 1, 2)
    assert record.started_at is not None
    assert queue.claim("toy-0", 2) is None
    assert [item.sweep_id for item in queue.acting()] == ["toy-0"]
    assert queue.queued() == []


def test_of_two_processes_that_claim_one_wins(tmp_path: Path) -> None:
    url = queues.sqlite_url(tmp_path)
    engine = open_database(url)
    queue = Queue(engine)
    ids = [queue.submit(new_sweep(label), ANN)[0].sweep_id for label in range(20)]
    claimers = [queues.in_another_process("claim_all", url, len(ids)) for _ in range(2)]

    for claimer in claimers:
        assert claimer.stdout is not None
        assert claimer.stdout.readline() == "ready\n"
    for claimer in claimers:
        assert claimer.stdin is not None
        claimer.stdin.write("go\n")
        claimer.stdin.flush()
    won = [json.loads(claimer.communicate()[0]) for claimer in claimers]

    assert sorted(won[0] + won[1]) == sorted(ids)
    assert {record.attempt for record in queue.acting()} == {1}
    engine.dispose()


def test_an_attempt_that_is_over_writes_nothing(queue: Queue, running: SweepRecord) -> None:
    queue.advance(running, state=State.QUEUED, reason="its job was lost")
    assert not queue.advance(running, state=State.FAILED, reason="it waits by now")
    queue.claim("toy-0", 1)
    now = queue.get("toy-0")

    assert not queue.advance(running, state=State.FAILED, reason="late")
    assert not queue.advance(running, summary=Summary(finals_done=7))
    assert queue.get("toy-0") == now


@pytest.mark.parametrize("verb", [Verb.PAUSE, Verb.CANCEL])
def test_a_waiting_reason_does_not_overwrite_what_was_asked(queue: Queue, verb: Verb) -> None:
    seen, _ = queue.submit(new_sweep(), ANN)
    asked = queue.ask("toy-0", verb, ANN)

    assert not queue.advance(seen, state=State.WAITING, reason="1 of 1 gangs are in use")
    assert queue.get("toy-0") == asked


def test_waiting_without_gangs_is_queued_and_with_them_acting(queue: Queue) -> None:
    record, _ = queue.submit(new_sweep(), ANN)
    assert queue.advance(record, state=State.WAITING, reason="1 of 1 gangs are in use")
    assert [item.reason for item in queue.queued()] == ["1 of 1 gangs are in use"]

    record = queue.claim("toy-0", 1)
    assert record is not None
    assert queue.advance(record, state=State.WAITING, reason="no node has 8 GPUs")

    assert queue.queued() == []
    assert [item.reason for item in queue.acting()] == ["no node has 8 GPUs"]


def test_a_lost_job_counts_as_a_restart_and_a_resumed_one_does_not(queue: Queue) -> None:
    record = started(queue)
    queue.advance(record, state=State.QUEUED, reason="its job was lost")
    assert queue.get("toy-0").restarts == 1

    record = queue.claim("toy-0", 1)
    assert record is not None
    queue.ask("toy-0", Verb.PAUSE, ANN)
    queue.ask("toy-0", Verb.RESUME, ANN)
    queue.advance(record, state=State.QUEUED)

    assert queue.get("toy-0").restarts == 1
    queue.ask("toy-0", Verb.PAUSE, ANN)
    assert queue.ask("toy-0", Verb.RESUME, ANN).restarts == 0


@pytest.mark.parametrize(
    ("verb", "state"),
    [
        (Verb.PAUSE, State.PAUSED),
        (Verb.STOP, State.STOPPED),
        (Verb.CANCEL, State.CANCELLED),
    ],
)
def test_a_job_lost_after_it_was_told_leaves_what_was_asked(
    queue: Queue, running: SweepRecord, verb: Verb, state: State
) -> None:
    queue.ask("toy-0", verb, ANN)

    assert queue.advance(running, state=State.QUEUED, reason="its job was lost")

    record = queue.get("toy-0")
    assert (record.state, record.reason) == (state, f"{state} by ann")
    assert (record.gangs_held, record.restarts) == (0, 0)


def test_a_sweep_resumed_while_it_pauses_is_queued_again(
    queue: Queue, running: SweepRecord
) -> None:
    queue.ask("toy-0", Verb.PAUSE, ANN)
    queue.ask("toy-0", Verb.RESUME, ANN)

    assert queue.advance(running, state=State.PAUSED, reason="paused by ann")

    assert queue.get("toy-0").state == State.QUEUED


def test_an_end_frees_the_gangs_and_tells_when(queue: Queue, running: SweepRecord) -> None:
    before = time.time()

    queue.advance(running, state=State.SUCCEEDED, summary=Summary(finals_done=3, best_bpb=1.06))

    record = queue.get("toy-0")
    assert (record.gangs_held, record.want) == (0, Want.RUN)
    assert record.ended_at is not None
    assert before <= record.ended_at <= time.time()
    assert record.summary == Summary(finals_done=3, best_bpb=1.06)
    assert not queue.advance(running, state=State.RUNNING)


def test_an_event_tells_of_a_change_and_of_nothing_else(queue: Queue, running: SweepRecord) -> None:
    last = queue.last_event_id()

    assert queue.advance(running, state=State.RUNNING, summary=running.summary)
    assert queue.last_event_id() == last
    assert queue.advance(running, reason="slow", summary=Summary(num_events=9))

    told = [(event.event, event.facts) for event in queue.events(last, sweep_id="toy-0")]
    assert [event for event, _ in told] == ["summary", "changed"]
    assert told[0][1]["num_events"] == 9
    assert (told[1][1]["state"], told[1][1]["reason"]) == ("running", "slow")


@pytest.mark.parametrize("seed", range(2))
def test_states_stay_sound_whatever_happens(queue: Queue, seed: int) -> None:
    chance = random.Random(seed)
    claims = Counter[str]()
    queue.submit(new_sweep(0), ANN)

    for label in range(1, 25):
        queue.submit(new_sweep(label), ANN)
        for _ in range(4):
            what, fact = queues.act_at_random(queue, chance, label + 1)
            claims.update([fact[0]] if what == "claimed" and fact else [])

    believed = queues.replayed(queue.events(limit=10_000))
    for record in queues.every(queue):
        assert believed[record.sweep_id] == queues.told(record)
        assert record.attempt == claims[record.sweep_id]
        assert (record.gangs_held > 0) >= (record.state in ACTS)
        assert record.gangs_held == 0 or not record.state.is_final()
        assert (record.ended_at is not None) == record.state.is_final()


# -- Looking


def test_pages_show_every_sweep_once_while_others_are_added(queue: Queue) -> None:
    before = [queue.submit(new_sweep(label), ANN)[0].sweep_id for label in range(25)]
    shown: list[str] = []
    cursor = None

    for label in itertools.count(100):
        page = queue.page(limit=7, cursor=cursor)
        shown += [record.sweep_id for record in page.items]
        queue.submit(new_sweep(label), BEN)
        cursor = page.next_cursor
        if cursor is None:
            break

    assert shown == before[::-1]


def test_a_last_page_that_is_full_leads_to_no_empty_one(queue: Queue) -> None:
    for label in range(4):
        queue.submit(new_sweep(label), ANN)

    assert queue.page(limit=4).next_cursor is None
    assert queue.page(limit=3).next_cursor is not None


def test_pages_can_be_filtered(queue: Queue) -> None:
    queue.submit(new_sweep("a"), ANN)
    queue.submit(new_sweep("b", name="other"), BEN)
    queue.ask("toy-a", Verb.PAUSE, ANN)

    def ids(**filters: object) -> list[str]:
        return [record.sweep_id for record in queue.page(**filters).items]  # type: ignore[arg-type]

    assert ids() == ["toy-b", "toy-a"]
    assert ids(states=[State.PAUSED]) == ["toy-a"]
    assert ids(states=[State.PAUSED, State.QUEUED], owner="ben") == ["toy-b"]
    assert ids(name="toy") == ["toy-a"]
    assert ids(name="nothing") == []


@pytest.mark.parametrize("cursor", ["", "x", "c2VxPA", "c2VxPHg", "é", "c2VxPDE=\n", "A" * 5000])
def test_a_broken_cursor_is_a_usage_error(queue: Queue, cursor: str) -> None:
    with pytest.raises(UsageError, match="next_cursor"):
        queue.page(cursor=cursor)


def test_lists_leave_the_plans_where_they_are(queue: Queue) -> None:
    queue.submit(new_sweep(), ANN)

    assert [record.plan for record in (*queue.page().items, *queue.queued())] == [{}, {}]


def test_a_sweep_is_found_by_id_start_and_name(queue: Queue) -> None:
    for label in ("1f", "1fa", "27"):
        queue.submit(new_sweep(label), ANN)

    assert queue.find("toy-1f").sweep_id == "toy-1f", "an id is never the start of another"
    assert queue.find("toy-2").sweep_id == "toy-27"
    assert queue.find("toy").sweep_id == "toy-27", "the newest of that name"
    assert queue.find("toy-2").plan == new_sweep("27").plan
    with pytest.raises(UsageError, match="'toy-1' fits 2 sweeps: toy-1f, toy-1fa"):
        queue.find("toy-1")
    with pytest.raises(UnknownSweep, match="did you mean toy-27"):
        queue.find("toy-28")
    for ref in ("", "TOY-2", "%", "toy_2"):
        with pytest.raises(UnknownSweep):
            queue.find(ref)


def test_states_are_counted(queue: Queue) -> None:
    for label in range(3):
        queue.submit(new_sweep(label), ANN)
    queue.ask("toy-1", Verb.PAUSE, ANN)

    counts = queue.counts()

    assert (counts[State.QUEUED], counts[State.PAUSED], counts[State.LOST]) == (2, 1, 0)


def test_usage_is_gangs_now_and_work_within_the_window(
    queue: Queue, engine: Engine, running: SweepRecord
) -> None:
    Quotas(engine).put(Quota("ann", window_days=2))

    queue.advance(running, summary=Summary(worker_seconds=100.0))
    queue.advance(running, summary=Summary(worker_seconds=160.0))

    now = time.time()
    assert queue.usage(now) == {"ann": (1, 160.0)}
    assert queue.usage(now + 1.9 * 86400) == {"ann": (1, 160.0)}
    assert queue.usage(now + 2.1 * 86400) == {"ann": (1, 0.0)}
    queue.advance(running, state=State.SUCCEEDED)
    assert queue.usage(now) == {"ann": (0, 160.0)}


def test_the_audit_log_shows_the_newest_first(queue: Queue) -> None:
    queue.audit("ann", "submit", "toy-0", "created", "127.0.0.1")
    queue.audit("ben", "cancel", "toy-0", "forbidden")

    log = queue.audit_log(limit=1)

    assert [(entry["user"], entry["outcome"], entry["address"]) for entry in log] == [
        ("ben", "forbidden", None)
    ]
    assert len(queue.audit_log()) == 2


def test_a_follower_misses_no_event_of_writers_at_once(queue: Queue) -> None:
    def write(owner: int) -> None:
        for number in range(12):
            queue.submit(new_sweep(f"{owner}-{number}"), ANN)

    writers = [threading.Thread(target=write, args=(owner,)) for owner in range(8)]
    for writer in writers:
        writer.start()
    seen: list[str] = []
    last = 0
    while len(seen) < 96 and (any(w.is_alive() for w in writers) or last < queue.last_event_id()):
        for event in queue.events(last, limit=5):
            last = event.id
            seen.append(event.sweep_id)
    for writer in writers:
        writer.join()

    assert len(seen) == len(set(seen)) == 96


@pytest.mark.parametrize(
    "spoil",
    [
        lambda queue: queue.submit(new_sweep(sweep_id="\ud800"), ANN),
        lambda queue: queue.submit(new_sweep(priority=-(2**70)), ANN),
        lambda queue: queue.get("\ud800"),
        lambda queue: queue.events(2**70),
    ],
)
def test_a_value_that_no_database_holds_is_a_usage_error(
    queue: Queue, spoil: Callable[[Queue], object]
) -> None:
    with pytest.raises(UsageError, match="cannot hold"):
        spoil(queue)


# -- The database


def test_the_migrations_make_the_tables_that_the_code_uses(engine: Engine) -> None:
    options = {"version_table": VERSION_TABLE}

    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, schema.metadata) == []


def test_a_new_database_may_be_opened_by_many_at_once(tmp_path: Path) -> None:
    url = queues.sqlite_url(tmp_path)
    failures: list[Exception] = []

    def open_it() -> None:
        try:
            open_database(url).dispose()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failures == []


def test_tables_of_a_newer_fairway_are_refused(tmp_path: Path) -> None:
    url = queues.sqlite_url(tmp_path)
    engine = open_database(url)
    with engine.begin() as db:
        db.exec_driver_sql(f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
    engine.dispose()

    with pytest.raises(UsageError, match="start the version that made them, or a newer one"):
        open_database(url)


def test_sqlite_keeps_what_it_has_acknowledged(tmp_path: Path) -> None:
    engine = open_database(default_url(Paths(tmp_path / "home")))

    with engine.connect() as db:
        pragmas = [
            db.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous")
        ]
    engine.dispose()

    assert pragmas == ["wal", 2]
    assert (tmp_path / "home" / "service.db").stat().st_mode & 0o077 == 0


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "service.db").write_text("a letter to a friend, which is no database\n" * 99)

    with pytest.raises(BackendError, match=r"service\.db: file is not a database"):
        open_database(queues.sqlite_url(tmp_path))


@pytest.mark.parametrize("url", ["", "sqlite://", "sqlite:///:memory:", "mysql://u:secret@h/x"])
def test_an_address_of_another_kind_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(UsageError, match="sqlite:////folder") as caught:
        open_database(url)

    assert "secret" not in str(caught.value)


def test_a_database_that_is_locked_for_good_is_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.queue.database.BUSY_S", 0.1)
    engine = open_database(queues.sqlite_url(tmp_path))
    other = sqlite3.connect(tmp_path / "service.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    with pytest.raises(BackendError, match="database is locked"):
        Queue(engine).submit(new_sweep(), ANN)

    assert is_reachable(engine), "readers go on"
    other.close()
    assert Queue(engine).submit(new_sweep(), ANN)[1]
    engine.dispose()


def test_thirty_kills_lose_nothing_and_do_nothing_twice(tmp_path: Path) -> None:
    url = queues.sqlite_url(tmp_path)

    told, _ = queues.in_another_process("kill_at_random", url, 30).communicate(timeout=480)

    acknowledged = json.loads(told)
    engine = open_database(url)
    queue = Queue(engine)
    found = queues.every(queue)
    submitted = {fact for what, fact in acknowledged if what == "submitted"}
    claims = [tuple(fact) for what, fact in acknowledged if what == "claimed" and fact]
    events = queue.events(limit=100_000)
    births = Counter(event.sweep_id for event in events if event.event == "submitted")
    believed = queues.replayed(events)
    engine.dispose()
    assert len(submitted) > 30
    assert len(claims) > 20
    assert submitted <= {record.sweep_id for record in found}
    assert set(births.values()) == {1}
    assert len(set(claims)) == len(claims)
    assert all(believed[record.sweep_id] == queues.told(record) for record in found)
    with sqlite3.connect(tmp_path / "service.db") as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    db.close()
