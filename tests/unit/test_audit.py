import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import tiny
from trainer.codec import dump, field_type, parse
from trainer.evaluate import audit
from trainer.evaluate.bpb import bits_per_byte, nats_per_token
from trainer.evaluate.profiles import PROBED, REQUIRED, is_legal, judge, merge, not_checked
from trainer.evaluate.rulings import RULINGS, judge_spec
from trainer.evaluate.tape import Event, Tape
from trainer.evaluate.windows import Windows, batches, plan_windows
from trainer.protocol import EVAL_CLOCK_CAP_S, TRAIN_CLOCK_CAP_S
from trainer.results import Rule, Totals
from trainer.specs.evaluate import EvaluateSpec
from trainer.specs.task import FinalTask, final_task

SPEC = EvaluateSpec(window=32, stride=8)
OVERLAP = {"identical_documents": 0, "near_duplicate_val_documents": 3, "val_documents": 40}


def columns(*windows):
    return Windows(*(np.array(column, dtype=np.int64) for column in zip(*windows, strict=True)))


def scored(spec=SPEC, num_tokens=101):
    """A tape on which every token cost one nat."""
    tape = Tape(np.arange(num_tokens) % 64, again=spec.variant == "A")
    for batch in batches(plan_windows(len(tape), spec), 4):
        tape.score(one_nat, batch, torch.device("cpu"), spec.window)
    return tape


def one_nat(tokens, targets, *_):
    return torch.ones(targets.shape)


def task(values=None):
    return final_task(tiny.recipe(values))


def facts(**changes):
    tape = changes.pop("tape", None) or scored()
    known = {
        "task": task(),
        "tape": tape,
        "totals": Totals(nats=100.0, tokens=100, bytes=250),
        "expected_bytes": 250,
        "overlap": OVERLAP,
        "train_clock_s": 500.0,
        "eval_clock_s": 50.0,
        "on_challenge_hardware": True,
        "parity": audit.parity(1.5, 1.5, 1e-6),
    }
    return audit.Facts(**(known | changes))


def verdicts(rules):
    return {rule.id: rule.verdict for rule in rules}


def test_bits_per_byte_is_nats_over_bytes_in_bits():
    totals = Totals(nats=700.0 * math.log(2), tokens=200, bytes=500)

    assert bits_per_byte(totals) == pytest.approx(1.4)
    assert nats_per_token(totals) == pytest.approx(3.5 * math.log(2))


def test_a_full_plan_passes_coverage():
    rule = audit.coverage(plan_windows(100, SPEC), 100)

    assert (rule.id, rule.verdict) == ("coverage", "pass")


@pytest.mark.parametrize(
    ("plan", "detail"),
    [
        (columns((0, 10, 10), (5, 18, 8)), "2 not scored, 0 scored again"),
        (columns((0, 10, 10), (5, 20, 12)), "0 not scored, 2 scored again"),
    ],
)
def test_a_skipped_or_repeated_prediction_fails_coverage(plan, detail):
    rule = audit.coverage(plan, 20)

    assert rule.verdict == "fail"
    assert detail in rule.detail


@pytest.mark.parametrize(
    ("expected_bytes", "expected_tokens", "verdict"),
    [(500, 200, "pass"), (501, 200, "fail"), (500, 199, "fail")],
)
def test_byte_accounting_allows_no_difference(expected_bytes, expected_tokens, verdict):
    totals = Totals(nats=1.0, tokens=200, bytes=500)

    rule = audit.byte_accounting(totals, expected_bytes, expected_tokens)

    assert rule.verdict == verdict


@pytest.mark.parametrize(
    ("fresh", "verdict"),
    [(1.5, "pass"), (1.5 + 1e-7, "pass"), (1.501, "fail"), (1.499, "fail"), (math.nan, "fail")],
)
def test_parity_fails_beyond_its_tolerance(fresh, verdict):
    assert audit.parity(1.5, fresh, 1e-6).verdict == verdict


def test_an_honest_final_passes_every_rule_and_each_names_its_source():
    rules = audit.rules(facts())

    assert verdicts(rules) == dict.fromkeys(
        (
            "coverage",
            "score-before-update",
            "warmup-hygiene",
            "single-pass",
            "byte-accounting",
            "parity",
            "ttt-kind",
            "evaluation-order",
            "calibration",
            "train-val-overlap",
            "clocks",
        ),
        "pass",
    )
    assert all(rule.source and rule.detail and not rule.contested for rule in rules)


def test_a_tape_that_trains_on_what_it_scored_passes():
    tape = scored()
    tape.lend(0, 40)
    tape.note_update()

    assert audit.score_before_update(tape).verdict == "pass"
    assert audit.single_pass(tape).verdict == "pass"


