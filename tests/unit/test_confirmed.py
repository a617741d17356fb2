"""Confirmed points: the mean over registered seeds instead of a lucky number."""

import pytest

from service import report
from service.confirmed import best_confirmed, confirmed_document, sample_of_final, sample_of_sweep
from service.ledger import Ledger
from tests.ledgers import final_result
from tests.seeded import Seeded, point
from trainer.errors import UsageError

LUCKY, SOUND = point(2500), point(3500)


@pytest.fixture
def sweep(tmp_path) -> Seeded:
    """The search's best comes out worse than its second when both are confirmed."""
    sweep = Seeded(tmp_path, search=(1,), confirm=(7, 8, 9))
    sweep.add("search", LUCKY, {1: 1.100})
    sweep.add("search", SOUND, {1: 1.105})
    return sweep


def over_cap() -> dict:
    return {"state": "infeasible", "reason": "artifact_bytes is 9 over the cap"}


def test_best_is_the_confirmed_point_with_the_lowest_mean(sweep):
    sweep.add("confirm", LUCKY, {7: 1.111, 8: 1.112, 9: 1.119})
    finals = sweep.add("confirm", SOUND, {7: 1.107, 8: 1.108, 9: 1.1105})

    best = report.best(sweep.view())

    # Its middle seed: nearest the mean of 1.1085.
    assert best["final"] == finals[1]


def test_best_document_shows_mean_and_seeds_beside_the_searchs_own_value(sweep):
    sweep.add("confirm", SOUND, {7: 1.107, 8: 1.108, 9: 1.1105})
    view = sweep.view()

    document = report.best_document(view, {})

    confirmed = document["confirmed"]
    assert confirmed["mean_bpb"] == pytest.approx(1.1085)
    assert confirmed["sd_bpb"] == pytest.approx(0.0018027756)
    assert confirmed["n"] == 3
    assert confirmed["seeds"][0] == {"seed": 7, "val_bpb": 1.107}
    assert confirmed["search_bpb"] == 1.105
    assert report.status_document(view)["confirmed"] == confirmed


def test_without_confirmed_points_best_is_the_lowest_of_all(sweep):
    view = sweep.view()

    assert report.best(view)["result"]["score"]["val_bpb"] == 1.100
    assert report.best_document(view, {})["confirmed"] is None


def test_a_point_with_a_seed_still_to_come_is_not_confirmed(sweep):
    sweep.add("confirm", SOUND, {7: 1.107, 8: 1.108})

    assert best_confirmed(sweep.view()) is None
    with pytest.raises(UsageError, match="no point is confirmed; no result for seed 9"):
        sample_of_sweep(sweep.view())


def test_a_point_with_a_seed_over_the_cap_is_not_confirmed(sweep):
    sweep.add("confirm", SOUND, {7: 1.107, 8: 1.108, 9: 1.09}, {9: over_cap()})

    assert best_confirmed(sweep.view()) is None
    with pytest.raises(UsageError, match="seed 9 is infeasible: artifact_bytes is 9 over"):
        sample_of_sweep(sweep.view())


def test_a_point_with_an_illegal_seed_is_not_confirmed_whatever_its_event_says(sweep):
    result = final_result(SOUND, 15_000_000)
    result["audit"][0]["verdict"] = "fail"
    sweep.add("confirm", SOUND, {7: 1.107, 8: 1.108, 9: 1.1}, {9: {"result": result}})

    assert best_confirmed(sweep.view()) is None


def test_a_seed_that_was_not_registered_confirms_nothing(sweep):
    sweep.add("confirm", SOUND, {7: 1.107, 8: 1.108, 9: 1.109, 10: 1.0})

    assert best_confirmed(sweep.view()) is None
    with pytest.raises(UsageError, match="seed 10 was not registered; registered are 7, 8, 9"):
        sample_of_sweep(sweep.view())


def test_a_failed_seed_is_named(sweep):
    failed = {"state": "failed", "reason": "loss is NaN", "result": None}
    sweep.add("confirm", SOUND, {7: 1.107, 8: 1.108, 9: 1.1}, {9: failed})

    with pytest.raises(UsageError, match="seed 9 is failed: loss is NaN"):
        sample_of_sweep(sweep.view())


