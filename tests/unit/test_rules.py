"""Axes that depend on others, derived knobs, and points that a sweep drops before it starts."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from service.identity import Inputs
from service.plan import Plan, make_plan
from service.sweep import Sweep, load_sweep
from trainer.codec import with_values
from trainer.errors import UsageError
from tune_spaces.axes import Axis
from tune_spaces.space import grid, in_order, of_phase, sample, suggest

WARMDOWN, ITERATIONS = "train.schedule.warmdown_iters", "train.iterations"
KIND, LR, RANK = "evaluate.ttt.kind", "evaluate.ttt.lr", "evaluate.ttt.rank"
TTT = {
    RANK: {"values": [4, 8], "when": "evaluate.ttt is lora"},
    KIND: {"values": ["sgd", "lora"]},
    LR: {"values": [0.001, 0.002, 0.003], "when": "evaluate.ttt is sgd"},
    "evaluate.documents.bos": {"values": [1], "when": "evaluate.ttt is lora"},
}
INPUTS = Inputs(data_digest="sha256:data", code_digest="code", vocab_size=1024)


@pytest.fixture
def sweep(tmp_path: Path):
    def load(*assignments: str, **fields: Any) -> Sweep:
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump({"name": "trial", "recipe": "tiny", "space": {}, **fields}))
        return load_sweep(path, assignments)

    return load


@pytest.fixture
def plan(sweep):
    def make(*assignments: str, **fields: Any) -> Plan:
        return make_plan(sweep(*assignments, **fields), INPUTS, "sweep.yaml")

    return make


def test_a_point_lacks_the_axes_whose_condition_does_not_hold(sweep):
    loaded = sweep(space=TTT)

    points = grid(loaded.spec.space, loaded.recipe, "s")

    assert [point for point in points if point[KIND] == "sgd"] == [
        {KIND: "sgd", LR: lr} for lr in (0.001, 0.002, 0.003)
    ]
    assert [point for point in points if point[KIND] == "lora"] == [
        {KIND: "lora", RANK: rank, "evaluate.documents.bos": 1} for rank in (4, 8)
    ]


def test_every_point_of_a_conditional_space_is_a_recipe(plan):
    made = plan(space=TTT)

    assert sorted(final.task.evaluate.ttt.kind for final in made.finals) == [
        *["lora"] * 2,
        *["sgd"] * 3,
    ]


def test_an_axis_comes_after_those_that_decide_whether_it_is_there():
    axes = {path: Axis(values=(1,), when=when) for path, when in {
        "model.dim": "train.iterations > 3",
        "train.iterations": "model.num_layers > 2",
        "model.num_layers": None,
    }.items()}  # fmt: skip

    assert list(in_order(axes, "s")) == ["model.num_layers", "train.iterations", "model.dim"]


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (
            {
                "model.dim": {"values": [64], "when": "model.num_layers > 2"},
                "model.num_layers": {"values": [4], "when": "model.dim > 2"},
            },
            "space.model.dim.when: waits in a circle for model.num_layers",
        ),
        (
            {"model.dim": {"values": [64], "when": "model.dim > 2"}},
            "space.model.dim.when: waits in a circle for model.dim",
        ),
        ({"model.dim": {"values": [64], "when": "model.dmi > 2"}}, "did you mean dim?"),
        (
            {"model.dim": {"values": [64], "when": "train.iterations > 1_000"}},
            "space.model.dim.when: 'train.iterations > 1_000' never holds in this space",
        ),
        (
            {"model.dim": {"values": [64], "when": "train.iterations"}},
            "space.model.dim.when: 'train.iterations' is 120, neither true nor false",
        ),
        (
            {
                ITERATIONS: {"values": [100], "when": "final.prune.ratio > 0.1"},
                "final.prune.ratio": {"values": [0.0, 0.2]},
            },
            "reads final.prune.ratio, which acts after training",
        ),
        (
            {**TTT, RANK: {"values": [4, 0], "when": "evaluate.ttt is lora"}},
            "space.evaluate.ttt.rank=0: evaluate.ttt: rank=0 must be above 0",
        ),
    ],
)
def test_a_condition_that_makes_no_sense_is_refused_by_its_axis(sweep, space, words):
    with pytest.raises(UsageError) as caught:
        sweep(space=space)

    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_random_points_are_drawn_from_what_is_there(sweep):
    loaded = sweep(space=TTT)

    points = sample(loaded.spec.space, loaded.recipe, 5, 0, "s")

    assert sorted(map(str, points)) == sorted(map(str, grid(loaded.spec.space, loaded.recipe, "s")))


def test_a_search_is_asked_only_for_what_is_there(sweep):
    loaded, asked = sweep(space=TTT), []

    def ask(path: str, axis: Axis, whole: bool) -> Any:
        asked.append((path, whole))
        return axis.values[-1]

    point = suggest(loaded.spec.space, loaded.recipe, ask)

    assert asked == [(KIND, False), ("evaluate.documents.bos", True), (RANK, True)] or asked == [
        (KIND, False), (RANK, True), ("evaluate.documents.bos", True)
    ]  # fmt: skip
    assert point[KIND] == "lora"


def test_a_finals_condition_may_read_what_its_training_was_given(sweep):
    loaded = sweep(
        space={
            "model.dim": {"values": [64, 128]},
            "final.prune.ratio": {"values": [0.1, 0.2], "when": "model.dim > 100"},
        }
    )
    axes = of_phase(loaded.spec.space, "final")

    small, large = (with_values(loaded.recipe, [("model.dim", dim)]) for dim in (64, 128))

    assert grid(axes, small, "s") == [{}]
    assert len(grid(axes, large, "s")) == 2


def test_a_derived_knob_follows_the_point_and_is_no_part_of_it(plan):
    made = plan(
        space={ITERATIONS: {"values": [50, 75]}},
        derived={WARMDOWN: "train.iterations * 0.5", "observe.log_every": "train.iterations // 5"},
    )

    assert [t.task.train.schedule.warmdown_iters for t in made.trainings] == [25, 38]
    assert [t.task.observe.log_every for t in made.trainings] == [10, 15]
    assert [t.point for t in made.trainings] == [{ITERATIONS: 50}, {ITERATIONS: 75}]


def test_derived_knobs_may_build_on_one_another_in_any_order(plan):
    made = plan(
        space={ITERATIONS: {"values": [40]}},
        derived={
            "train.optimizer.matrix.momentum_warmup_steps": "train.schedule.warmdown_iters // 2",
            WARMDOWN: "train.iterations // 2",
        },
    )

    (training,) = made.trainings
    assert training.task.train.optimizer.matrix.momentum_warmup_steps == 10


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"derived": {"train.itera": "3"}}, "derived.train.itera: no knob 'train.itera'"),
        (
            {"derived": {WARMDOWN: "train.iterations *"}},
            f"derived.{WARMDOWN}: 'train.iterations *'",
        ),
        ({"derived": {WARMDOWN: "1 / 0"}}, "division by zero"),
        (
            {"derived": {ITERATIONS: "3"}, "space": {ITERATIONS: {"values": [9]}}},
            "also an axis of the space",
        ),
        ({"derived": {ITERATIONS: "300"}, "overrides": {ITERATIONS: 500}}, "also an override"),
        ({"derived": {"train.seed": "3"}}, "list seeds under seeds.search"),
        ({"derived": {"name": "'x'"}}, "derived.name: not a knob"),
        (
            {
                "derived": {
                    ITERATIONS: "train.schedule.warmdown_iters",
                    WARMDOWN: "train.iterations",
                }
            },
            f"waits in a circle for {WARMDOWN}",
        ),
        (
            {
                "derived": {ITERATIONS: "100 + round(final.prune.ratio * 100)"},
                "space": {"final.prune.ratio": {"values": [0.0, 0.2]}},
            },
            "reads final.prune.ratio, which acts after training",
        ),
        (
            {
                "derived": {"model.mlp.mult": "2.0"},
                "space": {"final.prune.ratio": {"values": [0.1], "when": "model.mlp.mult > 1"}},
            },
            "model.mlp.mult is derived; write its expression here",
        ),
        ({"derived": {ITERATIONS: "0 - 5"}}, "iterations=-5 must be above 0"),
        ({"where": ["train.iterations > 3", "1 +"]}, "where[1]: '1 +': not an expression"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused_by_its_field(sweep, fields, words):
    with pytest.raises(UsageError) as caught:
        sweep(**fields)

    assert words in str(caught.value)
    assert "sweep.yaml: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_grid_drops_and_counts_what_where_does_not_allow(plan):
    made = plan(
        space={ITERATIONS: {"values": [40, 100]}, WARMDOWN: {"values": [20, 80]}},
        where=["train.schedule.warmdown_iters <= train.iterations"],
    )

    points = [(t.point[ITERATIONS], t.point[WARMDOWN]) for t in made.trainings]
    assert points == [(40, 20), (100, 20), (100, 80)]
    assert made.forecast["dropped_points"] == {"train": 1, "final": 0}


def test_a_final_is_dropped_for_what_its_training_was_given(plan):
    made = plan(
        space={WARMDOWN: {"values": [20, 40]}, "final.prune.ratio": {"values": [0.0, 0.2]}},
        where=["train.schedule.warmdown_iters < 30 or final.prune.ratio < 0.1"],
    )

    assert made.num_trainings == 2
    points = [(final.point[WARMDOWN], final.point["final.prune.ratio"]) for final in made.finals]
    assert points == [(20, 0.0), (20, 0.2), (40, 0.0)]
    assert made.forecast["dropped_points"] == {"train": 0, "final": 1}


def test_a_point_is_judged_once_all_that_a_rule_reads_is_settled(sweep):
    loaded = sweep(
        space={**TTT, WARMDOWN: {"values": [20, 40]}},
        where=["evaluate.ttt is lora or evaluate.ttt.lr < 0.003 or train.iterations < 5"],
    )

    assert loaded.accepts({WARMDOWN: 20})  # nothing is known of ttt yet
    assert not loaded.accepts({WARMDOWN: 20, KIND: "sgd", LR: 0.003})
    assert loaded.accepts({WARMDOWN: 20, KIND: "lora", RANK: 4})  # there lr is absent for good


def test_a_random_search_draws_again_for_what_is_dropped(plan):
    made = plan(
        space={ITERATIONS: {"min": 20, "max": 120}, WARMDOWN: {"min": 10, "max": 110}},
        where=["train.schedule.warmdown_iters <= train.iterations"],
        search={"train": {"method": "random", "num": 8}},
    )

    points = [training.point for training in made.trainings]
    assert len(points) == 8
    assert all(point[WARMDOWN] <= point[ITERATIONS] for point in points)


@pytest.mark.parametrize("method", ["grid", "random"])
def test_a_rule_that_drops_everything_is_refused(plan, method):
    search = {} if method == "grid" else {"train": {"method": "random", "num": 1}}

    with pytest.raises(UsageError, match=r"where drops every point|gave only 0 different"):
        plan(
            space={WARMDOWN: {"values": [20, 40]}},
            where=["train.schedule.warmdown_iters > 100"],
            search=search,
        )


def test_a_range_over_a_whole_knob_gives_whole_numbers(plan):
    made = plan(space={WARMDOWN: {"min": 10, "max": 80, "scale": "log", "num": 4}})

    assert [training.point[WARMDOWN] for training in made.trainings] == [10, 20, 40, 80]


def test_a_whole_range_has_an_end_of_points(plan):
    space = {WARMDOWN: {"min": 10, "max": 13}}

    made = plan(space=space, search={"train": {"method": "random", "num": 4}})

    assert sorted(training.point[WARMDOWN] for training in made.trainings) == [10, 11, 12, 13]
    with pytest.raises(UsageError, match="5 points are asked for, but the space has 4"):
        plan(space=space, search={"train": {"method": "random", "num": 5}})


def test_a_whole_knob_has_no_broken_ends(sweep):
    with pytest.raises(UsageError, match=r"min=0\.5: this knob takes whole numbers"):
        sweep(space={WARMDOWN: {"min": 0.5, "max": 10}})
