"""What a plan costs and what sizes it predicts, before anything runs. Pure."""

from collections.abc import Iterable, Sequence
from typing import Any

from service.tree import Trunk, expected_departure, expected_steps
from trainer.sizes import flops_per_token, forecast_interval, num_params
from trainer.specs.final import FinalSpec
from trainer.specs.model import ModelSpec
from trainer.specs.task import TrainTask

Branched = tuple[TrainTask, str | None]
"""A training's task, and the state that it starts from."""


def forecast_cost(
    trainings: Sequence[Branched],
    trunks: Sequence[Trunk],
    *,
    times: int,
    workers: int,
    seconds_per_step: float | None,
) -> dict[str, Any]:
    """Steps, tokens and FLOPs of the trainings, each run `times` times, with trunks shared.

    `steps_straight` is what they take without trunks, `saving` the share of it that they save.
    Worker-seconds are known where `seconds_per_step` is.
    """
    at = departure_steps(trunks, seconds_per_step)
    runs = [(trunk.task, run_steps(trunk, at)) for trunk in trunks]
    straight = 0
    for task, branch in trainings:
        steps = expected_steps(task.train, seconds_per_step)
        runs.append((task, steps - at[branch] if branch is not None else steps))
        straight += steps
    computed = sum(steps for _, steps in runs)
    cost: dict[str, Any] = {
        "steps": computed * times,
        "steps_straight": straight * times,
        "saving": round(1.0 - computed / straight, 6) if straight else 0.0,
        "tokens": sum(steps * task.train.batch_tokens for task, steps in runs) * times,
        "train_flops": sum(_flops(task, steps) for task, steps in runs) * times,
    }
    if seconds_per_step is not None:
        for name in ("steps", "steps_straight"):
            seconds = cost[name] * seconds_per_step * workers
            cost[name.replace("steps", "worker_seconds")] = round(seconds, 3)
    return cost


def departure_steps(trunks: Iterable[Trunk], seconds_per_step: float | None) -> dict[str, int]:
    """The step of every state of these trunks, by its id; by wall clock as it is expected."""
    return {
        state.id: expected_departure(
            trunk.task, state.departure, expected_steps(trunk.task.train, seconds_per_step)
        )
        for trunk in trunks
        for state in trunk.states
    }


def run_steps(trunk: Trunk, at: dict[str, int]) -> int:
    """The steps that a trunk computes itself."""
    return max(at[state.id] for state in trunk.states) - (at[trunk.parent] if trunk.parent else 0)


def _flops(task: TrainTask, steps: int) -> float:
    per_token = 3 * flops_per_token(task.model, task.train.seq_len)
    return per_token * steps * task.train.batch_tokens


def forecast_sizes(finals: set[tuple[ModelSpec, FinalSpec]]) -> dict[str, Any]:
    """Parameters of the models, and the span of forecast weights bytes, alone and with their
    intervals."""
    weights = [forecast_interval(model, final) for model, final in finals]
    return {
        "num_params": sorted({num_params(model) for model in {model for model, _ in finals}}),
        "weights_bytes": [min(f.point for f in weights), max(f.point for f in weights)],
        "weights_bytes_interval": [min(f.low for f in weights), max(f.high for f in weights)],
    }
