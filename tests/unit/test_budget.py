"""What a sweep has spent and may still spend."""

import pytest

from service.budget import Account, seconds_per_step, spent
from service.ledger import SweepView
from service.specs import Budget


def view(*events):
    seen = SweepView()
    for number, event in enumerate(events):
        base = {"at": float(number), "state": "succeeded", "cached": False, "result": None}
        seen.apply({**base, **event})
    return seen


def training(name, seconds, phase="search", **facts):
    return {
        "event": "training_finished",
        "training": name,
        "phase": phase,
        "occupied_s": seconds,
        **facts,
    }


def test_what_was_held_is_paid_by_its_phase_and_its_workers():
    seen = view(
        {"event": "trunk_finished", "trunk": "t", "occupied_s": 10.0, "steps_computed": 5},
        training("a", 20.0),
        training("b", 30.0, phase="confirm"),
        {"event": "final_scored", "final": "f", "phase": "search", "occupied_s": 4.0},
        {"event": "final_ranked", "final": "g", "occupied_s": 1.0},
        {"event": "final_scored", "final": "h", "phase": "confirm", "occupied_s": 2.0},
    )
    assert spent(seen, workers=8) == {"search": 240.0, "final": 5.0, "confirm": 242.0}


def test_a_failed_try_and_the_one_after_it_are_both_paid():
    seen = view(training("a", 20.0, state="failed"), training("a", 25.0))
    assert spent(seen, workers=1)["search"] == 45.0


def test_what_was_found_done_costs_nothing():
    assert spent(view(training("a", 0.0, cached=True)), workers=8)["search"] == 0.0


@pytest.mark.parametrize(
    ("budget", "limit_s"),
    [
        (Budget(gpu_hours=2.0), 7_200.0),
        (Budget(usd=5.0, usd_per_gpu_hour=2.5), 7_200.0),
        (Budget(gpu_hours=1.0, usd=5.0, usd_per_gpu_hour=2.5), 3_600.0),
        (Budget(deadline_hours=1.0), None),
    ],
)
def test_the_tighter_of_hours_and_money_is_the_limit(budget, limit_s):
    assert Account(budget, 0.0).limit_s == limit_s


def test_a_stage_that_would_overspend_does_not_start_and_the_figures_say_why():
    account = Account(Budget(gpu_hours=1.0), started_at=0.0)
    assert account.refuses(spent_s=1_800.0, cost_s=1_800.0, reserve_s=0.0, now=0.0) is None
    refusal = account.refuses(spent_s=1_800.0, cost_s=1_801.0, reserve_s=0.0, now=0.0)
    assert refusal == "budget: spent 0.500 of 1.000 GPU-hours, the next stage needs about 0.500"


def test_nothing_starts_once_all_is_spent_even_if_its_cost_is_not_known():
    account = Account(Budget(gpu_hours=1.0), started_at=0.0)
    assert account.refuses(3_600.0, 0.0, 0.0, now=0.0) is not None


def test_what_the_confirmation_needs_is_kept_for_it_unless_told_otherwise():
    spending = {"spent_s": 1_000.0, "cost_s": 1_000.0, "reserve_s": 2_000.0, "now": 0.0}
    refusal = Account(Budget(gpu_hours=1.0), 0.0).refuses(**spending)
    assert refusal is not None
    assert "0.556 are kept for the confirmation" in refusal
    careless = Budget(gpu_hours=1.0, reserve_for_confirm=False)
    assert Account(careless, 0.0).refuses(**spending) is None


def test_what_is_running_goes_on_to_the_last_second_of_the_budget():
    account = Account(Budget(gpu_hours=1.0), 0.0)
    assert account.refuses(3_600.0, 0.0, 0.0, now=0.0, is_running=True) is None
    assert account.refuses(3_601.0, 0.0, 0.0, now=0.0, is_running=True) is not None


def test_the_deadline_counts_from_the_first_start():
    account = Account(Budget(deadline_hours=2.0), started_at=1_000.0)
    assert account.refuses(0.0, 0.0, 0.0, now=8_199.0) is None
    assert account.refuses(0.0, 0.0, 0.0, now=8_200.0) == "budget.deadline_hours=2 are over"


def test_the_pace_is_measured_over_all_that_was_computed():
    seen = view(
        {"event": "trunk_finished", "trunk": "t", "occupied_s": 10.0, "steps_computed": 95},
        training("a", 2.0, result={"steps_computed": 5}),
    )
    assert seconds_per_step(seen) == pytest.approx(0.12)
    assert seconds_per_step(view()) is None


def test_all_is_used_up_only_when_the_limit_itself_is_reached():
    account = Account(Budget(gpu_hours=1.0), 0.0)
    assert not account.is_used_up(3_599.0, now=0.0)
    assert account.is_used_up(3_600.0, now=0.0)
    assert Account(Budget(deadline_hours=1.0), 0.0).is_used_up(0.0, now=3_600.0)
