"""The clock ledger: which seconds of a final count on the training and on the evaluation clock.

The policy is a file, clocks.yaml or one that the sweep names, so that a reader can hold each
phase against its reason. Seconds are monotonic, those of the slowest rank, as results have them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from trainer.codec import parse, read_mapping
from trainer.specs.base import require, spec

ClockName = Literal["train", "eval"]


@spec
class Phase:
    """Which clock a phase counts on, and the reason or the source of that."""

    clock: Literal["train", "eval", "none"]
    why: str

    def __post_init__(self) -> None:
        require(self.why.strip() != "", "why is empty; say the reason or the ruling")


@spec
class Phases:
    """Every phase of a training and of its finals; none may be left out.

    hessians: collected on training text; generated_hessians: on the model's own. finalize: from
    the bank entry to the bytes. score: the evaluation with its test-time training.
    """

    setup: Phase
    warmup: Phase
    train: Phase
    validate: Phase
    checkpoint: Phase
    bank: Phase
    hessians: Phase
    generated_hessians: Phase
    finalize: Phase
    score: Phase


@spec
class ClockPolicy:
    """A policy file."""

    phases: Phases
    version: Literal[1] = 1


@dataclass(frozen=True, slots=True)
class Charge:
    """What a final has on both clocks: seconds by clock, then by the phases that make them up."""

    parts: dict[ClockName, dict[str, float]]

    @property
    def train_s(self) -> float:
        return sum(self.parts["train"].values())

    @property
    def eval_s(self) -> float:
        return sum(self.parts["eval"].values())


def load_policy(path: str | None = None) -> ClockPolicy:
    """Read a policy file, the shipped one without a path; UsageError names file and field."""
    shipped = Path(str(files("service"))) / "clocks.yaml"
    place = shipped if path is None else Path(path)
    return parse(ClockPolicy, read_mapping(place), str(place))


def charge(policy: ClockPolicy, training: Mapping[str, Any], final: Mapping[str, Any]) -> Charge:
    """Charge the phases of a training's and a final's result to the clocks they count on.

    `final` may lack what has not happened yet: a ranked one its score, a training all of it.
    """
    seconds = dict(training["clock_s"])
    if "finalize_clock_s" in final:
        seconds["finalize"] = final["finalize_clock_s"]
    if "score" in final:
        seconds["score"] = final["score"]["eval_clock_s"]
    calibration_s = final.get("calibration_clock_s")
    if calibration_s is not None:
        is_generated = final.get("calibration") == "generated"
        seconds["generated_hessians" if is_generated else "hessians"] = calibration_s
    parts: dict[ClockName, dict[str, float]] = {"train": {}, "eval": {}}
    for phase in fields(Phases):
        clock: Literal["train", "eval", "none"] = getattr(policy.phases, phase.name).clock
        if clock != "none" and phase.name in seconds:
            parts[clock][phase.name] = seconds[phase.name]
    return Charge(parts)


def overrun(charged: Charge, limits: Mapping[ClockName, float]) -> str | None:
    """Say by how much a clock is over its limit in seconds, and what it is made of; else None."""
    for clock, limit in limits.items():
        parts = charged.parts[clock]
        value = sum(parts.values())
        if value > limit:
            made_of = " + ".join(f"{name} {_seconds(part)}" for name, part in parts.items())
            return (
                f"{clock}_clock_s {_seconds(value)} > {limit:,.10g}, "
                f"over by {_seconds(value - limit)} ({made_of})"
            )
    return None


def _seconds(value: float) -> str:
    """A tenth of a second will do, unless that is all there is."""
    return f"{value:,.1f}" if value >= 1 else f"{value:.3g}"
