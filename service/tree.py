"""Which trainings share a beginning, and the trunks that compute each beginning once. Pure.

By steps, all that a training does at a step follows from what acts from its start and from the
late events before that step: the warmdown begins, the learning rate reaches its floor, fake
quantization comes on, the first SWA snapshot is taken. Trainings with an equal start and equal
events before a step are equal up to it. So the trainings of one start form a tree: a line is a
stretch without an event, and a training leaves it at its own next event, so another sweep finds
the state again. But for the training that is left last on a line: nobody shares the rest with it,
so it leaves with the one before, and where that is follows from the others.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from trainer.codec import canonical
from trainer.optim.schedule import first_snapshot, first_step, start_step
from trainer.specs.task import Departure, TrainTask
from trainer.specs.train import Late, Schedule, Swa, TrainSpec

# A share such as 0.2 of 120 steps does not come out even: 1 - 96/120 is just below 0.2.
_ROUNDING = 1e-9
_LATE_FIELDS = ("iterations", "schedule", "averages", "qat")


@dataclass(frozen=True, slots=True)
class TrunkState:
    """A state that a trunk leaves behind, and where on its way."""

    id: str
    departure: Departure


@dataclass(frozen=True, slots=True)
class Trunk:
    """A run that several trainings share the beginning of. Its id is its last state's.

    `task` is what is run: it acts as each of them would up to where they depart. `parent` is the
    state it starts from itself, None for step 0.
    """

    id: str
    task: TrainTask
    states: tuple[TrunkState, ...]
    parent: str | None = None


@dataclass(frozen=True, slots=True)
class Tree:
    """The trunks, each after the one it starts from, and the state that each training starts
    from, by the training's key; a training that shares nothing is in no branch."""

    trunks: tuple[Trunk, ...]
    branches: dict[str, str]


class Event(NamedTuple):
    """From `step` on a training acts otherwise than before; `key` says how."""

    step: int
    kind: str
    key: str


class _Member(NamedTuple):
    """A training of a group that shares its start, with its events in order, its end the last."""

    key: str
    task: TrainTask
    events: tuple[Event, ...]


class _Fork(NamedTuple):
    """Trainings that go on together from `step`, where `state` was left, with `depth` events
    behind them."""

    members: list[_Member]
    depth: int
    step: int
    state: str | None


NameState = Callable[[dict[str, Any]], str]


def grow_tree(tasks: Mapping[str, TrainTask], name_state: NameState) -> Tree:
    """Find the trunks of these trainings.

    `name_state` makes a state's id from all that acts before it. Neither the ids nor the trunks
    depend on the order of `tasks`, other than in their own order.
    """
    groups: dict[tuple[Any, ...], list[tuple[str, TrainTask]]] = {}
    for key, task in tasks.items():
        groups.setdefault(tuple(_start(task).values()), []).append((key, task))
    trunks: list[Trunk] = []
    branches: dict[str, str] = {}
    for group in groups.values():
        if len(group) < 2:
            continue
        by_key = sorted(group, key=lambda member: member[0])
        grow = _grow_by_steps if _is_by_steps(by_key[0][1]) else _grow_by_clock
        found = grow(by_key, name_state)
        trunks += found.trunks
        branches |= found.branches
    return Tree(tuple(trunks), branches)


def events_of(train: TrainSpec) -> tuple[Event, ...]:
    """The late events of a training by steps, in order; those that never come left out."""
    schedule, qat, swa = train.schedule, train.qat, train.averages.swa
    slope = replace(schedule, min_lr_scale=0.0)
    falls = canonical({"iterations": train.iterations, "schedule": slope})
    events = [Event(_warmdown_step(train), "warmdown", falls)]
    if schedule.min_lr_scale:
        floor = first_step(train, lambda scale, _: scale <= schedule.min_lr_scale)
        events.append(Event(floor, "floor", canonical(schedule.min_lr_scale)))
    if qat is not None and qat.start is not None:
        begins = start_step(train, qat.start)
        events.append(Event(begins, "qat", canonical(replace(qat, start=None))))
    if swa is not None:
        snapshot = first_snapshot(start_step(train, swa.start), swa.every)
        events.append(Event(snapshot, "swa", canonical(swa.every)))
    return tuple(sorted(event for event in events if event.step < train.iterations))


