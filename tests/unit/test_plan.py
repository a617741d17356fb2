"""The plan: what a sweep expands to, and what a stage's identity depends on."""

from pathlib import Path
from typing import Any

import pytest
import yaml

import service
from service.identity import Inputs, fit_id, rank_id
from service.plan import Plan, make_plan, plan_training
from service.sweep import load_sweep
from trainer.errors import UsageError

INPUTS = Inputs(data_digest="sha256:data", code_digest="code", vocab_size=1024)
DECAY = "train.averages.ema_decay"
TPE = {"method": "tpe"}
TPE_FINALS = {"final": {**TPE, "per_bank": 1}}
SPACE = {
    "train.schedule.warmdown_iters": {"values": [10, 20]},
    "train.averages.ema_decay": {"values": [0.9, 0.95, 0.99]},
    "final.quantize.clip": {"values": ["none", "p5"]},
}


@pytest.fixture
def plan(tmp_path: Path):
    def make(*assignments: str, inputs: Inputs = INPUTS, **changes: Any) -> Plan:
        path = tmp_path / "sweep.yaml"
        sweep = {"name": "trial", "recipe": "tiny", "space": SPACE, **changes}
        path.write_text(yaml.safe_dump(sweep))
        return make_plan(load_sweep(path, assignments), inputs, str(path))

    return make


def test_bank_and_final_axes_cost_no_training(plan):
    made = plan()

    assert len(made.trainings) == 2
    assert len(made.finals) == 2 * 3 * 2


def test_a_training_banks_every_decay_of_the_space(plan):
    made = plan()

    assert all(t.task.train.averages.decays() == (0.9, 0.95, 0.99) for t in made.trainings)
    assert {f.task.entry for f in made.finals} == {"ema-0.9", "ema-0.95", "ema-0.99"}


def test_every_seed_is_a_training_of_its_own(plan):
    made = plan("seeds.search=[1, 2, 3]")

    assert len({training.id for training in made.trainings}) == 6
    assert {training.task.train.seed for training in made.trainings} == {1, 2, 3}


def ids(made: Plan) -> tuple[set[str], set[str]]:
    return {t.id for t in made.trainings}, {f.id for f in made.finals}


@pytest.mark.parametrize(
    "assignment",
    ["name=other", "limits.max_concurrent=1", "resources.start_timeout_s=9", "observe.log_every=7"],
)
def test_what_changes_no_byte_changes_no_id(plan, assignment):
    assert ids(plan(assignment)) == ids(plan())


@pytest.mark.parametrize("assignment", ["train.seq_len=128", "resources.workers=2", "model.dim=64"])
def test_what_changes_the_weights_changes_every_id(plan, assignment):
    trainings, finals = ids(plan(assignment))
    old_trainings, old_finals = ids(plan())

    assert trainings.isdisjoint(old_trainings)
    assert finals.isdisjoint(old_finals)


@pytest.mark.parametrize(
    "assignment", ["final.prune.ratio=0.11", "final.quantize.bits.mlp=5", "evaluate.stride=32"]
)
def test_what_acts_after_training_keeps_the_trainings(plan, assignment):
    trainings, finals = ids(plan(assignment))
    old_trainings, old_finals = ids(plan())

    assert trainings == old_trainings
    assert finals.isdisjoint(old_finals)


def test_other_data_makes_other_trainings_and_other_code_other_finals(plan):
    trainings, finals = ids(plan())
    other_data = ids(plan(inputs=Inputs("sha256:other", "code", 1024)))
    other_code = ids(plan(inputs=Inputs("sha256:data", "other", 1024)))

    assert other_data[0].isdisjoint(trainings)
    assert other_code[0] == trainings
    assert other_code[1].isdisjoint(finals)


def test_a_random_search_draws_the_same_distinct_points_every_time(plan):
    search = {"final": {"method": "random", "per_bank": 4, "seed": 5}}

    first, second = plan(search=search), plan(search=search)

    assert ids(first) == ids(second)
    assert len(first.finals) == 2 * 4


def test_asking_for_more_points_than_exist_is_refused(plan):
    with pytest.raises(UsageError, match="7 points are asked for, but the space has 6"):
        plan(search={"final": {"method": "random", "per_bank": 7}})


