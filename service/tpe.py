"""The next point to try, from what is known of those that were tried. Pure: Optuna's TPE, asked
anew each time.

No state of a search is kept anywhere but in the ledger. The sampler is seeded by the search's
seed and the number of known points, so one trial at a time gives the same points after a crash
as without one.
"""

import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from trainer.codec import fingerprint
from tune_spaces.axes import Axis, Value
from tune_spaces.space import Point

Ask = Callable[[str, Axis, bool], Value]
"""Choose a value of the axis at a path, a whole number where the flag says so."""

_STATES = {
    "running": TrialState.RUNNING,
    "done": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "failed": TrialState.COMPLETE,
}

logging.getLogger("optuna").setLevel(logging.ERROR)


@dataclass(frozen=True, slots=True)
class Told:
    """What became of a point. Lower values are better; without one it is the worst there is.

    violations: how far over each limit of the sweep, relative to the limit; above 0 is infeasible.
    step: where a stopped training was.
    """

    point: Point
    state: Literal["running", "done", "stopped", "failed"]
    value: float | None = None
    step: int = 0
    violations: Mapping[str, float] = field(default_factory=dict[str, float])
    reason: str | None = None


def propose(
    history: Sequence[Told],
    axes: Mapping[str, Axis],
    suggest: Callable[[Ask], Point],
    seed: tuple[int, int],
    startup: int,
) -> Point:
    """Return a point by multivariate TPE with constraints (arXiv 2304.11127), a random one while
    fewer than `startup` are known.

    seed: the search's own, and a number that makes one attempt differ from another. `suggest`
    builds a point by asking for each of its values in turn, so that an axis that
    another one switches off is not asked for.
    """
    distinct = int(fingerprint([*seed, len(history)])[:8], 16)
    with warnings.catch_warnings():
        # Groups, for axes that switch others off, and constraints are marked so in Optuna 5.
        warnings.simplefilter("ignore", ExperimentalWarning)
        sampler = TPESampler(
            seed=distinct,
            n_startup_trials=startup,
            multivariate=True,
            group=True,
            constant_liar=True,
        )
        study = optuna.create_study(sampler=sampler, direction="minimize")
        whole = {path for told in history for path, v in told.point.items() if _is_whole(v)}
        study.add_trials([_frozen(told, axes, whole) for told in history])
        trial = study.ask()
        return suggest(lambda path, axis, whole: _value(trial, path, axis, is_integer=whole))


def _value(trial: optuna.Trial, path: str, axis: Axis, *, is_integer: bool) -> Value:
    if axis.values is not None:
        return trial.suggest_categorical(path, axis.values)  # type: ignore[return-value]  # of ours
    low, high = _ends(axis, is_integer=is_integer)
    log = axis.scale == "log"
    if is_integer:
        return trial.suggest_int(path, int(low), int(high), log=log)
    value = trial.suggest_float(path, low, high, log=log)
    return min(max(float(f"{value:.6g}"), low), high)  # as a drawn point's (tune_spaces.axes)


def _ends(axis: Axis, *, is_integer: bool) -> tuple[float, float]:
    assert axis.min is not None
    assert axis.max is not None
    return (math.ceil(axis.min), math.floor(axis.max)) if is_integer else (axis.min, axis.max)


def _is_whole(value: Value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _distribution(axis: Axis, *, is_integer: bool) -> BaseDistribution:
    """The axis as `_value` asks for it."""
    if axis.values is not None:
        return CategoricalDistribution(axis.values)
    low, high = _ends(axis, is_integer=is_integer)
    log = axis.scale == "log"
    if is_integer:
        return IntDistribution(int(low), int(high), log=log)
    return FloatDistribution(low, high, log=log)


def _frozen(told: Told, axes: Mapping[str, Axis], whole: set[str]) -> FrozenTrial:
    state = _STATES[told.state]
    facts: dict[str, Any] = {"user_attrs": {"reason": told.reason}}
    if state == TrialState.COMPLETE:
        # A failure is a point that breaks a limit as well: TPE then keeps away from it.
        failed = {"failed": 1.0} if told.state == "failed" or told.value is None else {}
        facts["value"] = math.inf if told.value is None else told.value
        facts["constraints"] = {**told.violations, **failed} or None
    elif state == TrialState.PRUNED and told.value is not None:
        facts["intermediate_values"] = {told.step: told.value}
    return create_trial(
        state=state,
        params=dict(told.point),
        distributions={
            path: _distribution(axes[path], is_integer=path in whole) for path in told.point
        },
        **facts,
    )
