"""Trunks and tails: what trainings share is run once, and no result tells."""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.ticking import trainings_tick
from trainer.codec import dump, parse
from trainer.errors import DataError, Stopped, UsageError
from trainer.results import StateResult
from trainer.run import grow_trunk, is_trained, load_training, train
from trainer.runtime.distributed import Ranks
from trainer.runtime.tensors import load_tensors, saved_names
from trainer.specs.recipe import Observe
from trainer.specs.task import Departure, train_task
from trainer.specs.train import Late, Schedule

ALONE = Ranks()
OBSERVE = {"observe": {"log_every": 1, "validate_every": 4}}
# The micro recipe runs 12 steps; nothing in a trunk's own task acts late.
FLAT = {"train.schedule.warmdown_iters": 0, "train.averages.swa": None}
BITS = {"mlp_bits": 5, "attention_bits": 6}
# What a training is by itself, and after which of the trunk's steps it departs from it.
MEMBERS = {
    "warmdown of 4": ({"train.schedule.warmdown_iters": 4, "train.averages.swa": None}, 8),
    "warmdown of 6": ({"train.schedule.warmdown_iters": 6, "train.averages.swa": None}, 6),
    "never below a tenth": (
        {"train.schedule": {"warmdown_iters": 6, "min_lr_scale": 0.3}, "train.averages.swa": None},
        6,
    ),
    "a share of the run": (
        {"train.schedule": {"warmdown_iters": 0, "warmdown_fraction": 0.25}},
        8,
    ),
    "shorter": ({"train.iterations": 9, "train.schedule.warmdown_iters": 2}, 6),
    "longer": ({"train.iterations": 15, "train.schedule.warmdown_iters": 6}, 8),
    "no warmdown at all": (FLAT | {"train.iterations": 10}, 8),
    "over where it departs": (FLAT | {"train.iterations": 6}, 6),
    "snapshots when the rate is low": ({"train.averages.swa": {"every": 1}}, 8),
    "snapshots from half the run on": (
        {"train.averages.swa": {"every": 2, "start": {"progress": 0.5}}},
        6,
    ),
    "rounds when the rate is low": ({"train.qat": BITS | {"start": {"lr_scale": 0.6}}}, 8),
    "rounds from half the run on": ({"train.qat": BITS | {"start": {"progress": 0.5}}}, 6),
    "rounds to fewer bits": ({"train.qat": {"mlp_bits": 3, "start": {"progress": 0.5}}}, 6),
    "with a warm-up": ({"train.warmup_steps": 2}, 8),
}
# Whatever a clock says of a step.
TIMES = {"at", "train/clock_s", "train/tokens_per_s", "train/step_s"}


def task_of(values):
    return train_task(tiny.recipe(OBSERVE | values))


def points_of(folder):
    """Return what a journal says, apart from times; no series repeats a step."""
    points = {}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        point = json.loads(line)
        for series in set(point) - TIMES - {"step"}:
            assert (point["step"], series) not in points
            points[point["step"], series] = point[series]
    return points


def facts_of(result):
    return replace(result, steps_computed=0, train_clock_s=0.0, clock_s={})


def assert_same_tensors(one, other):
    assert saved_names(one) == saved_names(other)
    for name in saved_names(one):
        tensors, others = load_tensors(one, name), load_tensors(other, name)
        assert list(tensors) == list(others)
        for key, tensor in tensors.items():
            assert torch.equal(tensor, others[key]), f"{name} {key}"


def assert_same_training(one, other):
    assert_same_tensors(one / "bank", other / "bank")
    assert points_of(one) == points_of(other)
    assert facts_of(load_training(one)[1]) == facts_of(load_training(other)[1])


def at(*steps, root):
    return [(Departure(step=step), root / f"state-{step}") for step in steps]


def state_of(path):
    return parse(StateResult, json.loads((path / "result.json").read_text()), "state")


@pytest.fixture(scope="module")
def trunk(tiny_dataset, tmp_path_factory):
    """A trunk of the micro recipe; return the folder with its states after 4, 6 and 8 steps."""
    root = tmp_path_factory.mktemp("trunk")
    states = at(4, 6, 8, root=root)
    grow_trunk(task_of(FLAT), tiny_dataset, states, root / "work", ALONE)
    return root


