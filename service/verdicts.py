"""Is it better, or was it luck? One-sided t-tests and the three modes of the gate. Pure.

A gain is how much lower the new mean is. The null hypothesis is always "the mean gain is at most
so much"; p is the chance of such results if it were true. Source: techniques 1.8; Welch,
Biometrika 34 (1947).
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, Literal

from scipy.special import stdtr, stdtrit

from service.samples import Sample, SeedResult, check_sample, same_tokens
from trainer.errors import UsageError

Mode = Literal["strict", "frontier", "systems"]
Kind = Literal["welch", "paired", "one-sample"]

# The level at which the leaderboard's later rows were accepted (techniques 1.8).
FRONTIER_ALPHA = 0.25
MIN_SEEDS = 2  # one tells no spread
STRICT_SEEDS = 3
INTERVAL = 0.95
# Spreads below this share of the values are rounding, not noise.
_ROUNDING = 1e-12


@dataclass(frozen=True, slots=True)
class TTest:
    """A one-sided t-test of "the mean gain is at most `min_gain`", in the unit of its values.

    n: how many new and old values; old is 0 where only a mean was published. interval: the
    two-sided 95 % confidence interval of the gain.
    """

    kind: Kind
    n: tuple[int, int]
    gain: float
    min_gain: float
    t: float
    df: float
    p: float
    interval: tuple[float, float]


def welch(new: Sequence[float], old: Sequence[float], min_gain: float = 0.0) -> TTest:
    """Test two independent samples of unequal variance, at least two values each."""
    parts = [statistics.variance(values) / len(values) for values in (new, old)]
    gain = statistics.fmean(old) - statistics.fmean(new)
    error = sqrt(sum(parts))
    _require_spread(error, new, old)
    df = sum(parts) ** 2 / sum(
        part**2 / (len(values) - 1) for part, values in zip(parts, (new, old), strict=True)
    )
    return _tested("welch", (len(new), len(old)), gain, min_gain, error, df)


def paired(new: Sequence[float], old: Sequence[float], min_gain: float = 0.0) -> TTest:
    """Test values that belong together pair by pair, at least two pairs."""
    gains = [before - after for after, before in zip(new, old, strict=True)]
    error = statistics.stdev(gains) / sqrt(len(gains))
    _require_spread(error, new, old)
    n = (len(new), len(old))
    return _tested("paired", n, statistics.fmean(gains), min_gain, error, len(gains) - 1.0)


def one_sample(new: Sequence[float], old_mean: float, min_gain: float = 0.0) -> TTest:
    """Test at least two values against a mean that is taken as exact."""
    error = statistics.stdev(new) / sqrt(len(new))
    _require_spread(error, new, [old_mean])
    gain = old_mean - statistics.fmean(new)
    return _tested("one-sample", (len(new), 0), gain, min_gain, error, len(new) - 1.0)


def _tested(
    kind: Kind, n: tuple[int, int], gain: float, min_gain: float, error: float, df: float
) -> TTest:
    t = (gain - min_gain) / error
    reach = float(stdtrit(df, (1 + INTERVAL) / 2)) * error
    interval = (gain - reach, gain + reach)
    return TTest(kind, n, gain, min_gain, t, df, float(stdtr(df, -t)), interval)


def _require_spread(error: float, *samples: Sequence[float]) -> None:
    largest = max(abs(value) for values in samples for value in values)
    if error <= _ROUNDING * largest:
        raise UsageError(
            "no spread over the seeds, to the last digit: the seed reaches nothing, or one run is "
            "given twice; a test needs results that differ by chance"
        )


@dataclass(frozen=True, slots=True)
class Contrast:
    """Two samples set against each other, in nats per token where that means the same in both,
    in bits per byte elsewhere.

    test is None where there are too few results for one, which `reason` says. also: the other
    test that the results allow; it decides nothing.
    """

    new: Sample
    old: Sample
    unit: Literal["nats", "bpb"]
    bpb_per_unit: float
    test: TTest | None
    also: TTest | None
    reason: str | None

    @property
    def gain_bpb(self) -> float:
        return self.old.mean - self.new.mean

    @property
    def shares_banks(self) -> bool:
        """Whether each pair of results comes from one training."""
        pairs = _pairs(self.new, self.old) or []
        return bool(pairs) and all(
            new.training is not None and new.training == old.training for new, old in pairs
        )


def contrast(new: Sample, old: Sample, min_gain_nats: float = 0.0) -> Contrast:
    """Compare by the one test that the kind of the results prescribes, whatever they are.

    Paired where both sides are ours and have the same seeds, one-sample where the old side is a
    published mean, Welch's elsewhere. Raises UsageError for samples that were picked over, for
    different texts, and for a minimum in nats per token across tokenizers.
    """
    for sample in (new, old):
        check_sample(sample)
    is_same = same_tokens(new, old)
    if not is_same and min_gain_nats != 0.0:
        raise UsageError(
            f"{new.name} and {old.name}: a nat per token means something else in each, as their "
            f"tokens differ ({new.text.tokens:,} and {old.text.tokens:,}); ask for any gain "
            "instead of one in nats"
        )
    exact = min(new.text, old.text, key=lambda text: text.within)
    factor = exact.bpb_per_nat if is_same else 1.0
    test, also, reason = _tests(new, old, factor, min_gain_nats)
    unit = "nats" if is_same else "bpb"
    return Contrast(new, old, unit, factor, test, also, reason)


def _tests(
    new: Sample, old: Sample, factor: float, min_gain: float
) -> tuple[TTest | None, TTest | None, str | None]:
    """The test that decides and the other one, or why there is none."""
    after, before = ([value / factor for value in side.values] for side in (new, old))
    if len(after) < 2:
        return None, None, f"{new.name} has {_count(after)}: nothing tells its spread"
    if not before:
        return one_sample(after, old.mean / factor, min_gain), None, None
    if len(before) < 2:
        return None, None, f"{old.name} has {_count(before)}: nothing tells its spread"
    pairs = _pairs(new, old)
    if pairs is None:
        return welch(after, before, min_gain), None, None
    firsts, seconds = (
        [result.bpb / factor for result in side] for side in zip(*pairs, strict=True)
    )
    if all(one.training and other.training for one, other in pairs):
        return paired(firsts, seconds, min_gain), _if_any(welch, after, before, min_gain), None
    return welch(after, before, min_gain), _if_any(paired, firsts, seconds, min_gain), None


def _if_any(
    test: Callable[..., TTest], new: Sequence[float], old: Sequence[float], min_gain: float
) -> TTest | None:
    """The test that decides nothing, and so refuses nothing: None where it finds no spread."""
    try:
        return test(new, old, min_gain)
    except UsageError:
        return None


def _count(values: Sequence[float]) -> str:
    return "one result" if values else "no result by seed"


def _pairs(new: Sample, old: Sample) -> list[tuple[SeedResult, SeedResult]] | None:
    """The results of equal seeds, None unless every seed of one side is in the other."""
    first, second = new.by_seed(), old.by_seed()
    if first is None or second is None or first.keys() != second.keys():
        return None
    return [(first[seed], second[seed]) for seed in sorted(first)]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate says. level: what p is held against, shared among the configurations that
    the new one was chosen from (Bonferroni)."""

    passed: bool
    reason: str
    mode: Mode
    level: float
    contrast: Contrast
    test: TTest


