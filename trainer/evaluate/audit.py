"""Audit rules: what can be said about a score beyond its number. Pure.

Each rule has an id, a verdict and a source; a rule that could not be checked says so.
"""

import numpy as np

from trainer.evaluate.windows import Windows, times_scored
from trainer.results import Rule, Totals


def coverage(plan: Windows, num_predictions: int) -> Rule:
    """Every prediction of the split is scored exactly once."""
    times = times_scored(plan, num_predictions)
    missed, again = int(np.sum(times == 0)), int(np.sum(times > 1))
    return Rule(
        id="coverage",
        verdict="pass" if missed == again == 0 else "fail",
        detail=f"{num_predictions} predictions, {missed} not scored, {again} scored again",
        source="issue #1017 C4; techniques 1.5",
    )


def byte_accounting(totals: Totals, expected_bytes: int, expected_tokens: int) -> Rule:
    """The scored bytes and tokens are those of the split, counted from its decoded text."""
    exact = totals.bytes == expected_bytes and totals.tokens == expected_tokens
    return Rule(
        id="byte-accounting",
        verdict="pass" if exact else "fail",
        detail=(
            f"scored {totals.bytes} bytes, {totals.tokens} tokens; "
            f"the split has {expected_bytes} and {expected_tokens}"
        ),
        source="techniques 1.3; issue #1719",
    )


def parity(trainer_bpb: float, fresh_bpb: float, tolerance: float) -> Rule:
    """A fresh process scores the bank entry as the trainer did."""
    gap = abs(trainer_bpb - fresh_bpb)
    return Rule(
        id="parity",
        verdict="pass" if gap <= tolerance else "fail",
        detail=f"trainer {trainer_bpb:.8f}, fresh process {fresh_bpb:.8f}, allowed {tolerance:g}",
        source="design 9",
    )