@pytest.mark.parametrize("name", MEMBERS)
def test_a_branched_training_equals_a_straight_one(trunk, tiny_dataset, tmp_path, name):
    values, departs_at = MEMBERS[name]
    start = trunk / f"state-{departs_at}"
    straight = train(task_of(values), tiny_dataset, tmp_path / "straight", ALONE)

    tail = train(task_of(values), tiny_dataset, tmp_path / "tail", ALONE, start=start)

    assert_same_training(tmp_path / "straight", tmp_path / "tail")
    assert (tail.steps_computed, straight.steps_computed) == (tail.steps - departs_at, tail.steps)
    assert is_trained(task_of(values), tiny_dataset, tmp_path / "tail", ALONE)


def test_a_tail_goes_on_with_its_trunks_clock(trunk, tiny_dataset, tmp_path):
    task = task_of(MEMBERS["warmdown of 4"][0])

    tail = train(task, tiny_dataset, tmp_path, ALONE, start=trunk / "state-8")

    trunk_clock_s = state_of(trunk / "state-8").clock_s
    assert tail.train_clock_s > trunk_clock_s["train"] > 0
    assert all(tail.clock_s[phase] >= seconds for phase, seconds in trunk_clock_s.items())


def test_a_trunk_leaves_each_state_with_its_steps_and_its_clock(trunk):
    states = [state_of(trunk / f"state-{step}") for step in (4, 6, 8)]

    assert [(s.step, s.steps_computed) for s in states] == [(4, 4), (6, 2), (8, 2)]
    assert all(s.train_clock_s == s.clock_s["train"] for s in states)
    clocks = [s.train_clock_s for s in states]
    assert clocks == sorted(clocks)
    assert list((trunk / "work").iterdir()) == []


def test_a_state_tells_what_was_observed_up_to_there_and_no_end(trunk):
    last_steps = [max(step for step, _ in points_of(trunk / f"state-{n}")) for n in (4, 6, 8)]

    assert last_steps == [4, 6, 8]
    assert (6, "val/bpb") not in points_of(trunk / "state-6")


def test_a_state_does_not_show_what_was_yet_to_come(trunk, tiny_dataset, tmp_path):
    late = FLAT | {
        "train.averages.swa": {"start": {"progress": 0.9}},
        "train.qat": BITS | {"start": {"progress": 0.9}},
    }

    grow_trunk(task_of(late), tiny_dataset, at(6, root=tmp_path), tmp_path / "work", ALONE)

    saved = [load_tensors(root / "state-6" / "state", "state") for root in (trunk, tmp_path)]
    for part in ("fake_quants", "averages"):
        assert list(saved[0][part]) == list(saved[1][part])
    assert saved[0]["fake_quants"] == saved[1]["fake_quants"] == {"start_step": None}
    assert saved[0]["averages"]["swa_sums"] == saved[1]["averages"]["swa_sums"] == []
    plain = task_of(MEMBERS["warmdown of 6"][0])
    for name, root in (("one", trunk), ("other", tmp_path)):
        train(plain, tiny_dataset, tmp_path / name, ALONE, start=root / "state-6")
    assert_same_training(tmp_path / "one", tmp_path / "other")


@pytest.mark.parametrize(
    "late",
    [
        {"train.qat": BITS | {"start": {"progress": 0.5}}},
        {"train.averages.swa": {"every": 1, "start": {"progress": 0.5}}},
    ],
    ids=["rounds", "takes snapshots"],
)
def test_a_trunk_may_start_from_another_trunk(trunk, tiny_dataset, tmp_path, late):
    flat = {"train.schedule.warmdown_iters": 0}
    states = at(8, 10, root=tmp_path)
    grow_trunk(
        *(task_of(FLAT | flat | late), tiny_dataset, states, tmp_path / "work", ALONE),
        start=trunk / "state-4",
    )

    assert [state_of(path).steps_computed for _, path in states] == [4, 2]
    for warmdown, state in ((3, "state-8"), (2, "state-10")):
        task = task_of(FLAT | late | {"train.schedule.warmdown_iters": warmdown})
        straight, tail = tmp_path / f"straight-{warmdown}", tmp_path / f"tail-{warmdown}"
        train(task, tiny_dataset, straight, ALONE)
        train(task, tiny_dataset, tail, ALONE, start=tmp_path / state)
        assert_same_training(straight, tail)


