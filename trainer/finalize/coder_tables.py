"""Integer probabilities of a rounded Gaussian, the same to the last bit on every machine.

A class k stands for the deviation σ = 2 ** (k / 16 - 3) steps of the grid. Nothing here is
computed in floating point: exp, erf and log differ in their last bit between libraries, and one
different probability is enough to lose every integer after it.
"""

from collections.abc import Iterator
from functools import cache
from math import isqrt
from typing import Any, Final

import constriction
import numpy as np

STREAM: Final[Any] = constriction.stream  # pyright: ignore[reportAttributeAccessIssue]
PER_OCTAVE: Final = 16  # classes per doubling of σ; twice as many save 0.004 % of a trained pr414
NUM_CLASSES: Final = 10 * PER_OCTAVE  # σ from 1/8, where all is zero, to 121 steps
PRECISION: Final = 24  # bits of a probability in constriction's coders
NUM_SHAPES: Final = 8
SHAPE_STEP: Final = 3  # classes between the components of one shape and the next
_ROOTS: Final = 40  # bits of the fixed-point numbers 2 ** (-j / 16)
_TAIL: Final = 38  # bits of a tail probability; with PRECISION they fill an int64
_PER_SIGMA: Final = 8  # bits: places a σ at which the tail is tabulated
_CHUNK: Final = 256  # models made at a time
_END: Final = 8 << _PER_SIGMA  # 8 σ


@cache
def roots() -> np.ndarray:
    """Return 2 ** (-j / 16) in units of 2 ** -40, rounded down, for j = 0..15; int64."""
    bits = 2 * 16 * _ROOTS
    values = [isqrt(isqrt(isqrt(isqrt(1 << bits >> j)))) >> _ROOTS for j in range(PER_OCTAVE)]
    return np.array(values, np.int64)


@cache
def _tail() -> np.ndarray:
    """Return P(X > i / 256) of a standard Gaussian in units of 2 ** -38, i = 0..2049; int64.

    exp(-x²/2) by its two-term recurrence from place to place, summed by trapezia.
    """
    one = 1 << 96

    def exp_minus(power: int) -> int:  # exp(-2 ** -power)
        term, total, n = one, one, 0
        while term:
            n += 1
            term = (term >> power) // n
            total += term if n % 2 == 0 else -term
        return total

    ratio, square = exp_minus(2 * _PER_SIGMA + 1), exp_minus(2 * _PER_SIGMA)
    density = [one]
    for _ in range(_END + 1):
        density.append(density[-1] * ratio >> 96)
        ratio = ratio * square >> 96
    tails, total = [0], 0
    for left, right in zip(density[-2::-1], density[:0:-1], strict=True):
        total += left + right
        tails.append(total)
    return np.array([(tail << _TAIL - 1) // total for tail in reversed(tails)], np.int64)


def _cdf(classes: np.ndarray, means: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return P(X < edge) of Gaussians [classes, edges] in units of 2 ** -38; edges in half steps,
    means in eighths of σ."""
    inverse = roots()[classes % PER_OCTAVE] >> classes // PER_OCTAVE
    # x / σ = edge / 2 · 2³ · inverse, in places of the table with eight bits of fraction
    by = edges * inverse[:, None] >> _ROOTS - 2 - _PER_SIGMA - 8
    by -= means[:, None] << _PER_SIGMA + 8 - 3
    at = np.abs(by)
    place = np.minimum(at >> 8, _END)
    tail = _tail()
    upper = tail[place] - ((tail[place] - tail[place + 1]) * (at & 255) >> 8)
    return np.where(by < 0, upper, (1 << _TAIL) - upper)


def weights(classes: np.ndarray, means: np.ndarray, shape: int, low: int, high: int) -> np.ndarray:
    """Return the probabilities of low..high under classes with means, int64 [classes, symbols].

    In units of 2 ** -24, without the one unit that constriction gives to every symbol itself.
    What lies beyond the ends is added to them. `shape` widens the tails: half of a class mixed
    with a quarter each of those 3 · shape above and below.
    """
    edges = 2 * np.arange(low, high, dtype=np.int64) + 1
    wide = SHAPE_STEP * shape
    parts = [np.clip(classes + by, 0, NUM_CLASSES - 1) for by in (0, 0, -wide, wide)]
    inner = sum(_cdf(part, means, edges) for part in parts) >> 2
    free = (1 << PRECISION) - (high - low + 1)
    return np.diff(inner * free >> _TAIL, prepend=0, append=free)


def models(
    classes: np.ndarray, means: np.ndarray, shape: int, low: int, high: int
) -> Iterator[Any]:
    """Yield the coder's model of each class with its mean, for symbols counted from `low`."""
    for start in range(0, len(classes), _CHUNK):
        part = slice(start, start + _CHUNK)
        # They sum to what constriction scales to, so its scaling multiplies by one.
        for exact in weights(classes[part], means[part], shape, low, high).astype(np.float64):
            yield STREAM.model.Categorical(exact, perfect=False)


def octaves(scale: np.ndarray) -> np.ndarray:
    """Return log2 of positive floats in sixteenths, rounded down; int64."""
    mantissa, exponent = np.frexp(scale.astype(np.float64))
    # mantissa in [1/2, 1): how many of 2 ** (-15/16) … 2 ** (-1/16), 1/2 it reaches
    above = np.searchsorted(roots()[:0:-1] / (1 << _ROOTS), mantissa, side="right")
    return PER_OCTAVE * (exponent.astype(np.int64) - 1) + above
