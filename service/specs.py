"""What a sweep file may say: its fields, their defaults and their own rules.

`sweep` reads a file into these and checks what only the recipe, the space and the machine can
decide. `space`, `overrides` and `derived` are mappings by nature, which is why SweepSpec is the
one spec that holds dictionaries.
"""

import re
from typing import Any, Literal

from trainer.protocol import ARTIFACT_BYTES_CAP
from trainer.specs.base import require, require_fraction, require_positive, spec
from trainer.specs.recipe import DataSpec
from tune_spaces.axes import Axis

Overrides = dict[str, Any]


@spec
class Asha:
    """Asynchronous successive halving: at each rung a training goes on only if its val bpb is
    among the best 1/`reduction` of those that have reached it.

    Rungs stand at `first_step`, then each `reduction` times the last. Source: arXiv 1810.05934.
    """

    first_step: int
    kind: Literal["asha"] = "asha"
    reduction: int = 3

    def __post_init__(self) -> None:
        require_positive(first_step=self.first_step)
        require(self.reduction >= 2, f"reduction={self.reduction} must be at least 2")


@spec
class ReferenceCurve:
    """Stop a training whose val bpb lies more than `margin_bpb` over a reference training's at the
    same step, from `first_step` on. `training` is the reference's id in the store."""

    training: str
    kind: Literal["reference"] = "reference"
    margin_bpb: float = 0.01
    first_step: int = 1

    def __post_init__(self) -> None:
        require(self.margin_bpb >= 0, f"margin_bpb={self.margin_bpb} is below 0")
        require_positive(first_step=self.first_step)


@spec
class TrainSearch:
    """How the train axes are searched. `num` is how many points `random` and `tpe` try.

    `startup` random points precede a TPE's own. `stop` ends trainings early, by agreement.
    """

    method: Literal["grid", "random", "tpe"] = "grid"
    num: int | None = None
    seed: int = 0
    startup: int = 10
    stop: Asha | ReferenceCurve | None = None

    def __post_init__(self) -> None:
        require_positive(num=self.num, startup=self.startup)
        require((self.method == "grid") == (self.num is None), "num goes with random and tpe")
        require(self.seed >= 0, f"seed={self.seed} is below 0")


@spec
class FinalSearch:
    """How the bank, final and eval axes are searched; `per_bank` points for each training.

    rank_on `holdout`: every point is scored on the dataset's held-out training shards first, and
    only the best `top` of the sweep on validation. `fit`: a point over the byte cap is tried
    again, its clips and bits chosen so that the artifact fits.
    """

    method: Literal["grid", "random", "tpe"] = "grid"
    per_bank: int | None = None
    seed: int = 0
    startup: int = 10
    rank_on: Literal["validation", "holdout"] = "validation"
    top: int | None = None
    fit: bool = False

    def __post_init__(self) -> None:
        require_positive(per_bank=self.per_bank, startup=self.startup, top=self.top)
        require(
            (self.method == "grid") == (self.per_bank is None), "per_bank goes with random and tpe"
        )
        require(self.seed >= 0, f"seed={self.seed} is below 0")
        require(
            (self.rank_on == "holdout") == (self.top is not None),
            "top goes with rank_on: holdout",
        )


@spec
class Confirm:
    """How many of the best finals are trained again with the seeds of `seeds.confirm`."""

    top: int = 1

    def __post_init__(self) -> None:
        require_positive(top=self.top)


@spec
class Search:
    """Both searches, and what of them is confirmed."""

    train: TrainSearch = TrainSearch()
    final: FinalSearch = FinalSearch()
    confirm: Confirm = Confirm()


@spec
class Objective:
    """What `best` means."""

    metric: Literal["val_bpb"] = "val_bpb"
    goal: Literal["minimize"] = "minimize"


@spec
class Seeds:
    """Every train point is trained once for each of `search`; the best finals once for each of
    `confirm`, from step 0 and never stopped early. Written down before anything runs."""

    search: tuple[int, ...] = (1337,)
    confirm: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require(len(self.search) > 0, "search is empty")
        for name, seeds in (("search", self.search), ("confirm", self.confirm)):
            require(len(set(seeds)) == len(seeds), f"{name} has a repeat")
            require(
                min(seeds, default=0) >= 0, f"{name} has a seed below 0: {min(seeds, default=0)}"
            )