def test_a_start_that_comes_to_the_same_snapshots_shares_them(tiny_dataset, tmp_path):
    # From the 7th or from the 8th step on: the first snapshot is taken after the 8th.
    earlier, later = (
        FLAT | {"train.averages.swa": {"every": 2, "start": {"progress": share}}}
        for share in (0.5, 0.55)
    )
    states = at(10, root=tmp_path)
    grow_trunk(task_of(earlier), tiny_dataset, states, tmp_path / "work", ALONE)
    task = task_of(later | {"train.schedule.warmdown_iters": 2})
    train(task, tiny_dataset, tmp_path / "straight", ALONE)

    train(task, tiny_dataset, tmp_path / "tail", ALONE, start=states[0][1])

    assert_same_training(tmp_path / "straight", tmp_path / "tail")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"train.averages.ema_bank": [0.7]}, "EMA decays"),
        ({"train.seed": 7}, "seed"),
        ({"model.num_layers": 3}, "model"),
        ({"train.optimizer.matrix.lr": 0.01}, "optimizer"),
        ({"train.schedule.warmdown_iters": 6}, r"lr scale is 1\.0, this training's 0\.8"),
        ({"train.qat": BITS}, "train.qat is None, this"),
        ({"train.qat": BITS | {"start": {"progress": 0.5}}}, "train.qat is None, this"),
        (
            {"train.averages.swa": {"every": 2, "start": {"progress": 0.5}}},
            r"train\.averages\.swa is None, this training's .*'snapshots': 1",
        ),
    ],
)
def test_a_state_that_a_training_would_not_come_to_by_itself_is_refused(
    trunk, tiny_dataset, tmp_path, values, named
):
    with pytest.raises(UsageError, match=rf"^\S+state-8: .*{named}"):
        train(task_of(values), tiny_dataset, tmp_path, ALONE, start=trunk / "state-8")


def test_what_a_trunk_has_begun_is_taken_up_by_nobody_who_has_it_not(tiny_dataset, tmp_path):
    rounding = FLAT | {"train.qat": BITS | {"start": {"progress": 0.25}}}
    states = at(6, root=tmp_path)
    grow_trunk(task_of(rounding), tiny_dataset, states, tmp_path / "work", ALONE)

    for other in (None, {"mlp_bits": 4, "start": {"progress": 0.25}}):
        task = task_of(FLAT | {"train.qat": other})
        with pytest.raises(UsageError, match=r"after 6 steps its train\.qat is .*'mlp_bits': 5"):
            train(task, tiny_dataset, tmp_path / "tail", ALONE, start=states[0][1])


def test_a_damaged_state_is_refused_and_no_training_starts_from_scratch(
    trunk, tiny_dataset, tmp_path
):
    state = shutil.copytree(trunk / "state-8", tmp_path / "state-8")
    path = state / "state" / "state.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)

    with pytest.raises(DataError, match=r"state\.pt: altered since it was written .*remove \S+-8 "):
        train(task_of({}), tiny_dataset, tmp_path / "tail", ALONE, start=state)


def test_a_trunk_too_short_for_its_states_is_refused(tiny_dataset, tmp_path):
    with pytest.raises(UsageError, match=r"state-13: departs at step 13 of a trunk of 12; length"):
        grow_trunk(task_of(FLAT), tiny_dataset, at(13, root=tmp_path), tmp_path / "work", ALONE)


def test_states_that_are_there_are_passed_over(trunk, tiny_dataset, tmp_path):
    root = shutil.copytree(trunk, tmp_path / "trunk")
    shutil.rmtree(root / "state-6")
    before = (root / "state-8" / "state" / "state.pt").stat().st_mtime_ns

    grow_trunk(
        *(task_of(FLAT), tiny_dataset, at(4, 6, 8, root=root), root / "work", ALONE),
        start=root / "state-4",
    )

    assert state_of(root / "state-6").steps_computed == 2
    assert points_of(root / "state-6") == points_of(trunk / "state-6")
    assert (root / "state-8" / "state" / "state.pt").stat().st_mtime_ns == before
    shutil.rmtree(root / "work")
    grow_trunk(task_of(FLAT), tiny_dataset, at(4, 6, 8, root=root), root / "work", ALONE)
    assert not (root / "work").exists()


