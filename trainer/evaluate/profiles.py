"""How strictly the rules of a final are read. Pure.

`community` reads them as the merged records do: what is contested passes, and says so. `strict`
fails what is contested, and what a score must show but nobody checked.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

from trainer.results import Rule

Profile = Literal["community", "strict"]

# What the probes look at, in their order: the first that fails is the one to name.
PROBED = (
    "coverage",
    "score-before-update",
    "warmup-hygiene",
    "single-pass",
    "causality",
    "normalisation",
    "plain-score",
    "previous-document",
)
# What every score must show. The others do not apply to every evaluation.
REQUIRED = (
    *PROBED[:6],
    "byte-accounting",
    "parity",
    "ttt-kind",
    "evaluation-order",
    "calibration",
    "train-val-overlap",
    "clocks",
)


def merge(recorded: Iterable[Rule], probed: Iterable[Rule]) -> tuple[Rule, ...]:
    """Put what two looks say of a rule together: one that failed fails, one that was not checked
    leaves it to the other."""
    found = {rule.id: rule for rule in recorded}
    for rule in probed:
        before = found.get(rule.id)
        found[rule.id] = rule if before is None else _both(before, rule)
    return tuple(found.values())


def judge(rules: Iterable[Rule], profile: Profile) -> tuple[Rule, ...]:
    """Read rules by a profile; a required rule that is missing was not checked."""
    found = tuple(rules)
    if profile == "community":
        return tuple(_noted(rule) if rule.contested else rule for rule in found)
    missing = [name for name in REQUIRED if name not in {rule.id for rule in found}]
    return (*map(_strict, found), *(_strict(not_checked(name, "not applied")) for name in missing))


def is_legal(rules: Iterable[Rule]) -> bool:
    """Whether no rule failed."""
    return all(rule.verdict != "fail" for rule in rules)


def not_checked(name: str, why: str) -> Rule:
    """Say why a rule was not applied."""
    return Rule(id=name, verdict="not checked", detail=why, source="techniques 1.9")


def _both(recorded: Rule, probed: Rule) -> Rule:
    verdicts = {recorded.verdict, probed.verdict}
    verdict = next(v for v in ("fail", "pass", "not checked") if v in verdicts)
    return Rule(
        id=recorded.id,
        verdict=verdict,
        detail=f"{recorded.detail}; probed: {probed.detail}",
        source="; ".join(dict.fromkeys((recorded.source, probed.source))),
        contested=recorded.contested or probed.contested,
    )


def _noted(rule: Rule) -> Rule:
    return replace(rule, detail=f"contested, the profile strict fails it: {rule.detail}")


def _strict(rule: Rule) -> Rule:
    if rule.verdict == "pass" and rule.contested:
        return replace(rule, verdict="fail", detail=f"contested: {rule.detail}")
    if rule.verdict == "not checked" and rule.id in REQUIRED:
        return replace(rule, verdict="fail", detail=f"not checked: {rule.detail}")
    return rule
