"""Audit rules: what can be said about a score beyond its number, from what its evaluation left.

Each rule has an id, a verdict and a source; a rule that could not be checked says so. What only
shows when an evaluator runs again on altered texts is `trainer.evaluate.probes`' to find.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from trainer.evaluate.rulings import judge_spec
from trainer.evaluate.tape import Tape
from trainer.evaluate.windows import Windows, times_scored
from trainer.protocol import EVAL_CLOCK_CAP_S, TRAIN_CLOCK_CAP_S
from trainer.results import Rule, Totals
from trainer.specs.task import FinalTask


@dataclass(frozen=True, slots=True, eq=False)
class Facts:
    """What is known of a final once its artifact is scored.

    `overlap` is the dataset manifest's, None where it records none. `train_clock_s` includes what
    read training data to calibrate. `on_challenge_hardware`: both clocks ran on it.
    """

    task: FinalTask
    tape: Tape
    totals: Totals
    expected_bytes: int
    overlap: Mapping[str, int] | None
    train_clock_s: float
    eval_clock_s: float
    on_challenge_hardware: bool
    parity: Rule


def rules(facts: Facts) -> tuple[Rule, ...]:
    """Apply every rule that needs no further run of the evaluator."""
    task, tape = facts.task, facts.tape
    return (
        covered(tape.times),
        score_before_update(tape),
        warmup_hygiene(tape),
        single_pass(tape),
        byte_accounting(facts.totals, facts.expected_bytes, len(tape)),
        facts.parity,
        judge_spec("ttt-kind", task, "nothing is trained on the scored text"),
        evaluation_order(tape, task),
        judge_spec("calibration", task, "rounding reads no text"),
        train_val_overlap(facts.overlap),
        clocks(facts.train_clock_s, facts.eval_clock_s, is_official=facts.on_challenge_hardware),
    )


def rule_of(name: str, holds: bool | None, detail: str, source: str) -> Rule:
    """Make a rule's verdict; None: not checked."""
    verdict = "not checked" if holds is None else "pass" if holds else "fail"
    return Rule(id=name, verdict=verdict, detail=detail, source=source)


def coverage(plan: Windows, num_predictions: int) -> Rule:
    """A plan scores every prediction of a split exactly once."""
    return covered(times_scored(plan, num_predictions))


def covered(times: np.ndarray) -> Rule:
    """Every prediction was scored exactly once, `times` [N] saying how often each was."""
    missed, again = int(np.sum(times == 0)), int(np.sum(times > 1))
    return rule_of(
        "coverage",
        missed == again == 0,
        f"{len(times)} predictions, {missed} not scored, {again} scored again",
        "issue #1017 C4; techniques 1.5",
    )


def score_before_update(tape: Tape) -> Rule:
    """C3: what is trained on was scored before, and no score changed after that.

    A lend is held against all that had been scored by then; the digest of the scores moves only
    with a score.
    """
    scored, faults = 0, list[str]()
    for i, event in enumerate(tape.events):
        if event.kind == "score":
            scored += event.predictions
        elif event.kind == "peek":
            faults.append(f"event {i} read {event.predictions} tokens whatever their score")
        elif scored == 0:
            faults.append(f"event {i}, {event.kind}, came before the first score")
        elif event.predictions > scored:
            faults.append(f"event {i} lent {event.predictions} tokens, {scored} were scored")
        before = tape.events[i - 1] if i else event
        if event.digest != before.digest and before.kind != "score":
            faults.append(f"a {before.kind}, event {i - 1}, changed the sealed scores")
    kinds = [event.kind for event in tape.events]
    shown = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    return rule_of(
        "score-before-update", not faults, _first(faults) or f"events: {shown}", "issue #1017 C3"
    )


def warmup_hygiene(tape: Tape) -> Rule:
    """Nothing of the text left the tape before the first score."""
    first = tape.events[0].kind if tape.events else "nothing"
    return rule_of(
        "warmup-hygiene",
        first == "score",
        f"the first that was done with the text: {first}",
        "techniques 1.7; PR #1530",
    )


