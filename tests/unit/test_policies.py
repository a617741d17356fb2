"""Decisions over results: tables of facts and verdicts."""

from typing import Any

import pytest

from service.clocks import load_policy
from service.ledger import SweepView
from service.policies import gangs_at_once, settle, verdict, what_is_missing
from service.specs import Resources
from service.states import State
from service.sweep import Constraint

TRAINING = {"train_clock_s": 590.0, "clock_s": {"warmup": 70.0, "train": 590.0}}
CLOCKS = load_policy()


def result(**changes: Any) -> dict[str, Any]:
    rules = [{"id": "coverage", "verdict": "pass", "detail": ""}]
    score = {"val_bpb": 1.2, "eval_clock_s": 100.0}
    facts = {"artifact_bytes": 500, "score": score, "audit": rules, "finalize_clock_s": 50.0}
    return {**facts, **changes}


@pytest.mark.parametrize(
    ("constraint", "state", "reason"),
    [
        (Constraint("artifact_bytes", 500), State.SUCCEEDED, None),
        (Constraint("artifact_bytes", 499), State.INFEASIBLE, "500 > 499, over by 1"),
        (Constraint("val_bpb", 1.1), State.INFEASIBLE, "val_bpb 1.2 > 1.1"),
        (Constraint("eval_clock_s", 99), State.ILLEGAL, "eval_clock_s 100.0 > 99"),
        (Constraint("train_clock_s", 580), State.ILLEGAL, "train_clock_s 590.0 > 580"),
        (Constraint("train_clock_s", 600), State.SUCCEEDED, None),
        (Constraint("audit", None), State.SUCCEEDED, None),
    ],
)
def test_a_final_is_settled_by_the_constraint_it_breaks(constraint, state, reason):
    settled, why = settle(result(), TRAINING, [constraint], CLOCKS)

    assert settled == state
    assert why is None if reason is None else reason in why


def test_calibration_can_take_a_training_over_its_clock():
    calibrated = result(calibration="train", calibration_clock_s=12.5)

    state, reason = settle(calibrated, TRAINING, [Constraint("train_clock_s", 600)], CLOCKS)

    assert state == State.ILLEGAL
    assert reason == "train_clock_s 602.5 > 600, over by 2.5 (train 590.0 + hessians 12.5)"


def test_without_a_constraint_on_a_clock_none_is_held_against_a_final():
    slow = {"clock_s": {"train": 86_400.0}}
    score = {"val_bpb": 1.2, "eval_clock_s": 7_200.0}

    assert settle(result(score=score), slow, [], CLOCKS) == (State.SUCCEEDED, None)


@pytest.mark.parametrize("constraints", [[], [Constraint("audit", None)]])
def test_a_failed_audit_is_illegal_and_names_the_rule(constraints):
    failed = [{"id": "coverage", "verdict": "fail", "detail": "3 not scored"}]

    state, reason = settle(result(audit=failed), TRAINING, constraints, CLOCKS)

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
        (
            Resources(workers=8, gpus_per_worker=1),
            [node(64), node(4, 8)],
            "need 8 × (1 CPU + 1 GPU) on one node, have 4: a node is short of CPU",
        ),
        (
            Resources(workers=2, gpus_per_worker=1, placement="PACK"),
            [node(8), node(0, 8)],
            "need 2 × (1 CPU + 1 GPU), have 0: a node is short of GPU",
        ),
        (
            Resources(workers=2, gpus_per_worker=1, placement="STRICT_SPREAD"),
            [node(8, 8), node(8), node(0, 8)],
            "need 2 × (1 CPU + 1 GPU), have 1: a node is short of GPU",
        ),
        (Resources(workers=8, gpus_per_worker=1), [node(64), node(8, 8)], None),
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
