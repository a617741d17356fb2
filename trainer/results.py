"""What each stage returns, as it stands in its result.json. Pure data."""

from trainer.specs.base import spec


@spec
class Totals:
    """Sums over scored predictions: what bits per byte is made of."""

    nats: float
    tokens: int
    bytes: int


@spec
class Score:
    """A scored text. val_loss is in nats per token; eval_clock_s excludes loading and includes
    the attempts that it goes on from."""

    val_bpb: float
    val_loss: float
    tokens: int
    bytes: int
    eval_clock_s: float


@spec
class TrainResult:
    """A finished training. Clocks are the slowest rank's seconds by phase."""

    steps: int
    steps_computed: int
    """Steps that this process ran itself: fewer than `steps` after a resume, or from a trunk."""
    num_params: int
    tokens: int
    world_size: int
    train_clock_s: float
    clock_s: dict[str, float]
    final_train_loss: float
    untrained_val_bpb: float
    entries: tuple[str, ...]
    """What the bank holds: raw, ema-<decay>, swa."""
    parity_entry: str
    parity_bpb: float
    """The trainer's own end-of-run score of `parity_entry`, blocks without overlap."""
    parity_tolerance: float
    qat_start_step: int | None = None
    """Steps done when fake quantization came on: 0 without a start, None when it never did."""


@spec
class StateResult:
    """What a trunk left where trainings depart from it. Clocks count from step 0, as TrainResult's
    do."""

    step: int
    """Steps done."""
    steps_computed: int
    """Steps that this process ran since the trunk's previous state, or since it began."""
    train_clock_s: float
    clock_s: dict[str, float]


@spec
class Rule:
    """One audit rule's verdict. `contested`: it passes, but by one reading of the rules only."""

    id: str
    verdict: str  # pass | fail | not checked
    detail: str
    source: str
    contested: bool = False


@spec
class ParityResult:
    """A bank entry scored again by a fresh process. A failed rule quarantines the bank."""

    fresh_bpb: float
    rule: Rule


@spec
class HessiansResult:
    """The Hessians of a bank entry, and the seconds that collecting them took."""

    names: tuple[str, ...]
    tokens: int
    clock_s: float


@spec
class ArtifactResult:
    """A written artifact, measured on disk. `calibration`: which text its Hessians, if it has any,
    were collected on, `train` or `generated`."""

    entry: str
    num_params: int
    artifact_bytes: int
    weights_bytes: int
    code_bytes: int
    forecast_bytes: int
    weights_sha256: str
    finalize_clock_s: float
    calibration: str | None = None
    calibration_clock_s: float | None = None


@spec
class RankResult:
    """An artifact scored on the held-out training shards, which no final may be judged by: what
    finals are ranked by before the best of them meet validation."""

    entry: str
    num_params: int
    artifact_bytes: int
    weights_bytes: int
    code_bytes: int
    forecast_bytes: int
    weights_sha256: str
    finalize_clock_s: float
    holdout_bpb: float
    holdout_loss: float
    """In nats per token."""
    tokens: int
    bytes: int
    eval_clock_s: float
    calibration: str | None = None
    calibration_clock_s: float | None = None


@spec
class FinalResult:
    """A finalized and scored artifact."""

    entry: str
    num_params: int
    artifact_bytes: int
    weights_bytes: int
    code_bytes: int
    forecast_bytes: int
    weights_sha256: str
    finalize_clock_s: float
    score: Score
    audit: tuple[Rule, ...]
    calibration: str | None = None
    calibration_clock_s: float | None = None