def expected_steps(train: TrainSpec, seconds_per_step: float | None = None) -> int:
    """How many steps a training takes: its iterations, or what its clock has room for."""
    if train.max_clock_s is None or seconds_per_step is None:
        return train.iterations
    return max(min(train.iterations, int(train.max_clock_s / seconds_per_step)), 1)


def expected_departure(task: TrainTask, departure: Departure, steps: int) -> int:
    """The step of a departure from a trunk; by wall clock what it is in `steps` even steps. A
    clock that ends trainings after `steps` ends the trunk there, too."""
    schedule = departure.schedule
    if schedule is None:
        assert departure.step is not None  # the one or the other, checked by the spec
        return min(departure.step, steps)
    warmdown = min(schedule.warmdown_iters, steps)
    by_steps = replace(schedule, basis="steps", warmdown_iters=warmdown)
    averages = replace(task.train.averages, ema_every=1, swa=None)
    even = replace(
        task.train, iterations=steps, max_clock_s=None, schedule=by_steps, averages=averages
    )
    begins = [_warmdown_step(even), *(start_step(even, start) for start in departure.starts)]
    return max(min(*begins, steps - 1), 1)


def _is_by_steps(task: TrainTask) -> bool:
    return task.train.schedule.basis == "steps"


def _warmdown_step(train: TrainSpec) -> int:
    """The step from which the schedule falls: the last at the full rate, so that a warmdown of W
    iterations is W steps long."""
    lowered = first_step(train, lambda scale, _: scale < 1.0)
    if lowered == train.iterations:
        return lowered
    clearly = first_step(train, lambda scale, _: scale < 1.0 - _ROUNDING)
    return min(lowered, max(clearly - 1, 0))


def _start(task: TrainTask) -> dict[str, Any]:
    """All that acts from the start: trainings that differ in it share nothing. What is written
    down on the way changes no weight, so `observe` is no part of it."""
    train, averages, qat = task.train, task.train.averages, task.train.qat
    start = {f.name: getattr(train, f.name) for f in fields(train) if f.name not in _LATE_FIELDS}
    start |= {
        "model": task.model,
        "parity_window": task.parity_window,
        "basis": train.schedule.basis,
        "decays": averages.decays(),
        "ema_every": averages.ema_every,
        "qat": qat if qat is not None and qat.start is None else None,
    }
    if not _is_by_steps(task):
        start |= {"iterations": train.iterations, "swa": _swa_at_once(train)}
    return start


def _grow_by_steps(group: Sequence[tuple[str, TrainTask]], name_state: NameState) -> Tree:
    members = [_member(key, task) for key, task in group]
    start = _start(members[0].task)
    trunks: list[Trunk] = []
    branches: dict[str, str] = {}
    work = [_Fork(members, 0, 0, None)]
    while work:
        fork = work.pop()
        run = _follow(fork, start, name_state)
        if run.states:
            trunks.append(Trunk(run.states[-1].id, run.task(), tuple(run.states), fork.state))
        for left in run.forks:
            if len(left.members) > 1:
                work.append(left)
            elif left.state is not None:
                branches[left.members[0].key] = left.state
    return Tree(tuple(trunks), branches)


def _member(key: str, task: TrainTask) -> _Member:
    # The last step is every training's own, so that each leaves with something to do.
    end = Event(task.train.iterations - 1, "end", key)
    return _Member(key, task, tuple(sorted([*events_of(task.train), end])))


@dataclass(slots=True)
class _Run:
    """One run along the tree: the states it leaves, and who goes on from them."""

    line: _Fork
    states: list[TrunkState]
    forks: list[_Fork]

    def task(self) -> TrainTask:
        """A member of the last line, without all that has not begun when the run ends."""
        member = self.line.members[0]
        begun = {event.kind for event in member.events[: self.line.depth]}
        train = member.task.train
        qat, averages = train.qat, train.averages
        if "qat" not in begun and qat is not None and qat.start is not None:
            qat = None
        if "swa" not in begun:
            averages = replace(averages, swa=None)
        schedule = train.schedule if "warmdown" in begun else Schedule(warmdown_iters=0)
        quiet = replace(train, schedule=schedule, averages=averages, qat=qat)
        return replace(member.task, train=quiet)


