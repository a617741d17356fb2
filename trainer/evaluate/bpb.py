"""Bits per byte from summed nats and bytes.

The sum of nats over the sum of bytes, never a mean of means: windows differ in how many
predictions they score, and tokens in how many bytes they stand for (techniques 1.3).
"""

import math

from trainer.results import Totals


def bits_per_byte(totals: Totals) -> float:
    """Return Σ nats / (ln 2 · Σ bytes)."""
    return totals.nats / (math.log(2.0) * totals.bytes)


def nats_per_token(totals: Totals) -> float:
    """Return Σ nats / tokens."""
    return totals.nats / totals.tokens
