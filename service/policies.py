"""Decisions as pure functions: what a result means under a sweep's constraints."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from service.clocks import ClockName, ClockPolicy, charge, overrun
from service.ledger import SweepView
from service.limits import over_by
from service.specs import Resources
from service.states import State
from service.sweep import Constraint

CLOCKS: Final[dict[str, ClockName]] = {"train_clock_s": "train", "eval_clock_s": "eval"}
"""Constraints on a clock, and which one."""


def settle(
    final: Mapping[str, Any],
    training: Mapping[str, Any],
    constraints: Sequence[Constraint],
    clocks: ClockPolicy,
) -> tuple[State, str | None]:
    """Return a final's state and the reason for it, the first broken constraint's.

    A value over its limit is infeasible; a clock over its limit, charged as `clocks` says, or a
    failed audit is illegal. A failed audit is so whether or not the sweep names it: `best` would
    never take it. Without a constraint on a clock, none is held against it.
    """
    failed = [rule for rule in final["audit"] if rule["verdict"] == "fail"]
    if failed:
        return State.ILLEGAL, f"audit {failed[0]['id']}: {failed[0]['detail']}"
    charged = charge(clocks, training, final)
    values = {"artifact_bytes": final["artifact_bytes"], "val_bpb": final["score"]["val_bpb"]}
    for constraint in constraints:
        subject, limit = constraint.subject, constraint.limit
        if limit is None:
            continue  # the audit, judged above
        if subject in CLOCKS:
            over = overrun(charged, {CLOCKS[subject]: limit})
            if over is not None:
                return State.ILLEGAL, over
        elif values[subject] > limit:
            return State.INFEASIBLE, over_by(subject, values[subject], limit)
    return State.SUCCEEDED, None


def verdict(view: SweepView, refusal: str | None = None) -> State:
    """Return the state a sweep ends in: failed if anything failed, stopped if something was refused
    to start (`refusal`), infeasible if nothing fits."""
    stages = [*view.trainings.values(), *view.finals.values()]
    if any(stage["state"] == State.FAILED for stage in stages):
        return State.FAILED
    if refusal is not None:
        return State.STOPPED
    if any(final["state"] == State.SUCCEEDED for final in view.finals.values()):
        return State.SUCCEEDED
    legal = [final for final in view.finals.values() if final["state"] != State.ILLEGAL]
    return State.INFEASIBLE if legal else State.ILLEGAL


def what_is_missing(resources: Resources, nodes: list[dict[str, Any]]) -> str | None:
    """Say why a gang can never start on these nodes (`ray.nodes()`), None if it can."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    each = resources.worker()
    per_node = [
        {kind: int(node.get(kind, 0) // num) for kind, num in each.items()} for node in alive
    ]
    where = " on one node" if resources.placement == "STRICT_PACK" else ""
    for kind, num in each.items():
        have = _together([places[kind] for places in per_node], resources)
        if have < resources.workers:
            return f"need {resources.workers} × {num:g} {kind}{where}, have {have}"
    # Enough of each kind, but a worker needs all of its own on the same node.
    have = _together([min(places.values()) for places in per_node], resources)
    if have >= resources.workers:
        return None
    spread = resources.placement == "STRICT_SPREAD"
    unfit = [places for places in per_node if not (spread and min(places.values()))]
    best = max(unfit, key=lambda places: (min(places.values()), max(places.values())))
    short = min(best, key=lambda kind: best[kind])
    amounts = " + ".join(f"{num:g} {kind}" for kind, num in each.items())
    return f"need {resources.workers} × ({amounts}){where}, have {have}: a node is short of {short}"


def _together(places: Sequence[int], resources: Resources) -> int:
    """How many workers of one gang nodes with so many places hold, as they may be placed."""
    return {
        "STRICT_PACK": max(places, default=0),
        "STRICT_SPREAD": sum(1 for place in places if place),
    }.get(resources.placement, sum(places))


def gangs_at_once(resources: Resources, nodes: list[dict[str, Any]]) -> int:
    """Count the gangs that such nodes hold at the same time, each node's places apart."""
    each = resources.worker()
    places = [
        min(int(node["Resources"].get(kind, 0) // num) for kind, num in each.items())
        for node in nodes
        if node["Alive"]
    ]
    if resources.placement == "STRICT_PACK":
        return sum(place // resources.workers for place in places)
    if resources.placement == "STRICT_SPREAD":
        return 1 if len([place for place in places if place]) >= resources.workers else 0
    return sum(places) // resources.workers