def test_a_grid_over_a_range_needs_a_number_of_points(plan):
    space = {"final.prune.ratio": {"min": 0.0, "max": 0.1}}

    with pytest.raises(UsageError, match=r"space\.final\.prune\.ratio: .*num"):
        plan(space=space)


def test_a_bank_holds_the_decays_that_a_random_search_drew(plan):
    space = {"train.averages.ema_decay": {"min": 0.9, "max": 0.99}}

    made = plan(space=space, search={"final": {"method": "random", "per_bank": 5}})

    banked = {f"ema-{decay!r}" for decay in made.trainings[0].task.train.averages.decays()}
    assert banked == {final.task.entry for final in made.finals}


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (("resources.workers=3",), "16 sequences, which resources.workers=3 do not share evenly"),
        (("model.vocab_size=512",), "below the 1024 tokens of the data"),
        (
            ("train.averages.swa={start: {lr_scale: 0.1}, every: 50}", "final.average=swa"),
            "takes no snapshot in 120 iterations",
        ),
        (
            ("train.averages.swa={start: {progress: 0.9}, every: 50}", "final.average=swa"),
            "takes no snapshot in 120 iterations",
        ),
        (
            ("train.qat={mlp_bits: 6, start: {lr_scale: 0.04}}",),
            r"train\.qat\.start never comes in 120 iterations",
        ),
        (
            ("train.qat={mlp_bits: 6, start: {progress: 0.999}}",),
            r"train\.qat\.start never comes in 120 iterations",
        ),
    ],
)
def test_what_would_fail_only_in_the_gang_is_refused_by_the_plan(plan, assignments, words):
    with pytest.raises(UsageError, match=words):
        plan(*assignments)


def test_threads_set_the_order_of_sums_so_they_change_ids(plan):
    one, two = ids(plan()), ids(plan("resources.cpus_per_worker=2"))

    assert one[0].isdisjoint(two[0])
    assert one[1].isdisjoint(two[1])


SWA = "train.averages.swa={start: {progress: 0.9}, every: 50}"  # no snapshot in 120 iterations
AVERAGES = {"final.average": {"values": ["ema", "swa"]}}


@pytest.mark.parametrize(
    ("assignments", "changes"),
    [
        (
            (SWA,),
            {
                "space": {"final.average": {"values": ["ema", "raw"]}},
                "overrides": {"final.average": "swa"},
            },
        ),
        ((SWA,), {"space": AVERAGES, "where": ["final.average is ema"]}),
        ((SWA,), {"space": AVERAGES, "where": ["final.average is ema"], "search": TPE_FINALS}),
        (
            (SWA,),
            {
                "space": {"final.average": {"values": ["swa"], "when": "train.iterations > 120"}}
                | {"train.iterations": {"values": [120, 160]}},
                "search": TPE_FINALS,
            },
        ),
    ],
)
def test_only_averages_that_a_final_takes_need_their_snapshots(plan, assignments, changes):
    assert plan(*assignments, **changes).num_finals > 0


@pytest.mark.parametrize("search", [{}, TPE_FINALS])
def test_an_average_of_the_space_without_a_snapshot_is_refused(plan, search):
    with pytest.raises(UsageError, match=r"averages\.swa takes no snapshot in 120 iterations"):
        plan(SWA, space=AVERAGES, search=search)


NO_PRUNING = {"values": [0.9, 0.95], "when": "final.prune.ratio < 0.1"}


@pytest.mark.parametrize("search", [{}, TPE_FINALS])
def test_a_final_without_the_decay_axis_finds_the_recipes_own_decay(plan, search):
    space = {"final.prune.ratio": {"values": [0.05, 0.15]}, DECAY: NO_PRUNING}

    made = plan(space=space, search=search, overrides={DECAY: 0.99})

    (training,) = made.trainings
    assert training.task.train.averages.decays() == (0.9, 0.95, 0.99)
    banked = {f"ema-{decay!r}" for decay in training.task.train.averages.decays()}
    assert {final.task.entry for final in made.finals} == (set() if search else banked)


