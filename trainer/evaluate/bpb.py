"""Bits per byte from summed nats and bytes.

The sum of nats over the sum of bytes, never a mean of means: windows differ in how many
predictions they score, and tokens in how many bytes they stand for (techniques 1.3).
"""

import math

from trainer.errors import DataError
from trainer.results import Score, Totals


def bits_per_byte(totals: Totals) -> float:
    """Return Σ nats / (ln 2 · Σ bytes)."""
    return totals.nats / (math.log(2.0) * totals.bytes)


def nats_per_token(totals: Totals) -> float:
    """Return Σ nats / tokens."""
    return totals.nats / totals.tokens


def score_of(totals: Totals, eval_clock_s: float, where: str) -> Score:
    """Return a text's score; DataError if what was scored stands for no text."""
    if totals.bytes == 0:
        raise DataError(f"{where}: the scored tokens stand for no text; score more of them")
    return Score(
        val_bpb=bits_per_byte(totals),
        val_loss=nats_per_token(totals),
        tokens=totals.tokens,
        bytes=totals.bytes,
        eval_clock_s=eval_clock_s,
    )
