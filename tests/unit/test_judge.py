"""Whether a training may go on."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.judge import make_judge
from service.specs import Asha, ReferenceCurve

HALVING = Asha(first_step=4, reduction=2)


def judge(stop=HALVING, rungs=(), curve=None):
    return make_judge(stop, rungs, curve or {})


def test_without_a_rule_there_is_nobody_to_ask():
    assert judge(None) is None


def test_before_the_first_rung_nothing_is_stopped():
    asked = judge()
    assert asked.ask("a", 4, 1.0) is None
    assert asked.ask("b", 3, 9.0) is None


def test_at_a_rung_only_the_best_share_goes_on_and_is_told_why_not():
    asked = judge()
    assert asked.ask("a", 4, 2.0) is None
    reason = asked.ask("b", 4, 3.0)
    assert reason == ("asha: val bpb 3.0000 at rung 4 is not among the best 1 of 2 (up to 2.0000)")
    assert asked.ask("c", 4, 1.5) is None


def test_the_next_rung_stands_at_a_multiple_of_the_first():
    asked = judge()
    for step in (4, 6):
        assert asked.ask("a", step, 1.0) is None
        assert asked.ask("b", step, 1.0) is None
    assert asked.ask("a", 8, 1.0) is None
    assert "rung 8" in asked.ask("b", 8, 1.1)


def test_a_rung_counts_at_the_first_validation_after_it():
    asked = judge()
    assert asked.ask("a", 5, 1.0) is None
    assert "rung 4" in asked.ask("b", 7, 1.1)


def test_asking_again_gives_the_same_answer_whatever_came_between():
    asked = judge()
    asked.ask("a", 4, 2.0)
    first = asked.ask("b", 4, 3.0)
    asked.ask("c", 4, 9.0)
    asked.ask("d", 4, 8.0)
    assert asked.ask("b", 5, 0.1) == first


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 40), st.floats(1, 9))))
def test_a_judge_that_was_told_the_rungs_answers_as_the_one_that_gave_them(asked):
    before = judge()
    events = [
        {"training": name, "step": step, "val_bpb": bpb, "reason": before.ask(name, step, bpb)}
        for name, step, bpb in asked
    ]
    after = judge(rungs=events)
    for name, step, bpb in asked:
        assert after.ask(name, step, bpb) == before.ask(name, step, bpb)


def test_a_judge_travels_to_another_process_with_what_it_knows():
    asked = judge()
    asked.ask("a", 4, 1.0)
    assert "rung 4" in pickle.loads(pickle.dumps(asked)).ask("b", 4, 2.0)


@pytest.mark.parametrize(
    ("step", "bpb", "is_stopped"),
    [(10, 2.011, True), (10, 2.009, False), (15, 2.02, True), (20, 1.52, True), (9, 9.0, False)],
)
def test_a_training_over_the_reference_curve_is_stopped(step, bpb, is_stopped):
    stop = ReferenceCurve(training="abc", margin_bpb=0.01, first_step=10)
    reason = judge(stop, curve={10: 2.0, 20: 1.5}).ask("x", step, bpb)
    assert (reason is not None) == is_stopped
    assert not is_stopped or "of abc by more than 0.01" in reason


def test_where_the_reference_has_no_point_yet_nothing_is_stopped():
    stop = ReferenceCurve(training="abc")
    assert judge(stop, curve={50: 1.0}).ask("x", 49, 9.0) is None
