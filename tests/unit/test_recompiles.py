"""A graph that is built on the training clock fails the training and says why."""

from functools import partial

import pytest
import torch

from tests import tiny
from trainer.errors import TrainingError
from trainer.runtime.clock import Clock
from trainer.runtime.distributed import Ranks
from trainer.specs.task import train_task
from trainer.train.runner import StepRunner
from trainer.train.state import TrainState

ALONE = Ranks()


@pytest.fixture
def begin(tiny_dataset, monkeypatch):
    """Start the steps of a training whose graphs are traced as ever and run as they are."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))

    def start(**train):
        torch._dynamo.reset()
        values = {f"train.{name}": value for name, value in train.items()}
        task = train_task(tiny.recipe({"train.compile": True, **values}))
        state = TrainState(task, ALONE, Clock())
        return StepRunner(task, tiny_dataset, state, ALONE)

    yield start
    torch._dynamo.reset()


def shorten_rows_of(step, monkeypatch):
    """Make a step's batch one token shorter, which no graph of the others can take."""
    micros = StepRunner._micros

    def shortened(self, asked):
        whole = micros(self, asked)
        return tuple(rows[:, :-1] for rows in whole) if asked == step else whole

    monkeypatch.setattr(StepRunner, "_micros", shortened)


def test_steps_of_one_shape_build_nothing_after_the_warm_up(begin):
    runner = begin(warmup_steps=1)

    runner.warm_up()
    losses = [float(runner.step(step, 1.0)) for step in range(3)]

    assert losses[2] < losses[0]


def test_a_graph_built_after_the_warm_up_fails_with_its_step_and_its_reason(begin, monkeypatch):
    shorten_rows_of(2, monkeypatch)
    runner = begin(warmup_steps=1)
    runner.warm_up()
    runner.step(0, 1.0)

    with pytest.raises(TrainingError, match=r"1 graph .* at step 2 .*tokens.*warmup_steps, now 1"):
        runner.step(2, 1.0)


def test_without_a_warm_up_only_the_first_step_may_build(begin, monkeypatch):
    shorten_rows_of(1, monkeypatch)
    runner = begin(warmup_steps=0)
    runner.step(0, 1.0)

    with pytest.raises(TrainingError, match="at step 1"):
        runner.step(1, 1.0)


def test_a_score_between_the_steps_may_build_its_own_graph(begin, monkeypatch):
    shorten_rows_of(7, monkeypatch)
    runner = begin(warmup_steps=1)
    runner.warm_up()
    runner.step(0, 1.0)

    runner.probe(7)

    runner.step(1, 1.0)


def test_fake_quantization_that_comes_on_late_builds_nothing(begin):
    runner = begin(warmup_steps=1, qat={"mlp_bits": 4, "start": {"progress": 0.5}})
    runner.warm_up()
    runner.step(0, 1.0)

    runner.state.fake_quants.turn_on(1)

    runner.step(1, 1.0)
