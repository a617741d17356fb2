"""The ledger: append-only, one writer, nothing lost and nothing made up."""

from pathlib import Path

import pytest

from service.ledger import Ledger, is_held, read, replay
from service.states import State
from trainer.errors import DataError, UsageError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def final(ledger: Ledger, name: str, state: State = State.SUCCEEDED) -> None:
    ledger.append("final_scored", final=name, state=state, result=None)


def test_replay_gives_the_view_of_the_writer(path: Path):
    with Ledger(path) as ledger:
        ledger.append("sweep_started", sweep_id="s", ratio=0.1)
        ledger.append("training_started", training="t", point={}, seed=1)
        ledger.append("training_finished", training="t", state=State.SUCCEEDED, result={"a": 1e-9})
        final(ledger, "f")
        written = ledger.view

    assert replay(path) == written
    assert written.running == {}


def test_a_torn_last_line_is_cut_and_the_numbers_go_on(path: Path):
    with Ledger(path) as ledger:
        final(ledger, "a")
    with path.open("ab") as file:
        file.write(b'{"seq":2,"event":"final_sc')

    with Ledger(path) as ledger:
        final(ledger, "b")

    assert [event["seq"] for event in read(path)] == [1, 2]
    assert list(replay(path).finals) == ["a", "b"]


def test_a_reader_ignores_a_line_that_is_being_written(path: Path):
    with Ledger(path) as ledger:
        final(ledger, "a")
        with path.open("ab") as file:
            file.write(b'{"seq":2')

        assert list(replay(path).finals) == ["a"]


@pytest.mark.parametrize("damage", [b"rubbish\n", b"{}\n", b"[]\n"])
def test_damage_in_the_middle_is_refused_by_line(path: Path, damage: bytes):
    with Ledger(path) as ledger:
        for name in "abc":
            final(ledger, name)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + damage + lines[2])

    with pytest.raises(DataError, match=r"events\.jsonl: line 2 is damaged"):
        Ledger(path)


def test_a_changed_value_is_noticed(path: Path):
    with Ledger(path) as ledger:
        ledger.append("sweep_started", cap=16)
    path.write_bytes(path.read_bytes().replace(b'"cap":16', b'"cap":17'))

    with pytest.raises(DataError, match="line 1 is damaged"):
        replay(path)


def test_a_missing_line_is_noticed(path: Path):
    with Ledger(path) as ledger:
        for name in "abc":
            final(ledger, name)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[2])

    with pytest.raises(DataError, match="line 2 is damaged"):
        replay(path)


def test_a_second_writer_is_refused(path: Path):
    with Ledger(path), pytest.raises(UsageError, match="another run of this sweep is writing"):
        Ledger(path)


def test_a_ledger_is_held_as_long_as_its_writer_lives(path: Path):
    with Ledger(path):
        assert is_held(path)

    assert not is_held(path)


def test_a_settled_final_stays_as_it_was_settled(path: Path):
    with Ledger(path) as ledger:
        final(ledger, "f", State.INFEASIBLE)
        final(ledger, "f", State.SUCCEEDED)

        assert ledger.view.finals["f"]["state"] == State.INFEASIBLE


def test_a_failure_may_be_followed_by_another_try(path: Path):
    with Ledger(path) as ledger:
        final(ledger, "f", State.FAILED)
        final(ledger, "f", State.SUCCEEDED)

        assert ledger.view.finals["f"]["state"] == State.SUCCEEDED


def test_nan_is_never_written(path: Path):
    with Ledger(path) as ledger, pytest.raises(ValueError, match="JSON compliant"):
        ledger.append("final_scored", final="f", state=State.SUCCEEDED, bpb=float("nan"))
