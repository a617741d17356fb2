"""Honest evaluators pass every probe; each cheat fails the rule that names it first."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from tests.cheats import CHEATS, SUBTLER
from trainer.errors import UsageError
from trainer.evaluate.evaluators import evaluate
from trainer.evaluate.probes.altered import causality, plain_score, previous_document
from trainer.evaluate.probes.check import check_evaluator
from trainer.evaluate.probes.normalisation import normalisation
from trainer.evaluate.probes.record import record, single_pass, warmup_hygiene
from trainer.evaluate.probes.subject import WINDOW, make_subject
from trainer.evaluate.probes.text import make_text
from trainer.evaluate.profiles import PROBED, judge
from trainer.evaluate.sliding import slide
from trainer.evaluate.windows import batches, plan_windows
from trainer.liveness.probe import awake
from trainer.runtime.distributed import Ranks
from trainer.specs.evaluate import Documents, EvaluateSpec
from trainer.specs.ttt import LoraTtt, OracleTtt, Phases, SgdTtt

NUM_TOKENS = 80
MODEL = tiny.bare_model(vocab_size=24, num_layers=1, dim=16)
LARGER = replace(MODEL, vocab_size=80)
FLAT = EvaluateSpec(window=32, stride=8)
ALONE = EvaluateSpec(window=32, stride=8, documents=Documents())
SGD = replace(FLAT, ttt=SgdTtt(lr=0.05))
LORA = LoraTtt(rank=4, lr=0.01)
LAWFUL = {
    "flat": FLAT,
    "without overlap": EvaluateSpec(window=32, stride=32),
    "documents": ALONE,
    "documents in whole windows": EvaluateSpec(window=32, stride=32, documents=Documents()),
    "sgd": SGD,
    "lora by file": replace(ALONE, ttt=replace(LORA, order="file")),
    "lora from a cold start": replace(ALONE, ttt=replace(LORA, warm_a=False)),
    "lora, longest first": replace(ALONE, ttt=LORA),
    "lora in phases": replace(ALONE, ttt=replace(LORA, order="file", phases=Phases(lr=0.05))),
}


def subject(evaluator=evaluate, spec=FLAT, model=MODEL):
    return make_subject(evaluator, model, awake(model).state_dict(), spec, Ranks())


def failed(rules):
    return [rule.id for rule in rules if rule.verdict == "fail"]


@pytest.mark.parametrize("name", LAWFUL)
def test_a_lawful_evaluator_passes_every_probe(name):
    rules = check_evaluator(subject(spec=LAWFUL[name]), NUM_TOKENS)

    assert [rule.id for rule in rules] == list(PROBED)
    assert failed(rules) == []
    unchecked = {rule.id for rule in rules if rule.verdict == "not checked"}
    assert unchecked <= {"previous-document"}
    assert {rule.id for rule in rules if rule.contested} == (
        {"causality"} if name == "lora, longest first" else set()
    )


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_fails_the_rule_that_names_it_first(name):
    rules = check_evaluator(subject(CHEATS[name]), NUM_TOKENS)

    assert failed(rules)[0] == name


@pytest.mark.parametrize("cheat", SUBTLER, ids=lambda cheat: cheat.__name__)
def test_a_subtler_cheat_is_caught_as_well(cheat):
    rules = check_evaluator(subject(cheat), NUM_TOKENS)

    assert SUBTLER[cheat] <= set(failed(rules))


def test_an_oracle_is_what_the_first_rule_after_coverage_says():
    spec = replace(FLAT, ttt=OracleTtt(optimizer="sgd", lr=0.05))

    rules = check_evaluator(subject(spec=spec), NUM_TOKENS)

    assert failed(rules)[0] == "score-before-update"


@pytest.mark.parametrize("name", ["normalisation", "single-pass"])
def test_of_a_large_alphabet_some_tokens_tell_of_all(name):
    text = make_text(LARGER.vocab_size, NUM_TOKENS)

    lawful = normalisation(subject(model=LARGER), text)
    cheating = normalisation(subject(CHEATS[name], model=LARGER), text)

    assert (lawful.verdict, cheating.verdict) == ("pass", "fail")
    assert "sum to 1.000000, 1.000000" in lawful.detail


def test_longest_first_passes_the_community_and_fails_the_strict():
    rule = causality(subject(spec=LAWFUL["lora, longest first"]), make_text(24, NUM_TOKENS))

    assert judge((rule,), "community")[0].verdict == "pass"
    assert judge((rule,), "strict")[0].verdict == "fail"


def test_a_document_that_acts_on_another_fails_where_they_are_alone():
    flat = replace(ALONE, documents=None)
    text = make_text(24, NUM_TOKENS)

    def crosses(model, tape, spec, ranks):
        slide(model, tape, replace(flat, window=spec.window, stride=spec.stride), ranks)

    assert previous_document(subject(spec=ALONE), text).verdict == "pass"
    assert previous_document(subject(crosses, ALONE), text).verdict == "fail"
    assert previous_document(subject(spec=FLAT), text).verdict == "not checked"


def test_a_step_at_a_learning_rate_of_zero_fails_the_plain_score():
    text = make_text(24, NUM_TOKENS)

    def never_still(model, tape, spec, ranks):
        ttt = spec.ttt and replace(spec.ttt, lr=max(spec.ttt.lr, 0.01))
        evaluate(model, tape, replace(spec, ttt=ttt), ranks)

    assert plain_score(subject(spec=SGD), text).verdict == "pass"
    assert plain_score(subject(never_still, SGD), text).verdict == "fail"


def test_random_tokens_are_a_lawful_warm_up():
    def warm(model, tape, spec, ranks):
        tokens = torch.from_numpy(np.random.default_rng(7).integers(2, 24, (4, 1 + WINDOW)))
        model(tokens[:, :-1], tokens[:, 1:]).mean().backward()
        evaluate(model, tape, spec, ranks)

    seen = record(subject(warm), make_text(24, NUM_TOKENS))

    assert len(seen.calls) > 1
    assert warmup_hygiene(seen).verdict == single_pass(seen).verdict == "pass"


def test_what_a_copy_of_the_model_is_shown_is_seen():
    def on_a_copy(model, tape, spec, ranks):
        CHEATS["warmup-hygiene"](deepcopy(model), tape, spec, ranks)

    assert warmup_hygiene(record(subject(on_a_copy), make_text(24, NUM_TOKENS))).verdict == "fail"


def test_a_score_that_came_from_no_forward_is_no_single_pass():
    def invent(model, tape, spec, ranks):
        for batch in batches(plan_windows(len(tape), spec), spec.batch_windows):
            tape.score(lambda x, y, *_: torch.ones(y.shape), batch, ranks.device, spec.window)

    rule = single_pass(record(subject(invent), make_text(24, NUM_TOKENS)))

    assert rule.verdict == "fail"
    assert f"{NUM_TOKENS - 1} never" in rule.detail


@settings(max_examples=30)
@given(st.integers(20, 400), st.integers(64, 72), st.integers(0, 99))
def test_in_a_probes_text_every_pair_is_met_once_and_found_where_it_is(vocab_size, length, seed):
    text = make_text(vocab_size, length, seed)

    pairs = list(zip(text.tokens, text.tokens[1:], strict=False))

    assert len(set(pairs)) == len(pairs) == len(text)
    assert text.tokens.min() > 0
    found = text.find(text.tokens[None, 3:-1], text.tokens[None, 4:])
    assert found.tolist() == [list(range(3, len(text)))]


@settings(max_examples=30)
@given(st.integers(0, 78), st.integers(0, 99))
def test_an_altered_text_differs_where_it_is_told_and_keeps_its_documents(first, seed):
    text = make_text(24, NUM_TOKENS)
    where = np.arange(NUM_TOKENS) >= first

    other = text.changed(where, seed)

    differs = other.tokens != text.tokens
    assert (differs == (where & (text.tokens != text.bos))).all()
    assert (other.starts() == text.starts()).all()


def test_stray_pairs_are_not_taken_for_the_text():
    text = make_text(24, NUM_TOKENS)
    start, other = text.tokens[10:13], text.tokens[40:44]
    row = np.concatenate([start, other, np.zeros(5, np.int64)])

    found = text.find(row[None, :-1], row[None, 1:])[0]

    assert found.tolist() == [-1, -1, -1, 40, 41, 42, -1, -1, -1, -1, -1]


def test_a_short_row_is_found_whether_or_not_it_is_filled_up():
    text = make_text(24, NUM_TOKENS)
    short = text.tokens[50:52]
    filled = np.append(short, np.zeros(6, np.int64))

    assert text.find(short[None, :1], short[None, 1:]).tolist() == [[50]]
    assert text.find(filled[None, :-1], filled[None, 1:]).tolist() == [[50] + [-1] * 6]


@pytest.mark.parametrize("num_tokens", [63, 89])
def test_a_text_that_cannot_be_is_refused_with_the_lengths_that_can(num_tokens):
    with pytest.raises(UsageError, match="has 64 to 88 of them"):
        make_text(24, num_tokens)
