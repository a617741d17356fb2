"""Results of one configuration over its seeds, and what may be set against what. Pure.

bits per byte = nats / ln 2 · tokens / bytes: the factor between the two units comes from the text
that was scored, never from a table.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import log

from trainer.errors import UsageError


@dataclass(frozen=True, slots=True)
class ScoredText:
    """How many tokens were predicted, and how many bytes they stand for.

    within: the fraction by which published totals may be off; 0 for our own counts.
    """

    tokens: int
    bytes: int
    within: float = 0.0
    tokenizer: str | None = None

    @property
    def bpb_per_nat(self) -> float:
        """Bits per byte that one nat per token amounts to on this text."""
        return self.tokens / (self.bytes * log(2))


@dataclass(frozen=True, slots=True)
class SeedResult:
    """One scored run. `training` is the id of its training, None where it was not ours."""

    seed: int
    bpb: float
    training: str | None = None
    configuration: str | None = None


@dataclass(frozen=True)
class Sample:
    """What a comparison is made of: one configuration's results in bits per byte.

    published_mean stands in where no per-seed value is known. registered: the seeds that were
    written down before anything ran, None where nobody says. chosen_among: of how many
    configurations this one was picked by these very results.
    """

    name: str
    text: ScoredText
    results: tuple[SeedResult, ...] = ()
    published_mean: float | None = None
    registered: tuple[int, ...] | None = None
    chosen_among: int = 1
    remarks: tuple[str, ...] = ()
    source: str | None = None

    @cached_property
    def values(self) -> tuple[float, ...]:
        """Bits per byte, in the order of the results."""
        return tuple(result.bpb for result in self.results)

    @cached_property
    def mean(self) -> float:
        """The mean of the results in bits per byte, or the published one."""
        if self.published_mean is not None:
            return self.published_mean
        return statistics.fmean(self.values)

    @property
    def sd(self) -> float | None:
        """Standard deviation over the seeds in bits per byte, None below two of them."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def by_seed(self) -> dict[int, SeedResult] | None:
        """The results by seed; None where a seed was run more than once."""
        found = {result.seed: result for result in self.results}
        return found if len(found) == len(self.results) else None


def check_sample(sample: Sample) -> None:
    """Raise UsageError for a sample that was picked over: a registered seed that is missing, one
    that was not registered, or runs of several configurations under one name."""
    configurations = {result.configuration for result in sample.results}
    if len(configurations) > 1:
        odd = ", ".join(sorted(str(name) for name in configurations))
        raise UsageError(
            f"{sample.name}: its results come from several configurations ({odd}); compare one at "
            "a time"
        )
    if sample.registered is None:
        return
    ran = {result.seed for result in sample.results}
    dropped = [seed for seed in sample.registered if seed not in ran]
    if dropped:
        raise UsageError(
            f"{sample.name}: {len(ran)} of {len(sample.registered)} registered seeds have a "
            f"result; missing: {_listed(dropped)}; all registered seeds enter the test"
        )
    extra = sorted(ran - set(sample.registered))
    if extra:
        raise UsageError(
            f"{sample.name}: seeds {_listed(extra)} were not registered; registered are "
            f"{_listed(sample.registered)}"
        )


def same_tokens(new: Sample, old: Sample) -> bool:
    """Whether a nat per token means the same in both; bits per byte may be compared even if not.

    Raises UsageError where the scored bytes differ: then the texts do, and nothing is comparable.
    """
    within = max(new.text.within, old.text.within)
    if not _close(new.text.bytes, old.text.bytes, within):
        raise UsageError(
            f"{new.name} and {old.name} were scored on different texts: {new.text.bytes:,} and "
            f"{old.text.bytes:,} bytes; score both on the same split, whole"
        )
    tokenizers = {new.text.tokenizer, old.text.tokenizer} - {None}
    return len(tokenizers) < 2 and _close(new.text.tokens, old.text.tokens, within)


def _close(first: int, second: int, within: float) -> bool:
    return abs(first - second) <= within * max(first, second)


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))
