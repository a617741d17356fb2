"""What a new result is held against: per-seed values in a file, or one that ships with Fairway.

`fairway baseline measure` writes such a file of a sweep; the shipped ones hold published seeds
with their source.
"""

from typing import Literal

from service.samples import Sample, ScoredText, SeedResult
from trainer.codec import parse, read_mapping
from trainer.specs.base import require, require_positive, spec
from tune_spaces.catalogue import find, names

KIND = "baselines"


@spec
class BaselineResult:
    """One run's score, in the file's unit. configuration: where it is not the file's own."""

    seed: int
    value: float
    configuration: str | None = None

    def __post_init__(self) -> None:
        require_positive(value=self.value)


@spec
class NoiseFloor:
    """How far seeds alone move a score: standard deviations with 95 % intervals.

    paired: of the difference of two finals of one bank over its seeds. df: degrees of freedom;
    finals of one bank count once.
    """

    sd_bpb: float
    low_bpb: float
    high_bpb: float
    sd_nats: float
    low_nats: float
    high_nats: float
    df: int
    num_points: int
    paired_sd_bpb: float | None = None
    paired_sd_nats: float | None = None
    paired_df: int | None = None


@spec
class Baseline:
    """Results of one configuration over its seeds.

    unit: of the values. tokens, bytes: of the scored text; within: the fraction by which they may
    be off where they were published rounded. mean: stands in where no per-seed value is known.
    registered: the seeds announced beforehand. remarks: what a reader of a verdict must know.
    """

    name: str
    source: str
    tokens: int
    bytes: int
    metric: Literal["val_bpb"] = "val_bpb"
    unit: Literal["bpb", "nats"] = "bpb"
    within: float = 0.0
    tokenizer_sha256: str | None = None
    results: tuple[BaselineResult, ...] = ()
    mean: float | None = None
    registered: tuple[int, ...] | None = None
    remarks: tuple[str, ...] = ()
    noise: NoiseFloor | None = None

    def __post_init__(self) -> None:
        require_positive(tokens=self.tokens, bytes=self.bytes, mean=self.mean)
        require(0 <= self.within < 1, f"within={self.within} must be a fraction from 0 to 1")
        require(
            (len(self.results) > 0) != (self.mean is not None),
            "give results, or the mean where no per-seed value is known",
        )

    def sample(self) -> Sample:
        """The baseline as one side of a comparison, in bits per byte."""
        text = ScoredText(self.tokens, self.bytes, self.within, self.tokenizer_sha256)
        factor = text.bpb_per_nat if self.unit == "nats" else 1.0
        return Sample(
            name=self.name,
            text=text,
            results=tuple(
                SeedResult(result.seed, result.value * factor, configuration=result.configuration)
                for result in self.results
            ),
            published_mean=None if self.mean is None else self.mean * factor,
            registered=self.registered,
            remarks=self.remarks,
            source=self.source,
        )


def shipped() -> list[str]:
    """Names of the baselines that ship with Fairway."""
    return names(KIND)


def read_baseline(name_or_path: str) -> Baseline:
    """Read a shipped baseline by name, or a file; UsageError names what is wrong in it."""
    path = find(KIND, name_or_path, "baseline")
    return parse(Baseline, read_mapping(path), str(path))
