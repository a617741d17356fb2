"""The training loop, and what it leaves behind.

`train` reads top-down: build or resume, warm up off the clock, step until done, score itself,
write the bank. In `folder`: metrics.jsonl while it runs, checkpoint/ for a restart, bank/ at
the end. The caller writes result.json, which is what makes the training count as done.
"""

import logging
import math
import shutil
from pathlib import Path

import torch

from trainer.data.bytecount import ByteTable
from trainer.data.shards import Dataset
from trainer.errors import TrainingError
from trainer.evaluate.bpb import bits_per_byte
from trainer.evaluate.sliding import score_stream
from trainer.model.build import load_state
from trainer.optim.schedule import lr_scale, progress
from trainer.results import TrainResult
from trainer.rows import typical_deviations
from trainer.runtime.clock import Clock
from trainer.runtime.distributed import Ranks
from trainer.runtime.tensors import save_tensors
from trainer.sizes import forecast_interval
from trainer.specs.evaluate import EvaluateSpec
from trainer.specs.task import TrainTask
from trainer.specs.train import ema_entry
from trainer.train.journal import Journal
from trainer.train.late_qat import LateQat
from trainer.train.runner import StepRunner
from trainer.train.state import TrainState

logger = logging.getLogger(__name__)

# How far a fresh process may land from the trainer's own score (design 9).
PARITY_TOLERANCE_CPU = 1e-6
PARITY_TOLERANCE_DEVICE = 1e-3


def train(task: TrainTask, dataset: Dataset, folder: Path, ranks: Ranks) -> TrainResult:
    """Train on `dataset`, resuming from `folder` if it holds a checkpoint; leave a bank there.

    Called on every rank of the gang with the same arguments; rank 0 writes. TrainingError when
    the loss stops being finite.
    """
    spec, observe = task.train, task.observe
    on_cpu = ranks.device.type == "cpu"
    clock = Clock(settle=(lambda: None) if on_cpu else torch.cuda.synchronize)
    state = TrainState(task, ranks, clock)
    resumed = ranks.together(lambda: state.resume(folder / "checkpoint"))
    if ranks.max(state.step) != -ranks.max(-state.step):
        raise TrainingError(f"{folder}: the workers read different checkpoints; run again")
    first_step = state.step
    journal = ranks.together(lambda: Journal(folder / "metrics.jsonl", writes=ranks.is_first))
    judge = Validator(task, dataset, ranks)
    runner = StepRunner(task, dataset, state, ranks)
    late_qat = LateQat(spec.qat, state, runner, journal)
    with clock.phase("validate"):
        if not resumed:
            state.untrained_val_bpb = judge.score(state.model)
            journal.write(0, {"val/bpb": state.untrained_val_bpb})
    with clock.phase("warmup"):
        runner.warm_up()
        ranks.barrier()

    loss, done = math.nan, state.step >= spec.iterations
    with clock.phase("train"):
        while not done:
            scale = lr_scale(spec, state.step, runner.elapsed_s)
            share_done = progress(spec, state.step, runner.elapsed_s)
            late_qat.turn_on_if_due(scale, share_done)
            loss_tensor = runner.step(state.step, scale)
            state.step += 1
            state.averages.update(state.step, scale, share_done)
            done = state.step >= spec.iterations or runner.is_out_of_time()
            if done or state.step % observe.log_every == 0:
                loss = _finite("loss", runner.gang_mean(loss_tensor), state.step)
                journal.write(state.step, runner.metrics(loss, scale))
            if done or _is_due(state.step, observe.validate_every):
                with clock.phase("validate"):
                    val_bpb = _finite("val/bpb", judge.score(state.model), state.step)
                    journal.write(state.step, {"val/bpb": val_bpb, **_sizes(task, state.model)})
            if not done and _is_due(state.step, observe.checkpoint_every):
                with clock.phase("checkpoint"):
                    _checkpoint(state, folder, ranks)

    for missed in state.never_came():
        logger.warning("%s in %d steps: the training is as without it", missed, state.step)
    with clock.phase("bank"):
        entries = state.averages.entries()
        if ranks.is_first:
            save_tensors(folder / "bank", {name: _on_cpu(entry) for name, entry in entries.items()})
    decays = spec.averages.decays()
    parity_entry = ema_entry(decays[0]) if decays else "raw"
    with clock.phase("validate"):
        load_state(state.model, entries[parity_entry])
        parity_bpb = judge.score(state.model)
    seconds = clock.stop()
    return TrainResult(
        steps=state.step,
        steps_computed=state.step - first_step,
        num_params=sum(parameter.numel() for parameter in state.model.parameters()),
        tokens=state.step * spec.batch_tokens,
        world_size=ranks.world_size,
        train_clock_s=ranks.max(seconds.get("train", 0.0)),
        clock_s={phase: ranks.max(seconds.get(phase, 0.0)) for phase in PHASES},
        final_train_loss=loss,
        untrained_val_bpb=state.untrained_val_bpb,
        entries=tuple(entries),
        parity_entry=parity_entry,
        parity_bpb=parity_bpb,
        parity_tolerance=PARITY_TOLERANCE_CPU if on_cpu else PARITY_TOLERANCE_DEVICE,
        qat_start_step=None if state.fake_quants is None else state.fake_quants.start_step,
    )


PHASES = ("setup", "warmup", "train", "validate", "checkpoint", "bank")


def _finite(name: str, value: float, step: int) -> float:
    if not math.isfinite(value):
        raise TrainingError(
            f"training diverged: {name} {value} at step {step}; lower the learning rates or set "
            "train.optimizer.grad_clip"
        )
    return value


def _sizes(task: TrainTask, model: torch.nn.Module) -> dict[str, float]:
    """Forecast the weights file that the weights as they stand would make, with its interval."""
    if task.observe.forecast is None:
        return {}
    stds = typical_deviations({name: p.detach() for name, p in model.named_parameters()})
    size = forecast_interval(task.model, task.observe.forecast, stds)
    return {
        "size/forecast_bytes": size.point,
        "size/forecast_low_bytes": size.low,
        "size/forecast_high_bytes": size.high,
    }


def _checkpoint(state: TrainState, folder: Path, ranks: Ranks) -> None:
    if ranks.is_first:
        state.save(folder / "checkpoint")
    ranks.barrier()  # or the others would wait on their train clocks


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _on_cpu(entry: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in entry.items()}


def discard_checkpoints(folder: Path) -> None:
    """Remove a finished training's checkpoints: its bank is what is kept."""
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)


class Validator:
    """The trainer's own score: blocks without overlap over the validation split."""

    def __init__(self, task: TrainTask, dataset: Dataset, ranks: Ranks) -> None:
        self.spec = EvaluateSpec(window=task.parity_window, stride=task.parity_window)
        stream = dataset.stream("val")
        self.tokens = stream.read(0, len(stream))
        self.table = ByteTable.load(dataset.tokenizer_path, task.model.vocab_size)
        self.ranks = ranks

    def score(self, model: torch.nn.Module) -> float:
        """Return val bpb of the model as it stands."""
        return bits_per_byte(
            score_stream(model, self.tokens, self.table, self.spec, self.ranks)  # type: ignore[arg-type]
        )