def test_a_registered_seed_that_the_search_used_counts_and_is_told_apart(tmp_path):
    sweep = Seeded(tmp_path, search=(1,), confirm=(1, 8))
    sweep.add("search", SOUND, {1: 1.105})
    sweep.add("confirm", SOUND, {1: 1.105, 8: 1.108})  # seed 1: one final, found again

    sample = sample_of_sweep(sweep.view())

    assert sample.values == (1.105, 1.108)
    assert sample.remarks == ("seed 1 was searched with too: not fresh",)
    assert report.best_document(sweep.view(), {})["confirmed"]["search_bpb"] == 1.105


def test_the_confirmed_sample_knows_its_seeds_trainings_and_how_many_were_tried(sweep):
    sweep.add("confirm", LUCKY, {7: 1.111, 8: 1.112, 9: 1.119})
    sweep.add("confirm", SOUND, {7: 1.107, 8: 1.108, 9: 1.1105})

    sample = sample_of_sweep(sweep.view())

    assert sample.registered == (7, 8, 9)
    assert sample.chosen_among == 2
    assert len({result.training for result in sample.results}) == 3
    assert sample.text.tokenizer == sweep.tokenizer


def test_an_unconfirmed_sweep_is_its_best_point_and_says_so(tmp_path):
    sweep = Seeded(tmp_path, search=(1, 2))
    sweep.add("search", LUCKY, {1: 1.10, 2: 1.13})
    sweep.add("search", SOUND, {1: 1.11, 2: 1.11})
    sweep.add("search", point(4500), {1: 1.0})  # its second seed is not there yet

    sample = sample_of_sweep(sweep.view())

    assert sample.values == (1.11, 1.11)
    assert sample.remarks == ("not confirmed: chosen among 2 points by the same seeds",)
    assert sample.chosen_among == 2


def test_a_final_stands_for_its_point_with_all_seeds_of_its_phase(sweep):
    finals = sweep.add("confirm", SOUND, {7: 1.107, 8: 1.108, 9: 1.1105})

    sample = sample_of_final(sweep.view(), finals[2])

    assert sample.values == (1.107, 1.108, 1.1105)
    assert (sample.name, sample.chosen_among) == (finals[2][:12], 1)


def fitted(*seeds: int) -> dict:
    return {seed: {"fitted": True} for seed in seeds}


def test_fitted_finals_and_plain_ones_of_a_point_are_two_configurations(sweep):
    sweep.add("search", SOUND, {1: 1.090}, fitted(1))
    plain = sweep.add("confirm", SOUND, {7: 1.107, 8: 1.108, 9: 1.1105})
    fits = sweep.add("confirm", SOUND, {7: 1.097, 8: 1.098, 9: 1.099}, fitted(7, 8, 9))
    view = sweep.view()

    sample = sample_of_sweep(view)

    assert (sample.values, sample.chosen_among) == ((1.097, 1.098, 1.099), 2)
    assert {result.configuration for result in sample.results} == {"fitted"}
    assert sample.source.endswith(", fitted")
    assert report.best(view)["final"] == fits[1]
    assert report.best_document(view, {})["confirmed"]["search_bpb"] == 1.090
    assert sample_of_final(view, fits[0]).values == (1.097, 1.098, 1.099)
    assert sample_of_final(view, plain[0]).values == (1.107, 1.108, 1.1105)
    assert {result.configuration for result in sample_of_final(view, plain[0]).results} == {None}


def test_a_fitted_seed_does_not_stand_in_for_a_plain_one_that_is_missing(sweep):
    sweep.add("confirm", SOUND, {7: 1.107, 8: 1.108})
    sweep.add("confirm", SOUND, {9: 1.099}, fitted(9))

    assert best_confirmed(sweep.view()) is None


def test_a_searchs_final_without_a_score_leaves_the_confirmed_points_value(tmp_path):
    sweep = Seeded(tmp_path, search=(1, 2), confirm=(7, 8))
    ranked = {"state": "infeasible", "reason": "over", "result": {"holdout_bpb": 1.0}}
    sweep.add("search", SOUND, {1: 1.105, 2: 0.0}, {2: ranked})
    sweep.add("confirm", SOUND, {7: 1.107, 8: 1.108})

    assert confirmed_document(sweep.view())["search_bpb"] == 1.105


def test_the_verdict_of_the_ledger_is_shown(sweep):
    gate = {"verdict": "passed", "reason": "gain"}
    with Ledger(sweep.path) as ledger:
        ledger.append("verdict", gate=gate)
    view = sweep.view()

    assert report.best_document(view, {})["verdict"] == gate
    assert report.status_document(view)["verdict"] == gate
