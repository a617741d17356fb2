"""Training: how long, how fast, with which optimizers, and which averages are kept."""

from typing import Literal

from trainer.specs.base import require, require_fraction, require_positive, spec
from trainer.specs.documents import Documents
from trainer.specs.kernels import APART, AttentionKernel


@spec
class Schedule:
    """Constant learning rate, then a linear warmdown over the last `warmdown_iters` steps.

    basis `steps` counts iterations; `wallclock` warms down when the time left of `max_clock_s`
    is what `warmdown_iters` steps would take at the mean pace so far. `warmdown_fraction` gives
    the warmdown as a share of the run, of its iterations or of its clock; warmdown_iters is 0 then.
    """

    basis: Literal["steps", "wallclock"] = "steps"
    warmdown_iters: int = 1200
    warmdown_fraction: float | None = None
    min_lr_scale: float = 0.0

    def __post_init__(self) -> None:
        iters, fraction = self.warmdown_iters, self.warmdown_fraction
        require(iters >= 0, f"warmdown_iters={iters} is below 0")
        require(
            iters == 0 or fraction is None,
            f"warmdown_iters={iters} beside warmdown_fraction={fraction}: set one to 0 or null",
        )
        require(
            fraction is None or 0.0 < fraction <= 1.0,
            f"warmdown_fraction={fraction} is outside (0, 1]",
        )
        require_fraction(min_lr_scale=self.min_lr_scale)

    def goes_below(self, scale: float) -> bool:
        """Whether the lr scale ever falls below `scale`."""
        has_warmdown = self.warmdown_iters > 0 or self.warmdown_fraction is not None
        return (has_warmdown or scale > 1.0) and self.min_lr_scale < scale


@spec
class Late:
    """When something that acts late in a training begins.

    `lr_scale`: once the lr scale is below it. `progress`: once that share of the run is done.
    """

    lr_scale: float | None = None
    progress: float | None = None

    def __post_init__(self) -> None:
        require(
            (self.lr_scale is None) != (self.progress is None),
            "give either lr_scale or progress",
        )
        require_positive(lr_scale=self.lr_scale)
        require_fraction(progress=self.progress)


@spec
class Muon:
    """The optimizer of the matrices."""

    lr: float = 0.04
    momentum: float = 0.95
    momentum_start: float = 0.85
    momentum_warmup_steps: int = 500
    coefficients: Literal["quintic", "polar_express"] = "quintic"
    ns_steps: int = 5
    ns_dtype: Literal["float32", "bfloat16"] | None = None
    """Of the Newton–Schulz products; absent: bfloat16 on a CUDA device, float32 on a CPU."""
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        require_positive(lr=self.lr, ns_steps=self.ns_steps)
        require(
            self.coefficients == "quintic" or self.ns_steps <= 5,
            f"ns_steps={self.ns_steps}: polar_express has coefficients for 5 steps",
        )
        require_fraction(momentum=self.momentum, momentum_start=self.momentum_start)
        require(self.momentum_warmup_steps >= 0, "momentum_warmup_steps is below 0")
        require(self.weight_decay >= 0, f"weight_decay={self.weight_decay} is below 0")


@spec
class AdamW:
    """The optimizer of the tables, of the scalars and vectors, or of an untied head."""

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
    head: AdamW = AdamW(lr=0.008)
    grad_clip: float | None = None

    def __post_init__(self) -> None:
        require_positive(grad_clip=self.grad_clip)


@spec
class Swa:
    """The mean of snapshots taken every `every` steps from `start` on."""

    start: Late = Late(lr_scale=0.4)
    every: int = 50

    def __post_init__(self) -> None:
        require_positive(every=self.every)


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
    ema_every: int = 1
    """Steps between updates of the shadows, each then by decay ** ema_every."""
    swa: Swa | None = None

    def __post_init__(self) -> None:
        require_positive(ema_every=self.ema_every)
        for decay in self.decays():
            require(0.0 < decay < 1.0, f"an EMA decay of {decay} is outside (0, 1)")

    def decays(self) -> tuple[float, ...]:
        """Every decay the training keeps, ascending and without repeats."""
        chosen = () if self.ema_decay is None else (self.ema_decay,)
        return tuple(sorted({*self.ema_bank, *chosen}))


@spec
class Qat:
    """Fake quantization of the matrices in training: bits by class, None leaves a class alone.

    scale `row` or `tensor`: what the largest magnitude is taken over. Without `start` it acts
    from step 0; with it, a tensor switch flips once during the training.
    """

    mlp_bits: int | None = None
    attention_bits: int | None = None
    other_bits: int | None = None
    """Of every other matrix: projections of hashed and value embeddings, heads."""
    scale: Literal["row", "tensor"] = "row"
    scale_floor: float = 1e-12
    start: Late | None = None

    def __post_init__(self) -> None:
        widths = {
            "mlp_bits": self.mlp_bits,
            "attention_bits": self.attention_bits,
            "other_bits": self.other_bits,
        }
        require(any(widths.values()), f"give bits to one of {', '.join(widths)}")
        for name, bits in widths.items():
            require(bits is None or 2 <= bits <= 8, f"{name}={bits} is outside 2..8")
        require_positive(scale_floor=self.scale_floor)
        start = self.start
        require(
            start is None or (start.progress != 0.0 and (start.lr_scale or 0.0) <= 1.0),
            "start has come at step 0 already: leave it out to act from there",
        )


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
    attention: AttentionKernel | None = None
    """Which implementation computes the attention; torch's choice when absent."""
    fused: bool = False
    """Whether what lies between the matrices is computed by our own kernels, in one pass each.
    Rounds less often than the plain code; on a CPU they are the plain code. What has none stays
    plain: gated MLPs, other GPUs' MLPs than Hopper's, a loss over more than 16,384 tokens."""
    documents: Documents | None = None
    """Keeps attention inside each document of a row; a smear or hashed n-grams may still look a
    token back across its `bos`. Validation and parity read across, as ever: the score that
    matches is that of `evaluate.documents`."""
    order: Literal["sequential", "shuffled"] = "sequential"
    schedule: Schedule = Schedule()
    optimizer: Optimizer = Optimizer()
    averages: Averages = Averages()
    qat: Qat | None = None

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
        kernel = self.attention
        is_torch = kernel is None or "torch" in (kernel.name, kernel.substitute)
        require(
            is_torch or self.dtype == "bfloat16",
            f"attention.name={kernel and kernel.name} needs dtype=bfloat16",
        )
        for field in ("name", "substitute") if kernel and self.documents else ():
            name = getattr(kernel, field)
            require(
                name is None or name in APART,
                f"attention.{field}={name} attends across documents; beside documents use "
                f"{', '.join(APART[:-1])} or {APART[-1]}",
            )
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
        averages = self.averages
        require(
            not averages.decays() or averages.ema_every <= self.iterations,
            f"averages.ema_every={averages.ema_every} exceeds iterations={self.iterations}: "
            "no shadow would ever move",
        )
        warmdown = self.schedule.warmdown_iters
        require(
            self.schedule.basis != "steps" or warmdown <= self.iterations,
            f"schedule.warmdown_iters={warmdown} exceeds iterations={self.iterations}",
        )
        swa = self.averages.swa
        for path, start in (
            ("averages.swa", swa and swa.start),
            ("qat", self.qat and self.qat.start),
        ):
            scale = start.lr_scale if start else None
            require(
                scale is None or self.schedule.goes_below(scale),
                f"{path}.start.lr_scale={scale} is never reached: the schedule has no warmdown "
                "below it",
            )