@spec
class Resources:
    """One training's gang, and how long it may wait for its place.

    gang `warm`: one group of workers takes the sweep's trainings one after another; `fresh`: each
    training starts a group of its own.
    """

    workers: int = 1
    cpus_per_worker: int = 1
    gpus_per_worker: int = 0
    placement: Literal["STRICT_PACK", "PACK", "SPREAD", "STRICT_SPREAD"] = "STRICT_PACK"
    start_timeout_s: float = 300.0
    gang: Literal["warm", "fresh"] = "warm"

    def __post_init__(self) -> None:
        require_positive(
            workers=self.workers,
            cpus_per_worker=self.cpus_per_worker,
            start_timeout_s=self.start_timeout_s,
        )
        require(self.gpus_per_worker in (0, 1), f"gpus_per_worker={self.gpus_per_worker}: 0 or 1")

    def worker(self) -> dict[str, float]:
        """What Ray reserves for one worker."""
        gpu = {"GPU": float(self.gpus_per_worker)} if self.gpus_per_worker else {}
        return {"CPU": float(self.cpus_per_worker), **gpu}


@spec
class Limits:
    """How much runs at once, how often a lost worker is forgiven, and after how many failed stages
    nothing more is started."""

    max_concurrent: int | None = None
    infra_retries: int = 2
    max_failed: int | None = None

    def __post_init__(self) -> None:
        require_positive(max_concurrent=self.max_concurrent, max_failed=self.max_failed)
        require(self.infra_retries >= 0, f"infra_retries={self.infra_retries} is below 0")


@spec
class Budget:
    """What a sweep may spend, over all of its runs. Counted before every launch; what is under
    way when it is used up is stopped.

    A GPU-hour is an hour of one worker of a stage, on a CPU too, so that a rehearsal spends like
    the real thing. `deadline_hours` count from the sweep's first start.
    """

    gpu_hours: float | None = None
    usd: float | None = None
    usd_per_gpu_hour: float | None = None
    deadline_hours: float | None = None
    reserve_for_confirm: bool = True

    def __post_init__(self) -> None:
        require_positive(
            gpu_hours=self.gpu_hours,
            usd=self.usd,
            usd_per_gpu_hour=self.usd_per_gpu_hour,
            deadline_hours=self.deadline_hours,
        )
        require(
            self.usd is None or self.usd_per_gpu_hour is not None,
            f"usd={self.usd} needs usd_per_gpu_hour",
        )
        limits = (self.gpu_hours, self.usd, self.deadline_hours)
        require(any(limits), "give gpu_hours, usd or deadline_hours")


@spec
class Require:
    """What must be there before anything is spent; `doctor` checks the same.

    gpu: a part of the device's name, such as H100. free_disk_gb: where the store lies.
    """

    compressor: Literal["zstd", "brotli", "lzma", "zlib", "range"] | None = None
    attention: Literal["flash"] | None = None
    gpu: str | None = None
    free_disk_gb: float | None = None

    def __post_init__(self) -> None:
        require_positive(free_disk_gb=self.free_disk_gb)


@spec
class Gate:
    """The comparison that the confirmed finals must pass.

    baseline: a file of per-seed values, a shipped one's name, or another sweep. mode `strict`: a
    gain of at least `min_gain_nats` per token at p < `alpha`; `frontier`: any gain at p < 0.25;
    `systems`: no loss beyond the noise, for work on speed alone. Source: techniques 1.8.
    """

    baseline: str
    mode: Literal["strict", "frontier", "systems"] = "strict"
    min_gain_nats: float = 0.005
    alpha: float = 0.01

    def __post_init__(self) -> None:
        require(self.min_gain_nats >= 0, f"min_gain_nats={self.min_gain_nats} is below 0")
        require_fraction(alpha=self.alpha)
        is_default = (self.min_gain_nats, self.alpha) == (0.005, 0.01)
        require(
            self.mode == "strict" or is_default,
            f"mode={self.mode} has its own level: min_gain_nats and alpha go with strict",
        )


@spec
class SweepSpec:
    """A sweep file.

    `derived` sets a knob from others by an expression; `where` lists expressions that every point
    must satisfy. `clocks` names a policy file that says which phases the clocks count.
    """

    name: str
    recipe: str
    version: Literal[1] = 1
    overrides: Overrides = None  # type: ignore[assignment]  # a mapping; {} when absent
    space: dict[str, Axis] = None  # type: ignore[assignment]
    derived: dict[str, str] = None  # type: ignore[assignment]
    where: tuple[str, ...] = ()
    search: Search = Search()
    objective: Objective = Objective()
    constraints: tuple[str, ...] = (f"artifact_bytes <= {ARTIFACT_BYTES_CAP}", "audit == pass")
    seeds: Seeds = Seeds()
    resources: Resources = Resources()
    limits: Limits = Limits()
    budget: Budget | None = None
    require: Require | None = None
    gate: Gate | None = None
    clocks: str | None = None
    data: DataSpec | None = None

    def __post_init__(self) -> None:
        require(
            re.fullmatch(r"[a-z0-9][a-z0-9-]{0,62}", self.name) is not None,
            f"name={self.name!r} must be lower-case letters, digits and dashes, at most 63",
        )
        require(
            self.gate is None or len(self.seeds.confirm) > 0,
            "gate judges the confirmed finals: list seeds.confirm",
        )
