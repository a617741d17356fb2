"""Decisions over results: tables of facts and verdicts."""

from typing import Any

import pytest

from service.ledger import SweepView
from service.policies import gangs_at_once, settle, verdict, what_is_missing
from service.states import State
from service.sweep import Constraint, Resources

TRAINING = {"train_clock_s": 590.0}


def result(**changes: Any) -> dict[str, Any]:
    rules = [{"id": "coverage", "verdict": "pass", "detail": ""}]
    score = {"val_bpb": 1.2, "eval_clock_s": 100.0}
    return {"artifact_bytes": 500, "score": score, "audit": rules, **changes}


@pytest.mark.parametrize(
    ("constraint", "state", "reason"),
    [
        (Constraint("artifact_bytes", 500), State.SUCCEEDED, None),
        (Constraint("artifact_bytes", 499), State.INFEASIBLE, "500 > 499, over by 1"),
        (Constraint("val_bpb", 1.1), State.INFEASIBLE, "val_bpb 1.2 > 1.1"),
        (Constraint("eval_clock_s", 99), State.ILLEGAL, "eval_clock_s 100 > 99"),
        (Constraint("train_clock_s", 580), State.ILLEGAL, "train_clock_s 590 > 580"),
        (Constraint("audit", None), State.SUCCEEDED, None),
    ],
)
def test_a_final_is_settled_by_the_constraint_it_breaks(constraint, state, reason):
    settled, why = settle(result(), TRAINING, [constraint])

    assert settled == state
    assert why is None if reason is None else reason in why


@pytest.mark.parametrize("constraints", [[], [Constraint("audit", None)]])
def test_a_failed_audit_is_illegal_and_names_the_rule(constraints):
    failed = [{"id": "coverage", "verdict": "fail", "detail": "3 not scored"}]

    state, reason = settle(result(audit=failed), TRAINING, constraints)

    assert state == State.ILLEGAL
    assert reason == "audit coverage: 3 not scored"


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (["succeeded", "infeasible"], State.SUCCEEDED),
        (["infeasible", "illegal"], State.INFEASIBLE),
        (["illegal"], State.ILLEGAL),
        (["succeeded", "failed"], State.FAILED),
    ],
)
def test_a_sweep_ends_as_its_finals_do(states, expected):
    view = SweepView(finals={str(i): {"state": state} for i, state in enumerate(states)})

    assert verdict(view) == expected


def node(cpus: float, gpus: float = 0, *, alive: bool = True) -> dict[str, Any]:
    return {"Alive": alive, "Resources": {"CPU": cpus, "GPU": gpus}}


@pytest.mark.parametrize(
    ("resources", "nodes", "missing"),
    [
        (Resources(workers=2), [node(2)], None),
        (Resources(workers=2), [node(1)], "need 2 × 1 CPU on one node, have 1"),
        (Resources(workers=2), [node(1), node(1)], "need 2 × 1 CPU on one node, have 1"),
        (Resources(workers=2, placement="PACK"), [node(1), node(1)], None),
        (Resources(workers=2, placement="STRICT_SPREAD"), [node(8)], "need 2 × 1 CPU, have 1"),
        (Resources(workers=2), [node(2, alive=False)], "need 2 × 1 CPU on one node, have 0"),
        (Resources(workers=2, cpus_per_worker=4), [node(7)], "need 2 × 4 CPU on one node, have 1"),
        (
            Resources(workers=8, gpus_per_worker=1),
            [node(64, 7)],
            "need 8 × 1 GPU on one node, have 7",
        ),
    ],
)
def test_a_gang_that_never_fits_says_what_it_needs_and_what_there_is(resources, nodes, missing):
    assert what_is_missing(resources, nodes) == missing


@pytest.mark.parametrize(
    ("resources", "nodes", "gangs"),
    [
        (Resources(workers=2, gpus_per_worker=1), [node(64, 3), node(64, 3)], 2),
        (Resources(workers=2, gpus_per_worker=1, placement="PACK"), [node(9, 3), node(9, 3)], 3),
        (Resources(workers=2, gpus_per_worker=1), [node(2, 8)], 1),
        (Resources(workers=2, placement="STRICT_SPREAD"), [node(8), node(8)], 1),
    ],
)
def test_gangs_at_once_are_counted_place_by_place(resources, nodes, gangs):
    assert gangs_at_once(resources, nodes) == gangs
