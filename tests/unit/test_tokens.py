"""Tokens and quotas: what opens the service, and how much of it."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from sqlalchemy import Engine, select

from service.queue import schema
from service.queue.database import open_database
from service.queue.quotas import Quotas
from service.queue.records import Quota, Role, User
from service.queue.tokens import PREFIX, Tokens
from tests import queues
from trainer.errors import UsageError


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = open_database(queues.sqlite_url(tmp_path))
    yield engine
    engine.dispose()


@pytest.fixture
def tokens(engine: Engine) -> Tokens:
    return Tokens(engine)


def test_a_token_opens_the_service_for_its_user(tokens: Tokens) -> None:
    record, token = tokens.create("ann", Role.SUBMITTER, note="laptop")

    assert tokens.verify(token) == User("ann", Role.SUBMITTER)
    assert (record.user, record.role, record.note) == ("ann", Role.SUBMITTER, "laptop")
    assert tokens.list() == [record]
    assert token.startswith(PREFIX)
    assert len(token) == len(PREFIX) + 43


def test_no_two_tokens_are_alike(tokens: Tokens) -> None:
    made = {tokens.create("ann", Role.READER)[1] for _ in range(20)}

    assert len(made) == 20


def test_the_database_holds_no_token(tokens: Tokens, engine: Engine, tmp_path: Path) -> None:
    _, token = tokens.create("ann", Role.ADMIN)

    with engine.connect() as db:
        stored = str(db.execute(select(schema.tokens)).all())
    files = b"".join(path.read_bytes() for path in tmp_path.iterdir())

    assert "ann" in stored
    assert token.removeprefix(PREFIX) not in stored
    assert token.removeprefix(PREFIX).encode() not in files
    assert token not in repr(tokens.list())


@pytest.mark.parametrize("spoil", [str.upper, lambda token: token[:-1], lambda token: token + " "])
def test_what_is_no_token_opens_nothing(tokens: Tokens, spoil) -> None:
    _, token = tokens.create("ann", Role.ADMIN)

    assert tokens.verify(spoil(token)) is None
    for other in ("", PREFIX, PREFIX + "a" * 43, "\0", "\ud800", "é" * 47):
        assert tokens.verify(other) is None


def test_a_revoked_token_opens_nothing(tokens: Tokens) -> None:
    record, token = tokens.create("ann", Role.ADMIN)
    _, other_token = tokens.create("ben", Role.READER)

    revoked = tokens.revoke(record.id)

    assert revoked.revoked_at is not None
    assert tokens.revoke(record.id) == revoked, "when it was first revoked is kept"
    assert tokens.verify(token) is None
    assert tokens.verify(other_token) == User("ben", Role.READER)
    with pytest.raises(UsageError, match="no token 99"):
        tokens.revoke(99)


def test_a_token_expires(tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 1_000.0
    monkeypatch.setattr("service.queue.tokens.time", SimpleNamespace(time=lambda: now_s))
    _, token = tokens.create("ann", Role.ADMIN, expires_at=1_010.0)
    assert tokens.verify(token) is not None
    assert tokens.any_active()

    now_s = 1_011.0

    assert tokens.verify(token) is None
    assert not tokens.any_active()
    with pytest.raises(UsageError, match="has passed"):
        tokens.create("ann", Role.ADMIN, expires_at=1_010.0)


def test_whether_any_token_opens_anything_is_known(tokens: Tokens) -> None:
    assert not tokens.any_active()
    record, _ = tokens.create("ann", Role.READER)
    assert tokens.any_active()
    tokens.revoke(record.id)
    assert not tokens.any_active()


@pytest.mark.parametrize("user", ["", "-ann", "a b", "ann\n", "é", "a" * 64, "../ann"])
def test_a_user_needs_a_plain_name(tokens: Tokens, user: str) -> None:
    with pytest.raises(UsageError, match="letters, digits"):
        tokens.create(user, Role.READER)


def test_a_quota_is_what_was_put_last(engine: Engine) -> None:
    quotas = Quotas(engine)
    assert quotas.get("ann") == Quota("ann")

    quotas.put(Quota("ben", max_gangs=1))
    quotas.put(Quota("ann", max_gangs=1))
    quotas.put(Quota("ann", max_gangs=2, gpu_hours=1.5, window_days=7.0, max_priority=3))

    assert quotas.get("ann") == Quota("ann", 2, 1.5, 7.0, 3)
    assert [quota.user for quota in quotas.list()] == ["ann", "ben"]


@pytest.mark.parametrize(
    "quota",
    [
        Quota(""),
        Quota("ann", max_gangs=-1),
        Quota("ann", gpu_hours=float("nan")),
        Quota("ann", gpu_hours=-1.0),
        Quota("ann", window_days=0.0),
    ],
)
def test_a_quota_that_makes_no_sense_is_refused(engine: Engine, quota: Quota) -> None:
    with pytest.raises(UsageError):
        Quotas(engine).put(quota)

    assert Quotas(engine).list() == []
