"""Trunks and tails: which steps trainings share, and where each leaves the others."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.tree import Tree, grow_tree
from tests import tiny
from tests.reference import tree_reference as plain
from trainer.codec import fingerprint
from trainer.specs.task import Departure, TrainTask, train_task
from trainer.specs.train import Late, Qat, Schedule, Swa

BASE = train_task(tiny.recipe({"train.averages.swa": None, "train.iterations": 100}))
CLOCK = {"max_clock_s": 60.0}


def task(warmdown: int = 20, *, min_lr: float = 0.0, swa: Swa | None = None, **changes: Any):
    schedule = Schedule(warmdown_iters=warmdown, min_lr_scale=min_lr)
    averages = replace(BASE.train.averages, swa=swa)
    changes = {"schedule": schedule, "averages": averages, **changes}
    return replace(BASE, train=replace(BASE.train, **changes))


def by_clock(**schedule: Any) -> dict[str, Any]:
    return CLOCK | {"schedule": Schedule(basis="wallclock", **schedule)}


def late_qat(progress: float, bits: int = 6) -> Qat:
    return Qat(mlp_bits=bits, start=Late(progress=progress))


def grow(tasks: Mapping[str, TrainTask]) -> Tree:
    return grow_tree(tasks, lambda acts: fingerprint(acts)[:12])


def steps_of(tree: Tree) -> list[list[int | None]]:
    return [[state.departure.step for state in trunk.states] for trunk in tree.trunks]


def test_four_warmdowns_are_one_trunk_and_four_tails():
    tree = grow({f"w{warmdown}": task(warmdown) for warmdown in (5, 10, 15, 20)})

    assert steps_of(tree) == [[80, 85, 90, 95]]
    ids = [state.id for state in tree.trunks[0].states]
    assert [tree.branches[key] for key in ("w20", "w15", "w10", "w5")] == ids
    assert tree.trunks[0].id == ids[-1]
    assert plain.computed_steps(tree, dict.fromkeys(tree.branches, 100)) == 145


def test_a_trunk_runs_without_what_no_training_has_begun_on_it():
    swa = Swa(start=Late(progress=0.95), every=2)
    tree = grow({"a": task(20, qat=late_qat(0.9)), "b": task(30, swa=swa)})

    (trunk,) = tree.trunks
    assert trunk.task.train.qat is None
    assert trunk.task.train.averages.swa is None
    assert not trunk.task.train.schedule.goes_below(1.0)


def test_late_fake_quantization_branches_from_within_a_warmdown():
    tree = grow(
        {f"w{w} q{q}": task(w, qat=late_qat(q)) for w in (10, 40) for q in (0.95, 0.97, 0.99)}
    )

    flat, *nested = tree.trunks
    # Who leaves the flat rate last goes on in the same run, through its own warmdown.
    assert steps_of(tree) == [[60, 95, 97], [95, 97]]
    assert flat.parent is None
    assert nested[0].parent == flat.states[0].id
    assert [trunk.task.train.schedule.warmdown_iters for trunk in tree.trunks] == [10, 40]
    # What comes on at 0.99 is the last step of its own: it goes by the state before.
    assert tree.branches["w40 q0.99"] == tree.branches["w40 q0.97"] == nested[0].id


def test_trainings_that_all_take_the_same_warmdown_share_it_in_one_run():
    tree = grow({"plain": task(40), "quantized": task(40, qat=late_qat(0.9))})

    assert steps_of(tree) == [[90]]
    assert tree.branches == dict.fromkeys(("plain", "quantized"), tree.trunks[0].id)


def test_fake_quantization_that_has_begun_is_part_of_the_trunk():
    tasks = {f"m{m}": task(40, qat=late_qat(0.5), min_lr=m) for m in (0.0, 0.1, 0.2)}

    tree = grow(tasks)

    assert tree.trunks[-1].task.train.qat is not None
    assert steps_of(tree) == [[92, 96]]  # where a rate of 8/40 and of 4/40 is the floor


def test_fake_quantization_that_comes_on_at_the_same_step_is_shared_if_it_is_the_same():
    same = grow({"a": task(qat=late_qat(0.9)), "b": task(qat=late_qat(0.8991))})
    other = grow({"a": task(qat=late_qat(0.9)), "b": task(qat=late_qat(0.9, bits=4))})

    assert steps_of(same) == [[99]]  # equal to the end; the last step is each one's own
    assert steps_of(other) == [[90]]


def test_snapshots_are_shared_until_their_first_difference():
    start = Late(progress=0.5)
    tree = grow(
        {"10": task(swa=Swa(start=start, every=10)), "20": task(swa=Swa(start=start, every=20))}
    )

    assert steps_of(tree) == [[59]]  # the first snapshot is taken after step 59, the 60th


def test_a_longer_constant_training_goes_through_the_shorter_ones():
    tree = grow({f"n{n}": task(0, iterations=n) for n in (40, 70, 100)})

    assert steps_of(tree) == [[39, 69]]
    assert tree.branches["n70"] == tree.branches["n100"]


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 7},
        {"batch_tokens": 512},
        {"dtype": "bfloat16"},
        {"max_clock_s": 50.0},
        {"order": "sequential"},
        {"qat": Qat(mlp_bits=6)},
    ],
    ids=str,
)
def test_trainings_that_differ_from_the_start_share_nothing(changes):
    assert grow({"a": task(10), "b": task(20, **changes)}) == Tree((), {})


def test_a_training_alone_and_a_warmdown_from_the_start_make_no_trunk():
    assert grow({"a": task(10)}).trunks == ()
    assert grow({"a": task(100), "b": task(10)}).trunks == ()


def test_by_wall_clock_there_is_one_flat_trunk_that_each_leaves_by_its_own_schedule():
    tree = grow(
        {
            "long": task(**by_clock(warmdown_iters=40)),
            "floor": task(**by_clock(warmdown_iters=40, min_lr_scale=0.1)),
            "share": task(**by_clock(warmdown_iters=0, warmdown_fraction=0.2)),
            "quantized": task(**by_clock(warmdown_iters=10), qat=late_qat(0.5)),
        }
    )

    (trunk,) = tree.trunks
    assert not trunk.task.train.schedule.goes_below(1.0)
    assert trunk.task.train.qat is None
    quantized, long, share = (state.departure for state in trunk.states)
    assert long == Departure(schedule=Schedule(basis="wallclock", warmdown_iters=40))
    assert share.schedule is not None
    assert share.schedule.warmdown_fraction == 0.2
    assert quantized.starts == (Late(progress=0.5),)
    assert tree.branches["long"] == tree.branches["floor"]


def test_by_wall_clock_what_leaves_the_full_rate_never_or_at_once_runs_straight():
    tasks = {w: task(**by_clock(warmdown_iters=int(w))) for w in ("0", "10", "20")}
    at_once = task(**by_clock(warmdown_iters=0, warmdown_fraction=1.0))

    tree = grow({**tasks, "at once": at_once})

    assert tree.branches.keys() == {"10", "20"}


def test_by_wall_clock_trainings_of_another_length_share_nothing():
    lengths = {n: task(**by_clock(warmdown_iters=10), iterations=n) for n in (90, 100)}

    assert grow({f"n{n}": each for n, each in lengths.items()}) == Tree((), {})


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("warmdown", lambda w: task(w)),
        ("clock", lambda w: task(**by_clock(warmdown_iters=w))),
        ("qat", lambda w: task(90, qat=late_qat(w / 100))),
    ],
)
def test_another_sweep_finds_a_state_again(name: str, changes: Callable[[int], TrainTask]):
    one = grow({f"w{w}": changes(w) for w in (50, 60, 70)})
    other = grow({f"v{w}": changes(w) for w in (55, 60, 65)})

    assert one.branches["w60"] == other.branches["v60"]
    assert one.branches["w50"] != other.branches["v55"]


def test_a_states_id_does_not_depend_on_what_is_written_down_on_the_way():
    quiet = {w: task(int(w)) for w in ("10", "20")}
    noisy = {w: replace(one, observe=replace(one.observe, log_every=7)) for w, one in quiet.items()}

    assert grow(quiet).branches == grow(noisy).branches


def test_thousands_of_trainings_are_planned_in_seconds():
    random = Random(0)
    tasks = {
        f"{i:04d}": task(
            random.randrange(1, 9_000),
            iterations=random.choice((9_000, 10_000)),
            qat=random.choice((None, late_qat(random.uniform(0.1, 0.9)))),
        )
        for i in range(3_000)
    }

    began_s = time.process_time()
    tree = grow(tasks)

    assert time.process_time() - began_s < 5.0
    assert len(tree.branches) > 2_900


_starts = st.builds(Late, progress=st.sampled_from((0.25, 0.5, 0.51, 0.9))) | st.builds(
    Late, lr_scale=st.sampled_from((0.3, 0.5, 0.99))
)


@st.composite
def _late_parts(draw: st.DrawFn) -> TrainTask:
    iterations = draw(st.sampled_from((20, 24, 25)))
    # None is one of the shares below: the same fall in other words is not known to be the same.
    whole = st.builds(Schedule, warmdown_iters=st.sampled_from((1, 3, 7, 11, 19)))
    share = st.builds(
        Schedule,
        warmdown_iters=st.just(0),
        warmdown_fraction=st.sampled_from((0.2, 0.3, 0.5, 1.0)),
    )
    schedule = draw(st.just(Schedule(warmdown_iters=0)) | whole | share)
    floor = draw(st.sampled_from((0.0, 0.1, 0.25)))
    changes: dict[str, Any] = {
        "iterations": iterations,
        "schedule": replace(schedule, min_lr_scale=floor),
    }
    starts = _starts.filter(
        lambda late: late.lr_scale is None or schedule.goes_below(late.lr_scale)
    )
    bits = draw(st.sampled_from((None, None, 4, 6)))
    if bits is not None:
        changes["qat"] = Qat(mlp_bits=bits, start=draw(starts))
    swa = Swa(start=draw(starts), every=3) if draw(st.booleans()) else None
    averages = replace(BASE.train.averages, swa=swa)
    return replace(BASE, train=replace(BASE.train, averages=averages, **changes))


_sets = st.lists(_late_parts(), min_size=2, max_size=7, unique=True).map(
    lambda tasks: {fingerprint(each)[:8]: each for each in tasks}
)


@given(_sets)
@settings(max_examples=60, deadline=None)
def test_a_tree_computes_every_step_of_every_training_and_never_more_than_straight(tasks):
    tree = grow(tasks)

    iterations = {key: each.train.iterations for key, each in tasks.items()}
    assert plain.computed_steps(tree, iterations) <= sum(iterations.values())
    for key, last in iterations.items():
        runs = plain.runs_of(tree, key, last)
        assert runs[0][1] == 0
        assert runs[-1][2] == last
        assert all(before[2] == after[1] for before, after in pairwise(runs))
        assert all(first < end for _, first, end in runs)


@given(_sets)
@settings(max_examples=60, deadline=None)
def test_no_trunk_acts_otherwise_than_a_training_that_goes_through_it(tasks):
    tree = grow(tasks)

    trunks = {f"trunk {trunk.id}": trunk for trunk in tree.trunks}
    for key, each in tasks.items():
        for run, first, end in plain.runs_of(tree, key, each.train.iterations)[:-1]:
            trunk = trunks[run].task
            assert end < trunk.train.iterations
            assert plain.first_difference(trunk.train, each.train) >= end, (key, run, first, end)


@given(_sets)
@settings(max_examples=60, deadline=None)
def test_two_trainings_share_every_step_up_to_their_first_difference(tasks):
    tree = grow(tasks)

    runs = {key: plain.runs_of(tree, key, each.train.iterations) for key, each in tasks.items()}
    for one, first in tasks.items():
        for other, second in tasks.items():
            if one == other:
                continue
            computed = {(run, s) for run, begin, end in runs[one] for s in range(begin, end)}
            again = {(run, s) for run, begin, end in runs[other] for s in range(begin, end)}
            # A tail has the last step at the full rate, and each its own last step.
            assert len(computed & again) >= plain.first_difference(first.train, second.train) - 1


@given(_sets, st.randoms(use_true_random=False))
@settings(max_examples=25, deadline=None)
def test_the_order_of_the_trainings_changes_no_state(tasks, random):
    keys = list(tasks)
    random.shuffle(keys)

    tree, shuffled = grow(tasks), grow({key: tasks[key] for key in keys})

    assert tree.branches == shuffled.branches
    assert {trunk.id: trunk for trunk in tree.trunks} == {t.id: t for t in shuffled.trunks}
