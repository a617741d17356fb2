"""A sweep's finals as studies of Optuna, in memory: for its plots and its importances. Decides
nothing; what chooses points is `tpe`.

Names and texts of a study are escaped for HTML, because Optuna's figures show them as they are.
"""

import html
import logging
import math
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import ExperimentalWarning
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState, create_trial

from service.confirmed import counts, is_scored
from service.groups import MB
from service.labels import knob_names, short_value
from service.ledger import SweepView
from service.report import is_of_search
from service.states import State
from trainer.codec import parse
from tune_spaces.axes import Axis

Event = dict[str, Any]

TOP_FRAC, TOP_FINALS, MIN_FINALS = 0.1, 5, 10
"""Importances are about reaching the best tenth, or the best five where a tenth is fewer: Optuna
asks for five at least. With fewer than ten finals those would be no choice among many."""

_FAILED = TrialState.FAIL
_STATES = {State.STOPPED: TrialState.PRUNED, State.CANCELLED: TrialState.PRUNED}
_ONE_AT_A_TIME = threading.RLock()

logging.getLogger("optuna").setLevel(logging.ERROR)


@contextmanager
def quiet() -> Iterator[None]:
    """Hold Optuna alone and keep its warnings to itself.

    What a thread catches of warnings it catches for the whole process, so that one at a time may.
    """
    with _ONE_AT_A_TIME, warnings.catch_warnings():
        # Constraints, names of metrics and other parts are marked so in Optuna 5.
        warnings.simplefilter("ignore", ExperimentalWarning)
        # A conditional knob that hardly any final has.
        warnings.filterwarnings("ignore", "Some regimes for parameter")
        # All finals alike: then no knob matters more than another, which is what it answers.
        warnings.filterwarnings("ignore", "Target and region quantiles")
        yield


def settled(view: SweepView) -> list[Event]:
    """The finals' events in the order in which they were settled."""
    return sorted(view.finals.values(), key=lambda event: event["seq"])


def study_of(view: SweepView, events: Sequence[Event], name: str = "finals") -> Study:
    """A study that minimizes val bpb; its trial k is the event k. `name` is plain text."""
    study = optuna.create_study(study_name=html.escape(name), direction="minimize")
    study.add_trials(_trials(view, events, lambda result: [result["score"]["val_bpb"]]))
    return study


def plane_study(view: SweepView, events: Sequence[Event]) -> Study:
    """A study that minimizes the artifact's MB (10⁶ bytes) and val bpb at once."""
    study = optuna.create_study(directions=["minimize", "minimize"])
    study.add_trials(_trials(view, events, _size_and_bpb))
    return study


def _size_and_bpb(result: dict[str, Any]) -> list[float]:
    return [result["artifact_bytes"] / MB, result["score"]["val_bpb"]]


def importances(view: SweepView) -> dict[str, float] | None:
    """How much each varying knob decides whether a final is among the best, by its path, the
    largest first; they add up to 1. None where too few finals of the search count: over a cap
    bpb is cheap, and a knob that leads there would seem to matter.

    PED-ANOVA, arXiv 2304.10255, with its extension to conditional knobs, arXiv 2601.20800.
    """
    events = [e for e in settled(view) if counts(view, e) and is_of_search(view, e)]
    names = {path: name for path, name in shown_names(view).items() if _is_in(path, events)}
    if len(events) < MIN_FINALS or not names:
        return None
    top_frac = max(TOP_FRAC, TOP_FINALS / len(events))
    with quiet():
        evaluator = PedAnovaImportanceEvaluator(target_quantile=top_frac)
        study = study_of(view, events)
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {path: found[names[path]] for path in sorted(names, key=lambda p: -found[names[p]])}


def _is_in(path: str, events: Iterable[Event]) -> bool:
    return any(path in event["point"] for event in events)


def shown_names(view: SweepView) -> dict[str, str]:
    """The varying knobs' names as the studies have them, by path."""
    names = knob_names(view.started.get("varying", ()))
    return {path: html.escape(name) for path, name in names.items()}


def _trials(
    view: SweepView, events: Sequence[Event], values: Callable[[dict[str, Any]], list[float]]
) -> list[FrozenTrial]:
    names, distributions = shown_names(view), _distributions(view, events)
    trials: list[FrozenTrial] = []
    for event in events:
        point = {path: value for path, value in event["point"].items() if path in names}
        is_complete = is_scored(event)
        trials.append(
            create_trial(
                state=TrialState.COMPLETE if is_complete else _STATES.get(event["state"], _FAILED),
                values=values(event["result"]) if is_complete else None,
                params={names[path]: _shown(value) for path, value in point.items()},
                distributions={names[path]: distributions[path] for path in point},
                constraints=_constraints(view, event) if is_complete else None,
            )
        )
    return trials


def _constraints(view: SweepView, event: Event) -> dict[str, float]:
    """Above 0 is infeasible: bytes over the cap, and whatever else keeps a final from counting."""
    cap, num_bytes = view.started.get("cap_bytes"), event["result"]["artifact_bytes"]
    size = {} if cap is None else {"artifact_bytes": float(num_bytes - cap)}
    return {**size, "feasible and legal": 0.0 if counts(view, event) else 1.0}


def _distributions(view: SweepView, events: Sequence[Event]) -> dict[str, BaseDistribution]:
    """Each knob's axis, widened to what was tried where the ledger tells of no axis."""
    space = (view.started.get("spec") or {}).get("space") or {}
    tried: dict[str, list[Any]] = {}
    for event in events:
        for path, value in event["point"].items():
            tried.setdefault(path, []).append(_shown(value))
    return {
        path: _distribution(parse(Axis, space[path], path) if path in space else None, values)
        for path, values in tried.items()
    }


def _distribution(axis: Axis | None, tried: Sequence[Any]) -> BaseDistribution:
    if axis is None or axis.min is None or axis.max is None:
        listed = () if axis is None else axis.extremes()
        choices = list(dict.fromkeys([*map(_shown, listed), *tried]))
        is_ordered = not any(isinstance(choice, str) for choice in choices)
        return CategoricalDistribution(sorted(choices) if is_ordered else choices)
    is_log = axis.scale == "log"
    if all(isinstance(value, int) for value in tried):
        low, high = min(math.ceil(axis.min), *tried), max(math.floor(axis.max), *tried)
        return IntDistribution(low, high, log=is_log)
    return FloatDistribution(min(axis.min, *tried), max(axis.max, *tried), log=is_log)


def _shown(value: Any) -> Any:
    """A number as it is, anything else as the tables write it, escaped."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number else html.escape(short_value(value))
