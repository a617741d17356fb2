"""The fair order: examples of each rule, and what holds of every order."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.queue.order import choose
from service.queue.records import Quota, SweepRecord, Want
from service.states import State

Verdicts = dict[str, int | str]


def waiting(seq: int, owner: str = "ann", priority: int = 0, gangs: int = 1) -> SweepRecord:
    return SweepRecord(
        seq=seq,
        sweep_id=f"toy-{seq}",
        name="toy",
        recipe="quickstart",
        owner=owner,
        priority=priority,
        gangs=gangs,
        bundle="b",
        assignments=(),
        digest="d",
        plan={},
        state=State.QUEUED,
        reason=None,
        want=Want.RUN,
        wanted_by=None,
        attempt=0,
        restarts=0,
        gangs_held=0,
        submitted_at=float(seq),
        started_at=None,
        ended_at=None,
    )


def acting(seq: int, owner: str = "ann", gangs_held: int = 1) -> SweepRecord:
    return replace(waiting(seq, owner), state=State.RUNNING, attempt=1, gangs_held=gangs_held)


def verdicts(
    queued: list[SweepRecord],
    running: list[SweepRecord] | None = None,
    quotas: list[Quota] | None = None,
    spent_s: dict[str, float] | None = None,
    slots: int = 1,
) -> Verdicts:
    """What becomes of each sweep, in the order of the answer."""
    by_user = {quota.user: quota for quota in quotas or []}
    usage = {user: (0, seconds) for user, seconds in (spent_s or {}).items()}
    chosen = choose(queued, running or [], by_user, usage, slots)
    return {record.sweep_id: verdict for record, verdict in chosen}


def test_the_higher_priority_starts_first() -> None:
    assert verdicts([waiting(1), waiting(2, priority=5)]) == {
        "toy-2": 1,
        "toy-1": "1 of 1 gangs are in use",
    }


def test_owners_take_turns_by_the_gangs_that_they_hold() -> None:
    queued = [waiting(1), waiting(2), waiting(3, "ben"), waiting(4, "ben")]

    assert list(verdicts(queued, slots=4)) == ["toy-1", "toy-3", "toy-2", "toy-4"]
    assert next(iter(verdicts(queued, [acting(9)], slots=4))) == "toy-3"


def test_of_equal_holders_the_one_who_has_used_less_starts_first() -> None:
    queued = [waiting(1), waiting(2, "ben")]

    assert list(verdicts(queued, spent_s={"ann": 10.0})) == ["toy-2", "toy-1"]


def test_one_owners_sweeps_start_as_they_were_submitted() -> None:
    assert list(verdicts([waiting(3), waiting(1), waiting(2)])) == ["toy-1", "toy-2", "toy-3"]


@pytest.mark.parametrize(("asked", "slots", "max_gangs", "given_"), [(8, 4, None, 4), (8, 4, 2, 2)])
def test_a_sweep_gets_what_it_asks_for_within_slots_and_quota(
    asked: int, slots: int, max_gangs: int | None, given_: int
) -> None:
    quotas = [Quota("ann", max_gangs=max_gangs)]

    assert verdicts([waiting(1, gangs=asked)], quotas=quotas, slots=slots) == {"toy-1": given_}


def test_a_wide_sweep_that_waits_for_room_is_not_overtaken() -> None:
    queued = [waiting(1, gangs=3), waiting(2, "ben")]

    assert verdicts(queued, [acting(9, "eva", 2)], slots=4) == {
        "toy-1": "2 of 4 gangs are in use",
        "toy-2": "others are ahead, which need more gangs than are free",
    }


def test_a_sweep_that_its_owners_quota_keeps_is_overtaken() -> None:
    queued = [waiting(1, priority=9), waiting(2, "ben")]
    quotas = [Quota("ann", max_gangs=2, gpu_hours=10.0)]

    by_gangs = verdicts(queued, [acting(9, gangs_held=2)], quotas, slots=3)
    by_hours = verdicts(queued, [], quotas, {"ann": 36_000.0}, slots=3)

    assert by_gangs == {"toy-1": "ann holds 2 of 2 gangs", "toy-2": 1}
    assert by_hours == {"toy-1": "ann has used 10.0 of 10 GPU-hours", "toy-2": 1}


def test_without_slots_everything_waits() -> None:
    assert verdicts([waiting(1)], slots=0) == {"toy-1": "0 of 0 gangs are in use"}
    assert verdicts([waiting(1)], [acting(9, gangs_held=3)], slots=2) == {
        "toy-1": "3 of 2 gangs are in use"
    }


def test_a_thousand_sweeps_are_ordered_in_a_moment() -> None:
    queued = [waiting(seq, f"user-{seq % 300}", seq % 3) for seq in range(5000)]

    chosen = choose(queued, [], {}, {}, slots=2000)

    assert sum(verdict for _, verdict in chosen if isinstance(verdict, int)) == 2000


_users = st.sampled_from(["ann", "ben", "eva"])
_queued = st.lists(st.tuples(_users, st.integers(0, 2), st.integers(1, 4)), max_size=12).map(
    lambda rows: [waiting(seq, *row) for seq, row in enumerate(rows)]
)
_acting = st.lists(st.tuples(_users, st.integers(1, 2)), max_size=3).map(
    lambda rows: [acting(100 + seq, *row) for seq, row in enumerate(rows)]
)
_limits = st.none() | st.integers(0, 4)
_quotas = st.dictionaries(_users, st.tuples(_limits, st.none() | st.sampled_from([0.0, 1.0, 5.0])))
_spent = st.dictionaries(_users, st.sampled_from([0.0, 3600.0, 7200.0]))


@given(_queued, _acting, _quotas, _spent, st.integers(0, 8), st.randoms(use_true_random=False))
def test_every_order_is_fair(queued, running, limits, spent_s, slots, chance) -> None:
    quotas = {user: Quota(user, most, hours) for user, (most, hours) in limits.items()}
    usage = {user: (0, seconds) for user, seconds in spent_s.items()}

    chosen = choose(queued, running, quotas, usage, slots)

    # Each sweep has one answer, whatever the order in which the database told of them.
    shuffled = chance.sample(queued, len(queued))
    assert choose(shuffled, running[::-1], quotas, usage, slots) == chosen
    assert sorted(record.seq for record, _ in chosen) == sorted(r.seq for r in queued)
    # Slots and quotas are kept.
    started = [(record, verdict) for record, verdict in chosen if isinstance(verdict, int)]
    before = sum(record.gangs_held for record in running)
    assert not started or before + sum(verdict for _, verdict in started) <= slots
    held = Counter[str]()
    for record in running:
        held[record.owner] += record.gangs_held
    for record, verdict in started:
        assert 1 <= verdict <= record.gangs
        held[record.owner] += verdict
        quota = quotas.get(record.owner, Quota(record.owner))
        assert quota.max_gangs is None or held[record.owner] <= quota.max_gangs
        assert quota.gpu_hours is None or spent_s.get(record.owner, 0) < quota.gpu_hours * 3600
    # Nothing starts after a sweep that waits for room, and so nothing of a lower priority.
    priorities = [record.priority for record, _ in chosen]
    assert priorities == sorted(priorities, reverse=True)
    full = [isinstance(verdict, str) and "in use" in verdict for _, verdict in chosen]
    if True in full:
        after = chosen[full.index(True) :]
        assert all(isinstance(verdict, str) for _, verdict in after)


@given(_queued.filter(bool), st.integers(1, 8))
def test_a_free_cluster_always_starts_something(queued, slots) -> None:
    chosen = choose(queued, [], {}, {}, slots)

    assert isinstance(chosen[0][1], int)
