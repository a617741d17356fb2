"""Decisions as pure functions: what a result means under a sweep's constraints."""

from collections.abc import Sequence
from typing import Any

from service.ledger import SweepView
from service.states import State
from service.sweep import Constraint, Resources


def settle(
    final: dict[str, Any], training: dict[str, Any], constraints: Sequence[Constraint]
) -> tuple[State, str | None]:
    """Return a final's state and the reason for it, the first broken constraint's.

    A value over its limit is infeasible; a clock over its limit or a failed audit is illegal.
    A failed audit is so whether or not the sweep names it: `best` would never take it.
    """
    failed = [rule for rule in final["audit"] if rule["verdict"] == "fail"]
    if failed:
        return State.ILLEGAL, f"audit {failed[0]['id']}: {failed[0]['detail']}"
    values = {
        "artifact_bytes": final["artifact_bytes"],
        "val_bpb": final["score"]["val_bpb"],
        "eval_clock_s": final["score"]["eval_clock_s"],
        "train_clock_s": training["train_clock_s"],
    }
    for constraint in constraints:
        if constraint.limit is None:
            continue  # the audit, judged above
        value = values[constraint.subject]
        if value > constraint.limit:
            over = value - constraint.limit
            reason = (
                f"{constraint.subject} {value:,.10g} > {constraint.limit:,.10g}, "
                f"over by {over:,.10g}"
            )
            is_clock = constraint.subject.endswith("clock_s")
            return (State.ILLEGAL if is_clock else State.INFEASIBLE), reason
    return State.SUCCEEDED, None


def verdict(view: SweepView) -> State:
    """Return the state a sweep ends in: failed if anything failed, infeasible if nothing fits."""
    stages = [*view.trainings.values(), *view.finals.values()]
    if any(stage["state"] == State.FAILED for stage in stages):
        return State.FAILED
    if any(final["state"] == State.SUCCEEDED for final in view.finals.values()):
        return State.SUCCEEDED
    legal = [final for final in view.finals.values() if final["state"] != State.ILLEGAL]
    return State.INFEASIBLE if legal else State.ILLEGAL


def what_is_missing(resources: Resources, nodes: list[dict[str, Any]]) -> str | None:
    """Say why a gang can never start on these nodes (`ray.nodes()`), None if it can."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    for kind, each in resources.worker().items():
        per_node = [int(node.get(kind, 0) // each) for node in alive]
        have = {
            "STRICT_PACK": max(per_node, default=0),
            "STRICT_SPREAD": sum(1 for places in per_node if places),
        }.get(resources.placement, sum(per_node))
        if have < resources.workers:
            where = " on one node" if resources.placement == "STRICT_PACK" else ""
            return f"need {resources.workers} × {each:g} {kind}{where}, have {have}"
    return None


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