def test_the_recipes_own_decay_is_not_banked_where_every_final_has_the_axis(plan):
    made = plan(space={DECAY: {"values": [0.9, 0.95]}}, overrides={DECAY: 0.99})

    assert made.trainings[0].task.train.averages.decays() == (0.9, 0.95)


@pytest.mark.parametrize(
    "stop",
    [
        {"kind": "asha", "first_step": 10},
        {"kind": "reference", "training": "base", "margin_bpb": 0.1},
    ],
)
def test_trainings_that_may_be_stopped_early_run_from_step_0(plan, stop):
    made = plan(search={"train": {"stop": stop}})

    assert made.trunks == ()
    assert [training.branch for training in made.trainings] == [None, None]
    assert made.forecast["steps"] == made.forecast["steps_straight"]


def test_points_that_mean_the_same_are_run_once(plan):
    # Without an EMA in the final, the decay changes nothing.
    made = plan("final.average=raw")

    assert len(made.finals) == 2 * 2


def test_the_forecast_counts_steps_tokens_and_parameters(plan):
    made = plan("train.iterations=30", "train.batch_tokens=1024")

    assert made.forecast["steps_straight"] == 60
    assert made.forecast["steps"] == 20 + 10 + 20  # flat until the longer warmdown begins
    assert made.forecast["saving"] == pytest.approx(1 / 6, abs=1e-6)
    assert made.forecast["tokens"] == 50 * 1024
    (least, most), (low, high) = (
        made.forecast[name] for name in ("weights_bytes", "weights_bytes_interval")
    )
    assert low < least <= most < high
    assert made.forecast["num_params"] == [592_144]


HEADLINE = {
    "train.schedule.warmdown_iters": {"values": [6, 12, 18, 24]},  # 5, 10, 15, 20 % of 120
    "train.averages.ema_decay": {"values": [0.9, 0.95, 0.97, 0.99]},
    "final.quantize.clip": {"values": ["none", "p3", "p5", "p9", "sd12"]},
    "final.prune.ratio": {"values": [0.0, 0.05, 0.1, 0.15]},
}


def test_320_finals_come_from_one_trunk_and_four_tails(plan):
    made = plan(space=HEADLINE)

    (trunk,) = made.trunks
    assert [state.departure.step for state in trunk.states] == [96, 102, 108, 114]
    assert [training.branch for training in made.trainings] == [
        state.id for state in reversed(trunk.states)
    ]
    assert (made.num_trainings, made.num_finals) == (4, 320)
    assert made.forecast["steps"] == 1.45 * 120
    assert made.forecast["steps"] <= 0.37 * 4 * 120
    assert made.forecast["steps"] <= 0.005 * 320 * 120


def test_a_known_pace_turns_steps_into_worker_seconds(plan, tmp_path):
    plan("resources.workers=2", space=HEADLINE)
    sweep = load_sweep(tmp_path / "sweep.yaml", ["resources.workers=2"])

    cost = make_plan(sweep, INPUTS, "s", seconds_per_step=0.5).forecast

    assert cost["worker_seconds"] == 174 * 0.5 * 2
    assert cost["worker_seconds_straight"] == 480 * 0.5 * 2


def test_a_clock_that_ends_trainings_early_ends_what_is_counted(plan, tmp_path):
    plan()
    sweep = load_sweep(tmp_path / "sweep.yaml", ["train.max_clock_s=30"])

    cost = make_plan(sweep, INPUTS, "s", seconds_per_step=0.5).forecast

    assert cost["steps_straight"] == 2 * 60
    assert 60 <= cost["steps"] <= 2 * 60


def test_a_trunk_serves_the_trainings_of_one_seed(plan):
    made = plan("seeds.search=[1, 2]")

    assert len(made.trunks) == 2
    assert {trunk.task.train.seed for trunk in made.trunks} == {1, 2}


def straight_ids(plan, tmp_path, *assignments):
    made = plan(*assignments)
    sweep = load_sweep(tmp_path / "sweep.yaml", assignments)
    again = [plan_training(sweep, INPUTS, t.point, t.seed, "s") for t in made.trainings]
    assert all(training.branch is None for training in again)
    assert all(training.branch is not None for training in made.trainings)
    return {t.id for t in made.trainings}, {t.id for t in again}


