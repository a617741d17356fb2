"""`fairway compare`, `gate` and `baseline`: data on stdout, exit codes, one-line errors."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from service.cli import app
from tests.seeded import Seeded, point
from trainer.errors import InfeasibleError, UsageError


def fairway(home: Path, *words: str) -> Result:
    needs_home = words[:2] not in (("baseline", "list"), ("baseline", "show"))
    return CliRunner().invoke(app, [*words, *(["--home", str(home)] if needs_home else [])])


@pytest.fixture
def home(tmp_path) -> Path:
    sweep = Seeded(tmp_path, "better-aaaaaa", confirm=(7, 8, 9))
    sweep.add("search", point(2500), {1: 1.1})
    sweep.add("confirm", point(2500), {7: 1.1000, 8: 1.1010, 9: 1.1019})
    sweep.finish()
    return tmp_path


def test_compare_shows_gain_interval_and_p_over_the_first(home):
    shown = fairway(home, "compare", "pr1868", "pr1855", "pr1855-reproduced")

    assert shown.exit_code == 0
    head, first, *rest = shown.stdout.splitlines()
    assert head.split()[:6] == ["side", "n", "mean", "bpb", "sd", "bpb"]
    assert first.split() == ["pr1868", "3", "1.061409", "0.000935", "-", "-", "-", "-", "-"]
    assert "+0.655     +0.001433  -0.002548 +0.005414  0.1882  welch" in rest[1]
    assert "pr1855-reproduced: two runs of seed 42" in shown.stdout


def test_compare_as_json_has_every_side_and_contrast(home):
    document = json.loads(fairway(home, "compare", "pr414", "better", "-o", "json").stdout)

    assert [side["name"] for side in document["sides"]] == ["pr414", "better-aaaaaa"]
    [held] = document["contrasts"]
    assert held["gain_mbpb"] == pytest.approx(22.35, abs=0.01)
    assert held["gain_nats"] == pytest.approx(held["gain_bpb"] / held["bpb_per_nat"])


def test_compare_of_different_texts_is_refused(home, tmp_path):
    Seeded(tmp_path, "short-bbbbbb", (1, 2), bytes=99).add("search", point(1), {1: 1.0, 2: 1.1})

    result = fairway(home, "compare", "better", "short")

    assert isinstance(result.exception, UsageError)
    assert "different texts" in str(result.exception)


def test_compare_needs_two_sides(home):
    assert isinstance(fairway(home, "compare", "better").exception, UsageError)


def test_a_gate_that_passes_says_so(home):
    result = fairway(home, "gate", "better", "--against", "pr414")

    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1].startswith("passed: gain +0.037")


def test_a_gate_that_does_not_pass_exits_with_three_after_its_data(home):
    result = fairway(home, "gate", "pr414", "--against", "pr374", "-o", "json")

    assert isinstance(result.exception, InfeasibleError)
    assert result.exception.exit_code == 3
    assert str(result.exception).startswith("pr414 against pr374: gain +0.002167 nats")
    assert json.loads(result.stdout)["verdict"] == "not passed"


def test_a_refused_gate_is_a_usage_error_without_data(home):
    result = fairway(home, "gate", "pr414", "--against", "pr1868")

    assert isinstance(result.exception, UsageError)
    assert result.exception.exit_code == 2
    assert result.stdout == ""


def test_thresholds_belong_to_the_strict_mode(home):
    words = ("gate", "pr414", "--against", "pr374", "--min-gain-nats", "0.001")

    loose = fairway(home, *words, "--alpha", "0.07")
    other = fairway(home, *words, "--mode", "frontier")

    assert loose.exit_code == 0
    assert isinstance(other.exception, UsageError)


def test_what_measure_prints_is_a_baseline_that_compares_equal_to_its_sweep(home):
    file = home / "mine.yaml"
    file.write_text(fairway(home, "baseline", "measure", "better").stdout)

    shown = fairway(home, "baseline", "show", str(file), "-o", "json")
    held = json.loads(fairway(home, "compare", str(file), "better", "-o", "json").stdout)

    assert json.loads(shown.stdout)["noise"]["df"] == 2
    assert held["contrasts"][0]["gain_bpb"] == 0.0


def test_the_shipped_baselines_are_listed_with_their_sources(home):
    rows = json.loads(fairway(home, "baseline", "list", "-o", "json").stdout)

    assert {"pr414", "pr1855", "pr1868"} <= {row["name"] for row in rows}
    assert all(row["source"] for row in rows)
    assert "parameter-golf PR #414" in fairway(home, "baseline", "list").stdout


def test_the_planner_says_how_many_seeds_and_what_they_cost(home):
    words = ("baseline", "plan", "better", "--gain-nats", "0.007", "--usd-per-gpu-hour", "3")

    plan = yaml.safe_load(fairway(home, *words).stdout)

    assert plan["gpu_seconds"] == plan["seeds"] * (600 * 8 + 90)
    assert plan["usd"] == pytest.approx(plan["gpu_seconds"] / 3600 * 3)
    assert (plan["min_gain_nats"], plan["level"]) == (0.005, 0.01)
    frontier = yaml.safe_load(fairway(home, *words, "--mode", "frontier").stdout)
    assert frontier["seeds"] < plan["seeds"]


def test_a_plan_for_strict_has_the_three_seeds_that_its_gate_asks_for(home):
    words = ("baseline", "plan", "pr414", "--gain-nats", "0.1")

    def seeds(mode: str) -> int:
        return yaml.safe_load(fairway(home, *words, "--mode", mode).stdout)["seeds"]

    assert (seeds("strict"), seeds("frontier")) == (3, 2)


def test_a_gain_under_the_asked_one_is_never_planned_for(home):
    result = fairway(home, "baseline", "plan", "pr414", "--gain-nats", "0.004")

    assert isinstance(result.exception, UsageError)
    assert "never shown" in str(result.exception)
