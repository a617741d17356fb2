"""What only PostgreSQL can do to the queue: go away, crash, and serve several services."""

import threading
from collections.abc import Iterator

import pytest
from sqlalchemy import Engine

from service.queue import database, schema
from service.queue.database import is_reachable, open_database, writing
from service.queue.queue import Queue
from service.states import State
from tests import queues
from tests.queues import ANN, new_sweep
from trainer.errors import BackendError

PATIENCE_S = 240


@pytest.fixture(scope="module")
def server() -> Iterator[queues.PostgresServer]:
    tools = queues.postgres_tools()
    if tools is None:
        pytest.skip("no PostgreSQL server (initdb) is installed here")
    with queues.postgres_server(tools) as server:
        yield server


@pytest.fixture
def url(server: queues.PostgresServer) -> str:
    return server.empty_database()


@pytest.fixture
def engine(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setattr(database, "BUSY_S", PATIENCE_S)
    engine = open_database(url)
    yield engine
    engine.dispose()


def test_a_server_that_crashed_has_lost_nothing(
    server: queues.PostgresServer, engine: Engine
) -> None:
    queue = Queue(engine)
    queue.submit(new_sweep(), ANN)
    running = queue.claim("toy-0", 1)
    assert running is not None

    server.stop()
    try:
        assert not is_reachable(engine)
        with pytest.raises(BackendError, match="fairway@/postgres: connection"):
            queue.advance(running, state=State.RUNNING)
    finally:
        server.start()

    assert is_reachable(engine)
    assert queue.get("toy-0") == running
    assert queue.advance(running, state=State.RUNNING)


def test_a_server_out_of_reach_is_named_without_its_password() -> None:
    with pytest.raises(BackendError, match=r"127\.0\.0\.1:1/fairway: connection") as caught:
        open_database("postgresql://ann:geheim@127.0.0.1:1/fairway?password=geheim")

    assert "geheim" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_writer_that_stands_still_loses_its_turn_and_writes_nothing(
    url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = open_database(url)
    stuck.dispose()  # its next connection is an impatient one
    has_turn, is_through = threading.Event(), threading.Event()

    def stand_still() -> None:
        with writing(stuck) as db:
            db.execute(schema.audit.delete())
            db.execute(
                schema.audit.insert().values(
                    at=0.0, user="stuck", action="submit", subject="toy-0", outcome="created"
                )
            )
            has_turn.set()
            is_through.wait(PATIENCE_S)

    told: list[BackendError] = []

    def run() -> None:
        try:
            stand_still()
        except BackendError as error:
            told.append(error)
            has_turn.set()  # lost before the last word

    with monkeypatch.context() as impatient:
        impatient.setattr(database, "BUSY_S", 0.5)
        thread = threading.Thread(target=run)
        thread.start()
        assert has_turn.wait(PATIENCE_S)
    Queue(engine).submit(new_sweep(), ANN)  # waits as long as it has to
    is_through.set()
    thread.join()
    stuck.dispose()

    assert len(told) == 1
    assert Queue(engine).audit_log() == []


def test_a_new_database_may_be_opened_by_many_at_once(url: str) -> None:
    openers = [queues.in_another_process("open_and_close", url) for _ in range(3)]

    told = [opener.communicate(timeout=PATIENCE_S)[0] for opener in openers]

    assert told == ["true\n"] * 3


def test_services_on_one_database_share_the_queue(url: str, engine: Engine) -> None:
    other = open_database(url)
    here, there = Queue(engine), Queue(other)

    def work(queue: Queue, owner: str) -> None:
        for number in range(20):
            queue.submit(new_sweep(f"{owner}-{number}"), ANN, f"key {owner} {number}")
            queue.submit(new_sweep(number), ANN, f"key {number}")
            if queue.claim(f"toy-{number}", 1) is not None:
                claimed.append(number)

    claimed: list[int] = []
    threads = [
        threading.Thread(target=work, args=(here, "here")),
        threading.Thread(target=work, args=(there, "there")),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(claimed) == list(range(20))
    assert len(queues.every(here)) == 60
    assert there.events() == here.events()
    believed = queues.replayed(there.events())
    assert all(believed[record.sweep_id] == queues.told(record) for record in here.acting())
    other.dispose()
