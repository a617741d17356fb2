"""How far results are over the limits of a sweep, where `policies.settle` does not judge. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from service.clocks import ClockPolicy, charge
from service.states import State
from service.sweep import Constraint


def over_by(subject: str, value: float, limit: float) -> str:
    """Say how far a value is over its limit."""
    return f"{subject} {value:,.10g} > {limit:,.10g}, over by {value - limit:,.10g}"


def settle_ranked(
    ranked: Mapping[str, Any], constraints: Sequence[Constraint]
) -> tuple[State, str | None]:
    """Return the state of a final that is scored on held-out shards only, and the reason for it:
    of the limits, the byte cap can be judged by then."""
    num_bytes = ranked["artifact_bytes"]
    for constraint in constraints:
        cap = constraint.limit
        if constraint.subject == "artifact_bytes" and cap is not None and num_bytes > cap:
            return State.INFEASIBLE, over_by("artifact_bytes", num_bytes, cap)
    return State.SUCCEEDED, None


def over_limits(
    final: Mapping[str, Any],
    training: Mapping[str, Any],
    constraints: Sequence[Constraint],
    clocks: ClockPolicy,
) -> dict[str, float]:
    """How far a result is over each limit that it can be held to, as a share of the limit; below 0
    is within. An audit that failed is 1 over. For a searcher, which keeps away from what is over.
    """
    charged = charge(clocks, training, final)
    score: Mapping[str, Any] = final.get("score") or {}
    values: dict[str, float | None] = {
        "artifact_bytes": final.get("artifact_bytes"),
        "val_bpb": score.get("val_bpb"),
        "eval_clock_s": charged.eval_s,
        "train_clock_s": charged.train_s,
    }
    over: dict[str, float] = {}
    for constraint in constraints:
        value = values.get(constraint.subject)
        if constraint.limit and value is not None:
            over[constraint.subject] = value / constraint.limit - 1.0
    if any(rule["verdict"] == "fail" for rule in final.get("audit", ())):
        over["audit"] = 1.0
    return over