def decide(
    new: Sample, old: Sample, mode: Mode, min_gain_nats: float = 0.005, alpha: float = 0.01
) -> Verdict:
    """Judge a gain; UsageError where the two cannot be judged.

    strict: at least `min_gain_nats` per token at p < `alpha`, by three seeds or by pairs.
    frontier: any gain at p < 0.25. systems: no loss that frontier would call a gain.
    """
    least, level = level_of("strict" if mode == "strict" else "frontier", min_gain_nats, alpha)
    held = contrast(new, old, least)
    test = held.test
    if test is None:
        raise UsageError(f"{held.reason}; give it more seeds")
    if len(new.values) < least_seeds(mode, paired=test.kind == "paired"):
        raise UsageError(
            f"{new.name}: {len(new.values)} seeds; mode strict asks for {STRICT_SEEDS}, or for the "
            "same seeds on both sides"
        )
    if mode == "systems":
        passed, reason = _no_loss(test)
        return Verdict(passed, reason, mode, level, held, test)
    level /= new.chosen_among
    passed = test.p < level
    asked = f"at least {test.min_gain:g}" if test.min_gain else "any"
    reason = (
        f"gain {test.gain:+.6f} {held.unit}, {asked} asked: p={test.p:.4g} "
        f"{'<' if passed else '>='} {level:.4g}"
    )
    return Verdict(passed, reason, mode, level, held, test)


