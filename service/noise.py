"""How far seeds alone move a score, and how many of them it takes to see a gain. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
from scipy.special import chdtri, nctdtr, stdtrit

from service.baselines import NoiseFloor
from trainer.errors import UsageError

INTERVAL = 0.95


def noise_floor(tables: Sequence[np.ndarray], bpb_per_nat: float) -> NoiseFloor:
    """Measure the spread over seeds. tables: one for each set of banks, bpb [points, seeds] of the
    finals that share them, NaN where a point lacks a seed.

    Finals of one bank move together with its seed, so a table counts seeds - 1 degrees of freedom
    however many points it has, and its variance is the mean over those with the most seeds. What
    is left when the point's and the seed's own part are taken away is the noise of a paired
    difference.
    """
    held = [_filled(table, lambda part: (part.shape[1], part.shape[0])) for table in tables]
    held = [table for table in held if table.shape[1] > 1]
    df = sum(table.shape[1] - 1 for table in held)
    if df == 0:
        raise UsageError(
            "no point was scored with two seeds or more: list several under seeds.search or "
            "seeds.confirm, and run the sweep again"
        )
    squares = sum(float(table.var(axis=1, ddof=1).mean()) * (table.shape[1] - 1) for table in held)
    sd = sqrt(squares / df)
    low, high = _sd_interval(sd, df)
    paired_sd, paired_df = _paired([_filled(table, _paired_df) for table in tables])
    return NoiseFloor(
        sd_bpb=sd,
        low_bpb=low,
        high_bpb=high,
        sd_nats=sd / bpb_per_nat,
        low_nats=low / bpb_per_nat,
        high_nats=high / bpb_per_nat,
        df=df,
        num_points=sum(table.shape[0] for table in held),
        paired_sd_bpb=paired_sd,
        paired_sd_nats=None if paired_sd is None else paired_sd / bpb_per_nat,
        paired_df=paired_df,
    )


def _filled(table: np.ndarray, worth: Callable[[np.ndarray], Any]) -> np.ndarray:
    """The part of a table without gaps that is worth most: a point's seeds, and all points that
    have them."""
    has = ~np.isnan(table)
    parts = (table[has[:, seeds].all(axis=1)][:, seeds] for seeds in np.unique(has, axis=0))
    return max(parts, key=worth)


def _sd_interval(sd: float, df: int) -> tuple[float, float]:
    """The 95 % confidence interval of a standard deviation, by the chi-square distribution."""
    upper, lower = ((1 - INTERVAL) / 2, (1 + INTERVAL) / 2)
    return sd * sqrt(df / float(chdtri(df, upper))), sd * sqrt(df / float(chdtri(df, lower)))


def _paired(tables: Sequence[np.ndarray]) -> tuple[float | None, int | None]:
    """Standard deviation of the difference of two finals of one bank, over its seeds."""
    squares, df = 0.0, 0
    for table in tables:
        rest = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
        squares += float((rest**2).sum())
        df += _paired_df(table)
    return (sqrt(2 * squares / df), df) if df else (None, None)


def _paired_df(table: np.ndarray) -> int:
    return (table.shape[0] - 1) * (table.shape[1] - 1)


@dataclass(frozen=True, slots=True)
class SeedPlan:
    """How many seeds a test needs. n: on each side; the old side has its own in a paired test too,
    and runs them only if it has not yet. power: what n reaches."""

    n: int
    power: float


def plan_seeds(
    sd: float,
    gain: float,
    alpha: float,
    power: float,
    *,
    paired: bool = False,
    min_n: int = 2,
    max_n: int = 1_000,
) -> SeedPlan:
    """Find the smallest n from `min_n` on whose one-sided t-test shows a true gain with this power.

    sd: over seeds, or of the paired differences; gain: by which the true one exceeds what is
    tested against, in the same unit. Two samples of n, or n pairs. Noncentral t distribution.
    """
    if gain <= 0:
        raise UsageError(
            f"a true gain that exceeds the asked one by {gain:g} is never shown, however many "
            "seeds; plan for a larger gain"
        )
    if not (0 < alpha < power < 1 and sd > 0):
        raise UsageError(
            f"alpha={alpha:g}, power={power:g}, sd={sd:g}: give 0 < alpha < power < 1 and sd > 0"
        )
    if (reached := _power(max_n, sd, gain, alpha, paired)) < power:
        raise UsageError(
            f"{max_n} seeds reach a power of {reached:.3g} only; the gain is too small for this "
            "noise"
        )
    low, high = min_n - 1, max_n  # fewer than min_n are not asked about, max_n is enough
    while high - low > 1:
        middle = (low + high) // 2
        if _power(middle, sd, gain, alpha, paired) >= power:
            high = middle
        else:
            low = middle
    return SeedPlan(high, _power(high, sd, gain, alpha, paired))


def _power(n: int, sd: float, gain: float, alpha: float, paired: bool) -> float:
    df = n - 1 if paired else 2 * (n - 1)
    error = sd / sqrt(n) if paired else sd * sqrt(2 / n)
    needed = float(stdtrit(df, 1 - alpha))
    return 1 - float(nctdtr(df, gain / error, needed))