def single_pass(tape: Tape) -> Rule:
    """C4: as many scores were sealed as there are predictions, each in one event of scoring."""
    faults = list[str]()
    again = int((tape.times > 1).sum())
    if tape.again or again:
        faults.append(f"{again} predictions scored again: a score is not final")
    sealed = sum(event.predictions for event in tape.events if event.kind == "score")
    if sealed != int(tape.times.sum()):
        faults.append(f"{sealed} scores were sealed, {int(tape.times.sum())} are counted")
    orders = tape.order[tape.times > 0]
    kinds = np.array([event.kind == "score" for event in tape.events], dtype=bool)
    if ((orders < 0) | (orders >= len(kinds))).any() or not kinds[orders].all():
        faults.append("some scores belong to no event of scoring")
    return rule_of(
        "single-pass",
        not faults,
        _first(faults) or f"{sealed} scores sealed in {int(kinds.sum())} events, none twice",
        "issue #1017 C4; PRs #573, #846, #991",
    )


def evaluation_order(tape: Tape, task: FinalTask) -> Rule:
    """Whether text that stands later in the file could act on earlier scores; contested."""
    rule = judge_spec("evaluation-order", task, "nothing passes from one score to another")
    back = int((np.diff(tape.order) < 0).sum())
    detail = f"{rule.detail}; scored before their predecessor: {back} predictions"
    return Rule(
        id=rule.id,
        verdict=rule.verdict,
        detail=detail,
        source=rule.source,
        contested=rule.contested and back > 0,
    )


def byte_accounting(totals: Totals, expected_bytes: int, expected_tokens: int) -> Rule:
    """The scored bytes and tokens are those of the split, counted from its decoded text."""
    return rule_of(
        "byte-accounting",
        totals.bytes == expected_bytes and totals.tokens == expected_tokens,
        f"scored {totals.bytes} bytes, {totals.tokens} tokens; "
        f"the split has {expected_bytes} and {expected_tokens}",
        "techniques 1.3; issue #1719",
    )


def parity(trainer_bpb: float, fresh_bpb: float, tolerance: float) -> Rule:
    """A fresh process scores the bank entry as the trainer did."""
    return rule_of(
        "parity",
        abs(trainer_bpb - fresh_bpb) <= tolerance,
        f"trainer {trainer_bpb:.8f}, fresh process {fresh_bpb:.8f}, allowed {tolerance:g}",
        "design 9",
    )


def train_val_overlap(overlap: Mapping[str, int] | None) -> Rule:
    """No document of the validation split was trained on; near duplicates are counted."""
    source = "issue #1017 C1; trainer.data.overlap"
    if overlap is None:
        why = "the dataset's manifest records no overlap; `fairway data prepare` measures it"
        return rule_of("train-val-overlap", None, why, source)
    same = overlap["identical_documents"]
    near, total = overlap["near_duplicate_val_documents"], overlap["val_documents"]
    shown = f"{same} identical documents, {near} of {total} validation documents nearly so"
    return rule_of("train-val-overlap", same == 0, shown, source)


def clocks(train_clock_s: float, eval_clock_s: float, *, is_official: bool) -> Rule:
    """Training and evaluation stay within their clocks; other hardware than the challenge's says
    nothing about that."""
    shown = (
        f"train {train_clock_s:.1f} s of {TRAIN_CLOCK_CAP_S:g}, "
        f"eval {eval_clock_s:.1f} s of {EVAL_CLOCK_CAP_S:g}"
    )
    if not is_official:
        shown += ", measured on other hardware than the challenge's"
    within = train_clock_s <= TRAIN_CLOCK_CAP_S and eval_clock_s <= EVAL_CLOCK_CAP_S
    return rule_of("clocks", within if is_official else None, shown, "techniques 1.7")


def _first(faults: list[str]) -> str:
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"{faults[0]}{more}" if faults else ""