def test_a_trunk_may_work_in_the_folder_of_a_state_that_is_there(trunk, tiny_dataset, tmp_path):
    state = shutil.copytree(trunk / "state-8", tmp_path / "state-8")
    before = sorted(path.name for path in state.rglob("*"))
    longer = task_of(FLAT | {"train.iterations": 15})

    grow_trunk(longer, tiny_dataset, at(6, 8, root=tmp_path), state, ALONE)

    assert state_of(tmp_path / "state-6").steps_computed == 6
    assert sorted(path.name for path in state.rglob("*")) == before
    assert state_of(state) == state_of(trunk / "state-8")


def run_jobs(root, dataset, jobs, workers=0):
    """Run jobs in new processes, one or a gang; return the status and each rank's outcomes."""
    path = root / "jobs.json"
    path.write_text(json.dumps({"data": str(dataset.folder), "jobs": jobs}), encoding="utf-8")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers))
    launcher = torchrun if workers else ()
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "tests.gang_jobs", str(path)],
        capture_output=True,
        text=True,
        timeout=480,
        cwd=Path(__file__).resolve().parents[2],
    )
    left = sorted(root.glob("jobs.json.*"))
    return done, [json.loads(each.read_text()) for each in left]


def job(values, folder, **more):
    return {"task": dump(task_of(values)), "folder": str(folder), **more}


def states_job(values, states, folder, **more):
    told = [[dump(departure), str(path)] for departure, path in states]
    return job(values, folder, states=told, **more)


@pytest.mark.parametrize(
    ("checkpoint_every", "lost", "steps_computed"),
    [
        (5, (), (4, 1, 2)),
        (None, (), (4, 2, 2)),
        # From the checkpoint after 5 steps nobody comes back to the state after 4.
        (5, ("state-4",), (4, 2, 2)),
    ],
    ids=["from its checkpoint", "from its last state", "from step 0"],
)
def test_a_killed_trunk_goes_on(
    trunk, tiny_dataset, tmp_path, checkpoint_every, lost, steps_computed
):
    states = at(4, 6, 8, root=tmp_path)
    values = FLAT | {"observe.checkpoint_every": checkpoint_every}
    dies_at = 6 if checkpoint_every else 7
    killed = states_job(values, states, tmp_path / "work", dies_at=dies_at)
    done, _ = run_jobs(tmp_path, tiny_dataset, [killed])
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "state-8" / "result.json").exists()
    for name in lost:
        shutil.rmtree(tmp_path / name)

    grow_trunk(task_of(values), tiny_dataset, states, tmp_path / "work", ALONE)

    assert tuple(state_of(path).steps_computed for _, path in states) == steps_computed
    for _, path in states:
        undisturbed = trunk / path.name
        saved = [load_tensors(each / "state", "state")["model"] for each in (path, undisturbed)]
        assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[1])
        assert points_of(path) == points_of(undisturbed)


def test_a_killed_tail_goes_on_from_its_checkpoint(trunk, tiny_dataset, tmp_path):
    values = MEMBERS["warmdown of 6"][0]
    slow = values | {"observe.checkpoint_every": 3}
    killed = job(slow, tmp_path / "tail", start=str(trunk / "state-6"), dies_at=10)
    done, _ = run_jobs(tmp_path, tiny_dataset, [killed])
    assert done.returncode == -signal.SIGKILL, done.stderr

    tail = train(*(task_of(slow), tiny_dataset, tmp_path / "tail", ALONE), start=trunk / "state-6")

    assert tail.steps_computed == 3
    train(task_of(values), tiny_dataset, tmp_path / "straight", ALONE)
    assert_same_training(tmp_path / "straight", tmp_path / "tail")