def test_a_text_that_was_read_before_its_scores_fails():
    tape = scored()
    tape.events.insert(0, Event("peek", 100, tape.events[0].digest))

    before, warm = audit.score_before_update(tape), audit.warmup_hygiene(tape)

    assert (before.verdict, warm.verdict) == ("fail", "fail")
    assert before.detail == "event 0 read 100 tokens whatever their score"
    assert warm.detail == "the first that was done with the text: peek"


@pytest.mark.parametrize(
    ("kind", "predictions", "at", "detail"),
    [
        ("update", 0, 0, "event 0, update, came before the first score"),
        ("lend", 33, 1, "event 1 lent 33 tokens, 32 were scored"),
    ],
)
def test_training_on_what_was_not_scored_fails(kind, predictions, at, detail):
    tape = Tape(np.arange(101) % 64)
    tape.score(one_nat, columns((0, 32, 32)), torch.device("cpu"), 32)
    tape.events.insert(at, Event(kind, predictions, tape.digest()[:16] if at else "0" * 16))

    rule = audit.score_before_update(tape)

    assert (rule.verdict, rule.detail.startswith(detail)) == ("fail", True), rule.detail


def test_a_score_that_moved_while_the_model_trained_fails():
    tape = scored()
    tape.lend(0, 40)
    tape.events.append(Event("update", 0, "an other digest"))

    rule = audit.score_before_update(tape)

    assert rule.verdict == "fail"
    assert "changed the sealed scores" in rule.detail


def test_the_variant_that_scores_its_tail_again_is_no_single_pass():
    tape = scored(EvaluateSpec(window=32, stride=8, variant="A"))

    assert audit.single_pass(tape).verdict == "fail"
    assert audit.covered(tape.times).verdict == "fail"


def test_scores_that_no_event_sealed_are_no_single_pass():
    added, misplaced = scored(), scored()
    added.events.append(Event("score", 3, added.digest()[:16]))
    misplaced.order[7] = -1

    assert audit.single_pass(added).detail == "103 scores were sealed, 100 are counted"
    assert audit.single_pass(misplaced).verdict == "fail"


@pytest.mark.parametrize(
    ("ttt", "verdict", "cited"),
    [
        ({"kind": "oracle"}, "fail", "PRs #672"),
        ({"kind": "sgd"}, "pass", "PRs #549, #1413"),
        ({"kind": "lora"}, "pass", "PR #1530"),
        ({"kind": "lora", "phases": {}}, "pass", "PRs #1610, #1626"),
    ],
)
def test_the_way_of_training_is_judged_by_its_ruling(ttt, verdict, cited):
    documents = {"evaluate.documents": {}} if ttt["kind"] == "lora" else {}

    rule = judge_spec("ttt-kind", task({"evaluate.ttt": ttt, **documents}), "")

    assert (rule.verdict, rule.contested) == (verdict, False)
    assert cited in rule.source


@pytest.mark.parametrize(
    ("ttt", "contested"),
    [
        ({"warm_a": True}, True),
        ({"warm_a": False, "phases": {}}, True),
        ({"warm_a": False}, False),
        ({"order": "file", "phases": {}}, False),
    ],
)
def test_an_order_that_lets_later_text_act_on_earlier_scores_is_contested(ttt, contested):
    asked = task({"evaluate.documents": {}, "evaluate.ttt": {"kind": "lora", **ttt}})
    tape = scored()
    tape.order[:50], tape.order[50:] = 1, 0

    rule = audit.evaluation_order(tape, asked)

    assert (rule.verdict, rule.contested) == ("pass", contested)
    assert "scored before their predecessor: 1 " in rule.detail


def test_an_order_that_came_out_as_the_files_is_not_contested():
    asked = task({"evaluate.documents": {}, "evaluate.ttt": {"kind": "lora"}})
    tape = scored()
    tape.order.sort()

    assert not audit.evaluation_order(tape, asked).contested


@pytest.mark.parametrize(
    ("gptq", "shown"),
    [
        (None, "rounding reads no text"),
        ({}, "calibration on training batches, on the training clock: legal"),
        ({"calibration": "generated"}, "calibration on text that the model generates: legal"),
    ],
)
def test_calibration_passes_and_says_on_what(gptq, shown):
    asked = task({} if gptq is None else {"final.quantize.gptq": gptq})

    rule = judge_spec("calibration", asked, "rounding reads no text")

    assert (rule.verdict, rule.detail) == ("pass", shown)


@pytest.mark.parametrize(
    ("overlap", "verdict"),
    [(None, "not checked"), (OVERLAP, "pass"), (OVERLAP | {"identical_documents": 1}, "fail")],
)
def test_validation_documents_in_training_are_what_the_manifest_counted(overlap, verdict):
    assert audit.train_val_overlap(overlap).verdict == verdict


