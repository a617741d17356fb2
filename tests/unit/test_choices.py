"""Which points are confirmed, and how far results are over the limits of a sweep."""

from pathlib import Path

import pytest

from service.choices import top_points
from service.clocks import load_policy
from service.ledger import SweepView
from service.limits import over_limits, settle_ranked
from service.states import State
from service.sweep import Constraint

CAP = (Constraint("artifact_bytes", 1_000.0), Constraint("audit", None))


def view(*finals):
    seen = SweepView(started={"spec": {"seeds": {"search": [7, 8]}}})
    for number, (n, seed, bpb, facts) in enumerate(finals):
        event = {
            "event": "final_scored",
            "at": float(number),
            "final": str(number),
            "point": {"n": n},
            "seed": seed,
            "phase": "search",
            "state": "succeeded",
            "result": {"score": {"val_bpb": bpb}},
        }
        seen.apply(event | facts)
    return seen


def test_the_points_with_the_lowest_mean_over_their_seeds_are_confirmed():
    seen = view(
        (1, 7, 2.0, {}), (1, 8, 2.4, {}), (2, 7, 2.1, {}), (2, 8, 2.2, {}), (3, 7, 9.0, {}),
        (3, 8, 9.0, {}),
    )  # fmt: skip
    assert top_points(seen, 1) == [({"n": 2}, False)]
    assert top_points(seen, 2) == [({"n": 2}, False), ({"n": 1}, False)]


def test_a_point_with_a_seed_that_does_not_count_is_not_confirmed_before_a_whole_one():
    seen = view(
        (1, 7, 2.0, {}), (1, 8, 2.0, {"state": "infeasible"}), (2, 7, 2.5, {}), (2, 8, 2.5, {})
    )
    assert top_points(seen, 2) == [({"n": 2}, False)]


def test_what_was_confirmed_already_does_not_change_what_is_confirmed():
    confirmed = (2, 9, 1.0, {"phase": "confirm"})
    assert top_points(view((1, 7, 2.0, {}), (2, 7, 2.1, {}), confirmed), 1) == [({"n": 1}, False)]


def test_a_final_that_its_own_confirmation_took_up_still_counts_for_the_search():
    taken_up = {"phase": "confirm"}
    before = view((1, 7, 2.0, {}), (2, 7, 2.1, {}))
    after = view((1, 7, 2.0, taken_up), (2, 7, 2.1, {}), (1, 9, 5.0, taken_up))
    assert top_points(after, 1) == top_points(before, 1) == [({"n": 1}, False)]


def test_a_fitted_final_and_the_one_that_was_over_the_cap_are_two_points():
    seen = view((1, 7, 2.0, {"fitted": True}), (1, 7, 1.9, {"state": "infeasible"}))
    assert top_points(seen, 1) == [({"n": 1}, True)]


def test_a_sweep_without_a_feasible_final_confirms_nothing():
    assert top_points(view((1, 7, 2.0, {"state": "illegal"})), 1) == []


def test_a_ranked_final_over_the_cap_is_infeasible_with_its_overshoot():
    assert settle_ranked({"artifact_bytes": 1_000}, CAP) == (State.SUCCEEDED, None)
    assert settle_ranked({"artifact_bytes": 1_001}, CAP) == (
        State.INFEASIBLE,
        "artifact_bytes 1,001 > 1,000, over by 1",
    )


def test_how_far_a_result_is_over_its_limits_is_told_as_shares_of_them():
    training = {"clock_s": {"train": 300.0, "validate": 50.0}}
    final = {
        "artifact_bytes": 1_100,
        "finalize_clock_s": 5.0,
        "score": {"val_bpb": 2.0, "eval_clock_s": 30.0},
        "audit": [{"verdict": "fail"}],
    }
    limits = (*CAP, Constraint("train_clock_s", 600.0), Constraint("val_bpb", 1.0))

    over = over_limits(final, training, limits, load_policy())

    assert over == {
        "artifact_bytes": pytest.approx(0.1),
        "train_clock_s": pytest.approx(-0.5),
        "val_bpb": pytest.approx(1.0),
        "audit": 1.0,
    }
    ranked = {"artifact_bytes": 500, "finalize_clock_s": 5.0, "holdout_bpb": 2.0}
    assert over_limits(ranked, training, limits, load_policy()) == {
        "artifact_bytes": pytest.approx(-0.5),
        "train_clock_s": pytest.approx(-0.5),
    }
    assert over_limits({}, training, limits, load_policy()) == {
        "train_clock_s": pytest.approx(-0.5)
    }


def test_a_clock_policy_of_the_users_own_decides_what_counts(tmp_path: Path):
    policy = tmp_path / "clocks.yaml"
    shipped = Path("service/clocks.yaml").read_text()
    policy.write_text(shipped.replace("validate:\n    clock: none", "validate:\n    clock: train"))
    training = {"clock_s": {"train": 300.0, "validate": 50.0}}
    limits = (Constraint("train_clock_s", 700.0),)

    assert over_limits({}, training, limits, load_policy(str(policy)))["train_clock_s"] == (
        pytest.approx(-0.5)
    )
