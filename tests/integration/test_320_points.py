"""A grid of four warmdowns grows from one trunk: few steps, and every point as the straight way.

The whole grid of 320 points is benchmarks/grid320.py; this one has four finals for each warmdown.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from service.catalogue_view import data_of
from service.identity import inputs_of
from service.paths import Paths
from service.plan import Plan, Training, make_plan
from service.sweep import load_sweep
from tests.integration.conftest import Cli, events, make_cli
from trainer.artifacts import make_artifact
from trainer.data.shards import Dataset
from trainer.run import check_parity, finalize, train
from trainer.runtime.distributed import Ranks
from trainer.runtime.tensors import load_tensors, saved_names
from trainer.specs.task import artifact_task

# One start of Ray; on a machine that is busy with other work it takes minutes.
pytestmark = pytest.mark.timeout(1200)
NUM_STEPS, NUM_FINALS = 100, 16
WARMDOWNS = (5, 10, 15, 20)  # 5, 10, 15 and 20 % of the run
TRUNK_STEPS = NUM_STEPS - min(WARMDOWNS)
SWEEP = f"""\
version: 1
name: grid
recipe: tiny
overrides:
  model: {{num_layers: 2, dim: 32, attention: {{num_heads: 2, num_kv_heads: 1, rope: {{dims: 8}}}}}}
  train: {{iterations: {NUM_STEPS}, batch_tokens: 1024, seq_len: 128}}
  final.quantize.float_numel: 256
  evaluate: {{window: 128, stride: 128, batch_windows: 32}}
  observe: {{log_every: 5, validate_every: 50, checkpoint_every: 30}}
space:
  train.schedule.warmdown_iters: {{values: {list(WARMDOWNS)}}}
  train.averages.ema_decay:      {{values: [0.8, 0.9]}}
  final.quantize.clip:           {{values: [none, p5]}}
constraints: [artifact_bytes <= 1_000_000, audit == pass]
"""


@dataclass(frozen=True)
class Grid:
    """The grid, run once by the real command line, and what was planned."""

    cli: Cli
    plan: Plan
    dataset: Dataset

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in events(self.cli.home, "grid") if event["event"] == kind]

    def results(self, kind: str, key: str) -> dict[str, dict[str, Any]]:
        return {event[key]: event["result"] for event in self.events(kind)}


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    cli = make_cli(tmp_path_factory.mktemp("grid"), SWEEP)
    done = cli.run("--num-cpus", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    sweep = load_sweep(cli.sweep)
    dataset = data_of(Paths(cli.home), sweep.data)
    return Grid(cli, make_plan(sweep, inputs_of(dataset), "grid"), dataset)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many as a worker of the sweep has: they set the order of sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_four_warmdowns_take_one_trunk_and_four_tails(grid: Grid):
    (trunk,) = grid.events("trunk_finished")
    branches = [event["branch"] for event in grid.events("training_started")]

    assert sorted(branches) == sorted(trunk["states"])
    assert len(branches) == len(WARMDOWNS)
    assert len(grid.events("final_scored")) == NUM_FINALS


def test_the_steps_that_were_run_are_exactly_those_of_trunk_and_tails(grid: Grid):
    (trunk,) = grid.events("trunk_finished")
    tails = Counter(event["result"]["steps_computed"] for event in grid.events("training_finished"))
    status = grid.cli.json("status", "grid")

    assert trunk["steps_computed"] == TRUNK_STEPS
    assert tails == Counter(WARMDOWNS)
    assert status["trained_steps"] == TRUNK_STEPS + sum(WARMDOWNS)
    assert status["trained_steps"] <= 0.37 * len(WARMDOWNS) * NUM_STEPS


def test_every_training_went_through_all_of_its_steps(grid: Grid):
    for result in grid.results("training_finished", "training").values():
        assert result["steps"] == NUM_STEPS


@pytest.mark.parametrize("index", [0, 3])
def test_a_point_of_the_grid_is_what_the_straight_way_gives(
    grid: Grid, index: int, tmp_path: Path, one_thread: None
):
    training = grid.plan.trainings[index]

    train(training.task, grid.dataset, tmp_path, Ranks())

    assert_same_bank(tmp_path / "bank", grid.cli.home / "store/trainings" / training.id / "bank")
    for final, result in straight_finals(grid, training, tmp_path).items():
        ours = grid.results("final_scored", "final")[final]
        assert ours["weights_sha256"] == result.weights_sha256
        assert ours["artifact_bytes"] == result.artifact_bytes
        assert ours["score"]["val_bpb"] == result.score.val_bpb


def straight_finals(grid: Grid, training: Training, folder: Path) -> dict[str, Any]:
    """All finals of a straight training's own bank, by id."""
    parity = check_parity(folder, grid.dataset, folder / "parity", Ranks()).rule
    results = {}
    for final in grid.plan.finals:
        if final.training == training.id:
            made, done = folder / f"made-{final.id}", folder / f"final-{final.id}"
            make_artifact(artifact_task(final.task), folder, grid.dataset, made, None, Ranks())
            results[final.id] = finalize(
                final.task, folder, made, grid.dataset, done, parity, Ranks()
            )
    assert len(results) == NUM_FINALS // len(WARMDOWNS)
    return results


def assert_same_bank(ours: Path, theirs: Path) -> None:
    assert saved_names(ours) == saved_names(theirs)
    for entry in saved_names(ours):
        mine, other = load_tensors(ours, entry), load_tensors(theirs, entry)
        for name, tensor in mine.items():
            assert torch.equal(tensor, other[name]), f"{entry}/{name}"
