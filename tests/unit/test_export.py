"""Which configuration a reference means, and which seeds its record must have."""

from pathlib import Path

import pytest

from service.export import Given, export, find_configuration
from service.paths import Paths
from tests.seeded import Seeded, point
from trainer.errors import InfeasibleError, UsageError

NONE, P5 = point(2500), point(2500, "p5")


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(tmp_path)


def test_a_sweep_means_the_configuration_that_it_confirmed(paths: Paths) -> None:
    sweep = Seeded(paths.home, confirm=(7, 8, 9))
    sweep.add("search", NONE, {1: 1.10})
    sweep.add("search", P5, {1: 1.09})  # lucky
    sweep.add("confirm", NONE, {7: 1.100, 8: 1.104, 9: 1.101})

    found = find_configuration(paths, "seeded")

    assert found.group.point == NONE
    assert found.seeds == [9, 7, 8]  # the final nearest the mean stands for it


def test_a_sweep_without_confirmation_means_its_best_over_its_seeds(paths: Paths) -> None:
    sweep = Seeded(paths.home, search=(1, 2))
    sweep.add("search", NONE, {1: 1.10, 2: 1.11})
    sweep.add("search", P5, {1: 1.12, 2: 1.13})

    assert find_configuration(paths, sweep.sweep_id).seeds == [1, 2]


def test_one_lucky_seed_does_not_choose_the_configuration(paths: Paths) -> None:
    sweep = Seeded(paths.home, search=(1, 2))
    sweep.add("search", NONE, {1: 1.10, 2: 1.11})
    sweep.add("search", P5, {1: 1.09, 2: 1.13})

    assert find_configuration(paths, "seeded").group.point == NONE


def test_a_confirmation_that_did_not_come_through_is_no_result(paths: Paths) -> None:
    sweep = Seeded(paths.home, confirm=(7, 8))
    sweep.add("search", NONE, {1: 1.10})
    sweep.add("confirm", NONE, {7: 1.100})

    with pytest.raises(UsageError, match="no point is confirmed; no result for seed 8"):
        find_configuration(paths, "seeded")


def test_a_final_means_the_configuration_of_its_own_phase(paths: Paths) -> None:
    sweep = Seeded(paths.home, search=(1,), confirm=(7, 8))
    sweep.add("search", P5, {1: 1.09})
    [seven, _] = sweep.add("confirm", P5, {7: 1.100, 8: 1.104})

    found = find_configuration(paths, seven[:10])

    assert (found.chosen["final"], found.seeds) == (seven, [7, 8])


@pytest.mark.parametrize(
    ("ref", "said"),
    [
        ("", "'': no sweep of"),
        ("nothing", "'nothing': no sweep of"),
        ("../../etc", "'../../etc': no sweep of"),
    ],
)
def test_a_reference_to_nothing_is_refused(paths: Paths, ref: str, said: str) -> None:
    Seeded(paths.home).add("search", NONE, {1: 1.1})

    with pytest.raises(UsageError, match=said):
        find_configuration(paths, ref)


def test_a_start_of_several_finals_is_refused(paths: Paths) -> None:
    sweep = Seeded(paths.home, search=tuple(range(40)))
    finals = sweep.add("search", NONE, dict.fromkeys(range(40), 1.1))
    start = next(c for c in "0123456789abcdef" if sum(f.startswith(c) for f in finals) > 1)

    with pytest.raises(UsageError, match=r"fits \d+ finals; give more of its id"):
        find_configuration(paths, start)


def test_nothing_feasible_is_nothing_to_export(paths: Paths) -> None:
    sweep = Seeded(paths.home)
    over = {"state": "infeasible", "reason": "artifact_bytes <= 16_000_000"}
    [final] = sweep.add("search", NONE, {1: 1.1}, {1: over})

    for ref in ("seeded", final):
        with pytest.raises(InfeasibleError):
            find_configuration(paths, ref)


@pytest.mark.parametrize(
    ("scores", "facts", "said"),
    [
        ({7: 1.1, 8: 1.2}, {}, "no result for its seed 9"),
        ({7: 1.1, 8: 1.2, 9: 1.3}, {9: {"state": "illegal", "reason": "parity"}}, "seed 9 is ill"),
    ],
)
def test_a_seed_that_does_not_count_stops_the_export(
    paths: Paths, tmp_path: Path, scores, facts, said: str
) -> None:
    sweep = Seeded(paths.home, confirm=(7, 8, 9))
    [seven, *_] = sweep.add("confirm", NONE, scores, facts)

    with pytest.raises(InfeasibleError, match=said):
        export(paths, seven, tmp_path / "record", Given())

    assert not (tmp_path / "record").exists()
