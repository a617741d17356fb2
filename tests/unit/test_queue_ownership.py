"""One service of one home for every database."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from service.queue.database import open_database
from service.queue.ownership import owned
from tests import queues
from trainer.errors import BackendError, UsageError


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = open_database(queues.sqlite_url(tmp_path))
    yield engine
    engine.dispose()


@pytest.fixture(scope="module")
def postgres() -> Iterator[queues.PostgresServer]:
    tools = queues.postgres_tools()
    if tools is None:
        pytest.skip("no PostgreSQL server (initdb) is installed here")
    with queues.postgres_server(tools) as server:
        yield server


def test_a_database_serves_the_home_that_came_first_and_no_other(engine: Engine, tmp_path: Path):
    one, two = tmp_path / "one", tmp_path / "two"
    with owned(engine, one) as confirm:
        confirm()

    with pytest.raises(UsageError) as caught, owned(engine, two):
        pass

    assert f"serves the home {one}, not {two}: " in str(caught.value)
    assert "\n" not in str(caught.value)
    with owned(engine, one):
        pass


def test_a_home_at_the_same_path_of_another_machine_is_another_home(engine: Engine, tmp_path: Path):
    home = tmp_path / "home"
    with owned(engine, home):
        pass
    shutil.rmtree(home)

    with pytest.raises(UsageError, match="serves the home"), owned(engine, home):
        pass


def test_a_home_may_move(engine: Engine, tmp_path: Path):
    with owned(engine, tmp_path / "old"):
        pass
    (tmp_path / "old").rename(tmp_path / "new")

    with owned(engine, tmp_path / "new"):
        pass

    with pytest.raises(UsageError, match=f"serves the home {tmp_path / 'new'}, not"):
        owned(engine, tmp_path / "third").__enter__()


def test_two_services_of_a_shared_home_do_not_both_dispatch(
    postgres: queues.PostgresServer, tmp_path: Path
):
    url = postgres.empty_database()
    first, second = open_database(url), open_database(url)
    with (
        owned(first, tmp_path),
        pytest.raises(UsageError, match="another service dispatches"),
        owned(second, tmp_path),
    ):
        pass
    with owned(second, tmp_path):
        pass
    first.dispose()
    second.dispose()


def test_a_service_whose_session_was_ended_goes_on_unless_another_has_taken_over(
    postgres: queues.PostgresServer, tmp_path: Path
):
    url = postgres.empty_database()
    first, second = open_database(url), open_database(url)
    end = text(
        "SELECT pg_terminate_backend(pid) FROM pg_locks "
        "WHERE locktype = 'advisory' AND objsubid = 1"
    )
    with owned(first, tmp_path) as confirm:
        for _ in range(2):
            with second.connect() as db:
                db.execute(end)
            confirm()
        with second.connect() as db:
            db.execute(end)
        with owned(second, tmp_path), pytest.raises(BackendError, match="another service"):
            confirm()
        confirm()
    first.dispose()
    second.dispose()