def test_a_start_that_is_further_than_an_old_checkpoint_wins(trunk, tiny_dataset, tmp_path):
    values = MEMBERS["warmdown of 4"][0]
    killed = job(values | {"observe.checkpoint_every": 3}, tmp_path / "tail", dies_at=5)
    run_jobs(tmp_path, tiny_dataset, [killed])
    assert (tmp_path / "tail" / "checkpoint" / "00000003").is_dir()

    tail = train(
        *(task_of(values), tiny_dataset, tmp_path / "tail", ALONE), start=trunk / "state-8"
    )

    assert tail.steps_computed == 4
    train(task_of(values), tiny_dataset, tmp_path / "straight", ALONE)
    assert_same_training(tmp_path / "straight", tmp_path / "tail")


@pytest.fixture(scope="module")
def gang(tiny_dataset, tmp_path_factory):
    """Jobs of a gang of two, one after another in its processes; return root and outcomes."""
    root = tmp_path_factory.mktemp("gang")
    values = {"train.schedule.warmdown_iters": 4, "train.qat": BITS | {"start": {"lr_scale": 0.6}}}
    start = str(root / "state-8")
    jobs = [
        states_job(FLAT, at(6, 8, root=root), root / "work"),
        job(values, root / "tail", start=start),
        job(values, root / "straight"),
        job(values, root / "stopped", stops_at=9, start=start),
        job(values, root / "stopped", start=start),
        job(values, root / "failed", fails_at=3),
        job(FLAT | {"train.seed": 3}, root / "other", start=start),
    ]
    done, outcomes = run_jobs(root, tiny_dataset, jobs, workers=2)
    assert done.returncode == 0, done.stderr
    return root, outcomes


def test_a_gang_of_two_branches_as_one_worker_does(gang):
    root, outcomes = gang

    assert [told[:3] for told in outcomes] == [[None] * 3] * 2
    assert_same_training(root / "straight", root / "tail")
    result = load_training(root / "tail")[1]
    assert (result.world_size, result.steps_computed, result.qat_start_step) == (2, 4, 10)


def test_a_gang_that_is_told_to_stop_leaves_together_and_can_go_on(gang):
    root, outcomes = gang

    assert [told[3] for told in outcomes] == ["Stopped: no good: überholt"] * 2
    assert [told[4] for told in outcomes] == [None] * 2
    assert_same_training(root / "straight", root / "stopped")
    assert load_training(root / "stopped")[1].steps_computed == 3


def test_a_judge_out_of_reach_fails_every_rank(gang):
    first, second = (told[5] for told in gang[1])

    assert first.startswith("BackendError: step 3: could not ask whether to go on (ConnectionError")
    assert second == "TrainingError: another worker of the gang failed; see its log"


def test_a_gang_refuses_a_state_that_is_not_its_own_together(gang):
    assert [told[6].partition(":")[0] for told in gang[1]] == ["UsageError"] * 2


@pytest.fixture
def ticking(monkeypatch):
    trainings_tick(monkeypatch)


def wallclock(**changes):
    schedule = {"basis": "wallclock", "warmdown_iters": 0, **changes}
    swa = {"every": 1, "start": {"progress": 0.25}}
    return {
        "train.iterations": 1_000_000,
        "train.max_clock_s": 1.5,
        "train.warmup_steps": 2,
        "train.schedule": schedule,
        "train.averages.swa": swa,
    }


def test_by_wall_clock_trainings_depart_when_their_time_has_come(ticking, tiny_dataset, tmp_path):
    half = Schedule(basis="wallclock", warmdown_iters=0, warmdown_fraction=0.5)
    states = [
        (Departure(schedule=half), tmp_path / "half"),
        (Departure(schedule=half, starts=(Late(progress=0.25),)), tmp_path / "quarter"),
    ]
    flat = task_of(wallclock() | {"train.averages.swa": None})

    grow_trunk(flat, tiny_dataset, states, tmp_path / "work", ALONE)

    at_half, at_quarter = (state_of(path) for _, path in states)
    assert at_quarter.step < at_half.step
    assert at_quarter.train_clock_s >= 0.375
    assert at_half.train_clock_s >= 0.75
    assert at_quarter.steps_computed + at_half.steps_computed == at_half.step
    shared = {value for (_, name), value in points_of(tmp_path / "half").items() if "lr_" in name}
    assert shared == {1.0}
    # The same folder's state is a start for its own schedule only from here on.
    tail = train(
        *(task_of(wallclock(warmdown_fraction=0.5)), tiny_dataset, tmp_path / "tail", ALONE),
        start=tmp_path / "quarter",
    )
    scales = [v for (_, name), v in points_of(tmp_path / "tail").items() if "lr_" in name]
    assert tail.steps_computed == tail.steps - at_quarter.step > 0
    assert scales[at_quarter.step - 1] == 1.0
    assert scales[-1] < 0.5
    assert "swa" in tail.entries
    assert tail.train_clock_s >= 1.5


