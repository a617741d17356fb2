"""Training: how long, how fast, with which optimizers, and which averages are kept."""

from typing import Literal

from trainer.specs.base import require, require_fraction, require_positive, spec


@spec
class Schedule:
    """Constant learning rate, then a linear warmdown over the last `warmdown_iters` steps.

    basis `steps` counts iterations; `wallclock` warms down when the time left of `max_clock_s`
    is what `warmdown_iters` steps would take at the mean pace so far.
    """

    basis: Literal["steps", "wallclock"] = "steps"
    warmdown_iters: int = 1200
    min_lr_scale: float = 0.0

    def __post_init__(self) -> None:
        require(self.warmdown_iters >= 0, f"warmdown_iters={self.warmdown_iters} is below 0")
        require_fraction(min_lr_scale=self.min_lr_scale)


@spec
class Muon:
    """The optimizer of the matrices."""

    lr: float = 0.04
    momentum: float = 0.95
    momentum_start: float = 0.85
    momentum_warmup_steps: int = 500
    ns_steps: int = 5
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        require_positive(lr=self.lr, ns_steps=self.ns_steps)
        require_fraction(momentum=self.momentum, momentum_start=self.momentum_start)
        require(self.momentum_warmup_steps >= 0, "momentum_warmup_steps is below 0")
        require(self.weight_decay >= 0, f"weight_decay={self.weight_decay} is below 0")


@spec
class AdamW:
    """The optimizer of the embedding table or of the scalars and vectors."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        require_positive(lr=self.lr, eps=self.eps)
        require_fraction(beta1=self.beta1, beta2=self.beta2)
        require(self.weight_decay >= 0, f"weight_decay={self.weight_decay} is below 0")


@spec
class Optimizer:
    """One optimizer per role; every parameter is in exactly one of them."""

    matrix: Muon = Muon()
    embed: AdamW = AdamW(lr=0.05)
    scalar: AdamW = AdamW(lr=0.04)
    grad_clip: float | None = None

    def __post_init__(self) -> None:
        require_positive(grad_clip=self.grad_clip)


@spec
class Swa:
    """The mean of snapshots taken every `every` steps once the lr scale is below `start_scale`."""

    start_scale: float = 0.4
    every: int = 50

    def __post_init__(self) -> None:
        require_positive(start_scale=self.start_scale, every=self.every)


def ema_entry(decay: float) -> str:
    """The bank's name for the shadow of one decay."""
    return f"ema-{decay!r}"


@spec
class Averages:
    """What the bank holds beside the raw weights.

    `ema_decay` is the decay a final takes; `ema_bank` lists further decays to keep. A sweep
    fills `ema_bank` with every decay of its space, so that searching them needs no training.
    """

    ema_decay: float | None = None
    ema_bank: tuple[float, ...] = ()
    swa: Swa | None = None

    def __post_init__(self) -> None:
        for decay in self.decays():
            require(0.0 < decay < 1.0, f"an EMA decay of {decay} is outside (0, 1)")

    def decays(self) -> tuple[float, ...]:
        """Every decay the training keeps, ascending and without repeats."""
        chosen = () if self.ema_decay is None else (self.ema_decay,)
        return tuple(sorted({*self.ema_bank, *chosen}))


@spec
class TrainSpec:
    """One training. Ends after `iterations` steps or, if given, `max_clock_s` on the clock."""

    iterations: int
    batch_tokens: int
    seq_len: int
    micro_batch_tokens: int | None = None
    """Tokens of one forward and backward on one worker; the worker's whole share when absent."""
    max_clock_s: float | None = None
    warmup_steps: int = 0
    """Steps run before the clock and rolled back, so that no graph is built on the clock."""
    seed: int = 1337
    dtype: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    order: Literal["sequential", "shuffled"] = "sequential"
    schedule: Schedule = Schedule()
    optimizer: Optimizer = Optimizer()
    averages: Averages = Averages()

    def __post_init__(self) -> None:
        require_positive(
            iterations=self.iterations,
            batch_tokens=self.batch_tokens,
            seq_len=self.seq_len,
            micro_batch_tokens=self.micro_batch_tokens,
            max_clock_s=self.max_clock_s,
        )
        require(self.warmup_steps >= 0, f"warmup_steps={self.warmup_steps} is below 0")
        require(self.seed >= 0, f"seed={self.seed} is below 0")
        for name in ("batch_tokens", "micro_batch_tokens"):
            tokens = getattr(self, name)
            require(
                tokens is None or tokens % self.seq_len == 0,
                f"{name}={tokens} must be a multiple of seq_len={self.seq_len}",
            )
        require(
            self.schedule.basis == "steps" or self.max_clock_s is not None,
            "schedule.basis=wallclock needs max_clock_s",
        )
        require(
            self.schedule.basis != "steps" or self.schedule.warmdown_iters <= self.iterations,
            f"schedule.warmdown_iters={self.schedule.warmdown_iters} exceeds "
            f"iterations={self.iterations}",
        )
