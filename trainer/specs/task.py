"""What one stage is told: the part of a recipe that it reads, and nothing else."""

from dataclasses import replace

from trainer.specs.base import require, require_positive, spec
from trainer.specs.evaluate import EvaluateSpec
from trainer.specs.final import Bits, FinalSpec, Gptq, Quantize
from trainer.specs.model import ModelSpec
from trainer.specs.recipe import Observe, Recipe
from trainer.specs.train import Late, Schedule, TrainSpec, ema_entry


@spec
class TrainTask:
    """One training. `parity_window` is the block length of its own end-of-run score."""

    model: ModelSpec
    train: TrainSpec
    parity_window: int
    observe: Observe = Observe()

    def __post_init__(self) -> None:
        require_positive(parity_window=self.parity_window)
        documents, vocab_size = self.train.documents, self.model.vocab_size
        require(
            documents is None or documents.bos < vocab_size,
            f"train.documents.bos={documents and documents.bos} is no token of "
            f"model.vocab_size={vocab_size}",
        )


@spec
class Departure:
    """Where a training leaves the trunk that it shares with others.

    By steps: before step `step` (from 0). By wall clock: before the first step at which
    `schedule` would lower the learning rate or one of `starts` has come, by the recorded clock.
    """

    step: int | None = None
    schedule: Schedule | None = None
    starts: tuple[Late, ...] = ()

    def __post_init__(self) -> None:
        require((self.step is None) != (self.schedule is None), "give either step or schedule")
        require_positive(step=self.step)
        require(
            self.schedule is None or self.schedule.basis == "wallclock",
            "schedule.basis=steps departs at a step: give that",
        )
        require(
            self.step is None or not self.starts, f"starts beside step={self.step}: drop starts"
        )


@spec
class HessiansTask:
    """What a bank entry's Hessians follow from. Of `gptq` only what makes the calibration text is
    set: what rounds by the Hessians stays at its default, so that trials of it share them."""

    entry: str
    gptq: Gptq


@spec
class ArtifactTask:
    """One artifact of a bank entry."""

    entry: str
    final: FinalSpec


@spec
class FinalTask:
    """One final of a bank entry: raw, ema-<decay> or swa."""

    entry: str
    final: FinalSpec
    evaluate: EvaluateSpec


def train_task(recipe: Recipe) -> TrainTask:
    """The training that a recipe asks for. Which EMA a final takes is not the training's concern:
    a chosen decay and a banked one make the same task."""
    averages = recipe.train.averages
    kept = replace(averages, ema_decay=None, ema_bank=averages.decays())
    return TrainTask(
        model=recipe.model,
        train=replace(recipe.train, averages=kept),
        parity_window=recipe.evaluate.window,
        observe=replace(recipe.observe, forecast=recipe.observe.forecast or recipe.final),
    )


def final_task(recipe: Recipe) -> FinalTask:
    """The final that a recipe asks for."""
    decay = recipe.train.averages.ema_decay
    average = recipe.final.average
    entry = ema_entry(decay) if average == "ema" and decay is not None else average
    return FinalTask(entry=entry, final=recipe.final, evaluate=recipe.evaluate)


def artifact_task(task: FinalTask) -> ArtifactTask:
    """The artifact that a final scores."""
    return ArtifactTask(entry=task.entry, final=task.final)


def fit_task(task: FinalTask) -> FinalTask:
    """What a fit to a byte cap follows from: a final without what is chosen for it, its clips and
    bits. Points that differ in nothing else share their fit."""
    own, plain = task.final.quantize, Quantize()
    quantize = replace(
        own,
        bits=Bits(scalar=own.bits.scalar),
        clip="sd12",  # by deviations, as a fit's own clips: gptq.row_importance asks for one
        clips=plain.clips,
        clip_scope=plain.clip_scope,
        scale_floor=plain.scale_floor,
        int8=None,
        float_numel=0,
    )
    return replace(task, final=replace(task.final, quantize=quantize, trim_ones=None))


def hessians_task(task: ArtifactTask) -> HessiansTask | None:
    """The Hessians that an artifact needs, None if it rounds without."""
    gptq = task.final.quantize.gptq
    if gptq is None:
        return None
    text = Gptq(calibration=gptq.calibration, sequences=gptq.sequences, seq_len=gptq.seq_len)
    if gptq.calibration == "generated":
        text = replace(text, temperature=gptq.temperature, seed=gptq.seed)
    return HessiansTask(entry=task.entry, gptq=text)
