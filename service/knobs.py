"""Knobs of a sweep that did nothing: finals one value apart that came out alike. Pure."""

import itertools
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from service.labels import short_value
from service.ledger import SweepView

Event = dict[str, Any]


@dataclass(frozen=True, slots=True)
class DeadKnob:
    """Values of a knob between which finals came out alike, everything else being equal.

    `dead`: no compared pair differs; `partly`: some pairs do. The example is two finals' ids.
    """

    knob: str
    values: tuple[Any, ...]
    compared: int
    identical: int
    example: tuple[str, str]

    @property
    def severity(self) -> Literal["dead", "partly"]:
        return "dead" if self.identical == self.compared else "partly"


def dead_knobs(view: SweepView) -> tuple[DeadKnob, ...]:
    """Find the varying knobs that changed nothing, in the order of the sweep's axes.

    Two finals are compared when they have the same seed and their points differ in one knob.
    Alike means the same weights file; where the knob cannot touch that file (evaluation), or
    is written into its header (the model), it means the same val bpb to the last digit. A knob
    whose values fall into several groups that came out alike has one entry for each group.
    """
    return tuple(found for knob in view.started.get("varying", ()) for found in _dead(view, knob))


def _dead(view: SweepView, knob: str) -> Iterator[DeadKnob]:
    pairs = [(pair, _are_alike(view, knob, pair)) for pair in _pairs(view, knob)]
    for values in _groups([_values(knob, pair) for pair, is_same in pairs if is_same]):
        inside = [(p, is_same) for p, is_same in pairs if _values(knob, p).keys() <= values.keys()]
        same = [pair for pair, is_same in inside if is_same]
        yield DeadKnob(
            knob=knob,
            values=tuple(sorted(values.values(), key=_rank)),
            compared=len(inside),
            identical=len(same),
            example=(same[0][0]["final"], same[0][1]["final"]),
        )


def in_words(found: DeadKnob) -> str:
    """Say in one sentence what a dead knob did not do."""
    *values, last = map(short_value, found.values)
    return (
        f"{found.knob}: {', '.join(values)} and {last} gave the same result in "
        f"{found.identical} of {found.compared} pairs"
    )


def dead_knob_records(view: SweepView) -> list[dict[str, Any]]:
    """Write the dead knobs as plain data."""
    return [
        {
            "knob": found.knob,
            "values": list(found.values),
            "severity": found.severity,
            "compared": found.compared,
            "identical": found.identical,
            "example": list(found.example),
        }
        for found in dead_knobs(view)
    ]


def _pairs(view: SweepView, knob: str) -> Iterator[tuple[Event, Event]]:
    """Yield the scored finals that differ in this knob and in nothing else."""
    alike: defaultdict[str, list[Event]] = defaultdict(list)
    for event in view.finals.values():
        if event["result"] is not None and knob in event["point"]:
            rest = {path: value for path, value in event["point"].items() if path != knob}
            alike[_key([event["seed"], rest])].append(event)
    for events in alike.values():
        for first, second in itertools.combinations(events, 2):
            if first["point"][knob] != second["point"][knob]:
                yield first, second


def _are_alike(view: SweepView, knob: str, pair: tuple[Event, Event]) -> bool:
    first, second = (event["result"] for event in pair)
    if first["weights_sha256"] == second["weights_sha256"]:
        is_eval = view.started.get("axes", {}).get(knob) == "eval"
        return not is_eval or first["score"]["val_bpb"] == second["score"]["val_bpb"]
    # The header of a weights file holds the whole model, whether or not a part of it acts.
    is_in_header = knob.partition(".")[0] == "model"
    return is_in_header and first["score"]["val_bpb"] == second["score"]["val_bpb"]


def _values(knob: str, pair: tuple[Event, Event]) -> dict[str, Any]:
    return {_key(event["point"][knob]): event["point"][knob] for event in pair}


def _groups(links: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join sets of values that share one."""
    groups: list[dict[str, Any]] = []
    for link in links:
        joined, apart = dict[str, Any](), list[dict[str, Any]]()
        for group in groups:
            if group.keys() & link.keys():
                joined |= group
            else:
                apart.append(group)
        groups = [*apart, joined | link]
    return groups


def _rank(value: Any) -> tuple[bool, Any]:
    """Numbers by size, then everything else by its text."""
    is_number = isinstance(value, int | float)
    return (not is_number, value if is_number else _key(value))


def _key(value: Any) -> str:
    """Make a value, which may be a list, one that a set can hold."""
    return json.dumps(value, sort_keys=True)