def test_by_wall_clock_a_trunk_that_runs_out_of_steps_leaves_what_is_left(tiny_dataset, tmp_path):
    schedule = Schedule(basis="wallclock", warmdown_iters=0, warmdown_fraction=0.1)
    values = wallclock(warmdown_fraction=0.1) | {
        "train.iterations": 5,
        "train.max_clock_s": 600.0,
        "train.averages.swa": None,
    }
    state = tmp_path / "state"
    grow_trunk(
        *(task_of(values), tiny_dataset, [(Departure(schedule=schedule), state)]),
        *(tmp_path / "work", ALONE),
    )

    tail = train(task_of(values), tiny_dataset, tmp_path / "tail", ALONE, start=state)

    train(task_of(values), tiny_dataset, tmp_path / "straight", ALONE)
    assert tail.steps_computed == 0
    assert_same_training(tmp_path / "straight", tmp_path / "tail")


def by_share(share, root):
    """A state by wall clock, to be left when that share of the run is left."""
    schedule = Schedule(basis="wallclock", warmdown_iters=0, warmdown_fraction=share)
    return Departure(schedule=schedule), root / f"state-{share}"


@pytest.mark.parametrize("own_start", [False, True], ids=["own states", "a start of its own"])
def test_by_wall_clock_no_state_is_left_later_than_its_departure(
    ticking, tiny_dataset, tmp_path, own_start
):
    flat = task_of(wallclock() | {"train.averages.swa": None, "train.max_clock_s": 3.0})
    early, late = by_share(0.9, tmp_path), by_share(0.5, tmp_path)
    grow_trunk(flat, tiny_dataset, [late], tmp_path / "first", ALONE)

    # The later state is there, the earlier one is not: it was left by a trunk that had only that.
    states, start = ([early], late[1]) if own_start else ([early, late], None)
    grow_trunk(flat, tiny_dataset, states, tmp_path / "second", ALONE, start=start)

    assert 0.3 <= state_of(early[1]).train_clock_s < 1.5 <= state_of(late[1]).train_clock_s
    assert state_of(early[1]).steps_computed == state_of(early[1]).step


def test_by_wall_clock_a_checkpoint_past_a_departure_is_no_start(ticking, tiny_dataset, tmp_path):
    task = task_of(wallclock() | {"train.averages.swa": None, "train.max_clock_s": 3.0})
    early, late = by_share(0.9, tmp_path), by_share(0.1, tmp_path)
    journal = tmp_path / "work" / "trunk" / "metrics.jsonl"

    def steer(step, val_bpb):
        points = map(json.loads, journal.read_text(encoding="utf-8").splitlines())
        seconds = max(point.get("train/clock_s", 0.0) for point in points)
        return "enough" if seconds > 1.5 else None

    with pytest.raises(Stopped):
        grow_trunk(task, tiny_dataset, [late], tmp_path / "work", ALONE, steer=steer)
    assert list(journal.parent.glob("checkpoint/*"))

    grow_trunk(task, tiny_dataset, [early], tmp_path / "work", ALONE)

    assert 0.3 <= state_of(early[1]).train_clock_s < 1.5
    assert state_of(early[1]).steps_computed == state_of(early[1]).step


def test_what_is_observed_is_no_part_of_a_trunk(trunk, tiny_dataset, tmp_path):
    values = MEMBERS["warmdown of 4"][0]
    task = replace(task_of(values), observe=Observe(log_every=5))
    train(task, tiny_dataset, tmp_path / "tail", ALONE, start=trunk / "state-8")
    train(task, tiny_dataset, tmp_path / "straight", ALONE)

    assert_same_tensors(tmp_path / "straight" / "bank", tmp_path / "tail" / "bank")