def level_of(
    mode: Literal["strict", "frontier"], min_gain_nats: float = 0.005, alpha: float = 0.01
) -> tuple[float, float]:
    """The gain in nats per token that a mode asks for, and the level that p is held against."""
    return (min_gain_nats, alpha) if mode == "strict" else (0.0, FRONTIER_ALPHA)


def least_seeds(mode: Mode, *, paired: bool) -> int:
    """The fewest results of the new side that a mode judges, however clear they are."""
    return STRICT_SEEDS if mode == "strict" and not paired else MIN_SEEDS


def _no_loss(test: TTest) -> tuple[bool, str]:
    """Whether the opposite of the gain would not pass as a gain at the frontier's level."""
    loss = float(stdtr(test.df, test.t))
    passed = loss >= FRONTIER_ALPHA
    return passed, (
        f"{'no loss beyond the noise' if passed else 'a loss beyond the noise'}: "
        f"p(loss)={loss:.4g} {'>=' if passed else '<'} {FRONTIER_ALPHA:g}"
    )


def side_document(sample: Sample) -> dict[str, Any]:
    """A sample as plain data; nats are per token of its own text."""
    factor = sample.text.bpb_per_nat
    return {
        "name": sample.name,
        "n": len(sample.values),
        "mean_bpb": sample.mean,
        "sd_bpb": sample.sd,
        "mean_nats": sample.mean / factor,
        "sd_nats": None if sample.sd is None else sample.sd / factor,
        "bpb_per_nat": factor,
        "seeds": [{"seed": result.seed, "bpb": result.bpb} for result in sample.results],
        "chosen_among": sample.chosen_among,
        "remarks": list(sample.remarks),
        "source": sample.source,
    }


def contrast_document(held: Contrast) -> dict[str, Any]:
    """A comparison as plain data: the gain in both units, the test, and the other test."""
    in_nats = held.bpb_per_unit if held.unit == "nats" else None
    document: dict[str, Any] = {
        "new": held.new.name,
        "old": held.old.name,
        "gain_bpb": held.gain_bpb,
        "gain_mbpb": held.gain_bpb * 1_000,
        "gain_nats": None if in_nats is None else held.gain_bpb / in_nats,
        "bpb_per_nat": in_nats,
        "shares_banks": held.shares_banks,
        "no_test": held.reason,
    }
    if held.test is not None:
        document |= _test_document(held.test, held)
    if held.also is not None:
        document["also"] = _test_document(held.also, held)
    return document


def _test_document(test: TTest, held: Contrast) -> dict[str, Any]:
    interval_bpb = [end * held.bpb_per_unit for end in test.interval]
    return {
        "test": test.kind,
        "n": list(test.n),
        "t": test.t,
        "df": test.df,
        "p": test.p,
        "interval_bpb": interval_bpb,
        "interval_nats": list(test.interval) if held.unit == "nats" else None,
    }


def verdict_document(verdict: Verdict) -> dict[str, Any]:
    """A verdict as plain data, as it stands in a ledger."""
    held = verdict.contrast
    return {
        "verdict": "passed" if verdict.passed else "not passed",
        "reason": verdict.reason,
        "mode": verdict.mode,
        "level": verdict.level,
        "min_gain_nats": verdict.test.min_gain if held.unit == "nats" else None,
        **contrast_document(held),
        "sides": [side_document(held.new), side_document(held.old)],
    }
