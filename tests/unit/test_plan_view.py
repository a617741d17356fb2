"""`fairway plan`: the tree of stages as it is shown."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from service.cli import app
from trainer.codec import read_yaml

SPACE = {
    "train.schedule.warmdown_iters": {"values": [12, 24]},
    "train.averages.ema_decay": {"values": [0.9, 0.95]},
    "final.prune.ratio": {"min": 0.0, "max": 0.1, "num": 3},
}
TREE = """\
sweep trial-ID
  trunk ID: steps 0 to 108, 2 states
    state at step 96
      tail warmdown_iters=24: 24 steps to 120, 6 finals
    state at step 108
      tail warmdown_iters=12: 12 steps to 120, 6 finals
  finals of each training over
    train.averages.ema_decay: 0.9, 0.95
    final.prune.ratio: 0 to 0.1
steps: 144 instead of 240 straight, 40.0% saved
"""


@pytest.fixture
def show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FAIRWAY_HOME", str(tmp_path / "home"))

    def run(*words: str, verb: str = "plan", **fields: Any) -> str:
        path = tmp_path / "sweep.yaml"
        path.write_text(
            yaml.safe_dump(
                {"name": "trial", "recipe": "tiny", "space": SPACE, **fields}, sort_keys=False
            )
        )
        result = CliRunner().invoke(app, [verb, str(path), *words])
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


def test_the_tree_names_trunks_states_tails_and_the_saving(show):
    document = json.loads(show("-o", "json"))

    shown = show()

    plain = shown.replace(document["sweep_id"], "trial-ID")
    assert plain.replace(document["trunks"][0]["id"][:8], "ID") == TREE


def test_a_pace_gives_seconds(show):
    assert show("--step-seconds", "0.5").endswith(
        "worker-seconds: about 72 instead of 120 straight\n"
    )
    on_gpus = show("--step-seconds", "0.5", "-S", "resources.gpus_per_worker=1")
    assert "GPU-seconds: about 72 instead of 120" in on_gpus


def test_a_nested_trunk_stands_under_the_state_it_starts_from(show):
    space = {
        "train.schedule.warmdown_iters": {"values": [12, 60]},
        "train.qat.start.progress": {"values": [0.92, 0.95]},
    }

    lines = show(space=space, overrides={"train.qat.mlp_bits": 6}).splitlines()

    indents = [len(line) - len(line.lstrip()) for line in lines if "trunk" in line]
    assert indents == [2, 6]


def test_the_document_covers_every_training_and_its_steps(show):
    document = read_yaml(show("-o", "yaml"), "plan")

    (trunk,) = document["trunks"]
    states = {state["id"]: state["step"] for state in trunk["states"]}
    tails = document["trainings"]
    assert {tail["branch"] for tail in tails} == states.keys()
    assert all(tail["first_step"] == states[tail["branch"]] for tail in tails)
    computed = trunk["computed_steps"] + sum(t["steps"] - t["first_step"] for t in tails)
    assert computed == document["steps"] == 144
    assert sum(tail["finals"] for tail in tails) == document["num_finals"] == 12


def test_a_search_that_makes_its_points_as_it_goes_says_how_many(show):
    shown = show(search={"train": {"method": "tpe", "num": 2}})

    assert "2 trainings at points that the search makes as it goes" in shown
    assert "steps: about 240" in shown


def test_points_that_are_dropped_are_counted(show):
    shown = show(where=["final.prune.ratio < 0.1 or train.schedule.warmdown_iters < 20"])

    assert "dropped by where: 0 train, 2 final points" in shown


def test_a_long_list_is_cut_and_says_so(show):
    space = {"train.schedule.warmdown_iters": {"min": 1, "max": 100, "num": 60}}

    # 59 states: the two shortest warmdowns leave together.
    assert "... and 35 more; see -o json" in show(space=space)


def test_validate_is_short_and_counts_the_trunks(show):
    shown = read_yaml(show(verb="validate"), "validate")

    assert (shown["trunks"], shown["trainings"], shown["finals"]) == (1, 2, 12)
