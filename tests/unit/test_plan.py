"""The plan: what a sweep expands to, and what a stage's identity depends on."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from service.plan import Inputs, Plan, make_plan
from service.sweep import load_sweep
from trainer.errors import UsageError

INPUTS = Inputs(data_digest="sha256:data", code_digest="code", vocab_size=1024)
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


def test_points_that_mean_the_same_are_run_once(plan):
    # Without an EMA in the final, the decay changes nothing.
    made = plan("final.average=raw")

    assert len(made.finals) == 2 * 2


def test_the_forecast_counts_steps_tokens_and_parameters(plan):
    made = plan("train.iterations=30", "train.batch_tokens=1024")

    assert made.forecast["steps"] == 60
    assert made.forecast["tokens"] == 60 * 1024
    (least, most), (low, high) = (
        made.forecast[name] for name in ("weights_bytes", "weights_bytes_interval")
    )
    assert low < least <= most < high
    assert made.forecast["num_params"] == [592_144]