@pytest.mark.parametrize(
    ("train_s", "eval_s", "is_official", "verdict"),
    [
        (TRAIN_CLOCK_CAP_S, EVAL_CLOCK_CAP_S, True, "pass"),
        (TRAIN_CLOCK_CAP_S + 0.1, 1.0, True, "fail"),
        (1.0, EVAL_CLOCK_CAP_S + 0.1, True, "fail"),
        (1.0, 1.0, False, "not checked"),
        (1e4, 1e4, False, "not checked"),
    ],
)
def test_clocks_count_on_the_challenges_hardware_only(train_s, eval_s, is_official, verdict):
    assert audit.clocks(train_s, eval_s, is_official=is_official).verdict == verdict


@pytest.mark.parametrize(
    ("cited", "status"),
    [
        ("#402", "illegal"),
        ("#568", "illegal"),
        ("#549", "legal"),
        ("#1530", "legal"),
        ("#1610", "legal"),
        ("#846", "illegal"),
        ("#573", "illegal"),
        ("#886", "illegal"),
        ("#1514", "legal"),
        ("#1872", "contested"),
        ("#1240", "illegal"),
        ("#1336", "contested"),
        ("#728", "illegal"),
        ("#1019", "legal"),
        ("#1729", "legal"),
        ("#1578", "illegal"),
        ("#1855", "contested"),
    ],
)
def test_every_ruling_of_the_field_stands_in_the_table(cited, status):
    found = [ruling for ruling in RULINGS if cited in ruling.source]

    assert found
    assert {ruling.status for ruling in found} == {status}


def test_a_ruling_names_values_that_a_final_can_have():
    for ruling in RULINGS:
        assert (ruling.rule is None) == (not ruling.when)
        for path in ruling.when:
            current = FinalTask
            for name in path.split("."):
                current = field_type(current, name)
            assert current is not None, path


def rule_of(name, verdict="pass", **changes):
    return Rule(id=name, verdict=verdict, detail="seen", source="us", **changes)


def test_what_is_contested_passes_the_community_with_a_note_and_fails_the_strict():
    rules = (rule_of("evaluation-order", contested=True),)

    (community,) = judge(rules, "community")
    strict = judge(rules, "strict")[0]

    assert (community.verdict, community.contested) == ("pass", True)
    assert community.detail.startswith("contested, the profile strict fails it")
    assert (strict.verdict, strict.detail) == ("fail", "contested: seen")


def test_what_nobody_checked_fails_the_strict_where_every_score_must_show_it():
    rules = (not_checked("clocks", "a laptop"), not_checked("previous-document", "flat"))

    community, strict = judge(rules, "community"), judge(rules, "strict")

    assert set(verdicts(community).values()) == {"not checked"}
    assert is_legal(community)
    assert verdicts(strict)["clocks"] == "fail"
    assert verdicts(strict)["previous-document"] == "not checked"
    assert {rule.id for rule in strict} == {*REQUIRED, "previous-document"}
    assert not is_legal(strict)


def test_all_required_rules_together_pass_the_strict():
    rules = tuple(rule_of(name) for name in REQUIRED)

    assert is_legal(judge(rules, "strict"))


@pytest.mark.parametrize(
    ("recorded", "probed", "both"),
    [
        ("pass", "pass", "pass"),
        ("pass", "fail", "fail"),
        ("fail", "pass", "fail"),
        ("pass", "not checked", "pass"),
        ("not checked", "pass", "pass"),
        ("not checked", "fail", "fail"),
    ],
)
def test_of_two_looks_at_a_rule_the_one_that_found_something_counts(recorded, probed, both):
    rules = merge(
        (rule_of("parity"), rule_of("coverage", recorded)), (rule_of("coverage", probed),)
    )

    assert verdicts(rules) == {"parity": "pass", "coverage": both}
    assert rules[1].detail == "seen; probed: seen"


def test_a_rule_of_an_older_final_is_not_contested():
    kept = dump(rule_of("coverage"))
    del kept["contested"]

    assert parse(Rule, kept, "audit.json") == rule_of("coverage")


def test_an_oracle_fails_whatever_else_holds():
    asked = task({"evaluate.ttt": {"kind": "oracle"}})

    rules = audit.rules(replace(facts(), task=asked))

    assert [rule.id for rule in rules if rule.verdict == "fail"] == ["ttt-kind"]


def test_the_page_on_the_audit_names_every_rule():
    page = (Path(__file__).parents[2] / "docs" / "audit.md").read_text(encoding="utf-8")

    unnamed = [name for name in {*REQUIRED, *PROBED} if f"| `{name}` |" not in page]

    assert unnamed == []