def _follow(fork: _Fork, start: dict[str, Any], name_state: NameState) -> _Run:
    """Follow a line to its end, and on where all that are left take the same event."""
    run = _Run(fork, [], [])
    while True:
        line = run.line
        ways = _ways(line)
        at_once = ways.pop(line.step, [])
        run.forks += [_Fork(way, line.depth + 1, line.step, line.state) for way in at_once]
        staying = [member for ways_at in ways.values() for way in ways_at for member in way]
        if len(staying) < 2:
            run.forks += [_Fork([member], 0, line.step, line.state) for member in staying]
            return run
        last = max(ways)
        for step in sorted(ways):
            if step == last and _is_only_way(ways[step], line.depth, step):
                run.line = _Fork(ways[step][0], line.depth + 1, step, None)
                break
            departure = Departure(step=step)
            before = staying[0].events[: line.depth]
            facts = {"start": start, "events": before, "departure": departure}
            state = TrunkState(name_state(facts), departure)
            run.states.append(state)
            run.forks += [_Fork(way, line.depth + 1, step, state.id) for way in ways[step]]
        else:
            run.line = line._replace(members=ways[last][0])
            return run


def _ways(line: _Fork) -> dict[int, list[list[_Member]]]:
    """Who leaves a line at which step; those who take the same event go on together."""
    ways: dict[int, dict[Event, list[_Member]]] = {}
    for member in line.members:
        event = member.events[line.depth]
        ways.setdefault(event.step, {}).setdefault(event, []).append(member)
    last = max(ways)
    if len(ways) > 1 and [event.kind for event in ways[last]] == ["end"]:
        alone = ways.pop(last)  # nobody shares the rest of the line with it
        ways[max(ways)] |= alone
    return {step: list(by_event.values()) for step, by_event in ways.items()}


def _is_only_way(ways: list[list[_Member]], depth: int, step: int) -> bool:
    """Whether all that are left go on together, and none of them leaves again at once."""
    together, *others = ways
    if others or len(together) < 2:
        return False
    return all(member.events[depth + 1].step > step for member in together)


def _grow_by_clock(group: Sequence[tuple[str, TrainTask]], name_state: NameState) -> Tree:
    """One trunk at the full rate; by the clock, nothing later can be told to be equal."""
    leaving: dict[Departure, list[str]] = {}
    for key, task in group:
        departure = _departure_by_clock(task.train)
        if departure is not None:
            leaving.setdefault(departure, []).append(key)
    if sum(map(len, leaving.values())) < 2:
        return Tree((), {})
    first = group[0][1]
    quiet = replace(
        first.train,
        schedule=Schedule(basis="wallclock", warmdown_iters=0),
        averages=replace(first.train.averages, swa=_swa_at_once(first.train)),
        qat=_start(first)["qat"],
    )
    task, steps = replace(first, train=quiet), first.train.iterations
    states: dict[Departure, TrunkState] = {}
    for departure in sorted(leaving, key=lambda leave: expected_departure(task, leave, steps)):
        facts = {"start": _start(first), "events": (), "departure": departure}
        states[departure] = TrunkState(name_state(facts), departure)
    branches = {key: states[departure].id for departure, keys in leaving.items() for key in keys}
    *_, last = states.values()
    return Tree((Trunk(last.id, task, tuple(states.values())),), branches)


def _departure_by_clock(train: TrainSpec) -> Departure | None:
    """Where a training leaves the full rate or begins something; None if it never does, or at
    once."""
    qat, swa = train.qat, train.averages.swa
    schedule = replace(train.schedule, min_lr_scale=0.0)
    late = [qat and qat.start, swa.start if swa and _swa_at_once(train) is None else None]
    # What waits for a lower rate comes after the warmdown has begun.
    shares = [start.progress for start in late if start and start.progress is not None]
    is_at_once = schedule.warmdown_fraction == 1.0
    if is_at_once or not (shares or schedule.goes_below(1.0)):
        return None
    starts = (Late(progress=min(shares)),) if shares else ()
    return Departure(schedule=schedule, starts=starts)


def _swa_at_once(train: TrainSpec) -> Swa | None:
    swa = train.averages.swa
    if swa is None or not (swa.start.progress == 0.0 or (swa.start.lr_scale or 0.0) > 1.0):
        return None
    return swa