def test_on_a_cpu_a_branched_training_is_the_straight_one(plan, tmp_path):
    branched, straight = straight_ids(plan, tmp_path)

    assert branched == straight


@pytest.mark.parametrize(
    "assignments",
    [
        ("resources.gpus_per_worker=1",),
        ("train.compile=true",),
        ("train.schedule.basis=wallclock", "train.max_clock_s=60"),
        ("train.max_clock_s=60",),  # a branched one may end at another step
    ],
)
def test_where_bits_may_differ_a_branched_training_is_another(plan, tmp_path, assignments):
    branched, straight = straight_ids(plan, tmp_path, *assignments)

    assert branched.isdisjoint(straight)


@pytest.mark.parametrize(
    "assignment",
    [
        "budget={gpu_hours: 3}",
        "limits.infra_retries=5",
        "resources.start_timeout_s=9",
        "resources.gang=fresh",
        "require={free_disk_gb: 1.0}",
    ],
)
def test_a_sweep_with_more_to_spend_is_the_same_sweep(plan, assignment):
    assert plan(assignment).sweep_id == plan().sweep_id


@pytest.mark.parametrize(
    "assignment", ["train.seq_len=128", "seeds.search=[5]", "resources.workers=2"]
)
def test_a_sweep_that_asks_for_something_else_is_another_sweep(plan, assignment):
    assert plan(assignment).sweep_id != plan().sweep_id


def test_a_sweep_is_what_its_clock_policy_says_and_not_where_that_lies(plan, tmp_path):
    shipped = (Path(service.__file__).parent / "clocks.yaml").read_text()
    moved, edited = tmp_path / "moved.yaml", tmp_path / "edited.yaml"
    moved.write_text(shipped)
    other = yaml.safe_load(shipped)
    other["phases"]["validate"]["clock"] = "train"
    edited.write_text(yaml.safe_dump(other))

    assert plan(clocks=str(moved)).sweep_id == plan().sweep_id
    assert plan(clocks=str(edited)).sweep_id != plan().sweep_id


def test_ranks_and_fits_have_ids_of_their_own(plan):
    final = plan().finals[0]
    device = {"device": "cpu", "threads": 1}

    rank = rank_id(final.task, final.training, INPUTS, device)
    fits = {
        fit_id(final.task, cap, search, final.training, INPUTS, device)
        for cap in (400_000, 500_000)
        for search in ("one", "other")
    }

    assert rank == final.rank
    assert len({rank, final.id, final.artifact, *fits}) == 7


def test_a_tpe_of_finals_has_trainings_but_no_finals_yet(plan):
    made = plan(search={"final": {**TPE, "per_bank": 5}})

    assert (made.num_trainings, made.num_finals) == (2, 10)
    assert len(made.trainings) == 2
    assert len(made.trunks) == 1
    assert made.finals == ()
    # Any of the decays may be asked for.
    assert made.trainings[0].task.train.averages.decays() == (0.9, 0.95, 0.99)


def test_a_tpe_of_trainings_has_nothing_yet_but_its_cost(plan):
    made = plan("seeds.search=[1, 2]", search={"train": {**TPE, "num": 2}})

    assert (made.num_trainings, made.num_finals) == (4, 24)
    assert (made.trainings, made.finals, made.trunks) == ((), (), ())
    assert made.forecast["steps"] == made.forecast["steps_straight"] == 4 * 120


@pytest.mark.parametrize(
    ("search", "changes", "words"),
    [
        ({"train": {**TPE, "num": 3}}, {}, "3 points are asked for, but the space has 2"),
        ({"final": {**TPE, "per_bank": 7}}, {}, "7 points are asked for, but the space has 6"),
        (
            {"final": {**TPE, "per_bank": 7}},
            {"space": {"train.averages.ema_decay": {"min": 0.9, "max": 0.99}}},
            "list values for a search by tpe",
        ),
        (
            {"train": {**TPE, "num": 2}},
            {"resources": {"workers": 3}},
            "resources.workers=3 do not share evenly",
        ),
    ],
)
def test_what_a_tpe_could_never_run_is_refused_by_the_plan(plan, search, changes, words):
    with pytest.raises(UsageError, match=words):
        plan(search=search, **changes)
