"""What a comparison may name, and what a sweep's gate says at its end."""

import json

import numpy as np
import pytest

from service.noise import noise_floor
from service.paths import Paths
from service.sides import check_gate, find_side, find_spread, judge_sweep, measure, seed_cost_s
from service.specs import Gate
from tests.seeded import Seeded, point
from trainer.codec import dump, to_yaml
from trainer.errors import UsageError

NONE, P5 = point(2500), point(2500, "p5")


def confirmed(home, sweep_id: str, *bpb: float, **facts) -> Seeded:
    sweep = Seeded(home, sweep_id, confirm=(7, 8, 9), **facts)
    sweep.add("search", NONE, {1: 1.1})
    sweep.add("confirm", NONE, dict(zip((7, 8, 9), bpb, strict=True)))
    return sweep.finish()


@pytest.fixture
def sweep(tmp_path) -> Seeded:
    return confirmed(tmp_path, "better-aaaaaa", 1.1000, 1.1010, 1.1019)


@pytest.fixture
def paths(tmp_path) -> Paths:
    return Paths(tmp_path)


def test_a_side_is_a_baseline_a_file_a_sweep_or_a_final(sweep, paths, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(to_yaml(dump(measure(sweep.view()))))
    final = next(f for f, e in sweep.view().finals.items() if e["seed"] == 9)

    found = [find_side(paths, ref) for ref in ("pr414", str(file), "better", final[:10])]

    assert [side.name for side in found] == ["pr414", "better-aaaaaa", "better-aaaaaa", final[:12]]
    assert found[1].values == found[2].values == found[3].values == (1.1, 1.101, 1.1019)


def test_a_reference_to_nothing_is_answered_with_what_ships(sweep, paths):
    with pytest.raises(UsageError, match=r"'pr9' is no baseline, no sweep and no final.*pr1855"):
        find_side(paths, "pr9")


def test_a_reference_to_several_sweeps_is_refused(sweep, paths, tmp_path):
    confirmed(tmp_path, "better-aabbbb", 1.2, 1.3, 1.4)

    with pytest.raises(UsageError, match="fits 2 sweeps"):
        find_side(paths, "better-aa")


def test_a_sweep_that_goes_on_is_a_side_that_says_so(paths, tmp_path):
    Seeded(tmp_path, search=(1, 2)).add("search", NONE, {1: 1.1, 2: 1.2})

    assert find_side(paths, "seeded").remarks == ("the sweep is running, not finished",)


def test_a_sweep_passes_its_gate_and_the_verdict_is_plain_json(sweep, paths):
    gate = Gate(baseline="pr414")

    found = judge_sweep(sweep.view(), gate, paths)

    assert found["verdict"] == "passed"
    assert (found["test"], found["mode"], found["gate"]["baseline"]) == ("welch", "strict", "pr414")
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_sweep_held_against_another_is_paired_by_seed(sweep, paths, tmp_path):
    confirmed(tmp_path, "before-bbbbbb", 1.1001, 1.1011, 1.10195)

    found = judge_sweep(sweep.view(), Gate(baseline="before"), paths)

    assert found["test"] == "paired"
    assert found["verdict"] == "not passed"
    frontier = judge_sweep(sweep.view(), Gate(baseline="before", mode="frontier"), paths)
    assert frontier["verdict"] == "passed"


@pytest.mark.parametrize(
    ("baseline", "said"),
    [
        ("better", "that is the sweep itself"),
        ("pr1", "no baseline, no sweep"),
        ("pr1855", "a nat per token means something else"),
        ("shorter", "different texts"),
    ],
)
def test_a_gate_that_cannot_judge_refuses_in_one_line(sweep, paths, tmp_path, baseline, said):
    confirmed(tmp_path, "shorter-cccccc", 1.2, 1.21, 1.22, tokens=1_000, bytes=2_500)

    found = judge_sweep(sweep.view(), Gate(baseline=baseline), paths)

    assert found["verdict"] == "refused"
    assert said in found["reason"]
    assert "\n" not in found["reason"]


def test_a_sweep_without_confirmed_points_is_refused(paths, tmp_path):
    sweep = Seeded(tmp_path, search=(1, 2, 3), confirm=(7,))
    sweep.add("search", NONE, {1: 1.0, 2: 1.01, 3: 1.02})

    found = judge_sweep(sweep.view(), Gate(baseline="pr414"), paths)

    assert found["verdict"] == "refused"
    assert "nothing was confirmed" in found["reason"]


def test_a_dropped_seed_is_refused_by_name(paths, tmp_path):
    sweep = Seeded(tmp_path, confirm=(7, 8, 9))
    over = {"state": "infeasible", "reason": "over the cap"}
    sweep.add("confirm", NONE, {7: 1.0, 8: 1.01, 9: 1.02}, {9: over})

    found = judge_sweep(sweep.view(), Gate(baseline="pr414"), paths)

    assert found["verdict"] == "refused"
    assert "seed 9 is infeasible: over the cap" in found["reason"]


def test_a_gate_is_checked_before_anything_is_spent(paths):
    check_gate(Gate(baseline="pr414"), paths)

    with pytest.raises(UsageError, match="nothing-here"):
        check_gate(Gate(baseline="nothing-here"), paths)


def test_finals_of_one_bank_are_paired_and_their_noise_is_the_differences(paths, tmp_path):
    sweep = Seeded(tmp_path, search=(1, 2, 3))
    first = sweep.add("search", NONE, {1: 1.10, 2: 1.12, 3: 1.15})
    second = sweep.add("search", P5, {1: 1.101, 2: 1.1215, 3: 1.1512})

    sides = find_side(paths, first[0]), find_side(paths, second[0])
    floor = measure(sweep.view()).noise

    assert [r.training for r in sides[0].results] == [r.training for r in sides[1].results]
    assert floor.df == 2  # one bank a seed, however many finals
    assert floor.paired_sd_bpb == pytest.approx(0.00025166, rel=1e-4)
    assert find_spread(paths, "seeded", paired=True).sd_nats == floor.paired_sd_nats


def test_a_point_that_lacks_a_seed_does_not_count_its_bank_twice(tmp_path):
    sweep = Seeded(tmp_path, search=(1, 2, 3))
    sweep.add("search", NONE, {1: 1.10, 2: 1.12, 3: 1.15})
    whole = measure(sweep.view()).noise
    sweep.add("search", P5, {1: 1.101, 2: 1.1215})

    floor = measure(sweep.view()).noise

    assert (floor.sd_bpb, floor.df, floor.num_points) == (whole.sd_bpb, 2, 1)
    assert floor.paired_df == 1  # two seeds have both finals


@pytest.mark.parametrize(
    "unscored",
    [
        {"state": "infeasible", "reason": "nothing fits the cap", "result": None, "fitted": True},
        {"state": "illegal", "reason": "bank quarantined", "result": None},
        {"state": "infeasible", "reason": "over", "result": {"holdout_bpb": 1.0, "steps": 1}},
    ],
)
def test_finals_without_a_score_leave_noise_and_cost_as_they_are(tmp_path, unscored):
    sweep = Seeded(tmp_path, search=(1, 2))
    sweep.add("search", NONE, {1: 1.10, 2: 1.12})
    noise, cost_s = measure(sweep.view()).noise, seed_cost_s(sweep.view())
    facts = {**unscored, "occupied_s": 1.0}
    sweep.add("search", P5, {1: 0.0, 2: 0.0}, {1: facts, 2: facts})

    assert measure(sweep.view()).noise == noise
    assert seed_cost_s(sweep.view()) == cost_s


def test_a_seed_that_was_searched_and_confirmed_with_counts_once(tmp_path):
    sweep = Seeded(tmp_path, search=(1, 2), confirm=(2, 3))
    sweep.add("search", NONE, {1: 1.10, 2: 1.12})
    sweep.add("search", P5, {1: 1.101, 2: 1.1215})
    sweep.add("confirm", NONE, {2: 1.12, 3: 1.15})

    floor = measure(sweep.view()).noise

    assert floor.df == 2
    assert floor.sd_bpb == pytest.approx(np.std([1.10, 1.12, 1.15], ddof=1))
    assert floor.paired_df == 1  # the search's own pairs


def test_a_confirmation_by_other_seeds_is_a_table_of_its_own(tmp_path):
    sweep = Seeded(tmp_path, search=(1, 2), confirm=(3, 4))
    sweep.add("search", NONE, {1: 1.10, 2: 1.12})
    sweep.add("confirm", NONE, {3: 1.13, 4: 1.15})

    floor = measure(sweep.view()).noise

    assert (floor.df, floor.sd_bpb) == (2, pytest.approx(0.02 / 2**0.5))


def test_fitted_finals_are_a_row_of_their_own_and_named_in_the_measured_file(tmp_path):
    sweep = Seeded(tmp_path, search=(1, 2))
    sweep.add("search", NONE, {1: 1.10, 2: 1.12})
    sweep.add("search", NONE, {1: 1.09, 2: 1.112}, {1: {"fitted": True}, 2: {"fitted": True}})

    baseline = measure(sweep.view())

    assert (baseline.noise.num_points, baseline.noise.paired_df) == (2, 1)
    assert [result.configuration for result in baseline.results] == ["fitted", "fitted"]
    assert baseline.sample().values == (1.09, 1.112)


def test_the_measured_file_holds_what_the_sweep_says(sweep, tmp_path):
    baseline = measure(sweep.view())

    assert baseline.registered == (7, 8, 9)
    assert (baseline.tokens, baseline.bytes) == (sweep.tokens, sweep.bytes)
    assert baseline.tokenizer_sha256 == sweep.tokenizer
    rows = [np.array([[1.1, 1.101, 1.1019]])]
    assert baseline.noise.sd_bpb == noise_floor(rows, 1.0).sd_bpb


def test_one_more_seed_costs_what_a_training_and_a_final_took(sweep):
    assert seed_cost_s(sweep.view()) == 600.0 * 8 + 90.0


def test_one_more_seed_of_trainings_that_share_a_trunk_is_priced_from_step_0(tmp_path):
    sweep = Seeded(tmp_path, search=(1, 2), occupied_s=120.0, steps_computed=1_000)
    sweep.grow_trunk(6_000, 540.0)
    sweep.add("search", NONE, {1: 1.10, 2: 1.12})

    pace_s = (540.0 + 2 * 120.0) / (6_000 + 2 * 1_000)
    assert seed_cost_s(sweep.view()) == pytest.approx(7_000 * pace_s * 8 + 90.0)


def test_whole_trainings_tell_the_price_where_there_are_some(tmp_path):
    sweep = Seeded(tmp_path, search=(1,), confirm=(7,), occupied_s=120.0, steps_computed=1_000)
    sweep.add("search", NONE, {1: 1.10})
    sweep.occupied_s, sweep.steps_computed = 700.0, 7_000
    sweep.add("confirm", NONE, {7: 1.12})

    assert seed_cost_s(sweep.view()) == 700.0 * 8 + 90.0


def test_a_sweep_that_computed_no_training_tells_no_price(tmp_path):
    sweep = Seeded(tmp_path, occupied_s=0.0, steps_computed=0)
    sweep.add("search", NONE, {1: 1.10})

    with pytest.raises(UsageError, match="give --gpu-seconds"):
        seed_cost_s(sweep.view())


def test_a_baseline_without_a_floor_gives_the_spread_of_its_seeds_and_no_paired_one(paths):
    assert find_spread(paths, "pr414").sd_nats == pytest.approx(0.000785, abs=1e-6)
    for ref, paired in (("pr414", True), ("pr374", False)):
        with pytest.raises(UsageError, match=f"{ref}: nothing there tells its"):
            find_spread(paths, ref, paired=paired)
